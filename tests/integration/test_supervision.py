"""Supervision of real processes: tiny shell commands as parts, the embedded servers as servers."""

import io
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import until
from worker import local, supervise
from worker.supervise import Part, Pids, Supervisor

FOREVER = "sleep 1000"
CLERK_SYNC = (sys.executable, "-c", "from worker.cli import main; main()")


def alive(pid: int) -> bool:
    return bool(local.command_line(pid))


def shell(script: str) -> str:
    return f"sh -c {shlex.quote(script)}"


class Run:
    """One supervised run in this thread; `during` runs beside it once everything is ready."""

    def __init__(self) -> None:
        self.output = io.StringIO()
        self.changes: list[Pids] = []

    def __call__(
        self,
        parts: list[Part],
        during: Callable[[Pids], int | None] = lambda _: 0,
        servers: tuple[local.Server, ...] = (),
        release: Part | None = None,
        ready: Callable[[], bool] = lambda: True,
    ) -> int:
        return Supervisor(
            parts,
            servers,
            release,
            environment={"PATH": os.defpath, "GREETING": "hello"},
            ready=ready,
            on_ready=during,
            on_change=self.changes.append,
            output=self.output,
        ).run()


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    with local.lock(folder):
        yield folder
    local.discard(folder)


def test_part_that_dies_is_started_again_after_its_group_was_killed(run: Run, tmp_path: Path) -> None:
    note = tmp_path / "orphan"
    part = Part("web", shell(f"echo started; sleep 1000 & echo $! > {note}.new; mv {note}.new {note}; wait"))
    seen: list[int] = []

    def during(pids: Pids) -> int:
        orphan = int(note.read_text())
        note.unlink()
        os.kill(pids["web"], signal.SIGKILL)
        until(lambda: run.changes[-1]["web"] != pids["web"])
        assert not alive(orphan)
        until(note.exists)
        seen.extend((pids["web"], run.changes[-1]["web"], orphan, int(note.read_text())))
        return 7

    assert run([part], during, ready=note.exists) == 7
    assert len(set(seen)) == 4
    assert not any(map(alive, seen))
    assert "by SIGKILL: starting it again" in run.output.getvalue()


def test_servers_that_are_killed_come_back_where_they_were(run: Run, data_dir: Path) -> None:
    servers = (local.postgres(data_dir), local.redis(data_dir))

    def during(pids: Pids) -> int:
        for server in servers:
            os.kill(pids[server.name], signal.SIGKILL)
        for server in servers:
            until(lambda name=server.name: run.changes[-1][name] != pids[name])  # type: ignore[misc]
            until(lambda server=server: local.answers(server))  # type: ignore[misc]
        return 0

    assert run([Part("web", FOREVER)], during, servers) == 0
    assert not any(alive(pid) for change in run.changes for pid in change.values())
    assert not any(map(local.answers, servers))


def test_release_runs_to_its_end_with_our_programs_first_on_the_path(run: Run) -> None:
    release = Part("release", shell('echo "$GREETING from $PATH"'))
    assert run([Part("web", FOREVER)], release=release) == 0
    assert f"release | hello from {Path(sys.executable).parent}:{os.defpath}\n" in run.output.getvalue()
    assert run.changes[0].keys() == {"web"}


@pytest.mark.parametrize(("ends_with", "code"), [(1, 1), (2, 2), (70, 1)])
def test_release_that_fails_starts_nothing(run: Run, tmp_path: Path, ends_with: int, code: int) -> None:
    web = Part("web", f"touch {tmp_path}/web")
    assert run([web], release=Part("release", shell(f"exit {ends_with}"))) == code
    assert f"release ended, exit code {ends_with}: nothing was started" in run.output.getvalue()
    assert not list(tmp_path.iterdir())


