"""What the demonstration takes to be right."""

from __future__ import annotations

import pytest

from worker.cli.demo import BIOGRAPHY, Row, users, wrong_rows

RUN = "0a1b2c"
PEOPLE = users(RUN)

RIGHT: list[Row] = [
    (
        PEOPLE.ada,
        {"plan": "pro", "credits": 9007199254740993},
        {"role": "admin", "biography": BIOGRAPHY},
        {},
        1322,
    ),
    (PEOPLE.bob, {"plan": "team"}, None, None, 57),
    (PEOPLE.zoe, {"plan": "early"}, None, None, 58),
]


def test_the_rows_of_the_living_and_no_others_are_right() -> None:
    assert wrong_rows(RIGHT, RUN) == []


@pytest.mark.parametrize("user", [PEOPLE.ada, PEOPLE.bob, PEOPLE.zoe])
def test_a_row_that_is_missing_is_named(user: str) -> None:
    assert wrong_rows([row for row in RIGHT if row[0] != user], RUN) == [f"{user} is not as it should be"]


@pytest.mark.parametrize("user", [PEOPLE.dan, PEOPLE.eve])
def test_a_row_of_somebody_who_is_deleted_is_named(user: str) -> None:
    assert wrong_rows([*RIGHT, (user, {"plan": "free"}, None, None, 57)], RUN) == [f"{user} is not as it should be"]
