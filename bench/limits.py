"""What this machine and these servers can do at most: each step that every receiver must take, alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from rich.table import Table
from svix.webhooks import Webhook

from bench import databases
from bench.contenders import ROOT
from bench.population import MADE_AT, SHAPES, body
from bench.report import Check, spread, table
from bench.servers import Servers

PROCESSES: Final = 2
"""As many as our receiver has."""

Tell = Callable[[str], None]
"""What is being measured, as each part of it begins."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured. The defaults take half a minute."""

    rounds: int = 2
    seconds: float = 2.0
    """Of each."""
    writers: tuple[int, ...] = (2, 4, 16)
    """Connections that insert, over two processes. Our receiver has two, one for each process."""


SHORT: Final = Options(rounds=1, seconds=0.2, writers=(2,))
"""Everything once: it works."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How often one step was taken, in one round."""

    what: str
    round: int
    a_second: float


def run(servers: Servers, options: Options, tell: Tell) -> list[Limit]:
    """Measure each in turns."""
    found: list[Limit] = []
    for number in range(options.rounds):
        tell("limits: signature check alone")
        checks_a_second = verified(servers.signing_secret, options.seconds)
        found.append(Limit("signature check alone, one process", number, checks_a_second))
        for writers in options.writers:
            tell(f"limits: insert and commit alone, {writers} connections")
            what = f"insert and commit alone, {writers} connections of {PROCESSES} processes"
            found.append(Limit(what, number, inserted(servers, writers, options.seconds)))
    return found


def steps(options: Options) -> int:
    """How often `run` tells."""
    return options.rounds * (1 + len(options.writers))


# --- Signatures


def verified(secret: str, seconds: float) -> float:
    """How many bodies a second Svix's library verifies, in one thread."""
    webhook = Webhook(secret)
    now = datetime.now(UTC)
    signed = []
    for number in range(SHAPES):
        text, svix_id = body(number, MADE_AT, 0).decode(), f"msg_2b{number:025d}"
        headers = {
            "svix-id": svix_id,
            "svix-timestamp": str(int(now.timestamp())),
            "svix-signature": webhook.sign(svix_id, now, text),
        }
        signed.append((text, headers))
    count, began = 0, time.perf_counter()
    while (lasted := time.perf_counter() - began) < seconds:
        text, headers = signed[count % SHAPES]
        webhook.verify(text, headers)
        count += 1
    return count / lasted


# --- Inserts

# Columns and indexes as the inbox has them, whatever those are.
INBOX = """
drop table if exists inbox_alone;
create table inbox_alone (like clerk.webhook_events including all)
"""


def inserted(servers: Servers, writers: int, seconds: float) -> float:
    """How many events a second so many connections insert and commit, one event at a time."""
    database = databases.ready_inbox(servers)
    with servers.connect(database) as connection:
        connection.execute(INBOX)
        connection.execute("checkpoint")
    command = [sys.executable, "-c", "from bench.inserter import main; main()", str(writers // PROCESSES), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": servers.database_url(database)}
    with ExitStack() as stack:
        started = [stack.enter_context(_process(command, environment)) for _ in range(PROCESSES)]
        for process in started:
            _line(process)
        for process in started:
            _begin(process)
        return sum(int(_line(process)) for process in started) / seconds


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the end of a `with` block if it still runs."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _begin(process: subprocess.Popen[str]) -> None:
    if process.stdin:
        process.stdin.write("begin\n")
        process.stdin.flush()


def _line(process: subprocess.Popen[str]) -> str:
    said = process.stdout.readline() if process.stdout else ""
    if not said:
        raise RuntimeError("a process that inserts has ended: its error stands above")
    return said


# --- What is shown


def tables(found: Sequence[Limit]) -> list[Table]:
    """One row for each."""
    what = dict.fromkeys(limit.what for limit in found)
    rows = [(name, spread(limit.a_second for limit in found if limit.what == name)) for name in what]
    return [table("At most, here", ("", "a second"), rows)]


def checks(_: Sequence[Limit]) -> list[Check]:
    """None: these are what others are held against."""
    return []
