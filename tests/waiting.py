"""Never sleep for a while and hope: wait for a condition, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], limit_seconds: float = 10.0, what: str = "it") -> T:
    """Wait until a condition holds; its value."""
    deadline = time.monotonic() + limit_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} didn't come to pass within {limit_seconds:g} s"
        time.sleep(0.005)  # between two looks, not instead of one
    return value
