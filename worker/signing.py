"""What a webhook signing secret looks like. Pure: settings refuse a bad one before anything starts."""

from __future__ import annotations

import base64
from typing import Final

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - how secrets begin, not one

_COPY_AGAIN: Final = "copy the endpoint's Signing Secret from Clerk's Dashboard, Webhooks, once more"


def signing_secret_problem(secret: str) -> str | None:
    """Say what is wrong with a signing secret and what to do, without quoting any of it; None when it's fine.

    Svix's library drops whatever isn't base64 from a secret and verifies with the rest, so a slip would only
    show as signatures that never match: https://docs.svix.com/receiving/verifying-payloads/how-manual
    """
    if not secret.startswith(SECRET_PREFIX):
        return f"doesn't start with {SECRET_PREFIX}: {_COPY_AGAIN}"
    encoded = secret[len(SECRET_PREFIX) :]
    if not encoded:
        return f"nothing follows {SECRET_PREFIX}: {_COPY_AGAIN}"
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        key = b""
    # The round trip also refuses what decoding forgives: surplus padding, and bits that belong to no byte.
    if base64.b64encode(key).decode() != encoded:
        return f"is cut short or has something added, for it isn't base64: {_COPY_AGAIN}"
    return None
