"""docs/applications.md, executed: every block of code, as it stands there, against the real database."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import alembic.command
import psycopg
import pytest
import sqlalchemy

from bench import population
from tests import nodejs
from tests.events import changed, deleted
from tests.pulling import deliver
from tests.snippets import CUT, FENCE, HEAR, LISTENER, PAGE, Reader, as_login, blocks, files
from tests.waiting import until
from worker import local, schema
from worker.db import Connection
from worker.policy import Policy
from worker.standin import StandIn
from worker.users import record_policy

VERSION: Final = 1_700_000_000_000
LARGE: Final = 9007199254740993
BIG: Final = {"role": "admin", "text": "x" * 1300}
"""Public metadata that no token carries."""

DECLARED: Final[set[str]] = set()

node = pytest.mark.skipif(not nodejs.INSTALLED, reason=nodejs.WHY_NOT)


def runs(*names: str) -> pytest.MarkDecorator:
    """Says which files of the page a test runs."""
    DECLARED.update(names)
    return pytest.mark.snippets(*names)


# --- The database of an application


@pytest.fixture(scope="module")
def login(servers: local.Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The application's own login, made as the page has it; its address."""
    with psycopg.connect(servers.database, autocommit=True) as connection:
        Reader(tmp_path_factory.mktemp("login")).sql("login.sql", connection)
        yield as_login(servers.database, "my_app")
        connection.execute("drop role my_app")


@pytest.fixture
def users(connection: Connection) -> Connection:
    """Ada, whose public metadata is too large for her token; Bob, whose isn't; the connection that made them."""
    kept = {"plan": "pro", "credits": LARGE}
    bodies = [
        changed("user_ada", VERSION, private=kept, public=BIG),
        changed("user_bob", VERSION, private={"plan": "team"}, public={"role": "member"}),
    ]
    deliver(connection, *bodies)
    return connection


@pytest.fixture
def reader(
    request: pytest.FixtureRequest, tmp_path: Path, login: str, users: Connection, clerk: StandIn
) -> Iterator[Reader]:
    """A developer who follows the page. What a test says that it runs, it must run, and nothing else."""
    found = Reader(tmp_path, DATABASE_URL=login, CLERK_SECRET_KEY=clerk.secret_key, CLERK_API_URL=clerk.url)
    yield found
    marker = request.node.get_closest_marker("snippets")
    assert marker
    assert found.ran == set(marker.args)


# --- The page itself


def test_every_block_of_code_is_run() -> None:
    assert set(files()) == DECLARED


def test_what_isnt_run_is_an_example_of_a_notice_or_installs_what_the_tests_use() -> None:
    installs = [text for language, text in blocks() if language == "sh" and text not in files().values()]
    packages = json.loads((nodejs.FOLDER / "package.json").read_text("utf-8"))["dependencies"]
    assert len(installs) == 1
    for line in installs[0].splitlines():
        match line.split(" ", 2):
            case ["npm", "install", name]:
                assert name in packages
            case ["pip", "install", wanted]:
                name, extras = re.findall(r"[a-z]+", wanted)[0], re.findall(r"[a-z]+", wanted)[1:]
                assert {name, *(f"{name}-{extra}" for extra in extras)} <= {
                    distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()
                }
            case _:
                pytest.fail(line)
    assert {language for language, _ in blocks()} == {"sql", "python", "js", "sh", "json"}


def test_every_link_leads_to_a_heading_that_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", PAGE.read_text("utf-8"))
    assert len(links) > 20
    for path, anchor in links:
        text = FENCE.sub("", (PAGE.parent / path if path else PAGE).read_text("utf-8"))
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, f"{path}#{anchor}"


# --- Reading


