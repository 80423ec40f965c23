"""What a task's message carries, and what its failure tells."""

from __future__ import annotations

import pytest

from worker.app import create_celery
from worker.errors import SyncError
from worker.tasks import DRAIN, PRUNE, register


def test_a_failure_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    app = create_celery("memory://")
    register(app, drain=lambda: int("c4nary"), prune=lambda: None)
    with pytest.raises(SyncError, match=r"clerk\.drain failed: ValueError") as caught:
        app.tasks[DRAIN]()
    assert caught.value.__cause__ is None
    assert [record.getMessage() for record in caplog.records] == ["a task failed"]


def test_our_own_errors_say_what_they_say() -> None:
    app = create_celery("memory://")

    def refuse() -> None:
        raise SyncError("run clerk-sync migrate")

    register(app, drain=refuse, prune=refuse)
    for name in (DRAIN, PRUNE):
        with pytest.raises(SyncError, match="run clerk-sync migrate"):
            app.tasks[name]()


def test_a_task_takes_no_argument() -> None:
    app = create_celery("memory://")
    register(app, drain=lambda: None, prune=lambda: None)
    with pytest.raises(TypeError):
        app.tasks[DRAIN]("anything")
