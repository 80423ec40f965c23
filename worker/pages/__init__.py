"""The look of our HTML pages, which need nothing else: no network, script or font. Templates are beside this file,
what they show is said by whoever renders them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from worker.budget import Bar
from worker.jsontext import visible
from worker.words import age, duration, label, number, percent, plural, short

PICTURE_HEIGHT: Final = 170
"""Pixels of the tallest column of a histogram."""


def templates() -> Environment:
    """The pages by name, with how numbers and hostile names are written. Whatever is put in is escaped."""
    pages = Environment(
        loader=PackageLoader("worker.pages", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(age=age, duration=duration, number=number, short=short, visible=visible)
    pages.globals.update(columns=_columns, line_at=_line_at, label=label, percent=percent, plural=plural)
    return pages


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


def _line_at(bars: Sequence[Bar], budget: int) -> float:
    """Where the budget's line stands, in percent of the picture's width."""
    return 100 * sum(bar.low <= budget for bar in bars) / max(1, len(bars))
