"""The Celery tasks. None takes an argument or returns anything: a message says that there is work, never what.

They don't retry themselves: the sweeper and the reconciler of the same process try again, and need no broker for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from celery import Celery

from worker.errors import SyncError

log = logging.getLogger(__name__)

DRAIN: Final = "clerk.drain"
RECONCILE: Final = "clerk.reconcile"

RETIRED: Final = "clerk.prune"
"""A beat of the version before may still ring for it while this one is deployed; the sweepers prune now."""


def register(app: Celery, *, drain: Callable[[], Any], reconcile: Callable[[], Any]) -> None:
    """Give the app its tasks: what to do is passed in."""

    # shared=False: or Celery gives them to every other app of the process as well.
    @app.task(name=DRAIN, shared=False)
    def _drain() -> None:
        _run(DRAIN, drain)

    @app.task(name=RECONCILE, shared=False)
    def _reconcile() -> None:
        _run(RECONCILE, reconcile)

    @app.task(name=RETIRED, shared=False)
    def _retired() -> None:
        """Nothing: of an unknown task Celery would log the whole message, as an error."""


def _run(name: str, work: Callable[[], Any]) -> None:
    """Run a task's work. Celery logs what a task raises with its text, so only our own errors get there."""
    try:
        work()
    except SyncError:
        raise
    except Exception as error:
        log.critical("a task failed", extra={"task": name}, exc_info=True)
        raise SyncError(f"{name} failed: {type(error).__name__}") from None