@runs("login.sql")
def test_the_login_reads_the_view_and_no_table(reader: Reader, login: str) -> None:
    reader.ran.add("login.sql")  # by the fixture that every test here stands on
    with psycopg.connect(login, autocommit=True) as connection:
        assert connection.execute("select count(*) from clerk.user_metadata").fetchone() == (2,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select from clerk.user_contents")


@runs("demo.sh")
def test_the_demos_address_is_found_where_the_page_says(reader: Reader) -> None:
    (reader.folder / ".venv/bin").mkdir(parents=True)
    (reader.folder / ".venv/bin/python").symlink_to(sys.executable)
    (reader.folder / ".clerk-sync").mkdir()
    (reader.folder / ".clerk-sync/info.json").write_text('{"database_url": "postgresql://demo"}')
    assert reader.shell("demo.sh", 'echo "$DATABASE_URL"') == "postgresql://demo\n"


@runs("look-in-python.sh")
def test_a_first_look_in_python(reader: Reader) -> None:
    assert (
        reader.shell("look-in-python.sh", "") == f"{ {'private': {'plan': 'pro', 'credits': LARGE}, 'public': BIG} }\n"
    )


@node
@runs("look-in-node.sh")
def test_a_first_look_in_node(reader: Reader) -> None:
    reader.install()
    assert "plan: 'pro'" in reader.shell("look-in-node.sh", "")


@node
@runs("before.mjs", "metadata.mjs")
def test_one_function_replaces_another_in_node(reader: Reader, clerk: StandIn) -> None:
    kept = {"plan": "pro", "credits": LARGE}
    clerk.put({"id": "user_ada", "updated_at": VERSION, "private_metadata": kept, "public_metadata": BIG})
    asked = (
        """return [await page.metadata("user_ada"), await page.metadata("user_none").catch((error) => error.status)]"""
    )
    before, was_none = reader.run("before.mjs", asked)
    after, none = reader.run("metadata.mjs", asked)
    assert after == before == {"private": {"plan": "pro", "credits": LARGE - 1}, "public": BIG}
    assert (was_none, none) == (404, None)


@runs("metadata.py")
def test_psycopg_reads_exactly_what_was_sent(reader: Reader) -> None:
    found = reader.run("metadata.py", "return [page.metadata(f'user_{name}') for name in ('ada', 'bob', 'none')]")
    assert found == [
        {"private": {"plan": "pro", "credits": LARGE}, "public": BIG},
        {"private": {"plan": "team"}, "public": None},
        None,
    ]


@runs("query.sql")
def test_sql_reads_one_asks_for_many_and_joins(reader: Reader, users: Connection) -> None:
    users.execute("create temp table orders (id int, user_id text)")
    users.execute("insert into orders values (1, 'user_ada'), (2, 'user_not_there_yet')")
    one, many, joined = reader.sql("query.sql", users)
    assert one == [("pro", LARGE)]
    assert many == [("user_ada",)]
    assert joined == [(1, "pro"), (2, None)]
    users.execute("drop table orders")


@runs("typed.py")
def test_a_model_checks_the_row(reader: Reader, users: Connection) -> None:
    code = "found = page.user_metadata('user_ada'); return [found.model_dump(), type(found.private_metadata).__name__]"
    row, kind = reader.run("typed.py", code)
    assert (row["private_metadata"], kind) == ({"plan": "pro", "credits": LARGE}, "Private")
    assert row["public_metadata"] == BIG
    assert row["updated_at"].startswith("2023-11-14 22:13:20+00:00")
    assert reader.run("typed.py", "return page.user_metadata('user_none')") is None
    deliver(users, changed("user_bob", VERSION + 1, private={"plan": "enterprise"}))
    refused = """
        try:
            page.user_metadata("user_bob")
        except ValueError as error:
            return type(error).__name__
    """
    assert reader.run("typed.py", refused) == "ValidationError"


@runs("orm.py")
def test_sqlalchemy_maps_the_view_and_makes_no_table_of_it(reader: Reader) -> None:
    code = """
        found = page.metadata("user_ada")
        assert page.metadata("user_none") is None
        class Own(page.DeclarativeBase): ...
        assert not Own.metadata.tables, "what the application makes tables of"
        return [found.private_metadata, found.public_metadata, str(found.updated_at), page.on_plan("pro")]
    """
    private, public, updated_at, on_plan = reader.run("orm.py", code)
    assert (private, public) == ({"plan": "pro", "credits": LARGE}, BIG)
    assert updated_at == "2023-11-14 22:13:20+00:00"
    assert on_plan == ["user_ada"]


DJANGO = """
import os
import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict
to = conninfo_to_dict(os.environ["DATABASE_URL"])
database = {
    "ENGINE": "django.db.backends.postgresql", "NAME": to["dbname"], "USER": to["user"], "PASSWORD": to["password"],
    "HOST": to["host"], "PORT": to["port"],
}
settings.configure(INSTALLED_APPS=["members"], DATABASES={"default": database}, USE_TZ=True)
django.setup()
"""


@runs("members/models.py", "members/queries.py")
def test_django_reads_the_view_and_makes_no_table_of_it(reader: Reader) -> None:
    (reader.folder / "django_project.py").write_text(DJANGO, "utf-8")
    code = """
        found = page.metadata("user_ada")
        assert page.metadata("user_none") is None
        assert "-> plan)" in str(page.UserMetadata.objects.filter(private_metadata__plan="pro").query)
        return [found.private_metadata, found.public_metadata, found.updated_at, page.on_plan("pro")]
    """
    private, public, updated_at, on_plan = reader.run("members/queries.py", code)
    assert (private, public) == ({"plan": "pro", "credits": LARGE}, BIG)
    assert updated_at == "2023-11-14 22:13:20+00:00"
    assert on_plan == ["user_ada"]
    code = """
        import io
        from django.core.management import call_command
        said = io.StringIO()
        call_command("makemigrations", "members", stdout=said, no_color=True)
        call_command("sqlmigrate", "members", "0001", stdout=said, no_color=True)
        return said.getvalue()
    """
    said = reader.run("members/models.py", code)
    assert "UserMetadata" in said
    assert "create table" not in said.lower()


@node
@runs("drizzle.mjs")
def test_drizzle_reads_the_view(reader: Reader) -> None:
    code = """
        return [await page.metadata("user_ada"), await page.metadata("user_none"), await page.onPlan("pro")]
    """
    found, none, on_plan = reader.run("drizzle.mjs", code)
    assert (found["privateMetadata"], found["publicMetadata"]) == ({"plan": "pro", "credits": LARGE - 1}, BIG)
    assert found["updatedAt"] == "2023-11-14T22:13:20.000Z"
    assert none is None
    assert on_plan == [{"userId": "user_ada"}]


CLAIMS: Final = [
    {"sub": f"user_{name}", "role": "of the token", "public_metadata": {"role": "of the token"}}
    for name in ("ada", "bob", "none")
]
FROM_BOTH: Final = [BIG, {"role": "of the token"}, None]


@runs("token_first.py")
def test_python_takes_from_the_token_what_the_view_leaves_out(reader: Reader) -> None:
    code = f"return [[page.public_metadata(claims), page.role(claims)] for claims in {CLAIMS}]"
    assert reader.run("token_first.py", code) == [[found, "of the token"] for found in FROM_BOTH]


@node
@runs("token-first.mjs")
def test_node_takes_from_the_token_what_the_view_leaves_out(reader: Reader) -> None:
    code = f"""
        const of = async (claims) => [await page.publicMetadata(claims), page.role(claims)];
        return Promise.all({json.dumps(CLAIMS)}.map(of));
    """
    assert reader.run("token-first.mjs", code) == [[found, "of the token"] for found in FROM_BOTH]


# --- Writing through


@pytest.fixture
def ready(connection: Connection) -> None:
    """A worker has told the database what is copied."""
    record_policy(connection, Policy())


@runs("write.py")
def test_python_reads_its_own_write(reader: Reader, clerk: StandIn, ready: None) -> None:
    clerk.put({"id": "user_ada", "updated_at": VERSION, "private_metadata": {"plan": "pro", "credits": LARGE}})
    code = """
        from metadata import metadata
        said = [page.set_plan("user_ada", "team"), metadata("user_ada")]
        user = page.clerk.get("/v1/users/user_ada").text
        return [*said, page.put(user), metadata("user_ada") == said[1]]
    """
    said, row, again, same = reader.run("write.py", code)
    assert (said, again, same) == ("applied", "unchanged", True)
    assert row["private"] == {"plan": "team", "credits": LARGE}


@node
@runs("write.mjs")
def test_node_reads_its_own_write(reader: Reader, clerk: StandIn, ready: None) -> None:
    clerk.put({"id": "user_ada", "updated_at": VERSION, "private_metadata": {"plan": "pro"}, "public_metadata": BIG})
    code = """
        const { metadata } = await import("./metadata.mjs");
        const said = [await page.setPlan("user_ada", "team"), await metadata("user_ada")];
        return [...said, await page.put(await page.clerk.users.getUser("user_ada"))];
    """
    said, row, again = reader.run("write.mjs", code)
    assert (said, again) == ("applied", "unchanged")
    assert row == {"private": {"plan": "team"}, "public": BIG}


@runs("write.py")
def test_each_outcome_and_error_is_as_the_page_has_it(
    reader: Reader, clerk: StandIn, users: Connection, ready: None
) -> None:
    deliver(users, changed("user_bob", VERSION + 1_000_000), deleted("user_eve", VERSION))
    for name in ("ada", "bob", "eve"):
        clerk.put({"id": f"user_{name}", "updated_at": VERSION + 1, "private_metadata": {"plan": "late"}})
    code = """
        import psycopg
        said = {}
        for name in ("ada", "bob", "eve"):
            said[name] = page.put(page.clerk.get(f"/v1/users/user_{name}").text)
        nonsense = {
            "an envelope": '{"object": "event", "type": "user.updated", "data": {"id": "user_a", "updated_at": 1}}',
            "a zero": json.dumps({"id": "user_a", "updated_at": 1700000000000, "private_metadata": {"a": chr(0)}}),
        }
        for name, user in nonsense.items():
            try:
                said[name] = page.put(user)
            except psycopg.Error as error:
                said[name] = error.sqlstate
        return said
    """
    said = reader.run("write.py", code)
    assert said == {"ada": "applied", "bob": "older", "eve": "deleted", "an envelope": "22023", "a zero": "22P05"}


# --- A user who isn't there yet


@runs("fetch_on_miss.py")
def test_python_fetches_who_just_signed_up(reader: Reader, clerk: StandIn, ready: None) -> None:
    clerk.put({"id": "user_new", "private_metadata": {"plan": "trial"}})
    code = """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(page.mine, [{"sub": "user_new"}] * 8))
        return [found, page.mine({"sub": "user_new"}), page.mine({"sub": "user_gone"}), page.mine({"sub": "user_ada"})]
    """
    found, again, gone, ada = reader.run("fetch_on_miss.py", code)
    assert {json.dumps(one["private"]) for one in [*found, again]} == {'{"plan": "trial"}'}
    assert gone is None
    assert ada["private"]["plan"] == "pro"
    assert 1 <= clerk.count_by_path()["/v1/users/user_new"] <= 8
    assert clerk.count_by_path()["/v1/users/user_gone"] == 1
    assert "/v1/users/user_ada" not in clerk.count_by_path()


@node
@runs("fetch-on-miss.mjs")
def test_node_fetches_who_just_signed_up_once(reader: Reader, clerk: StandIn, ready: None) -> None:
    clerk.put({"id": "user_new", "private_metadata": {"plan": "trial"}})
    code = """
        const found = await Promise.all(Array.from({ length: 8 }, () => page.mine({ sub: "user_new" })));
        const others = ["user_new", "user_gone", "user_ada"].map((sub) => page.mine({ sub }));
        return [found, ...(await Promise.all(others))];
    """
    found, again, gone, ada = reader.run("fetch-on-miss.mjs", code)
    assert {json.dumps(one["private"]) for one in [*found, again]} == {'{"plan": "trial"}'}
    assert gone is None
    assert ada["private"]["plan"] == "pro"
    assert clerk.count_by_path()["/v1/users/user_new"] == 1, "eight requests of the same moment share a call"
    assert "/v1/users/user_ada" not in clerk.count_by_path()


# --- Hearing of changes

UNTOLD = "insert into clerk.changes (user_id) values ('user_ada')"


listeners = pytest.mark.parametrize(
    "name",
    [
        pytest.param("changes.py", marks=runs("changes.py")),
        pytest.param("changes.mjs", marks=[runs("changes.mjs"), node]),
    ],
)


@listeners
def test_a_cache_hears_of_changes_and_catches_up(name: str, reader: Reader, users: Connection) -> None:
    reader.settings["PGAPPNAME"] = LISTENER
    with reader.running(name, HEAR[name].replace("EVERY", "600")) as heard:
        until(lambda: heard == [["everybody", None]], 20, "the start")
        deliver(users, changed("user_ada", VERSION + 1, private={"plan": "team"}))
        until(lambda: len(heard) > 1, what="a notice")
        assert heard[1:] == [["user_ada", {"private": {"plan": "team"}, "public": None}]]
        deliver(users, deleted("user_bob", VERSION + 1))
        until(lambda: len(heard) > 2, what="the notice of a deletion")
        assert heard[2:] == [["user_bob", None]]
        # While it is away, Postgres keeps nothing for it.
        assert users.execute(CUT, (LISTENER,)).fetchall()
        deliver(users, changed("user_ada", VERSION + 2, private={"plan": "free"}))
        until(lambda: ["user_ada", {"private": {"plan": "free"}, "public": None}] in heard, what="catching up")
        assert heard.count(["everybody", None]) == 1


@listeners
def test_a_cache_catches_up_now_and_then_with_what_no_notice_told(name: str, reader: Reader, users: Connection) -> None:
    with reader.running(name, HEAR[name].replace("EVERY", "0.3")) as heard:
        until(lambda: heard == [["everybody", None]], 20, "the start")
        users.execute(UNTOLD)
        until(lambda: len(heard) > 1, what="the next look")
        assert heard[1][0] == "user_ada"


@listeners
def test_a_cache_outlives_what_others_send(name: str, reader: Reader, users: Connection) -> None:
    with reader.running(name, HEAR[name].replace("EVERY", "600")) as heard:
        until(lambda: heard == [["everybody", None]], 20, "the start")
        for junk in ("", "x", "[]", "null", "7", '{"user": "user_ada"}'):
            users.execute("select pg_notify('clerk_user_changed', %s)", (junk,))
        deliver(users, changed("user_ada", VERSION + 1, private={"plan": "team"}))
        until(lambda: ["user_ada", {"private": {"plan": "team"}, "public": None}] in heard, what="a notice")


FOREIGN: Final = "1-1-1"
BEGIN_ANEW_IN_PYTHON: Final = f"""
    import os, psycopg
    cache = page.Cache()
    cache.get("user_ada")
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        cursor = page.catch_up(connection, "{FOREIGN}", cache)
        return [cursor, len(cache.rows), page.catch_up(connection, cursor, cache) == cursor]
"""
BEGIN_ANEW_IN_NODE: Final = f"""
    const {{ pool }} = await import("./metadata.mjs");
    const cache = new page.Cache();
    await cache.get("user_ada");
    const cursor = await page.catchUp(pool, "{FOREIGN}", cache);
    return [cursor, cache.rows.size, (await page.catchUp(pool, cursor, cache)) === cursor];
"""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("changes.py", BEGIN_ANEW_IN_PYTHON, marks=runs("changes.py")),
        pytest.param("changes.mjs", BEGIN_ANEW_IN_NODE, marks=[runs("changes.mjs"), node]),
    ],
)
def test_a_cache_begins_anew_on_another_server(name: str, code: str, reader: Reader, users: Connection) -> None:
    cursor, kept, same = reader.run(name, code)
    assert users.execute("select count(*) from clerk.changes_since(%s)", (cursor,)).fetchone() == (0,)
    assert (kept, same) == (0, True)


