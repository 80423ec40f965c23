"""What the demonstration asks of its stand-in for Clerk, on a database in use and with the key of a real instance."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.populations import user
from worker.cli.demo import ask, happen_unheard, users
from worker.db import Connection
from worker.policy import Policy
from worker.standin import StandIn
from worker.users import gate_users, weigh

RUN = "0a1b2c"
LIVING = "select user_id from clerk.users where deleted_at is null order by user_id"


def test_only_its_own_users_are_asked_for_and_never_with_the_key_that_is_set(
    connect: Callable[[], Connection], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect()
    gate_users(
        connection,
        Policy(),
        [weigh(Policy(), one) for one in (user(user_id="user_of_an_application"), user(user_id=users(RUN).dan))],
    )
    with StandIn("sk_live_of_somebody") as theirs, StandIn() as clerk:
        monkeypatch.setenv("CLERK_SECRET_KEY", theirs.secret_key)
        monkeypatch.setenv("CLERK_API_URL", theirs.url)
        monkeypatch.setenv("HTTP_PROXY", theirs.url)
        happen_unheard(clerk, RUN, 1_800_000_000_000)
        results, calls = ask(clerk, database_url, RUN)
        asked_for = [user_id for call in clerk.calls for user_id in call.query["user_id"]]
        assert calls == len(clerk.calls) == 1
        assert not theirs.calls
    zoe, dan = users(RUN).zoe, users(RUN).dan
    assert asked_for == [zoe, dan]
    assert [(result.user_id, result.outcome) for result in results] == [(zoe, "applied"), (dan, "erased")]
    assert [user_id for (user_id,) in connection.execute(LIVING)] == ["user_of_an_application", zoe]
