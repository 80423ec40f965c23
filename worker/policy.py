"""Which kinds of a user's metadata are copied to Postgres. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.claims import Weights
from worker.events import UserChanged


class Copy(StrEnum):
    """What `COPY_PRIVATE`, `COPY_PUBLIC` and `COPY_UNSAFE` can say of a kind of metadata."""

    ALWAYS = "always"
    OVERSIZE = "oversize"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Policy:
    """What to copy of each kind; `budget` is what the session token can carry, in bytes of custom claims."""

    private: Copy = Copy.ALWAYS
    public: Copy = Copy.OVERSIZE
    unsafe: Copy = Copy.OVERSIZE
    budget: int = 1200


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether each kind is copied."""

    private: bool
    public: bool
    unsafe: bool


def decide(policy: Policy, user: UserChanged, weights: Weights) -> Decision:
    """Decide for one user.

    The session token never carries private metadata, so for that kind `oversize` means `always`. Where an event
    lacks a kind, its weight can't be known from the event: what it does carry is then copied, which costs a few
    bytes, rather than left to a token that may not hold it.
    """
    token_holds_all = (
        user.public_metadata is not None and user.unsafe_metadata is not None and weights.claims_bytes <= policy.budget
    )

    def copied(copy: Copy) -> bool:
        return copy is Copy.ALWAYS or (copy is Copy.OVERSIZE and not token_holds_all)

    return Decision(policy.private is not Copy.NEVER, copied(policy.public), copied(policy.unsafe))
