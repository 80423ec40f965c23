"""How figures are shown: medians with their spread over the rounds, and beside a target whether it is reached."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

LARGE: Final = 100
"""Values from here on are shown without decimals."""


@dataclass(frozen=True, slots=True)
class Check:
    """One figure that is to be reached, as it came out in each round."""

    what: str
    values: Sequence[float]
    target: float
    at_least: bool
    unit: str = ""

    @property
    def reached(self) -> bool:
        """Whether the median is as it should be."""
        middle = statistics.median(self.values)
        return middle >= self.target if self.at_least else middle < self.target

    def as_json(self) -> dict[str, Any]:
        """What stands in the file."""
        return asdict(self) | {"median": statistics.median(self.values), "reached": self.reached}


def ratios(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """One by one: each round's figure by the other's of the same round."""
    return [one / other for one, other in zip(above, below, strict=True) if other]


def spread(values: Iterable[float | None], between: str = " ") -> str:
    """The median, and after what is to stand `between` the least and the most, where there are any."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = figure(statistics.median(known))
    if len(known) == 1:
        return middle
    return f"{middle}{between}[dim]({figure(min(known))}-{figure(max(known))})[/dim]"


def figure(value: float) -> str:
    """A number with as many digits as it can bear."""
    if value >= LARGE:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names to the left, figures to the right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def checks_table(checks: Sequence[Check]) -> Table:
    """Every target, and how far we are."""
    rows = []
    for check in checks:
        target = f"{'at least' if check.at_least else 'under'} {check.target:g}{check.unit}"
        rows.append((check.what, spread(check.values), target, "[green]yes" if check.reached else "[red]no"))
    return table("Targets", ("", "median (least-most)", "target", "reached"), rows)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    found = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": _after_colon(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "memory": _after_colon(Path("/proc/meminfo"), "MemTotal"),
        "load_before": os.getloadavg()[0],
    }
    return {name: value for name, value in found.items() if value not in {None, ""}}


def _after_colon(path: Path, name: str) -> str | None:
    if path.exists():
        for line in path.read_text("utf-8", "replace").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None
