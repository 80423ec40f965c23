"""The use case: pull every user from Clerk's API, page by page, beside live events.

A page's users and the run's place are committed together, so a run that was cut short goes on where it was.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Final, TypeVar

import psycopg

from worker import runs
from worker.clerk_api import MOST_USERS, ClerkApi, is_user_id
from worker.db import Connection, deadline, describe
from worker.errors import ClerkRefused, SyncError
from worker.events import PROFILE, Unusable, UserChanged, parse_user
from worker.policy import Policy
from worker.pulled import SECONDS, pass_users

T = TypeVar("T")

KIND: Final = "backfill"

COUNTERS: Final = {"applied": "applied", "unchanged": "unchanged", "older": "older", "deleted": "tombstoned"}
"""The gate's outcomes, as a run counts them."""

LAST_ONES: Final = 10
"""Of how many users at the end of a page the time counts where its last ones are deleted."""

_CREATED_AT: Final = PROFILE.index("created_at")


# --- The pages


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the list of users: `last` was the last one seen, `after` the one before, and `created_at` (ms) is not
    after that of either.

    A page is asked for after `after`, so that `last` stands in it and shows that it is the right one: to a cursor whose
    user was deleted, the answer could be anything, an empty page too.
    """

    after: str
    last: str
    created_at: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """The users of one page that none before had, the place behind them, and whether the list ends there."""

    changed: tuple[UserChanged, ...]
    unusable: tuple[Unusable, ...]
    cursor: Cursor | None
    ended: bool


@dataclass(frozen=True, slots=True)
class _Page:
    raw: tuple[bytes, ...]
    users: tuple[UserChanged | Unusable, ...]

    @property
    def ids(self) -> list[str]:
        return [user.user_id for user in self.users if user.user_id is not None]


def read(api: ClerkApi, cursor: Cursor | None) -> Iterator[Batch]:
    """Every user from a place on, oldest first. Raises what ClerkApi does, and SyncError for a page that can't be."""
    seen: set[str | bytes] = set() if cursor is None else {cursor.last}
    ended = False
    while not ended:
        page = _ask(api) if cursor is None else _next(api, cursor)
        ended = len(page.raw) < MOST_USERS
        if page.raw:
            cursor = _behind(page, cursor, ended=ended)
        names = [user.user_id or raw for raw, user in zip(page.raw, page.users, strict=True)]
        new = [user for name, user in zip(names, page.users, strict=True) if name not in seen]
        seen = set(names)
        yield Batch(
            tuple(user for user in new if isinstance(user, UserChanged)),
            tuple(user for user in new if isinstance(user, Unusable)),
            cursor,
            ended,
        )


def _next(api: ClerkApi, cursor: Cursor) -> _Page:
    """The page behind a place; where the users who mark it were deleted, by the time at which they were created."""
    try:
        page = _ask(api, starting_after=cursor.after)
    except ClerkRefused as error:
        if error.status not in (404, 422) or cursor.after in _existing(api, cursor):
            raise
        return _since(api, cursor)
    # After a cursor that isn't heeded comes the first page again.
    wrong = cursor.after in page.ids
    if not wrong and (cursor.last == cursor.after or cursor.last not in page.ids):
        existing = _existing(api, cursor)
        if cursor.after not in existing:
            return _since(api, cursor)
        wrong = cursor.last != cursor.after and cursor.last in existing
    if wrong:
        raise SyncError("Clerk's API gave another page than the one that was asked for")
    return page


def _since(api: ClerkApi, cursor: Cursor) -> _Page:
    """The page by time. Without any, from the beginning: to see users twice does no harm."""
    return _ask(api, created_after=None if cursor.created_at is None else cursor.created_at - 1)


def _existing(api: ClerkApi, cursor: Cursor) -> set[str]:
    """Which of a place's users Clerk has now. Who exists after an answer existed before it: ids aren't used again."""
    asked = [user_id for user_id in dict.fromkeys((cursor.after, cursor.last)) if is_user_id(user_id)]
    if not asked:
        return set()
    return set(_parsed(api.users(order_by="+created_at", user_ids=asked).users, None).ids)


