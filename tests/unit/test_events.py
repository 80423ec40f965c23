"""What Clerk's JSON means to us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.events import ABSENT, changed, deleted, envelope
from worker.events import LATEST_MS, Ignored, Unusable, UserChanged, UserDeleted, parse_event


def user(body: bytes) -> UserChanged:
    parsed = parse_event(body)
    assert not isinstance(parsed, Unusable), parsed
    event = parsed[1]
    assert isinstance(event, UserChanged)
    return event


def reason(body: bytes) -> str:
    parsed = parse_event(body)
    assert isinstance(parsed, Unusable), parsed
    return parsed.reason


def test_a_user_is_read_with_its_clock_and_its_metadata_as_it_was_sent() -> None:
    event = user(changed("user_1", 1_744_276_393_626, timestamp=1_744_276_393_644, private={"n": 1}))
    assert (event.user_id, event.version, event.event_at) == ("user_1", 1_744_276_393_626, 1_744_276_393_644)
    assert event.private_metadata == b'{"n": 1}'
    assert event.whole


@pytest.mark.parametrize(
    "number", ["9007199254740993", "123456789012345678901234567890", "1.10", "1E+2", "-0", "0.1000000000000000055"]
)
def test_numbers_stay_the_text_that_was_sent(number: str) -> None:
    body = changed().replace(b'"private_metadata": {}', b'"private_metadata": {"n":' + number.encode() + b"}")
    assert user(body).private_metadata == b'{"n":' + number.encode() + b"}"


def test_null_metadata_is_empty_and_an_absent_key_is_not_known() -> None:
    body = changed(private=ABSENT, public={"a": 1}).replace(b'"unsafe_metadata": {}', b'"unsafe_metadata": null')
    event = user(body)
    assert (event.private_metadata, event.public_metadata, event.unsafe_metadata) == (None, b'{"a": 1}', b"{}")
    assert not event.whole


def test_a_timestamp_in_seconds_is_told_from_one_in_milliseconds() -> None:
    assert user(changed(timestamp=1_716_883_200)).event_at == 1_716_883_200_000
    assert user(changed(timestamp=1_716_883_200_123)).event_at == 1_716_883_200_123


def test_the_version_is_the_timestamp_where_updated_at_is_missing() -> None:
    body = envelope("user.updated", {"id": "user_1"}, 1_716_883_200)
    assert user(body).version == 1_716_883_200_000


def test_a_deletion_is_read_with_when_it_happened() -> None:
    parsed = parse_event(deleted("user_1", 1_761_091_891_440))
    assert parsed == ("user.deleted", UserDeleted("user_1", 1_761_091_891_440))


@pytest.mark.parametrize("event_type", ["session.created", "email.created", "user.createdAt", "invitation.revoked", ""])
def test_other_types_are_ignored_whatever_their_data(event_type: str) -> None:
    others: list[Any] = [{"user": {"id": 5}}, None, [], "x"]
    for data in others:
        assert parse_event(envelope(event_type, data, 1)) == (event_type, Ignored(event_type, "another type"))


def test_another_instance_is_ignored_and_an_event_without_one_is_not() -> None:
    body = json.loads(changed())
    assert isinstance(parse_event(json.dumps(body).encode(), instance_id="ins_1"), tuple)
    body["instance_id"] = "ins_2"
    parsed = parse_event(json.dumps(body).encode(), instance_id="ins_1")
    assert parsed == ("user.updated", Ignored("user.updated", "another instance"))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"null", "Expected `object`"),
        (b"[]", "Expected `object`"),
        (b'\xef\xbb\xbf{"type":"user.updated"}', "not valid JSON"),
        (changed() + changed(), "not valid JSON"),
        (changed()[:-1], "not valid JSON"),
        (b"{}", "type is missing"),
        (b'{"type": 5, "data": {}}', "type is missing"),
        (b'{"type": "user.updated"}', "data is missing"),
        (envelope("user.updated", None, 5), "Expected `object`"),
        (envelope("user.updated", {}, 5), "data.id is missing"),
        (envelope("user.updated", {"id": 5}, 5), "not a user id"),
        (envelope("user.updated", {"id": ""}, 5), "not a user id"),
        (envelope("user.updated", {"id": "user\x00"}, 5), "not a user id"),
        (envelope("user.updated", {"id": "u" * 256}, 5), "not a user id"),
        (b'{"type":"user.updated","data":{"id":"user_1"}}', "nothing tells the version"),
        (b'{"type":"user.deleted","data":{"id":"user_1"}}', "nothing tells when"),
        (envelope("user.updated", {"id": "user_1", "updated_at": "5"}, 5), "updated_at is not an integer"),
        (envelope("user.updated", {"id": "user_1", "updated_at": True}, 5), "updated_at is not an integer"),
        (envelope("user.updated", {"id": "user_1", "updated_at": 1.5}, 5), "updated_at is not an integer"),
        (changed(version=-1, timestamp=5), "between 1970 and 9999"),
        (changed(version=LATEST_MS + 1, timestamp=5), "between 1970 and 9999"),
        (changed(private=[]), "private_metadata is not an object"),
        (changed(public="x"), "public_metadata is not an object"),
        (changed(unsafe=5), "unsafe_metadata is not an object"),
    ],
)
def test_what_cannot_be_used_says_why(body: bytes, why: str) -> None:
    assert why in reason(body)


def test_a_reason_never_quotes_a_value() -> None:
    secret = "s3cr3t-canary"
    for data in (
        {"id": secret + " "},
        {"id": "user_1", "updated_at": secret},
        {"id": "user_1", "updated_at": 5, "private_metadata": secret},
        {"id": [secret]},
    ):
        assert secret not in reason(envelope("user.updated", data, 5))


def test_what_jsonb_cannot_hold_is_replaced_and_counted() -> None:
    event = user(changed(unsafe={"a": "x\x00y"}, private={"plan": "pro"}))
    assert event.unsafe_metadata == '{"a": "x\ufffdy"}'.encode()
    assert event.private_metadata == b'{"plan": "pro"}'
    assert event.replaced == 1


def test_deep_nesting_in_one_kind_does_not_block_the_others() -> None:
    deep: Any = "[" * 100_000 + "]" * 100_000
    body = changed(private={"plan": "pro"}).replace(
        b'"unsafe_metadata": {}', b'"unsafe_metadata": {"a": ' + deep.encode() + b"}"
    )
    event = user(body)
    assert event.private_metadata == b'{"plan": "pro"}'
    assert event.replaced == 1


def test_every_recorded_body_means_what_its_name_says(data: Path) -> None:
    meanings = {path.name: parse_event(path.read_bytes()) for path in sorted(data.glob("*.json"))}
    for name, meaning in meanings.items():
        if "minimal" in name or "backend_api" in name:
            assert isinstance(meaning, Unusable), name
        elif "user.deleted" in name:
            assert isinstance(meaning, tuple), name
            assert isinstance(meaning[1], UserDeleted), name
        elif "__user." in name:
            assert isinstance(meaning, tuple), name
            assert isinstance(meaning[1], UserChanged), name
        else:
            assert isinstance(meaning, tuple), name
            assert isinstance(meaning[1], Ignored), name
    assert len(meanings) >= 10


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(deadline=None)
def test_no_bytes_raise(body: bytes) -> None:
    parse_event(body)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["user.created", "user.updated", "user.deleted"]) | anything},
        optional={
            "timestamp": anything,
            "instance_id": anything,
            "data": anything
            | st.fixed_dictionaries(
                {},
                optional=dict.fromkeys(
                    ("id", "updated_at", "private_metadata", "public_metadata", "unsafe_metadata"), anything
                ),
            ),
        },
    )
)
@settings(deadline=None, max_examples=300)
def test_no_types_in_the_wrong_places_raise(body: dict[str, Any]) -> None:
    parse_event(json.dumps(body).encode(), instance_id="ins_1")
