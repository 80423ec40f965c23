"""`clerk-sync refresh`."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from worker import db, users
from worker.clerk_api import ClerkApi, is_user_id
from worker.cli.charts import print_whole
from worker.cli.options import info_option, json_option, settings, to_json
from worker.cli.pulling import patience_option, pulling
from worker.policy import Policy
from worker.refresh import Result, refresh_missing, refresh_users
from worker.words import plural

COLOURS = {"applied": "green", "erased": "yellow", "unusable": "red"}


@click.command()
@click.argument("user_ids", metavar="[USER]...", nargs=-1)
@click.option("--missing", is_flag=True, help="Refresh every user of whom metadata is to be copied that isn't here.")
@patience_option
@info_option
@json_option
def refresh(*, user_ids: tuple[str, ...], missing: bool, patience: float, info: Path | None, as_json: bool) -> None:
    """Bring users up to date from Clerk's API, now: one call for 100 users.

    \b
    clerk-sync refresh user_29w83sxmDNGwOuEthce5gg56FcC
    clerk-sync refresh --missing        after budget reweigh said that metadata is to be copied

    A user that Clerk doesn't have is erased, as user.deleted would. Prints what became of each: applied, unchanged,
    older (what is here is newer), erased, deleted (erased before), unknown (to Clerk and here), unusable. Run it with
    the settings that the workers have. Exits 1 where a user is unusable or Clerk doesn't answer.
    """
    _check(user_ids, missing=missing)
    found = settings(info, "database_url", "secret_key")
    results: list[Result] = []
    counts: Counter[str] = Counter()
    with pulling(found, patience, strict=True) as (connection, api):
        try:
            if missing:
                batches = _watched(connection, found.policy, api, quiet=as_json)
            else:
                batches = refresh_users(connection, found.policy, api, user_ids)
            for batch in batches:
                counts.update(result.outcome for result in batch)
                # Of many that nobody named, only those of whom somebody may want to know.
                results += [one for one in batch if not missing or one.outcome in ("erased", "unusable")]
        finally:
            # Also what was done before an error.
            if counts or sys.exc_info()[0] is None:
                _print(results, counts, api.calls, as_json=as_json)
        if missing and not as_json and (left := users.count_missing(connection)):
            click.echo(f"Still missing for {plural(left, 'user')}.")
    sys.exit(1 if counts["unusable"] else 0)


def _check(user_ids: tuple[str, ...], *, missing: bool) -> None:
    if bool(user_ids) == missing:
        raise click.UsageError("Say which: clerk-sync refresh USER..., or --missing.")
    for user_id in user_ids:
        if not is_user_id(user_id):
            raise click.BadParameter(f"{user_id[:60]!a} is not the id of a Clerk user, user_...", param_hint="USER")


def _watched(connection: db.Connection, policy: Policy, api: ClerkApi, *, quiet: bool) -> Iterator[list[Result]]:
    """Refresh those that are missing, with a progress bar for whoever waits at a terminal."""
    total = users.count_missing(connection)
    errors = Console(stderr=True)
    if quiet or not errors.is_terminal:
        if total and not quiet:
            click.echo(f"{plural(total, 'user')} to refresh.", err=True)
        yield from refresh_missing(connection, policy, api)
        return
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("Refreshing", total=total)
        for batch in refresh_missing(connection, policy, api):
            progress.advance(task, len(batch))
            yield batch


def _print(results: list[Result], counts: Counter[str], calls: int, *, as_json: bool) -> None:
    if as_json:
        listed = [dataclasses.asdict(result) for result in results]
        click.echo(to_json({"users": listed, "counts": dict(counts), "calls": calls}))
        return
    if results:
        table = Table("user", "outcome", box=None, pad_edge=False, show_header=False)
        for column in table.columns:
            column.no_wrap = True
        for one in results:
            said = one.outcome if one.reason is None else f"{one.outcome}: {one.reason}"
            table.add_row(Text(one.user_id), Text(said, COLOURS.get(one.outcome, "")))
        print_whole(table)
    said = ", ".join(f"{number:,} {outcome}" for outcome, number in counts.most_common()) or "nobody to refresh"
    click.echo(f"{plural(counts.total(), 'user')}: {said}; {plural(calls, 'call')}.")
