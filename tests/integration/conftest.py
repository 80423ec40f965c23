"""What tests of pulling share: a stand-in for Clerk, a client of it, and a connection. Some files have their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.pulling import LIVE, api_of
from worker.clerk_api import ClerkApi
from worker.db import Connection
from worker.standin import StandIn


@pytest.fixture
def clerk() -> Iterator[StandIn]:
    """Clerk, whose rate limit is out of reach."""
    with StandIn(LIVE, limit=100_000) as standin:
        yield standin


@pytest.fixture
def api(clerk: StandIn) -> Iterator[ClerkApi]:
    """A client without a budget."""
    with contextlib.closing(api_of(clerk)) as client:
        yield client


@pytest.fixture
def connection(connect: Callable[[], Connection]) -> Connection:
    """A connection that commits."""
    return connect()