CHANGED_MEANWHILE: Final = {
    "changes.py": """
        cache = page.Cache()
        read = page.metadata
        def slowly(user_id):
            row = read(user_id)
            cache.forget("whoever")
            return row
        page.metadata = slowly
        during = [cache.get("user_ada") is not None, list(cache.rows)]
        page.metadata = read
        return [*during, cache.get("user_ada") is not None, list(cache.rows)]
    """,
    "changes.mjs": """
        const cache = new page.Cache();
        const reading = cache.get("user_ada");
        cache.forget("whoever");
        const during = [(await reading) !== null, [...cache.rows.keys()]];
        return [...during, (await cache.get("user_ada")) !== null, [...cache.rows.keys()]];
    """,
}


@listeners
def test_what_was_read_during_a_change_is_answered_and_not_kept(name: str, reader: Reader) -> None:
    assert reader.run(name, CHANGED_MEANWHILE[name]) == [True, [], True, ["user_ada"]]


# --- Each user their own row


OWNER = """
create role my_owner createrole in role clerk_reader;
grant create on database clerk to my_owner
"""


@pytest.fixture
def own_rows(reader: Reader, users: Connection) -> Iterator[str]:
    """The application's view, made by an owner who has clerk_reader; the address of the login that has the view."""
    users.execute(OWNER)
    users.execute("set role my_owner")
    reader.sql("own_row.sql", users)
    users.execute("reset role")
    yield as_login(reader.settings["DATABASE_URL"], "my_web")
    users.execute("drop schema my_app cascade")
    users.execute("drop role my_web")
    users.execute("drop owned by my_owner")
    users.execute("drop role my_owner")


