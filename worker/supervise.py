"""Runs the Procfile's own commands and the embedded servers, keeps them alive, and stops them in order.

One thread starts everything, pumps every line and notices every end. Nothing heavy is imported: it stays.
What the commands are is the Procfile's business, what the servers are `worker.local`'s.
"""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TextIO

from worker import local
from worker.errors import ConfigError

START_SECONDS = 60.0
STOP_SECONDS = 10.0
SETTLED_SECONDS = 30.0  # a life this long was a good one: the next restart is at once again
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 5.0
START_ATTEMPTS = 5
LONGEST_LINE = 65_536
OWN_NAME = "up"
COLOURS = ("36", "33", "32", "35", "34", "96", "93")

Pids = dict[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the Procfile."""

    name: str
    command: str
    stop_signal: int = signal.SIGTERM


def parse_procfile(text: str) -> dict[str, str]:
    """Give the command of each name, in the file's order. ConfigError names the line that can't be read."""
    commands: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9_-]+):\s*(\S.*?)\s*", line)
        if not match:
            raise ConfigError(f"Procfile, line {number}: expected 'name: command'")
        name, command = match.groups()
        if name in commands:
            raise ConfigError(f"Procfile, line {number}: '{name}' is there twice")
        commands[name] = command
    return commands


def find_procfile() -> Path:
    """Find the repository's Procfile, or the one that the wheel carries. ConfigError where there is none."""
    package = Path(__file__).parent
    for path in (package.parent / "Procfile", package / "Procfile"):
        if path.is_file():
            return path
    raise ConfigError(f"there is no Procfile beside {package} nor in it: install clerk-sync again")


@dataclass(slots=True)
class _Child:
    """A process by name, through all its lives."""

    name: str
    spawn: Callable[[], subprocess.Popen[bytes]]
    stop_signal: int
    restarts: bool = True
    process: subprocess.Popen[bytes] | None = None
    pid: int = 0
    returncode: int | None = None
    started: float = 0.0
    failures: int = 0
    due: float | None = None  # when to start it again
    fell_silent: float = float("-inf")  # when its output ended
    unfinished: bytes = b""

    def backoff(self, now: float) -> float:
        """Count a failure and give the seconds to wait before the next start."""
        if now - self.started >= SETTLED_SECONDS:
            self.failures = 0
        self.failures += 1
        if self.failures == 1:
            return 0.0
        return float(min(FIRST_BACKOFF_SECONDS * 2 ** (self.failures - 2), LONGEST_BACKOFF_SECONDS))


class _Stopped(Exception):
    """Leaves whatever was being waited for."""


class Supervisor:
    """Starts servers, then `release`, then the parts, and keeps all but `release` running until told to stop.

    `ready` is asked from a thread, again and again, whether the system serves. Once it does, `on_change`
    gets every name's pid, then and whenever one changes, and `on_ready` runs in a thread; an integer that it
    returns is the exit code to stop with. Signals are handled where `run` is called in the main thread.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        servers: Sequence[local.Server] = (),
        release: Part | None = None,
        *,
        environment: Mapping[str, str],
        ready: Callable[[], bool],
        on_ready: Callable[[Pids], int | None] = lambda _: None,
        on_change: Callable[[Pids], None] = lambda _: None,
        output: TextIO | None = None,
    ) -> None:
        folder = str(Path(sys.executable).parent)
        # The programs of this very environment, whether or not it was activated.
        self._environment = {
            **environment,
            "PATH": os.pathsep.join(filter(None, (folder, environment.get("PATH", os.defpath)))),
        }
        self._servers = [self._server(server) for server in servers]
        self._specifications = servers
        self._release = self._part(release, restarts=False) if release else None
        self._parts = [self._part(part) for part in parts]
        self._ready = ready
        self._on_ready = on_ready
        self._on_change = on_change
        self._output = output or sys.stdout
        self._width = max(len(name) for name in (OWN_NAME, *(child.name for child in self._all())))
        self._coloured = self._output.isatty() and not environment.get("NO_COLOR")
        self._code: int | None = None
        self._error: BaseException | None = None
        self._serving = False
        self._stopping = False
        self._over = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        for descriptor in (self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)

    def stop(self, code: int = 0) -> None:
        """Ask for a clean stop, from any thread or signal handler; the first code given counts."""
        if self._code is None:
            self._code = code
        self._wake()

    def run(self) -> int:
        """Run until stopped; give the exit code: 1 or 2, after a line saying why, where a part can't start.

        Raise what `ready`, `on_ready` or `on_change` raised, after everything was stopped.
        """
        with self._signals():
            try:
                self._bring_up()
                self._attend(lambda: False)
            except _Stopped:
                pass
            finally:
                self._stop_all()
        if self._error:
            raise self._error
        return self._code or 0

    # Starting

    def _bring_up(self) -> None:
        for child in self._servers:
            self._start(child)
        for server, child in zip(self._specifications, self._servers, strict=True):
            self._until(partial(local.answers, server), f"{child.name} answers")
        if self._release:
            self._run_release(self._release)
        for child in self._parts:
            self._start(child)
        self._until(self._ready, "the system is ready")
        self._serving = True
        self._changed()
        self._in_thread(self._announce)

    def _run_release(self, release: _Child) -> None:
        self._start(release)
        self._attend(lambda: release.returncode is not None)
        if release.returncode:
            # 2 is what says "wrong configuration", here as everywhere.
            self._fail(
                f"{release.name} ended, {local.exit_reason(release.returncode)}: nothing was started",
                2 if release.returncode == 2 else 1,
            )

    def _announce(self) -> None:
        code = self._on_ready(self._pids())
        if code is not None:
            self.stop(code)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Attend to everything until a condition, asked for in a thread since it may take its time, holds."""
        holds = threading.Event()

        def watch() -> None:
            while not condition():
                if self._over.wait(0.05):
                    return
            holds.set()
            self._wake()

        self._in_thread(watch)
        if not self._attend(holds.is_set, START_SECONDS):
            self._fail(f"gave up after {START_SECONDS:g} s of waiting until {what}")

    def _in_thread(self, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001 (raised again by `run`, in its own thread)
                self._error = self._error or error
                self.stop(1)

        threading.Thread(target=guarded, daemon=True).start()

    def _server(self, server: local.Server) -> _Child:
        return _Child(server.name, lambda: local.start(server, subprocess.PIPE), server.stop_signal)

    def _part(self, part: Part, *, restarts: bool = True) -> _Child:
        def spawn() -> subprocess.Popen[bytes]:
            return local.launch(
                ("/bin/sh", "-c", f"exec {part.command}"),
                stop_signal=part.stop_signal,
                environment=self._environment,
                output=subprocess.PIPE,
            )

        return _Child(part.name, spawn, part.stop_signal, restarts)

    def _start(self, child: _Child) -> None:
        child.due = None
        child.process = child.spawn()
        child.pid = child.process.pid
        child.started = time.monotonic()
        assert child.process.stdout is not None  # noqa: S101 (it was asked for)
        os.set_blocking(child.process.stdout.fileno(), False)
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)
        self._changed()

    # Attending

    def _attend(self, until: Callable[[], bool], limit_seconds: float | None = None) -> bool:
        """Pump, notice ends, restart, until a condition holds; False when the limit passed before it did."""
        deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
        while True:
            if self._code is not None:
                raise _Stopped
            if until():
                return True
            if deadline is not None and time.monotonic() > deadline:
                return False
            self._turn()

    def _turn(self) -> None:
        """One round of 0.2 s at most, since only looking tells of an end without an end of output."""
        now = time.monotonic()
        soonest = min((child.due for child in self._all() if child.due is not None), default=now + 0.2)
        # A process closes its output just before it is seen to have ended; a daemon does so and goes on.
        closing = any(child.process and now - child.fell_silent < 1.0 for child in self._all())
        wait = min(0.01 if closing else 0.2, max(0.0, soonest - now))
        for key, _ in self._selector.select(wait):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            else:
                self._pump(key.data)
        for child in self._all():
            if child.process and local.ended(child.process):
                self._bury(child)
            elif child.due is not None and time.monotonic() >= child.due and not self._stopping:
                self._start(child)

    def _bury(self, child: _Child) -> None:
        """Clear up after a process that ended, whoever wished it, and plan its next life."""
        process = child.process
        assert process is not None  # noqa: S101 (the caller looked)
        lived = time.monotonic() - child.started
        # What it leaves, such as gunicorn's workers, would hold the port against the next one.
        local.kill_group(process)
        while self._pump(child):
            pass
        self._close(child)
        if child.unfinished:
            self._say(child, child.unfinished)
            child.unfinished = b""
        child.process = None
        child.returncode = process.returncode
        if self._stopping or not child.restarts:
            return
        delay = child.backoff(time.monotonic())
        reason = f"{child.name} ended after {lived:.1f} s, {local.exit_reason(process.returncode)}"
        if not self._serving and child.failures > START_ATTEMPTS:
            self._fail(f"{reason}: {START_ATTEMPTS} restarts didn't help")
        child.due = time.monotonic() + delay
        self._tell(f"{reason}: starting it again{f' in {delay:g} s' if delay else ''}")

    def _pids(self) -> Pids:
        return {child.name: child.pid for child in (*self._servers, *self._parts) if child.pid}

    def _changed(self) -> None:
        if self._serving:
            self._on_change(self._pids())

    def _all(self) -> Iterator[_Child]:
        yield from self._servers
        if self._release:
            yield self._release
        yield from self._parts

    # Stopping

    def _fail(self, reason: str, code: int = 1) -> None:
        self._tell(reason)
        self.stop(code)
        raise _Stopped

    def _stop_all(self) -> None:
        self._stopping = True
        self._over.set()
        try:
            self._end([*self._parts, *([self._release] if self._release else [])])
            self._end(self._servers)
        finally:
            self._kill_all()
            self._selector.close()
            wake, self._wake_write = self._wake_write, -1  # its number may soon be another file's
            os.close(wake)
            os.close(self._wake_read)

    def _end(self, children: Iterable[_Child]) -> None:
        """Stop these together: a signal to each main process, SIGKILL to the groups that take too long."""
        children = list(children)
        for child in children:
            child.due = None
            if child.process and not local.ended(child.process):
                child.process.send_signal(child.stop_signal)
        deadline = time.monotonic() + STOP_SECONDS
        while any(child.process for child in children):
            if time.monotonic() > deadline:
                for child in children:
                    if child.process:
                        self._tell(f"{child.name} didn't stop within {STOP_SECONDS:g} s: killed")
                        local.kill_group_now(child.process)
                deadline = float("inf")
            self._turn()

    def _kill_all(self) -> None:
        for child in self._all():
            if child.process:
                local.kill_group_now(child.process)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT, SIGTERM and SIGHUP stop everything cleanly; one more while stopping kills at once."""

        def handle(_: int, __: FrameType | None) -> None:
            if self._stopping:
                self._kill_all()
            self.stop(0)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wake(self) -> None:
        # A full pipe wakes just as well; a closed one has nobody left to wake.
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"!")

    # Output

    def _pump(self, child: _Child) -> bool:
        """Print what came; False when there is no more for now."""
        stream = child.process.stdout if child.process else None
        if stream is None or stream.closed:
            return False
        try:
            data = os.read(stream.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return False
        if not data:
            child.fell_silent = time.monotonic()
            self._close(child)
            return False
        *lines, child.unfinished = (child.unfinished + data).split(b"\n")
        if len(child.unfinished) > LONGEST_LINE:
            lines.append(child.unfinished)
            child.unfinished = b""
        for line in lines:
            self._say(child, line)
        return True

    def _close(self, child: _Child) -> None:
        stream = child.process.stdout if child.process else None
        if stream is not None and not stream.closed:
            self._selector.unregister(stream)
            stream.close()

    def _say(self, child: _Child, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        self._print(child.name, text)

    def _tell(self, text: str) -> None:
        self._print(OWN_NAME, text)

    def _print(self, name: str, text: str) -> None:
        prefix = f"{name:{self._width}} | "
        if self._coloured:
            names = [child.name for child in self._all()]
            colour = COLOURS[names.index(name) % len(COLOURS)] if name in names else "1"
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        # Lines are for whoever watches. When nobody does (the terminal is gone), the system goes on.
        with contextlib.suppress(OSError, ValueError):
            encoding = self._output.encoding or "utf-8"
            self._output.write(f"{prefix}{text}\n".encode(encoding, "backslashreplace").decode(encoding))
            self._output.flush()
