"""Which shortcodes Clerk knows, what those weigh that no user tells, and which claims Clerk sets itself.

https://clerk.com/docs/guides/sessions/jwt-templates names most of them. `user.organizations`, `session.…` and the
permissions and role of `org_membership` stand in other guides or are widely used.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

USER_SHORTCODES: Final = (
    "user.id",
    "user.first_name",
    "user.last_name",
    "user.full_name",
    "user.username",
    "user.external_id",
    "user.created_at",
    "user.updated_at",
    "user.primary_email_address",
    "user.primary_phone_number",
    "user.email_verified",
    "user.phone_number_verified",
    "user.image_url",
    "user.two_factor_enabled",
    "user.public_metadata",
    "user.unsafe_metadata",
)
"""What a user's events tell. Any path below the two kinds of metadata is a shortcode too."""

ASSUMED_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "org.id": 33,
        "org.role": 20,
        "org.name": 40,
        "org.slug": 40,
        "org.public_metadata": 200,
        "org_membership.role": 20,
        "org_membership.permissions": 300,
        "org_membership.public_metadata": 200,
        "user.organizations": 200,
        "session.actor": 60,
        "session.reverification_id": 40,
    }
)
"""What no user tells: it depends on the session and its organization. Bytes of the value's JSON that are assumed."""

_FIELD_BYTES: Final = 50
_WITH_FIELDS: Final = frozenset({"org.public_metadata", "org_membership.public_metadata", "session.actor"})

RESERVED: Final = frozenset(
    {"azp", "exp", "fva", "iat", "iss", "jti", "nbf", "sid", "sub", "v", "pla", "fea", "sts", "o", "act"}
)
"""Top-level claims that Clerk sets and no template can:
https://clerk.com/docs/guides/sessions/session-tokens#default-claims"""


def assumed_bytes(path: tuple[str, ...], overrides: Mapping[str, int]) -> int | None:
    """Give the bytes that a shortcode's value is assumed to have; None where a user's data tells, or nobody does.

    `overrides` is by the shortcode as it is written, `org.name`, and changes no other: neither above nor below it. It
    may also name one that isn't known here.
    """
    written = ".".join(path)
    default = ASSUMED_BYTES.get(written)
    if default is None and len(path) > 2 and ".".join(path[:2]) in _WITH_FIELDS:
        default = _FIELD_BYTES
    return None if _is_told(path) else overrides.get(written, default)


def _is_told(path: tuple[str, ...]) -> bool:
    return path[:2] in _METADATA or ".".join(path) in USER_SHORTCODES


def can_be_assumed(written: str) -> bool:
    """Whether bytes may be assumed of a shortcode: any dot path but those that a user's own data tells."""
    path = tuple(written.split("."))
    return (
        len(path) > 1
        and all(_NAME.fullmatch(name) for name in path)
        and "private_metadata" not in path
        and not _is_told(path)
    )


_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_SINGLE: Final = frozenset({*USER_SHORTCODES, *ASSUMED_BYTES})
_METADATA: Final = (("user", "public_metadata"), ("user", "unsafe_metadata"))

_OBJECTS: Final = {
    "organization": "org",
    "organization_membership": "org_membership",
    "membership": "org_membership",
}
_MEANT: Final = {
    "user.avatar": "user.image_url",
    "user.email": "user.primary_email_address",
    "user.email_address": "user.primary_email_address",
    "user.email_addresses": "user.primary_email_address",
    "user.metadata": "user.public_metadata",
    "user.name": "user.full_name",
    "user.phone": "user.primary_phone_number",
    "user.phone_number": "user.primary_phone_number",
    "user.phone_numbers": "user.primary_phone_number",
    # Clerk's own example of a template has it.
    "user.primary_phone_address": "user.primary_phone_number",
}


def known(path: tuple[str, ...]) -> bool:
    """Whether Clerk gives this shortcode a value, for some user at least."""
    return ".".join(path) in _SINGLE or path[:2] in _METADATA or assumed_bytes(path, {}) is not None


def closest(path: tuple[str, ...]) -> tuple[str, ...]:
    """Give the shortcode that was probably meant by an unknown one; empty where none is close.

    Private metadata is given as such, though no shortcode, since nothing else was meant.
    """
    first, *second = (re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in path[:2])
    written = ".".join((_OBJECTS.get(first, first), *second))
    if second == ["private_metadata"]:
        return tuple(written.split("."))
    meant = _MEANT.get(written, written)
    if meant not in _SINGLE:
        meant = next(iter(difflib.get_close_matches(meant, _SINGLE, n=1, cutoff=0.75)), "")
    head = tuple(meant.split(".")) if meant else ()
    return (*head, *path[2:]) if head and known((*head, *path[2:])) else head
