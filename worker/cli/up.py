"""`clerk-sync up`: the whole system in the foreground, on servers of its own where none are named.

The Procfile says what runs, `worker.supervise` how it is kept alive. `demo` calls `serve` too.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from worker import local
from worker.errors import ConfigError
from worker.settings import Settings
from worker.supervise import Part, Supervisor, find_procfile, parse_procfile

F = TypeVar("F", bound=Callable[..., Any])

RELEASE = "release"
SIGNING_SECRET = "CLERK_WEBHOOK_SIGNING_SECRET"  # noqa: S105 (a name)
STATUS_TOKEN = "STATUS_TOKEN"  # noqa: S105 (a name)
ENDPOINT = "/webhooks/clerk"


@dataclass(frozen=True, slots=True)
class Info:
    """Where a running system is: what `--info` writes."""

    url: str
    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    signing_secret: str = field(repr=False)
    pids: Mapping[str, int]


def port_option(command: F) -> F:
    """`--port N`: where the receiver listens."""
    return click.option(
        "--port",
        type=click.IntRange(0, 65_535),
        envvar="PORT",
        default=8000,
        show_default=True,
        show_envvar=True,
        help="Where the receiver listens; 0 takes any free port.",
    )(command)


def data_dir_option(command: F) -> F:
    """`--data-dir DIR`: what is kept for the next start."""
    return click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path(".clerk-sync"),
        show_default=True,
        help="Keeps the embedded servers' data, ports and passwords for the next start.",
    )(command)


@click.command()
@port_option
@data_dir_option
@click.option(
    "--info",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Once everything is ready, write its addresses, passwords included, to this file (JSON, mode 0600).",
)
def up(port: int, data_dir: Path, info: Path | None) -> None:
    """Run the whole system here, in the foreground, until Ctrl-C.

    Starts a real Postgres where DATABASE_URL is not set and a Redis-compatible server where REDIS_URL is not
    set; makes a signing secret where Postgres is its own and none is set. Whatever dies is started again.
    """

    def announce_it(running: Info) -> None:
        announce(running, data_dir, info)

    sys.exit(serve(port, data_dir, info, announce_it))


def announce(running: Info, data_dir: Path, info: Path | None) -> None:
    """Print where a running system is, without its secrets."""
    click.echo(f"\nclerk-sync is ready.\n  endpoint      {running.url}\n  data          {data_dir.absolute()}")
    if _is_set(os.environ, STATUS_TOKEN):
        click.echo(f"  status page   {running.url.removesuffix(ENDPOINT)}/status (the password is STATUS_TOKEN)")
    if info:
        click.echo(f"  addresses     {info.absolute()} (with passwords and the signing secret)")
    else:
        click.echo("  addresses     add --info FILE to have them, with passwords and the signing secret, in a file")
    click.echo("Stop it with Ctrl-C.\n")


def serve(
    port: int,
    data_dir: Path,
    info: Path | None,
    on_ready: Callable[[Info], int | None] | None = None,
    *,
    overrides: Mapping[str, str] = {},
) -> int:
    """Run the whole system until a signal, or until `on_ready` gives an exit code; give the exit code.

    `on_ready` runs in a thread of its own once everything is ready; the parts' environment has `overrides` in
    it, whatever ours says. To be called in the main thread.
    ConfigError where variables, the port, the folder or the Procfile don't allow a start.
    """
    data_dir = data_dir.absolute()
    info = info.absolute() if info else None
    if info and info.parent != data_dir and not info.parent.is_dir():
        raise ConfigError(f"--info {info}: there is no folder {info.parent}")
    procfile = find_procfile()
    commands = parse_procfile(procfile.read_text(encoding="utf-8"))
    with local.lock(data_dir):
        try:
            return _serve(commands, port, data_dir, info, on_ready, overrides=overrides)
        except PermissionError as error:
            raise ConfigError(f"{error.filename or data_dir} can't be used: {error.strerror}") from error


def _serve(
    commands: dict[str, str],
    port: int,
    data_dir: Path,
    info: Path | None,
    on_ready: Callable[[Info], int | None] | None,
    *,
    overrides: Mapping[str, str],
) -> int:
    (data_dir / ".gitignore").write_text("*\n", encoding="utf-8")
    leftovers = data_dir / "pids"
    _end_leftovers(leftovers, commands)
    port = _usable(port)
    metrics = data_dir / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)  # counts of processes that are no more
    metrics.mkdir()
    environment = {**os.environ, **overrides, "PORT": str(port), "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    # On this machine only, unless the caller says otherwise in the same way.
    environment["GUNICORN_CMD_ARGS"] = f"--bind {local.HOST}:{port} {environment.get('GUNICORN_CMD_ARGS', '')}".strip()
    servers = _complete(environment, data_dir)
    settings = Settings.from_env(environment, need=("signing_secrets", "database_url", "redis_url"))

    def described(pids: Mapping[str, int]) -> Info:
        return Info(
            url=f"http://{local.HOST}:{port}{ENDPOINT}",
            database_url=settings.database_url,
            redis_url=settings.redis_url,
            signing_secret=settings.signing_secrets[0],
            pids=pids,
        )

    def changed(pids: Mapping[str, int]) -> None:
        local.write_private(leftovers, json.dumps(pids))
        if info:
            local.write_private(info, json.dumps(asdict(described(pids)), indent=2) + "\n")

    release = commands.get(RELEASE)
    supervisor = Supervisor(
        [Part(name, command) for name, command in commands.items() if name != RELEASE],
        servers,
        Part(RELEASE, release) if release else None,
        environment=environment,
        ready=lambda: _is_ready(port),
        on_ready=lambda pids: on_ready(described(pids)) if on_ready else None,
        on_change=changed,
    )
    if info:
        info.unlink(missing_ok=True)
    try:
        return supervisor.run()
    finally:
        leftovers.unlink(missing_ok=True)
        if info:
            info.unlink(missing_ok=True)


def _complete(environment: dict[str, str], data_dir: Path) -> list[local.Server]:
    """Add to the environment what it leaves to us, and give the servers that this takes."""
    own_database = not _is_set(environment, "DATABASE_URL")
    own_broker = not _is_set(environment, "REDIS_URL")
    secret_is_set = _is_set(environment, SIGNING_SECRET) or _is_set(environment, "CLERK_WEBHOOK_SECRET")
    if own_database and not secret_is_set:
        environment[SIGNING_SECRET] = local.kept_secret(data_dir / "signing-secret", _signing_secret)
    # Say all that is wrong before anything is made.
    Settings.from_env(environment, need=("signing_secrets",))
    servers = []
    if own_database:
        servers.append(local.postgres(data_dir))
        environment["DATABASE_URL"] = servers[-1].url
    if own_broker:
        servers.append(local.redis(data_dir))
        environment["REDIS_URL"] = servers[-1].url
    return servers


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return any(environment.get(key, "").strip() for key in (name, f"{name}_FILE"))


def _signing_secret() -> str:
    return "whsec_" + base64.b64encode(os.urandom(24)).decode("ascii")


def _usable(port: int) -> int:
    """Give the port back, or a free one for 0. ConfigError where another program has it on any address."""
    if port == 0:
        return local.free_port()
    if not (local.port_is_free(port) and local.port_is_free(port, "0.0.0.0")):  # noqa: S104 (asked, not used)
        raise ConfigError(f"port {port} is taken by another program: stop that one, or choose another with --port")
    return port


def _end_leftovers(record: Path, commands: Mapping[str, str]) -> None:
    """Stop the parts that an earlier `up` left behind when it was killed: they would keep the port."""
    try:
        pids = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    programs = str(Path(sys.executable).parent)
    for name, command in commands.items():
        if pid := pids.get(name):
            local.end_leftover(pid, (programs, *shlex.split(command)), signal.SIGTERM)


def _is_ready(port: int) -> bool:
    """Ask the receiver's /readyz, by hand: an HTTP library would weigh more than the rest of this process."""
    try:
        with socket.create_connection((local.HOST, port), timeout=5) as connection:
            connection.sendall(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = connection.recv(64)
    except OSError:
        return False
    return answer.split(b" ")[1:2] == [b"200"]
