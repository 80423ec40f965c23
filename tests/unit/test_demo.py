"""What the demonstration takes to be right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from worker.cli.demo import BIOGRAPHY, Row, _program, users, wrong_rows

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


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        (".venv/bin/clerk-sync", ".venv/bin/clerk-sync"),  # as make does
        ("HERE/.venv/bin/clerk-sync", ".venv/bin/clerk-sync"),
        ("/opt/clerk-sync/bin/clerk-sync", "clerk-sync"),
    ],
)
def test_what_another_terminal_is_to_run_is_found_from_the_same_folder(
    called: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [called.replace("HERE", str(tmp_path)), "demo"])
    assert _program() == expected
