"""Inserts events, each with a commit of its own, over some connections: a process of its own, which `limits` starts."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import psycopg

from bench.population import MADE_AT, SHAPES, body, user_id

INSERT = """
insert into inbox_alone (svix_id, sent_at, type, user_id, version, body)
values (%s, now(), 'user.updated', %s, %s, %b)
"""


def main() -> None:
    """Given connections and seconds: says that it is ready, begins when told to, and says how many it inserted."""
    writers, seconds = int(sys.argv[1]), float(sys.argv[2])
    bodies = [body(number, MADE_AT, 0) for number in range(SHAPES)]
    counts = [0] * writers
    with ExitStack() as stack:
        connections = [
            stack.enter_context(psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)) for _ in range(writers)
        ]
        print("ready", flush=True)  # noqa: T201 - heard by who started it
        sys.stdin.readline()
        until = time.monotonic() + seconds

        def write(writer: int) -> None:
            counts[writer] = _write(connections[writer], writer, bodies, until)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(sum(counts), flush=True)  # noqa: T201


def _write(connection: psycopg.Connection[Any], writer: int, bodies: Sequence[bytes], until: float) -> int:
    count = 0
    while time.monotonic() < until:
        number = count % SHAPES
        svix_id = f"msg_2b{os.getpid():010d}{writer:03d}{count:012d}"
        connection.execute(INSERT, (svix_id, user_id(number), MADE_AT, bodies[number]))
        count += 1
    return count
