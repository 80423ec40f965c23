"""What leaves for Sentry and for OpenTelemetry's collector, as both get it from a running system's processes: that it
comes, from web processes that were forked too, and that nothing personal is in it."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.acceptance.system import CANARY, System, new_user, now_ms, user_event
from tests.waiting import until


@dataclass
class Collector:
    """Stands for Sentry and for a collector of traces; keeps what it is sent, unpacked, and the headers."""

    url: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def take(self, path: str, headers: str, body: bytes) -> None:
        """Note one request."""
        if path == "/v1/traces":
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        told = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
                        self.spans.append({"name": span.name, **told})
            self.said.append(headers + str(request))
        else:
            self.events += [json.loads(line) for line in body.splitlines() if b'"logentry"' in line]
            self.said.append(path + headers + body.decode())


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Listens on a free port."""
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            kept.take(self.path, str(self.headers), body)
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    kept.url = f"127.0.0.1:{server.server_port}"
    yield kept
    server.shutdown()
    thread.join()
    server.server_close()


def test_errors_and_spans_are_sent_without_anything_personal(
    new_system: Callable[..., System], collector: Collector
) -> None:
    system = new_system(
        SENTRY_DSN=f"http://key@{collector.url}/1",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{collector.url}",
        OTEL_BSP_SCHEDULE_DELAY="200",
        LOG_LEVEL="WARNING",
    )
    system.start()
    user_id = new_user()
    with system.client() as client, system.connect() as connection:
        accepted = client.deliver(user_event(user_id, now_ms(), {"large": CANARY * 100}))
        assert accepted.status == 202
        assert client.post(user_event(user_id, now_ms()), {"user-agent": CANARY, "cookie": CANARY}).status == 400
        # An error in the worker: Postgres refuses a row, and quotes it.
        until(lambda: system.rows(user_id))
        connection.execute("alter table clerk.user_contents add constraint poison check (false) not valid")
        assert client.deliver(user_event(new_user(), now_ms())).status == 202
        # And one in a web process.
        connection.execute("alter table clerk.schema_version rename to schema_version_away")
        until(lambda: client.get("/readyz").status == 503)
        until(lambda: {event["logger"] for event in collector.events} >= {"worker.sweeper", "webhooks.health"})
    assert_whole(collector, accepted.svix_id, user_id)
    password = psycopg.conninfo.conninfo_to_dict(system.database_url)["password"]
    secrets = [CANARY, system.signing_secret, str(password), str(system.data_dir), "server_name", "host.name"]
    assert system.stop() == 0
    said = "".join(collector.said)
    assert [secret for secret in secrets if secret in said] == []


def assert_whole(collector: Collector, svix_id: str, user_id: str) -> None:
    """The deliveries, a batch and the errors have come, and say what they should."""
    until(lambda: {"delivery", "batch"} <= {span["name"] for span in collector.spans})
    (first,) = until(lambda: [span for span in collector.spans if span.get("clerk_sync.svix_id") == svix_id])
    assert (first["clerk_sync.answer"], first["clerk_sync.user_id"]) == ("accepted", user_id)
    until(lambda: any(span.get("clerk_sync.answer") == "refused" for span in collector.spans))
    assert any(span.get("clerk_sync.applied") == 1 for span in collector.spans if span["name"] == "batch")
    assert {event["logentry"]["message"] for event in collector.events} >= {"event set aside", "not ready"}
