"""A stand-in for Clerk's Backend API on this machine's loopback: for tests, the demo, and trying things by hand.

It answers what is read of users, and merges metadata into them, over real HTTP, in Clerk's order, with Clerk's errors
and rate limit. What Clerk's documents leave open is said where it was decided. Nothing of the product's own pulling
code is used here.
https://clerk.com/docs/reference/backend-api
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import socketserver
import sys
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any, Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

import click

HOST: Final = "127.0.0.1"
LARGEST_PAGE: Final = 500
DEFAULT_PAGE: Final = 10
MOST_VALUES: Final = 100
"""How often a filter may be repeated."""

CALLS_KEPT: Final = 100_000

METADATA: Final = ("public_metadata", "private_metadata", "unsafe_metadata")

# A User as the API returns it, without what makes one user another. https://clerk.com/docs/reference/backend-api
BLANK: Final[Mapping[str, Any]] = {
    "id": "",
    "object": "user",
    "username": None,
    "first_name": None,
    "last_name": None,
    "locale": None,
    "image_url": "https://img.clerk.com/blank",
    "has_image": False,
    "primary_email_address_id": None,
    "primary_phone_number_id": None,
    "primary_web3_wallet_id": None,
    "password_enabled": True,
    "two_factor_enabled": False,
    "totp_enabled": False,
    "backup_code_enabled": False,
    "email_addresses": [],
    "phone_numbers": [],
    "web3_wallets": [],
    "passkeys": [],
    "external_accounts": [],
    "saml_accounts": [],
    "enterprise_accounts": [],
    "public_metadata": {},
    "private_metadata": {},
    "unsafe_metadata": {},
    "external_id": None,
    "last_sign_in_at": None,
    "banned": False,
    "locked": False,
    "lockout_expires_in_seconds": None,
    "verification_attempts_remaining": 100,
    "created_at": 0,
    "updated_at": 0,
    "delete_self_enabled": True,
    "create_organization_enabled": True,
    "last_active_at": None,
    "mfa_enabled_at": None,
    "mfa_disabled_at": None,
    "legal_accepted_at": None,
    "profile_image_url": "https://www.gravatar.com/avatar?d=mp",
}

TIMES: Final = ("created_at", "updated_at")

# In what other orders users can be listed, and where in the User that stands. Nulls come last going up, as in Postgres.
# Of addresses, numbers and wallets the first counts here; Clerk may take the primary one.
ORDERS: Final[Mapping[str, Callable[[dict[str, Any]], Any]]] = {
    "email_address": lambda user: user["email_addresses"][0]["email_address"],
    "phone_number": lambda user: user["phone_numbers"][0]["phone_number"],
    "web3wallet": lambda user: user["web3_wallets"][0]["web3_wallet"],
    "username": lambda user: user["username"],
    "first_name": lambda user: user["first_name"],
    "last_name": lambda user: user["last_name"],
    "last_active_at": lambda user: user["last_active_at"],
    "last_sign_in_at": lambda user: user["last_sign_in_at"],
}

# Filters that Clerk has and the stand-in hasn't. They are refused: to ignore one would be a wrong answer.
NOT_HERE: Final = frozenset(
    {f"{kind}_{edge}" for kind in ("last_active_at", "last_sign_in_at") for edge in ("before", "after", "since")}
    | {f"{kind}_query" for kind in ("email_address", "phone_number", "username", "name")}
    | {"email_address", "phone_number", "external_id", "username", "web3_wallet", "organization_id"}
    | {"query", "banned", "provider", "provider_user_id"}
)

Query = dict[str, list[str]]
Key = tuple[Any, ...]
"""What users are sorted by; the id comes last and makes it unique."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it came: `at` in seconds of the monotonic clock, `version` its Clerk-API-Version header."""

    path: str
    query: Query
    at: float
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: int
    body: bytes = field(repr=False)
    retry_after: int | None = None


class Problem(Exception):
    """An answer in the shape of Clerk's errors. Codes and texts: https://clerk.com/docs/errors/backend-api"""

    def __init__(self, status: int, code: str, message: str, long_message: str, param: str | None = None) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message
        self.long_message = long_message
        self.param = param

    def answer(self, retry_after: int | None = None) -> Answer:
        """The whole answer."""
        error: dict[str, Any] = {"message": self.message, "long_message": self.long_message, "code": self.code}
        if self.param is not None:
            error["meta"] = {"param_name": self.param}
        return Answer(self.status, rendered({"errors": [error], "clerk_trace_id": "0" * 32}), retry_after)


