"""The client of Clerk's API, against a real HTTP server that answers by a script."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import httpx
import msgspec
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.events import changed
from tests.pulling import NO_TLS
from worker import clerk_api
from worker.api_budget import ApiBudget
from worker.clerk_api import ClerkApi
from worker.db import Connection
from worker.errors import ClerkRefused, ClerkUnavailable, ConfigError, SyncError
from worker.events import UserChanged, parse_event, parse_user

KEY: Final = "sk_test_s3cr3tCanary"
DATE: Final = "Wed, 02 Dec 2026 10:00:07 GMT"
DATE_MS: Final = 1_796_205_607_000


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the script: `missing` bytes of its body never come; a status of 0 hangs up instead.

    Of one with a `trickle`, the first bytes are the `body`, whatever that is, and the others come in drops without end.
    """

    status: int = 200
    body: bytes = b"[]"
    headers: dict[str, str] = field(default_factory=lambda: {"Date": DATE})
    missing: int = 0
    trickle: bytes = b""


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is what some tests are about."""


class Script:
    """A server that gives its answers one after the other, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [Answer()]
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.closing = threading.Event()
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                script.requests.append((self.path, dict(self.headers)))
                script.go_on.wait(30)
                answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                if answer.trickle:
                    self.wfile.write(answer.body)
                    while not script.closing.wait(0.01):
                        self.wfile.write(answer.trickle)
                elif answer.status:
                    self.send_response_only(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(answer.body) + answer.missing))
                    self.end_headers()
                    self.wfile.write(answer.body)
                self.close_connection = answer.missing > 0 or answer.status == 0 or answer.trickle != b""

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self.go_on.set()
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def script() -> Iterator[Script]:
    server = Script()
    yield server
    server.close()


class Calls:
    """The callables that a client is given: what it did with them, and what they answer."""

    def __init__(self) -> None:
        self.budget: list[float] = []
        self.taken = 0
        self.told: list[float] = []
        self.slept: list[float] = []

    def take(self) -> float:
        self.taken += 1
        return self.budget.pop(0) if self.budget else 0.0


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def open_api(script: Script, calls: Calls) -> Iterator[Callable[..., ClerkApi]]:
    """Makes clients of the scripted server that note their waits instead of waiting."""
    with httpx.Client(verify=NO_TLS, trust_env=False) as client:

        def make(**changes: Any) -> ClerkApi:
            options: dict[str, Any] = {
                "base_url": script.url,
                "take": calls.take,
                "on_retry_after": calls.told.append,
                "sleep": calls.slept.append,
            }
            return ClerkApi(KEY, **({"client": client} | options | changes))

        yield make


@pytest.fixture
def api(open_api: Callable[..., ClerkApi]) -> ClerkApi:
    return open_api()


def query(script: Script) -> str:
    return script.requests[-1][0].partition("?")[2]


# --- What is asked, and what is read.


def test_a_request_carries_the_key_and_a_version_of_the_api(script: Script, api: ClerkApi) -> None:
    api.users(order_by="-created_at")
    path, headers = script.requests[0]
    assert path == "/v1/users?order_by=-created_at&limit=500"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Clerk-API-Version"] == "2025-11-10"


def test_a_plus_arrives_as_a_plus(script: Script, api: ClerkApi) -> None:
    api.users(order_by="+created_at", limit=2, starting_after="user_1")
    assert query(script) == "order_by=%2Bcreated_at&limit=2&starting_after=user_1"


def test_users_are_asked_for_by_offset_or_by_ids(script: Script, api: ClerkApi) -> None:
    api.users(order_by="-updated_at", offset=0)
    assert query(script) == "order_by=-updated_at&limit=500&offset=0"
    api.users(order_by="-created_at", limit=100, user_ids=[f"user_{n}" for n in range(100)])
    assert query(script).count("user_id=user_") == 100


def test_what_clerk_would_answer_wrongly_is_not_asked(script: Script, api: ClerkApi) -> None:
    wrong: list[dict[str, Any]] = [{"limit": 501}, {"limit": 0}, {"user_ids": ["user_1"] * 101}]
    for parameters in wrong:
        with pytest.raises(ValueError, match="a page is of"):
            api.users(order_by="-created_at", **parameters)
    assert script.requests == []


