"""What Sentry is told: our sentences, classes and places; nothing of what went through our hands."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from worker import sentry
from worker.errors import ConfigError
from worker.settings import Settings

DSN: Final = "https://key@sentry.invalid/1"
CANARY: Final = "c4n4ry-7f3a"


class Kept(Transport):
    """Keeps what would be sent, as it would be."""

    sent: Final[list[bytes]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.sent.append(envelope.serialize())

    def flush(self, *_: object, **__: object) -> None:
        self.sent.append(b"flushed")


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[sentry.Reporter]:
    """A reporter to whom everything is told that is logged."""
    Kept.sent.clear()
    reporter = sentry.Reporter(DSN, Kept)
    root = logging.getLogger()
    root.addHandler(reporter)
    yield reporter
    root.removeHandler(reporter)


def events() -> list[dict[str, Any]]:
    """What was sent; of each an envelope's header, an item's header and the event."""
    return [json.loads(envelope.splitlines()[2]) for envelope in Kept.sent if envelope != b"flushed"]


def fail() -> None:
    """Fail with the canary in the message, its cause's and a variable."""
    secret = {"private_metadata": CANARY}
    try:
        int(secret["private_metadata"])
    except ValueError as error:
        raise KeyError(f"can't use {CANARY}") from error


def test_classes_places_and_our_sentence_are_sent_and_nothing_else(reporter: sentry.Reporter) -> None:
    try:
        fail()
    except KeyError:
        logging.getLogger("worker.sync").exception(
            "an event can't be applied", extra={"user_id": CANARY, "x": [CANARY]}
        )
    (event,) = events()
    assert event.keys() <= set(sentry._SENT)
    assert event["level"] == "error"
    assert event["logentry"] == {"message": "an event can't be applied"}
    assert event["release"].startswith("clerk-sync@")
    assert [value["type"] for value in event["exception"]["values"]] == ["ValueError", "KeyError"]
    (frame,) = event["exception"]["values"][1]["stacktrace"]["frames"]
    assert (frame["module"], frame["filename"]) == (__name__, "tests/unit/test_sentry.py")
    assert frame["lineno"] > 50
    sent = b"".join(Kept.sent).decode()
    assert CANARY not in sent
    assert str(Path.cwd()) not in sent


def test_of_somebody_elses_sentence_only_who_said_it_is_sent(reporter: sentry.Reporter) -> None:
    logging.getLogger("celery.app").error(f"task {CANARY} failed")  # noqa: G004 - as libraries do
    logging.getLogger("worker.sync").error("with %s", CANARY)
    assert [event["logentry"]["message"] for event in events()] == ["celery.app", "with %s"]
    assert CANARY not in b"".join(Kept.sent).decode()


def test_warnings_and_what_sentrys_own_library_says_are_not_sent(reporter: sentry.Reporter) -> None:
    logging.getLogger("webhooks.app").warning("delivery")
    logging.getLogger("urllib3.connectionpool").error("retrying")
    logging.getLogger("sentry_sdk.errors").error("dropped")
    assert Kept.sent == []


def test_the_same_error_is_sent_once_a_minute(reporter: sentry.Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("worker.sentry.time.monotonic", lambda: now)
    log = logging.getLogger("worker.sweeper")
    for now in (1000.0, 1059.0, 1061.0):  # noqa: B007 - the clock reads it
        log.error("event set aside")
        log.error("something else")
    assert [event["logentry"]["message"] for event in events()] == ["event set aside", "something else"] * 2


def test_a_worker_that_may_be_ending_waits_until_its_error_is_sent(reporter: sentry.Reporter) -> None:
    logging.getLogger("webhooks.connections").critical("answering failed")
    assert b"flushed" not in Kept.sent, "its thread answers everybody"
    logging.getLogger("worker.sweeper").critical("ending this worker")
    assert Kept.sent[-1] == b"flushed"


@pytest.mark.parametrize("wrong", ["", " ", "yes", "sentry.io/1", "https://sentry.io/1", "https://key@sentry.io"])
def test_a_dsn_that_is_wrong_or_empty_is_refused_at_the_start_and_not_shown(wrong: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.from_env({"SENTRY_DSN": wrong})
    (problem,) = refused.value.problems
    assert problem.startswith(("SENTRY_DSN ", "SENTRY_DSN: "))
    assert "sentry.io" not in problem


def test_a_dsn_is_taken_and_not_shown() -> None:
    settings = Settings.from_env({"SENTRY_DSN": DSN})
    assert settings.sentry_dsn == DSN
    assert "sentry.invalid" not in repr(settings)
    assert Settings.from_env({}).sentry_dsn == ""


def test_without_the_package_a_dsn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sentry.reporters("") == []
    monkeypatch.setitem(sys.modules, "sentry_sdk", None)
    with pytest.raises(ConfigError, match=r"pip install 'clerk-sync\[sentry\]'"):
        sentry.reporters(DSN)


def test_nothing_of_it_is_imported_where_it_is_not_asked_for() -> None:
    asked = "from worker import sentry, tracing; sentry.reporters(''); tracing.start(wanted=False)"
    loaded = "sorted({name.partition('.')[0] for name in sys.modules} & {'sentry_sdk', 'opentelemetry'})"
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; {asked}; print({loaded})"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "[]\n"
