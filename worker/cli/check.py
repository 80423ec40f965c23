"""`clerk-sync check`."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import click
import psycopg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker import check as through
from worker import db, roles, users
from worker.app import create_celery, waiting
from worker.check import Line, Probe, noted
from worker.clerk import another_instance, askable, budgeted, heard_of, look_up
from worker.clerk_api import MOST_IDS
from worker.cli.options import info_option, json_option, read_info, settings, to_json
from worker.cli.send import sign
from worker.errors import ConfigError, SyncError
from worker.settings import Settings
from worker.template import ASSUMED_TEMPLATE
from worker.words import plural

SECRET_NAMES: Final = ("CLERK_WEBHOOK_SIGNING_SECRET", "CLERK_WEBHOOK_SECRET")
TEMPLATE_NAMES: Final = ("SESSION_CLAIMS:", "SESSION_CLAIMS_ASSUMED_BYTES")

CLERK_SECONDS: Final = 10.0
"""How long to try Clerk's API."""

TELL_SECONDS: Final = 5.0
"""How often it is told what is waited for, where nobody sees a terminal."""

COLOURS: Final = {"pass": "green", "warning": "yellow", "fail": "red", "skipped": "dim"}


@click.command()
@click.option("--url", help="Where the receiver is for Clerk, https://your.host. Default: PORT (8000) on this machine.")
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(0, through.LONGEST_WAIT),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a worker may take to apply an event.",
)
@info_option
@json_option
def check(*, url: str | None, wait_seconds: float, info: Path | None, as_json: bool) -> None:
    """Test a deployment from end to end, with an event of its own.

    \b
    clerk-sync check --url https://your.host     # after each deploy, as Clerk reaches you
    clerk-sync check                             # on the receiver's machine, without what stands before it

    Looks at the settings, Postgres, the broker and Clerk's API, and then does what Clerk does: signs a user.created for
    a user that is made up (user_clerk_sync_check_...), posts it to URL/webhooks/clerk, waits until the row can be read,
    posts it again, deletes the user, and removes every trace. No other user is touched, and Clerk isn't told.

    Run it with the settings that `web` and `worker` have. Each line says pass, fail or skipped, and what to do. A
    warning is no failure: all works, but not as it should, as without a broker, where sweeps apply the events.

    Exits 0 where no line failed, else 1.
    """
    base = through.base_of(url) if url is not None else None
    shown = _Shown(quiet=as_json)
    with shown:
        found = _settings(shown, info)
        base = base or through.base_of(
            str(read_info(info).get("url") or f"http://127.0.0.1:{found.port if found else 8000}")
        )
        _look(shown, found, base, wait_seconds)
    failed = sum(line.state == "fail" for line in shown.lines)
    if as_json:
        lines = [dataclasses.asdict(line) for line in shown.lines]
        click.echo(to_json({"ok": not failed, "url": base, "checks": lines}))
    else:
        warnings = sum(line.state == "warning" for line in shown.lines)
        well = f"\nNothing failed, with {plural(warnings, 'warning')}." if warnings else "\nAll is well."
        click.echo(f"\n{failed} of {len(shown.lines)} failed." if failed else well)
    sys.exit(1 if failed else 0)


class _Shown:
    """Shows each line as soon as it is known, and what is waited for; keeps the lines."""

    def __init__(self, *, quiet: bool) -> None:
        self.lines: list[Line] = []
        self._quiet = quiet
        self._console = Console()
        errors = Console(stderr=True)
        self._errors = errors
        self._status = errors.status("") if errors.is_terminal and not quiet else None
        self._next = TELL_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()

    def __call__(self, line: Line) -> None:
        self._settle()
        self.lines.append(line)
        if self._quiet:
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(width=7)
        table.add_column(width=14)
        table.add_column()
        table.add_row(Text(line.state, COLOURS[line.state]), line.name, Text("\n".join(line.notes)))
        self._console.print(table)

    def passed(self, name: str) -> bool:
        """Whether a line of this name is there, and no failure."""
        return any(line.name == name and line.state in ("pass", "warning") for line in self.lines)

    def failed(self, name: str) -> bool:
        """Whether a line of this name is a failure."""
        return any(line.name == name and line.state == "fail" for line in self.lines)

    def told(self, name: str) -> bool:
        """Whether a line of this name is there."""
        return any(line.name == name for line in self.lines)

    def waiting(self, what: str, passed: float, limit: float) -> None:
        """Tell what is waited for."""
        text = f"waiting for {what}: {passed:.0f} of {limit:g} s"
        if self._status:
            self._status.update(text)
            self._status.start()
        elif not self._quiet and passed >= self._next:
            self._next = passed + TELL_SECONDS
            self._errors.print(text)

    def _settle(self) -> None:
        self._next = TELL_SECONDS
        if self._status:
            self._status.stop()