def test_users_come_as_they_were_sent_with_the_time_of_the_answer(script: Script, api: ClerkApi) -> None:
    users = (b'{"id": "user_1", "n": 1.10}', b'{ "id":"user_2","n":9007199254740993 }')
    script.answers = [Answer(body=b"[ " + b" , ".join(users) + b" ]\n")]
    page = api.users(order_by="-created_at")
    assert page.users == users
    assert page.read_at == DATE_MS


@pytest.mark.parametrize("headers", [{}, {"Date": "yesterday"}, {"Date": ""}])
def test_the_time_is_unknown_where_the_answer_does_not_tell_it(
    script: Script, api: ClerkApi, headers: dict[str, str]
) -> None:
    script.answers = [Answer(headers=headers)]
    assert api.users(order_by="-created_at").read_at is None


def test_an_answer_may_be_compressed(script: Script, api: ClerkApi) -> None:
    script.answers = [Answer(body=gzip.compress(b'[{"id":"a"}]', mtime=0), headers={"Content-Encoding": "gzip"})]
    assert api.users(order_by="-created_at").users == (b'{"id":"a"}',)


def test_one_odd_user_does_not_fail_the_page(script: Script, api: ClerkApi) -> None:
    odd = [b"5", b"null", b'"x"', b"[]", b'{"id":5}', b'{"id":"user_\xff"}', b'{"n":1e999999999}']
    script.answers = [Answer(body=b"[" + b",".join([*odd, b'{"id":"user_1"}']) + b"]")]
    assert api.users(order_by="-created_at").users == (*odd, b'{"id":"user_1"}')


@pytest.mark.parametrize("depth", [499, 500, 990, 4000, 100_000])
def test_metadata_nested_too_deep_is_read_as_in_an_event(script: Script, api: ClerkApi, depth: int) -> None:
    deep = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    body = changed(private={"plan": "pro"}).replace(b'"unsafe_metadata": {}', b'"unsafe_metadata": ' + deep)
    data = body.partition(b'"data": ')[2][:-1]
    script.answers = [Answer(body=b"[" + data + b',{"id":"user_2"}]')]
    first, second = api.users(order_by="-created_at").users
    assert second == b'{"id":"user_2"}'
    event, pulled = parse_event(body), parse_user(first, None)
    assert isinstance(event, tuple)
    assert isinstance(event[1], UserChanged)
    assert isinstance(pulled, UserChanged)
    assert pulled.unsafe_metadata == event[1].unsafe_metadata
    assert pulled.private_metadata == b'{"plan": "pro"}'


def test_users_are_counted(script: Script, api: ClerkApi) -> None:
    script.answers = [Answer(body=b'{"object":"total_count","total_count":123456}')]
    assert api.count() == 123_456
    assert script.requests[0][0] == "/v1/users/count"


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    ),
    st.booleans(),
)
def test_any_array_is_cut_into_its_elements(values: list[Any], ascii_only: bool) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace") for value in values]
    assert clerk_api._split(b"[" + b", ".join(texts) + b"]") == tuple(texts)


@given(st.binary(max_size=100) | st.text("[]{},:\"'\\0123456789.eE+- nulltrue", max_size=60).map(str.encode))
def test_any_bytes_are_an_array_or_refused(body: bytes) -> None:
    try:
        clerk_api._split(body)
    except (msgspec.MsgspecError, ValueError):
        return
    assert body.strip().startswith(b"[")


# --- What is tried again, and for how long.


