"""Clerk's JSON to what it means: a user changed, a user was deleted, or nothing to us. Pure.

Only the fields that are used are checked: Clerk adds fields over time, and its own examples violate its own schema.
Metadata stays the raw JSON text that was sent, so numbers of any size and key order reach Postgres untouched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, TypeVar

import msgspec

from worker.errors import EventError
from worker.jsontext import compact, holdable

CHANGED_TYPES: Final = frozenset({"user.created", "user.updated"})
DELETED_TYPE: Final = "user.deleted"

LATEST_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999: later versions are refused, or the view could not show them."""

SECONDS_BELOW: Final = 100_000_000_000
"""An envelope `timestamp` below this is in seconds: docs and deliveries use milliseconds, Clerk's spec seconds."""

PROFILE: Final = (
    "first_name",
    "last_name",
    "username",
    "external_id",
    "created_at",
    "primary_email_address",
    "primary_phone_number",
    "email_verified",
    "phone_number_verified",
    "image_url",
    "two_factor_enabled",
)
"""What a claims template can carry of a user besides metadata, id and version; the order of `UserChanged.profile`."""

RESERVED: Final = "user_clerk_sync_check_"
"""How the ids begin of users whom `clerk-sync check` makes up. Clerk has none of them, and isn't asked for them."""

NULL: Final = b"null"
NO_PROFILE: Final = (NULL,) * len(PROFILE)

_USER_ID: Final = re.compile(r"[!-~]{1,255}")
_INTEGER: Final = re.compile(rb"-?[0-9]+")


@dataclass(frozen=True, slots=True)
class UserChanged:
    """A whole user as Clerk had it at `version`; a kind of metadata is None where its key was absent.

    `version` is `data.updated_at` and `event_at` the envelope's `timestamp`, both in milliseconds since 1970.
    Metadata is JSON text of an object (`null` arrives as `{}`). `replaced` counts what jsonb can't hold. `profile`
    is the compact JSON of each of PROFILE, `null` where it is missing or of a wrong type; `profiled` reads it from
    `sent`, where it hasn't been read yet. `sent_hash` is the same where everything that we use was sent the same, but
    for when; None where a kind of metadata was not sent.
    """

    user_id: str
    version: int
    event_at: int
    private_metadata: bytes | None
    public_metadata: bytes | None
    unsafe_metadata: bytes | None
    replaced: int = 0
    profile: tuple[bytes, ...] = NO_PROFILE
    sent: _User | None = field(default=None, compare=False, repr=False)
    sent_hash: bytes | None = field(default=None, compare=False)

    @property
    def whole(self) -> bool:
        """Whether all three kinds of metadata were sent, so that nothing older can add to it."""
        return (
            self.private_metadata is not None and self.public_metadata is not None and self.unsafe_metadata is not None
        )


@dataclass(frozen=True, slots=True)
class UserDeleted:
    """A user that Clerk deleted at `event_at` (ms). It carries no version: a deletion is terminal."""

    user_id: str
    event_at: int

    @property
    def version(self) -> int:
        return self.event_at


@dataclass(frozen=True, slots=True)
class Ignored:
    """An authentic event that isn't ours to apply; `reason` is safe to log."""

    type: str
    reason: str


Event = UserChanged | UserDeleted | Ignored


_ABSENT: Final = msgspec.Raw(NULL)


class _Envelope(msgspec.Struct):
    type: Any = msgspec.UNSET
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    timestamp: Any = None
    instance_id: Any = None


class _User(msgspec.Struct):
    id: Any = None
    updated_at: Any = None
    private_metadata: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    public_metadata: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    unsafe_metadata: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    # Whatever stands in what follows, the event is usable: so nothing of it is decoded along with the rest.
    first_name: msgspec.Raw = _ABSENT
    last_name: msgspec.Raw = _ABSENT
    username: msgspec.Raw = _ABSENT
    external_id: msgspec.Raw = _ABSENT
    created_at: msgspec.Raw = _ABSENT
    primary_email_address_id: msgspec.Raw = _ABSENT
    primary_phone_number_id: msgspec.Raw = _ABSENT
    email_addresses: msgspec.Raw = _ABSENT
    phone_numbers: msgspec.Raw = _ABSENT
    image_url: msgspec.Raw = _ABSENT
    two_factor_enabled: msgspec.Raw = _ABSENT


class _Contact(msgspec.Struct):
    """One of a user's email addresses or phone numbers."""

    id: msgspec.Raw = _ABSENT
    email_address: msgspec.Raw = _ABSENT
    phone_number: msgspec.Raw = _ABSENT
    verification: msgspec.Raw = _ABSENT