def rendered(value: object) -> bytes:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def now_ms() -> int:
    """Clerk's clock."""
    return time.time_ns() // 1_000_000


def merged(old: Any, new: Any) -> Any:
    """Metadata after a PATCH: objects merge at every level, null takes a key away."""
    if not isinstance(new, dict):
        return new
    old = old if isinstance(old, dict) else {}
    kept = {key: value for key, value in old.items() if key not in new}
    return kept | {key: merged(old.get(key), value) for key, value in new.items() if value is not None}


# --- What Clerk knows


@dataclass(frozen=True, slots=True)
class User:
    """One user; the body is what is answered, whatever the times say."""

    user_id: str
    created_at: int
    updated_at: int
    body: bytes = field(repr=False)


class Users:
    """Every user, sorted by both times at any moment. The caller holds a lock."""

    def __init__(self) -> None:
        self.by_id: dict[str, User] = {}
        self.sorted: dict[str, list[tuple[int, str]]] = {name: [] for name in TIMES}

    def put(self, user: User) -> None:
        """Add or replace one user."""
        if user.user_id in self.by_id:
            self.remove(user.user_id)
        self.by_id[user.user_id] = user
        insort(self.sorted["created_at"], (user.created_at, user.user_id))
        insort(self.sorted["updated_at"], (user.updated_at, user.user_id))

    def add(self, users: Sequence[User]) -> None:
        """Add many new users at once."""
        self.by_id.update((user.user_id, user) for user in users)
        self.sorted["created_at"].extend((user.created_at, user.user_id) for user in users)
        self.sorted["updated_at"].extend((user.updated_at, user.user_id) for user in users)
        for keys in self.sorted.values():
            keys.sort()

    def remove(self, user_id: str) -> None:
        """Take a user out. KeyError where there is none."""
        user = self.by_id.pop(user_id)
        for name, at in (("created_at", user.created_at), ("updated_at", user.updated_at)):
            keys = self.sorted[name]
            del keys[bisect_left(keys, (at, user_id))]

    def matching(self, filters: Filters) -> Iterable[User]:
        """Those that are meant. To ask for a few ids doesn't look at everybody."""
        if filters.only is None:
            return filter(filters.match, self.by_id.values())
        return filter(filters.match, [self.by_id[user_id] for user_id in filters.only if user_id in self.by_id])

    def keys(self, order: str, filters: Filters) -> Sequence[Key]:
        """Their keys in rising order. Only the two times are kept sorted; the rest is sorted when asked for."""
        if order in self.sorted and filters == NO_FILTERS:
            return self.sorted[order]
        return sorted(self._key(order, user) for user in self.matching(filters))

    @staticmethod
    def _key(order: str, user: User) -> Key:
        if order in TIMES:
            return (user.created_at if order == "created_at" else user.updated_at, user.user_id)
        try:
            value = ORDERS[order](json.loads(user.body))
        except (LookupError, TypeError, ValueError):  # an odd user
            value = None
        wanted = int if order.endswith("_at") else str
        return (0, value, user.user_id) if isinstance(value, wanted) else (1, user.user_id)


# --- What is asked


@dataclass(frozen=True, slots=True)
class Filters:
    """Which users are meant. None: no such filter."""

    only: frozenset[str] | None
    never: frozenset[str]
    created_after: int | None
    created_before: int | None

    def match(self, user: User) -> bool:
        """Whether this one is meant."""
        return (
            (self.only is None or user.user_id in self.only)
            and user.user_id not in self.never
            and (self.created_after is None or user.created_at > self.created_after)
            and (self.created_before is None or user.created_at < self.created_before)
        )


