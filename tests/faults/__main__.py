"""`make faults`: real processes and servers, a sender like Svix, and faults by chance; prints what came of them."""

from __future__ import annotations

import json
import os
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.faults.kinds import KINDS, Kind
from tests.faults.lane import RATE, Lane, Outcome, bad, told
from worker import local


@click.command(context_settings={"show_default": True})
@click.option("--injections", type=click.IntRange(1), default=1000, help="How many faults.")
@click.option("--seed", default="clerk-sync", help="The same seed does the same things to the same users.")
@click.option("--systems", type=click.IntRange(1, 8), default=3, help="Clusters side by side, each of two hosts.")
@click.option("--rate", type=click.FloatRange(1, 1000), default=RATE, help="Events a second of each cluster.")
@click.option("--only", multiple=True, metavar="NAME", help="Only these kinds of faults; see --list.")
@click.option("--first", type=click.IntRange(0), default=0, help="Number of the first fault, to repeat a later one.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the outcomes there.")
@click.option("--keep", is_flag=True, help="Keep the folders with all output, also where nothing went wrong.")
@click.option("--list", "as_list", is_flag=True, help="Name the kinds of faults, and end.")
def main(
    injections: int,
    seed: str,
    systems: int,
    rate: float,
    only: tuple[str, ...],
    first: int,
    json_path: Path | None,
    keep: bool,
    as_list: bool,
) -> None:
    """Break everything that can break while events flow, and see that nothing acknowledged is lost.

    Each fault meets two hosts (receiver, worker and beat each), Postgres and a Redis-compatible server under load.
    After each, every acknowledged event must have had its effect, every row must be Clerk's truth, and every
    process must be alive and at work. Exits 1 where one isn't.
    """
    if as_list:
        click.echo("\n".join(KINDS))
        return
    unknown = set(only) - KINDS.keys()
    if unknown:
        raise click.UsageError(f"there is no fault {min(unknown)!r}: see --list")
    kinds = [KINDS[name] for name in only or KINDS]
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="clerk-sync-faults-"))
    folder.chmod(0o711)
    lanes = [Lane(folder / f"system{number}", f"{seed}/{number}", rate=rate) for number in range(systems)]
    outcomes, unexpected = run(lanes, range(first, first + injections), kinds)
    print_table(Console(), outcomes, unexpected, time.monotonic() - started)
    if json_path:
        json_path.write_text(json.dumps({"outcomes": [asdict(one) for one in outcomes]}, indent=1) + "\n", "utf-8")
    failed = unexpected or any(bad(outcome) for outcome in outcomes)
    if failed or keep:
        click.echo(f"\nAll output stands in {folder}")
    else:
        for number in range(systems):
            local.discard(folder / f"system{number}" / "servers")
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


def run(lanes: Sequence[Lane], numbers: Iterable[int], kinds: Sequence[Kind]) -> tuple[list[Outcome], list[str]]:
    """Spread the faults over the lanes, with a bar; what came of each, and lines of output that nobody expected."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    total = 0
    for number in numbers:
        waiting.put(number)
        total += 1
    outcomes: list[Outcome] = []
    unexpected: list[str] = []
    failed: list[BaseException] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("faults", total=total)

        def drive(lane: Lane) -> None:
            try:
                with lane.running():
                    for outcome in lane.run(taken(waiting), kinds):
                        outcomes.append(outcome)
                        progress.advance(bar)
                        if bad(outcome):
                            progress.console.print(told(outcome), style="red")
                    outcomes.append(lane.final())
                    unexpected.extend(lane.unexpected())
            except BaseException as error:  # noqa: BLE001 - raised again by the main thread
                failed.append(error)

        threads = [threading.Thread(target=drive, args=(lane,), daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
    return outcomes, unexpected


def taken(waiting: queue.SimpleQueue[int]) -> Iterator[int]:
    """The numbers that no other lane has taken."""
    while True:
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return


def print_table(console: Console, outcomes: Sequence[Outcome], unexpected: Sequence[str], seconds: float) -> None:
    """One line for each kind of fault, and one for all."""
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    finals = [outcome for outcome in outcomes if outcome.number < 0]
    injected = [outcome for outcome in outcomes if outcome.number >= 0]
    for outcome in injected:
        by_kind[outcome.kind].append(outcome)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("fault", "all of them, and everything compared at the end")
    for name, footer in (
        ("times", len(injected)),
        ("acknowledged", sum(outcome.acknowledged for outcome in finals)),
        ("lost", sum(outcome.lost for outcome in outcomes)),
        ("wrong rows", sum(outcome.wrong for outcome in outcomes)),
        ("stuck", sum(outcome.stuck is not None for outcome in outcomes)),
    ):
        table.add_column(name, f"{footer:,}", justify="right")
    recovery = [outcome.recovery_seconds for outcome in injected]
    table.add_column("recovery, median", f"{statistics.median(recovery):.1f} s", justify="right")
    table.add_column("longest", f"{max(recovery):.1f} s", justify="right")
    for kind, ones in sorted(by_kind.items()):
        recovery = [outcome.recovery_seconds for outcome in ones]
        table.add_row(
            kind,
            f"{len(ones):,}",
            f"{sum(outcome.acknowledged for outcome in ones):,}",
            f"{sum(outcome.lost for outcome in ones):,}",
            f"{sum(outcome.wrong for outcome in ones):,}",
            f"{sum(outcome.stuck is not None for outcome in ones):,}",
            f"{statistics.median(recovery):.1f} s",
            f"{max(recovery):.1f} s",
        )
    console.print(table)
    for outcome in outcomes:
        if bad(outcome):
            console.print(told(outcome), style="red")
    for line in unexpected[:20]:
        console.print(f"unexpected output: {line}", style="red")
    console.print(f"{len(by_kind)} kinds of faults, {seconds / 60:.0f} minutes, {os.cpu_count()} cores for all of it")


if __name__ == "__main__":
    main()
