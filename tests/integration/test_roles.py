"""The roles: each does its work and nothing else, an administrator can make them, and who lacks something is told."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.acceptance.system import ENVIRONMENT, PROGRAMS, Client
from tests.clerk import SECRET
from tests.events import changed, deleted, incoming
from tests.integration.test_status_page import Page, text_of
from tests.integration.test_webhooks import Receiver
from tests.pulling import command, environment, webhook
from tests.waiting import until
from webhooks.health import SILENT, Health
from worker import db, inbox, local, minutes, roles, runs, schema, sync, users
from worker.db import Connection
from worker.housekeeper import Housekeeper
from worker.policy import Copy, Policy
from worker.reconciler import Reconciler
from worker.roles import NOBODYS, READER, RECEIVER, ROLES, WORKER, WRITER
from worker.settings import Settings
from worker.standin import StandIn
from worker.supervise import find_procfile, parse_procfile
from worker.sweeper import Drainer

Connect = Callable[[], Connection]


def as_login(database_url: str, login: str) -> str:
    """The same database, for another login; the password is its name."""
    parts = conninfo_to_dict(database_url)
    return f"postgresql://{login}:{login}@{parts['host']}:{parts['port']}/{parts['dbname']}"


@pytest.fixture(scope="module")
def logins(servers: local.Urls) -> Iterator[dict[str, str]]:
    """A login that is a member of each role, and one that is of none: the addresses by the role's name."""
    with psycopg.connect(servers.database, autocommit=True) as connection:
        names = {role.name: f"login_{role.name}" for role in ROLES} | {"": "login_stranger"}
        for role, login in names.items():
            made = sql.SQL("create role {} login password {}").format(sql.Identifier(login), sql.Literal(login))
            connection.execute(made)
            if role:
                connection.execute(sql.SQL("grant {} to {}").format(sql.Identifier(role), sql.Identifier(login)))
        yield {role: as_login(servers.database, login) for role, login in names.items()}
        for login in names.values():
            connection.execute(sql.SQL("drop role {}").format(sql.Identifier(login)))


@pytest.fixture
def receiver_url(logins: dict[str, str], database_url: str) -> str:
    return logins[RECEIVER.name]


@pytest.fixture
def worker_url(logins: dict[str, str], database_url: str) -> str:
    return logins[WORKER.name]


# --- What each role can do


def test_the_receivers_role_records_replays_counts_and_is_ready(
    receiver_url: str, worker_url: str, connection: Connection
) -> None:
    with Receiver(receiver_url) as receiver, db.connect(worker_url, "worker") as worker:

        def deliver(body: bytes, svix_id: str) -> tuple[int, str]:
            answer = receiver.post(body, svix_id=svix_id)
            return answer.status_code, answer.json["status"] if answer.json else ""

        assert deliver(changed(private={"n": 1}), "msg_1") == (202, "accepted")
        assert deliver(changed(private={"n": 1}), "msg_1") == (200, "duplicate")
        assert sync.drain(worker, Policy()) == 1
        assert deliver(changed(private={"n": 1}), "msg_1") == (202, "accepted")
        assert deliver(deleted("user_b", 1_800_000_000_000), "msg_2") == (202, "accepted")
        assert sync.drain(worker, Policy()) == 2
        assert deliver(changed("user_b", private="not an object"), "msg_3") == (202, "dead")
        assert inbox.forget_deleted(worker) == 1
        bodies = "select svix_id, state, attempts, body is not null from clerk.webhook_events order by svix_id"
        assert connection.execute(bodies).fetchall() == [
            ("msg_1", "done", 1, False),
            ("msg_2", "done", 1, False),
            ("msg_3", "done", 0, False),
        ]
        runs.begin(connection, runs.FULL, "asked")
        assert receiver.client.get("/readyz").json == {"status": "ready", "problems": []}
        text = receiver.client.get("/metrics").text
        for line in (
            "clerk_sync_database_up 1.0",
            "clerk_sync_users 1.0",
            "clerk_sync_tombstones 1.0",
            'clerk_sync_run_running{kind="full"} 0.0',
        ):
            assert line in text.splitlines()