NO_FILTERS: Final = Filters(None, frozenset(), None, None)


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of `GET /v1/users`."""

    filters: Filters
    order: str
    falling: bool
    limit: int
    offset: int
    starting_after: str | None


def parse_filters(query: Query) -> Filters:
    """The filters of a query. A parameter that Clerk doesn't know is ignored, `user_id[]` for one."""
    for name in NOT_HERE & query.keys():
        raise Problem(501, "not_implemented", "not implemented", f"The stand-in has no filter {name}.", name)
    named = query.get("user_id", [])
    if len(named) > MOST_VALUES:
        long_message = f"user_id is included more than the maximum of {MOST_VALUES} times."
        raise Problem(422, "form_param_duplicate", "is included too often", long_message, "user_id")
    never = frozenset(one[1:] for one in named if one.startswith("-"))
    only = frozenset(one.removeprefix("+") for one in named if not one.startswith("-"))
    return Filters(only or None, never, _number(query, "created_at_after"), _number(query, "created_at_before"))


def parse_listing(query: Query) -> Listing:
    """What page is asked for. Raises Problem."""
    filters = parse_filters(query)
    limit = _number(query, "limit")
    if limit is None or limit > LARGEST_PAGE:
        limit = DEFAULT_PAGE  # too many is no error: https://github.com/clerk/clerk-sdk-python/issues/166
    if limit < 1:  # not documented, nor known
        raise Problem(422, "form_param_value_invalid", "is invalid", "limit must be at least 1.", "limit")
    # Only the first counts. A `+` that wasn't encoded arrives as a space, and is an unknown order.
    order_by = query.get("order_by", ["-created_at"])[0]
    falling, order = order_by.startswith("-"), order_by[order_by.startswith(("-", "+")) :]
    if order not in ORDERS and order not in TIMES:
        raise Problem(422, "form_param_value_invalid", "is invalid", f"{order_by} is no order.", "order_by")
    starting_after = query.get("starting_after", (None,))[0]
    if starting_after is not None:
        _check_cursor(query, order)
    return Listing(filters, order, falling, limit, _number(query, "offset") or 0, starting_after)


def _check_cursor(query: Query, order: str) -> None:
    code, message = "form_conditional_param_disallowed", "is not allowed"
    if "offset" in query:
        long_message = "`offset` isn't allowed when `starting_after` is present."
        raise Problem(422, code, message, long_message, "offset")
    if order != "created_at":
        long_message = f"`starting_after` isn't allowed when `order_by` is {order}."
        raise Problem(422, code, message, long_message, "starting_after")


def _number(query: Query, name: str) -> int | None:
    if name not in query:
        return None
    text = query[name][0]
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Problem(422, "form_param_type_invalid", "is invalid", f"`{name}` must be a `number`.", name)
    return int(text)


# --- The answers


