"""The use case: bring single users up to date from Clerk's API, and erase those that Clerk no longer has."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from worker import users
from worker.clerk import AGAIN_SECONDS, CONTROLS, LookedUp, askable, is_fresh, look_up, look_up_beside
from worker.clerk_api import MOST_IDS, ClerkApi, is_user_id
from worker.db import Connection
from worker.events import Unusable, UserDeleted
from worker.policy import Policy
from worker.pulled import pass_users


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a user: applied, unchanged, older or deleted (there was a tombstone) by the gate; erased now,
    since Clerk has no such user; unknown, where it was not here either; or unusable, for that reason."""

    user_id: str
    outcome: str
    reason: str | None = None


def refresh_users(
    connection: Connection,
    policy: Policy,
    api: ClerkApi,
    user_ids: Iterable[str],
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[list[Result]]:
    """Refresh these users, each once: what became of them, a hundred at most at a time, after their commit.

    Who changed a moment ago and seems to be gone is asked for once more. Raises what ClerkApi does, and psycopg.Error;
    what has been given by then stays.
    """
    remaining = iter(dict.fromkeys(user_ids))
    while batch := list(islice(remaining, MOST_IDS)):
        answer = look_up(api, batch)
        versions = users.versions(connection, answer.gone)
        # Maybe somebody who signed up a moment ago: a tombstone would keep them out for ever.
        unknown = [Result(user_id, "unknown") for user_id in answer.gone if user_id not in versions]
        answer.gone = list(versions)
        fresh = [user_id for user_id, version in versions.items() if is_fresh(version, answer.read_at)]
        if fresh:
            sleep(AGAIN_SECONDS)
            again = look_up(api, fresh)
            answer.changed += again.changed
            answer.unusable += again.unusable
            answer.gone = [user_id for user_id in answer.gone if user_id not in again.known]
        results = settle(connection, policy, answer) + unknown
        yield sorted(results, key=lambda result: batch.index(result.user_id))


def refresh_missing(connection: Connection, policy: Policy, api: ClerkApi) -> Iterator[list[Result]]:
    """Refresh every user of whom a kind of metadata is to be kept that only Clerk has.

    Nobody named these users, so Clerk's word that one is gone counts only beside others whom it knows.
    """
    after = ""
    while batch := users.missing(connection, after, MOST_IDS - CONTROLS):
        asked = [user_id for user_id in batch if is_user_id(user_id)]
        answer = look_up_beside(api, asked, controls(connection, set(batch)))
        answer.unusable += [Unusable(None, user_id, UNASKABLE) for user_id in batch if not is_user_id(user_id)]
        yield sorted(settle(connection, policy, answer), key=lambda result: result.user_id)
        after = batch[-1]


UNASKABLE = "no id that Clerk could be asked for; if the user is gone: clerk-sync erase"


def controls(connection: Connection, but: Collection[str]) -> list[str]:
    """Users whom Clerk should know."""
    return [user_id for user_id in askable(users.some(connection, 3 * MOST_IDS)) if user_id not in but]


NOW = """
select (extract(epoch from clock_timestamp()) * 1000)::bigint
"""


def _now(connection: Connection) -> int:
    """The time by the database's clock, in milliseconds since 1970."""
    ((now,),) = connection.execute(NOW).fetchall()
    return int(now)


def settle(connection: Connection, policy: Policy, answer: LookedUp) -> list[Result]:
    """Pass the users of an answer through the gate, then erase those that are gone, each in a transaction of its own:
    both lock in the order of ids, and so would not one after the other."""
    passed = pass_users(connection, policy, [users.weigh(policy, user) for user in answer.changed])
    users.warn(passed.crossings, policy.budget)
    results = {user_id: Result(user_id, outcome) for user_id, outcome in passed.outcomes.items()}
    for unusable in (*answer.unusable, *passed.refused):
        user_id = unusable.user_id or ""
        results[user_id] = Result(user_id, "unusable", unusable.reason)
    if answer.gone:
        at = answer.read_at if (answer.read_at or 0) > 0 else None
        at = _now(connection) if at is None else at
        gone = sorted(answer.gone)
        outcomes = users.gate_deletions(connection, [UserDeleted(user_id, at) for user_id in gone])
        for user_id, outcome in zip(gone, outcomes, strict=True):
            results[user_id] = Result(user_id, "erased" if outcome == "deleted" else "deleted")
    return list(results.values())
