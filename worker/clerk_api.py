"""Clerk's Backend API, as far as it is pulled from: pages of users, and how many there are.

A page is cut into the raw JSON of its users and no further, so that one odd user never fails the others; what a user
means, `worker.events` says. Errors tell statuses and Clerk's error codes: its messages can quote data.
"""

from __future__ import annotations

import logging
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import httpx
import msgspec

from worker.errors import ClerkRefused, ClerkUnavailable, ConfigError, SyncError
from worker.jsontext import holdable

T = TypeVar("T")
Parameters = list[tuple[str, str | int | float | bool | None]]

API_VERSION: Final = "2025-11-10"
"""The version of the API that Clerk's own SDKs ask for. It has the cursor `starting_after`; the next one changes only
how metadata is written."""

MOST_USERS: Final = 500
"""The largest page. Above it Clerk gives ten users instead of an error:
https://github.com/clerk/clerk-sdk-python/issues/166"""

MOST_IDS: Final = 100
"""How many users one call can ask for by id."""

CLOCKS_APART_MS: Final = 60_000
"""So far the clock of Clerk's answers may be from that of its updates."""

LARGEST_ANSWER: Final = 64 * 1024 * 1024

_TIMEOUTS: Final = httpx.Timeout(30, connect=5)
_ATTEMPT_SECONDS: Final = 60
"""How long one attempt may take in all: a read time-out never ends an answer that trickles, be it in its headers."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 20.0
"""Bounds of the wait before the next attempt; each wait is anything between nothing and its bound."""

# Clerk reads a leading + or - of an id as "only" and "never".
_USER_ID: Final = re.compile(r"user_[A-Za-z0-9_]{1,100}")
_SECONDS: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_CODE: Final = re.compile(r"[a-z0-9_]{1,64}")

logger = logging.getLogger(__name__)


def is_user_id(text: str) -> bool:
    """Whether Clerk can be asked for a user by this id. With another one the answer could be about other users."""
    return _USER_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Page:
    """Users as raw JSON, in the order asked for; `read_at` is when Clerk answered by its own clock, in milliseconds
    since 1970 of a whole second, or None where the answer doesn't tell."""

    users: tuple[bytes, ...]
    read_at: int | None


class _Error(msgspec.Struct):
    code: Any = None


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


class _Count(msgspec.Struct):
    total_count: int


_users = msgspec.json.Decoder(list[msgspec.Raw])
_count = msgspec.json.Decoder(_Count)
_errors = msgspec.json.Decoder(_Errors)


