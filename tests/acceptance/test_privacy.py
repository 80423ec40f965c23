"""Nothing personal leaves by a side door: not in any output, not in the broker, not in metrics or what commands say.

A canary stands in everything that is somebody's business alone, and afterwards it is looked for wherever something
could have come out. It may be found in two places: in the view, and as the name of a field (never as a value) in the
reports of the session token's budget.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import redis
from click.testing import CliRunner
from psycopg import sql

from tests.acceptance.system import CANARY, ENVIRONMENT, Answer, Client, System, new_user, now_ms, user_event
from tests.clerk import sign
from tests.events import deleted, envelope
from tests.waiting import until
from worker.cli import main
from worker.standin import StandIn

FIELD: Final = f"field@{CANARY}"
"""A name that a user gave to a field of theirs."""

STATUS_TOKEN: Final = f"status-token-{CANARY}"

SIGNING_SECRET: Final = "whsec_" + base64.b64encode(f"signing secret {CANARY}".encode()).decode()


@pytest.fixture(scope="module")
def clerk() -> Iterator[StandIn]:
    """Clerk's API, opened by a key with the canary in it."""
    with StandIn(f"sk_live_{CANARY}") as standin:
        yield standin


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes put their temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def careful(new_system: Callable[..., System], clerk: StandIn, temporary: Path) -> Iterator[System]:
    """A system at its most talkative, in JSON, that has that Clerk's key."""
    system = new_system(
        LOG_LEVEL="DEBUG",
        LOG_FORMAT="json",
        TMPDIR=str(temporary),
        CLERK_WEBHOOK_SIGNING_SECRET=SIGNING_SECRET,
        CLERK_SECRET_KEY=clerk.secret_key,
        CLERK_API_URL=clerk.url,
        CLERK_INSTANCE_ID="ins_ours",
        STATUS_TOKEN=STATUS_TOKEN,
        RECONCILE_SECONDS="0",  # tests ask for it: it would erase users of whom that Clerk doesn't know
    )
    system.start()
    yield system
    forbidden = secrets(system)
    assert system.stop() == 0
    assert not [secret for secret in forbidden if secret in system.output]


@pytest.fixture
def sender(careful: System) -> Iterator[Client]:
    """Svix."""
    with careful.client() as connected:
        yield connected


def laden(user_id: str, version: int, *, event_type: str = "user.updated", **metadata: Any) -> bytes:
    """An event with the canary in every value that a person can choose, and in the names of fields."""
    event = json.loads(user_event(user_id, version, event_type=event_type, instance_id="ins_ours"))
    email = {"id": f"idn_{CANARY}", "object": "email_address", "email_address": f"{CANARY}@example.com"}
    event["data"] |= {
        "external_id": f"external {CANARY}",
        "image_url": f"https://img.example.com/{CANARY}",
        "profile_image_url": f"https://img.example.com/{CANARY}",
        "email_addresses": [email | {"verification": {"status": CANARY}}],
        "primary_email_address_id": email["id"],
        "phone_numbers": [{"id": f"idn_{CANARY}", "phone_number": f"+1 {CANARY}"}],
        "primary_phone_number_id": f"idn_{CANARY}",
        "external_accounts": [{"email_address": f"{CANARY}@example.com"}],
    }
    for kind in ("private_metadata", "public_metadata", "unsafe_metadata"):
        event["data"][kind] = metadata.get(kind, {FIELD: CANARY, "plain_name": {"deep": [CANARY], FIELD: CANARY * 100}})
    event["event_attributes"]["http_request"] = {"client_ip": CANARY, "user_agent": f"Agent {CANARY}"}
    return json.dumps(event).encode()


def secrets(system: System) -> list[str]:
    """What no sink may hold: the canary as text and as a database shows bytes, and each secret as a whole."""
    passwords = [urllib.parse.urlsplit(url).password or "" for url in (system.database_url, system.redis_url)]
    assert all(passwords)
    return [CANARY, CANARY.encode().hex(), SIGNING_SECRET.removeprefix("whsec_"), *passwords]


