"""What several commands take: where the running system is, and how they print."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import psycopg

from worker import db, roles
from worker.errors import ConfigError, SyncError
from worker.settings import Need, Settings

F = TypeVar("F", bound=Callable[..., Any])


def info_option(command: F) -> F:
    """`--info FILE`: take the addresses of a system that `clerk-sync up --info FILE` started."""
    return click.option(
        "--info",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Where `clerk-sync up --info FILE` wrote its addresses, instead of the environment.",
    )(command)


def json_option(command: F) -> F:
    """`--json`: print for a program."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program.")(command)


def read_info(path: Path | None) -> dict[str, Any]:
    """The content of an --info file; empty where none was given. Raises ConfigError."""
    if path is None:
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--info {path} can't be read ({type(error).__name__}): is `clerk-sync up --info {path}` running?"
        ) from None
    if not isinstance(info, dict):
        raise ConfigError(f"--info {path} is not what `clerk-sync up` writes")
    return info


def settings(info: Path | None, *need: Need, claims: bool = True) -> Settings:
    """The settings from the environment, with what an --info file says in their place. Raises ConfigError.

    Without `claims`, a claims template that is wrong doesn't matter.
    """
    found = read_info(info)
    env: Mapping[str, str] = os.environ
    if found:
        names = {
            "DATABASE_URL": "database_url",
            "REDIS_URL": "redis_url",
            "CLERK_WEBHOOK_SIGNING_SECRET": "signing_secret",
        }
        env = {k: v for k, v in os.environ.items() if k.removesuffix("_FILE") not in names}
        env |= {name: str(found.get(key) or "") for name, key in names.items()}
    return Settings.from_env(env, need=need, claims=claims)


def connect(database_url: str) -> db.Connection:
    """Open the database for a command, which does what workers may do. Raises SyncError with the reason.

    A standby will do for a command that only reads.
    """
    try:
        connection = db.connect(database_url, "cli")
        found = roles.look(connection, roles.WORKER)
    except psycopg.Error as error:
        raise SyncError(f"Postgres doesn't answer: {db.describe(error)}") from None
    problems = [problem for name in (roles.SCHEMA, roles.PRIVILEGES) if (problem := found[name])]
    if problems:
        connection.close()
        raise SyncError("; ".join(problems))
    return connection


@contextlib.contextmanager
def connected(database_url: str) -> Iterator[db.Connection]:
    """The same for the length of a block, whose database errors come out as SyncError."""
    try:
        with connect(database_url) as connection:
            yield connection
    except psycopg.Error as error:
        raise SyncError(f"Postgres failed: {db.describe(error)}") from None


def to_json(value: Any) -> str:
    """Indented JSON; times in ISO 8601."""

    def default(item: object) -> str:
        if isinstance(item, datetime):
            return item.isoformat()
        raise TypeError(type(item).__name__)

    return json.dumps(value, default=default, indent=2)
