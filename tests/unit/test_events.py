"""What Clerk's JSON means to us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.events import ABSENT, changed, deleted, envelope
from worker.events import (
    LATEST_MS,
    NO_PROFILE,
    PROFILE,
    Ignored,
    Unusable,
    UserChanged,
    UserDeleted,
    parse_event,
    parse_user,
)


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


# --- The profile: what a token can carry besides metadata.


def profile(**data: Any) -> dict[str, Any]:
    """What is read of a user with these keys besides id and version, as Python's objects by name."""
    event = user(envelope("user.updated", {"id": "user_1", "updated_at": 5, **data}, 5))
    return dict(zip(PROFILE, map(json.loads, event.profile), strict=True))


NOTHING: dict[str, Any] = {**dict.fromkeys(PROFILE), "email_verified": False, "phone_number_verified": False}


def test_the_profile_is_read_from_a_recorded_event(data: Path) -> None:
    event = user((data / "capture_2025-04__user.created.json").read_bytes())
    assert dict(zip(PROFILE, event.profile, strict=True)) == {
        "first_name": b"null",
        "last_name": b"null",
        "username": b"null",
        "external_id": b"null",
        "created_at": b"1744276393608",
        "primary_email_address": b'"person1@example.com"',
        "primary_phone_number": b"null",
        "email_verified": b"true",
        "phone_number_verified": b"false",
        "image_url": b'"https://img.clerk.com/REDACTED"',
        "two_factor_enabled": b"false",
    }
    assert hash(event) == hash(user((data / "capture_2025-04__user.created.json").read_bytes()))


def test_a_user_without_a_profile_has_nulls() -> None:
    assert profile() == NOTHING
    assert UserChanged("user_1", 1, 1, None, None, None).profile == NO_PROFILE == (b"null",) * len(PROFILE)


def test_texts_of_the_profile_are_compact() -> None:
    body = changed().replace(b'"Ada"', rb'"\u0041d\/ \ud83d\ude00\u000a"')
    assert user(body).profile[0] == '"Ad/ \U0001f600\\n"'.encode()


def address(contact_id: Any, value: Any, status: Any = "verified") -> dict[str, Any]:
    return {"id": contact_id, "email_address": value, "phone_number": value, "verification": {"status": status}}


def test_the_primary_contacts_are_found_by_their_id() -> None:
    found = profile(
        primary_email_address_id="idn_2",
        email_addresses=[address("idn_1", "a@x.org", "unverified"), address("idn_2", "b@x.org")],
        primary_phone_number_id="idn_4",
        phone_numbers=[address("idn_3", "+1"), address("idn_4", "+2", "unverified"), address("idn_5", "+3")],
    )
    assert (found["primary_email_address"], found["email_verified"]) == ("b@x.org", True)
    assert (found["primary_phone_number"], found["phone_number_verified"]) == ("+2", False)


def test_an_id_is_the_same_however_it_is_spelled() -> None:
    body = envelope(
        "user.updated",
        {"id": "u", "primary_email_address_id": "é/1", "email_addresses": [address("é/1", "a@x.org")]},
        5,
    )
    for spelled in (body.replace("é/1".encode(), rb"\u00e9\/1", 1), json.dumps(json.loads(body)).encode()):
        assert user(spelled).profile[PROFILE.index("primary_email_address")] == b'"a@x.org"'


def test_without_a_primary_contact_there_is_none_though_there_are_others() -> None:
    others = [address("idn_1", "a@x.org"), address(None, "b@x.org"), {"email_address": "c@x.org"}]
    for primary in (None, "idn_2", 5, ["idn_1"], ""):
        assert profile(primary_email_address_id=primary, email_addresses=others) == NOTHING


WRONG: list[Any] = [None, 5, -1.5, "x", True, [], {}, [[]], [{}], {"a": []}, [None, 5, "x", [{}]]]