def assert_silent(system: System, **sinks: str) -> None:
    """None of these has a secret in it; if one does, say which and where."""
    found = [
        (sink, text[max(0, at - 200) : at + 100])
        for secret in secrets(system)
        for sink, text in sinks.items()
        if (at := text.find(secret)) >= 0
    ]
    assert not found


QUERIES: Final = "select query from pg_stat_activity where application_name like 'clerk-sync%'"
LOOKED_BACK_AT: Final = "select coalesce(string_agg(e::text, ' '), '') from clerk.webhook_events e where state = 'done'"


def sinks(system: System, client: Client, temporary: Path) -> dict[str, str]:
    """What can be read of a running system without its tables."""
    with system.connect() as connection:
        queries = [query for (query,) in connection.execute(QUERIES)]
        (inbox,) = connection.execute(LOOKED_BACK_AT).fetchone() or ("",)
    assert queries
    page = client.ask("GET", "/status", headers={"authorization": f"Bearer {STATUS_TOKEN}"})
    assert b"clerk-sync" in page.body
    return {
        "output": system.output,
        "metrics": client.get("/metrics").body.decode(),
        "readiness": client.get("/readyz").body.decode(),
        "the status page": f"{page.headers}{page.body.decode()}",
        "running queries": " ".join(queries),
        "the inbox after the apply": inbox,
        "the broker's keys": contents_of_broker(system),
        "command lines": command_lines(),
        "files": "".join(files(system, temporary)),
    }


def contents_of_broker(system: System) -> str:
    """Every key with all that it holds."""
    read = {b"list": "lrange", b"zset": "zrange"}
    with redis.Redis.from_url(system.redis_url) as broker:
        found: list[object] = []
        for key in broker.scan_iter():
            kind = broker.type(key)
            if kind in read:
                found.append((key, getattr(broker, read[kind])(key, 0, -1)))
            else:
                found.append(
                    (key, {b"set": broker.smembers, b"hash": broker.hgetall, b"string": broker.get}[kind](key))
                )
        return repr(found)


def command_lines() -> str:
    """What any user of this machine sees of its processes, this test's own aside."""
    if sys.platform != "linux":
        return ""
    said = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            said.append((folder / "cmdline").read_text("utf-8", "replace") + (folder / "comm").read_text())
        except OSError:
            continue
    return "\n".join(said)


def files(system: System, temporary: Path) -> Iterator[str]:
    """What the processes wrote: counts and temporary files. Not the cluster, nor what `up` keeps passwords in."""
    kept = {"postgres.password", "redis.password", "redis.conf", "signing-secret"}
    for folder in (system.data_dir, temporary):
        for path in folder.rglob("*"):
            if path.is_file() and "postgres" not in path.relative_to(folder).parts and path.name not in kept:
                yield path.read_bytes().decode("latin-1")


def listen_to_broker(system: System) -> socket.socket:
    """A connection that gets to see every command that anybody sends to Redis."""
    url = urllib.parse.urlsplit(system.redis_url)
    listening = socket.create_connection((url.hostname, url.port or 0), timeout=10)
    listening.sendall(f"AUTH {url.password}\r\nMONITOR\r\n".encode())
    said = b""
    while said.count(b"+OK\r\n") < 2:
        said += listening.recv(4096)
    return listening


def heard(system: System, listening: socket.socket) -> str:
    """All that was said to the broker since the listening began."""
    with redis.Redis.from_url(system.redis_url) as broker:
        broker.echo("the end of it")
    said = b""
    while b"the end of it" not in said:
        said += listening.recv(65536)
    return said.decode("latin-1")


def test_broker_gets_a_wake_up_and_nothing_of_the_event(system: System, client: Client) -> None:
    user_id = new_user()
    system.settle()
    with listen_to_broker(system) as listening:
        sent: list[Answer] = []
        said: list[str] = []

        def rung() -> bool:
            """A burst is one ring, a moment later; none comes while the one before is unheard."""
            sent.extend(client.deliver(user_event(user_id, now_ms(), {"n": number})) for number in range(5))
            said.append(heard(system, listening))
            return "clerk.drain" in said[-1]

        until(rung, what="the doorbell")
        system.settle()
        said.append(heard(system, listening))
    for secret in (CANARY, user_id, system.signing_secret, *(answer.svix_id for answer in sent)):
        assert secret not in "".join(said)


