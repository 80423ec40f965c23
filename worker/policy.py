"""Which kinds of a user's metadata are copied to Postgres. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from worker.template import ASSUMED_TEMPLATE, Template


class Copy(StrEnum):
    """What `COPY_PRIVATE`, `COPY_PUBLIC` and `COPY_UNSAFE` can say of a kind of metadata."""

    ALWAYS = "always"
    OVERSIZE = "oversize"
    NEVER = "never"


WEIGHING: Final = 1
"""How users are weighed; to be raised whenever the same user and settings come to weigh something else. Until then a
sign-in leaves a row's weight as it is."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What to copy of each kind, and the session token's claims that decide what is oversize.

    `budget` is what the token can carry, in bytes of custom claims; `assumed` overrides the bytes of shortcodes that
    can't be known from a user, by their text.
    """

    private: Copy = Copy.ALWAYS
    public: Copy = Copy.OVERSIZE
    unsafe: Copy = Copy.OVERSIZE
    budget: int = 1200
    template: Template = ASSUMED_TEMPLATE
    assumed: Mapping[str, int] = field(default_factory=dict)

    fingerprint: int = field(init=False, repr=False, compare=False)
    """63 bits that differ between policies that weigh or decide differently."""

    def __post_init__(self) -> None:
        said = repr(
            (
                WEIGHING,
                self.private.value,
                self.public.value,
                self.unsafe.value,
                self.budget,
                self.template.source,
                sorted(self.assumed.items()),
            )
        )
        digest = hashlib.blake2b(said.encode(), digest_size=8).digest()
        object.__setattr__(self, "fingerprint", int.from_bytes(digest) >> 1)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether each kind is copied."""

    private: bool
    public: bool
    unsafe: bool


def decide(policy: Policy, claims_bytes: int | None) -> Decision:
    """Decide for a user whose claims weigh this much; None where an event lacked a part of what they are made of.

    Oversize is what the token can't carry: the claims are over the budget, or the template hasn't all of that kind.
    The token never carries private metadata, so for that kind `oversize` means `always`. Where the weight isn't
    known, what there is is copied: a few bytes too many, rather than left to a token that may not hold it.
    """
    over = claims_bytes is None or claims_bytes > policy.budget

    def copied(copy: Copy, carried: bool) -> bool:
        return copy is Copy.ALWAYS or (copy is Copy.OVERSIZE and (over or not carried))

    return Decision(
        private=policy.private is not Copy.NEVER,
        public=copied(policy.public, policy.template.carries_public),
        unsafe=copied(policy.unsafe, policy.template.carries_unsafe),
    )
