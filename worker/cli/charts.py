"""How hostile names, histograms and the heaviest users look in the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.budget import Bar, Claims
from worker.jsontext import visible
from worker.words import label, percent

NAME_CELLS: Final = 40
"""Names are cut here in tables; never in JSON or on the page."""

WHOLE: Final = 10_000
"""Wider than any table of ids is."""

WIDEST: Final = 100
"""Wider terminals get no wider pictures: the eye loses the row."""


def cut(text: str, cells: int = NAME_CELLS) -> str:
    """The visible text, cut to so many cells of the terminal."""
    shown = visible(text)
    return shown if cell_len(shown) <= cells else set_cell_size(shown, cells - 1).rstrip() + "…"


def console() -> Console:
    """The terminal: nothing printed is markup, and no character makes it fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(highlight=False, markup=False, emoji=False)


def print_whole(table: Table) -> None:
    """Print a table of ids, which are there to be copied: where the terminal is narrow its lines wrap, and nothing is
    cut."""
    out = Console()
    # Measured as if there were room: a console doesn't measure beyond its own width.
    out.width = max(out.width, out.measure(table, options=out.options.update(max_width=WHOLE)).maximum)
    out.print(table)


def ascii_only(out: Console) -> bool:
    """Whether block characters and lines can't be shown."""
    return out.options.ascii_only


def histogram(bars: Iterable[Bar], budget: int, width: int, *, plain: bool = False) -> Iterator[Text]:
    """The lines of a histogram with the budget marked; no wider than `width`, from 60 on."""
    rows = [(label(bar), bar) for bar in bars]
    users = sum(bar.users for _, bar in rows)
    largest = max((bar.users for _, bar in rows), default=0) or 1
    label_width = max((len(text) for text, _ in rows), default=0)
    count_width = len(f"{largest:,}")
    # Two spaces before the blocks and the count, and nine for the percentage.
    room = max(8, width - label_width - count_width - 13)
    marked = False
    for text, bar in rows:
        above = bar.low > budget
        if above and not marked:
            marked = True
            yield _rule(budget, label_width + count_width + room + 13, plain=plain)
        drawn = blocks(bar.users / largest, room, plain=plain)
        yield Text.assemble(
            (text.rjust(label_width), "" if bar.users else "dim"),
            "  ",
            (drawn.ljust(room), "red" if above else "cyan"),
            "  ",
            (f"{bar.users:,}".rjust(count_width), "" if bar.users else "dim"),
            (percent(bar.users, users).rjust(9), "dim"),
        )
    if not marked:
        yield _rule(budget, label_width + count_width + room + 13, plain=plain)


def _rule(budget: int, width: int, *, plain: bool) -> Text:
    dash = "-" if plain else "─"
    return Text(f"{dash * 2} {budget:,} budget ".ljust(width, dash), "bold yellow")


def blocks(share: float, width: int, *, plain: bool = False) -> str:
    """A bar of block characters; whatever is more than nothing shows."""
    eighths = round(min(share, 1.0) * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    if plain:
        return "#" * -(-eighths // 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def worst(users: Iterable[Claims], budget: int, width: int, *, plain: bool = False) -> Table:
    """The heaviest users with the field to blame; no wider than `width`, from 50 on."""
    bound = "<=" if plain else "≤"
    rows = [(user, f"{'' if user.exact else bound} {user.bytes:,}".strip()) for user in users]
    # Two spaces before the figures and the names, and at least 16 cells for these.
    room = width - max([len("bytes"), *(len(figure) for _, figure in rows)]) - 4
    ids = [cut(user.user_id, min(NAME_CELLS, max(12, room - 16))) for user, _ in rows]
    room -= max(map(cell_len, ids), default=0)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("user", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("mostly", no_wrap=True)
    for user_id, (user, figure) in zip(ids, rows, strict=True):
        blame = cut(user.blame or "", min(NAME_CELLS, max(16, room)))
        table.add_row(Text(user_id), Text(figure, "red" if user.bytes > budget else ""), Text(blame))
    return table
