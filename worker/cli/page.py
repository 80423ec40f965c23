"""The report on the session-token budget as one HTML page that needs nothing else: no network, script or font."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from worker.budget import Bar, Cookie, Report
from worker.cli.charts import label, percent, plural
from worker.cli.summary import assumed_setting, notes, others
from worker.jsontext import visible

PICTURE_HEIGHT: Final = 170
"""Pixels of the tallest column of the histogram."""


def render(report: Report, missing: int = 0, *, made: datetime | None = None) -> str:
    """The page; it names fields and user ids, and no values.

    `missing` is how many users have metadata that is to be copied and only Clerk has; `made` is now where it isn't
    given.
    """
    made = made or datetime.now(tz=UTC)
    pages = Environment(
        loader=PackageLoader("worker.cli", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(number=_number, short=_short, visible=visible, lines=_lines, pieces=_pieces)
    return pages.get_template("budget.html").render(
        report=report,
        made=f"{made.day} {made:%B %Y, %H:%M %Z}".strip(),
        made_iso=made.isoformat(timespec="seconds"),
        version=version("clerk-sync"),
        notes=notes(report, missing),
        others=others(report.worst),
        columns=_columns(report.histogram, report.budget),
        budget_at=_budget_at(report.histogram, report.budget),
        cookies=_cookies(report.cookie),
        cookie_scale=100 / max(report.cookie.limit, report.cookie.largest_with_org) / 1.04,
        widest=max((field.share for field in report.fields), default=0.0) or 1.0,
        assumed_setting=assumed_setting(report) if report.assumed else None,
        label=label,
        percent=percent,
        plural=plural,
    )


def _columns(bars: Sequence[Bar], budget: int) -> list[dict[str, Any]]:
    """The histogram's columns: left edge and width in percent of the picture, height in pixels."""
    step = 100 / max(1, len(bars))
    tallest = max((bar.users for bar in bars), default=0) or 1
    return [
        {
            "bar": bar,
            "over": bar.low > budget,
            "left": step * place,
            "middle": step * (place + 0.5),
            "width": step * 0.86,
            # Whatever is more than nothing shows.
            "height": max(3.0, PICTURE_HEIGHT * bar.users / tallest) if bar.users else 0.0,
        }
        for place, bar in enumerate(bars)
    ]


def _budget_at(bars: Sequence[Bar], budget: int) -> float:
    """Where the budget's line stands, in percent of the picture's width."""
    return 100 * sum(bar.low <= budget for bar in bars) / max(1, len(bars))


def _cookies(cookie: Cookie) -> list[tuple[str, int, int]]:
    """Whose cookie, its bytes, and how many of them are an organization's."""
    return [
        ("Median user", cookie.median, 0),
        ("Heaviest user", cookie.largest, 0),
        ("Heaviest user, in an organization", cookie.largest_with_org, cookie.largest_with_org - cookie.largest),
    ]


def _number(number: int) -> str:
    return f"{number:,}"


def _short(number: int) -> str:
    """A count in at most four characters or so: 940, 4.2k, 31k, 1.2M."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}" if number < 10 * unit else f"{number // unit}{letter}"
    return str(number)


def _pieces(name: str) -> list[str]:
    """The parts between which a name may go on in the next line."""
    return re.findall(r"[^._]*[._]?", name)


def _lines(text: str) -> str:
    """Text of several lines, made visible line by line."""
    return "\n".join(visible(line) for line in text.splitlines())
