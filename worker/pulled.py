"""Users that were pulled from Clerk's API: how they stand here, and their way through the gate. Together, and where
Postgres refuses one of them, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from worker import users
from worker.db import ROWS_FAULT, Connection, deadline, describe
from worker.events import Unusable, UserChanged
from worker.policy import Policy
from worker.users import Change, Crossing

T = TypeVar("T")

SECONDS: Final = 60.0
"""Who takes longer has lost its Postgres."""


@dataclass(slots=True)
class Passed:
    """What the gate made of each user (applied, unchanged, older or deleted), who crossed the budget, and whom Postgres
    refuses."""

    outcomes: dict[str, str] = field(default_factory=dict)
    crossings: list[Crossing] = field(default_factory=list)
    refused: list[Unusable] = field(default_factory=list)


def pass_users(connection: Connection, policy: Policy, changes: Sequence[Change]) -> Passed:
    """Pass users through the gate, in one transaction or within the caller's; the caller warns of crossings after the
    commit. Raises psycopg.Error where Postgres can't do it now; then nothing has changed."""
    passed = Passed()

    def some(batch: Sequence[Change]) -> None:
        gated = users.gate_users(connection, policy, batch)
        passed.outcomes |= gated.by_user
        passed.crossings += gated.crossings

    # In the order in which everybody locks.
    changes = sorted(changes, key=lambda change: change.user.user_id)
    passed.refused = _each(connection, changes, lambda change: change.user.user_id, some)
    return passed


def compare(
    connection: Connection, policy: Policy, changed: Sequence[UserChanged]
) -> tuple[dict[str, str], list[Unusable]]:
    """How users stand here, as `users.compare` says it, and those whom Postgres could never hold."""
    differences: dict[str, str] = {}

    def some(batch: Sequence[UserChanged]) -> None:
        differences.update(users.compare(connection, policy, batch))

    refused = _each(connection, changed, lambda user: user.user_id, some)
    return differences, refused


def _each(
    connection: Connection, items: Sequence[T], name: Callable[[T], str], do: Callable[[Sequence[T]], None]
) -> list[Unusable]:
    """Do something with all items at once; where one of them can't be, with each by itself: gives those."""
    if not items:
        return []
    with deadline(connection, SECONDS), connection.transaction():
        try:
            with connection.transaction():
                do(items)
        except ROWS_FAULT:
            pass
        else:
            return []
        refused = []
        for item in items:
            try:
                with connection.transaction():
                    do([item])
            except ROWS_FAULT as error:
                refused.append(Unusable(None, name(item), f"Postgres refuses it: {describe(error)}"))
        return refused
