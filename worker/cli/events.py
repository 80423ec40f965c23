"""`clerk-sync events list|show|retry|dismiss`."""

from __future__ import annotations

import dataclasses
import sys
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import click
from rich.table import Table
from rich.text import Text

from worker import inbox
from worker.cli.charts import print_whole
from worker.cli.options import connected, info_option, json_option, settings, to_json
from worker.errors import ConfigError

_COLOURS = {"pending": "yellow", "done": "green", "dead": "red"}


@click.group()
def events() -> None:
    """Look at the inbox; retry or dismiss what was set aside. Bodies are never shown."""


@events.command("list")
@click.option("--state", type=click.Choice(["pending", "done", "dead"]), help="Only events in this state.")
@click.option("--user", "user_id", help="Only events of this user.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="The most to list.")
@info_option
@json_option
def list_events(*, state: str | None, user_id: str | None, limit: int, info: Path | None, as_json: bool) -> None:
    """List the latest events, newest first."""
    with connected(settings(info, "database_url", claims=False).database_url) as connection:
        found = inbox.listed(connection, state=state, user_id=user_id, most=limit)
    if as_json:
        click.echo(to_json([dataclasses.asdict(event) for event in found]))
        return
    if not found:
        click.echo("No such event.")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("svix_id", "state", "type", "user_id", "attempts", "received_at", "error"):
        table.add_column(name, no_wrap=True)
    for event in found:
        table.add_row(
            # Text, not str: what a sender chose is no markup.
            Text(event.svix_id),
            Text(event.state, _COLOURS[event.state]),
            Text(event.type or ""),
            Text(event.user_id or ""),
            Text(str(event.attempts)),
            Text(_time(event.received_at)),
            Text(event.error or ""),
        )
    print_whole(table)


@events.command("show")
@click.argument("svix_id", metavar="ID")
@info_option
@json_option
def show_event(*, svix_id: str, info: Path | None, as_json: bool) -> None:
    """Show one event: its state, why it was set aside, and how large its body is."""
    with connected(settings(info, "database_url", claims=False).database_url) as connection:
        event = inbox.show(connection, svix_id)
    if event is None:
        click.echo(f"There is no event {svix_id}.", err=True)
        sys.exit(1)
    fields = dataclasses.asdict(event)
    if as_json:
        click.echo(to_json(fields))
        return
    for name, value in fields.items():
        shown = "" if value is None else _time(value) if isinstance(value, datetime) else str(value)
        click.echo(f"{name:<14} {shown}")
    if event.state == "dead":
        click.echo(f"\nOnce its cause is mended: clerk-sync events retry {event.svix_id}")
        click.echo(f"Where it never can be: clerk-sync events dismiss {event.svix_id}")


@events.command("retry")
@click.argument("svix_ids", metavar="[ID]...", nargs=-1)
@click.option("--dead", is_flag=True, help="Retry every event that was set aside.")
@info_option
@json_option
def retry_events(*, svix_ids: tuple[str, ...], dead: bool, info: Path | None, as_json: bool) -> None:
    """Make events that were set aside pending again; a running worker applies them within seconds.

    Exits 1 where an ID is not that of an event that was set aside.
    """
    if bool(svix_ids) == dead:
        raise ConfigError("say which: clerk-sync events retry ID..., or --dead for all that were set aside")
    with connected(settings(info, "database_url", claims=False).database_url) as connection:
        retried = inbox.retry(connection, None if dead else svix_ids)
    _tell("retried", "Pending again", retried, svix_ids, as_json=as_json)


@events.command("dismiss")
@click.argument("svix_ids", metavar="[ID]...", nargs=-1)
@click.option("--dead", is_flag=True, help="Dismiss every event that was set aside.")
@info_option
@json_option
def dismiss_events(*, svix_ids: tuple[str, ...], dead: bool, info: Path | None, as_json: bool) -> None:
    """Give up events that were set aside and can never be applied: their bodies are erased for good.

    Their reasons stay until they are pruned. Exits 1 where an ID is not that of an event that was set aside.
    """
    if bool(svix_ids) == dead:
        raise ConfigError("say which: clerk-sync events dismiss ID..., or --dead for all that were set aside")
    with connected(settings(info, "database_url", claims=False).database_url) as connection:
        dismissed = inbox.dismiss(connection, None if dead else svix_ids)
    _tell("dismissed", "Dismissed", dismissed, svix_ids, as_json=as_json)


def _tell(key: str, done: str, changed: list[str], asked: tuple[str, ...], *, as_json: bool) -> NoReturn:
    """Say which events were changed, and end: 1 where one that was asked for isn't set aside."""
    missing = sorted(set(asked) - set(changed))
    if as_json:
        click.echo(to_json({key: changed, "not_dead": missing}))
    else:
        click.echo(f"{done}: {len(changed)}.")
        for svix_id in missing:
            click.echo(f"{svix_id} is not an event that was set aside.", err=True)
    sys.exit(1 if missing else 0)


def _time(value: datetime) -> str:
    return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