def test_part_that_never_starts_ends_the_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_BACKOFF_SECONDS", 0.001)
    parts = [Part("web", FOREVER), Part("worker", shell("echo because; exit 3"))]
    assert run(parts, ready=lambda: False) == 1
    text = run.output.getvalue()
    assert text.count("worker | because") == 1 + supervise.START_ATTEMPTS
    assert "exit code 3: 5 restarts didn't help" in text


def test_system_that_never_gets_ready_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "START_SECONDS", 0.1)
    assert run([Part("web", FOREVER)], ready=lambda: False) == 1
    assert "waiting until the system is ready" in run.output.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_gracefully_and_leaves_no_process(run: Run, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    graceful = shell("trap 'echo goodbye; exit 0' TERM; echo up; sleep 1000 & while :; do wait; done")
    parts = [Part("web", graceful), Part("worker", FOREVER)]

    def ready() -> bool:
        return "web    | up" in run.output.getvalue()

    assert run(parts, lambda _: os.kill(os.getpid(), number), ready=ready) == 0
    assert "web    | goodbye" in run.output.getvalue()
    assert not any(map(alive, run.changes[-1].values()))
    assert signal.getsignal(number) == before


def test_second_signal_kills_at_once(run: Run) -> None:
    stubborn = Part("web", shell("trap 'echo no' TERM; echo up; while :; do sleep 0.05; done"))

    def during(_: Pids) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: "web | no" in run.output.getvalue())
        os.kill(os.getpid(), signal.SIGTERM)

    begun = time.monotonic()
    assert run([stubborn], during, ready=lambda: "web | up" in run.output.getvalue()) == 0
    assert time.monotonic() - begun < supervise.STOP_SECONDS / 2
    assert not alive(run.changes[-1]["web"])


def test_part_that_does_not_stop_is_killed_after_the_limit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "STOP_SECONDS", 0.2)
    stubborn = Part("web", shell("trap '' TERM; echo up; sleep 1000 & while :; do wait; done"))
    assert run([stubborn], ready=lambda: "web | up" in run.output.getvalue()) == 0
    assert "web didn't stop within 0.2 s: killed" in run.output.getvalue()
    assert not alive(run.changes[-1]["web"])


def test_failure_of_what_runs_beside_is_raised_after_the_stop(run: Run) -> None:
    def during(_: Pids) -> int:
        raise LookupError("no row")

    with pytest.raises(LookupError, match="no row"):
        run([Part("web", FOREVER)], during)
    assert not alive(run.changes[-1]["web"])


def test_owner_that_is_killed_takes_its_parts_along() -> None:
    """Linux's kernel sees to it; elsewhere the next start in the same folder does: see test_local.py."""
    if sys.platform != "linux":
        return
    script = (
        "from worker.supervise import *; import os\n"
        f"Supervisor([Part('web', {FOREVER!r})], environment={{}}, ready=lambda: True,"
        "  on_ready=lambda pids: print(pids['web'], flush=True)).run()"
    )
    with subprocess.Popen((sys.executable, "-c", script), stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert alive(pid)
        owner.kill()
    until(lambda: not alive(pid))


def up(data_dir: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*CLERK_SYNC, "up", "--data-dir", str(data_dir), *options),
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_second_up_in_a_folder_is_refused(data_dir: Path) -> None:
    refused = up(data_dir, "--port", "0")
    assert refused.returncode == 2
    assert f"{data_dir} is in use by another clerk-sync" in refused.stderr


def test_up_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        refused = up(tmp_path, "--port", port)
    assert refused.returncode == 2
    assert f"port {port} is taken" in refused.stderr


def test_up_makes_no_secret_for_a_database_that_is_not_its_own(tmp_path: Path) -> None:
    url_file = tmp_path / "url"
    url_file.write_text("postgresql://somewhere/else")
    refused = up(tmp_path / "data", "--port", "0", DATABASE_URL_FILE=str(url_file))
    assert refused.returncode == 2
    assert "CLERK_WEBHOOK_SIGNING_SECRET is missing" in refused.stderr
