"""What is copied, at the edges of the session token's budget."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.claims import FRAME_BYTES, weigh
from worker.events import UserChanged
from worker.policy import Copy, Decision, Policy, decide


def user(public: Any = None, unsafe: Any = None, private: Any = None) -> UserChanged:
    def text(value: Any) -> bytes | None:
        return None if value is None else json.dumps(value, ensure_ascii=False).encode()

    return UserChanged("user_a", 1, 1, text(private or {}), text(public), text(unsafe))


def decision(of: UserChanged, policy: Policy | None = None) -> Decision:
    return decide(policy or Policy(), of, weigh(of))


def test_the_weight_is_that_of_the_assumed_template() -> None:
    public, unsafe = {"röle": "ädmin"}, {"b": [1, 2.50]}
    rendered = json.dumps(
        {"public_metadata": public, "unsafe_metadata": unsafe}, ensure_ascii=False, separators=(",", ":")
    ).encode()
    assert weigh(user(public, unsafe)).claims_bytes == len(rendered)


@pytest.mark.parametrize("letter", ["x", "é", "界", "\U0001f600"])
@pytest.mark.parametrize(("bytes_", "copied"), [(1199, False), (1200, False), (1201, True)])
def test_a_user_over_the_budget_by_one_byte_is_copied(letter: str, bytes_: int, copied: bool) -> None:
    room = bytes_ - FRAME_BYTES - len('{"a":""}') - len("{}")
    width = len(letter.encode())
    value = letter * (room // width) + "x" * (room % width)
    of = user({"a": value}, {})
    assert weigh(of).claims_bytes == bytes_
    assert decision(of) == Decision(private=True, public=copied, unsafe=copied)


def test_private_metadata_is_always_copied_as_no_token_carries_it() -> None:
    for copy in (Copy.ALWAYS, Copy.OVERSIZE):
        assert decision(user({}, {}), Policy(private=copy)).private
    assert not decision(user({}, {}), Policy(private=Copy.NEVER)).private


def test_always_and_never_need_no_weight() -> None:
    small, large = user({}, {}), user({"a": "x" * 2000}, {})
    for of in (small, large):
        assert decision(of, Policy(public=Copy.ALWAYS, unsafe=Copy.NEVER)) == Decision(
            private=True, public=True, unsafe=False
        )


def test_the_budget_is_a_setting() -> None:
    assert decision(user({}, {}), Policy(budget=0)).public
    assert not decision(user({"a": "x" * 2000}, {}), Policy(budget=5000)).public


def test_what_an_incomplete_event_carries_is_copied_since_its_weight_is_not_known() -> None:
    assert decision(user({"a": 1}, None)) == Decision(private=True, public=True, unsafe=True)
