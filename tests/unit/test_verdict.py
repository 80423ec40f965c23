"""What the status page makes of what it found: whether the data is fresh, and what to do."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from webhooks.overview import SILENT, Overview, recent, verdict, worker_seen
from worker import runs
from worker.minutes import Minute
from worker.runs import Run

AT = datetime(2026, 5, 1, 12, 30, 40, tzinfo=UTC)
THIS = AT.replace(second=0)


def minute(ago: int, came: int = 4) -> Minute:
    return Minute(THIS - timedelta(minutes=ago), came, 4, 0, 0.5, 1.4, 3)


def overview(minutes: range = range(60, 0, -1), came: int = 4, runs_: list[runs.Overview] | None = None,
             **counts: Any) -> Overview:  # fmt: skip
    """Everything is well, but for what is said."""
    counted = [minute(ago, came) for ago in minutes]
    well = {"pending": 0, "dead": 0, "done": 4, "oldest_pending_seconds": 0.0, "users_content_missing": 0}
    return Overview(
        at=AT, counts=well | counts, minutes=counted, newest=counted[-1] if counted else None, runs=runs_ or []
    )


def ran(kind: str, state: str = "done", error: str | None = None, **counters: int) -> runs.Overview:
    run = Run(1, kind, "periodic", state, AT, AT, counters=Counter(counters), error=error)
    return runs.Overview(run, running=False, made_up=False, done=None, at=AT)


def test_all_is_well() -> None:
    found = verdict(overview())
    assert (found.level, found.word, found.advice) == ("good", "Fresh", [])
    assert "40 events, half were visible within 0.5 s of being sent, 99 % within 1.4 s" in found.sentence


@pytest.mark.parametrize(
    ("pending", "oldest", "level", "word", "sentence"),
    [
        (1, 0.31, "good", "Fresh", "1 event waits, the oldest for 0.3 s."),
        (5310, 9.9, "good", "Fresh", "5,310 events wait, the oldest for 9.9 s."),
        (7, 31.0, "warn", "Behind", "7 events wait, the oldest for 31 s."),
        (5310, 290.0, "bad", "Not fresh", "5,310 events wait, the oldest for 4 min."),
    ],
)
def test_it_is_as_fresh_as_the_oldest_that_waits(
    pending: int, oldest: float, level: str, word: str, sentence: str
) -> None:
    found = verdict(overview(pending=pending, oldest_pending_seconds=oldest))
    assert (found.level, found.word) == (level, word)
    assert found.sentence.startswith(sentence)
    assert [advice.text.split(".")[0] for advice in found.advice] == (
        [] if level == "good" else ["Look at the workers' log"]
    )


def test_without_a_worker_nothing_is_fresh_for_long() -> None:
    found = verdict(overview(range(60, 7, -1)))
    assert (found.level, found.word) == ("warn", "No worker")
    assert found.sentence == "No worker has been seen for 7 min. Nothing waits so far."
    found = verdict(overview(range(60, 7, -1), pending=3, oldest_pending_seconds=5.0))
    assert (found.level, found.word) == ("bad", "Not fresh")
    assert found.sentence == "No worker has been seen for 7 min. 3 events wait, the oldest for 5.0 s."
    assert found.advice[0].text.startswith("Start a worker")
    assert "seen yet" in verdict(overview(range(0))).sentence


def test_a_worker_is_there_while_it_counts_each_minute_soon_after_its_end() -> None:
    assert worker_seen(overview(range(60, 0, -1)))
    assert worker_seen(overview(range(60, 1, -1)))
    assert worker_seen(overview(range(60, 2, -1))) is False
    unknown = overview(pending=1)
    unknown.minutes = unknown.newest = None
    assert worker_seen(unknown) is None
    assert verdict(unknown).word == "Fresh", "the oldest that waits tells"


def test_recent_are_ten_minutes() -> None:
    found = recent(overview())
    assert found
    assert found.minute == THIS - timedelta(minutes=10)
    assert recent(overview(range(60, 12, -1))) is None


def test_problems_come_first_and_nothing_is_good_with_them() -> None:
    well = overview(dead=2)
    well.problems = ["Postgres is a standby, which takes no writes: connect to the primary"]
    found = verdict(well)
    assert (found.level, found.word) == ("bad", "Not ready")
    assert [advice.text.split(":")[0] for advice in found.advice] == [
        "Postgres is a standby, which takes no writes",
        "2 events were set aside",
    ]


def test_without_postgres_or_its_tables_it_says_so() -> None:
    assert verdict(Overview(failed=True)) is SILENT
    found = verdict(Overview(at=AT, problems=["run clerk-sync migrate"], failed=True))
    assert (found.level, found.word, found.advice[0].text) == ("bad", "Not ready", "run clerk-sync migrate")
    found = verdict(Overview(at=AT, failed=True))
    assert (found.level, len(found.advice)) == ("bad", 1)


def test_what_failed_or_is_lacking_says_what_to_do() -> None:
    failed = ran(runs.FULL, "failed", "the key was refused")
    found = verdict(overview(runs_=[failed, ran(runs.BACKFILL, "running")], dead=1, users_content_missing=3))
    assert found.word == "Fresh"
    assert [(advice.text, advice.command) for advice in found.advice] == [
        ("The last run (full) failed: the key was refused. To try again:", "clerk-sync reconcile"),
        ("The last run (backfill) was cut short: its process or connection ended. To try again:",
         "clerk-sync backfill"),
        ("1 event was set aside: see the reasons below, mend what refused them, and retry.", None),
        ("Of 3 users, metadata that is to be copied is with Clerk alone:", "clerk-sync refresh --missing"),
    ]  # fmt: skip
    found = verdict(overview(runs_=[ran(runs.FULL)]))
    assert found.advice == []


def test_users_that_change_while_no_event_comes_point_at_the_endpoint() -> None:
    drift = [ran(runs.INCREMENTAL, missing=1)]
    (advice,) = verdict(overview(came=0, runs_=drift)).advice
    assert "no event has come for 30 min" in advice.text
    assert verdict(overview(came=0, runs_=[ran(runs.INCREMENTAL)])).advice == []
    assert verdict(overview(came=1, runs_=drift)).advice == []
    assert verdict(overview(range(9, 0, -1), came=0, runs_=drift)).advice == [], "it isn't known for so long"


def test_what_could_not_be_asked_is_told() -> None:
    half = overview()
    half.failed = True
    (advice,) = verdict(half).advice
    assert "didn't tell everything" in advice.text