class _Verification(msgspec.Struct):
    status: msgspec.Raw = _ABSENT


T = TypeVar("T")
_envelope = msgspec.json.Decoder(_Envelope)
_user = msgspec.json.Decoder(_User)
_contacts = msgspec.json.Decoder(list[msgspec.Raw])
_contact = msgspec.json.Decoder(_Contact)
_verification = msgspec.json.Decoder(_Verification)


@dataclass(frozen=True, slots=True)
class Unusable:
    """What could be read of an authentic event that can't be applied, for the operator."""

    type: str | None
    user_id: str | None
    reason: str


def parse_event(body: bytes, *, instance_id: str | None = None) -> tuple[str, Event] | Unusable:
    """The event's type with its meaning, or why it can't be used. Never raises, whatever the bytes.

    With `instance_id`, events of another Clerk instance are ignored.
    """
    match read_event(body, instance_id=instance_id):
        case event_type, UserChanged() as user:
            return event_type, profiled(user)
        case read:
            return read


def read_event(body: bytes, *, instance_id: str | None = None) -> tuple[str, Event] | Unusable:
    """The same as `parse_event`, but for the profile of a changed user: that matters only to what the user weighs."""
    if not _is_utf8(body):
        # The receiver takes none; one that stands in the inbox all the same must not end the worker.
        return Unusable(None, None, "the body is not UTF-8")
    text, replaced = holdable(body)
    event_type: str | None = None
    user_id: str | None = None
    try:
        envelope = _decode(_envelope, text, "the body")
        event_type = _type(envelope.type)
        if event_type not in CHANGED_TYPES and event_type != DELETED_TYPE:
            return event_type, Ignored(event_type, "another type")
        if instance_id and isinstance(envelope.instance_id, str) and envelope.instance_id != instance_id:
            return event_type, Ignored(event_type, "another instance")
        user = _decode(_user, envelope.data, "data")
        user_id = _user_id(user.id)
        event_at = _event_at(envelope.timestamp)
        if event_type == DELETED_TYPE:
            return event_type, _deleted(user_id, event_at)
        return event_type, _changed(user, user_id, event_at, replaced)
    except EventError as error:
        return Unusable(event_type, user_id, str(error))


def parse_user(text: bytes, read_at: int | None) -> UserChanged | Unusable:
    """What one User of Clerk's Backend API means, by the rules of an event's `data`. Never raises.

    `read_at` is when Clerk answered (ms). It is no version: an answer may be older than an event that came before it.
    """
    if not _is_utf8(text):
        return Unusable(None, None, "the user is not UTF-8")
    # In brackets, as in a page: then the levels that are too deep are the same as in an event.
    bracketed, replaced = holdable(b"[" + text + b"]")
    user_id: str | None = None
    try:
        user = _decode(_user, bracketed[1:-1], "the user")
        user_id = _user_id(user.id)
        return profiled(_pulled(user, user_id, read_at, replaced))
    except EventError as error:
        return Unusable(None, user_id, str(error).removeprefix("data."))


def _pulled(user: _User, user_id: str, read_at: int | None, replaced: int) -> UserChanged:
    version = _milliseconds(user.updated_at, "data.updated_at")
    if version is None:
        raise EventError("data.updated_at is missing, so nothing tells the version")
    return _changed(user, user_id, version if read_at is None else max(read_at, version), replaced)


def _deleted(user_id: str, event_at: int | None) -> UserDeleted:
    if event_at is None:
        raise EventError("timestamp is missing, so nothing tells when the user was deleted")
    return UserDeleted(user_id, event_at)


def _changed(user: _User, user_id: str, event_at: int | None, replaced: int) -> UserChanged:
    version = _milliseconds(user.updated_at, "data.updated_at")
    if version is None:
        version = event_at
    if version is None:
        raise EventError("data.updated_at and timestamp are missing, so nothing tells the version")
    return UserChanged(
        user_id,
        version,
        version if event_at is None else event_at,
        _object(user.private_metadata, "data.private_metadata"),
        _object(user.public_metadata, "data.public_metadata"),
        _object(user.unsafe_metadata, "data.unsafe_metadata"),
        replaced,
        sent=user,
        sent_hash=_sent_hash(user, version),
    )


