"""Populations of users for reports, checks and suggestions, and strategies that make them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from hypothesis import strategies as st

from worker.claims import Weighed, Weights, render, weigh_user
from worker.events import NO_PROFILE, UserChanged
from worker.policy import Policy
from worker.template import Template, parse_template


def text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def user(public: Any = None, unsafe: Any = None, *, user_id: str = "user_a", name: str = "Ada") -> UserChanged:
    profile = (text(name), *NO_PROFILE[1:])
    return UserChanged(user_id, 1_700_000_000_000, 1, b"{}", text(public or {}), text(unsafe or {}), 0, profile)


def users(*metadata: tuple[Any, Any]) -> list[UserChanged]:
    return [user(public, unsafe, user_id=f"user_{at:04}") for at, (public, unsafe) in enumerate(metadata)]


def weight(template: Template, of: UserChanged, policy: Policy) -> int:
    return len(render(template, of, policy.assumed))


def population(of: Iterable[UserChanged], policy: Policy, *, current: bool = True) -> Iterator[Weighed]:
    """Streamed, as it comes from the database. Where it isn't current, the weight that is kept is wrong."""
    for one in of:
        kept = weight(policy.template, one, policy) if current else 999_999
        yield Weighed(weigh_user(one), kept, current, exact=True)


def unknown(_: Weights) -> int | None:
    return None


def padded(claims_bytes: int) -> dict[str, str]:
    """Public metadata of which the assumed template's claims weigh so much."""
    around = len('{"public_metadata":{"a":""},"unsafe_metadata":{}}')
    return {"a": "x" * (claims_bytes - around)}


# --- Strategies.

NAMES: Final = st.sampled_from(
    [
        "a",
        "b",
        "role",
        "bio",
        "größe",
        "with space",
        "a.b",
        "",
        'quo"te',
        "back\\slash",
        "n" * 64,
        "long" * 20,
        "{{",
        "\u202e",
    ]
)
VALUES: Final = st.one_of(
    st.none(), st.booleans(), st.integers(0, 9), st.text('x"é\n', max_size=40), st.lists(st.integers(0, 99), max_size=5)
)
MANY: Final = {f"m{number}": number for number in range(70)}
"""More fields than are kept by name."""

METADATA: Final = st.one_of(
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.builds(lambda own: {**own, **MANY}, st.dictionaries(NAMES, VALUES, max_size=2)),
)
USERS: Final = st.lists(st.tuples(METADATA, METADATA), max_size=12).map(lambda metadata: users(*metadata))
TEMPLATES: Final = st.sampled_from(
    [
        '{"public_metadata": "{{user.public_metadata}}", "unsafe_metadata": "{{user.unsafe_metadata}}"}',
        '{"role": "{{user.public_metadata.role}}", "who": "{{user.first_name}} of {{org.name}}"}',
        '{"deep": "{{user.unsafe_metadata.a.b || user.public_metadata.n}}", "m": "{{user.unsafe_metadata}}!"}',
        "{}",
    ]
).map(parse_template)
