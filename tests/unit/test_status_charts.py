"""The pictures of the status page, in numbers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from webhooks import charts
from worker.minutes import Minute

AT = datetime(2026, 5, 1, 12, 30, 40, tzinfo=UTC)
END = AT.replace(second=0)
SIX = timedelta(hours=6)


def minute(ago: int, came: int = 4, applied: int = 4, dead: int = 0, fresh: float | None = 0.5) -> Minute:
    return Minute(END - timedelta(minutes=ago), came, applied, dead, fresh, fresh and 2 * fresh, fresh and 3 * fresh)


def test_minutes_are_sorted_into_slots_that_end_with_the_last_minute_that_is_over() -> None:
    minutes = [minute(361), minute(360), minute(356), minute(355), minute(5), minute(1), minute(0)]
    found = charts.slots(minutes, AT, SIX)
    assert len(found) == charts.SLOTS
    assert (found[0].start, found[-1].end) == (END - SIX, END)
    assert [(place, slot.minutes) for place, slot in enumerate(found) if slot.counted] == [(0, 2), (1, 1), (71, 2)]


def test_a_slot_is_a_rate_of_the_minutes_that_were_counted() -> None:
    (*_, last) = charts.slots([minute(3, 10), minute(1, 20)], AT, SIX)
    assert last.counted
    assert last.each_minute(last.counted.acknowledged) == 15


def test_times_without_a_worker_are_gaps_and_neighbours_are_one() -> None:
    minutes = [minute(ago) for ago in range(1, 361) if not 50 < ago <= 100 and ago != 33]
    found = charts.slots(minutes, AT, SIX)
    (gap,) = charts.gaps(found)
    assert (gap.start, gap.end) == (END - timedelta(minutes=100), END - timedelta(minutes=50))
    assert round(gap.left + gap.width, 6) == round(100 * 310 / 360, 6)
    assert [(gap.left, gap.width) for gap in charts.gaps(charts.slots([], AT, SIX))] == [(0, 100)]
    before = charts.slots([minute(ago) for ago in range(1, 30)], AT, SIX)
    assert [round(gap.left) for gap in charts.gaps(before)] == [0]
    after = charts.slots([minute(ago) for ago in range(11, 361)], AT, SIX)
    assert [gap.end for gap in charts.gaps(after)] == [END]


def test_columns_are_as_high_as_their_rates_and_whatever_is_more_than_nothing_shows() -> None:
    found = charts.slots([minute(6, 1000, 500, 1), minute(1, 1, 0, fresh=None)], AT, SIX)
    (tall, low), most = charts.events(found)
    assert most == 1000
    assert tall.came
    assert tall.applied
    assert (tall.came.height, tall.came.top, tall.applied.height) == (charts.HEIGHT, 0, charts.HEIGHT / 2)
    assert tall.dead
    assert low.came
    assert (low.came.height, low.applied, low.dead) == (charts.LEAST_HEIGHT, None, None)
    assert tall.came.left + tall.came.width <= tall.applied.left
    assert charts.events(charts.slots([], AT, SIX)) == ([], 0)
    (quiet,), most = charts.events(charts.slots([minute(1, 0, 0, fresh=None)], AT, SIX))
    assert (quiet.came, quiet.applied, most) == (None, None, 0)


def test_freshness_is_drawn_tenfold_by_tenfold_and_judged() -> None:
    minutes = [minute(11, fresh=0.5), minute(6, fresh=6), minute(1, fresh=5000)]
    spans, marks = charts.freshness(charts.slots(minutes, AT, SIX), 10, 60)
    assert [span.level for span in spans] == ["good", "warn", "bad"]
    assert [text for _, text in marks] == ["0.1 s", "1 s", "10 s", "1 min", "10 min", "1 h", "1 d"]
    tops = [top for top, _ in marks]
    assert (tops[0], tops[-1]) == (charts.HEIGHT, 0)
    assert round(tops[0] - tops[1], 6) == round(tops[1] - tops[2], 6)
    assert spans[0].box.top > spans[1].box.top > spans[2].box.top >= 0


def test_the_scale_of_freshness_reaches_ten_seconds_at_least_and_whatever_there_is() -> None:
    _, marks = charts.freshness(charts.slots([], AT, SIX), 10, 60)
    assert marks[-1] == (0, "10 s")
    spans, marks = charts.freshness(charts.slots([minute(1, fresh=1e7)], AT, SIX), 10, 60)
    assert marks[-1][0] > 0
    assert spans[0].box.top >= 0
    (instant,), _ = charts.freshness(charts.slots([minute(1, fresh=0.0)], AT, SIX), 10, 60)
    assert (instant.box.height, instant.box.top + instant.box.height) == (charts.LEAST_HEIGHT, charts.HEIGHT)


def test_full_hours_are_written_below_and_about_six_of_them() -> None:
    for hours in charts.HOURS:
        found = list(charts.hours(AT, timedelta(hours=hours)))
        assert 5 <= len(found) <= 7
        assert {one.minute for _, one in found} == {0}
        assert all(3 <= place <= 97 for place, _ in found)
    assert [one.hour for _, one in charts.hours(AT, SIX)] == [7, 8, 9, 10, 11, 12]
