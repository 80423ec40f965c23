"""The command line, `clerk-sync`: one file a command group, loaded only when it is asked for.

Exit codes: 0 done; 1 the thing asked about doesn't hold, or a part failed; 2 wrong usage or configuration; 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import click

from worker.errors import ConfigError, SyncError

# Name, module, and the line in the list of commands: the list is shown without loading any of them.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "up": ("worker.cli.up", "Run the whole system here, in the foreground."),
    "demo": ("worker.cli.demo", "Run the whole system and show what it does with signed events."),
    "migrate": ("worker.cli.migrate", "Bring the database to the newest schema."),
    "send": ("worker.cli.send", "Sign an event as Svix does and post it."),
    "check": ("worker.cli.check", "Test a deployment from end to end, with an event of its own."),
    "status": ("worker.cli.status", "Show whether everything works and the data is fresh."),
    "budget": ("worker.cli.budget", "See what the session token carries; find a template that fits."),
    "erase": ("worker.cli.erase", "Erase one user, as the user.deleted event would."),
    "backfill": ("worker.cli.backfill", "Pull every user from Clerk's API."),
    "reconcile": ("worker.cli.reconcile", "Compare users with Clerk's, and repair what differs."),
    "refresh": ("worker.cli.refresh", "Bring users up to date from Clerk's API, now."),
    "events": ("worker.cli.events", "Look at the inbox; retry or dismiss what was set aside."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101 - a programming error, not an input
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            click.echo("clerk-sync can't start:\n" + "\n".join(f"  {line}" for line in error.problems), err=True)
            sys.exit(2)
        except SyncError as error:
            click.echo(f"clerk-sync: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt as stopped:
            # A terminal has just shown ^C. What stays of what was done, the command may have said.
            said = " ".join(map(str, ("Stopped.", *stopped.args)))
            click.echo(f"\n{said}" if sys.stderr.isatty() else said, err=True)
            sys.exit(130)


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="clerk-sync")
def main() -> None:
    """Copies Clerk user metadata into Postgres, where applications simply query it.

    \b
    Try it here, with nothing installed:     clerk-sync demo
    Test it after a deploy, end to end:      clerk-sync check --url https://your.host
    See whether a running system is well:    clerk-sync status
    Read a user from your application:       select * from clerk.user_metadata where user_id = 'user_...'

    Settings are environment variables; each secret can also be given as NAME_FILE, a path to a file that holds it.
    """
