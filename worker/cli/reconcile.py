"""`clerk-sync reconcile`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Final

import click
from rich.table import Table
from rich.text import Text

from worker import reconcile as repair
from worker import runs
from worker.api_budget import key_id
from worker.cli.charts import print_whole
from worker.cli.history import counted, why
from worker.cli.options import info_option, json_option, settings, to_json
from worker.cli.pulling import Shown, ending, patience_option, print_unusable, pulling
from worker.jsontext import visible
from worker.reconcile import MANY, MOST_NAMED, Drift, Progress
from worker.runs import DRIFT, MOST_LISTED, Run
from worker.words import plural

NAMED: Final = 10
"""So many users of each kind of drift are shown; JSON names more."""

STAYS: Final = "What was repaired stays; the next run compares again."
UNCHANGED: Final = "Nothing was changed."


@click.command()
@click.option("--full", is_flag=True, help="Compare every user, not only the latest changes.")
@click.option("--erase-many", is_flag=True, help="With --full: erase also where it is over a fifth of all users.")
@click.option("--check", is_flag=True, help="Compare every user and change nothing; exit 1 where something differs.")
@patience_option
@info_option
@json_option
def reconcile(*, full: bool, erase_many: bool, check: bool, patience: float, info: Path | None, as_json: bool) -> None:
    """Compare users with Clerk's, and repair what differs: what webhooks never told, or told wrongly.

    \b
    clerk-sync reconcile            the latest changes: a few calls
    clerk-sync reconcile --full     every user: a call for 499 of them
    clerk-sync reconcile --check    every user, and only tells what differs

    Users differ who are missing here, outdated, incomplete (metadata that is to be copied isn't here), or gone at
    Clerk: those are erased. The workers do the first every RECONCILE_SECONDS, and the second once a day. An incremental
    run becomes a full one where none was ever whole, where too much has changed, or where Clerk counts other users than
    are here: so it finds lost deletions too. What is newer here stays, and nobody who was deleted comes back. Run it
    with the settings that the workers have. Exits 1 where a user can't be used (they are listed), where Clerk doesn't
    answer, or where another run is under way.
    """
    if full and check:
        raise click.UsageError(
            "--check is a full comparison already, that repairs nothing: give one of --full, --check."
        )
    if erase_many and not full:
        raise click.UsageError("--erase-many goes with --full.")
    told = settings(info, "database_url", "secret_key")
    started = time.monotonic()
    stays = UNCHANGED if check else STAYS
    apart = 0
    with pulling(told, patience) as (connection, api), Shown(quiet=as_json) as shown, ending(shown, stays):

        def observe(progress: Progress) -> None:
            shown(progress.phase.capitalize(), progress.done, progress.total)

        key = key_id(told.secret_key)
        if check:
            done: Drift | Run = repair.check(connection, told.policy, api, key=key, observe=observe)
        else:
            done = repair.reconcile(
                connection, told.policy, api, key=key, full=full, erase_many=erase_many, observe=observe
            )
            if "counted" in done.counters:
                apart = done.counters["counted"] - done.counters["here"] - runs.surplus(connection)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        result = _drift_json(done) if isinstance(done, Drift) else _run_json(done)
        click.echo(to_json(result | {"seconds": seconds}))
    elif isinstance(done, Drift):
        _print_drift(done, seconds)
    else:
        _print_run(done, apart, seconds)
    right = not (done.total or done.unusable) if isinstance(done, Drift) else not done.counters["unusable"]
    sys.exit(0 if right else 1)


# --- A run


def _run_json(run: Run) -> dict[str, Any]:
    kind = {"run": run.id, "kind": run.kind, "cause": run.cause, "state": run.state}
    return kind | counted(run) | {"unusable_users": run.unusable}


def _print_run(run: Run, apart: int, seconds: float) -> None:
    click.echo(f"Run {run.id} is done: {run.kind}, {why(run)}; {plural(run.users, 'user')} compared.")
    erased = " at Clerk: erased" if run.counters["gone"] else ""
    click.echo(f"Repaired: {run.drift}{erased}." if run.found else "Nothing differed.")
    if newer := run.counters["older"]:
        click.echo(f"Newer here than what Clerk's answer said: {plural(newer, 'user')}, left as they are.")
    _print_tombstoned(run.counters["tombstoned"])
    if apart:
        there, here = run.counters["counted"], run.counters["here"]
        click.echo(
            f"Clerk counts {plural(there, 'user')}, and here are {here:,}: a difference of {there - here:,}, where the "
            f"last full run left {there - here - apart:,}. To compare everybody: clerk-sync reconcile --full"
        )
    click.echo(f"{plural(run.calls, 'call')} to Clerk's API; {seconds:,.1f} s.")
    print_unusable(run.unusable, run.counters["unusable"])


def _print_tombstoned(number: int) -> None:
    if number:
        click.echo(f"Still at Clerk, but erased here, which is for ever: {plural(number, 'user')}.")


# --- A check


def _drift_json(drift: Drift) -> dict[str, Any]:
    return {
        "compared": drift.compared,
        "drift": {name: {"users": drift.counts[name], "user_ids": sorted(drift.named[name])} for name in DRIFT},
        "tombstoned": drift.counts["tombstoned"],
        "unusable": len(drift.unusable),
        "unusable_users": [{"user_id": one.user_id, "reason": one.reason} for one in drift.unusable],
        "calls": drift.calls,
    }


def _print_drift(drift: Drift, seconds: float) -> None:
    compared = f"{plural(drift.compared, 'user')} compared, {plural(drift.calls, 'call')}"
    if drift.total:
        click.echo(f"{plural(drift.total, 'user')} differ{'s' * (drift.total == 1)}: {compared}; {seconds:,.1f} s.\n")
        table = Table("difference", "users", "who", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for name in DRIFT:
            if number := drift.counts[name]:
                who = [visible(user_id) for user_id in sorted(drift.named[name])[:NAMED]]
                if more := number - len(who):
                    listed = "them" if number <= MOST_NAMED else f"{MOST_NAMED:,} in all"
                    who.append(f"and {more:,} more: --json lists {listed}")
                table.add_row(name, f"{number:,}", Text("\n".join(who)))
        print_whole(table)
        click.echo("\nTo repair them: clerk-sync reconcile --full")
        if drift.counts["gone"] > MANY:
            click.echo("Where those gone at Clerk are over a fifth of all, it erases them only with --erase-many.")
    else:
        click.echo(f"Nothing differs: {compared}.")
    _print_tombstoned(drift.counts["tombstoned"])
    unusable = [{"user_id": one.user_id, "reason": one.reason} for one in drift.unusable]
    print_unusable(unusable[:MOST_LISTED], len(unusable))