# Costs less than the view's own condition, so Postgres would ask it first; it tells of what it is given.
PEEK = """
create function my_app.peek(text) returns bool language plpgsql cost 0.0001 as
$$ begin raise notice '%', $1; return true; end $$;
grant execute on function my_app.peek to my_web
"""


@runs("own_row.sql", "own_row.py")
def test_a_login_reads_the_signed_in_users_row_and_no_other(reader: Reader, own_rows: str) -> None:
    reader.settings["DATABASE_URL"] = own_rows
    code = """
        import psycopg
        from metadata import pool
        said = [page.mine({"sub": "user_bob"}), page.mine({"sub": "user_none"}), page.mine({"sub": "user_bob"})]
        with pool.connection() as connection:
            assert pool.get_stats()["pool_size"] >= 1
            said.append(connection.execute(page.READ).fetchone())
            try:
                connection.execute("select from clerk.user_metadata")
            except psycopg.errors.InsufficientPrivilege:
                said.append("refused")
        return said
    """
    bob = {"private": {"plan": "team"}, "public": None}
    assert reader.run("own_row.py", code) == [bob, None, bob, None, "refused"]


@runs("own_row.sql")
def test_a_query_is_not_shown_what_the_view_leaves_out(reader: Reader, own_rows: str, users: Connection) -> None:
    users.execute(PEEK)

    def seen() -> set[str]:
        """Whom a function in a query by Bob was given."""
        told: set[str] = set()
        with psycopg.connect(own_rows) as connection:
            connection.add_notice_handler(lambda notice: told.add(notice.message_primary or ""))
            connection.execute("select set_config('app.user_id', 'user_bob', true)")
            for plan in ("indexscan", "bitmapscan", "indexonlyscan"):
                connection.execute(f"set enable_{plan} = off".encode())  # which every login may do
            rows = connection.execute("select user_id from my_app.my_metadata where my_app.peek(user_id)").fetchall()
            assert rows == [("user_bob",)]
        return told

    assert seen() == {"user_bob"}
    users.execute("alter view my_app.my_metadata reset (security_barrier)")
    assert seen() > {"user_bob"}, "what the barrier is for"