class StandIn:
    """Clerk, as far as the Backend API tells of users. `with StandIn() as clerk: httpx.get(clerk.url + "/v1/users")`.

    `limit` requests are taken in any `window` seconds; by default as many as Clerk allows a key of this kind.
    `lost_cursor` is the status for a `starting_after` whose user is gone, which Clerk doesn't document: 422, 404, or
    200 and no users.

    `before` is called with each request that is about to be answered, in the server's thread and without any lock:
    there a test changes something in the middle of a sweep. What it raises is raised again when the stand-in closes.
    """

    def __init__(
        self,
        secret_key: str = "sk_test_standin",  # noqa: S107 - opens nothing but this
        *,
        limit: int | None = None,
        window: float = 10.0,
        lost_cursor: int = 422,
        port: int = 0,
    ) -> None:
        self.secret_key = secret_key
        self.limit = limit or (1000 if secret_key.startswith("sk_live_") else 100)
        self.window = window
        self.lost_cursor = lost_cursor
        self.before: Callable[[Call], object] | None = None
        self._lock = threading.RLock()
        self._users = Users()
        self._filled = 0
        self._calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self._refused: deque[Call] = deque(maxlen=CALLS_KEPT)
        self._taken: deque[float] = deque()
        self._blocked_until = 0.0
        self._failures: deque[Answer] = deque()
        self._slow = 0.0
        self._closing = threading.Event()
        self._broken: BaseException | None = None
        self._server = _Server(self, port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="standin", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if self._broken is not None and kind is None:
            raise self._broken

    def close(self) -> None:
        """Stop serving, and cut the connections that are open."""
        self._closing.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.cut()

    @property
    def url(self) -> str:
        """What CLERK_API_URL is to be."""
        return f"http://{HOST}:{self._server.server_address[1]}"

    # What happens at Clerk

    @property
    def users(self) -> dict[str, bytes]:
        """The users there are now: ids, and JSON as it is answered."""
        with self._lock:
            return {user_id: user.body for user_id, user in self._users.by_id.items()}

    def put(self, user: Mapping[str, Any]) -> None:
        """Create or replace a user. Only the id is needed; times that aren't given are now."""
        at = now_ms()
        whole = {**BLANK, "created_at": at, "updated_at": at, **user}
        with self._lock:
            self._users.put(User(whole["id"], whole["created_at"], whole["updated_at"], rendered(whole)))

    def update(self, user_id: str, at: int | None = None, **changes: Any) -> None:
        """Change a user's fields at a time, by default now. Metadata is merged, as PATCH does."""
        with self._lock:
            old = self._users.by_id[user_id]
            updated_at = max(now_ms(), old.updated_at + 1) if at is None else at
            user = json.loads(old.body)
            for name, value in changes.items():
                user[name] = merged(user.get(name), value) if name in METADATA else value
            user["updated_at"] = updated_at
            self._users.put(User(user_id, old.created_at, updated_at, rendered(user)))

    def delete(self, user_id: str) -> None:
        """Delete a user. KeyError where there is none."""
        with self._lock:
            self._users.remove(user_id)

    def odd(self, user_id: str, raw: bytes) -> None:
        """Answer these bytes for a user, whether or not that is a User, or JSON. He keeps his place in every order."""
        with self._lock:
            at = now_ms()
            old = self._users.by_id.get(user_id) or User(user_id, at, at, b"")
            self._users.put(User(user_id, old.created_at, old.updated_at, raw))

    def fill(
        self,
        number: int,
        *,
        private: bytes | Callable[[int], bytes] = b"{}",
        public: bytes | Callable[[int], bytes] = b"{}",
        unsafe: bytes | Callable[[int], bytes] = b"{}",
    ) -> list[str]:
        """Create many users fast; their ids, oldest first. Metadata is JSON for all, or a function of the number.

        Always two were created in the same millisecond. Neither ids nor times of update are in the order of creation.
        """
        with self._lock:
            numbers = range(self._filled, self._filled + number)
            self._filled += number
            kinds = [
                (lambda _, fixed=kind: fixed) if isinstance(kind, bytes) else kind for kind in (public, private, unsafe)
            ]
            users = [_filled(at, *(kind(at) for kind in kinds)) for at in numbers]
            self._users.add(users)
        return [user.user_id for user in sorted(users, key=lambda user: (user.created_at, user.user_id))]

    # How it behaves

    def fail(self, next: int = 1, status: int = 503, *, retry_after: int | None = None) -> None:  # noqa: A002
        """Answer the next requests with a failure, further ones as usual."""
        code, message = ("too_many_requests", "Too many requests") if status == 429 else ("internal_error", "Failed")
        with self._lock:
            self._failures.extend([Problem(status, code, message, f"{message}.").answer(retry_after)] * next)

    def slow(self, seconds: float) -> None:
        """Answer so late from now on; 0 ends it."""
        self._slow = seconds

    # What was asked

    @property
    def calls(self) -> list[Call]:
        """Every request, refused ones too, in the order they came."""
        with self._lock:
            return list(self._calls)

    @property
    def refused(self) -> list[Call]:
        """The requests that the rate limit refused."""
        with self._lock:
            return list(self._refused)

    def count_by_path(self) -> Counter[str]:
        """How often each path was asked for."""
        return Counter(call.path for call in self.calls)

    def most_within(self, seconds: float) -> int:
        """The greatest number of requests in any so many seconds."""
        times = [call.at for call in self.calls]
        return max((bisect_left(times, at + seconds) - index for index, at in enumerate(times)), default=0)

    def forget_calls(self) -> None:
        """Begin to count anew. The rate limit doesn't forget."""
        with self._lock:
            self._calls.clear()
            self._refused.clear()

    # How a request is answered

    def answer(
        self, target: str, authorization: str | None, version: str | None, changes: bytes | None = None
    ) -> Answer:
        """Answer a GET; with changes, a PATCH."""
        parts = urlsplit(target)
        try:
            call = self._record(parts.path, parse_qs(parts.query), version, authorization)
            if self.before is not None:
                self.before(call)
            self._closing.wait(self._slow)
            return self._failure() or Answer(200, self._body(call) if changes is None else self._changed(call, changes))
        except _TooMany as too_many:
            return too_many.answer(too_many.seconds)
        except Problem as problem:
            return problem.answer()
        except BaseException as error:
            self._broken = self._broken or error
            raise

    def _record(self, path: str, query: Query, version: str | None, authorization: str | None) -> Call:
        with self._lock:
            now = time.monotonic()
            call = Call(path, query, now, version)
            self._calls.append(call)
            _check_key(authorization, self.secret_key)
            seconds = self._wait(now)
            if seconds > 0:
                self._refused.append(call)
                raise _TooMany(math.ceil(seconds))
            self._taken.append(now)
        return call

    def _wait(self, now: float) -> float:
        """For how long nothing is answered. Whoever is over the limit is blocked for the time that he is told.

        Clerk doesn't say how it counts. To look at the last seconds at any moment is the strictest way.
        """
        while self._taken and self._taken[0] <= now - self.window:
            self._taken.popleft()
        if self._blocked_until <= now and len(self._taken) >= self.limit:
            self._blocked_until = self._taken[0] + self.window
        return self._blocked_until - now

    def _failure(self) -> Answer | None:
        with self._lock:
            return self._failures.popleft() if self._failures else None

    def _body(self, call: Call) -> bytes:
        match call.path.split("/"):
            case ["", "v1", "users"]:
                return b"[" + b",".join(self._page(parse_listing(call.query))) + b"]"
            case ["", "v1", "users", "count"]:
                return rendered({"object": "total_count", "total_count": self._count(parse_filters(call.query))})
            case ["", "v1", "users", user_id] if user_id:
                return self._one(unquote(user_id))
        raise Problem(404, "resource_not_found", "not found", "The stand-in has no such endpoint.")

    def _changed(self, call: Call, changes: bytes) -> bytes:
        match call.path.split("/"):
            case ["", "v1", "users", user_id, "metadata"]:
                with self._lock:
                    self._one(unquote(user_id))
                    self.update(unquote(user_id), **_metadata_in(changes))
                    return self._one(unquote(user_id))
        raise Problem(404, "resource_not_found", "not found", "The stand-in has no such endpoint.")

    def _one(self, user_id: str) -> bytes:
        with self._lock:
            user = self._users.by_id.get(user_id)
        if user is None:
            raise Problem(404, "resource_not_found", "not found", f"No user was found with id {user_id}")
        return user.body

    def _count(self, filters: Filters) -> int:
        with self._lock:
            if filters == NO_FILTERS:
                return len(self._users.by_id)
            return sum(1 for _ in self._users.matching(filters))

    def _page(self, listing: Listing) -> list[bytes]:
        with self._lock:
            by_id = self._users.by_id
            keys = self._users.keys(listing.order, listing.filters)
            if listing.starting_after is None:
                begin, end = (0, len(keys) - listing.offset) if listing.falling else (listing.offset, len(keys))
            else:
                begin, end = self._after(listing.starting_after, keys, falling=listing.falling)
            if listing.falling:
                page = keys[max(begin, end - listing.limit) : max(begin, end)][::-1]
            else:
                page = keys[begin : min(end, begin + listing.limit)]
            return [by_id[key[-1]].body for key in page]

    def _after(self, user_id: str, keys: Sequence[Key], *, falling: bool) -> tuple[int, int]:
        """The range of the keys that come after a user in this order, whether or not the filters match him."""
        user = self._users.by_id.get(user_id)
        if user is not None:
            key = (user.created_at, user_id)
            return (0, bisect_left(keys, key)) if falling else (bisect_right(keys, key), len(keys))
        if self.lost_cursor == 200:
            return 0, 0
        if self.lost_cursor == 404:
            raise Problem(404, "resource_not_found", "not found", f"No user was found with id {user_id}")
        long_message = "The resource associated with the supplied starting_after was not found."
        raise Problem(422, "form_resource_not_found", "is missing", long_message, "starting_after")


class _TooMany(Problem):
    def __init__(self, seconds: int) -> None:
        super().__init__(429, "too_many_requests", "Too many requests", "Too many requests. Please try again later.")
        self.seconds = seconds


def _check_key(authorization: str | None, secret_key: str) -> None:
    if authorization is None or not authorization.startswith("Bearer "):
        message = "Invalid Authorization header format"
        long_message = f"{message}. Must be 'Bearer <YOUR_API_KEY>'"
        raise Problem(401, "authorization_header_format_invalid", message, long_message)
    if authorization.removeprefix("Bearer ") != secret_key:
        message = "The provided Clerk Secret Key is invalid. Make sure that your Clerk Secret Key is correct."
        raise Problem(401, "clerk_key_invalid", message, message)


def _metadata_in(changes: bytes) -> dict[str, Any]:
    try:
        found = json.loads(changes)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise Problem(422, "form_param_type_invalid", "is invalid", "Metadata must be an object.")
    if unknown := found.keys() - set(METADATA):
        raise Problem(
            422, "form_param_unknown", "is unknown", f"{min(unknown)} is not a valid parameter.", min(unknown)
        )
    return found


def _template() -> list[bytes]:
    """A User's JSON in pieces, between which stand those of FILLED."""
    whole = {**BLANK, **dict.fromkeys(FILLED, "#")}
    return rendered(whole).split(b'"#"')


FILLED: Final = (
    "id",
    "email_addresses",
    "public_metadata",
    "private_metadata",
    "unsafe_metadata",
    "created_at",
    "updated_at",
)
PIECES: Final = _template()
FIRST_AT: Final = 1_700_000_000_000


def _filled(number: int, public: bytes, private: bytes, unsafe: bytes) -> User:
    shuffled = number * 2_654_435_761 % 2**32  # an odd factor: each number below 2**32 gets another
    user_id = f"user_2{shuffled:010}{number:016}"
    created_at = FIRST_AT + number // 2 * 1000
    updated_at = created_at + shuffled % 1_000_000_000
    address = (
        f'[{{"id":"idn_2{shuffled:010}{number:016}","object":"email_address",'
        f'"email_address":"person{number}@example.com","reserved":false,"verification":null,"linked_to":[],'
        f'"created_at":{created_at},"updated_at":{created_at}}}]'
    )
    times = str(created_at).encode(), str(updated_at).encode()
    values = (f'"{user_id}"'.encode(), address.encode(), public, private, unsafe, *times)
    pairs = zip(PIECES, (*values, b""), strict=True)
    return User(user_id, created_at, updated_at, b"".join(chain.from_iterable(pairs)))


# --- HTTP


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, standin: StandIn, port: int) -> None:
        self.standin = standin
        self._open: set[Any] = set()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """Bind, and look up no names as HTTPServer would."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection, then serve it in a thread."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        """End every connection, as a server that is gone does."""
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: either the client went away, or the stand-in has noted what failed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one write
    server: _Server

    def do_GET(self) -> None:
        """Answer."""
        self._answer(None)

    def do_PATCH(self) -> None:
        """Change, and answer with what came of it."""
        self._answer(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    def _answer(self, changes: bytes | None) -> None:
        headers = self.headers
        answer = self.server.standin.answer(self.path, headers["Authorization"], headers["Clerk-API-Version"], changes)
        self.send_response(answer.status)  # and the Date
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer.body)))
        if answer.retry_after is not None:
            self.send_header("Retry-After", str(answer.retry_after))
        self.end_headers()
        self.wfile.write(answer.body)

    def version_string(self) -> str:
        """The Server header."""
        return "standin"

    def log_message(self, *_: object) -> None:
        """Log nothing."""


# --- By hand


@click.command()
@click.option("--users", default=1000, show_default=True, type=click.IntRange(0, 200_000), help="How many users.")
@click.option("--port", default=0, type=click.IntRange(0, 65_535), help="Default: any that is free.")
@click.option("--key", default="sk_test_standin", show_default=True, help="The secret key that is accepted.")
@click.option("--limit", type=click.IntRange(1), help="Requests in 10 s. Default: as many as Clerk allows such a key.")
@click.option("--seconds", default=3600.0, show_default=True, help="Stop after this long.")
def main(users: int, port: int, key: str, limit: int | None, seconds: float) -> None:
    """Serve a stand-in for Clerk's Backend API until SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        standin = StandIn(key, limit=limit, port=port)
    except OSError as error:
        raise click.ClickException(f"port {port} can't be used: {error.strerror}") from None
    standin.fill(users, private=lambda at: b'{"number":%d}' % at)
    with standin as clerk:
        click.echo(f"CLERK_API_URL={clerk.url}\nCLERK_SECRET_KEY={key}")
        sys.stdout.flush()
        stop.wait(seconds)


if __name__ == "__main__":
    main()