# --- This machine


def _settings(shown: _Shown, info: Path | None) -> Settings | None:
    """Look at the settings; None where they can't be used at all. Raises ConfigError for --info."""
    read_info(info)
    problems: tuple[str, ...] = ()
    found: Settings | None = None
    try:
        found = settings(info, "signing_secrets", "database_url", "redis_url")
    except ConfigError as error:
        problems = error.problems
        found = _what_is_left(info)
    secret = tuple(problem for problem in problems if problem.startswith(SECRET_NAMES))
    template = tuple(problem for problem in problems if problem.startswith(TEMPLATE_NAMES))
    others = tuple(problem for problem in problems if problem not in secret + template)
    shown(Line("settings", "fail" if others else "pass", others))
    number = len(found.signing_secrets) if found else 0
    rotated = (f"{number} secrets, each of which is tried",) if number > 1 else ()
    shown(Line("signing secret", "fail" if secret else "pass", secret or rotated))
    shown(_template(found, template))
    return found


def _what_is_left(info: Path | None) -> Settings | None:
    """What can be read of settings that have problems: without what is missing, or without the template."""
    for claims in (True, False):
        with contextlib.suppress(ConfigError):
            return settings(info, claims=claims)
    return None


def _template(found: Settings | None, problems: tuple[str, ...]) -> Line:
    if problems:
        return Line("template", "fail", problems)
    if found is None:
        return noted("template", "skipped", "the settings failed")
    template = found.policy.template
    if template is ASSUMED_TEMPLATE:
        return noted(
            "template",
            "skipped",
            "SESSION_CLAIMS isn't set: tokens are taken to carry public and unsafe metadata whole. If they don't, "
            "set it to the claims from Clerk's Dashboard, Sessions, Customize session token",
        )
    warnings = tuple(f"line {one.line}, column {one.column}: {one.message}" for one in template.warnings)
    return Line("template", "warning" if warnings else "pass", warnings)


# --- What the settings lead to

DATABASE: Final = (roles.SCHEMA, roles.PRIVILEGES, roles.WRITING)


def _look(shown: _Shown, found: Settings | None, base: str, wait_seconds: float) -> None:
    connection = _postgres(shown, found)
    with connection or contextlib.nullcontext():
        usable = connection if all(map(shown.passed, DATABASE)) else None
        shown(_guarded("roles", connection if shown.passed(roles.SCHEMA) else None, _roles))
        shown(_broker(found))
        shown(_clerk(found, usable))
        if found and not shown.failed("template"):
            shown(_guarded("weights", usable, lambda one: _weights(found, one)))
        with through.new_client() as client:
            for line in through.ready(client, base):
                shown(line)
            if usable and found and found.signing_secrets:
                token = secrets.token_hex(8)
                _through(
                    shown,
                    found.database_url,
                    Probe(
                        usable,
                        client,
                        base,
                        found.signing_secrets,
                        token,
                        sign,
                        instance_id=found.instance_id,
                        wait_seconds=wait_seconds,
                        observe=shown.waiting,
                    ),
                )
            else:
                reason = "there is no signing secret to use" if usable else "it needs Postgres as it should be"
                for name in (*through.STEPS, "removal"):
                    shown(noted(name, "skipped", reason))


