"""Who may see the status page, and whether a form was sent from it. Nothing is kept between two requests."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import threading
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

COMPLAIN_SECONDS: Final = 30.0

FORM_SECONDS: Final = 3600
"""How long a form is good for at least; at most twice as long."""


class Access:
    """Asks for `token`; `clock` gives seconds since 1970."""

    def __init__(self, token: str, clock: Callable[[], float] = time.time) -> None:
        self._token = token.encode("ascii")
        self._clock = clock
        self._lock = threading.Lock()
        self._told = -COMPLAIN_SECONDS
        self._refused = 0

    def allows(self, authorization: str | None) -> bool:
        """Whether an Authorization header has the token: as a Bearer's, or as the password of any user (Basic)."""
        if authorization is None:
            return False  # what a browser sends before it asks
        given = _given(authorization)
        if given is not None and hmac.compare_digest(given, self._token):
            return True
        self._complain()
        return False

    def form_key(self) -> str:
        """What a form of the page carries, so that no other site can make a browser send it."""
        return self._key_of(self._hour())

    def knows(self, form_key: str) -> bool:
        """Whether this is the key of a form that was made within the last hour or so."""
        given = form_key.encode("utf-8", "replace")
        hour = self._hour()
        # Both are compared, always.
        found = [hmac.compare_digest(given, self._key_of(one).encode("ascii")) for one in (hour, hour - 1)]
        return any(found)

    def _hour(self) -> int:
        return int(self._clock() // FORM_SECONDS)

    def _key_of(self, hour: int) -> str:
        return hmac.digest(self._token, f"clerk-sync status form {hour}".encode("ascii"), "sha256").hex()

    def _complain(self) -> None:
        """Log that somebody was refused, not each time, and nothing of what they sent."""
        with self._lock:
            self._refused += 1
            if time.monotonic() - self._told < COMPLAIN_SECONDS:
                return
            self._told, refused, self._refused = time.monotonic(), self._refused, 0
        log.warning("the status page was asked for with a wrong token", extra={"times": refused})


def _given(authorization: str) -> bytes | None:
    """The token in a header; None where there is none to be read."""
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    match scheme.lower():
        case "bearer":
            return value.encode("utf-8", "replace")
        case "basic":
            try:
                _, colon, password = base64.b64decode(value, validate=True).partition(b":")
            except (binascii.Error, ValueError):
                return None
            return password if colon else None
    return None


def is_from_here(fetch_site: str | None, origin: str | None, host: str) -> bool:
    """Whether a browser says that a request comes from our own page. Who says nothing isn't a browser of today."""
    if fetch_site is not None:
        return fetch_site == "same-origin"
    return origin is None or _host_of(origin) == host.lower()


def _host_of(origin: str) -> str | None:
    """The host and port of an origin; None where it has none, such as `null`."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
