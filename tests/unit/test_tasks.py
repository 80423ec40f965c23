"""What a task's message carries, and what its failure tells."""

from __future__ import annotations

import pytest

from worker.app import create_celery, create_worker, why_off
from worker.errors import SyncError
from worker.settings import Settings
from worker.tasks import DRAIN, RECONCILE, RETIRED, register


def test_a_failure_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    app = create_celery("memory://")
    register(app, drain=lambda: int("c4nary"), reconcile=lambda: None)
    with pytest.raises(SyncError, match=r"clerk\.drain failed: ValueError") as caught:
        app.tasks[DRAIN]()
    assert caught.value.__cause__ is None
    assert [record.getMessage() for record in caplog.records] == ["a task failed"]


def test_our_own_errors_say_what_they_say() -> None:
    app = create_celery("memory://")

    def refuse() -> None:
        raise SyncError("run clerk-sync migrate")

    register(app, drain=refuse, reconcile=refuse)
    for name in (DRAIN, RECONCILE):
        with pytest.raises(SyncError, match="run clerk-sync migrate"):
            app.tasks[name]()


def test_a_task_takes_no_argument() -> None:
    app = create_celery("memory://")
    register(app, drain=lambda: None, reconcile=lambda: None)
    for name in (DRAIN, RECONCILE, RETIRED):
        with pytest.raises(TypeError):
            app.tasks[name]("anything")


def test_a_task_that_only_the_version_before_knew_is_known_and_does_nothing() -> None:
    app = create_worker(Settings(redis_url="memory://", database_url="postgresql://127.0.0.1:1/none"))
    app.tasks["clerk.prune"]()
    assert "clerk.prune" not in {entry["task"] for entry in app.conf.beat_schedule.values()}


def test_the_reconcile_is_rung_for_every_so_often_and_a_late_ring_is_dropped() -> None:
    schedule = create_celery("memory://", reconcile_seconds=300).conf.beat_schedule
    assert schedule["reconcile"] == {"task": RECONCILE, "schedule": 300.0, "options": {"expires": 300}}
    assert create_celery("memory://").conf.beat_schedule.keys() == {"drain"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(redis_url="memory://", secret_key="sk_test_x", reconcile_seconds=60), None),
        (Settings(redis_url="memory://", secret_key="sk_test_x", reconcile_seconds=0), "RECONCILE_SECONDS is 0"),
        (Settings(redis_url="memory://", reconcile_seconds=60), "CLERK_SECRET_KEY is missing"),
    ],
)
def test_the_reconcile_is_off_where_it_is_switched_off_or_cannot_be(settings: Settings, reason: str | None) -> None:
    assert why_off(settings) == reason
    app = create_worker(settings)
    assert ("reconcile" in app.conf.beat_schedule) == (reason is None)
    if reason:
        app.tasks[RECONCILE]()  # rung by another host's beat, it does nothing