def _sent_hash(user: _User, version: int) -> bytes | None:
    """A hash of what was sent, as it was sent. Of 16 bytes: nobody is to find two metadata that have the same."""
    parts = (
        b"%d" % len(str(version)),  # a claim may be the version, and weigh as much as it has digits
        user.private_metadata,
        user.public_metadata,
        user.unsafe_metadata,
        user.first_name,
        user.last_name,
        user.username,
        user.external_id,
        user.created_at,
        user.primary_email_address_id,
        user.primary_phone_number_id,
        user.email_addresses,
        user.phone_numbers,
        user.image_url,
        user.two_factor_enabled,
    )
    sent = [part for part in parts if not isinstance(part, msgspec.UnsetType)]
    # No JSON has a zero byte in it.
    return None if len(sent) < len(parts) else blake2b(b"\0".join(sent), digest_size=16).digest()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decode(decoder: msgspec.json.Decoder[T], text: bytes | msgspec.Raw | msgspec.UnsetType, what: str) -> T:
    if isinstance(text, msgspec.UnsetType):
        raise EventError(f"{what} is missing")
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        # Its message names types and the path, never a value.
        raise EventError(f"{what}: {error}") from None
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise EventError(f"{what} is not valid JSON") from None


def _type(value: object) -> str:
    if not isinstance(value, str):
        raise EventError("type is missing or not a string")
    return value[:100]


def is_user_id(value: object) -> bool:
    """Whether this may be the id of a user: 1 to 255 visible ASCII characters."""
    return isinstance(value, str) and _USER_ID.fullmatch(value) is not None


def _user_id(value: object) -> str:
    if value is None:
        raise EventError("data.id is missing")
    if not isinstance(value, str) or not is_user_id(value):
        raise EventError("data.id is not a user id (1 to 255 visible ASCII characters)")
    return value


def _milliseconds(value: object, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise EventError(f"{name} is not an integer")
    if not 0 <= value <= LATEST_MS:
        raise EventError(f"{name} is not a time in milliseconds between 1970 and 9999")
    return value


def _event_at(value: object) -> int | None:
    milliseconds = _milliseconds(value, "timestamp")
    if milliseconds is not None and milliseconds < SECONDS_BELOW:
        return milliseconds * 1000
    return milliseconds


def _object(value: msgspec.Raw | msgspec.UnsetType, name: str) -> bytes | None:
    if isinstance(value, msgspec.UnsetType):
        return None
    text = bytes(value).strip(b" \t\r\n")
    if text == b"null":
        return b"{}"
    if not text.startswith(b"{"):
        raise EventError(f"{name} is not an object")
    return text


# --- The profile. It matters only to what a token weighs, so nothing in it makes an event unusable.


def profiled(user: UserChanged) -> UserChanged:
    """The same user with the profile that was sent."""
    if user.sent is None:
        return user
    return UserChanged(
        user.user_id,
        user.version,
        user.event_at,
        user.private_metadata,
        user.public_metadata,
        user.unsafe_metadata,
        user.replaced,
        _profile(user.sent),
        sent_hash=user.sent_hash,
    )


def _profile(user: _User) -> tuple[bytes, ...]:
    """The compact JSON of each of PROFILE, in that order."""
    email = _primary(user.email_addresses, user.primary_email_address_id)
    phone = _primary(user.phone_numbers, user.primary_phone_number_id)
    return (
        _string(user.first_name),
        _string(user.last_name),
        _string(user.username),
        _string(user.external_id),
        _integer(user.created_at),
        _string(email.email_address),
        _string(phone.phone_number),
        _verified(email),
        _verified(phone),
        _string(user.image_url),
        _boolean(user.two_factor_enabled),
    )


_NO_CONTACT: Final = _Contact()


def _primary(contacts: msgspec.Raw, contact_id: msgspec.Raw) -> _Contact:
    """The contact with that id, which need not be the first one."""
    wanted = _string(contact_id)
    text = bytes(contacts)
    if wanted == NULL or not text.startswith(b"["):
        return _NO_CONTACT
    for item in map(bytes, _contacts.decode(text)):
        # A cheap first look; the id may be spelled with escapes.
        if item.startswith(b"{") and (wanted in item or b"\\" in item):
            contact = _contact.decode(item)
            if _string(contact.id) == wanted:
                return contact
    return _NO_CONTACT


def _verified(contact: _Contact) -> bytes:
    text = bytes(contact.verification)
    if not text.startswith(b"{"):
        return b"false"
    return b"true" if _string(_verification.decode(text).status) == b'"verified"' else b"false"


def _string(value: msgspec.Raw) -> bytes:
    text = bytes(value)
    if not text.startswith(b'"'):
        return NULL
    return compact(text) if b"\\" in text else text


def _integer(value: msgspec.Raw) -> bytes:
    text = bytes(value)
    return text if _INTEGER.fullmatch(text) else NULL


def _boolean(value: msgspec.Raw) -> bytes:
    text = bytes(value)
    return text if text in (b"true", b"false") else NULL
