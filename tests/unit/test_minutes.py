"""Several minutes as one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from worker.minutes import Minute, put_together

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def minute(number: int, applied: int, *fresh: float) -> Minute:
    """A minute of so many events, with its p50, p99 and longest."""
    p50, p99, longest = fresh or (None, None, None)
    return Minute(NOON + timedelta(minutes=number), applied + 1, applied, 2, p50, p99, longest)


def test_counts_are_added_and_the_first_one_s_time_is_kept() -> None:
    found = put_together([minute(0, 3, 1, 2, 3), minute(1, 5, 1, 2, 3)])
    assert (found.minute, found.acknowledged, found.applied, found.dead) == (NOON, 10, 8, 4)


def test_equal_minutes_are_together_as_fresh_as_each() -> None:
    found = put_together([minute(number, 100, 0.5, 1.5, 4) for number in range(10)])
    assert (found.fresh_p50, found.fresh_p99, found.fresh_max) == (0.5, 1.5, 4)


def test_minutes_count_by_their_events() -> None:
    """A late event of a quiet minute is nothing beside a thousand; a minute that is late as a whole is."""
    busy = minute(0, 1000, 0.5, 1.5, 4)
    found = put_together([minute(0, 1, 90, 90, 90), busy])
    assert (found.fresh_p50, found.fresh_p99, found.fresh_max) == (0.5, 4, 90)
    found = put_together([busy, minute(1, 1001, 80, 90, 95)])
    assert (found.fresh_p50, found.fresh_p99, found.fresh_max) == (80, 90, 95)


def test_where_nothing_was_applied_there_is_no_freshness() -> None:
    found = put_together([minute(0, 0), minute(1, 0)])
    assert (found.fresh_p50, found.fresh_p99, found.fresh_max) == (None, None, None)
    assert put_together([minute(0, 0), minute(1, 1, 1, 2, 3)]).fresh_p50 == 1
