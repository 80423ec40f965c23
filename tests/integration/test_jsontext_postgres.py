"""Postgres itself judges what jsonb can hold."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.jsontext import DEPTH, fits_numeric, holdable

CAST = "select (%(text)s::text)::jsonb::text"


def through_jsonb(db: psycopg.Connection[Any], text: str) -> str:
    """Give what Postgres says of a text once it was jsonb. A refusal leaves the transaction usable."""
    with db.transaction():
        row = db.execute(CAST, {"text": text}).fetchone()
    assert row is not None
    held: str = row[0]
    return held


def is_held(db: psycopg.Connection[Any], text: str) -> bool:
    try:
        through_jsonb(db, text)
    except psycopg.DataError:
        return False
    return True


def number(text: str) -> tuple[str, Decimal]:
    """A number of any size, which is never equal to true or to a string."""
    return "number", Decimal(text)


def read(text: str) -> object:
    return json.loads(text, parse_int=number, parse_float=number)


digits = st.text("0123456789", min_size=1, max_size=3)
numbers = st.one_of(
    st.integers().map(str),
    st.builds("{}.{}".format, st.integers(), digits),
    st.builds(
        "{}{}{}{}{}".format,
        st.integers(),
        st.one_of(st.just(""), digits.map(".{}".format)),
        st.sampled_from(["e", "E"]),
        st.sampled_from(["", "+", "-", "00", "-00"]),
        st.one_of(
            st.integers(0, 30),
            st.integers(16_370, 16_390),
            st.integers(131_060, 131_080),
            st.sampled_from([9999, 1_073_741_821, 1_073_741_824, 10**30]),
        ),
    ),
)
pieces = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=4).map(lambda text: json.dumps(text, ensure_ascii=False)[1:-1]),
    st.text(st.characters(codec=None), max_size=4).map(lambda text: json.dumps(text)[1:-1]),
    st.sampled_from([r"\\", r"\"", r"\/", "u0000", r"\u0000", r"\ud800", r"\uDBff", r"\udc00", r"\ud83d\ude00"]),
)
strings = st.lists(pieces, max_size=5).map(lambda found: '"' + "".join(found) + '"')
deep = st.sampled_from([1, DEPTH - 20, DEPTH - 1, DEPTH, DEPTH + 1, 5000]).map(lambda n: "[" * n + "]" * n)
texts = st.recursive(
    st.one_of(st.sampled_from(["true", "false", "null"]), numbers, strings, deep),
    lambda items: st.one_of(
        st.lists(items, max_size=4).map(lambda found: f"[{' ,'.join(found)}]"),
        st.lists(st.builds("{}: {}".format, strings, items), max_size=4).map(lambda found: f"{{{','.join(found)}\n}}"),
    ),
    max_leaves=12,
)

examples = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(text=texts)
@examples
def test_what_is_holdable_is_held_and_comes_back_equal(db: psycopg.Connection[Any], text: str) -> None:
    body, _ = holdable(text.encode())
    assert read(through_jsonb(db, body.decode())) == read(body.decode())


@given(text=texts)
@examples
def test_nothing_is_replaced_in_a_text_that_is_held_as_it_is(db: psycopg.Connection[Any], text: str) -> None:
    body, replaced = holdable(text.encode())
    # Postgres holds deeper ones than our parser reads, and exponents that write out to thousands of digits.
    if "[" * 400 not in text and not re.search("[eE][+-]?0*[0-9]{4}", text):
        assert bool(replaced) != is_held(db, text)
    assert replaced or body == text.encode()


@given(text=numbers)
@examples
def test_numbers_are_judged_as_postgres_judges_them(db: psycopg.Connection[Any], text: str) -> None:
    assert fits_numeric(text.encode()) == is_held(db, text)


@pytest.mark.parametrize(
    ("held", "refused"),
    [
        ("9" * 131_072, "9" * 131_073),
        ("-" + "9" * 131_072 + "." + "9" * 16_383, "0." + "0" * 16_384),
        ("1e131071", "1e131072"),
        ("0.001e131074", "10e131071"),
        ("0." + "0" * 20_000 + "1e151072", "0." + "0" * 20_000 + "1e151073"),
        ("0e1073741822", "0e1073741824"),
        ("1e-16383", "0e-16384"),
        ("1.5e-16382", "1.5e-16383"),
        ("1" * 140_000 + "e-10000", "1" * 200_000 + "e-70000"),
        ("1e" + "0" * 200_000 + "5", "1e99999999999999999999"),
        (r'"\ud83d\ude00\\u0000"', r'"\\ud83d\ude00"'),
        (r'"\\\\ud800"', r'"\\\ud800"'),
    ],
    ids=lambda text: text[:20],
)
def test_the_borders_are_those_of_postgres(db: psycopg.Connection[Any], held: str, refused: str) -> None:
    assert is_held(db, held)
    if "e" not in held or len(held) > 100_000:  # what an exponent writes out is replaced before it comes to that
        assert holdable(held.encode()) == (held.encode(), 0)
    assert not is_held(db, refused)
    repaired, replaced = holdable(refused.encode())
    assert replaced == 1
    assert is_held(db, repaired.decode())


def test_the_deepest_text_is_held(db: psycopg.Connection[Any]) -> None:
    body, replaced = holdable(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    assert replaced == 1
    held = through_jsonb(db, body.decode())
    assert held.count("{") == DEPTH
    assert "\ufffd" in held
