"""The users, `clerk.users` and what is copied of them: every write goes through the gate in the database,
`clerk.gate_users` and `clerk.gate_deletions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.claims import Weights
from worker.db import Connection
from worker.events import UserChanged, UserDeleted
from worker.policy import Decision


@dataclass(frozen=True, slots=True)
class Change:
    """A user as Clerk had it, with what it weighs and what of it is copied."""

    user: UserChanged
    weights: Weights
    decision: Decision


GATE_USERS = """
select outcome from clerk.gate_users(
  %(user_id)b::text[], %(version)b::bigint[], %(event_at)b::bigint[],
  %(private)b::text[]::jsonb[], %(public)b::text[]::jsonb[], %(unsafe)b::text[]::jsonb[],
  %(copy_private)b::bool[], %(copy_public)b::bool[], %(copy_unsafe)b::bool[],
  %(public_bytes)b::int[], %(unsafe_bytes)b::int[], %(claims_bytes)b::int[]
)
"""


def gate_users(connection: Connection, changes: Iterable[Change]) -> list[str]:
    """Pass users through the gate; the outcomes are applied, unchanged, older or deleted.

    Several changes of one user pass one after the other, in the order given. Raises psycopg.DataError where a value
    can't be held; then, within a transaction, none of them has passed.
    """
    outcomes: list[str] = []
    rest = list(changes)
    while rest:
        # The gate takes a user once: what is left of users with several changes goes in the next round.
        first = {change.user.user_id: change for change in reversed(rest)}
        rest = [change for change in rest if first[change.user.user_id] is not change]
        batch = list(first.values())
        rows = connection.execute(
            GATE_USERS,
            {
                "user_id": [change.user.user_id for change in batch],
                "version": [change.user.version for change in batch],
                "event_at": [change.user.event_at for change in batch],
                "private": [_text(change.user.private_metadata) for change in batch],
                "public": [_text(change.user.public_metadata) for change in batch],
                "unsafe": [_text(change.user.unsafe_metadata) for change in batch],
                "copy_private": [change.decision.private for change in batch],
                "copy_public": [change.decision.public for change in batch],
                "copy_unsafe": [change.decision.unsafe for change in batch],
                "public_bytes": [change.weights.public_bytes for change in batch],
                "unsafe_bytes": [change.weights.unsafe_bytes for change in batch],
                "claims_bytes": [change.weights.claims_bytes for change in batch],
            },
        )
        outcomes += [outcome for (outcome,) in rows]
    return outcomes


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


GATE_DELETIONS = """
select outcome from clerk.gate_deletions(%(user_id)b::text[], %(event_at)b::bigint[])
"""


def gate_deletions(connection: Connection, deletions: Sequence[UserDeleted]) -> list[str]:
    """Leave tombstones and erase what is kept of these users (each once); the outcomes are deleted or unchanged."""
    if not deletions:
        return []
    rows = connection.execute(
        GATE_DELETIONS,
        {
            "user_id": [deletion.user_id for deletion in deletions],
            "event_at": [deletion.event_at for deletion in deletions],
        },
    )
    return [outcome for (outcome,) in rows]
