"""Clerk's truth: who is there with which metadata, and the events that tell of it."""

from __future__ import annotations

import itertools
import json
import random
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.acceptance.system import CANARY, now_ms, user_event
from tests.events import deleted

KINDS: Final = ("private", "public", "unsafe")

Metadata = dict[str, Any]

Row = tuple[Metadata, Metadata, Metadata, int]
"""What an application is to read of a user: the three kinds of metadata, and `updated_at` in ms."""


@dataclass(slots=True)
class Message:
    """An event as Svix keeps it until it is acknowledged: one id for all attempts. `dead`: it can't be applied."""

    svix_id: str
    body: bytes
    user_id: str
    dead: bool = False
    attempts: int = 0
    acknowledged: bool = False


@dataclass(slots=True)
class _User:
    user_id: str
    version: int = 0
    metadata: dict[str, Metadata] = field(default_factory=dict)
    deleted: bool = False


class Truth:
    """Users who sign up, change, sign in and are deleted by chance, each step an event. For one thread at a time.

    Every event is later than all before it, so what is true is what the last ones said.
    """

    def __init__(self, seed: str, present: int = 60, *, churn: bool = True) -> None:
        """`present` users are there at a time to whom things happen: where they are few, each has several events under
        way at once. With `churn` they are deleted or not heard of any more, and others come."""
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self._users: dict[str, _User] = {}
        self._most = present
        self._happenings = {self._change: 46, self._sign_in: 30, self._lacking: 8, self._unusable: 2}
        if churn:
            self._happenings |= {self._delete: 8, self._leave: 6}
        self._present: list[_User] = []
        self.made = 0

    def next(self) -> Message:
        """Something happens to someone."""
        self.made += 1
        if len(self._present) < self._most:
            return self._create()
        place = self._random.randrange(len(self._present))
        user = self._present[place]
        (happens,) = self._random.choices(list(self._happenings), list(self._happenings.values()))
        return happens(user)

    def probe(self) -> Message:
        """Somebody signs up: the event by which one sees that the system works."""
        self.made += 1
        return self._create(present=False)

    def expected(self, user_ids: Iterable[str]) -> dict[str, Row]:
        """The rows that these users are to have; none for who was deleted or never heard of."""
        rows = {}
        for user_id in user_ids:
            user = self._users.get(user_id)
            if user and not user.deleted:
                private, public, unsafe = (user.metadata[kind] for kind in KINDS)
                rows[user_id] = (private, public, unsafe, user.version)
        return rows

    def user_ids(self) -> list[str]:
        """Everybody who ever was."""
        return list(self._users)

    def _create(self, *, present: bool = True) -> Message:
        user = _User(f"user_{self._random.getrandbits(96):024x}")
        self._users[user.user_id] = user
        if present:
            self._present.append(user)
        return self._tell(user, "user.created", {kind: self._metadata() for kind in KINDS})

    def _change(self, user: _User) -> Message:
        kind = self._random.choice(KINDS)
        return self._tell(user, "user.updated", {**user.metadata, kind: self._metadata()})

    def _sign_in(self, user: _User) -> Message:
        return self._tell(user, "user.updated", user.metadata)

    def _lacking(self, user: _User) -> Message:
        """An event that lacks a kind, of which what was stays."""
        absent = self._random.choice(KINDS)
        metadata = {kind: self._metadata() for kind in KINDS if kind != absent} | {absent: user.metadata[absent]}
        return self._tell(user, "user.updated", metadata, absent)

    def _delete(self, user: _User) -> Message:
        user.deleted = True
        self._present.remove(user)
        return self._message(user, deleted(user.user_id, now_ms()))

    def _leave(self, user: _User) -> Message:
        """The last that is heard of a user, who stays as they are."""
        self._present.remove(user)
        return self._change(user)

    def _unusable(self, user: _User) -> Message:
        body = json.dumps(
            {"object": "event", "type": "user.updated", "data": {"id": user.user_id, "first_name": CANARY}}
        )
        return self._message(user, body.encode(), dead=True)

    def _tell(self, user: _User, event_type: str, metadata: dict[str, Metadata], absent: str | None = None) -> Message:
        user.version = now_ms()
        user.metadata = {kind: {"canary": CANARY, **metadata[kind]} for kind in KINDS}
        body = user_event(
            user.user_id,
            user.version,
            user.metadata["private"],
            public=user.metadata["public"],
            unsafe=user.metadata["unsafe"],
            event_type=event_type,
        )
        if absent:
            event = json.loads(body)
            del event["data"][f"{absent}_metadata"]
            body = json.dumps(event).encode()
        return self._message(user, body)

    def _metadata(self) -> Metadata:
        size = self._random.choice((0, 10, 100, 100, 400, 3000))
        return {"n": next(self._numbers), "text": "é" * size}

    def _message(self, user: _User, body: bytes, *, dead: bool = False) -> Message:
        return Message(f"msg_{uuid.uuid4().hex}", body, user.user_id, dead)
