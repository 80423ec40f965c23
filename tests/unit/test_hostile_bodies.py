"""No bytes make the parser raise or take long, and what it makes of them is what Python's json does."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.events import changed, deleted
from tests.hostile import BROKEN, DEEP_ELSEWHERE, METADATA, MIB, NOT_UTF8, VALID, event
from worker.events import LATEST_MS, Ignored, Unusable, UserChanged, UserDeleted, parse_event, parse_user
from worker.policy import Policy
from worker.users import weigh

SECONDS: Final = 3.0
"""Some 0.8 s at most where this was written; what is quadratic takes minutes."""


def user(body: bytes) -> UserChanged:
    parsed = parse_event(body)
    assert isinstance(parsed, tuple), parsed
    assert isinstance(parsed[1], UserChanged)
    return parsed[1]


@pytest.mark.parametrize("name", METADATA)
def test_a_hostile_mebibyte_is_read_and_weighed_in_linear_time(name: str) -> None:
    body = event(METADATA[name])
    assert len(body) <= MIB
    started = time.thread_time()
    read = user(body)
    weigh(Policy(), read)
    assert time.thread_time() - started < SECONDS
    assert read.private_metadata == b'{"plan": "pro"}'


@pytest.mark.parametrize("name", [*BROKEN, *NOT_UTF8])
def test_what_is_not_json_is_unusable(name: str) -> None:
    parsed = parse_event({**BROKEN, **NOT_UTF8}[name])
    assert isinstance(parsed, Unusable), name
    assert "drop table" not in parsed.reason


@pytest.mark.parametrize("body", DEEP_ELSEWHERE, ids=["data", "envelope", "deletion"])
def test_nesting_elsewhere_makes_no_event_unusable(body: bytes) -> None:
    parsed = parse_event(body)
    assert isinstance(parsed, Unusable) == (b"}" * 100_002 in body)


def test_a_body_cut_off_anywhere_is_unusable(data: Path) -> None:
    for body in (VALID, deleted(), (data / "capture_2025-04__user.created.json").read_bytes().rstrip()):
        for end in range(0, len(body), 1 + len(body) // 300):
            assert isinstance(parse_event(body[:end]), Unusable)


# --- Each field that is used, with each kind of value: what it should mean, by Python's objects.

VALUES: Final = [
    *("null", "true", "false", "0", "-0", "-1", "5", "1.0", "1e3", "-1e300", "1700000000000", str(LATEST_MS)),
    *(str(LATEST_MS + 1), "9223372036854775808", "18446744073709551616", "1" * 4000, "1" * 5000, '""', '"x"', '"5"'),
    *(
        '"user_\\u0061"',
        '"user_\\u0000"',
        '"user_\\ud800"',
        '"é"',
        '"a b"',
        '"' + "u" * 255 + '"',
        '"' + "u" * 256 + '"',
    ),
    *("[]", "{}", "[[]]", '{"a":1}', "[" * 600 + "]" * 600, '{"a":' * 600 + "1" + "}" * 600),
]
ENVELOPE: Final = ("type", "timestamp", "data")
METADATA_FIELDS: Final = ("private_metadata", "public_metadata", "unsafe_metadata")


class Big(str):
    """An integer of any size, as it was sent."""

    __slots__ = ()


def reads(text: bytes) -> Any:
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else Big(digits))


def is_time(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LATEST_MS


def is_id(value: Any) -> bool:
    return type(value) is str and 1 <= len(value) <= 255 and all("!" <= char <= "~" for char in value)


def meaning(body: Any) -> type:
    """What the contract's table makes of a body of Python's objects."""
    if type(body) is not dict or type(body.get("type")) is not str:
        return Unusable
    if body["type"] not in ("user.created", "user.updated", "user.deleted"):
        return Ignored
    user, at = body.get("data"), body.get("timestamp")
    if type(user) is not dict or not is_id(user.get("id")) or not (at is None or is_time(at)):
        return Unusable
    if body["type"] == "user.deleted":
        return Unusable if at is None else UserDeleted
    version = user.get("updated_at")
    kinds = [user.get(f"{kind}_metadata") for kind in ("private", "public", "unsafe")]
    if not (version is None or is_time(version)) or (version is None and at is None):
        return Unusable
    return UserChanged if all(kind is None or type(kind) is dict for kind in kinds) else Unusable


def means(body: bytes) -> type:
    parsed = parse_event(body)
    return Unusable if isinstance(parsed, Unusable) else type(parsed[1])


@pytest.mark.parametrize(
    ("base", "field"),
    [
        *((VALID, field) for field in (*ENVELOPE, "id", "updated_at", *METADATA_FIELDS)),
        *((deleted("user_p"), field) for field in (*ENVELOPE, "id", *METADATA_FIELDS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "deleted" if b"deleted" in value else "changed",
)
def test_a_field_of_any_type_means_what_the_contract_says(base: bytes, field: str) -> None:
    for value in VALUES:
        body = json.loads(base)
        holder = body if field in ENVELOPE else body["data"]
        holder[field] = "%value%"
        text = json.dumps(body).replace('"%value%"', value).encode()
        shallow = text.replace(b"[" * 600 + b"]" * 600, b"[[]]").replace(b'{"a":' * 600 + b"1" + b"}" * 600, b'{"a":1}')
        assert means(text) is meaning(reads(shallow)), (field, value[:40])


def test_of_equal_keys_the_last_counts_however_they_are_spelled() -> None:
    for first, second in itertools.product((b'"id"', rb'"\u0069d"'), repeat=2):
        body = changed().replace(b'"id": "user_a"', first + b': "user_b", ' + second + b': "user_c"')
        assert user(body).user_id == "user_c"
    body = event(b'{"a":1}', rb', "unsafe_\u006detadata": {"b":2}')
    assert user(body).unsafe_metadata == b'{"b":2}'


# --- Real bodies, spoilt.

scraps = st.sampled_from(
    [
        *(b"", b"\\", b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"1e999999", b"-", b"null", b" ", b"[" * 600),
        *(b"\\u0000", b"\\ud800", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xc0\x80"),
        *(b'"id":5,', b'"data":{},', b'"type":"user.updated",'),
    ]
)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_real_body_that_was_spoilt_means_what_python_reads_in_it(data: st.DataObject) -> None:
    paths = sorted((Path(__file__).parent.parent / "data").glob("*__user.*.json"))
    body = data.draw(st.sampled_from(paths)).read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(body)))
        end = data.draw(st.integers(start, min(len(body), start + 40)))
        body = body[:start] + data.draw(scraps) + body[end:]
    try:
        text = body.decode()
        expected = meaning(json.loads(text, parse_constant=lambda _: 1 / 0))
    except (ValueError, ZeroDivisionError):
        expected = Unusable
    found = means(body)
    assert found is expected
    assert isinstance(parse_user(body, 5), Unusable | UserChanged)
