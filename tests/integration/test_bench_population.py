"""The benchmark's users: the copied ones are as if each had come by an event."""

from __future__ import annotations

from collections.abc import Callable

from bench import population
from worker.db import Connection
from worker.policy import Policy
from worker.users import gate_users, weigh

LATER = population.MADE_AT + 1


def outcomes(connection: Connection, turn: int, *numbers: int, version: int = LATER) -> list[str]:
    policy = Policy()
    changes = [weigh(policy, population.user(number, version, turn)) for number in numbers]
    return gate_users(connection, policy, changes).outcomes


def test_to_a_copied_user_a_sign_in_changes_nothing_and_other_metadata_something(
    connect: Callable[[], Connection],
) -> None:
    connection = connect()
    population.populate_ours(connection, 2003)
    assert connection.execute("select count(*) from clerk.user_metadata").fetchone() == (2003,)
    copied = (1000, 1001, 1999, 2002)
    assert outcomes(connection, 0, *copied) == ["unchanged"] * 4
    assert outcomes(connection, 1, *copied, version=LATER + 1) == ["applied"] * 4
    assert outcomes(connection, 0, 2003) == ["applied"], "there is nobody of the next number"


def test_what_a_copied_user_weighs_is_what_their_own_event_would_weigh(connect: Callable[[], Connection]) -> None:
    connection = connect()
    population.populate_ours(connection, 1005)
    weighs = "select claims_bytes from clerk.users where user_id = %s"
    kept = [connection.execute(weighs, (population.user_id(number),)).fetchone() for number in range(1000, 1005)]
    events = [weigh(Policy(), population.user(number, LATER, 0)).claims_bytes for number in range(1000, 1005)]
    assert kept == [(claims_bytes,) for claims_bytes in events]


def test_the_chosen_are_the_same_for_a_seed_and_those_who_change_are_among_those_of_a_larger_share() -> None:
    some, all_of_them = (population.chosen(7, 10_000, 500, share) for share in (0.1, 1.0))
    assert some == population.chosen(7, 10_000, 500, 0.1) != population.chosen(8, 10_000, 500, 0.1)
    assert len({number for number, _ in some}) == 500
    assert 30 <= sum(turn > 0 for _, turn in some) <= 70
    assert all(turn > 0 for _, turn in all_of_them)
    twice = population.chosen(7, 100, 200, 1.0)
    assert sorted(number for number, _ in twice[:100]) == sorted(number for number, _ in twice[100:])
    assert len(set(twice)) == 200