@pytest.mark.parametrize(
    "failure",
    [
        Answer(500),
        Answer(502, b"<html>"),
        Answer(503),
        Answer(599),
        Answer(408),
        Answer(429),
        Answer(0),
        Answer(body=b"[", missing=1),
        Answer(body=b'[{"id":"user_1"},'),
        Answer(body=b"<html>a proxy's page</html>"),
        Answer(body=b"{}"),
        Answer(body=b""),
        Answer(body=b"not gzip", headers={"Content-Encoding": "gzip"}),
        Answer(body=gzip.compress(b"[]", mtime=0)[:-12], headers={"Content-Encoding": "gzip"}),
        Answer(body=gzip.compress(gzip.compress(b"[]", mtime=0), mtime=0), headers={"Content-Encoding": "gzip, gzip"}),
        Answer(headers={"Content-Encoding": "br"}),
        Answer(body=b"[" * 100_000),
    ],
    ids=lambda answer: f"{answer.status}-{answer.body[:5]!r}",
)
def test_what_may_pass_is_tried_again(script: Script, api: ClerkApi, calls: Calls, failure: Answer) -> None:
    script.answers = [failure, failure, Answer(body=b'[{"id":"user_1"}]')]
    assert len(api.users(order_by="-created_at").users) == 1
    assert api.calls == calls.taken == len(script.requests) == 3
    assert len(calls.slept) == 2
    assert calls.told == []


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"total_count":"5"}', b'{"total_count":true}', b'{"total_count":1.5}']
)
def test_a_count_that_is_none_is_asked_for_again(script: Script, api: ClerkApi, body: bytes) -> None:
    script.answers = [Answer(body=body), Answer(body=b'{"total_count":5}')]
    assert api.count() == 5


def test_waits_grow_and_differ(script: Script, api: ClerkApi, calls: Calls) -> None:
    script.answers = [Answer(503)] * 40 + [Answer()]
    api.users(order_by="-created_at")
    assert all(0 <= wait <= min(20, 0.5 * 2**attempt) for attempt, wait in enumerate(calls.slept))
    assert max(calls.slept) > 5
    assert len(set(calls.slept)) > 30


def test_a_pause_that_clerk_asks_for_is_kept_and_passed_on(script: Script, api: ClerkApi, calls: Calls) -> None:
    script.answers = [Answer(429, headers={"Retry-After": "7"}), Answer()]
    api.users(order_by="-created_at")
    assert calls.told == [7.0]
    assert calls.slept == [7.0]


@pytest.mark.parametrize("odd", ["", "0", "-5", "soon", "nan", "9" * 5000, "Wed, 02 Dec 2026 10:00:07 GMT"])
def test_a_pause_that_cannot_be_read_is_ours_to_choose(script: Script, api: ClerkApi, calls: Calls, odd: str) -> None:
    script.answers = [Answer(429, headers={"Retry-After": odd}), Answer()]
    api.users(order_by="-created_at")
    assert calls.told == []
    assert calls.slept[0] <= 0.5


def test_a_pause_longer_than_our_patience_is_passed_on_but_not_waited_for(
    script: Script, api: ClerkApi, calls: Calls
) -> None:
    script.answers = [Answer(429, headers={"Retry-After": "300"})]
    with pytest.raises(ClerkUnavailable, match=r"last: 429, which asks for a pause of 300 s\)"):
        api.users(order_by="-created_at")
    assert (calls.told, calls.slept, api.calls) == ([300.0], [], 1)


def test_patience_ends_with_what_happened_last(script: Script, open_api: Callable[..., ClerkApi]) -> None:
    script.answers = [Answer(500), Answer(503)]
    api = open_api(patience_seconds=0.4, sleep=threading.Event().wait)
    with pytest.raises(
        ClerkUnavailable, match=r"^Clerk's API didn't answer for \d\S* s \(last: 503\): try again later"
    ):
        api.users(order_by="-created_at")
    assert api.calls >= 2


def test_where_nobody_listens_it_is_said_so(script: Script, open_api: Callable[..., ClerkApi]) -> None:
    api = open_api(base_url="http://127.0.0.1:1", patience_seconds=0)
    with pytest.raises(ClerkUnavailable, match="last: ConnectionRefusedError"):
        api.count()