def test_the_receivers_role_shows_the_status_page_and_retries_from_it(
    receiver_url: str, connection: Connection
) -> None:
    inbox.record(
        connection, [incoming(changed("user_a", public={"a": "b" * 2000})), incoming(changed(private=[]), "msg_odd")]
    )
    sync.drain(connection, Policy())
    minutes.count(connection)
    run = runs.begin(connection, runs.FULL, "asked")
    run.state = "done"
    runs.save(connection, run)
    page = Page(receiver_url)
    answer = page.get()
    assert answer.status_code == 200
    for told in ("Fresh", "msg_odd", "user_a", "full", "budget, 1,200"):
        assert told in answer.text
    assert "didn" not in text_of(answer), "nothing is missing"
    assert page.retry(svix_id="msg_odd").status_code == 303
    assert inbox.counts(connection)["pending"] == 1


def test_the_workers_role_drains_gates_deletes_sets_aside_retries_and_prunes(
    worker_url: str, connection: Connection
) -> None:
    bodies = [changed("user_a", private={"n": 1}), changed("user_b"), deleted("user_b", 1_800_000_000_000), changed()]
    *events, last = [incoming(body, f"msg_{number}") for number, body in enumerate(bodies)]
    # Found to be unusable by the worker, after all.
    inbox.record(connection, [*events, dataclasses.replace(last, body=b"not JSON")])
    drainer = Drainer(lambda: db.connect(worker_url, "worker"), Policy())
    assert drainer.ring("sweep")
    Housekeeper(lambda: db.connect(worker_url, "housekeeper"), timedelta(days=7), Policy()).keep_house()
    drainer.close()
    with db.connect(worker_url, "worker") as worker:
        assert inbox.counts(worker) | {"oldest_pending_seconds": 0} == {
            "pending": 0,
            "dead": 1,
            "done": 3,
            "oldest_pending_seconds": 0,
            "users": 1,
            "tombstones": 1,
            "users_over_budget": 0,
            "users_content_missing": 0,
        }
        assert inbox.retry(worker, None) == ["msg_3"]
        assert inbox.prune(worker, timedelta(0)) == 3
        # A kind that came alone makes the worker weigh the row again.
        inbox.record(connection, [incoming(changed("user_a", 1_900_000_000_000, public={"a": "b" * 2000}))])
        assert sync.drain(worker, Policy()) == 2
        assert users.reweigh_all(worker, Policy(public=Copy.NEVER), drop=True).dropped == 1


COMMANDS: Final = (
    ("backfill",),
    ("reconcile", "--full"),
    ("reconcile", "--check"),
    ("reconcile",),
    ("refresh", "user_a", "user_gone"),
    ("refresh", "--missing"),
    ("budget", "report"),
    ("budget", "suggest"),
    ("budget", "check"),
    ("budget", "reweigh"),
    ("budget", "reweigh", "--drop"),
    ("events", "list"),
    ("events", "show", "msg_odd"),
    ("events", "retry", "msg_odd"),
    ("erase", "user_a"),
    ("status",),
)


def test_the_workers_role_will_do_for_every_command_of_an_operator(
    worker_url: str, redis_url: str, connection: Connection, clerk: StandIn, tmp_path: Path
) -> None:
    clerk.put({"id": "user_a", "private_metadata": {"n": 1}})
    clerk.put({"id": "user_b"})
    told = webhook(clerk, "user_a")
    odd = changed("user_odd", private="not an object")
    inbox.record(connection, [incoming(told), incoming(changed("user_gone", 5)), incoming(odd, "msg_odd")])
    sync.drain(connection, Policy())
    template = tmp_path / "claims.json"
    template.write_text('{"role": "{{user.public_metadata.role}}"}')
    env = environment(clerk, worker_url, CLERK_WEBHOOK_SIGNING_SECRET=SECRET, REDIS_URL=redis_url)
    for arguments in COMMANDS:
        more = (str(template),) if arguments == ("budget", "check") else ()
        ran = command(*arguments, *more, env=env)
        assert ran.exit_code == 0, f"{arguments}: {ran.output}"


