"""What something costs: the processor time of whole trees of processes, and their memory. Linux alone tells of both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")
PROC: Final = Path("/proc")


def available() -> bool:
    """Whether this system tells."""
    return (PROC / "self/stat").exists()


def tree(roots: Iterable[int]) -> set[int]:
    """These processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            children.setdefault(int(_stat(folder)[1]), []).append(int(folder.name))
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """Processor time that these processes, their descendants, and those of them that have ended, have used so far."""
    if not available():
        return 0.0
    ticks = 0
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            # utime, stime, and cutime, cstime: of the children that ended and were waited for.
            ticks += sum(map(int, _stat(PROC / str(pid))[11:15]))
    return ticks / TICKS


def memory_mb(roots: Iterable[int]) -> float:
    """Memory of these processes and their descendants. What several share counts once, where the system tells."""
    if not available():
        return 0.0
    return sum(_memory_kb(PROC / str(pid)) for pid in tree(roots)) / 1000


def _stat(folder: Path) -> list[str]:
    """The fields after the name, which may have spaces and brackets of its own: state, parent, …"""
    return (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()


def _memory_kb(folder: Path) -> int:
    for name, field in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        with contextlib.suppress(OSError):
            for line in (folder / name).read_text("ascii", "replace").splitlines():
                if line.startswith(field):
                    return int(line.split()[1])
    return 0
