"""`clerk-sync status`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
import psycopg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker import db, inbox
from worker.app import create_celery, waiting
from worker.cli.options import info_option, json_option, settings, to_json
from worker.errors import ConfigError
from worker.settings import Settings


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold; `problem` says what to do where it doesn't."""

    name: str
    problem: str | None


@click.command()
@info_option
@json_option
def status(*, info: Path | None, as_json: bool) -> None:
    """Show whether everything works and the data is fresh.

    Checks the configuration, Postgres with its schema, and the broker, and counts the inbox and the users. Exits 1
    where a check fails. Events that were set aside are shown but fail nothing: see clerk-sync events list. Missing
    are users with metadata that is to be copied and comes only with their next event.
    """
    found = settings(info, "database_url", claims=False)
    checks, counts = _look(found, info)
    ok = not any(check.problem for check in checks)
    if as_json:
        listed = [{"name": check.name, "ok": check.problem is None, "problem": check.problem} for check in checks]
        click.echo(to_json({"ok": ok, "checks": listed, "counts": counts}))
    else:
        _print(checks, counts)
    sys.exit(0 if ok else 1)


def _look(found: Settings, info: Path | None) -> tuple[list[Check], dict[str, Any] | None]:
    try:
        settings(info, "signing_secrets", "database_url", "redis_url")
        checks = [Check("configuration", None)]
    except ConfigError as error:
        checks = [Check("configuration", str(error))]
    counts: dict[str, Any] | None = None
    try:
        with db.connect(found.database_url, "cli", statement_ms=10_000) as connection:
            problem = db.schema_problem(db.schema_version(connection))
            checks += [Check("Postgres", None), Check("schema", problem)]
            if problem is None:
                counts = inbox.counts(connection)
    except psycopg.Error as error:
        checks.append(Check("Postgres", f"doesn't answer: {db.describe(error)}"))
    if found.redis_url:
        heard = waiting(create_celery(found.redis_url)) is not None
        checks.append(Check("broker", None if heard else "doesn't answer: events are applied by sweeps, within 10 s"))
    return checks, counts


def _print(checks: list[Check], counts: dict[str, Any] | None) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        mark = Text("ok", "green") if check.problem is None else Text("failed", "red")
        table.add_row(check.name, mark, Text(check.problem or ""))
    console.print(table)
    if counts is None:
        return
    numbers = Table(box=None, pad_edge=False)
    for name in ("pending", "oldest pending", "dead", "done", "users", "over budget", "missing", "tombstones"):
        numbers.add_column(name, justify="right")
    numbers.add_row(
        str(counts["pending"]),
        f"{counts['oldest_pending_seconds']:.1f} s",
        f"[red]{counts['dead']}[/]" if counts["dead"] else "0",
        str(counts["done"]),
        str(counts["users"]),
        f"[yellow]{counts['users_over_budget']}[/]" if counts["users_over_budget"] else "0",
        f"[yellow]{counts['users_content_missing']}[/]" if counts["users_content_missing"] else "0",
        str(counts["tombstones"]),
    )
    console.print()
    console.print(numbers)
