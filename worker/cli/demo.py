"""`clerk-sync demo`: the system as it is deployed, fed with a handful of signed events and, for what no event tells,
with answers of a stand-in for Clerk's API."""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Final, NamedTuple

import click
import psycopg
from rich.console import Console
from rich.table import Table

from worker import db
from worker.clerk import budgeted
from worker.cli.send import post
from worker.cli.up import Info, announce, data_dir_option, port_option, serve
from worker.errors import SyncError
from worker.refresh import Result, refresh_users
from worker.settings import Settings
from worker.standin import StandIn
from worker.words import plural

APPLIED_WITHIN_SECONDS: Final = 10.0
ANSWERED_WITHIN_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Step:
    """One delivery of the demonstration, with what the endpoint may answer."""

    title: str
    svix_id: str
    body: dict[str, Any]
    answers: tuple[str, ...] = ("accepted",)


class Users(NamedTuple):
    """The ids of the users."""

    ada: str
    bob: str
    dan: str
    eve: str
    zoe: str


def users(run: str) -> Users:
    """The users; `run` keeps one demonstration apart from the next."""
    return Users(*(f"user_{name}_{run}" for name in Users._fields))


BIOGRAPHY: Final = "Wrote the first program. " * 50
"""More than the session token can carry."""


def changed(kind: str, user: str, at_ms: int, **metadata: Any) -> dict[str, Any]:
    """An event as Clerk sends it, about a change at that time by Clerk's clock."""
    kinds: dict[str, Any] = {"public_metadata": {}, "private_metadata": {}, "unsafe_metadata": {}}
    data = {"id": user, "object": "user", "updated_at": at_ms, **kinds, **metadata}
    return {"type": kind, "object": "event", "timestamp": at_ms + 15, "data": data}


def steps(run: str, now_ms: int) -> list[Step]:
    """The deliveries of one demonstration; `now_ms` is Clerk's clock in them."""
    ada, bob, _, eve, _ = users(run)
    signed_up = changed(
        "user.created", ada, now_ms, private_metadata={"plan": "free"}, public_metadata={"role": "member"}
    )
    oversize = changed(
        "user.updated",
        ada,
        now_ms + 1000,
        private_metadata={"plan": "pro", "credits": 9007199254740993},
        public_metadata={"role": "admin", "biography": BIOGRAPHY},
    )
    newer = changed(
        "user.updated", bob, now_ms + 2000, private_metadata={"plan": "team"}, unsafe_metadata={"theme": "dark"}
    )
    older = changed("user.updated", bob, now_ms + 1000, private_metadata={"plan": "free"})
    doomed = changed("user.created", eve, now_ms, private_metadata={"plan": "free"})
    deletion = {
        "type": "user.deleted",
        "object": "event",
        "timestamp": now_ms + 3000,
        "data": {"id": eve, "object": "user", "deleted": True},
    }
    return [
        Step("Ada signs up", f"msg_{run}_1", signed_up),
        Step("Ada's public metadata outgrows the session token", f"msg_{run}_2", oversize),
        Step("the same delivery once more", f"msg_{run}_2", oversize, ("accepted", "duplicate")),
        Step("Bob's newer update arrives first", f"msg_{run}_3", newer),
        Step("Bob's older update arrives late", f"msg_{run}_4", older),
        Step("Eve signs up", f"msg_{run}_5", doomed),
        Step("Eve is deleted", f"msg_{run}_6", deletion),
        Step("Eve's sign-up is delivered again", f"msg_{run}_5", doomed, ("accepted", "duplicate")),
    ]


LONG_AGO_MS: Final = 90 * 24 * 3600 * 1000


def sign_up_of_dan(run: str, now_ms: int) -> Step:
    """The one delivery about Dan."""
    # Not just now: of somebody who came this very moment, Clerk would be asked twice.
    body = changed("user.created", users(run).dan, now_ms - 3_600_000, private_metadata={"plan": "free"})
    return Step("Dan signs up", f"msg_{run}_7", body)


