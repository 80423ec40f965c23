"""The status page's pictures in numbers: places in percent of the width, heights in pixels, so that they fit any screen
without a script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from worker.minutes import MINUTE, Minute, put_together

HOURS: Final = (6, 24, 48)
"""How far back the page can look; the first, unless it is asked for another."""

SLOTS: Final = 72
"""Columns of a picture: of five minutes each for six hours."""

HEIGHT: Final = 130
"""Pixels of the tallest column."""

LEAST_HEIGHT: Final = 3.0
"""Whatever is more than nothing shows."""

FRESHEST: Final = 0.1
MARKS: Final = (
    (0.1, "0.1 s"),
    (1, "1 s"),
    (10, "10 s"),
    (60, "1 min"),
    (600, "10 min"),
    (3600, "1 h"),
    (86_400, "1 d"),
)
"""Seconds that are marked, as far as they go; at least to ten."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A column's time, and all that was counted in it; None where no worker counted."""

    start: datetime
    end: datetime
    counted: Minute | None
    minutes: int

    def each_minute(self, events: int) -> float:
        """So many events as a rate."""
        return events / self.minutes if self.minutes else 0.0


def slots(minutes: Sequence[Minute], at: datetime, length: timedelta) -> list[Slot]:
    """The time before the minute that isn't over at `at`, cut into columns."""
    width = length / SLOTS
    end = at.replace(second=0, microsecond=0)
    begin = end - length
    sorted_in: list[list[Minute]] = [[] for _ in range(SLOTS)]
    for one in minutes:
        if begin <= one.minute < end:
            sorted_in[(one.minute - begin) // width].append(one)
    return [
        Slot(begin + width * place, begin + width * (place + 1), put_together(own) if own else None, len(own))
        for place, own in enumerate(sorted_in)
    ]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: left edge and width in percent, top and height in pixels."""

    left: float
    width: float
    top: float
    height: float


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which no worker counted."""

    left: float
    width: float
    start: datetime
    end: datetime


def gaps(found: Sequence[Slot]) -> Iterator[Gap]:
    """The times without a worker, neighbours as one."""
    step = 100 / SLOTS
    first: int | None = None
    for place, slot in enumerate([*found, None]):
        if slot is not None and slot.counted is None:
            first = place if first is None else first
        elif first is not None:
            yield Gap(step * first, step * (place - first), found[first].start, found[place - 1].end)
            first = None


@dataclass(frozen=True, slots=True)
class Column:
    """What is drawn of a slot: one box for each of its figures that is more than nothing."""

    slot: Slot
    came: Box | None
    applied: Box | None
    dead: Box | None


def events(found: Sequence[Slot]) -> tuple[list[Column], float]:
    """Events that came in and that were applied, side by side, and how many a minute the tallest column is."""
    most = max(
        (slot.each_minute(max(slot.counted.acknowledged, slot.counted.applied)) for slot in found if slot.counted),
        default=0.0,
    )
    scale = HEIGHT / (most or 1)
    step = 100 / SLOTS

    def box(place: int, part: float, width: float, rate: float) -> Box | None:
        height = max(LEAST_HEIGHT, rate * scale)
        return Box(step * (place + part), step * width, HEIGHT - height, height) if rate else None

    columns = [
        Column(
            slot,
            came=box(place, 0.08, 0.40, slot.each_minute(slot.counted.acknowledged)),
            applied=box(place, 0.50, 0.40, slot.each_minute(slot.counted.applied)),
            dead=Box(step * (place + 0.08), step * 0.82, HEIGHT + 3, 4) if slot.counted.dead else None,
        )
        for place, slot in enumerate(found)
        if slot.counted
    ]
    return columns, most


@dataclass(frozen=True, slots=True)
class Span:
    """A slot's freshness: from the half that was quickest to all but a hundredth; `level` is how good that is."""

    slot: Slot
    box: Box
    level: str


def freshness(found: Sequence[Slot], behind: float, stale: float) -> tuple[list[Span], list[tuple[float, str]]]:
    """Freshness over time, each tenfold as high as the one before, and where the marks are."""
    worst = max((slot.counted.fresh_p99 or 0 for slot in found if slot.counted), default=0)
    top = next((seconds for seconds, _ in MARKS if seconds >= max(worst, 10)), max(worst, MARKS[-1][0]))

    def height(seconds: float) -> float:
        return HEIGHT * math.log(max(seconds, FRESHEST) / FRESHEST) / math.log(top / FRESHEST)

    spans = []
    step = 100 / SLOTS
    for place, slot in enumerate(found):
        if slot.counted and slot.counted.fresh_p50 is not None and slot.counted.fresh_p99 is not None:
            low, high = height(slot.counted.fresh_p50), height(slot.counted.fresh_p99)
            tall = max(LEAST_HEIGHT, high - low)
            box = Box(step * (place + 0.14), step * 0.72, min(HEIGHT - tall, HEIGHT - high), tall)
            seconds = slot.counted.fresh_p99
            spans.append(Span(slot, box, "bad" if seconds > stale else "warn" if seconds > behind else "good"))
    return spans, [(HEIGHT - height(seconds), text) for seconds, text in MARKS if seconds <= top]


def hours(at: datetime, length: timedelta) -> Iterator[tuple[float, datetime]]:
    """The full hours that are written below a picture: six of them or so, and where."""
    every = max(1, round(length.total_seconds() / 3600 / 6))
    end = at.replace(second=0, microsecond=0)
    begin = end - length
    one = begin.replace(minute=0)
    while one <= end:
        place = 100 * ((one - begin) / length)
        if one.hour % every == 0 and 3 <= place <= 97:
            yield place, one
        one += 60 * MINUTE
