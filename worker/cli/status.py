"""`clerk-sync status`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import psycopg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker import db, inbox, roles, runs
from worker.app import create_celery, waiting
from worker.cli.history import errors, listed, table
from worker.cli.options import info_option, json_option, settings, to_json
from worker.errors import ConfigError
from worker.runs import BACKFILL, Overview
from worker.settings import Settings
from worker.words import age


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold; `problem` says what to do where it doesn't, `off` why it is turned off."""

    name: str
    problem: str | None
    off: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What Postgres knows."""

    counts: dict[str, Any]
    runs: list[Overview]


@click.command()
@info_option
@json_option
def status(*, info: Path | None, as_json: bool) -> None:
    """Show whether everything works and the data is fresh.

    Checks the configuration, Postgres with its schema, the privileges of the role that asks and whether it may write,
    the broker, and that users were compared with Clerk's of late; counts the inbox and the users, and shows the last
    runs that pulled from Clerk. Run it as the workers run, with their DATABASE_URL: theirs are the privileges that it
    looks for (the receiver looks for its own, at /readyz). Exits 1 where a check fails. Events that were set aside are
    shown but fail nothing: see clerk-sync events list. Missing are users with metadata that is to be copied and comes
    only with their next event, or by clerk-sync refresh --missing.
    """
    found = settings(info, "database_url", claims=False)
    checks, known = _look(found, info)
    ok = not any(check.problem for check in checks)
    if as_json:
        told = [{**dataclasses.asdict(check), "ok": check.problem is None} for check in checks]
        runs_told = [listed(one) for one in known.runs] if known else None
        click.echo(to_json({"ok": ok, "checks": told, "counts": known and known.counts, "runs": runs_told}))
    else:
        _print(checks, known)
    sys.exit(0 if ok else 1)


def _look(found: Settings, info: Path | None) -> tuple[list[Check], Known | None]:
    try:
        settings(info, "signing_secrets", "database_url", "redis_url")
        checks = [Check("configuration", None)]
    except ConfigError as error:
        checks = [Check("configuration", str(error))]
    known: Known | None = None
    try:
        with db.connect(found.database_url, "cli", statement_ms=10_000) as connection:
            looked = roles.look(connection, roles.WORKER)
            checks += [Check("Postgres", None), *(Check(name, problem) for name, problem in looked.items())]
            if looked[roles.SCHEMA] is None and looked[roles.PRIVILEGES] is None:
                known = Known(inbox.counts(connection), runs.overview(connection))
    except psycopg.Error as error:
        checks.append(Check("Postgres", f"doesn't answer: {db.describe(error)}"))
    if found.redis_url:
        heard = waiting(create_celery(found.redis_url)) is not None
        checks.append(Check("broker", None if heard else "doesn't answer: events are applied by sweeps, within 10 s"))
    if known:
        checks.append(_reconciled(found, known.runs))
    return checks, known


def _reconciled(found: Settings, overviews: Sequence[Overview]) -> Check:
    """Whether users are compared with Clerk's as often as they should be; the latest run comes first."""
    name = "reconcile"
    if not found.secret_key:
        return Check(name, None, off="CLERK_SECRET_KEY isn't set")
    if overviews and overviews[0].failed:
        return Check(name, _failed(overviews[0]))
    if not found.reconcile_seconds:
        return Check(name, None, off="RECONCILE_SECONDS is 0")
    if any(one.running for one in overviews):
        return Check(name, None)
    passed = [one.at - one.done.finished_at for one in overviews if one.done and one.done.finished_at]
    if passed and min(passed) <= timedelta(seconds=3 * found.reconcile_seconds + 60):
        return Check(name, None)
    late = f"no run was done for {age(min(passed))}" if passed else "no run was ever done"
    return Check(
        name,
        f"{late}, and one is due every {found.reconcile_seconds} s: are the workers there, with CLERK_SECRET_KEY? "
        "To run one now: clerk-sync reconcile",
    )


def _failed(overview: Overview) -> str:
    run = overview.last
    reason = f"failed: {run.error}" if run.state == "failed" else "was cut short: its process or its connection ended"
    again = "backfill" if run.kind == BACKFILL else "reconcile"
    return f"the last run ({run.kind}) {reason}. To try again: clerk-sync {again}"


def _print(checks: list[Check], known: Known | None) -> None:
    console = Console()
    marks = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        mark = Text("off", "dim") if check.off else Text("failed", "red") if check.problem else Text("ok", "green")
        marks.add_row(check.name, mark, Text(check.problem or check.off or ""))
    console.print(marks)
    if known is None:
        return
    counts = known.counts
    numbers = Table(box=None, pad_edge=False)
    for name in ("pending", "oldest pending", "dead", "done", "users", "over budget", "missing", "tombstones"):
        numbers.add_column(name, justify="right")
    numbers.add_row(
        f"{counts['pending']:,}",
        f"{counts['oldest_pending_seconds']:.1f} s",
        f"[red]{counts['dead']}[/]" if counts["dead"] else "0",
        f"{counts['done']:,}",
        f"{counts['users']:,}",
        f"[yellow]{counts['users_over_budget']}[/]" if counts["users_over_budget"] else "0",
        f"[yellow]{counts['users_content_missing']}[/]" if counts["users_content_missing"] else "0",
        f"{counts['tombstones']:,}",
    )
    console.print()
    console.print(numbers)
    if known.runs:
        console.print()
        console.print(table(known.runs))
        for error in errors(known.runs[1:]):  # what ended the latest one, the check tells
            console.print(Text(error, "red"))
