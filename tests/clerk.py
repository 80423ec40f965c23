"""Clerk's side of a delivery: signs bodies as Svix does. It shares no code with what it judges.

https://docs.svix.com/receiving/verifying-payloads/how-manual
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
import uuid
from typing import Final

SECRET: Final = "whsec_" + base64.b64encode(bytes(range(24))).decode()


def signature(secret: str, body: bytes, *, svix_id: str, timestamp: int | str) -> str:
    """One entry of the signature header: `v1,` and the base64 of the HMAC-SHA256."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = b".".join((svix_id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()


def sign(secret: str, body: bytes, *, svix_id: str | None = None, timestamp: int | str | None = None) -> dict[str, str]:
    """The headers of one delivery, by default a new message sent now; `timestamp` in seconds since 1970."""
    svix_id = f"msg_{uuid.uuid4().hex}" if svix_id is None else svix_id
    timestamp = int(time.time()) if timestamp is None else timestamp
    return {
        "svix-id": svix_id,
        "svix-timestamp": str(timestamp),
        "svix-signature": signature(secret, body, svix_id=svix_id, timestamp=timestamp),
    }
