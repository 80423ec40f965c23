"""The report on the session-token budget as an HTML page."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from importlib.metadata import version

from worker.budget import Cookie, Report
from worker.cli.summary import assumed_setting, notes, others
from worker.jsontext import visible
from worker.pages import templates


def render(report: Report, missing: int = 0, *, made: datetime | None = None) -> str:
    """The page; it names fields and user ids, and no values.

    `missing` is how many users have metadata that is to be copied and only Clerk has; `made` is now where it isn't
    given.
    """
    made = made or datetime.now(tz=UTC)
    pages = templates()
    pages.filters.update(lines=_lines, pieces=_pieces)
    return pages.get_template("budget.html").render(
        report=report,
        made=f"{made.day} {made:%B %Y, %H:%M %Z}".strip(),
        made_iso=made.isoformat(timespec="seconds"),
        version=version("clerk-sync"),
        notes=notes(report, missing),
        others=others(report.worst),
        cookies=_cookies(report.cookie),
        cookie_scale=100 / max(report.cookie.limit, report.cookie.largest_with_org) / 1.04,
        widest=max((field.share for field in report.fields), default=0.0) or 1.0,
        assumed_setting=assumed_setting(report) if report.assumed else None,
    )


def _cookies(cookie: Cookie) -> list[tuple[str, int, int]]:
    """Whose cookie, its bytes, and how many of them are an organization's."""
    return [
        ("Median user", cookie.median, 0),
        ("Heaviest user", cookie.largest, 0),
        ("Heaviest user, in an organization", cookie.largest_with_org, cookie.largest_with_org - cookie.largest),
    ]


def _pieces(name: str) -> list[str]:
    """The parts between which a name may go on in the next line."""
    return re.findall(r"[^._]*[._]?", name)


def _lines(text: str) -> str:
    """Text of several lines, made visible line by line."""
    return "\n".join(visible(line) for line in text.splitlines())
