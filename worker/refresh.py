"""The use case: bring single users up to date from Clerk's API, and erase those that Clerk no longer has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from worker import users
from worker.clerk_api import MOST_IDS, ClerkApi, is_user_id
from worker.db import Connection
from worker.errors import ConfigError, SyncError
from worker.events import Unusable, UserChanged, UserDeleted, parse_user
from worker.policy import Policy
from worker.pulled import pass_users


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a user: applied, unchanged, older or deleted (there was a tombstone) by the gate; erased now,
    since Clerk has no such user; or unusable, for that reason."""

    user_id: str
    outcome: str
    reason: str | None = None


@dataclass(slots=True)
class _Answer:
    """What Clerk said of users who were asked for by their ids."""

    read_at: int | None = None
    changed: list[UserChanged] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def refresh_users(
    connection: Connection, policy: Policy, api: ClerkApi, user_ids: Iterable[str]
) -> Iterator[list[Result]]:
    """Refresh these users, each once: what became of them, a hundred at most at a time, after their commit.

    Raises what ClerkApi does, and psycopg.Error; what has been given by then stays.
    """
    remaining = iter(dict.fromkeys(user_ids))
    while batch := list(islice(remaining, MOST_IDS)):
        yield _settle(connection, policy, batch, _ask(api, batch))


def refresh_missing(connection: Connection, policy: Policy, api: ClerkApi) -> Iterator[list[Result]]:
    """Refresh every user of whom a kind of metadata is to be kept that only Clerk has.

    Nobody named these users, so before the first one is erased, Clerk must be seen to know any user of ours: with the
    key of another instance it would know none. Raises ConfigError where it doesn't.
    """
    after = ""
    ours = False
    while batch := users.missing(connection, after, MOST_IDS):
        answer = _ask(api, batch)
        ours = ours or bool(answer.changed)
        if answer.gone and not ours:
            _check_instance(connection, api)
            ours = True
        yield _settle(connection, policy, batch, answer)
        after = batch[-1]


def _check_instance(connection: Connection, api: ClerkApi) -> None:
    some = [user_id for user_id in users.others(connection, MOST_IDS) if is_user_id(user_id)]
    if not some or not _ask(api, some).changed:
        raise ConfigError(
            "CLERK_SECRET_KEY: Clerk knows none of our users that it was asked for, so the key may be that of another "
            "instance. Nobody was erased. Users that are gone indeed: clerk-sync refresh USER..."
        )


def _ask(api: ClerkApi, user_ids: Sequence[str]) -> _Answer:
    """One call, or a few more where an answer holds somebody whose id can't be read: nobody is taken to be gone who
    may be that one."""
    answer = _Answer()
    asked = []
    for user_id in user_ids:
        if is_user_id(user_id):
            asked.append(user_id)
        else:
            answer.unusable.append(Unusable(None, user_id, "no id that Clerk could be asked for"))
    if not asked:
        return answer
    page = api.users(order_by="-created_at", user_ids=asked)
    answer.read_at = page.read_at
    found: set[str] = set()
    nameless: list[Unusable] = []
    for user in (parse_user(text, page.read_at) for text in page.users):
        if user.user_id is None:
            assert isinstance(user, Unusable)  # noqa: S101 - a changed user has an id
            nameless.append(user)
            continue
        found.add(user.user_id)
        (answer.unusable if isinstance(user, Unusable) else answer.changed).append(user)  # type: ignore[arg-type]
    if not found <= set(asked):
        raise SyncError("Clerk's API answered with users that weren't asked for: nothing of it was used")
    rest = [user_id for user_id in asked if user_id not in found]
    if not nameless:
        answer.gone = rest
    elif len(asked) == 1:
        answer.unusable += [Unusable(None, user_id, nameless[0].reason) for user_id in rest]
    else:
        middle = (len(rest) + 1) // 2
        for half in filter(None, (rest[:middle], rest[middle:])):
            again = _ask(api, half)
            answer.changed += again.changed
            answer.unusable += again.unusable
            answer.gone += again.gone
    return answer


NOW = """
select (extract(epoch from clock_timestamp()) * 1000)::bigint
"""


def _now(connection: Connection) -> int:
    """The time by the database's clock, in milliseconds since 1970."""
    ((now,),) = connection.execute(NOW).fetchall()
    return int(now)


def _settle(connection: Connection, policy: Policy, batch: Sequence[str], answer: _Answer) -> list[Result]:
    """Pass the users through the gate, then erase those that are gone, each in a transaction of its own: both lock in
    the order of ids, and so would not one after the other."""
    passed = pass_users(connection, policy, answer.changed)
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
    return [results[user_id] for user_id in batch]