class _Failed(Exception):
    """An attempt failed that may succeed when it is made again, after `wait` seconds at the soonest."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


class ClerkApi:
    """A client for one thread. Each request is booked with the shared budget first.

    `take` asks the budget for a call and gives the seconds to wait before asking again, 0.0 where the call was booked;
    `on_retry_after` tells all processes to hold still for some seconds. What either raises goes through. `sleep` may
    raise as well, to give up in the middle of a wait.

    The methods try again for up to `patience_seconds`, waits for the budget included. They raise ConfigError
    for a key or an address that is wrong, ClerkRefused for a request that Clerk refuses, ClerkUnavailable for what
    may work later.
    """

    def __init__(
        self,
        secret_key: str,
        base_url: str,
        take: Callable[[], float],
        *,
        on_retry_after: Callable[[float], None],
        client: httpx.Client | None = None,
        patience_seconds: float = 120.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.calls = 0
        """HTTP requests made so far."""
        self._headers = {
            "Authorization": f"Bearer {secret_key}",
            "Clerk-API-Version": API_VERSION,
            "Accept-Encoding": "gzip",
        }
        self._base_url = base_url.rstrip("/")
        self._take = take
        self._on_retry_after = on_retry_after
        self._client = client or _new_client()
        self._socket: socket.socket | None = None
        self._patience = patience_seconds
        self._sleep = sleep

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def users(
        self,
        *,
        order_by: str,
        limit: int = MOST_USERS,
        starting_after: str | None = None,
        offset: int | None = None,
        user_ids: Sequence[str] = (),
        created_after: int | None = None,
    ) -> Page:
        """One page of users; `created_after` is in milliseconds. The cursor `starting_after` goes with an order by
        created_at, and without an offset."""
        if not 1 <= limit <= MOST_USERS or len(user_ids) > MOST_IDS:
            raise ValueError(f"a page is of 1 to {MOST_USERS} users, or of up to {MOST_IDS} by their ids")
        parameters: Parameters = [("order_by", order_by), ("limit", limit)]
        if starting_after is not None:
            parameters.append(("starting_after", starting_after))
        if offset is not None:
            parameters.append(("offset", offset))
        if created_after is not None:
            parameters.append(("created_at_after", created_after))
        parameters += [("user_id", user_id) for user_id in user_ids]
        return Page(*self._get("/v1/users", parameters, _split))

    def count(self) -> int:
        """How many users there are."""
        return self._get("/v1/users/count", [], _total)[0]

    def _get(self, path: str, parameters: Parameters, read: Callable[[bytes], T]) -> tuple[T, int | None]:
        """What `read` makes of the answer, and when Clerk gave it."""
        started = time.monotonic()
        last: _Failed | None = None
        attempts = 0
        while True:
            self._book(started, last)
            try:
                return self._attempt(path, parameters, read)
            except _Failed as failed:
                last = failed
            attempts += 1
            self._pause(started, attempts, last)

    def _book(self, started: float, last: _Failed | None) -> None:
        """Wait until the budget has a call for us."""
        while (wait := self._take()) > 0:
            if wait > self._left(started):
                if last is not None:
                    raise _given_up(started, last)
                raise ClerkUnavailable(
                    f"no call to Clerk's API is free within {self._patience:g} s: they are used up by other processes, "
                    f"or Clerk asked for a pause of {wait:.3g} s"
                )
            self._sleep(wait)

    def _pause(self, started: float, attempts: int, failed: _Failed) -> None:
        """Wait before the next attempt: full jitter, and a last attempt at the very end."""
        left = self._left(started)
        if left <= 0 or failed.wait > left:
            raise _given_up(started, failed)
        bound = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(attempts - 1, 16))
        wait = max(failed.wait, min(random.uniform(0, bound), left))  # noqa: S311 - jitter, not a secret
        logger.info("Clerk's API will be asked again", extra={"reason": failed.reason, "wait_s": round(wait, 3)})
        self._sleep(wait)

    def _left(self, started: float) -> float:
        return started + self._patience - time.monotonic()

    def _attempt(self, path: str, parameters: Parameters, read: Callable[[bytes], T]) -> tuple[T, int | None]:
        with self._answer(path, parameters) as response:
            self._check(response)
            body = _body(response)
        if response.status_code >= 400:
            raise ClerkRefused(response.status_code, _codes(body))
        try:
            return read(body), _read_at(response)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            # A proxy's page, or an answer that was cut short.
            raise _Failed(f"{response.status_code}, but not what was asked for") from None

    @contextmanager
    def _answer(self, path: str, parameters: Parameters) -> Iterator[httpx.Response]:
        """The answer, whose body is still to be read. The text of httpx's errors is never passed on."""
        self.calls += 1
        late = threading.Event()
        timer = threading.Timer(_ATTEMPT_SECONDS, self._cut, (late,))
        timer.daemon = True
        timer.start()
        try:
            with self._client.stream(
                "GET",
                self._base_url + path,
                params=parameters,
                headers=self._headers,
                timeout=_TIMEOUTS,
                follow_redirects=False,
                extensions={"trace": self._note_socket},
            ) as response:
                yield response
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise ConfigError("CLERK_API_URL: not an address that can be called") from None
        except httpx.TimeoutException:
            raise _Failed("no answer in time") from None
        except httpx.RequestError as error:
            cause = _cause(error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ConfigError(
                    "CLERK_API_URL: the certificate that the address shows isn't trusted. Where a proxy of your own "
                    "shows it, SSL_CERT_FILE names a file of the certificates to trust"
                ) from None
            raise _Failed("no whole answer in time" if late.is_set() else type(cause).__name__) from None
        finally:
            timer.cancel()

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember what the connection is made of: https://www.encode.io/httpcore/extensions/#trace"""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")

    def _cut(self, late: threading.Event) -> None:
        """End an attempt, from another thread: whoever reads comes to the end."""
        late.set()
        if self._socket is not None:
            with suppress(OSError):
                # Not TLS's own shutdown: that one spoils the socket for its reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _check(self, response: httpx.Response) -> None:
        """Raise what the status alone tells; what comes back is a 2xx, or a 4xx whose body has codes."""
        status = response.status_code
        if status == 429:
            seconds = _retry_after(response)
            if seconds:
                self._on_retry_after(seconds)
            raise _Failed("429", seconds)
        if status >= 500 or status == 408:
            raise _Failed(str(status))
        if 300 <= status < 400:
            raise ConfigError(f"CLERK_API_URL: the address answers with a redirect ({status}), which isn't followed")
        if status in (401, 403):
            raise ConfigError(
                f"CLERK_SECRET_KEY: Clerk's API refuses the key ({status}): copy the Secret key from Clerk's "
                "Dashboard, API keys"
            )


def _new_client() -> httpx.Client:
    """Proxies and certificates are the environment's. No proxy leads to this machine, where a stand-in answers."""
    try:
        return httpx.Client(mounts={"all://127.0.0.1": None, "all://localhost": None})
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE: one of them can't be used "
            f"({type(error).__name__}). A proxy is an http:// or https:// address; SOCKS isn't supported"
        ) from None


