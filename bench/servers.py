"""Postgres and the Redis-compatible server that everything in one run is measured on: durable, and as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis
from psycopg import sql

from worker import local

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class Servers:
    """Where they answer, and what processes they are."""

    folder: Path
    postgres_url: str = field(repr=False)
    redis_root: str = field(repr=False)
    signing_secret: str = field(repr=False)
    pids: tuple[int, ...]

    def database_url(self, name: str) -> str:
        """One database's address."""
        return _with_path(self.postgres_url, name)

    def redis_url(self, number: int) -> str:
        """The address of one of Redis's databases."""
        return _with_path(self.redis_root, str(number))

    def connect(self, name: str) -> Connection:
        """A connection in autocommit."""
        return psycopg.connect(self.database_url(name), autocommit=True)

    def redis(self, number: int) -> redis.Redis:
        """A client of one of Redis's databases."""
        return redis.Redis.from_url(self.redis_url(number))

    def make_database(self, name: str, template: str = "template0") -> None:
        """Make a database, if need be as a copy of another one, which nobody may be connected to."""
        # file_copy: without it every page of a copy goes through the log.
        made = sql.SQL("create database {} template {} strategy file_copy")
        with self.connect("postgres") as connection:
            connection.execute(made.format(sql.Identifier(name), sql.Identifier(template)))
            connection.execute("checkpoint")


def _with_path(url: str, path: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{path}"))


@contextlib.contextmanager
def running(parent: Path | None = None) -> Iterator[Servers]:
    """Run both for the length of a `with` block, in a new folder that is deleted at its end."""
    folder = Path(tempfile.mkdtemp(prefix="clerk-sync-bench-", dir=parent))
    folder.chmod(0o711)  # the account that Postgres runs as has to pass
    try:
        with local.lock(folder), contextlib.ExitStack() as stack:
            postgres = local.postgres(folder)
            # When a row became visible is asked of its commit.
            postgres = dataclasses.replace(postgres, command=(*postgres.command, "-c", "track_commit_timestamp=on"))
            broker = local.redis(folder)
            pids = tuple(stack.enter_context(_started(server, folder)) for server in (postgres, broker))
            yield Servers(
                folder=folder,
                postgres_url=postgres.url,
                redis_root=broker.url,
                signing_secret="whsec_" + b64encode(secrets.token_bytes(24)).decode(),
                pids=pids,
            )
    finally:
        with contextlib.suppress(FileNotFoundError):
            local.discard(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _started(server: local.Server, folder: Path) -> Iterator[int]:
    log = folder / f"{server.name}.log"
    with log.open("wb") as output:
        process = local.start(server, output)
    try:
        local.wait_ready(server, process, local.START_SECONDS, lambda: log.read_text("utf-8", "replace")[-2000:])
        yield process.pid
    finally:
        local.stop(process, server)
