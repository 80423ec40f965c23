"""How counts, shares, ages and ranges are written, in the terminal and on pages."""

from __future__ import annotations

from datetime import timedelta

from worker.budget import Bar


def number(amount: int) -> str:
    """`31,542`."""
    return f"{amount:,}"


def short(amount: int) -> str:
    """A count in at most four characters or so: 940, 4.2k, 31k, 1.2M."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if amount >= unit:
            return f"{amount / unit:.1f}{letter}" if amount < 10 * unit else f"{amount // unit}{letter}"
    return str(amount)


def percent(part: float, whole: float = 1.0) -> str:
    """A share as people read it; neither none nor all where it isn't."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "<0.1 %"
    if 99.9 < share < 100:
        return ">99.9 %"
    return f"{share:.1f} %" if share else "0 %"


def plural(number: int, noun: str) -> str:
    """`1 user`, `2,000 users`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def label(bar: Bar) -> str:
    """The range of a bar, in bytes."""
    if bar.high is None:
        return f"{bar.low:,} or more"
    return f"{bar.low:,} to {bar.high:,}" if bar.high > bar.low else f"{bar.low:,}"


def duration(seconds: float) -> str:
    """How long something took: `0.6 s`, and from ten seconds on as an age is written."""
    return f"{seconds:.1f} s" if seconds < 9.95 else age(timedelta(seconds=seconds))


def age(passed: timedelta) -> str:
    """How long ago something was, in one unit: `12 s`, `5 min`, `3 h`, `2 d`."""
    seconds = max(0, int(passed.total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        # From two on: 90 minutes are nearer to the truth than an hour.
        if seconds >= 2 * length:
            return f"{seconds // length:,} {unit}"
    return f"{seconds} s"
