"""The runs that pull from Clerk, in words and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from worker.runs import BACKFILL, DRIFT, SEEN, Overview, Run
from worker.words import age

WHY: Final = {
    "asked": "as asked for",
    "periodic": "periodic",
    "daily": "since it is due once a day",
    "first": "since no run was ever whole",
    "small": "since all users fit in one page",
    "many": "since too much had changed for an incremental one",
    "counts": "since the counts of users differ",
}
"""What the causes of runs mean."""

_COLOURS: Final = {"done": "green", "running": "yellow", "failed": "red", "cut short": "red"}


def why(run: Run) -> str:
    """Why it is a run of this kind."""
    return WHY.get(run.cause, run.cause)


def table(overviews: Sequence[Overview]) -> Table:
    """The last run of each kind."""
    shown = Table(box=None, pad_edge=False)
    for name in ("last run", "why", "state", "when"):
        shown.add_column(name, no_wrap=name != "why")
    for name in ("users", "calls"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("found")
    for one in overviews:
        run = one.last
        applied = f"{run.counters['applied']:,} applied" if run.kind == BACKFILL else ""
        shown.add_row(
            run.kind,
            Text(why(run)),
            Text(one.state, _COLOURS[one.state]),
            f"{age(one.at - (run.finished_at or run.started_at))} ago",
            f"{run.users:,}",
            f"{run.calls:,}",
            ", ".join(filter(None, (run.drift or applied, _unusable(run)))) or "nothing",
        )
    return shown


def _unusable(run: Run) -> str:
    number = run.counters["unusable"]
    return f"{number:,} unusable" if number else ""


def errors(overviews: Sequence[Overview]) -> list[str]:
    """Why the last run of a kind came to no end, a sentence each."""
    return [f"{one.last.kind}: {one.last.error}" for one in overviews if one.failed and one.last.error]


def listed(overview: Overview) -> dict[str, Any]:
    """The last run of a kind for JSON, and when one was last done."""
    run = overview.last
    return {
        "run": run.id,
        "kind": run.kind,
        "cause": run.cause,
        "state": overview.state,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "done_at": overview.done and overview.done.finished_at,
        **counted(run),
        "error": run.error,
    }


def counted(run: Run) -> dict[str, int]:
    """What a run counted, for JSON."""
    counts = {name: run.counters[name] for name in (*SEEN, *DRIFT, "erased")}
    return {"users": run.users, **counts, "calls": run.calls}