def _postgres(shown: _Shown, found: Settings | None) -> db.Connection | None:
    """A connection, if there is one to be had, and how what it leads to will do for a worker."""
    if found is None or not found.database_url:
        shown(noted("Postgres", "skipped", "DATABASE_URL can't be used: see the settings"))
    else:
        try:
            connection = db.connect(found.database_url, "check")
            try:
                looked = roles.look(connection, roles.WORKER)
            except BaseException:
                connection.close()
                raise
        except psycopg.Error as error:
            shown(noted("Postgres", "fail", f"doesn't answer: {db.describe(error)}. Is DATABASE_URL right?"))
        else:
            shown(noted("Postgres", "pass"))
            for name in DATABASE:
                problem = looked[name]
                shown(noted(name, "fail", problem) if problem else noted(name, "pass"))
            return connection
    for name in DATABASE:
        shown(noted(name, "skipped", "Postgres can't be asked"))
    return None


def _guarded(name: str, connection: db.Connection | None, look: Callable[[db.Connection], Line]) -> Line:
    """A line that needs Postgres."""
    if connection is None:
        return noted(name, "skipped", "it needs Postgres as it should be")
    try:
        return look(connection)
    except psycopg.Error as error:
        return noted(name, "fail", f"Postgres failed: {db.describe(error)}")


def _roles(connection: db.Connection) -> Line:
    there = roles.there(connection)
    if not there:
        return noted("roles", "skipped", "there are none: all processes share one login")
    lacking = roles.incomplete(connection)
    problems = tuple(
        f"{name} lacks privileges: clerk-sync migrate --roles prints the SQL for an administrator"
        for name in there
        if name in lacking
    )
    return Line("roles", "fail" if problems else "pass", problems or (", ".join(there),))


def _broker(found: Settings | None) -> Line:
    if found is None or not found.redis_url:
        return noted("broker", "skipped", "REDIS_URL can't be used: see the settings")
    if waiting(create_celery(found.redis_url)) is not None:
        return noted("broker", "pass")
    return noted(
        "broker",
        "warning",
        "doesn't answer: events are applied all the same, by sweeps, within 10 s. "
        "Is REDIS_URL right, and is Redis there?",
    )


def _clerk(found: Settings | None, connection: db.Connection | None) -> Line:
    name = "Clerk's API"
    if found is None:
        return noted(name, "skipped", "the settings can't be used")
    if not found.secret_key:
        return noted(name, "skipped", "CLERK_SECRET_KEY isn't set: what webhooks never told is not repaired")
    try:
        return _guarded(name, connection, lambda one: noted(name, "pass", _known(found, one)))
    except SyncError as error:
        return noted(name, "fail", str(error))


def _known(found: Settings, connection: db.Connection) -> str:
    """Ask Clerk once, for users of ours where there are any. Raises what ClerkApi does, and ConfigError where it knows
    none of them."""
    ours = heard_of(connection) or askable(users.some(connection, MOST_IDS))
    with budgeted(found, lambda: db.connect(found.database_url, "check"), patience=CLERK_SECONDS) as api:
        if not ours:
            return f"the key is taken; Clerk has {plural(api.count(), 'user')}, and none is here yet"
        known = look_up(api, ours).known
    if not known:
        raise another_instance(ours[0])
    return f"the key is taken, and of the instance whose users are here ({len(known)} of {len(ours)} asked for)"


def _weights(found: Settings, connection: db.Connection) -> Line:
    counted = users.count(connection, found.policy.fingerprint)
    if not counted.stale:
        return noted("weights", "pass")
    return noted(
        "weights",
        "warning",
        f"{counted.stale:,} of {plural(counted.users, 'user')} were weighed by other settings than these. If they "
        "are the workers' own: clerk-sync budget reweigh",
    )


# --- The user made up


def _through(shown: _Shown, database_url: str, probe: Probe) -> None:
    """Send the user through, and remove what is left of them, also when it is interrupted."""
    try:
        for line in through.send_through(probe):
            shown(line)
    except psycopg.Error as error:
        reason = (f"Postgres failed: {db.describe(error)}",)
        for name in through.STEPS:
            if not shown.told(name):
                shown(Line(name, "fail", reason))
    finally:
        shown(_removed(database_url, probe.user_id))


def _removed(database_url: str, user_id: str) -> Line:
    # Over a connection of its own: the other may have failed.
    try:
        with db.connect(database_url, "check") as connection:
            return through.remove(connection, user_id)
    except psycopg.Error as error:
        return noted(
            "removal",
            "fail",
            f"Postgres failed: {db.describe(error)}. Run it again in 15 minutes: it removes what earlier checks left",
        )