def _cause(error: BaseException) -> BaseException:
    """What went wrong. A ConnectError can be a name, a certificate or a port that nobody listens at."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link or error


def _given_up(started: float, last: _Failed) -> ClerkUnavailable:
    pause = f", which asks for a pause of {last.wait:g} s" if last.wait else ""
    return ClerkUnavailable(
        f"Clerk's API didn't answer for {time.monotonic() - started:.3g} s (last: {last.reason}{pause}): try again "
        "later, or see whether CLERK_API_URL can be reached from here"
    )


def _body(response: httpx.Response) -> bytes:
    """The body, unpacked no further than it may be large: httpx unpacks whatever comes."""
    packed = response.headers.get("Content-Encoding", "identity").lower()
    if packed not in ("identity", "gzip"):
        raise _Failed("an encoding that wasn't asked for")
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress if packed == "gzip" else None
    chunks: list[bytes] = []
    room = LARGEST_ANSWER
    for chunk in response.iter_raw():
        try:
            chunks.append(chunk if unpack is None else unpack(chunk, room + 1))
        except zlib.error:
            raise _Failed("not the gzip that it says it is") from None
        room -= len(chunks[-1])
        if room < 0:
            raise SyncError(f"Clerk's API answered with more than {LARGEST_ANSWER} bytes: ask for fewer users")
    return b"".join(chunks)


def _split(body: bytes) -> tuple[bytes, ...]:
    try:
        elements = _users.decode(body)
    except RecursionError:
        # Metadata that is nested too deep for the decoder, which any user can write. It is cut off at the same
        # level as in an event: a user stands as deep in a page as in an envelope.
        elements = _users.decode(holdable(body)[0])
    return tuple(map(bytes, elements))


def _total(body: bytes) -> int:
    return _count.decode(body).total_count


def _codes(body: bytes) -> tuple[str, ...]:
    """Clerk's error codes, so far as they look like codes."""
    try:
        found = _errors.decode(body).errors
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return ()
    return tuple(error.code for error in found[:5] if isinstance(error.code, str) and _CODE.fullmatch(error.code))


def _read_at(response: httpx.Response) -> int | None:
    try:
        date = parsedate_to_datetime(response.headers["Date"])
        return int(date.replace(tzinfo=date.tzinfo or UTC).timestamp()) * 1000
    except (KeyError, ValueError, OverflowError):
        return None


def _retry_after(response: httpx.Response) -> float:
    """The seconds of Retry-After; nothing where it is missing or something else."""
    text = response.headers.get("Retry-After", "").strip()
    return float(text) if _SECONDS.fullmatch(text) else 0.0
