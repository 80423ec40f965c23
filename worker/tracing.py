"""Spans for OpenTelemetry, where its own variables say where to; else its packages aren't even imported.

One span for each delivery and each batch, after the fact, with what its log line has of ids, counts and durations.
As with the metrics, a process has one of it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from worker.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

_TOLD: Final = frozenset(
    {"answer", "status", "size", "svix_id", "type", "user_id", "cause", "claimed", "oldest_s"}
    | {"applied", "unchanged", "older", "deleted", "superseded", "dead"}
)

_tracer: Callable[[], Tracer] | None = None


def start(*, wanted: bool, exporter: Callable[[], SpanExporter] | None = None) -> None:
    """Make spans from now on, if they are wanted. Nothing connects, and no thread begins, before a process has its
    first one: web processes are forked after this.

    Raises ConfigError where the packages aren't installed.
    """
    global _tracer  # noqa: PLW0603 - as with the metrics
    _tracer = None
    if wanted:
        make = _maker(exporter)
        made, lock = functools.cache(make), threading.Lock()

        def once() -> Tracer:
            with lock:
                return made()

        _tracer = once


def span(name: str, seconds: float, told: Mapping[str, Any]) -> None:
    """Tell of something that took so long and ended just now; of what is `told`, what isn't known to be harmless is
    left out."""
    if _tracer is None:
        return
    end = time.time_ns()
    attributes = {f"clerk_sync.{key}": value for key, value in told.items() if key in _TOLD and value is not None}
    _tracer().start_span(name, start_time=end - int(seconds * 1e9), attributes=attributes).end(end)


def _maker(exporter: Callable[[], SpanExporter] | None) -> Callable[[], Tracer]:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "OTEL_ variables ask for traces, but OpenTelemetry isn't installed: pip install 'clerk-sync[otel]', "
            "or set OTEL_TRACES_EXPORTER=none"
        ) from None

    def make() -> Tracer:
        # What the operator names in OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, and nothing of this host.
        resource = Resource({"service.name": "clerk-sync"}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource)  # sends what is left when the process ends
        provider.add_span_processor(BatchSpanProcessor((exporter or OTLPSpanExporter)()))
        return provider.get_tracer("clerk-sync")

    return make
