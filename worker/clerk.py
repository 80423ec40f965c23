"""Our way to Clerk: its API within the shared budget, made sure to be that of the instance whose users are here, and
users looked up by their ids."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from worker import api_budget, users
from worker.api_budget import ApiBudget
from worker.clerk_api import CLOCKS_APART_MS, MOST_IDS, ClerkApi, is_user_id
from worker.db import Connection
from worker.errors import ConfigError, SyncError
from worker.events import RESERVED, Unusable, UserChanged, parse_user
from worker.settings import Settings

EXAMPLES: Final = frozenset({"user_29w83sxmDNGwOuEthce5gg56FcC", "user_2g7np7Hrk0SN6kj5EDMLDaKNL0S"})
"""Users of the events that Clerk's Dashboard sends as examples. No instance has them."""

CONTROLS: Final = 5
"""How many users that Clerk should know are asked for beside those that may be gone."""

AGAIN_SECONDS: Final = 2.0
"""What differs from Clerk is looked at again after this long, since a webhook may be under way."""

FRESH_MS: Final = 2_000
"""A user updated so shortly before an answer may be missing in it without being gone."""


@contextlib.contextmanager
def reach(
    settings: Settings,
    connect: Callable[[], Connection],
    *,
    patience: float = 120.0,
    sleep: Callable[[float], object] = time.sleep,
    strict: bool = False,
) -> Iterator[tuple[Connection, ClerkApi]]:
    """A connection for the users, and Clerk's API with a key that is sure to be that of their instance.

    `patience` and `sleep` are those of ClerkApi, `strict` that of confirm_instance. Raises what both do, and
    psycopg.Error.
    """
    with connect() as connection, budgeted(settings, connect, patience=patience, sleep=sleep) as api:
        confirm_instance(connection, api, api_budget.key_id(settings.secret_key), strict=strict)
        yield connection, api


@contextlib.contextmanager
def budgeted(
    settings: Settings,
    connect: Callable[[], Connection],
    *,
    patience: float,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[ClerkApi]:
    """Clerk's API, whose calls are booked over a connection of their own. Raises psycopg.Error."""
    with connect() as booking:
        budget = ApiBudget(booking, settings.secret_key, settings.api_share)
        api = ClerkApi(
            settings.secret_key,
            settings.api_url,
            budget.take,
            on_retry_after=budget.block,
            patience_seconds=patience,
            sleep=sleep,
        )
        with contextlib.closing(api):
            yield api


def heard_of(connection: Connection) -> list[str]:
    """Some live users of whom webhooks told, without the Dashboard's examples."""
    return askable(users.heard_of(connection, MOST_IDS))


def confirm_instance(connection: Connection, api: ClerkApi, key: str, *, strict: bool) -> None:
    """Make sure that Clerk knows users of ours by this key; with that of another instance all of ours would seem to be
    deleted. Raises ConfigError where it knows none of those it is asked for.

    Asked once for each key, by users of whom webhooks told where there are any. Users who were pulled, maybe by this
    very key, prove less: where it is `strict`, the key is asked for again once there are others.
    """
    known_by = api_budget.known_by(connection, key)
    if known_by == "webhooks" or (known_by and not strict):
        return
    heard = heard_of(connection)
    if known_by and not heard:
        return
    some = heard or askable(users.some(connection, MOST_IDS))
    if some and not look_up(api, some).known:
        raise another_instance(some[0])
    api_budget.confirm(connection, key, "webhooks" if heard else "pulls")


def another_instance(user_id: str) -> ConfigError:
    """The error where Clerk knows none of our users, such as this one."""
    return ConfigError(
        "CLERK_SECRET_KEY: Clerk knows none of our users that it should know, so the key may be that of another "
        "instance. Nobody was erased. If it is the right one, and those users are gone indeed: clerk-sync erase USER, "
        f"such as {user_id}"
    )


def askable(user_ids: Iterable[str]) -> list[str]:
    """Those of these users whom Clerk can be asked for, and may have."""
    return [
        user_id
        for user_id in user_ids
        if is_user_id(user_id) and user_id not in EXAMPLES and not user_id.startswith(RESERVED)
    ]


@dataclass(slots=True)
class LookedUp:
    """What Clerk said of users who were asked for by their ids: as they are, unusable, or `gone`."""

    read_at: int | None = None
    changed: list[UserChanged] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    @property
    def known(self) -> set[str]:
        """Whom Clerk has."""
        return {user.user_id for user in self.changed} | {user.user_id or "" for user in self.unusable} - {""}


def look_up(api: ClerkApi, user_ids: Sequence[str]) -> LookedUp:
    """Ask for up to MOST_IDS users. One is gone only where everybody in the answer could be told apart: otherwise those
    who are left are asked for again in halves, and at last unusable."""
    answer = LookedUp()
    if not user_ids:
        return answer
    page = api.users(order_by="-created_at", limit=len(user_ids), user_ids=user_ids)
    answer.read_at = page.read_at
    nameless: list[Unusable] = []
    for user in (parse_user(text, page.read_at) for text in page.users):
        if isinstance(user, UserChanged):
            answer.changed.append(user)
        else:
            (nameless if user.user_id is None else answer.unusable).append(user)
    known = answer.known
    if not known <= set(user_ids):
        raise SyncError("Clerk's API answered with users that weren't asked for: nothing of it was used")
    rest = [user_id for user_id in user_ids if user_id not in known]
    if not nameless:
        answer.gone = rest
    elif len(user_ids) == 1:
        answer.unusable += [Unusable(None, user_id, nameless[0].reason) for user_id in rest]
    else:
        middle = (len(rest) + 1) // 2
        for half in (rest[:middle], rest[middle:]):
            again = look_up(api, half)
            answer.changed += again.changed
            answer.unusable += again.unusable
            answer.gone += again.gone
    return answer


def is_fresh(version: int, read_at: int | None) -> bool:
    """Whether a user of this version changed so shortly before an answer that it may not know of them yet."""
    return read_at is None or read_at - CLOCKS_APART_MS - FRESH_MS < version < read_at + CLOCKS_APART_MS


def look_up_beside(api: ClerkApi, user_ids: Sequence[str], controls: Sequence[str]) -> LookedUp:
    """Look up users beside CONTROLS others whom Clerk should know: an answer that lacks one of those, and then one of
    others, or that knows nobody, tells of nobody that they are gone. Raises SyncError for one."""
    others = [user_id for user_id in controls if user_id not in user_ids]
    controls = others[:CONTROLS]
    answer = look_up(api, [*user_ids, *controls])
    if set(answer.gone) & set(controls):
        # One of them may have been deleted meanwhile; or it is a short answer, which tells of nobody.
        controls = others[CONTROLS : 2 * CONTROLS] or controls
        answer = look_up(api, [*user_ids, *controls])
    if answer.gone and (not answer.known or set(answer.gone) & set(controls)):
        raise SyncError(
            "Clerk's API doesn't find users that it should know: nobody was erased on that word. If they are gone "
            "indeed: clerk-sync refresh USER..."
        )
    asked = set(user_ids)
    answer.changed = [user for user in answer.changed if user.user_id in asked]
    answer.unusable = [user for user in answer.unusable if user.user_id in asked]
    answer.gone = [user_id for user_id in answer.gone if user_id in asked]
    return answer
