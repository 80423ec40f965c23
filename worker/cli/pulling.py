"""What the commands that pull from Clerk's API share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
import psycopg

from worker import db
from worker.clerk import reach
from worker.clerk_api import ClerkApi
from worker.cli.options import connect
from worker.errors import SyncError
from worker.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


def patience_option(command: F) -> F:
    """`--patience SECONDS`: how long to try a call."""
    return click.option(
        "--patience",
        type=click.FloatRange(0, 86_400),
        default=120.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to try each call again while Clerk doesn't answer.",
    )(command)


@contextlib.contextmanager
def pulling(found: Settings, patience: float) -> Iterator[tuple[db.Connection, ClerkApi]]:
    """A connection for the users, and Clerk's API. Database errors come out as SyncError."""
    try:
        with reach(found, lambda: connect(found.database_url), patience=patience) as (connection, api):
            yield connection, api
    except psycopg.Error as error:
        raise SyncError(f"Postgres failed: {db.describe(error)}") from None
