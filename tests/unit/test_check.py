"""`clerk-sync check`: what each answer of a receiver, or of something that isn't one, is said to mean."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from worker import check
from worker.check import Answer, Line
from worker.cli import main
from worker.cli.check import _Shown
from worker.errors import ConfigError, SyncError
from worker.events import RESERVED, UserChanged, UserDeleted, parse_event

BASE = "https://your.host"
Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler))


def answers(status: int, said: Any = None, **headers: str) -> Handler:
    return lambda _: httpx.Response(status, json=said, headers=headers)


def raising(error: Exception) -> Handler:
    def handler(_: httpx.Request) -> httpx.Response:
        raise error

    return handler


# --- The address


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://your.host", BASE),
        ("https://your.host/", BASE),
        (" https://your.host/webhooks/clerk ", BASE),
        ("https://your.host/webhooks/clerk/", BASE),
        ("https://your.host/sync/webhooks/clerk", BASE + "/sync"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_the_address_may_be_that_of_the_endpoint_too(url: str, base: str) -> None:
    assert check.base_of(url) == base


@pytest.mark.parametrize(
    "url", ["", "your.host", "ftp://your.host", "https://", "https://your.host:99999", "https://[::1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url: must be an address"):
        check.base_of(url)


@pytest.mark.parametrize("url", ["https://me:hush@your.host", "https://your.host?a=b", "https://your.host/#a"])
def test_an_address_with_a_login_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError, match="must be without a login") as caught:
        check.base_of(url)
    assert "hush" not in str(caught.value)


# --- Alive and ready


def ready(handler: Handler) -> list[Line]:
    return list(check.ready(client_of(handler), BASE))


def test_a_receiver_that_is_alive_and_ready_passes() -> None:
    said = {"/healthz": {"status": "alive"}, "/readyz": {"status": "ready", "problems": []}}
    lines = ready(lambda request: httpx.Response(200, json=said[request.url.path]))
    assert [(line.name, line.state) for line in lines] == [("healthz", "pass"), ("readyz", "pass")]


def test_the_problems_of_a_receiver_that_isnt_ready_are_told_and_can_hide_nothing() -> None:
    lines = ready(
        answers(503, {"status": "not ready", "problems": ["run clerk-sync migrate", "\x1b[2J\u202e" + "x" * 999]})
    )
    assert lines[1].state == "fail"
    assert lines[1].notes[0] == "run clerk-sync migrate"
    assert lines[1].notes[1].startswith(r"\u001b[2J\u202ex")
    assert len(lines[1].notes[1]) == check.SHOWN


@pytest.mark.parametrize("status", [200, 401, 404])
def test_health_that_the_proxy_lets_nobody_see_is_only_a_warning(status: int) -> None:
    lines = ready(lambda _: httpx.Response(status, text="<html>"))
    assert [line.state for line in lines] == ["warning", "warning"]
    assert f"https://your.host/healthz answers {status}, but not as clerk-sync does" in lines[0].notes[0]


def test_a_redirect_of_the_health_fails_and_says_where_to_without_its_query() -> None:
    lines = ready(answers(301, None, Location="https://www.your.host/healthz?token=hush"))
    assert {line.state for line in lines} == {"fail"}
    assert lines[0].notes[0].startswith("a redirect (301) to https://www.your.host/healthz, which Svix doesn't follow")


def test_a_proxy_without_a_receiver_behind_it_fails() -> None:
    lines = ready(answers(502))
    assert lines[0].state == "fail"
    assert "502: something answers at https://your.host, but reaches no receiver" in lines[0].notes[0]


# --- No answer


def untrusted() -> httpx.ConnectError:
    error = httpx.ConnectError("no")
    error.__cause__ = ssl.SSLCertVerificationError("no")
    return error


def no_tls() -> httpx.ConnectError:
    error = httpx.ConnectError("no")
    error.__cause__ = ssl.SSLError("no")
    return error


def no_name() -> httpx.ConnectError:
    error = httpx.ConnectError("no")
    error.__cause__ = socket.gaierror("no")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (untrusted(), "the certificate of your.host isn't trusted"),
        (no_tls(), "your.host doesn't speak TLS as it should"),
        (no_name(), "nothing answers at your.host (gaierror)"),
        (httpx.ReadTimeout("no"), "no answer within 15 s, after which Svix gives up"),
        (httpx.RemoteProtocolError("no"), "nothing answers at your.host (RemoteProtocolError)"),
    ],
    ids=["untrusted", "no TLS", "no name", "late", "no HTTP"],
)
def test_why_no_answer_comes_is_told(error: Exception, said: str) -> None:
    with pytest.raises(SyncError) as caught:
        check.ask(client_of(raising(error)), "GET", BASE)
    assert str(caught.value).startswith(said)
    assert {line.state for line in ready(raising(error))} == {"fail"}


def test_an_answer_without_end_is_read_only_so_far() -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield b"x" * 10_000

    answer = check.ask(client_of(lambda _: httpx.Response(200, content=endless())), "GET", BASE)
    assert (answer.status, answer.said) == (200, {})
    assert len(taken) < 10


def test_redirects_are_not_followed() -> None:
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(302, headers={"Location": "https://elsewhere"})

    assert check.ask(client_of(handler), "POST", BASE, b"{}").status == 302
    assert asked == [BASE]


# --- What is said of a delivery

NO_MATCH = "no signature matches: check that the signing secret is this endpoint's own"


@pytest.mark.parametrize(
    ("status", "said", "meaning"),
    [
        (202, {"status": "dead"}, "does it run another version"),
        (200, {"status": "ignored"}, "the same CLERK_INSTANCE_ID"),
        (200, {}, "it isn't clerk-sync that answers at https://your.host/webhooks/clerk (200)"),
        (202, {"status": "queued"}, "it isn't clerk-sync that answers"),
        (308, {}, "a redirect (308), which Svix doesn't follow"),
        (400, {"error": NO_MATCH}, "the receiver has another CLERK_WEBHOOK_SIGNING_SECRET than this command"),
        (400, {"error": "svix-timestamp is more than 5 minutes off"}, "the clocks"),
        (400, {"error": "svix-id, svix-timestamp or svix-signature is missing"}, "let the proxy pass the headers"),
        (400, {"error": "the body can't be read"}, "refused (400): the body can't be read"),
        (400, {}, "refused (400)"),
        (403, {}, "something before the receiver refuses it (403)"),
        (404, {"error": "not found"}, "the address must end in /webhooks/clerk"),
        (503, {"error": "the event can't be taken now; deliver it again"}, "can't commit it to Postgres"),
        (504, {}, "504: something answers at https://your.host, but reaches no receiver"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_answer_that_takes_nothing_says_what_to_do(status: int, said: dict[str, Any], meaning: str) -> None:
    problem = check.refusal(Answer(status, said, "", 0.1), BASE + check.ENDPOINT)
    assert problem is not None
    assert meaning in problem


def test_a_wrong_secret_and_a_body_that_was_changed_look_alike_so_both_are_named() -> None:
    problem = check.refusal(Answer(400, {"error": NO_MATCH}, "", 0.1), BASE + check.ENDPOINT) or ""
    assert "CLERK_WEBHOOK_SIGNING_SECRET" in problem
    assert "a proxy on the way changes the body" in problem


@pytest.mark.parametrize(("status", "said"), [(202, "accepted"), (200, "duplicate")])
def test_what_was_taken_has_no_problem(status: int, said: str) -> None:
    assert check.refusal(Answer(status, {"status": said}, "", 0.1), BASE + check.ENDPOINT) is None


# --- The events


def test_the_events_are_clerks_and_of_a_reserved_user() -> None:
    user_id = RESERVED + "1"
    made = parse_event(check.created(user_id, 1_700_000_000_000, None))
    gone = parse_event(check.deleted(user_id, 1_700_000_000_001, None))
    assert isinstance(made, tuple)
    assert isinstance(gone, tuple)
    assert made[0] == "user.created"
    assert isinstance(made[1], UserChanged)
    assert (made[1].user_id, made[1].whole, made[1].replaced) == (user_id, True, 0)
    assert isinstance(gone[1], UserDeleted)
    assert (gone[1].user_id, gone[1].event_at > made[1].version) == (user_id, True)


def test_the_instance_is_named_where_it_is_known() -> None:
    assert json.loads(check.created("user_a", 1, "ins_1"))["instance_id"] == "ins_1"
    assert json.loads(check.deleted("user_a", 1, "ins_1"))["instance_id"] == "ins_1"
    assert "instance_id" not in json.loads(check.created("user_a", 1, None))


def test_a_proxy_that_writes_json_anew_changes_the_body() -> None:
    body = check.created("user_a", 1, None)
    anew = json.dumps(json.loads(body, parse_int=float)).encode()  # as JavaScript reads numbers
    assert anew != body
    assert json.loads(anew, parse_int=float) != json.loads(body)


# --- The command without servers

CLOSED = "http://127.0.0.1:1"


def ran(*arguments: str, **environment: str) -> Result:
    names = ("DATABASE_URL", "REDIS_URL", "CLERK_WEBHOOK_SIGNING_SECRET", "CLERK_WEBHOOK_SECRET", "CLERK_SECRET_KEY")
    unset = [*names, *(f"{name}_FILE" for name in names), "SESSION_CLAIMS", "PORT"]
    env = {**dict.fromkeys(unset), "COLUMNS": "400", **environment}
    return CliRunner(catch_exceptions=False).invoke(main, ["check", *arguments], env=env)


def lines_of(result: Result) -> dict[str, tuple[str, list[str]]]:
    return {line["name"]: (line["state"], line["notes"]) for line in json.loads(result.stdout)["checks"]}


def test_all_problems_of_the_settings_are_told_and_what_needs_them_is_skipped() -> None:
    result = ran("--url", CLOSED, "--json")
    lines = lines_of(result)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert [note.split()[0] for note in lines["settings"][1]] == ["DATABASE_URL", "REDIS_URL"]
    assert lines["signing secret"][0] == "fail"
    assert lines["signing secret"][1][0].startswith("CLERK_WEBHOOK_SIGNING_SECRET is missing: copy")
    assert {name: state for name, (state, _) in lines.items() if state != "skipped"} == dict.fromkeys(
        ("settings", "signing secret", "healthz", "readyz"), "fail"
    )


def test_a_secret_that_is_malformed_is_told_and_not_shown() -> None:
    result = ran("--url", CLOSED, CLERK_WEBHOOK_SIGNING_SECRET="whsec_hush!", PORT="0")
    assert "is cut short or has something added" in result.output
    assert "PORT: must be a whole number" in result.output
    assert "hush" not in result.output


def test_a_template_that_clerk_would_refuse_fails_its_own_line() -> None:
    lines = lines_of(ran("--url", CLOSED, "--json", SESSION_CLAIMS='{"sub": "x"}'))
    assert lines["template"][0] == "fail"
    assert lines["template"][1]
    assert not any("SESSION_CLAIMS" in note for note in lines["settings"][1])


def test_a_template_that_is_right_passes_although_other_settings_are_missing() -> None:
    lines = lines_of(ran("--url", CLOSED, "--json", SESSION_CLAIMS='{"role": "{{user.public_metadata.role}}"}'))
    assert lines["template"] == ("pass", [])
    lines = lines_of(ran("--url", CLOSED, "--json", SESSION_CLAIMS='{"metadata": "{{user.public_metadata}}"}'))
    assert lines["template"][0] == "warning"
    assert lines["template"][1][0].startswith("line 1, column 15: user.public_metadata can be of any size")


def test_what_is_waited_for_is_told_now_and_then_but_not_to_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        shown = _Shown(quiet=quiet)
        for passed in (0.1, 4.9, 5.0, 5.1, 9.9, 10.2):
            shown.waiting("the row", passed, 30.0)
    assert capsys.readouterr() == ("", "waiting for the row: 5 of 30 s\nwaiting for the row: 10 of 30 s\n")


def test_a_wrong_address_is_wrong_usage() -> None:
    result = ran("--url", "your.host")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--url: must be an address" in result.stderr


def test_the_help_teaches() -> None:
    said = ran("--help").stdout
    for word in ("clerk-sync check --url https://your.host", "user_clerk_sync_check_", "Exits 0", "--wait"):
        assert word in said