# As Supabase's own: from what PostgREST has taken out of the token that it verified.
SUPABASE = """
create role anon nologin;
create role authenticated nologin;
create schema auth;
create function auth.jwt() returns jsonb language sql stable as
$$ select nullif(current_setting('request.jwt.claims', true), '')::jsonb $$;
grant usage on schema auth to anon, authenticated
"""
NO_SUPABASE = "drop view public.my_metadata; drop schema auth cascade; drop role anon; drop role authenticated"


@runs("supabase.sql")
def test_on_supabase_the_id_is_the_tokens(reader: Reader, users: Connection) -> None:
    users.execute(SUPABASE)
    try:
        reader.sql("supabase.sql", users)
        for claims, expected in ({"sub": "user_ada"}, [("user_ada",)]), ({}, []), (None, []):
            with users.transaction():
                users.execute("set local role authenticated")
                if claims is not None:
                    users.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))
                assert users.execute("select user_id from public.my_metadata").fetchall() == expected
        users.execute("set role anon")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            users.execute("select from public.my_metadata")
        users.execute("set role authenticated")
        with pytest.raises(psycopg.errors.UndefinedColumn):
            users.execute("select private_metadata from public.my_metadata")
    finally:
        users.execute("reset role")
        users.execute(NO_SUPABASE)