@pytest.mark.parametrize("wrong", [value for value in WRONG if not isinstance(value, str)], ids=repr)
@pytest.mark.parametrize("name", ["first_name", "last_name", "username", "external_id", "image_url"])
def test_what_should_be_a_text_and_is_none_is_null(name: str, wrong: Any) -> None:
    assert profile(**{name: wrong})[name] is None


@pytest.mark.parametrize("wrong", [value for value in WRONG if value != 5 and value is not True], ids=repr)
def test_a_number_or_a_truth_of_a_wrong_type_is_null(wrong: Any) -> None:
    assert profile(created_at=wrong, two_factor_enabled=wrong) == NOTHING
    assert profile(created_at=True, two_factor_enabled=1) == NOTHING


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_contacts_of_wrong_types_are_none(wrong: Any) -> None:
    assert profile(primary_email_address_id="x", email_addresses=wrong, phone_numbers=wrong) == NOTHING
    right = [wrong, address("x", "a@x.org")]
    assert profile(primary_email_address_id="x", email_addresses=right)["primary_email_address"] == "a@x.org"
    unverified = {**address("x", "a@x.org"), "verification": wrong}
    assert profile(primary_email_address_id="x", email_addresses=[unverified])["email_verified"] is False
    unverified["verification"] = {"status": wrong}
    assert profile(primary_email_address_id="x", email_addresses=[unverified])["email_verified"] is False


@pytest.mark.parametrize("number", ["1" * 5000, "1e99999", "-0", "0.1", "1e5"])
def test_no_number_in_a_profile_makes_an_event_unusable(number: str) -> None:
    for name in ("first_name", "created_at", "email_addresses", "primary_email_address_id"):
        body = changed().replace(b'"first_name": "Ada"', f'"{name}": {number}'.encode())
        assert user(body).profile[PROFILE.index("created_at")] in (b"null", number.encode())


@pytest.mark.parametrize(
    "contacts",
    [
        "[" + "{}," * 300_000 + "{}]",
        "[" + '{"id":"y"},' * 90_000 + "{}]",
        "[" + '{"a":"x"},' * 90_000 + "{}]",
        "[" + r'{"id":"\u0079"},' * 60_000 + "{}]",
        "[" + "0," * 500_000 + "0]",
        '[{"id":"x","verification":' + '{"status":' * 50_000 + "1" + "}" * 50_000 + "}]",
        "[" * 500_000 + "]" * 500_000,
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.timeout(20)  # a second or two; what is quadratic takes an hour
def test_a_mebibyte_of_contacts_is_no_trouble(contacts: str) -> None:
    body = changed().replace(
        b'"first_name": "Ada"', b'"primary_email_address_id":"x","email_addresses":' + contacts.encode()
    )
    assert user(body).profile[PROFILE.index("email_verified")] == b"false"


# --- A user of the Backend API.

READ_AT = 1_800_000_000_000


def of_event(body: bytes) -> bytes:
    """The user in an event, byte for byte."""
    return body.partition(b'"data": ')[2].removesuffix(b"}")


def pulled(text: bytes, read_at: int | None = READ_AT) -> UserChanged:
    parsed = parse_user(text, read_at)
    assert isinstance(parsed, UserChanged), parsed
    return parsed


def why_not(text: bytes) -> str:
    parsed = parse_user(text, READ_AT)
    assert isinstance(parsed, Unusable), parsed
    return parsed.reason


def test_a_recorded_user_is_read_with_its_metadata_and_profile(data: Path) -> None:
    event = pulled((data / "backend_api__get_user.json").read_bytes())
    assert (event.user_id, event.version, event.event_at) == (
        "user_2yE06IFCFf4o90ue0Z6PYTESTGv",
        1_749_384_259_895,
        READ_AT,
    )
    assert (event.private_metadata, event.public_metadata) == (b"{}", b"{}")
    assert json.loads(event.unsafe_metadata or b"") == {"bio": "text", "role": "student"}
    found = dict(zip(PROFILE, event.profile, strict=True))
    assert (found["primary_email_address"], found["email_verified"]) == (b'"person5@example.com"', b"true")
    assert (found["first_name"], found["created_at"]) == (b'"Alex"', b"1749384248799")


def test_a_user_was_read_no_earlier_than_its_version() -> None:
    text = of_event(changed(version=READ_AT + 500))
    assert pulled(text, READ_AT).event_at == READ_AT + 500
    assert pulled(text, READ_AT + 1000).event_at == READ_AT + 1000
    assert pulled(text, None).event_at == READ_AT + 500


def test_the_time_of_an_answer_is_never_a_version() -> None:
    assert why_not(b'{"id":"user_1"}') == "updated_at is missing, so nothing tells the version"
    assert why_not(b'{"id":"user_1","updated_at":null}') == "updated_at is missing, so nothing tells the version"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "the user is not valid JSON"),
        (b"{", "the user is not valid JSON"),
        (b"{},{}", "the user is not valid JSON"),
        (b"],[", "the user is not valid JSON"),
        (b"[]", "the user: Expected `object`, got `array`"),
        (b"null", "the user: Expected `object`, got `null`"),
        (b'{"x":"\xff"}', "the user is not UTF-8"),
        (b"{}", "id is missing"),
        (b'{"id":5}', "id is not a user id (1 to 255 visible ASCII characters)"),
        (b'{"id":"u","updated_at":"5"}', "updated_at is not an integer"),
        (b'{"id":"u","updated_at":5,"public_metadata":"canary"}', "public_metadata is not an object"),
    ],
)
def test_a_user_that_cannot_be_used_says_why(text: bytes, why: str) -> None:
    assert why_not(text) == why