def test_an_answer_that_does_not_come_is_waited_for_with_a_limit(
    script: Script, open_api: Callable[..., ClerkApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (clerk_api._TIMEOUTS.connect, clerk_api._TIMEOUTS.read) == (5, 30)
    monkeypatch.setattr(clerk_api, "_TIMEOUTS", httpx.Timeout(0.1))
    script.go_on.clear()
    with pytest.raises(ClerkUnavailable, match="last: no answer in time"):
        open_api(patience_seconds=0).count()


@pytest.mark.parametrize(
    ("begin", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n[", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n[", b" "),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"", mtime=0)[:10], b"\0\0\0\xff\xff"),
    ],
    ids=["headers", "hints", "body", "body-without-length", "packed-nothing"],
)
def test_an_answer_that_trickles_is_waited_for_with_a_limit(
    script: Script, open_api: Callable[..., ClerkApi], monkeypatch: pytest.MonkeyPatch, begin: bytes, drop: bytes
) -> None:
    assert clerk_api._ATTEMPT_SECONDS == 60
    monkeypatch.setattr(clerk_api, "_ATTEMPT_SECONDS", 0.2)
    script.answers = [Answer(body=begin, trickle=drop), Answer()]
    with pytest.raises(ClerkUnavailable):
        open_api(patience_seconds=0).users(order_by="-created_at")
    monkeypatch.undo()
    assert open_api().users(order_by="-created_at").users == ()


# --- The way there.


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(
    script: Script, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    script.answers = [Answer(body=b'{"total_count":5}')]
    with contextlib.closing(ClerkApi(KEY, script.url, calls.take, on_retry_after=calls.told.append)) as api:
        assert api.count() == 5


def test_elsewhere_a_proxy_is_used(script: Script, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", script.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    script.answers = [Answer(body=b'{"total_count":5}')]
    api = ClerkApi(KEY, "http://clerk.invalid", calls.take, on_retry_after=calls.told.append)
    with contextlib.closing(api):
        assert api.count() == 5
    assert script.requests[0][0] == "http://clerk.invalid/v1/users/count"


def test_a_certificate_that_is_not_trusted_is_a_matter_of_configuration(open_api: Callable[..., ClerkApi]) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        try:
            raise ssl.SSLCertVerificationError("self-signed certificate")
        except ssl.SSLError as error:
            raise httpx.ConnectError(str(error)) from error

    with (
        httpx.Client(transport=httpx.MockTransport(refuse)) as client,
        pytest.raises(ConfigError, match=r"^CLERK_API_URL: the certificate .* SSL_CERT_FILE"),
    ):
        open_api(client=client).count()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://user:s3cr3t@127.0.0.1:1080"),
        ("HTTPS_PROXY", "s3cr3t://127.0.0.1"),
        ("NO_PROXY", "[::s3cr3t"),
        ("SSL_CERT_FILE", "/s3cr3t/is/not/here"),
    ],
)
def test_a_proxy_or_certificates_that_are_none_are_a_matter_of_configuration(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name) as caught:
        ClerkApi(KEY, "https://api.clerk.com", calls.take, on_retry_after=calls.told.append)
    assert "s3cr3t" not in str(caught.value)


# --- The budget.


def test_the_budget_is_asked_until_it_has_a_call(script: Script, api: ClerkApi, calls: Calls) -> None:
    calls.budget = [0.25, 0.125, 0.0]
    api.users(order_by="-created_at")
    assert calls.slept == [0.25, 0.125]
    assert (calls.taken, api.calls, len(script.requests)) == (3, 1, 1)


def test_a_budget_that_has_none_for_too_long_is_not_waited_for(script: Script, api: ClerkApi, calls: Calls) -> None:
    calls.budget = [121.0]
    with pytest.raises(ClerkUnavailable, match="no call to Clerk's API is free within 120 s"):
        api.users(order_by="-created_at")
    calls.budget = [0.0, 121.0]
    script.answers = [Answer(503)]
    with pytest.raises(ClerkUnavailable, match=r"last: 503\)"):
        api.users(order_by="-created_at")
    assert len(script.requests) == 1


def test_without_a_booking_nothing_is_asked(script: Script, open_api: Callable[..., ClerkApi]) -> None:
    def take() -> float:
        raise psycopg.OperationalError("the connection is lost")

    api = open_api(take=take)
    with pytest.raises(psycopg.OperationalError):
        api.users(order_by="-created_at")
    assert (api.calls, script.requests) == (0, [])


