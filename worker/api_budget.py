"""The calls to Clerk's API, `clerk.api_budget`: one rate for all processes, so that none takes what others need.

Clerk allows a number of calls in 10 seconds to an instance. We book a share of it and leave the rest to the
application, whose own calls count as well.
"""

from __future__ import annotations

import hashlib
from typing import Final

from worker.db import Connection

WINDOW_SECONDS: Final = 10
"""What Clerk counts calls in: https://clerk.com/docs/guides/how-clerk-works/system-limits"""

_LIVE, _TEST = 1000, 100


def key_id(secret_key: str) -> str:
    """What a secret key is known by in the database: a hash."""
    return hashlib.sha256(b"clerk-sync " + secret_key.encode()).hexdigest()[:32]


def allowed_calls(secret_key: str, share: float) -> int:
    """How many calls in any WINDOW_SECONDS are ours, with that share of what Clerk allows to this key."""
    limit = _LIVE if secret_key.startswith("sk_live_") else _TEST
    # 100 * 0.29 is a little less than 29.
    return max(1, int(limit * share + 1e-6))


class ApiBudget:
    """Books calls. The connection is in autocommit and used for nothing else: within a transaction a booking would
    hold up everybody until the commit. Database errors are raised: no call without a booking."""

    def __init__(self, connection: Connection, secret_key: str, share: float) -> None:
        self._connection = connection
        self._instance = key_id(secret_key)
        self._allowed = allowed_calls(secret_key, share)

    def take(self) -> float:
        """Book a call and give 0.0, or book nothing and give the seconds after which to ask again."""
        return book(self._connection, self._instance, self._allowed)

    def block(self, seconds: float) -> None:
        """Keep every process from calling for that long from now (an hour at most); a longer block stays."""
        block(self._connection, self._instance, seconds)


BOOK = """
select clerk.book_api_call(%(instance)s, %(allowed)s)
"""


def book(connection: Connection, instance: str, allowed: int) -> float:
    """Book one call of those allowed in any WINDOW_SECONDS: 0.0, or the seconds after which to ask again."""
    ((seconds,),) = connection.execute(BOOK, {"instance": instance, "allowed": allowed}).fetchall()
    return float(seconds)


BLOCK = """
select clerk.block_api_calls(%(instance)s, %(seconds)s)
"""


def block(connection: Connection, instance: str, seconds: float) -> None:
    """Keep everybody from calling for some seconds."""
    connection.execute(BLOCK, {"instance": instance, "seconds": seconds})


KNOWN_BY = """
select known_by from clerk.api_budget where instance = %(instance)s
"""


def known_by(connection: Connection, instance: str) -> str | None:
    """What shows that this key is that of our instance: `webhooks` told of users whom Clerk knows by it, or, which is
    weaker, those here were only `pulls`. None where nothing does yet."""
    row = connection.execute(KNOWN_BY, {"instance": instance}).fetchone()
    return None if row is None else row[0]


CONFIRM = """
insert into clerk.api_budget (instance, known_by) values (%(instance)s, %(known_by)s)
on conflict (instance) do update set known_by = excluded.known_by
"""


def confirm(connection: Connection, instance: str, known_by: str) -> None:
    """Note what shows that this key is that of our instance."""
    connection.execute(CONFIRM, {"instance": instance, "known_by": known_by})
