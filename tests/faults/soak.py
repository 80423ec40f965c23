"""`make soak`: a steady load with faults for a long while, to see that memory, connections and tables level off."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import psycopg
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.acceptance.system import children
from tests.faults.kinds import KINDS
from tests.faults.lane import Lane, Outcome, bad, told
from worker import local

RATE: Final = 40.0
SAMPLE_SECONDS: Final = 5.0
PAUSE_SECONDS: Final = 8.0
"""Between two faults."""

USERS: Final = 2000

FAULTS: Final = (
    "Redis killed",
    "Redis wiped",
    "Redis evicts",
    "Redis hung",
    "Redis: connections cut",
    "Redis refuses connections",
    "Redis: forged messages",
    "Postgres restarted",
    "Postgres ends our sessions",
    "Postgres hung",
    "Postgres: connections cut",
    "Postgres refuses connections",
    "Postgres commits, and the answer is lost",
    "Postgres at its connection limit",
    "Postgres slow",
    "a long lock on clerk.users",
    "200 connections with half a request",
    "beat killed",
)
"""None that ends a receiver or a worker: what one of them gathers in a long life is to be seen."""

AGE: Final = """
update clerk.webhook_events set processed_at = processed_at - interval '30 days'
where state = 'done' and processed_at between now() - interval '1 day' and now() - interval '2 minutes'
"""
"""Days of a life in minutes: what was applied some time ago becomes old enough to be pruned."""

SIZES: Final = """
select
  pg_total_relation_size('clerk.webhook_events') / 1e6,
  pg_total_relation_size('clerk.users') / 1e6,
  pg_total_relation_size('clerk.user_contents') / 1e6,
  (select count(*) from pg_stat_activity where application_name like 'clerk-sync%')
"""


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that is to level off; `slack` is what it may grow by beside a tenth, in its own unit."""

    name: str
    slack: float


RECEIVERS, WORKERS, OTHERS = "receivers, MB", "workers, MB", "up and beat, MB"
FILES, THREADS, SESSIONS = "open files", "threads", "sessions in Postgres"
INBOX, USER_ROWS, CONTENTS = "clerk.webhook_events, MB", "clerk.users, MB", "clerk.user_contents, MB"
MEASURES: Final = (
    Measure(RECEIVERS, 10),
    Measure(WORKERS, 10),
    Measure(OTHERS, 10),
    Measure(FILES, 20),
    Measure(THREADS, 10),
    Measure(SESSIONS, 4),
    Measure(INBOX, 2),
    Measure(USER_ROWS, 1),
    Measure(CONTENTS, 2),
)

Series = dict[str, list[float]]


@click.command(context_settings={"show_default": True})
@click.option("--minutes", type=click.FloatRange(0.2, 24 * 60), default=20.0, help="How long.")
@click.option("--rate", type=click.FloatRange(1, 500), default=RATE, help="Events a second.")
@click.option("--seed", default="clerk-sync", help="The same seed does the same things to the same users.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all samples there.")
def main(minutes: float, rate: float, seed: str, json_path: Path | None) -> None:
    """Run two hosts under a steady load with faults, and see that nothing grows for ever.

    Compares the third quarter of the time with the last. Exits 1 where something has grown by over a tenth, or
    where an event is lost or a row wrong.
    """
    folder = Path(tempfile.mkdtemp(prefix="clerk-sync-soak-"))
    folder.chmod(0o711)
    lane = Lane(folder / "system", seed, rate=rate, present=USERS)
    series, outcomes = run(lane, minutes * 60, Console(stderr=True))
    print_table(Console(), series, outcomes, minutes)
    if json_path:
        json_path.write_text(json.dumps({"seconds": SAMPLE_SECONDS, "series": series}, indent=1) + "\n", "utf-8")
    failed = grown(series) or any(bad(outcome) for outcome in outcomes) or lane.unexpected()
    if failed:
        click.echo(f"\nAll output stands in {folder}")
    else:
        local.discard(folder / "system" / "servers")
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