def happen_unheard(clerk: StandIn, run: str, now_ms: int) -> None:
    """What happens at Clerk without a delivery: Zoe was there before the endpoint, and Dan's deletion gets lost."""
    before = now_ms - LONG_AGO_MS
    zoe = {"id": users(run).zoe, "created_at": before, "updated_at": before}
    clerk.put({**zoe, "private_metadata": {"plan": "early"}, "public_metadata": {"role": "member"}})
    clerk.put({"id": users(run).dan})
    clerk.delete(users(run).dan)


def asked(run: str) -> dict[str, tuple[str, str]]:
    """Of whom the stand-in is asked: what is to become of each, and who that is."""
    return {
        users(run).zoe: ("applied", "Zoe, who was there before the webhook endpoint"),
        users(run).dan: ("erased", "Dan, whose deletion was never delivered"),
    }


def ask(clerk: StandIn, database_url: str, run: str) -> tuple[list[Result], int]:
    """Refresh Zoe and Dan, and nobody else, from the stand-in; what became of them, and the number of calls.

    The database can be one in use, where everybody else is unknown to the stand-in: nothing that compares all users
    with Clerk may be run here.
    """
    # The policy that the workers have, and nothing else that leads to a real Clerk.
    settings = replace(Settings.from_env(), secret_key=clerk.secret_key, api_url=clerk.url)

    def connect() -> db.Connection:
        return db.connect(database_url, "demo")

    with connect() as connection, budgeted(settings, connect, patience=ANSWERED_WITHIN_SECONDS) as api:
        batches = refresh_users(connection, settings.policy, api, asked(run))
        return [result for batch in batches for result in batch], api.calls


READ = """
select user_id, private_metadata, public_metadata, unsafe_metadata, claims_bytes
from clerk.user_metadata
where user_id = any(%(user_ids)s)
order by user_id
"""

Row = tuple[str, Any, Any, Any, int]


def wrong_rows(rows: list[Row], run: str) -> list[str]:
    """What isn't as it should be in the end; empty when all is well."""
    ada, bob, dan, eve, zoe = users(run)
    found = {row[0]: row[1:4] for row in rows}
    expected: dict[str, tuple[Any, Any, Any] | None] = {
        ada: ({"plan": "pro", "credits": 9007199254740993}, {"role": "admin", "biography": BIOGRAPHY}, {}),
        bob: ({"plan": "team"}, None, None),
        dan: None,
        eve: None,
        zoe: ({"plan": "early"}, None, None),
    }
    return [f"{user} is not as it should be" for user, row in expected.items() if found.get(user) != row]


def demonstrate(running: Info, console: Console) -> bool:
    """Send the events to a running system, ask the stand-in for what they don't tell, and show the rows; False where
    something isn't as it should be."""
    run = secrets.token_hex(3)
    now_ms = int(time.time() * 1000)
    console.print("\n[bold]Eight deliveries, signed as Svix signs them[/]")
    right = [_deliver(running, console, step) for step in steps(run, now_ms)]
    console.print("\n[bold]What no delivery told, from Clerk's API (here a stand-in for it)[/]")
    right.append(_deliver(running, console, sign_up_of_dan(run, now_ms)))
    with db.connect(running.database_url, "demo") as connection:
        _settle(connection)
        right.append(_make_up(running, console, run, now_ms))
        rows = connection.execute(READ, {"user_ids": list(users(run))}).fetchall()
    _show(console, rows)
    problems = wrong_rows(rows, run)
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    return all(right) and not problems


def _deliver(running: Info, console: Console, step: Step) -> bool:
    """Send one event and print the answer; whether it is one of those wanted."""
    response = post(running.url, running.signing_secret, step.svix_id, json.dumps(step.body).encode())
    status = response.json().get("status")
    right = response.is_success and status in step.answers
    mark = "[green]" if right else "[red]"
    console.print(f"  {mark}{response.status_code} {status!s:<10}[/] {step.title}")
    return right


