"""Spans tell ids, counts and durations, and are made only where OpenTelemetry's variables ask for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from worker import tracing
from worker.errors import ConfigError
from worker.settings import Settings


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Takes the spans of this process."""
    exporter = InMemorySpanExporter()
    tracing.start(wanted=True, exporter=lambda: exporter)
    yield exporter
    tracing.start(wanted=False)


def flush() -> None:
    """Spans go out now and then."""
    assert tracing._tracer
    tracing._tracer().span_processor.force_flush()  # type: ignore[attr-defined]


def test_a_span_tells_how_long_and_of_the_rest_only_what_is_harmless(exporter: InMemorySpanExporter) -> None:
    before = time.time_ns()
    tracing.span("delivery", 0.25, {"answer": "accepted", "status": 202, "type": None, "reason": "x", "body": b"x"})
    flush()
    (span,) = exporter.get_finished_spans()
    assert span.name == "delivery"
    assert span.end_time
    assert span.start_time
    assert before <= span.end_time <= time.time_ns()
    assert span.end_time - span.start_time == 250_000_000
    assert dict(span.attributes or {}) == {"clerk_sync.answer": "accepted", "clerk_sync.status": 202}
    assert dict(span.resource.attributes) == {"service.name": "clerk-sync"}


def test_the_operator_names_the_service(monkeypatch: pytest.MonkeyPatch, exporter: InMemorySpanExporter) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "sync-production")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "region=eu")
    tracing.span("batch", 0, {})
    flush()
    (span,) = exporter.get_finished_spans()
    assert dict(span.resource.attributes) == {"service.name": "sync-production", "region": "eu"}


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, False),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_opentelemetrys_own_variables_turn_it_on(env: dict[str, str], *, wanted: bool) -> None:
    assert Settings.from_env(env).traces is wanted


@pytest.mark.parametrize(
    "env", [{"OTEL_TRACES_EXPORTER": "console"}, ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}]
)
def test_what_it_cannot_do_is_refused_at_the_start(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"OTEL_.*must be one of"):
        Settings.from_env(env)


def test_without_the_packages_traces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.start(wanted=False)
    tracing.span("delivery", 0, {})
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'clerk-sync\[otel\]'"):
        tracing.start(wanted=True)
