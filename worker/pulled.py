"""Users that were pulled from Clerk's API, on their way through the gate: together, and where Postgres refuses one of
them, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from worker import users
from worker.db import ROWS_FAULT, Connection, deadline, describe
from worker.events import Unusable, UserChanged
from worker.policy import Policy

SECONDS = 60.0
"""Who takes longer has lost its Postgres."""


@dataclass(slots=True)
class Passed:
    """What the gate made of each user (applied, unchanged, older or deleted), and whom Postgres refuses."""

    outcomes: dict[str, str] = field(default_factory=dict)
    refused: list[Unusable] = field(default_factory=list)


def pass_users(connection: Connection, policy: Policy, changed: Sequence[UserChanged]) -> Passed:
    """Pass users through the gate, in one transaction or within the caller's. Raises psycopg.Error where Postgres
    can't do it now; then nothing has changed."""
    if not changed:
        return Passed()
    with deadline(connection, SECONDS), connection.transaction():
        try:
            with connection.transaction():
                return Passed(users.gate_users(connection, policy, changed).by_user)
        except ROWS_FAULT:
            return _one_by_one(connection, policy, changed)


def _one_by_one(connection: Connection, policy: Policy, changed: Sequence[UserChanged]) -> Passed:
    passed = Passed()
    for user in sorted(changed, key=lambda user: user.user_id):  # the order in which everybody locks
        try:
            with connection.transaction():
                passed.outcomes |= users.gate_users(connection, policy, [user]).by_user
        except ROWS_FAULT as error:
            passed.refused.append(Unusable(None, user.user_id, f"Postgres refuses it: {describe(error)}"))
    return passed
