"""Who sent a delivery: Svix's verification over one or several secrets, with one error for every failure.

The arithmetic is Svix's own. What that leaves to its caller is here: on malformed input it lets other errors
through, and it takes spellings that must not become a key of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

from svix.webhooks import Webhook, WebhookVerificationError

from worker.errors import SignatureError


class Headers(Protocol):
    """A mapping of header names to values, or werkzeug's Headers, which aren't quite one."""

    def items(self) -> Iterable[tuple[str, str]]: ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """An authentic delivery: the message's id, the same on each attempt, and when this one was signed."""

    svix_id: str
    sent_at: datetime


Verify = Callable[[Headers, bytes], Delivery]

_FIELDS: Final = ("id", "timestamp", "signature")
_FAMILIES: Final = ("svix", "webhook")
NAMES: Final = frozenset(f"{family}-{field}" for family in _FAMILIES for field in _FIELDS)

_ID: Final = re.compile(r"[!-~]{1,255}")
# As it was signed: Svix's library reads a float, and would take " 1e9", "1_0" or leading zeros just as well.
_TIMESTAMP: Final = re.compile(r"[1-9][0-9]{0,10}")

_DOUBLED: Final = "a signature header was sent twice"
_MISSING: Final = "svix-id, svix-timestamp or svix-signature is missing: only signed deliveries are taken here"
_BAD_ID: Final = "svix-id is not 1 to 255 visible ASCII characters"
_BAD_TIMESTAMP: Final = "svix-timestamp is not a whole number of seconds"
_NOT_UTF8: Final = "the body is not UTF-8"
_STALE: Final = "svix-timestamp is more than 5 minutes off: check the clocks, or deliver the event again"
_NO_MATCH: Final = (
    "no signature matches: check that the signing secret is this endpoint's own,"
    " and that nothing changes the body on its way"
)


def make_verifier(secrets: Sequence[str]) -> Verify:
    """Make the function that tells an authentic delivery, signed with any of these secrets, from all else.

    The secrets are such as `worker.signing` finds no problem with. The function takes the headers, in any
    case and of either family (`svix-*` before `webhook-*`), and the body as it was received, and raises
    SignatureError with a sentence that quotes nothing of them. Timestamps may be 5 minutes off.
    https://docs.svix.com/receiving/verifying-payloads/how-manual
    """
    if not secrets:
        raise ValueError("at least one signing secret is needed")
    webhooks = [Webhook(secret) for secret in secrets]

    def verify(headers: Headers, body: bytes) -> Delivery:
        svix_id, timestamp, signature = _signature_headers(headers)
        if not _ID.fullmatch(svix_id):
            raise SignatureError(_BAD_ID)
        if not _TIMESTAMP.fullmatch(timestamp):
            raise SignatureError(_BAD_TIMESTAMP)
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise SignatureError(_NOT_UTF8) from None
        sent = {"svix-id": svix_id, "svix-timestamp": timestamp, "svix-signature": signature}
        problem = _NO_MATCH
        for webhook in webhooks:
            try:
                webhook.verify(text, sent)
            except WebhookVerificationError as error:
                problem = _STALE if "timestamp" in str(error) else _NO_MATCH
            except ValueError:  # base64, commas or characters of the signature header are wrong
                problem = _NO_MATCH
            else:
                return Delivery(svix_id, datetime.fromtimestamp(int(timestamp), UTC))
        raise SignatureError(problem)

    return verify


def _signature_headers(headers: Headers) -> tuple[str, str, str]:
    """The three headers' values, each from the first family that has it, as Svix's library chooses them."""
    sent: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower()
        if lower in NAMES:
            if lower in sent:
                raise SignatureError(_DOUBLED)
            sent[lower] = value
    svix_id, timestamp, signature = (
        next((sent[name] for family in _FAMILIES if (name := f"{family}-{field}") in sent), "") for field in _FIELDS
    )
    if not (svix_id and timestamp and signature):
        raise SignatureError(_MISSING)
    return svix_id, timestamp, signature
