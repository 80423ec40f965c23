"""Reducing a user's events to those that can still matter."""

from __future__ import annotations

from worker import sync
from worker.events import UserChanged, UserDeleted


def user(version: int, event_at: int = 1, *, whole: bool = True) -> UserChanged:
    return UserChanged("user_a", version, event_at, b"{}" if whole else None, b"{}", b"{}")


def test_a_user_s_events_are_reduced_to_those_that_can_still_matter() -> None:
    assert sync.newest([user(1), user(3), user(2)]) == [user(3)]
    assert sync.newest([user(1), user(3, whole=False), user(2)]) == [user(3, whole=False), user(2)]
    assert sync.newest([user(1), user(1)]) == [user(1)]
    assert sync.newest([user(1, 1), user(1, 2)]) == [user(1, 2)]


def test_of_deletions_the_earliest_stays_and_nothing_else_matters() -> None:
    assert sync.newest([user(9), UserDeleted("user_a", 5), UserDeleted("user_a", 3)]) == [UserDeleted("user_a", 3)]
