"""`clerk-sync demo`: the system as it is deployed, fed with a handful of signed events."""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Final

import click
import psycopg
from rich.console import Console
from rich.table import Table

from worker import db
from worker.cli.send import post
from worker.cli.up import Info, announce, data_dir_option, port_option, serve
from worker.errors import SyncError

APPLIED_WITHIN_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Step:
    """One delivery of the demonstration, with what the endpoint may answer."""

    title: str
    svix_id: str
    body: dict[str, Any]
    answers: tuple[str, ...] = ("accepted",)


def users(run: str) -> tuple[str, str, str]:
    """The ids of the three users; `run` keeps one demonstration apart from the next."""
    return f"user_ada_{run}", f"user_bob_{run}", f"user_eve_{run}"


BIOGRAPHY: Final = "Wrote the first program. " * 50
"""More than the session token can carry."""


def steps(run: str, now_ms: int) -> list[Step]:
    """The deliveries of one demonstration; `now_ms` is Clerk's clock in them."""
    ada, bob, eve = users(run)

    def changed(kind: str, user: str, after_ms: int, **metadata: Any) -> dict[str, Any]:
        kinds: dict[str, Any] = {"public_metadata": {}, "private_metadata": {}, "unsafe_metadata": {}}
        data = {"id": user, "object": "user", "updated_at": now_ms + after_ms, **kinds, **metadata}
        return {"type": kind, "object": "event", "timestamp": now_ms + after_ms + 15, "data": data}

    signed_up = changed("user.created", ada, 0, private_metadata={"plan": "free"}, public_metadata={"role": "member"})
    oversize = changed(
        "user.updated",
        ada,
        1000,
        private_metadata={"plan": "pro", "credits": 9007199254740993},
        public_metadata={"role": "admin", "biography": BIOGRAPHY},
    )
    newer = changed("user.updated", bob, 2000, private_metadata={"plan": "team"}, unsafe_metadata={"theme": "dark"})
    older = changed("user.updated", bob, 1000, private_metadata={"plan": "free"})
    doomed = changed("user.created", eve, 0, private_metadata={"plan": "free"})
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


READ = """
select user_id, private_metadata, public_metadata, unsafe_metadata, claims_bytes
from clerk.user_metadata
where user_id = any(%(user_ids)s)
order by user_id
"""

Row = tuple[str, Any, Any, Any, int]


def wrong_rows(rows: list[Row], run: str) -> list[str]:
    """What isn't as it should be in the end; empty when all is well."""
    ada, bob, eve = users(run)
    found = {row[0]: row[1:4] for row in rows}
    expected: dict[str, tuple[Any, Any, Any] | None] = {
        ada: ({"plan": "pro", "credits": 9007199254740993}, {"role": "admin", "biography": BIOGRAPHY}, {}),
        bob: ({"plan": "team"}, None, None),
        eve: None,
    }
    return [f"{user} is not as it should be" for user, row in expected.items() if found.get(user) != row]


PENDING = "select count(*) from clerk.webhook_events where state = 'pending'"


def demonstrate(running: Info, console: Console) -> bool:
    """Send the events to a running system and show the rows; False where something isn't as it should be."""
    run = secrets.token_hex(3)
    console.print("\n[bold]Eight deliveries, signed as Svix signs them[/]")
    answered = True
    for step in steps(run, int(time.time() * 1000)):
        response = post(running.url, running.signing_secret, step.svix_id, json.dumps(step.body).encode())
        status = response.json().get("status")
        right = response.is_success and status in step.answers
        answered = answered and right
        mark = "[green]" if right else "[red]"
        console.print(f"  {mark}{response.status_code} {status!s:<10}[/] {step.title}")
    with db.connect(running.database_url, "demo") as connection:
        rows = _settled(connection, run)
    _show(console, rows)
    problems = wrong_rows(rows, run)
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    return answered and not problems


def _settled(connection: db.Connection, run: str) -> list[Row]:
    """The rows, once nothing is pending."""
    limit = time.monotonic() + APPLIED_WITHIN_SECONDS
    pause = Event()
    while time.monotonic() < limit:
        (pending,) = connection.execute(PENDING).fetchone() or (0,)
        if not pending:
            break
        pause.wait(0.02)
    return connection.execute(READ, {"user_ids": list(users(run))}).fetchall()


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
    )


def _shortened(text: str, most: int = 45) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _program() -> str:
    """How this program was called, as short as another terminal in the same folder takes it."""
    path = Path(sys.argv[0])
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
    """Run the whole system and show what it does with eight signed events.

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
    sys.exit(serve(port, data_dir, info, demonstrate_it))
