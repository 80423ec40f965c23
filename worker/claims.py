"""What a user's custom claims are, and what they weigh in the session token: UTF-8 bytes of their compact JSON. Pure.

`render` makes them of an event; what is kept of a user are sizes, of which `worker.measure` tells the weight.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from worker.events import NULL, PROFILE, UserChanged
from worker.jsontext import compact
from worker.shortcodes import assumed_bytes
from worker.template import Constant, Expression, Template, Text

EMPTY: Final = b"{}"

FIELDS_KEPT: Final = 64
"""How many fields of one kind are kept by name, the largest."""

NAME_BYTES: Final = 64
"""A field whose name is longer isn't kept by name."""

Assumed = Mapping[str, int]
"""Bytes of the values that no user tells, by shortcode (`org.name`), where they aren't the default; at least 2."""


class Fields(NamedTuple):
    """What one kind of a user's metadata weighs as compact JSON: in all, and the value of each field kept by name.

    `named` is False where no names have been kept, as for users from before weights were.
    """

    total: int
    by_name: Mapping[str, int]
    named: bool = True

    @property
    def may_have_others(self) -> bool:
        """Whether there may be fields that aren't kept by name though their names are short enough."""
        return not self.named or len(self.by_name) >= FIELDS_KEPT

    @property
    def unexplained(self) -> int:
        """What fields that aren't kept by name add to the total, with their names and commas."""
        names, sizes = self.by_name.keys(), self.by_name.values()
        named = sum(map(key_bytes, names)) + sum(sizes) + len(":,") * len(names)
        return self.total - len(EMPTY) - max(named - 1, 0)


class Weights(NamedTuple):
    """Sizes of everything of one user that a template can carry, and no values.

    `version` is the user's `updated_at`. `profile` is the bytes of each of PROFILE (0 for null), None if not known.
    """

    user_id: str
    version: int
    profile: tuple[int, ...] | None
    public: Fields
    unsafe: Fields


class Weighed(NamedTuple):
    """One live user with the weights that the database keeps.

    `current` says whether `claims_bytes` is by the policy asked about, `exact` that it isn't an upper bound.
    """

    weights: Weights
    claims_bytes: int
    current: bool
    exact: bool


# --- Sizes of one user.

_NO_FIELDS: Final = Fields(len(EMPTY), {})
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def weigh_user(user: UserChanged) -> Weights:
    """The sizes of one user; a kind that is absent counts as `{}`."""
    return Weights(
        user.user_id,
        user.version,
        tuple([0 if value == NULL else len(value) for value in user.profile]),
        _NO_FIELDS if user.public_metadata is None else weigh_kind(user.public_metadata),
        _NO_FIELDS if user.unsafe_metadata is None else weigh_kind(user.unsafe_metadata),
    )


def weigh_kind(value: bytes) -> Fields:
    """The sizes of one kind of metadata, from the JSON text of an object."""
    text = compact(value)
    sizes = {name: len(field) for name, field in _opened(text).items() if len(name.encode()) <= NAME_BYTES}
    if len(sizes) > FIELDS_KEPT:
        # Of equal sizes the first by name, so that the same metadata always gives the same.
        sizes = dict(heapq.nsmallest(FIELDS_KEPT, sizes.items(), key=lambda field: (-field[1], field[0])))
    return Fields(len(text), sizes)


def _opened(text: bytes) -> dict[str, msgspec.Raw]:
    """The members of an object; none where it is something else, or nothing that can be read."""
    if not text.startswith(b"{"):
        return {}
    try:
        return _fields.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # No event that was accepted leads here. It would still be weighed in all.
        return {}


@lru_cache(maxsize=8192)
def key_bytes(name: str) -> int:
    return len(msgspec.json.encode(name))


# --- Rendering.

FALSY: Final = (b"null", b"false")


def render(template: Template, user: UserChanged, assumed: Assumed) -> bytes:
    """The user's claims as compact JSON.

    A kind that is absent counts as `{}`. What no user tells is a string of as many bytes as are assumed.
    """
    value_of = values_of(user, assumed)

    def value(expression: Expression) -> bytes:
        return chosen(expression, value_of)

    rendered: list[bytes] = []
    for part in template.parts:
        if isinstance(part, Text):
            rendered.append(b'"')
            rendered += [inner if isinstance(inner, bytes) else as_text(value(inner)) for inner in part.parts]
            rendered.append(b'"')
        else:
            rendered.append(part if isinstance(part, bytes) else value(part))
    return b"".join(rendered)


_ValueOf = Callable[[tuple[str, ...]], bytes]


def chosen(expression: Expression, value_of: _ValueOf) -> bytes:
    """The value of the first operand that is neither null nor false, or of the last one."""
    found = NULL
    for operand in expression.operands:
        found = operand.json if isinstance(operand, Constant) else value_of(operand.path)
        if found not in FALSY:
            break
    return found


def as_text(value: bytes) -> bytes:
    """What a JSON value becomes inside a string."""
    if value.startswith(b'"'):
        return value[1:-1]
    if value.startswith((b"{", b"[")):
        return value.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return value


def values_of(user: UserChanged, assumed: Assumed) -> _ValueOf:
    """Look up what one user's shortcodes stand for, reading each object once."""
    of_user = dict(zip(PROFILE, user.profile, strict=True))
    of_user["id"] = msgspec.json.encode(user.user_id)
    of_user["updated_at"] = b"%d" % user.version
    of_user["full_name"] = _full_name(of_user["first_name"], of_user["last_name"])
    kinds = {"public_metadata": user.public_metadata or EMPTY, "unsafe_metadata": user.unsafe_metadata or EMPTY}
    objects: dict[tuple[str, ...], dict[str, msgspec.Raw]] = {}

    def value_below(path: tuple[str, ...]) -> bytes:
        text = kinds[path[1]]
        for end in range(2, len(path)):
            above = path[:end]
            if above not in objects:
                objects[above] = _opened(text)
            if path[end] not in objects[above]:
                return NULL
            text = bytes(objects[above][path[end]])
        return compact(text)

    def value(path: tuple[str, ...]) -> bytes:
        match path:
            case ("user", name) if name in of_user:
                return of_user[name]
            case ("user", name, *_) if name in kinds:
                return value_below(path)
        size = assumed_bytes(path, assumed)
        return NULL if size is None else b'"' + b"?" * (size - 2) + b'"'

    return value


def _full_name(*names: bytes) -> bytes:
    given = [name[1:-1] for name in names if name not in (NULL, b'""')]
    return b'"' + b" ".join(given) + b'"' if given else NULL
