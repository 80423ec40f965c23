"""Migrations: twice, from several connections at once, over a table in use, and what the roles may do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from worker import db, local, schema


@pytest.fixture
def empty_database(servers: local.Urls) -> Iterator[str]:
    """A database that was never migrated."""
    with psycopg.connect(servers.database, autocommit=True) as connection:
        connection.execute("create database empty")
        yield servers.database.rsplit("/", 1)[0] + "/empty"
        connection.execute("drop database empty with (force)")


def test_the_newest_step_is_the_one_that_the_code_was_written_for() -> None:
    assert schema.newest() == db.SCHEMA_VERSION


def test_the_first_run_makes_the_schema_and_the_second_does_nothing(empty_database: str) -> None:
    assert schema.migrate(empty_database) == (None, db.SCHEMA_VERSION)
    assert schema.migrate(empty_database) == (db.SCHEMA_VERSION, db.SCHEMA_VERSION)
    with psycopg.connect(empty_database) as connection:
        assert db.schema_version(connection) == db.SCHEMA_VERSION


def test_several_hosts_may_migrate_at_once(empty_database: str) -> None:
    command = [sys.executable, "-m", "worker.cli", "migrate"]
    env = os.environ | {"DATABASE_URL": empty_database}
    hosts = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [host.communicate(timeout=60)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0] * 3
    assert sum("went from nothing to" in line for line in said) == 1
    assert sum("nothing to do" in line for line in said) == 2


def test_a_step_that_fails_leaves_nothing_behind(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("create schema clerk create table users (nonsense int)")
        with pytest.raises(Exception, match="already exists"):
            schema.migrate(empty_database)
        tables = "select tablename from pg_tables where schemaname = 'clerk'"
        assert connection.execute(tables).fetchall() == [("users",)]


def test_the_sql_can_be_printed_for_review_and_run_by_hand(empty_database: str) -> None:
    text = io.StringIO()
    schema.print_sql(text)
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(text.getvalue())
        assert db.schema_version(connection) == db.SCHEMA_VERSION
    assert schema.migrate(empty_database) == (db.SCHEMA_VERSION, db.SCHEMA_VERSION)


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "run clerk-sync migrate"), ("0000", "run clerk-sync migrate"), ("9999", "newer than this code")],
)
def test_a_schema_of_another_version_is_a_problem_that_says_what_to_do(version: str | None, words: str) -> None:
    assert words in str(db.schema_problem(version))
    assert db.schema_problem(db.SCHEMA_VERSION) is None


def test_the_reader_sees_the_view_and_nothing_else(db: psycopg.Connection[Any]) -> None:
    db.execute("set role clerk_reader")
    assert db.execute("select count(*) from clerk.user_metadata").fetchone() == (0,)
    for statement in (
        "select * from clerk.users",
        "select * from clerk.user_contents",
        "select * from clerk.webhook_events",
        "update clerk.users set version = 0",
        "select * from clerk.gate_deletions(array['user_a'], array[1::bigint])",
        "create table clerk.mine (a int)",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
            db.execute(statement)


def test_a_role_that_may_not_create_roles_can_migrate(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("drop role if exists modest")
        connection.execute("create role modest login password 'modest'")
        connection.execute("grant create on database empty to modest")
        modest = empty_database.replace(str(connection.info.user) + ":", "modest:", 1)
        modest = modest.replace(f":{connection.info.password}@", ":modest@", 1)
        try:
            assert schema.migrate(modest)[1] == db.SCHEMA_VERSION
        finally:
            connection.execute("drop owned by modest cascade")
            connection.execute("drop role modest")


def test_hot_statements_use_their_indexes(connect: Callable[[], db.Connection]) -> None:
    connection = connect()
    connection.execute("set enable_seqscan = off")
    connection.execute("set enable_bitmapscan = off")
    read = "explain select * from clerk.user_metadata where user_id = 'user_a'"
    plan = "\n".join(line for (line,) in connection.execute(read))
    assert "users_pkey" in plan
    assert "user_contents_pkey" in plan
    claim = "explain select svix_id from clerk.webhook_events where state = 'pending' order by received_at limit 500"
    plan = "\n".join(line for (line,) in connection.execute(claim))
    assert "webhook_events_pending" in plan
    assert "Sort" not in plan


def test_conninfo_of_the_product_is_accepted_by_libpq(database_url: str) -> None:
    with db.connect(database_url, "test") as connection:
        assert connection.execute("show application_name").fetchone() == ("clerk-sync test",)
        assert connection.execute("show statement_timeout").fetchone() == ("30s",)
        assert connection.execute("show synchronous_commit").fetchone() == ("on",)
    assert make_conninfo(database_url)
