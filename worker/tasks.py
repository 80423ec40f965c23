"""The Celery tasks. None takes an argument or returns anything: a message says that there is work, never what.

They don't retry themselves: the sweeper of the same process tries again with back-off, and needs no broker for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from celery import Celery

DRAIN: Final = "clerk.drain"
PRUNE: Final = "clerk.prune"


def register(app: Celery, *, drain: Callable[[], Any], prune: Callable[[], Any]) -> None:
    """Give the app its tasks: what to do is passed in."""

    @app.task(name=DRAIN)
    def _drain() -> None:
        drain()

    @app.task(name=PRUNE)
    def _prune() -> None:
        prune()
