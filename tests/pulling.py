"""Pulling in tests: clients of a stand-in for Clerk's API, and commands run against one."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from typing import Any, Final

import httpx
from click.testing import CliRunner, Result

from tests.events import deleted, envelope, incoming
from worker import inbox, sync
from worker.clerk_api import ClerkApi
from worker.cli import main
from worker.db import Connection
from worker.policy import Policy
from worker.standin import StandIn, now_ms

LIVE: Final = "sk_live_of_these_tests"
"""A key of a live instance: its budget is large enough not to be noticed."""

KEY: Final = "of these tests"
"""What a key is known by."""

NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; to load the certificates takes 0.1 s each time


def api_of(
    clerk: StandIn,
    *,
    take: Callable[[], float] = lambda: 0.0,
    block: Callable[[float], None] = lambda _: None,
    patience: float = 20,
) -> ClerkApi:
    """A client of a stand-in, by default without a budget."""
    client = httpx.Client(verify=NO_TLS, trust_env=False)
    return ClerkApi(clerk.secret_key, clerk.url, take, on_retry_after=block, client=client, patience_seconds=patience)


def environment(clerk: StandIn, database_url: str, **changes: str | None) -> dict[str, str | None]:
    """The environment of a command that pulls from a stand-in."""
    return {
        "CLERK_SECRET_KEY": clerk.secret_key,
        "CLERK_SECRET_KEY_FILE": None,
        "CLERK_API_URL": clerk.url,
        "DATABASE_URL": database_url,
        "DATABASE_URL_FILE": None,
        "SESSION_CLAIMS": None,
        **changes,
    }


def command(*arguments: str, env: dict[str, Any]) -> Result:
    """Run `clerk-sync ...` in this process. What it doesn't catch is raised."""
    return CliRunner(catch_exceptions=False).invoke(main, arguments, env=env)


def webhook(clerk: StandIn, user_id: str, *, after_ms: int = 15) -> bytes:
    """The event that tells of a user as Clerk has them now, or that Clerk has them no more."""
    found = clerk._users.by_id.get(user_id)
    if found is None:
        return deleted(user_id, now_ms())
    user = json.loads(found.body)
    return envelope("user.updated", user, user["updated_at"] + after_ms)


def deliver(connection: Connection, *bodies: bytes, policy: Policy | None = None) -> None:
    """Record events, in this order, and apply them."""
    inbox.record(connection, [incoming(body) for body in bodies])
    sync.drain(connection, policy or Policy())
