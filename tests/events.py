"""Builds Clerk's events, and the inbox rows that the receiver would make of them."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from typing import Any, Final

from worker.events import UserChanged, UserDeleted, parse_event
from worker.inbox import Incoming

ABSENT: Final = object()
"""A kind of metadata whose key is not in the event."""

_ids = itertools.count(1)


def changed(
    user_id: str = "user_a",
    version: int = 1_700_000_000_000,
    *,
    timestamp: int | None = None,
    event_type: str = "user.updated",
    private: Any = None,
    public: Any = None,
    unsafe: Any = None,
) -> bytes:
    """The body of a user.updated: None is `{}`, ABSENT leaves the key out, anything else is the value."""
    data: dict[str, Any] = {"object": "user", "id": user_id, "first_name": "Ada", "updated_at": version}
    for kind, value in (("private", private), ("public", public), ("unsafe", unsafe)):
        if value is not ABSENT:
            data[f"{kind}_metadata"] = {} if value is None else value
    return envelope(event_type, data, version + 15 if timestamp is None else timestamp)


def deleted(user_id: str = "user_a", timestamp: int = 1_700_000_000_000) -> bytes:
    """The body of a user.deleted."""
    return envelope("user.deleted", {"object": "user", "id": user_id, "deleted": True}, timestamp)


def envelope(event_type: str, data: object, timestamp: int) -> bytes:
    """The body of any event."""
    body = {"object": "event", "type": event_type, "timestamp": timestamp, "data": data}
    return json.dumps(body, ensure_ascii=False).encode()


def incoming(body: bytes, svix_id: str | None = None) -> Incoming:
    """What the receiver hands to the inbox for this body."""
    svix_id = svix_id or f"msg_{next(_ids)}"
    parsed = parse_event(body)
    sent_at = datetime.now(UTC)
    if not isinstance(parsed, tuple):
        return Incoming(svix_id, sent_at, body, parsed.type, parsed.user_id, None, parsed.reason)
    event_type, event = parsed
    assert isinstance(event, UserChanged | UserDeleted), "such an event isn't recorded"
    return Incoming(svix_id, sent_at, body, event_type, event.user_id, event.version)
