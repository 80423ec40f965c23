"""What the supervisor decides before it starts anything: the Procfile, the waits, the look of lines."""

import io
import itertools

import pytest

from worker import supervise
from worker.errors import ConfigError
from worker.supervise import Part, Supervisor, find_procfile, parse_procfile


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def supervisor(output: io.StringIO, environment: dict[str, str]) -> Supervisor:
    return Supervisor(
        [Part("web", "true"), Part("worker", "true")],
        environment=environment,
        ready=lambda: True,
        output=output,
    )


def test_procfile_gives_commands_in_its_order() -> None:
    text = "# comment\n\nrelease: clerk-sync migrate\r\nweb:  gunicorn --bind 0.0.0.0:$PORT x:app  \nb-1: a: b\n"
    assert list(parse_procfile(text).items()) == [
        ("release", "clerk-sync migrate"),
        ("web", "gunicorn --bind 0.0.0.0:$PORT x:app"),
        ("b-1", "a: b"),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [("web gunicorn", 1), ("web: a\nworker:", 2), ("web: a\n\nweb: b", 3), (": a", 1), ("a b: c", 1)],
)
def test_procfile_line_that_cannot_be_read_is_named(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"Procfile, line {line}:"):
        parse_procfile(text)


def test_own_procfile_has_the_parts_of_the_system() -> None:
    assert list(parse_procfile(find_procfile().read_text("utf-8"))) == ["release", "web", "worker", "beat"]


def test_restart_is_at_once_then_slower_and_slower_until_a_life_was_long() -> None:
    child = supervise._Child("web", lambda: pytest.fail("not started here"), 15)
    child.started = 100.0
    assert [child.backoff(101.0) for _ in range(7)] == [0.0, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert child.backoff(100.0 + supervise.SETTLED_SECONDS) == 0.0


@pytest.mark.parametrize(
    ("output", "environment", "coloured"),
    [(io.StringIO(), {}, False), (Terminal(), {}, True), (Terminal(), {"NO_COLOR": "1"}, False)],
)
def test_lines_have_a_prefix_of_one_width_coloured_on_a_terminal_only(
    output: io.StringIO, environment: dict[str, str], coloured: bool
) -> None:
    printing = supervisor(output, environment)
    for child, line in itertools.product(printing._parts, (b"one", b"caf\xc3\xa9 \xff\r")):
        printing._say(child, line)
    printing._stop_all()
    lines = output.getvalue().splitlines()
    assert all(line.startswith("\x1b[") is coloured for line in lines)
    if not coloured:
        assert lines == ["web    | one", "web    | café \ufffd", "worker | one", "worker | café \ufffd"]


def test_terminal_that_is_gone_is_no_reason_to_end() -> None:
    output = io.StringIO()
    printing = supervisor(output, {})
    output.close()
    printing._say(printing._parts[0], b"nobody reads this")
    printing._stop_all()