# --- Indexes


MANY: Final = 2000
SCANS = """
select
  (select coalesce(sum(seq_scan), 0) from pg_stat_user_tables where relid = 'clerk.user_contents'::regclass)::int,
  (select idx_scan from pg_stat_user_indexes where indexrelname = %s)::int
"""
VALID = """
select relname from pg_index join pg_class on pg_class.oid = indexrelid where indisvalid and relname ~ '^my_' order by 1
"""
COUNT_NOW = "select pg_stat_force_next_flush()"


@pytest.fixture
def indexed(reader: Reader, users: Connection) -> Iterator[Connection]:
    """Many users, and the application's indexes; a connection that sees them counted."""
    population.populate_ours(users, MANY)
    deliver(users, changed("user_ada", VERSION + 1, private={"plan": "pro"}))
    with psycopg.connect(users.info.dsn, password=users.info.password, autocommit=True) as owner:
        reader.sql("index.sql", owner)
        for connection in (users, owner):
            connection.execute(COUNT_NOW)
        yield owner
        owner.execute("drop index clerk.my_plan, clerk.my_private")


def scans(owner: Connection, index: str) -> tuple[int, int]:
    """How often the table was read whole, and how often the index was used, since the server began."""
    return owner.execute(SCANS, (index,)).fetchone() or (0, 0)