def test_the_workers_role_reconciles_now_and_then_and_records_what_fails(
    worker_url: str, connection: Connection, clerk: StandIn
) -> None:
    clerk.put({"id": "user_a"})
    settings = Settings(
        database_url=worker_url, secret_key=clerk.secret_key, api_url=clerk.url, reconcile_seconds=86_400
    )
    Reconciler(settings)._look(rung=False)
    (last,) = runs.overview(connection)
    assert (last.state, last.last.counters["missing"]) == ("done", 1)
    with db.connect(worker_url, "worker") as worker:
        runs.record_failure(worker, runs.INCREMENTAL, "no answer")
        runs.record_failure(worker, runs.INCREMENTAL, "no answer")
    assert runs.overview(connection)[0].failed


@pytest.mark.timeout(60)
def test_every_process_of_the_procfile_runs_on_a_login_of_its_own(
    receiver_url: str, worker_url: str, logins: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    port = local.free_port()
    shared = {
        **ENVIRONMENT,
        "REDIS_URL": redis_url,
        "PORT": str(port),
        "WEB_CONCURRENCY": "1",
    }
    own = {
        "web": {"DATABASE_URL": receiver_url, "CLERK_WEBHOOK_SIGNING_SECRET": SECRET},
        "worker": {"DATABASE_URL": worker_url},
        "beat": {"DATABASE_URL": worker_url},
    }
    commands = parse_procfile(find_procfile().read_text("utf-8"))
    assert commands.keys() == own.keys() | {"release"}
    log = tmp_path / "output.log"
    processes = []
    try:
        with log.open("wb") as output:
            for name, environment in own.items():
                program, *arguments = shlex.split(commands[name])
                process = local.launch(
                    (str(PROGRAMS / program), *arguments),
                    stop_signal=signal.SIGTERM,
                    environment=shared | environment,
                    output=output,
                    folder=tmp_path,
                )
                processes.append(process)
        with contextlib.ExitStack() as opened:
            client = opened.enter_context(Client(f"http://127.0.0.1:{port}/webhooks/clerk", SECRET))

            def ready() -> bool:
                with contextlib.suppress(OSError):
                    return client.get("/readyz").status == 200
                return False

            until(ready, 30, "a receiver that is ready")
            assert client.deliver(changed("user_a", private={"n": 1})).outcome == (202, "accepted")
            reader = opened.enter_context(psycopg.connect(logins[READER.name], autocommit=True))
            read = "select user_id, private_metadata from clerk.user_metadata"
            assert until(lambda: reader.execute(read).fetchall(), 30, "the row") == [("user_a", {"n": 1})]
        assert [process.poll() for process in processes] == [None] * 3
        said = log.read_text("utf-8")
        assert "ERROR" not in said.upper().replace("ERRORS", ""), said
    finally:
        for process in processes:
            local.kill_group_now(process)
            process.wait()


# --- What each role can't do

NOT_THE_RECEIVERS: Final = (
    "select body from clerk.webhook_events",
    "select * from clerk.webhook_events",
    "select version from clerk.webhook_events",
    "update clerk.webhook_events set body = null returning body",
    "update clerk.webhook_events set state = 'pending' where body is not null",
    "insert into clerk.webhook_events (svix_id, sent_at) values ('msg_1', now()) returning body",
    "delete from clerk.webhook_events",
    "select version from clerk.users",
    "select public_fields from clerk.users",
    "update clerk.users set deleted_at = null",
    "delete from clerk.users",
    "select * from clerk.user_contents",
    "select * from clerk.user_metadata",
    "select * from clerk.api_budget",
    "insert into clerk.runs (kind, cause) values ('full', 'asked')",
    "insert into clerk.minutes (minute, acknowledged, applied, dead) values (now(), 0, 0, 0)",
    "update clerk.minutes set applied = 0",
    "update clerk.schema_version set version_num = '9999'",
    "select * from clerk.gate_deletions(array['user_a'], array[1::bigint])",
    "select clerk.book_api_call('key', 1)",
)
NOT_THE_WORKERS: Final = (
    "insert into clerk.webhook_events (svix_id, sent_at) values ('msg_1', now())",
    "update clerk.webhook_events set user_id = 'user_b'",
    "delete from clerk.users",
    "delete from clerk.api_budget",
    "update clerk.schema_version set version_num = '9999'",
    "select * from clerk.user_metadata",
)
NOT_THE_READERS: Final = (
    "select * from clerk.users",
    "select * from clerk.user_contents",
    "select * from clerk.webhook_events",
    "select * from clerk.runs",
    "select * from clerk.minutes",
    "select * from clerk.api_budget",
    "select * from clerk.schema_version",
    "select clerk.run_is_under_way()",
    "select * from clerk.gate_deletions(array['user_a'], array[1::bigint])",
    "select clerk.put_user('{}')",
    "select clerk.notify_changed('user_a', 1, true, '{}')",
)
NOT_THE_WRITERS: Final = (
    *(statement for statement in NOT_THE_READERS if "put_user" not in statement),
    "select * from clerk.user_metadata",
    "select * from clerk.policy",
    "select * from clerk.changes_since(null)",
    "select clerk.profile_bytes('{}')",
)
NOBODYS_STATEMENTS: Final = (
    "create table clerk.mine (a int)",
    "create function clerk.mine() returns int language sql as 'select 1'",
    "create table public.mine (a int)",
    "create schema mine",
    "create role mine",
    "truncate clerk.users",
    "truncate clerk.webhook_events",
    "alter table clerk.users disable trigger all",
    "drop table clerk.runs",
    "drop view clerk.user_metadata",
    "create temporary table mine (a clerk.clock)",
    "alter function clerk.run_is_under_way security definer",
    "select pg_read_file('postgresql.conf')",
    "copy clerk.runs to program 'true'",
)
REFUSED: Final = [
    *((RECEIVER, statement) for statement in NOT_THE_RECEIVERS),
    *((WORKER, statement) for statement in NOT_THE_WORKERS),
    *((READER, statement) for statement in NOT_THE_READERS),
    *((WRITER, statement) for statement in NOT_THE_WRITERS),
    *((role, statement) for role in ROLES for statement in NOBODYS_STATEMENTS),
]


@pytest.mark.parametrize(("role", "statement"), REFUSED, ids=lambda value: getattr(value, "name", None) or value)
def test_a_role_is_refused_what_is_not_its_work(db: psycopg.Connection[Any], role: roles.Role, statement: str) -> None:
    db.execute(sql.SQL("set role {}").format(sql.Identifier(role.name)))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.execute(statement.encode())


# What is granted on anything in our schema: to whom, on what, which privilege, on which column.
GRANTED: Final = """
with ours as (select oid from pg_namespace where nspname = 'clerk'),
lists (thing, part, owner, acl) as (
  select 'schema clerk', null, nspowner, nspacl from pg_namespace where nspname = 'clerk'
  union all
  select 'clerk.' || relname, null, relowner, relacl from pg_class
  where relnamespace in (select oid from ours) and relkind not in ('i', 'c')
  union all
  select 'clerk.' || relname, attname, relowner, attacl from pg_attribute join pg_class on pg_class.oid = attrelid
  where relnamespace in (select oid from ours)
  union all
  select 'function clerk.' || proname, null, proowner, coalesce(proacl, acldefault('f', proowner)) from pg_proc
  where pronamespace in (select oid from ours)
  union all
  select 'type clerk.' || typname, null, typowner, coalesce(typacl, acldefault('T', typowner)) from pg_type
  where typnamespace in (select oid from ours)
    and (typtype <> 'c' or typrelid in (select oid from pg_class where relkind = 'c')) and typcategory <> 'A'
)
select case when grantee = 0 then 'public' else grantee::regrole::text end, thing, lower(privilege_type), part
from lists, aclexplode(acl)
where grantee <> owner
"""

THINGS: Final = """
select 'clerk.' || relname from pg_class
where relnamespace = 'clerk'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f', 'S')
  and not exists (select from pg_depend where objid = pg_class.oid and deptype = 'i' and relkind = 'S')
union all
select 'function clerk.' || proname from pg_proc where pronamespace = 'clerk'::regnamespace
union all
select 'type clerk.' || typname from pg_type
where typnamespace = 'clerk'::regnamespace and typcategory <> 'A'
  and (typtype <> 'c' or typrelid in (select oid from pg_class where relkind = 'c'))
"""


def test_of_everything_in_the_schema_it_is_written_who_needs_it(connection: Connection) -> None:
    there = [thing for (thing,) in connection.execute(THINGS)]
    assert len(there) == len(set(there)), "a function with two signatures can't be granted by its name"
    decided = {thing for role in ROLES for thing in role.needs} - {"schema clerk", "database"} | NOBODYS
    assert set(there) - decided == set(), "say in worker/roles.py which role needs it, or that nobody does"
    assert decided - set(there) == set(), "that isn't there any more"


def test_each_role_has_what_is_written_and_no_more_and_everybody_has_nothing(connection: Connection) -> None:
    written = {
        (role.name, thing, privilege, column)
        for role in ROLES
        for thing, privileges in role.needs.items()
        for privilege, columns in privileges.items()
        for column in columns or (None,)
        if thing != "database"
    }
    assert set(connection.execute(GRANTED).fetchall()) == written


# --- Making them


@pytest.fixture
def empty_database(servers: local.Urls) -> Iterator[str]:
    """A database that was never migrated."""
    with psycopg.connect(servers.database, autocommit=True) as connection:
        connection.execute("create database empty")
        yield servers.database.rsplit("/", 1)[0] + "/empty"
        connection.execute("drop database empty with (force)")


@pytest.fixture
def without_roles(servers: local.Urls) -> Iterator[None]:
    """A server on which nobody has made the roles yet."""
    with psycopg.connect(servers.database, autocommit=True) as connection:
        for role in ROLES:
            connection.execute(f"alter role {role.name} rename to aside_{role.name}".encode())
        yield
        for role in ROLES:
            connection.execute(f"alter role aside_{role.name} rename to {role.name}".encode())


def test_an_administrator_makes_the_roles_where_the_migrating_role_may_not(
    without_roles: None, empty_database: str
) -> None:
    with psycopg.connect(empty_database, autocommit=True) as administrator:
        administrator.execute("create role modest login password 'modest'")
        administrator.execute("grant create on database empty to modest")
        administrator.execute("revoke temporary on database empty from public")
        try:
            ran = command("migrate", env={"DATABASE_URL": as_login(empty_database, "modest")})
            assert ran.exit_code == 0
            assert "clerk_receiver, clerk_worker, clerk_reader, clerk_writer" in ran.output
            printed = command("migrate", "--roles", env={"DATABASE_URL": None})
            assert printed.exit_code == 0
            for _ in range(2):
                administrator.execute(printed.output.encode())
                assert roles.incomplete(administrator) == []
            again = command("migrate", env={"DATABASE_URL": as_login(empty_database, "modest")})
            assert again.output.splitlines() == [f"The schema is at {db.SCHEMA_VERSION}: nothing to do."]
            administrator.execute("set role clerk_worker")
            administrator.execute("create temporary table mine (a int)")
            administrator.execute("reset role")
        finally:
            administrator.execute(
                "reset role; drop owned by modest, clerk_receiver, clerk_worker, clerk_reader, clerk_writer cascade"
            )
            administrator.execute(
                "drop role modest; drop role if exists clerk_receiver, clerk_worker, clerk_reader, clerk_writer"
            )


def test_whoever_migrates_grants_to_roles_that_are_there_without_making_any(empty_database: str) -> None:
    with psycopg.connect(empty_database, autocommit=True) as administrator:
        administrator.execute("create role modest login password 'modest'")
        administrator.execute("grant create on database empty to modest")
        administrator.execute("revoke temporary on database empty from public")
        try:
            schema.migrate(as_login(empty_database, "modest"))
            # What the owner of the database alone may give, and nothing besides.
            assert roles.incomplete(administrator) == ["clerk_worker"]
            assert roles.ask(administrator, WORKER, as_role=True).lacking == ["temporary on database"]
        finally:
            administrator.execute("drop owned by modest cascade")
            administrator.execute("drop role modest")


# --- Who lacks something is told


@pytest.fixture
def taken(connection: Connection) -> Iterator[Callable[[str], None]]:
    """Takes privileges away, until the end of the test."""

    def take(statement: str) -> None:
        connection.execute(statement.encode())

    yield take
    connection.execute(roles.grants().encode())


def health(database_url: str) -> Health:
    return Health(lambda: db.connect(database_url, "health"))


def reasons(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [vars(record)["reason"] for record in caplog.records if record.levelno >= logging.ERROR]


LACKS_UPDATE: Final = (
    "this database role lacks update on clerk.webhook_events: grant it {role}, which clerk-sync migrate makes "
    "(clerk-sync migrate --roles prints the SQL for an administrator)"
)


def test_a_receiver_without_a_privilege_is_not_ready_and_says_what_to_do(
    receiver_url: str, taken: Callable[[str], None], connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    taken("revoke update on clerk.webhook_events from clerk_receiver")
    asked = health(receiver_url)
    assert asked.problems() == [LACKS_UPDATE.format(role="clerk_receiver")]
    # Everything at once.
    connection.execute("update clerk.schema_version set version_num = '0001'")
    connection.execute("alter role login_clerk_receiver set default_transaction_read_only = on")
    try:
        assert [problem.split(":")[0] for problem in asked.problems()] == [
            f"the schema is at 0001, this code needs {db.SCHEMA_VERSION}",
            "this database role lacks update on clerk.webhook_events",
            "Postgres takes no writes here, since default_transaction_read_only is on",
        ]
    finally:
        connection.execute("alter role login_clerk_receiver reset default_transaction_read_only")
        connection.execute("update clerk.schema_version set version_num = %s", (db.SCHEMA_VERSION,))
    # Asked again and again, the log says it once.
    caplog.clear()
    for _ in range(3):
        asked.problems()
    assert len(reasons(caplog)) == 1


def test_a_login_without_any_role_is_told_all_that_it_lacks(logins: dict[str, str], database_url: str) -> None:
    schema_problem, privileges = health(logins[""]).problems()
    assert schema_problem == roles.HIDDEN
    for thing in (
        "usage on schema clerk",
        "insert on clerk.webhook_events",
        "execute on function clerk.run_is_under_way",
    ):
        assert thing in privileges
    refused = command("events", "list", env={"DATABASE_URL": logins[""], "DATABASE_URL_FILE": None})
    assert refused.exit_code == 1
    assert "grant it clerk_worker" in refused.output


def test_a_worker_without_a_privilege_drains_nothing_and_says_so_once(
    worker_url: str, taken: Callable[[str], None], connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    inbox.record(connection, [incoming(changed())])
    taken("revoke update on clerk.webhook_events from clerk_worker")
    drainer = Drainer(lambda: db.connect(worker_url, "worker"), Policy())
    for _ in range(3):
        assert not drainer.ring("sweep")
    assert reasons(caplog) == [LACKS_UPDATE.format(role="clerk_worker")]
    connection.execute("revoke update on clerk.users from clerk_worker")
    assert not drainer.ring("sweep")
    assert len(reasons(caplog)) == 2
    connection.execute(roles.grants().encode())
    assert drainer.ring("sweep")
    drainer.close()
    assert inbox.counts(connection)["done"] == 1


def test_a_periodic_reconcile_without_a_privilege_is_not_begun(
    worker_url: str, taken: Callable[[str], None], clerk: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    taken("revoke temporary on database clerk from public")
    try:
        settings = Settings(
            database_url=worker_url, secret_key=clerk.secret_key, api_url=clerk.url, reconcile_seconds=9
        )
        Reconciler(settings)._look(rung=True)
        (reason,) = reasons(caplog)
        assert reason.startswith("this database role lacks temporary on database")
        assert clerk.calls == []
    finally:
        taken("grant temporary on database clerk to public")


def test_a_standby_is_not_ready(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "ask", lambda *_: roles.Asked(True, True, True, []))
    assert roles.problems(connection, WORKER) == [roles.STANDBY]


def test_a_caller_is_not_told_where_postgres_is_but_the_log_is(caplog: pytest.LogCaptureFixture) -> None:
    asked = health("postgresql://secretive@127.0.0.1:1/hidden")
    assert asked.problems() == asked.problems() == [SILENT]
    (reason,) = reasons(caplog)
    assert "127.0.0.1" in reason
