"""Real servers for the tests that need them: started once, migrated once, emptied after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from worker import db as database
from worker import local, schema

# Not truncate, which makes every file of these tables and of their indexes anew: twenty times slower for a few rows.
EMPTY = """
delete from clerk.users;
delete from clerk.user_contents;
delete from clerk.webhook_events;
delete from clerk.api_budget;
delete from clerk.runs;
delete from clerk.minutes;
delete from clerk.changes;
update clerk.changes_pruned set until = '0'
"""


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Urls]:
    """Embedded servers that live as long as the session; Postgres is migrated."""
    with local.embedded() as urls:
        schema.migrate(urls.database)
        yield urls


@pytest.fixture
def database_url(servers: local.Urls) -> Iterator[str]:
    """A migrated database for tests that commit; it is emptied afterwards."""
    yield servers.database
    with psycopg.connect(servers.database, autocommit=True) as connection:
        connection.execute(EMPTY)


@pytest.fixture
def redis_url(servers: local.Urls) -> str:
    """The broker."""
    return servers.redis


@pytest.fixture
def db(servers: local.Urls) -> Iterator[psycopg.Connection[Any]]:
    """A connection whose one transaction is rolled back after the test."""
    with psycopg.connect(servers.database) as connection:
        yield connection
        connection.rollback()


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[[], database.Connection]]:
    """Opens connections as the product does; they are closed after the test, before the tables are emptied."""
    opened: list[database.Connection] = []

    def open_one() -> database.Connection:
        opened.append(database.connect(database_url, "test"))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


@pytest.fixture(scope="session")
def data() -> Path:
    """Event bodies: recorded from Clerk, and from its documentation."""
    return Path(__file__).parent / "data"
