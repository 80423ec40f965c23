"""One line an event, with its fields, as key=value or JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from worker import log


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Callable[[], list[str]]]]:
    """Configures logging in a format; what comes back gives the lines written since."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in log._QUIET}

    def configured(log_format: str) -> Callable[[], list[str]]:
        output = io.StringIO()
        monkeypatch.setattr("sys.stdout", output)
        log.configure(log_format, "DEBUG")
        return lambda: output.getvalue().splitlines()

    yield configured
    root.handlers[:], root.level = handlers, level
    for name, was in quiet.items():
        logging.getLogger(name).setLevel(was)


def test_fields_stand_beside_a_constant_sentence(lines: Callable[[str], Callable[[], list[str]]]) -> None:
    written = lines("logfmt")
    logging.getLogger("here").info("batch applied", extra={"claimed": 3, "ms": 1.5})
    (line,) = written()
    assert 'level=info logger=here event="batch applied" claimed=3 ms=1.5' in line
    assert line.startswith("time=20")


def test_json_is_one_object_a_line(lines: Callable[[str], Callable[[], list[str]]]) -> None:
    written = lines("json")
    logging.getLogger("here").warning("delivery", extra={"svix_id": "msg_1"})
    (line,) = written()
    parsed = json.loads(line)
    assert (parsed["event"], parsed["level"], parsed["svix_id"]) == ("delivery", "warning", "msg_1")


@pytest.mark.parametrize("log_format", ["logfmt", "json"])
def test_a_sender_cannot_forge_a_line(lines: Callable[[str], Callable[[], list[str]]], log_format: str) -> None:
    written = lines(log_format)
    logging.getLogger("here").info("delivery", extra={"type": "x\nlevel=error event=forged\x1b[31m"})
    (line,) = written()
    assert "\x1b" not in line


def test_libraries_that_would_tell_what_they_send_stay_quiet(
    lines: Callable[[str], Callable[[], list[str]]],
) -> None:
    written = lines("logfmt")
    for name in ("kombu.transport", "celery.app.trace", "httpx", "redis.connection"):
        logging.getLogger(name).debug("c4nary")
        logging.getLogger(name).info("c4nary")
    assert written() == []


def fail() -> None:
    try:
        int("c4nary")
    except ValueError:
        raise KeyError("c4nary")  # noqa: B904 - its context is what a log could quote


def test_an_exception_is_told_by_its_classes_and_places_never_by_its_text(
    lines: Callable[[str], Callable[[], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "OURS", frozenset({"tests"}))
    written = lines("logfmt")
    try:
        fail()
    except KeyError:
        logging.getLogger("anyone").exception("it failed\n")
    (line,) = written()
    assert 'error="KeyError < ValueError"' in line
    assert line.count("tests.unit.test_log:") == 2
    assert "c4nary" not in line
    assert "\\n" not in line