def test_who_it_was_is_told_where_the_rest_cannot_be_used() -> None:
    assert parse_user(b'{"id":"user_1","updated_at":[]}', 5) == Unusable(None, "user_1", "updated_at is not an integer")


@pytest.mark.parametrize("depth", [1, 497, 498, 499, 5000])
@pytest.mark.parametrize("number", ["1.10", "9007199254740993", "1e5000"])
def test_a_user_that_is_pulled_is_the_one_of_the_event(depth: int, number: str) -> None:
    deep = f'{{"n": {number}, "s": "\\u0000", "a": {"[" * depth}{"]" * depth}}}'.encode()
    body = changed(public=ABSENT, private={"plan": "pro"}, timestamp=READ_AT)
    body = body.replace(b'"unsafe_metadata": {}', b'"unsafe_metadata": ' + deep)
    assert pulled(of_event(body)) == user(body)


# --- Anything.


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


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
contacts = st.fixed_dictionaries(
    {}, optional={"id": st.just("x") | anything, "email_address": anything, "verification": anything}
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("first_name", "last_name", "username", "external_id", "image_url"), anything),
            **dict.fromkeys(("created_at", "two_factor_enabled"), anything),
            **dict.fromkeys(("primary_email_address_id", "primary_phone_number_id"), st.just("x") | anything),
            **dict.fromkeys(("email_addresses", "phone_numbers"), anything | st.lists(anything | contacts)),
        },
    )
)
@settings(deadline=None, max_examples=100)
def test_no_profile_makes_an_event_unusable(data: dict[str, Any]) -> None:
    # What json.dumps writes for infinity and not-a-number isn't JSON.
    data = json.loads(json.dumps(data), parse_constant=lambda _: None)
    found = profile(**data)
    for name in ("email_verified", "phone_number_verified"):
        assert isinstance(found[name], bool)
    for name in ("first_name", "primary_email_address", "primary_phone_number"):
        assert found[name] is None or isinstance(found[name], str)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(deadline=None)
def test_no_bytes_raise(body: bytes) -> None:
    parse_event(body)
    parse_user(body, READ_AT)


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
@settings(deadline=None, max_examples=150)
def test_no_types_in_the_wrong_places_raise(body: dict[str, Any]) -> None:
    text = json.dumps(body).encode()
    parse_event(text, instance_id="ins_1")
    parse_user(json.dumps(body.get("data")).encode(), None)