ASKS: Final = [
    pytest.param("orm.py", "return page.on_plan('pro')", "my_plan", id="sqlalchemy", marks=runs("orm.py", "index.sql")),
    pytest.param(
        "members/queries.py",
        "return page.on_plan('pro')",
        "my_plan",
        id="django",
        marks=runs("members/queries.py", "index.sql"),
    ),
    pytest.param(
        "drizzle.mjs",
        "return (await page.onPlan('pro')).map(({ userId }) => userId)",
        "my_plan",
        id="drizzle",
        marks=[runs("drizzle.mjs", "index.sql"), node],
    ),
    pytest.param(
        "metadata.py",
        """
        with page.pool.connection() as connection:
            found = connection.execute(
                "select user_id from clerk.user_metadata where private_metadata @> %s::jsonb", ('{"plan": "pro"}',))
            return [row["user_id"] for row in found]
        """,
        "my_private",
        id="contains",
        marks=runs("metadata.py", "index.sql"),
    ),
]


@pytest.mark.parametrize(("name", "code", "index"), ASKS)
def test_a_query_by_a_field_takes_its_index(
    name: str, code: str, index: str, reader: Reader, indexed: Connection
) -> None:
    (reader.folder / "django_project.py").write_text(DJANGO, "utf-8")
    whole, used = scans(indexed, index)
    assert reader.run(name, code) == ["user_ada"]
    until(lambda: scans(indexed, index)[1] > used, what="the use of the index")
    assert scans(indexed, index)[0] == whole, "nobody has read the whole table"


@runs("query.sql", "index.sql")
def test_the_pages_own_sql_takes_its_index(reader: Reader, indexed: Connection) -> None:
    indexed.execute("create temp table orders (id int, user_id text)")
    whole, used = scans(indexed, "my_plan")
    assert reader.sql("query.sql", indexed)[1] == [("user_ada",)]
    indexed.execute(COUNT_NOW)
    assert scans(indexed, "my_plan") == (whole, used + 1)


@runs("index.sql")
def test_migrations_leave_an_applications_indexes_alone(reader: Reader, servers: local.Urls) -> None:
    url = servers.database.rsplit("/", 1)[0] + "/with_indexes"
    with psycopg.connect(servers.database, autocommit=True) as connection:
        connection.execute("create database with_indexes")
        try:
            migrate_to(url, "0001")
            with psycopg.connect(url, autocommit=True) as owner:
                reader.sql("index.sql", owner)
                before = owner.execute(VALID).fetchall()
                schema.migrate(url)
                assert owner.execute(VALID).fetchall() == before == [("my_plan",), ("my_private",)]
        finally:
            connection.execute("drop database with_indexes with (force)")


def migrate_to(database_url: str, step: str) -> None:
    """Run the steps up to this one, as an older version of the code would have."""
    engine = sqlalchemy.create_engine(
        sqlalchemy.make_url(database_url).set(drivername="postgresql+psycopg"), poolclass=sqlalchemy.NullPool
    )
    config = schema._config()
    with engine.connect() as connection:
        config.attributes.update(connection=connection, grants="select")
        alembic.command.upgrade(config, step)
        connection.commit()