def test_a_pause_that_one_process_is_told_holds_for_all(
    script: Script, open_api: Callable[..., ClerkApi], connect: Callable[[], Connection]
) -> None:
    ours, another = (ApiBudget(connect(), KEY, 1.0) for _ in range(2))
    script.answers = [Answer(429, headers={"Retry-After": "300"})]
    with pytest.raises(ClerkUnavailable):
        open_api(take=ours.take, on_retry_after=ours.block).count()
    assert 295 < another.take() <= 300


# --- What is refused, and what is never told.

MESSAGE: Final = "user canary@example.com has private things"


def problem(code: str) -> bytes:
    return json.dumps({"errors": [{"message": MESSAGE, "long_message": MESSAGE, "code": code}]}).encode()


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_a_matter_of_configuration(script: Script, api: ClerkApi, status: int) -> None:
    script.answers = [Answer(status, problem("clerk_key_invalid"))]
    with pytest.raises(ConfigError, match=f"^CLERK_SECRET_KEY: Clerk's API refuses the key .{status}.: copy "):
        api.count()
    assert api.calls == 1


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_a_refused_request_is_told_by_its_codes_and_not_tried_again(script: Script, api: ClerkApi, status: int) -> None:
    script.answers = [Answer(status, problem("form_param_invalid"))]
    with pytest.raises(ClerkRefused, match=f": {status} .form_param_invalid.$") as caught:
        api.users(order_by="-updated_at", starting_after="user_1")
    assert (caught.value.status, caught.value.codes, api.calls) == (status, ("form_param_invalid",), 1)


@pytest.mark.parametrize(
    "body",
    [
        problem(MESSAGE),
        b"",
        b"<html>" + MESSAGE.encode(),
        b"[]",
        b'{"errors":5}',
        b'{"errors":[{"code":5}]}',
        b"[" * 9999,
    ],
    ids=lambda body: repr(body[:14]),
)
def test_a_refusal_that_is_not_clerk_s_has_no_codes(script: Script, api: ClerkApi, body: bytes) -> None:
    script.answers = [Answer(422, body)]
    with pytest.raises(ClerkRefused) as caught:
        api.count()
    assert str(caught.value) == "Clerk's API refuses the request: 422 (without a code)"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(script: Script, api: ClerkApi, status: int) -> None:
    script.answers = [Answer(status, headers={"Location": f"{script.url}/elsewhere"})]
    with pytest.raises(ConfigError, match=r"^CLERK_API_URL: .*redirect"):
        api.count()
    assert len(script.requests) == 1


@pytest.mark.parametrize("url", ["http://1.2.3.999", "ftp://127.0.0.1", "127.0.0.1"])
def test_an_address_that_is_none_is_a_matter_of_configuration(open_api: Callable[..., ClerkApi], url: str) -> None:
    with pytest.raises(ConfigError, match=r"^CLERK_API_URL"):
        open_api(base_url=url).count()


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_end_is_cut_off(
    script: Script, api: ClerkApi, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(clerk_api, "LARGEST_ANSWER", 100_000)
    body = b"[" + b" " * 50_000_000 + b"]"
    script.answers = [
        Answer(body=gzip.compress(body, mtime=0), headers={"Content-Encoding": "gzip"}) if packed else Answer(body=body)
    ]
    tracemalloc.start()
    try:
        with pytest.raises(SyncError, match="more than 100000 bytes"):
            api.users(order_by="-created_at")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert api.calls == 1
    assert most < 5_000_000


def test_neither_the_key_nor_what_was_answered_is_ever_told(
    script: Script, open_api: Callable[..., ClerkApi], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    api = open_api(patience_seconds=0.05, sleep=threading.Event().wait)
    said = [repr(api)]
    for status in (0, 200, 301, 401, 404, 429, 500):
        script.answers = [Answer(status, MESSAGE.encode())]
        with pytest.raises(SyncError) as caught:
            api.users(order_by="-created_at")
        said += [repr(caught.value), str(caught.value)]
    told = " ".join([*said, *(str(vars(record)) for record in caplog.records)])
    assert "s3cr3t" not in told
    assert "canary" not in told
    assert "asked again" in caplog.text
