"""What the commands that pull from Clerk's API share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
import psycopg

from worker import db
from worker.api_budget import ApiBudget
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
    """A connection for the users, and Clerk's API, whose calls are booked over another one. Database errors come out
    as SyncError."""
    try:
        with connect(found.database_url) as connection, connect(found.database_url) as booking:
            budget = ApiBudget(booking, found.secret_key, found.api_share)
            api = ClerkApi(
                found.secret_key,
                found.api_url,
                budget.take,
                on_retry_after=budget.block,
                patience_seconds=patience,
            )
            with contextlib.closing(api):
                yield connection, api
    except psycopg.Error as error:
        raise SyncError(f"Postgres failed: {db.describe(error)}") from None