PENDING = "select count(*) from clerk.webhook_events where state = 'pending'"


def _settle(connection: db.Connection) -> None:
    """Wait until nothing is pending."""
    limit = time.monotonic() + APPLIED_WITHIN_SECONDS
    pause = Event()
    while time.monotonic() < limit:
        (pending,) = connection.execute(PENDING).fetchone() or (0,)
        if not pending:
            return
        pause.wait(0.02)


def _make_up(running: Info, console: Console, run: str, now_ms: int) -> bool:
    """Ask for the two of whom no delivery told, and print what became of them; whether that is what was wanted."""
    with StandIn() as clerk:
        happen_unheard(clerk, run, now_ms)
        results, calls = ask(clerk, running.database_url, run)
    right = True
    for result in results:
        wanted, title = asked(run)[result.user_id]
        right = right and result.outcome == wanted
        mark = "[green]" if result.outcome == wanted else "[red]"
        said = title if result.reason is None else f"{title}: {result.reason}"
        console.print(f"  {mark}{result.outcome:<14}[/] {said}")
    console.print(f"  {plural(calls, 'call')} for both")
    return right


SHOWN: Final = """
  select user_id, private_metadata, public_metadata, unsafe_metadata,
    claims_bytes
  from clerk.user_metadata;
"""


def _show(console: Console, rows: list[Row]) -> None:
    console.print("\n[bold]What an application reads[/]")
    names = ("user_id", "private_metadata", "public_metadata", "unsafe_metadata", "claims_bytes")
    console.print(SHOWN, style="cyan")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold underline", leading=1)
    for name in names:
        table.add_column(
            name, justify="right" if name == "claims_bytes" else "left", overflow="fold", no_wrap=name == "user_id"
        )
    for user_id, private, public, unsafe, claims_bytes in rows:
        kinds = ("null" if kind is None else _shortened(json.dumps(kind)) for kind in (private, public, unsafe))
        table.add_row(user_id, *kinds, str(claims_bytes))
    console.print(table)
    console.print(
        "\nnull: the session token carries it. Ada's claims are over its 1,200 bytes, so her public metadata was"
        " copied. Bob's late update changed nothing. Eve was deleted, and the replay didn't bring her back."
        " Nobody delivered that Zoe is there, or that Dan is gone: Clerk's API told."
    )


def _shortened(text: str, most: int = 45) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _program() -> str:
    """How this program was called, as short as another terminal in the same folder takes it."""
    path = Path(sys.argv[0]).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


@click.command()
@port_option
@data_dir_option
@click.option("--once", is_flag=True, help="Stop after the demonstration: exit 0, or 1 where a row is wrong.")
@click.option(
    "--info",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the running system's addresses, passwords included, to this file (JSON, mode 0600).",
)
def demo(*, port: int, data_dir: Path, once: bool, info: Path | None) -> None:
    """Run the whole system and show what it does with signed events, and with what no event told.

    Uses real servers and the very commands of the Procfile, as `clerk-sync up` does, and goes on serving until
    Ctrl-C.
    """
    info = info or data_dir / "info.json"

    def demonstrate_it(running: Info) -> int | None:
        try:
            right = demonstrate(running, Console())
        except (SyncError, psycopg.Error) as error:
            click.echo(f"the demonstration failed: {error}", err=True)
            right = False
        if once or not right:
            return 0 if right else 1
        announce(running, data_dir, info)
        program = _program()
        click.echo(
            "In another terminal:\n"
            f"  {program} status --info {info}\n"
            f"  {program} events list --info {info}\n"
            f"  {program} send EVENT.json --info {info}\n"
        )
        return None

    data_dir.mkdir(parents=True, exist_ok=True)
    # Where a key is set, the system would find by itself that the real Clerk doesn't know the demonstration's users.
    sys.exit(serve(port, data_dir, info, demonstrate_it, overrides={"RECONCILE_SECONDS": "0"}))