def test_canary_comes_out_at_the_view_and_nowhere_else(system: System, client: Client) -> None:
    """The canary stands in all metadata, names, addresses and user agents of every event of these tests."""
    user_id = new_user()
    body = user_event(user_id, now_ms(), public={"large": CANARY * 200})
    answers = [client.deliver(body)]
    # Ways to go wrong: refused, unusable, of another type, too large.
    answers.append(client.post(body, {}))
    answers.append(client.post(body, sign("whsec_AAAA", body)))
    answers.append(client.deliver(body.replace(b'"private_metadata": {', b'"private_metadata": [', 1)))
    answers.append(client.deliver(body.replace(b'"updated_at": ', b'"updated_at": "%s", "x": ' % CANARY.encode(), 1)))
    answers.append(client.deliver(body.replace(b"user.updated", b"session.created")))
    answers.append(client.deliver(user_event(new_user(), now_ms(), {"large": CANARY * 200_000})))
    assert [answer.status for answer in answers] == [202, 400, 400, 202, 202, 200, 413]
    assert CANARY in str(until(lambda: system.rows(user_id)))
    dead = [answer.svix_id for answer in answers[3:5]]
    said = [answer.body.decode() for answer in answers]
    said += [str(system.event(svix_id)) for svix_id in dead]
    for command in (("status",), ("events", "list"), ("events", "show", dead[0]), ("events", "show", dead[1])):
        ran = system.command(*command, "--json")
        said += [ran.stdout, ran.stderr]
    said += [client.get(path).body.decode() for path in ("/metrics", "/readyz", "/healthz")]
    output = system.output
    assert answers[0].svix_id in output, "each delivery has its line"
    said.append(output)
    for text in said:
        assert CANARY not in text
        for secret in (system.signing_secret, system.database_url, system.redis_url):
            assert secret not in text


