"""What a user's custom claims weigh in the session token: UTF-8 bytes of the compact JSON. Pure.

Until a real template is given, the assumed one carries both kinds that a token can carry, whole:
`{"public_metadata": "{{user.public_metadata}}", "unsafe_metadata": "{{user.unsafe_metadata}}"}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from worker.events import UserChanged
from worker.jsontext import compact_size

EMPTY: Final = b"{}"
FRAME_BYTES: Final = len('{"public_metadata":,"unsafe_metadata":}')
"""What the assumed template weighs without the two values."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes in the token: of each kind that an event carried (None where its key was absent) and in all.

    An absent kind counts as `{}` in `claims_bytes`; the gate puts in what it knows of that kind.
    """

    public_bytes: int | None
    unsafe_bytes: int | None
    claims_bytes: int


def weigh(user: UserChanged) -> Weights:
    """The weights of one user's claims, by the assumed template."""
    public = None if user.public_metadata is None else compact_size(user.public_metadata)
    unsafe = None if user.unsafe_metadata is None else compact_size(user.unsafe_metadata)
    absent = len(EMPTY)
    total = FRAME_BYTES + (absent if public is None else public) + (absent if unsafe is None else unsafe)
    return Weights(public, unsafe, total)
