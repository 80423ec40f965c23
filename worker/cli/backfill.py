"""`clerk-sync backfill`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

import click

from worker import backfill as pull
from worker.cli.options import info_option, json_option, settings, to_json
from worker.cli.pulling import Shown, ending, patience_option, print_unusable, pulling
from worker.runs import SEEN, Run
from worker.words import plural

STAYS: Final = "What was done stays; clerk-sync backfill goes on from there."


@click.command()
@click.option("--restart", is_flag=True, help="Begin with the first user, also where the last run was cut short.")
@patience_option
@info_option
@json_option
def backfill(*, restart: bool, patience: float, info: Path | None, as_json: bool) -> None:
    """Pull every user from Clerk's API: for those who were there before the webhook endpoint.

    \b
    clerk-sync backfill

    Runs beside live webhooks: what is newer here stays, and who was deleted stays deleted. A run that was cut short
    goes on where it was. Run it with the settings that the workers have. Exits 1 where a user can't be used (they are
    listed), where Clerk doesn't answer, or where another backfill runs.
    """
    found = settings(info, "database_url", "secret_key")
    started = time.monotonic()
    with pulling(found, patience) as (connection, api), Shown(quiet=as_json) as shown, ending(shown, STAYS):

        def observe(progress: pull.Progress) -> None:
            run, total = progress.run, max(progress.total, progress.run.users)  # users may come and go meanwhile
            if not shown.begun and not as_json:
                place = f"goes on after {run.users:,} of" if progress.before else "begins:"
                click.echo(f"Run {run.id} {place} {plural(total, 'user')}.", err=True)
            shown("Backfill", run.users, total)

        run = pull.backfill(connection, found.policy, api, restart=restart, observe=observe)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        counts = {name: run.counters[name] for name in SEEN}
        result = {"run": run.id, "state": run.state, "users": run.users, **counts}
        click.echo(to_json(result | {"calls": run.calls, "seconds": seconds, "unusable_users": run.unusable}))
    else:
        _print(run, seconds)
    sys.exit(1 if run.counters["unusable"] else 0)


def _print(run: Run, seconds: float) -> None:
    counts = ", ".join(f"{run.counters[name]:,} {name}" for name in SEEN)
    click.echo(f"Run {run.id} is done: {plural(run.users, 'user')} ({counts}).")
    click.echo(f"{plural(run.calls, 'call')} to Clerk's API; {seconds:,.1f} s.")
    print_unusable(run.unusable, run.counters["unusable"])
