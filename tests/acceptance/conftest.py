"""One running system for all acceptance tests. Each brings users of its own, so nothing is emptied in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.acceptance.system import CANARY, Client, System
from tests.clerk import SECRET
from worker import local

OLD_SECRET: Final = "whsec_b2xkLXNlY3JldC1zdGlsbC12YWxpZA=="


@pytest.fixture(scope="session")
def new_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., System]]:
    """Makes systems, each with a folder and an environment of its own, which are stopped and deleted in the end."""
    made: list[System] = []

    def make(**environment: str) -> System:
        folder = tmp_path_factory.mktemp("up")
        folder.chmod(0o711)  # the account that Postgres runs as has to pass
        made.append(System(folder, environment))
        return made[-1]

    yield make
    for system in made:
        if system.running:
            system.stop()
        if system.data_dir.exists():
            local.discard(system.data_dir)


@pytest.fixture(scope="session")
def system(new_system: Callable[..., System]) -> Iterator[System]:
    """The system, at the most talkative, while its signing secret is being rotated."""
    running = new_system(LOG_LEVEL="DEBUG", CLERK_WEBHOOK_SIGNING_SECRET=f"{SECRET}, {OLD_SECRET}")
    running.start()
    yield running
    if running.running:
        assert running.stop() == 0
    # Whatever the tests did to it.
    assert CANARY not in running.output


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    """A connection to the receiver."""
    with system.client() as connected:
        yield connected
