"""Every user of Clerk's, page by page in the order in which they were created, the next page read while one is used."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from worker.clerk_api import CLOCKS_APART_MS, MOST_USERS, ClerkApi, is_user_id
from worker.errors import ClerkRefused, SyncError
from worker.events import PROFILE, Unusable, UserChanged, parse_user

T = TypeVar("T")

LAST_ONES: Final = 10
"""Of how many users at the end of a page the time counts where its last ones are deleted."""

_CREATED_AT: Final = PROFILE.index("created_at")


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
    """The users of one page that none before had, the place behind them, whether the list ends there, and when Clerk
    answered (ms), where it tells."""

    changed: tuple[UserChanged, ...]
    unusable: tuple[Unusable, ...]
    cursor: Cursor | None
    ended: bool
    read_at: int | None

    @property
    def updated_before(self) -> int | None:
        """Whoever was updated before this is here as they were then."""
        return None if self.read_at is None else self.read_at - CLOCKS_APART_MS


@dataclass(frozen=True, slots=True)
class _Page:
    raw: tuple[bytes, ...]
    users: tuple[UserChanged | Unusable, ...]
    read_at: int | None

    @property
    def ids(self) -> list[str]:
        return [user.user_id for user in self.users if user.user_id is not None]


def read(api: ClerkApi, cursor: Cursor | None, total: int, seen: int = 0) -> Iterator[Batch]:
    """Every user from a place on, oldest first; `total` is how many Clerk counts, `seen` how many are before the place.

    The list ends with a page that is short; where it seems to end too soon, only with one that brings nobody. Raises
    what ClerkApi does, and SyncError for a page that can't be, or a list that ends far too soon.
    """
    before: set[str | bytes] = set() if cursor is None else {cursor.last}
    ended = False
    while not ended:
        page = _ask(api) if cursor is None else _next(api, cursor)
        short = len(page.raw) < MOST_USERS
        if page.raw:
            cursor = _behind(page, cursor, ended=short)
        names = [user.user_id or raw for raw, user in zip(page.raw, page.users, strict=True)]
        new = [user for name, user in zip(names, page.users, strict=True) if name not in before]
        before = before | set(names) if short else set(names)
        seen += len(new)
        ended = short and (seen >= total or not new)
        if ended and too_few(seen, total, api, slack=0.01):
            raise SyncError(f"Clerk counts {total:,} users, and its list ends after {seen:,}: it isn't whole")
        yield Batch(
            tuple(user for user in new if isinstance(user, UserChanged)),
            tuple(user for user in new if isinstance(user, Unusable)),
            cursor,
            ended,
            page.read_at,
        )


def too_few(seen: int, total: int, api: ClerkApi, *, slack: float) -> bool:
    """Whether so many can't be the whole list: Clerk counted `total` before it, and counts more after it too. Of those
    some may have signed up since; whoever was deleted meanwhile isn't among them."""

    def few(counted: int) -> bool:
        return seen < counted * (1 - slack) - LAST_ONES

    return few(total) and few(api.count())


def _next(api: ClerkApi, cursor: Cursor) -> _Page:
    """The page behind a place; where the users who mark it were deleted, by the time at which they were created."""
    try:
        page = _ask(api, starting_after=cursor.after)
    except ClerkRefused:
        if cursor.after in _existing(api, cursor):
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
    return _Page(raw, tuple(parse_user(text, read_at) for text in raw), read_at)


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