def odd_bodies() -> list[bytes]:
    """Authentic bodies with the canary in them that can't be used, or of which only some can."""
    whole = laden(new_user(), now_ms())
    event = json.loads(whole)
    bodies = [
        whole[: len(whole) // 2],
        whole + whole,
        b"[" * 2000 + whole,
        b"\xef\xbb\xbf" + whole,
        f'"{CANARY}"'.encode(),
        whole.replace(b'"updated_at": ', b'"updated_at": "%s", "x": ' % CANARY.encode()),
        whole.replace(b'"private_metadata": {', b'"private_metadata": "%s", "private_metadata": {' % CANARY.encode()),
        whole.replace(b'"unsafe_metadata": {', b'"unsafe_metadata": ["%s"], "x": {' % CANARY.encode()),
        laden(new_user(), now_ms(), unsafe_metadata={f"{CANARY}\0": f"\ud800{CANARY}"}),
        envelope("user.updated", {"id": {"of": CANARY}, "updated_at": 1}, 1),
        envelope("user.updated", {"id": f"user {CANARY}", "updated_at": 1}, 1),
        envelope("user.updated", [CANARY], 1),
        envelope("user.deleted", {"id": [CANARY], "deleted": CANARY}, 1),
    ]
    for name in ("type", "timestamp", "data"):
        bodies.append(json.dumps({**event, name: [CANARY]}).encode())
        bodies.append(json.dumps({**event, name: {FIELD: CANARY}}).encode())
    return bodies


def test_odd_deliveries_and_refused_ones_are_answered_and_logged_without_a_word_of_them(
    careful: System, sender: Client, temporary: Path
) -> None:
    body = laden(new_user(), now_ms())
    with listen_to_broker(careful) as listening:
        answers = [sender.deliver(odd) for odd in odd_bodies()]
        assert {answer.status for answer in answers} == {202}
        assert len([answer for answer in answers if answer.said == {"status": "dead"}]) > 10
        # Of another type, of another instance, and too large.
        others = [body.replace(b"user.updated", b"session.created"), body.replace(b"ins_ours", b"ins_theirs")]
        others.append(laden(new_user(), now_ms(), private_metadata={"large": CANARY * 100_000}))
        answers += [sender.deliver(other) for other in others]
        assert [answer.status for answer in answers[-3:]] == [200, 200, 413]
        signed = sign(SIGNING_SECRET, body, svix_id=f"msg_{CANARY}")
        wrong: list[dict[str, str]] = [
            {},
            signed | {"svix-signature": f"v1,{CANARY}"},
            signed | {"svix-timestamp": CANARY},
            signed | {"svix-id": f"msg {CANARY}"},
            signed | {"svix-timestamp": "1700000000"},
            sign(SIGNING_SECRET, b"\xff" + CANARY.encode(), svix_id=f"msg_{CANARY}"),
        ]
        answers += [sender.post(body, headers | {"user-agent": CANARY, "cookie": CANARY}) for headers in wrong]
        assert {answer.status for answer in answers[-len(wrong) :]} == {400}
        answers += [sender.get(f"/{CANARY}?q={CANARY}"), sender.get(f"/webhooks/clerk?q={CANARY}")]
        answers.append(sender.ask("PUT", f"/healthz?{CANARY}", CANARY.encode(), {"x-header": CANARY}))
        assert [answer.status for answer in answers[-3:]] == [404, 405, 405]
        # The status page: without its token, with wrong ones, and with forms of all sorts behind the right one.
        form = {"content-type": "application/x-www-form-urlencoded", "authorization": f"Bearer {STATUS_TOKEN}"}
        for given in ("", f"Bearer {CANARY}", f"Basic {CANARY}", f"Basic {base64.b64encode(CANARY.encode()).decode()}"):
            answers.append(sender.ask("GET", f"/status?token={STATUS_TOKEN}", headers={"authorization": given}))
            answers.append(sender.ask("POST", f"/status/retry?{CANARY}", CANARY.encode(), {"authorization": given}))
        assert {answer.status for answer in answers[-8:]} == {401}
        for fields in (CANARY, f"svix_id={CANARY}", f"form_key={CANARY}&svix_id={CANARY}"):
            answers.append(sender.ask("POST", "/status/retry", fields.encode(), form))
        assert [answer.status for answer in answers[-3:]] == [400, 403, 403]
        for junk in (f"{CANARY} {CANARY}", f"GET / HTTP/{CANARY}", f"GET / HTTP/1.1\r\nbad {CANARY}: 1"):
            not_http(sender, careful, junk)
        good = sender.deliver(body)
        assert good.outcome == (202, "accepted")
        careful.settle()
        said = heard(careful, listening)
        while "clerk.drain" not in said:  # the doorbell is rung at once, and heard a moment later
            said += heard(careful, listening)
    assert good.svix_id in careful.output, "each delivery has its line"
    answered = "".join(f"{answer.headers}{answer.body.decode()}" for answer in answers)
    assert_silent(careful, answers=answered, broker=said, **sinks(careful, sender, temporary))


def not_http(client: Client, system: System, request: str) -> None:
    """Send what isn't HTTP, and wait until the receiver has hung up."""
    parts = urllib.parse.urlsplit(system.url)
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as connection:
        connection.sendall(f"{request}\r\n\r\n".encode())
        while connection.recv(65536):
            pass


RAISE: Final = """
create function clerk.quote_it() returns trigger language plpgsql as $$
begin
  raise exception 'the value %', new.private_metadata
    using errcode = tg_argv[0], detail = new.private_metadata::text, hint = new.private_metadata::text;
end
$$
"""


@pytest.fixture
def quoting(careful: System) -> Iterator[Callable[[str], None]]:
    """Lets Postgres refuse every write of metadata with this SQLSTATE, quoting the value; until the test is over."""

    def quote(sqlstate: str) -> None:
        connection.execute("drop trigger if exists quote_it on clerk.user_contents")
        connection.execute(
            "create trigger quote_it before insert or update on clerk.user_contents for each row "
            f"when (new.private_metadata is not null) execute function clerk.quote_it('{sqlstate}')"
        )

    with careful.connect() as connection:
        connection.execute(RAISE)
        yield quote
        connection.execute("drop function clerk.quote_it cascade")


def test_errors_of_the_database_that_quote_a_value_are_told_without_it(
    careful: System, sender: Client, temporary: Path, quoting: Callable[[str], None]
) -> None:
    quoting("22000")  # the row's fault
    poison = sender.deliver(laden(new_user(), now_ms()))
    event = until(lambda: (found := careful.event(poison.svix_id)) and found[0] == "dead" and found)
    assert event
    assert "22000" in (event[2] or "")
    quoting("P0001")  # nobody's fault that we know of
    sender.deliver(laden(new_user(), now_ms()))
    until(lambda: "P0001" in careful.output, what="a drain that failed")
    said = [str(event)]
    for arguments in (("events", "show", poison.svix_id), ("events", "list"), ("status",)):
        ran = careful.command(*arguments)
        said.append(ran.stdout + ran.stderr)
    assert_silent(careful, commands="".join(said), **sinks(careful, sender, temporary))


def test_what_dies_in_the_middle_of_it_takes_nothing_along(careful: System, sender: Client, temporary: Path) -> None:
    pids = careful.pids
    for name in ("redis", "postgres"):
        careful.kill(name)
    answers = []

    def accepted() -> bool:
        answers.append(sender.deliver(laden(new_user(), now_ms())))
        return answers[-1].status == 202

    for _ in range(3):
        accepted()  # or not: it is dying
    for name in ("redis", "postgres"):
        careful.await_restart(name, pids[name])
    until(lambda: sender.get("/readyz").status == 200, 20, "readiness")
    until(accepted)
    careful.settle(20)
    assert {answer.status for answer in answers} <= {202, 503}
    answered = "".join(f"{answer.headers}{answer.body.decode()}" for answer in answers)
    assert_silent(careful, answers=answered, **sinks(careful, sender, temporary))


def test_commands_tell_names_and_sizes_and_never_a_value(careful: System, sender: Client, clerk: StandIn) -> None:
    user_id, pulled = new_user(), new_user()
    clerk.put(json.loads(laden(user_id, now_ms()))["data"])
    clerk.put(json.loads(laden(pulled, now_ms()))["data"])
    clerk.odd(new_user(), json.dumps({"id": CANARY + " ", "private_metadata": CANARY}).encode())
    sender.deliver(laden(user_id, now_ms()))
    dead = sender.deliver(laden(new_user(), now_ms(), private_metadata=CANARY)).svix_id
    careful.settle()
    commands = [
        ("status",),
        ("events", "list"),
        ("events", "show", dead),
        ("events", "show", "msg_of_nobody"),
        ("events", "retry", dead),
        ("events", "retry", "msg_of_nobody"),
        ("events", "dismiss", "msg_of_nobody"),
        ("refresh", user_id),
        ("reconcile",),
        ("reconcile", "--check"),
        ("backfill",),
        ("budget", "report"),
        ("budget", "suggest"),
        ("budget", "reweigh"),
        ("erase", pulled),
    ]
    said: list[str] = []
    reports: list[str] = []
    for command in commands:
        for arguments in (command, (*command, "--json")):
            ran = careful.command(*arguments)
            assert ran.returncode in {0, 1}, ran.stderr
            (reports if command[0] == "budget" else said).append(ran.stdout + ran.stderr)
    assert FIELD in "".join(reports), "the names of fields are what a report is for"
    assert_silent(careful, commands="".join(said), reports="".join(reports).replace(FIELD, ""))


@pytest.mark.parametrize(
    "environment",
    [
        {"DATABASE_URL": f"postgresql://me:{CANARY}@127.0.0.1:1/none", "REDIS_URL": f"redis://:{CANARY}@127.0.0.1:1/0"},
        {"DATABASE_URL": f"postgresql://me:%{CANARY}@127.0.0.1:1/none", "REDIS_URL": CANARY},
        {"DATABASE_URL": f"postgresql://me@{CANARY}@h:x/none", "REDIS_URL": f"redis://:{CANARY}@h:port/0"},
        {"DATABASE_URL": CANARY, "CLERK_SECRET_KEY": CANARY, "CLERK_WEBHOOK_SIGNING_SECRET": CANARY},
        {"DATABASE_URL": "postgresql://127.0.0.1:1/none", "CLERK_WEBHOOK_SIGNING_SECRET": f"whsec_{CANARY}!"},
        {"DATABASE_URL": "postgresql://127.0.0.1:1/none", "STATUS_TOKEN": f"{CANARY} {CANARY}"},
        {"DATABASE_URL": "postgresql://127.0.0.1:1/none", "CLERK_SECRET_KEY": f"sk_live_{CANARY}\n{CANARY}"},
    ],
)
def test_a_wrong_or_useless_secret_is_refused_without_a_part_of_it(environment: dict[str, str]) -> None:
    env: dict[str, str | None] = {**dict.fromkeys(os.environ), **ENVIRONMENT, **environment}
    for command in (("status",), ("events", "list"), ("migrate",), ("backfill",), ("erase", "user_a")):
        ran = CliRunner(catch_exceptions=False).invoke(main, command, env=env)
        assert ran.exit_code in {1, 2}
        assert ran.output
        assert CANARY not in ran.output


TABLES: Final = """
select table_name from information_schema.tables where table_schema = 'clerk' and table_type = 'BASE TABLE'
"""


EVERYTHING: Final = "select t::text from clerk.{} t"


def dumped(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """All rows of all of our tables as text; bytes are in hex."""
    names = [name for (name,) in connection.execute(TABLES)]
    assert {"users", "user_contents", "webhook_events", "runs"} <= set(names)
    return {
        name: repr(connection.execute(sql.SQL(EVERYTHING).format(sql.Identifier(name))).fetchall()) for name in names
    }


def test_nothing_is_left_in_any_table_of_users_who_were_deleted(
    careful: System, sender: Client, clerk: StandIn, quoting: Callable[[str], None]
) -> None:
    for user_id in clerk.users:
        clerk.delete(user_id)
    careful.command("events", "dismiss", "--dead")  # what other tests left behind
    # One whose events wait, have been set aside, and come again once it is deleted.
    user_id = new_user()
    first = sender.deliver(laden(user_id, now_ms()))
    careful.settle()
    with careful.connect() as connection:
        assert CANARY in dumped(connection)["user_contents"]
    unusable = sender.deliver(laden(user_id, now_ms(), private_metadata=CANARY))
    assert unusable.outcome == (202, "dead")
    quoting("P0001")
    sender.deliver(laden(user_id, now_ms(), private_metadata={FIELD: CANARY, "again": CANARY}))
    assert careful.pending()
    sender.deliver(deleted(user_id, now_ms()))
    careful.settle()
    after = [
        sender.deliver(laden(user_id, now_ms())),
        sender.deliver(laden(user_id, now_ms(), unsafe_metadata=CANARY)),
        sender.deliver(laden(user_id, 1), first.svix_id),
    ]
    assert [answer.outcome for answer in after] == [(202, "accepted"), (202, "dead"), (202, "accepted")]
    with careful.connect() as connection:
        for (other,) in connection.execute("select user_id from clerk.users where deleted_at is null").fetchall():
            sender.deliver(deleted(other, now_ms()))
        careful.settle()
        assert connection.execute("select count(*) from clerk.user_metadata").fetchone() == (0,)
        # What came dead after the deletion, the workers' housekeeping erases.
        bodies = "select count(*) from clerk.webhook_events where body is not null"
        until(lambda: connection.execute(bodies).fetchone() == (0,), 20, "housekeeping")
        assert_silent(careful, **dumped(connection))
