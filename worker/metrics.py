"""What is measured, by prometheus-client: right over several processes of one host when they share
`PROMETHEUS_MULTIPROC_DIR`. Never a user id as a label.

What Postgres knows (events by state, the oldest pending one, users, tombstones, runs, the last minutes) is asked there
at each scrape, so it is right over any number of hosts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess, values
from prometheus_client.core import GaugeMetricFamily, Metric

from worker.minutes import Minute, put_together
from worker.runs import Overview
from worker.sync import Batch

# prometheus-client opens its files as soon as a metric is made, which is below, and doesn't make their folder.
if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    Path(folder).mkdir(parents=True, exist_ok=True)

DELIVERIES = Counter("clerk_sync_deliveries", "Webhook deliveries by how they were answered", ["answer"])
ACK = Histogram(
    "clerk_sync_ack_seconds",
    "From a delivery's last byte to its answer",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15),
)
FRESHNESS = Histogram(
    "clerk_sync_freshness_seconds",
    "From Svix's signature (whole seconds) until the row is visible",
    buckets=(0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, 86400),
)
BATCH = Histogram(
    "clerk_sync_batch_seconds",
    "Duration of one batch of the worker, a transaction",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30),
)
APPLIED = Counter(
    "clerk_sync_events_processed",
    "Events that the worker finished, by what they did: applied, unchanged, older, deleted, superseded, dead",
    ["outcome"],
)
REPLACED = Counter("clerk_sync_replaced", "Values that jsonb can't hold, replaced by U+FFFD")
WAKE_UPS = Counter("clerk_sync_wake_ups", "Wake-ups that the workers heard from the broker")
DRAINS = Counter("clerk_sync_drains", "Drains of the inbox by what started them: doorbell or sweep", ["cause"])

# At 0 from the start: a counter that begins at 1 has not risen, as Prometheus sees it.
for outcome in ("applied", "unchanged", "older", "deleted", "superseded", "dead"):
    APPLIED.labels(outcome)
for cause in ("doorbell", "sweep"):
    DRAINS.labels(cause)

LAST: Final = timedelta(minutes=5)
"""Of which the events are told that came and were applied on all hosts."""

RECENT: Final = timedelta(minutes=10)
"""Of which freshness on all hosts is told."""


def observe_batch(batch: Batch) -> None:
    """Count one committed batch."""
    BATCH.observe(batch.seconds)
    for outcome, count in batch.outcomes.items():
        APPLIED.labels(outcome).inc(count)
    if batch.dead:
        APPLIED.labels("dead").inc(len(batch.dead))
    if batch.replaced:
        REPLACED.inc(batch.replaced)
    for seconds in batch.freshness:
        FRESHNESS.observe(seconds)


def render(counts: dict[str, Any] | None) -> bytes:
    """The Prometheus text; `counts` is what Health counted, None where Postgres didn't answer."""
    registry = CollectorRegistry()
    if values.ValueClass is not values.MutexValue:
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    else:
        for metric in (DELIVERIES, ACK, FRESHNESS, BATCH, APPLIED, REPLACED, WAKE_UPS, DRAINS):
            registry.register(metric)
    registry.register(_Counted(counts))
    return generate_latest(registry)


class _Counted:
    def __init__(self, counts: dict[str, Any] | None) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("clerk_sync_database_up", "1 while Postgres answers")
        up.add_metric([], 0 if self._counts is None else 1)
        yield up
        if self._counts is None:
            return
        events = GaugeMetricFamily("clerk_sync_events", "Events in the inbox by state", labels=["state"])
        for state in ("pending", "done", "dead"):
            events.add_metric([state], self._counts[state])
        yield events
        for name, help_text in (
            ("oldest_pending_seconds", "Age of the oldest pending event; 0 where none is pending"),
            ("users", "Live users"),
            ("tombstones", "Deleted users"),
            ("users_content_missing", "Live users with metadata that is to be copied and only Clerk has"),
            ("users_over_budget", "Live users whose custom claims weigh more than the session token's budget"),
        ):
            gauge = GaugeMetricFamily(f"clerk_sync_{name}", help_text)
            gauge.add_metric([], self._counts[name])
            yield gauge
        yield from _runs(self._counts["runs"])
        if self._counts["recent_minutes"] is not None:
            yield from _lately(self._counts["last_minutes"], self._counts["recent_minutes"])


def _lately(last: Sequence[Minute], recent: Sequence[Minute]) -> Iterator[Metric]:
    """What the workers of all hosts counted. Where none counted, nothing was applied."""
    for name, help_text, counted in (
        ("acknowledged", "Events that came in", sum(minute.acknowledged for minute in last)),
        ("applied", "Events that were applied", sum(minute.applied for minute in last)),
    ):
        gauge = GaugeMetricFamily(f"clerk_sync_recent_{name}", f"{help_text} in the last five minutes, on all hosts")
        gauge.add_metric([], counted)
        yield gauge
    freshness = GaugeMetricFamily(
        "clerk_sync_recent_freshness_seconds",
        "From Svix's signature until the row was visible, in the last ten minutes, on all hosts",
        labels=["quantile"],
    )
    if recent:
        lately = put_together(recent)
        for quantile, seconds in (("0.5", lately.fresh_p50), ("0.99", lately.fresh_p99)):
            if seconds is not None:
                freshness.add_metric([quantile], seconds)
    yield freshness


def _runs(overviews: list[Overview]) -> Iterator[Metric]:
    """How the last runs of each kind stand. Without a series for what never was."""

    def gauge(name: str, help_text: str, values: dict[str, float]) -> Metric:
        family = GaugeMetricFamily(f"clerk_sync_run_{name}", help_text, labels=["kind"])
        for kind, value in values.items():
            family.add_metric([kind], value)
        return family

    done = {one.last.kind: one.done for one in overviews if one.done is not None}
    yield gauge(
        "last_done_timestamp_seconds",
        "When a run of this kind, which pulls from Clerk, was last done: seconds since 1970",
        {kind: run.finished_at.timestamp() for kind, run in done.items() if run.finished_at is not None},
    )
    yield gauge(
        "last_failed",
        "1 where the last run of this kind failed or was cut short, and no full one was done since",
        {one.last.kind: one.failed for one in overviews},
    )
    yield gauge(
        "running",
        "1 while a run of this kind is under way",
        {one.last.kind: one.running for one in overviews},
    )
    yield gauge(
        "repaired_users",
        "Users that differed from Clerk's in the last run of this kind that was done, and were repaired",
        {kind: run.found for kind, run in done.items()},
    )
    yield gauge(
        "unusable_users",
        "Users that couldn't be used in the last run of this kind that was done",
        {kind: run.counters["unusable"] for kind, run in done.items()},
    )
    yield gauge(
        "calls",
        "Calls to Clerk's API that the last run of this kind that was done took",
        {kind: run.calls for kind, run in done.items()},
    )