def run(lane: Lane, seconds: float, console: Console) -> tuple[Series, list[Outcome]]:
    """Let events flow so long, with a fault now and then; samples of each measure, and what came of each fault."""
    outcomes: list[Outcome] = []
    series: Series = defaultdict(list)
    over = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with lane.running(), Progress(*columns, console=console) as progress:
        bar = progress.add_task("soaking", total=seconds)
        started = time.monotonic()
        sampling = threading.Thread(target=take_samples, args=(lane, series, over), daemon=True)
        sampling.start()
        chance = random.Random(lane.seed)
        for number in itertools.count():
            lane.sender.flow()
            threading.Event().wait(min(PAUSE_SECONDS, max(0.0, started + seconds - time.monotonic())))
            progress.update(bar, completed=time.monotonic() - started)
            if time.monotonic() - started >= seconds:
                break
            outcomes.append(lane.inject(KINDS[chance.choice(FAULTS)], number, chance))
            if bad(outcomes[-1]):
                progress.console.print(told(outcomes[-1]), style="red")
        over.set()
        sampling.join()
        outcomes.append(lane.final())
    return series, outcomes


def take_samples(lane: Lane, series: Series, over: threading.Event) -> None:
    """Measure every few seconds, and let time pass in the inbox. What can't be measured just now is left out."""
    for number in itertools.count(1):
        for name, value in processes(lane).items():
            series[name].append(value)
        with contextlib.suppress(psycopg.Error), lane.cluster.connect() as connection:
            connection.execute("set statement_timeout = 3000")
            sizes = connection.execute(SIZES).fetchone() or ()
            for name, value in zip((INBOX, USER_ROWS, CONTENTS, SESSIONS), sizes, strict=True):
                series[name].append(float(value))
            if number % 6 == 0:
                connection.execute(AGE)
                resolve(lane)
        if over.wait(SAMPLE_SECONDS):
            return


def resolve(lane: Lane) -> None:
    """Dismiss what was set aside, as an operator does: until then it is kept."""
    lane.cluster.hosts[0].system.program("events", "dismiss", "--dead", "--json")


def processes(lane: Lane) -> dict[str, float]:
    """Memory, files and threads of all processes of the hosts."""
    found: dict[str, float] = defaultdict(float)
    for host in lane.cluster.hosts:
        pids = host.system.pids
        for name, pid in {**pids, "up": host.system.pid}.items():
            kind = {"web": RECEIVERS, "worker": WORKERS}.get(name, OTHERS)
            for one in (pid, *(children(pid) if name == "web" else ())):
                with contextlib.suppress(OSError):
                    fields = dict(
                        line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text("utf-8").splitlines()
                    )
                    found[kind] += int(fields["VmRSS"].split()[0]) / 1000
                    found[THREADS] += int(fields["Threads"])
                    found[FILES] += sum(1 for _ in Path(f"/proc/{one}/fd").iterdir())
    return found


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The means of the third quarter and of the last."""
    quarter = max(1, len(values) // 4)
    return statistics.fmean(values[2 * quarter : 3 * quarter] or values), statistics.fmean(values[-quarter:])


def grown(series: Series) -> list[str]:
    """The measures that have not levelled off."""
    found = []
    for measure in MEASURES:
        earlier, later = quarters(series[measure.name])
        if later > earlier * 1.1 + measure.slack:
            found.append(measure.name)
    return found


def chart(values: Sequence[float], width: int = 40) -> str:
    """The values over time, as a line of small bars from nothing to the largest."""
    step = max(1, len(values) // width)
    shown = [statistics.fmean(values[place : place + step]) for place in range(0, len(values), step)]
    largest = max(shown) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(value / largest * 8))] for value in shown)


def print_table(console: Console, series: Series, outcomes: Sequence[Outcome], minutes: float) -> None:
    """One line for each measure, and one of what was lost."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "over the time", "third quarter", "last quarter", "most"):
        table.add_column(name, justify="left" if name in {"", "over the time"} else "right", no_wrap=True)
    over = grown(series)
    for measure in MEASURES:
        values = series[measure.name]
        earlier, later = quarters(values)
        style = "red" if measure.name in over else None
        table.add_row(
            measure.name, chart(values), f"{earlier:,.1f}", f"{later:,.1f}", f"{max(values):,.1f}", style=style
        )
    console.print(table)
    acknowledged = outcomes[-1].acknowledged
    console.print(
        f"{minutes:g} minutes, {len(outcomes) - 1} faults, {acknowledged:,} events acknowledged, "
        f"{sum(one.lost for one in outcomes)} lost, {sum(one.wrong for one in outcomes)} wrong rows, "
        f"{sum(one.stuck is not None for one in outcomes)} times stuck"
    )


if __name__ == "__main__":
    main()