def _ask(api: ClerkApi, *, starting_after: str | None = None, created_after: int | None = None) -> _Page:
    page = api.users(
        order_by="+created_at",
        limit=MOST_USERS,
        starting_after=starting_after,
        created_after=created_after,
    )
    return _parsed(page.users, page.read_at)


def _parsed(raw: tuple[bytes, ...], read_at: int | None) -> _Page:
    return _Page(raw, tuple(parse_user(text, read_at) for text in raw))


def _behind(page: _Page, before: Cursor | None, *, ended: bool) -> Cursor | None:
    """The place behind a page."""
    ids = page.ids
    if not ids:
        if ended:
            return before
        raise SyncError(f"Clerk's API gave {len(page.raw)} users, and no id of them can be read: no way to go on")
    # The least of the last ones: were a time wrong, users would be seen again, and none be missed.
    times = [time for time in map(_created_at, page.users[-LAST_ONES:]) if time is not None]
    created_at = min(times) if times else None if before is None else before.created_at
    return Cursor(ids[-2] if len(ids) > 1 else ids[-1], ids[-1], created_at)


def _created_at(user: UserChanged | Unusable) -> int | None:
    if isinstance(user, Unusable):
        return None
    text = user.profile[_CREATED_AT]
    return int(text) if text.isdigit() and len(text) < 16 else None


_END: Final = object()


@contextlib.contextmanager
def ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """The same items, of which the next one is made in another thread while one is used.

    The thread ends with the items, or with the item that is being made when the block ends: that one is waited for, but
    not for long.
    """
    made: queue.Queue[object] = queue.Queue(1)
    stop = threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.put(item)
                if stop.is_set():
                    return
            made.put(_END)
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            made.put(error)

    def take() -> Iterator[T]:
        while (item := made.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):
            made.get_nowait()  # a thread that waits to put goes on, and ends
        thread.join(1)


# --- The run


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; `total` is how many users Clerk had when it began or went on, `before` how many users the run
    had been through by then."""

    run: runs.Run
    total: int
    before: int


def backfill(
    connection: Connection,
    policy: Policy,
    api: ClerkApi,
    *,
    restart: bool = False,
    observe: Callable[[Progress], None] = lambda _: None,
) -> runs.Run:
    """Pull every user, or go on with the last run where it was cut short, unless it is to `restart`.

    `observe` is called at the start and after each page's commit. Raises SyncError where another backfill runs, what
    ClerkApi does, and psycopg.Error: then the next call goes on.
    """
    with runs.alone(connection, KIND):
        earlier = api.calls
        total = api.count()  # first, so that a wrong key leaves no run behind
        run = runs.latest(connection, KIND)
        if run is None or run.state == "done" or restart:
            run = runs.begin(connection, KIND)
        else:
            runs.go_on(connection, run)
        progress = Progress(run, total, run.users)
        observe(progress)
        calls = run.calls - earlier
        cursor = None if run.cursor is None else Cursor(**run.cursor)
        try:
            with ahead(read(api, cursor)) as batches:
                for batch in batches:
                    run.calls = calls + api.calls
                    _apply(connection, policy, run, batch)
                    observe(progress)
        except BaseException as error:
            run.calls = calls + api.calls
            with contextlib.suppress(psycopg.Error):
                runs.fail(connection, run, _reason(error))
            raise
    return run


def _apply(connection: Connection, policy: Policy, run: runs.Run, batch: Batch) -> None:
    """Pass a page through the gate and save the place behind it, in one transaction."""
    with deadline(connection, SECONDS), connection.transaction():
        passed = pass_users(connection, policy, batch.changed)
        run.counters.update(COUNTERS[outcome] for outcome in passed.outcomes.values())
        for unusable in (*batch.unusable, *passed.refused):
            run.note(unusable)
        run.cursor = None if batch.cursor is None else asdict(batch.cursor)
        run.state = "done" if batch.ended else "running"
        runs.save(connection, run)


def _reason(error: BaseException) -> str:
    if isinstance(error, psycopg.Error):
        return f"Postgres failed: {describe(error)}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, SyncError) else type(error).__name__
