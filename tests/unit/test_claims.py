"""What claims weigh: judged by Clerk's documented examples, and by a rendering with Python's objects and json alone."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.events import changed, envelope
from worker.claims import (
    FIELDS_KEPT,
    NAME_BYTES,
    Fields,
    Weights,
    render,
    weigh_kind,
    weigh_user,
)
from worker.events import UserChanged, parse_event
from worker.measure import Range, contributions, measure, measure_kept
from worker.shortcodes import ASSUMED_BYTES
from worker.template import ASSUMED_TEMPLATE, Expression, Shortcode, Template, Text, lint, parse_template

JSON = dict[str, Any]


def read_user(body: bytes) -> UserChanged:
    parsed = parse_event(body)
    assert isinstance(parsed, tuple), parsed
    event = parsed[1]
    assert isinstance(event, UserChanged)
    return event


def user(public: Any = None, unsafe: Any = None, **data: Any) -> UserChanged:
    """A user as Clerk sends it; `data` is whatever else stands in it."""
    sent = {"id": "user_a", "updated_at": 1_700_000_000_000, "public_metadata": public, "unsafe_metadata": unsafe}
    return read_user(envelope("user.updated", {**sent, **data}, 1_700_000_000_015))


def compiled(claims: Any) -> Template:
    """The template, with whatever errors: it renders what Clerk would."""
    template, _ = lint(json.dumps(claims))
    assert template is not None
    return template


def rendered(claims: Any, of: UserChanged) -> Any:
    return json.loads(render(compiled(claims), of, {}))


def compact_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


# --- Clerk's documentation, https://clerk.com/docs/guides/sessions/jwt-templates


def test_static_values_and_shortcodes_render_as_documented() -> None:
    john = user(first_name="John", **contact("john@doe.org"))
    claims = {
        "aud": "https://example.com",
        "interests": ["hiking", "knitting"],
        "name": "{{user.first_name}}",
        "surname": "{{user.last_name}}",
        "email": "{{user.primary_email_address}}",
    }
    assert rendered(claims, john) == {**claims, "name": "John", "surname": None, "email": "john@doe.org"}


def contact(email: str | None = None, phone: str | None = None, *, verified: bool = True) -> JSON:
    """The keys of a user with these contacts as the primary ones, each behind another."""
    verification = {"status": "verified" if verified else "unverified"}
    other = {"id": "idn_other", "verification": {"status": "expired"}}
    return {
        "primary_email_address_id": None if email is None else "idn_email",
        "email_addresses": [
            {**other, "email_address": "other@example.com"},
            {"id": "idn_email", "email_address": email, "verification": verification},
        ],
        "primary_phone_number_id": None if phone is None else "idn_phone",
        "phone_numbers": [
            {**other, "phone_number": "+15550000000"},
            {"id": "idn_phone", "phone_number": phone, "verification": verification},
        ],
    }


def test_dots_lead_into_metadata_as_documented() -> None:
    addresses = {"Home": "2355 Pointe Lane, 56301 Minnesota", "Work": "3759 Newton Street, 33487 Florida"}
    of = user({"interests": ["hiking", "knitting"], "addresses": addresses})
    claims = {
        "likes_to_do": "{{user.public_metadata.interests}}",
        "shipping_address": "{{user.public_metadata.addresses.Home}}",
    }
    assert rendered(claims, of) == {"likes_to_do": ["hiking", "knitting"], "shipping_address": addresses["Home"]}


def test_a_missing_name_is_interpolated_as_documented() -> None:
    assert rendered({"full_name": "{{user.last_name}} {{user.first_name}}"}, user(first_name="John")) == {
        "full_name": "null John"
    }


CONDITIONAL: Final = {
    "has_verified_contact_info": "{{user.email_verified || user.phone_number_verified}}",
    "full_name": "{{user.full_name || 'Awesome User'}}",
    "age": "{{user.public_metadata.age || user.unsafe_metadata.age || 30 }}",
}


def test_conditional_expressions_fall_back_as_documented() -> None:
    nobody = user(**contact(phone="+15551234567"))
    assert rendered(CONDITIONAL, nobody) == {
        "has_verified_contact_info": True,
        "full_name": "Awesome User",
        "age": 30,
    }


def test_conditional_expressions_take_the_first_value_that_is_neither_null_nor_false() -> None:
    somebody = user({"age": 0}, {"age": 8}, first_name="Ada", **contact("a@example.com", verified=False))
    assert rendered(CONDITIONAL, somebody) == {"has_verified_contact_info": False, "full_name": "Ada", "age": 0}
    assert rendered({"a": "{{user.public_metadata.no || user.unsafe_metadata.no}}"}, user({}, {"no": False})) == {
        "a": False
    }


def test_the_complete_example_renders_as_documented() -> None:
    maria = user(
        {"profile": {"interests": ["reading", "climbing"]}},
        {"foo": {"bar": 42}},
        id="user_abcdef123456789",
        first_name="Maria",
        last_name="Doe",
        image_url="https://example.com/avatar.jpg",
        created_at=1_227_618_844_000,
        **contact("maria@example.com"),
    )
    static = {"aud": "https://my-site.com", "version": 1, "foo": {"bar": [1, 2, 3]}}
    claims = {
        **static,
        "user_id": "{{user.id}}",
        "avatar": "{{user.image_url}}",
        "full_name": "{{user.last_name}} {{user.first_name}} ",
        "email": "{{user.primary_email_address}}",
        "phone": "{{user.primary_phone_address}}",
        "registration_date": "{{user.created_at}}",
        "likes_to_do": "{{user.public_metadata.profile.interests}}",
        "unsafe_meta": "{{user.unsafe_metadata}}",
        "invalid_shortcode": "{{user.i_dont_exist}}",
    }
    assert rendered(claims, maria) == {
        **static,
        "user_id": "user_abcdef123456789",
        "avatar": "https://example.com/avatar.jpg",
        "full_name": "Doe Maria ",  # the page shows no blank at the end: a byte more is the safe side
        "email": "maria@example.com",
        "phone": None,
        "registration_date": 1_227_618_844_000,  # the page shows seconds: what Clerk sends is carried
        "likes_to_do": ["reading", "climbing"],
        "unsafe_meta": {"foo": {"bar": 42}},
        "invalid_shortcode": None,
    }


# --- More of what templates can say.


@pytest.mark.parametrize(
    ("first", "last", "full"),
    [
        ("Ada", "Lovelace", "Ada Lovelace"),
        ("Ada", None, "Ada"),
        (None, "Lovelace", "Lovelace"),
        ("", "Lovelace", "Lovelace"),
        ("Ada", "", "Ada"),
        ("Al", "Bo", "Al Bo"),
        ("Al", None, "Al"),
        ("", "", None),
        (None, None, None),
        ('"', "\\\n", '" \\\n'),
    ],
)
def test_the_full_name_is_of_the_names_there_are(first: str | None, last: str | None, full: str | None) -> None:
    of = user(first_name=first, last_name=last)
    assert rendered({"a": "{{user.full_name}}"}, of) == {"a": full}
    assert rendered({"a": "I am {{user.full_name}}"}, of) == {"a": f"I am {'null' if full is None else full}"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('a"b\\é\n', 'a"b\\é\n'),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ({"a": ['"', "\\", "\n"]}, r'{"a":["\"","\\","\n"]}'),
        ([], "[]"),
    ],
)
def test_a_value_inside_a_text_becomes_text(value: Any, text: str) -> None:
    assert rendered({"a": "<{{user.public_metadata.x}}>"}, user({"x": value})) == {"a": f"<{text}>"}


@pytest.mark.parametrize(
    "path",
    [
        "user",
        "user.id.x",
        "user.first_name.length",
        "user.public_metadata.list.0",
        "user.public_metadata.text.x",
        "user.public_metadata.missing",
        "user.public_metadata.missing.x",
        "user.public_metadata.object.missing",
        "user.private_metadata",
        "user.private_metadata.plan",
        "organization.name",
        "toString",
    ],
)
def test_a_path_that_leads_nowhere_is_null(path: str) -> None:
    of = user({"list": [1], "text": "x", "object": {}}, private_metadata={"plan": "pro"})
    assert rendered({"a": f"{{{{{path}}}}}"}, of) == {"a": None}
    weight = measure(compiled({"a": f"{{{{{path}}}}}"}), weigh_user(of), {})
    assert weight.low <= len('{"a":null}') <= weight.high


def test_the_version_stands_for_updated_at() -> None:
    claims = {"a": "{{user.updated_at}}", "b": "{{user.created_at}}"}
    assert rendered(claims, user(created_at=5)) == {"a": 1_700_000_000_000, "b": 5}


def test_what_no_user_tells_weighs_what_is_assumed() -> None:
    template = parse_template('{"org":"{{org.id}}","role":"in {{org.role}}"}')
    frame = len('{"org":,"role":"in "}')
    of = user()
    for assumed, bytes_ in (({}, 33 + 18), ({"org.id": 2, "org.role": 100}, 2 + 98)):
        assert len(render(template, of, assumed)) == frame + bytes_
        assert measure(template, weigh_user(of), assumed) == Range(frame + bytes_, frame + bytes_)


def test_absent_metadata_counts_as_empty() -> None:
    of = read_user(envelope("user.updated", {"id": "user_a", "updated_at": 5}, 5))
    assert of.public_metadata is None
    assert render(ASSUMED_TEMPLATE, of, {}) == b'{"public_metadata":{},"unsafe_metadata":{}}'
    assert weigh_user(of).public == weigh_user(of).unsafe == Fields(2, {}) == weigh_kind(b" { } ")


# --- The edges of the budget.


@pytest.mark.parametrize("letter", ["x", "é", "界", "\U0001f600", "\n", '"', "\x01"])
@pytest.mark.parametrize("budget", [1199, 1200, 1201])
@pytest.mark.parametrize("claims", [None, {"a": "{{user.public_metadata.a}}"}, {"ü": "<{{user.first_name}}>"}])
def test_claims_are_weighed_to_the_byte(letter: str, budget: int, claims: Any) -> None:
    template = ASSUMED_TEMPLATE if claims is None else compiled(claims)
    room = budget - len(render(template, user({"a": ""}, {}, first_name=""), {}))
    width = len(json.dumps(letter, ensure_ascii=False).encode()) - 2
    value = letter * (room // width) + "x" * (room % width)
    of = user({"a": value}, {}, first_name=value)
    assert len(render(template, of, {})) == budget
    assert measure(template, weigh_user(of), {}) == Range(budget, budget)


# --- Any user, any template. What is expected is made with Python's objects and json alone.

letters = st.characters(codec="utf-8", exclude_characters="\0")  # holdable replaces NUL
texts = st.text(letters, max_size=6)
braceless = st.text(st.characters(codec="utf-8", exclude_characters="\0{}"), max_size=6)
names = st.sampled_from(["a", "b", "role", "é", "profile"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(["", "Al", "{{user.id}}", "null", "\\", '"'])
)
metadata_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | texts, inner, max_size=3),
    max_leaves=8,
)
metadata = st.dictionaries(names | texts, metadata_values, max_size=5) | st.dictionaries(
    st.text(letters, max_size=30), st.integers(0, 99), min_size=FIELDS_KEPT - 2, max_size=FIELDS_KEPT + 4
)
maybe_text = st.none() | texts | st.sampled_from(["", "Al", "Ada", "\n"])


@st.composite
def bodies(draw: st.DrawFn) -> JSON:
    """What Clerk says of a user, under `data`."""
    data: JSON = {
        "id": draw(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=30)),
        "updated_at": draw(st.integers(0, 253_402_300_799_999)),
        "created_at": draw(st.none() | st.integers(0, 2_000_000_000_000)),
        "two_factor_enabled": draw(st.none() | st.booleans()),
        "public_metadata": draw(st.none() | metadata),
        "unsafe_metadata": draw(st.none() | metadata),
        **contact(draw(maybe_text), draw(maybe_text), verified=draw(st.booleans())),
    }
    for name in ("first_name", "last_name", "username", "external_id", "image_url"):
        data[name] = draw(maybe_text)
    return data


def objects_of_user(data: JSON) -> JSON:
    """What a template finds under `user.`, as Python's objects."""
    given = [name for name in (data["first_name"], data["last_name"]) if name]
    email, phone = data["email_addresses"][1], data["phone_numbers"][1]

    def verified(one: JSON, primary: str) -> bool:
        return data[primary] is not None and one["verification"]["status"] == "verified"

    return {
        **data,
        "public_metadata": data["public_metadata"] or {},
        "unsafe_metadata": data["unsafe_metadata"] or {},
        "full_name": " ".join(given) if given else None,
        "primary_email_address": email["email_address"],
        "primary_phone_number": phone["phone_number"],
        "email_verified": verified(email, "primary_email_address_id"),
        "phone_number_verified": verified(phone, "primary_phone_number_id"),
    }


OF_USER: Final = [
    "id",
    "first_name",
    "last_name",
    "full_name",
    "username",
    "external_id",
    "created_at",
    "updated_at",
    "primary_email_address",
    "primary_phone_number",
    "email_verified",
    "phone_number_verified",
    "image_url",
    "two_factor_enabled",
]
OTHERS: Final = [*ASSUMED_BYTES, "org.public_metadata.tier", "user.nothing", "user.id.x", "nonsense", "private.a"]
KINDS: Final = ("public_metadata", "unsafe_metadata")


@st.composite
def paths(draw: st.DrawFn, data: JSON) -> str:
    """A shortcode; into metadata, it mostly hits."""
    kind = draw(st.sampled_from(KINDS))
    match draw(st.integers(0, 5)):
        case 0:
            return "user." + draw(st.sampled_from(OF_USER))
        case 1:
            return draw(st.sampled_from(OTHERS))
        case 2:
            return f"user.{kind}"
        case 3:
            return ".".join(("user", kind, *draw(st.lists(names | st.just("0"), min_size=1, max_size=4))))
    path = ["user", kind]
    inner = data[kind]
    while isinstance(inner, dict) and (keys := [key for key in inner if re.fullmatch(r"[\w-]+", key)]):
        path.append(draw(st.sampled_from(keys)))
        inner = inner[path[-1]]
        if draw(st.booleans()):
            break
    return ".".join(path)


literals = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.sampled_from(["true", "false", "1.5", "-0.0"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0{}'|"), max_size=6).map("'{}'".format),
)


@st.composite
def expressions(draw: st.DrawFn, data: JSON) -> str:
    operands = draw(st.lists(paths(data) | literals, min_size=1, max_size=3)) if draw(st.booleans()) else []
    gap = draw(st.sampled_from(["", " "]))
    return "{{" + gap + f"{gap}||{gap}".join(operands or [draw(paths(data))]) + gap + "}}"


def templates(data: JSON) -> st.SearchStrategy[JSON]:
    static = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | braceless
    interpolated = st.lists(expressions(data) | braceless, max_size=4).map("".join)
    leaves = static | expressions(data) | expressions(data) | interpolated
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(braceless, inner, max_size=3), max_leaves=8
    )
    return st.dictionaries(braceless, values, max_size=5)


def expected(value: Any, of: JSON, assumed: dict[str, int]) -> Any:
    """The claims as Python's objects."""
    if isinstance(value, dict):
        return {key: expected(item, of, assumed) for key, item in value.items()}
    if isinstance(value, list):
        return [expected(item, of, assumed) for item in value]
    if not isinstance(value, str):
        return value
    pieces = re.split(r"\{\{(.*?)\}\}", value, flags=re.DOTALL)
    if len(pieces) == 3 and not pieces[0] and not pieces[2]:
        return evaluated(pieces[1], of, assumed)
    results = [piece if at % 2 == 0 else as_text(evaluated(piece, of, assumed)) for at, piece in enumerate(pieces)]
    return "".join(results)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else compact_json(value).decode()


def evaluated(expression: str, of: JSON, assumed: dict[str, int]) -> Any:
    value: Any = None
    for written in expression.split("||"):
        value = operand(written.strip(), of, assumed)
        if value is not None and value is not False:
            return value
    return value


def operand(written: str, of: JSON, assumed: dict[str, int]) -> Any:
    if written.startswith("'"):
        return written[1:-1]
    if re.fullmatch(r"true|false|-?[0-9.]+", written):
        return json.loads(written)
    bytes_ = assumed.get(written, {**ASSUMED_BYTES, "org.public_metadata.tier": 50}.get(written))
    if bytes_ is not None:
        return "?" * (bytes_ - 2)
    first, *path = written.split(".")
    if first != "user" or path[:1] == [] or (path[0] not in KINDS and path[0] not in OF_USER):
        return None
    value: Any = of
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value


def mixed(template: Template) -> bool:
    """Whether a fallback has both metadata and what only sizes tell."""
    expressions = [part for part in template.parts if isinstance(part, Expression)]
    expressions += [
        inner
        for part in template.parts
        if isinstance(part, Text)
        for inner in part.parts
        if isinstance(inner, Expression)
    ]
    for expression in expressions:
        paths = {operand.path[:2] for operand in expression.operands if isinstance(operand, Shortcode)}
        metadata = paths & {("user", "public_metadata"), ("user", "unsafe_metadata")}
        if metadata and metadata != paths:
            return True
    return False


assumptions = st.dictionaries(st.sampled_from([*ASSUMED_BYTES, "org.public_metadata.tier"]), st.integers(2, 900))


@given(st.data())
@settings(deadline=None, max_examples=75)
def test_any_claims_are_those_that_python_makes_and_sizes_tell_their_weight(data: st.DataObject) -> None:
    body = data.draw(bodies())
    claims = data.draw(templates(body))
    assumed = data.draw(st.just({}) | assumptions)
    ascii_only, indent = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1]))

    source = json.dumps(claims, ensure_ascii=ascii_only, indent=indent)
    template, _ = lint(source)
    assert template is not None
    sent = {"type": "user.updated", "timestamp": 1, "data": body}
    of = read_user(json.dumps(sent, ensure_ascii=ascii_only, indent=indent).encode())

    claims_json = render(template, of, assumed)
    assert claims_json == compact_json(expected(json.loads(source), objects_of_user(body), assumed))

    weights = weigh_user(of)
    low, high = measure(template, weights, assumed)
    assert low <= len(claims_json) <= high
    # With the JSON of both kinds nothing but their profile is left to sizes, which tell all of that.
    kept = {"public": of.public_metadata or b"{}", "unsafe": of.unsafe_metadata or b"{}"}
    assert low <= measure_kept(template, weights, assumed, public=kept["public"], unsafe=None).high <= high
    exact = measure_kept(template, weights, assumed, **kept)
    assert exact.low <= len(claims_json) <= exact.high
    if not mixed(template):
        assert exact == (len(claims_json), len(claims_json))
    parts = contributions(template, weights, assumed)
    assert sum(parts.values()) >= len(claims_json)
    assert min(parts.values()) > 0


tight: st.SearchStrategy[Any] = st.sampled_from(
    [None, False, True, "Al", "Bob", "", 0, 1234, 12345, [], {}, ["\\"], "x" * 20]
)
"""Values whose size leaves open what they are, or leaves nothing open."""


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_bounds_hold_however_tight(data: st.DataObject) -> None:
    values = tight | st.dictionaries(names, tight | st.dictionaries(names, tight, max_size=1), max_size=1)
    body: JSON = {
        "id": "user_a",
        "updated_at": 5,
        "two_factor_enabled": data.draw(st.none() | st.booleans()),
        "first_name": data.draw(maybe_text),
        "last_name": data.draw(maybe_text),
        "public_metadata": data.draw(st.dictionaries(names, values, max_size=2)),
        "unsafe_metadata": {data.draw(st.text("ab", min_size=NAME_BYTES, max_size=NAME_BYTES + 1)): data.draw(values)},
    }
    long_name = next(iter(body["unsafe_metadata"]))
    used = (
        paths(body)
        | st.sampled_from(["user.first_name", "user.full_name", "user.two_factor_enabled", "user.created_at"])
        | st.sampled_from(["", ".a", ".b.a"]).map(f"user.unsafe_metadata.{long_name}{{}}".format)
    )
    written = " || ".join(data.draw(st.lists(used | st.just("'text'"), min_size=1, max_size=3)))
    template = compiled({"a": data.draw(st.sampled_from(["{{%s}}", "-{{%s}}"])) % written})
    of = read_user(envelope("user.updated", body, 1))
    low, high = measure(template, weigh_user(of), {})
    assert low <= len(render(template, of, {})) <= high
    assert sum(contributions(template, weigh_user(of), {}).values()) >= len(render(template, of, {}))


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_sizes_tell_the_exact_weight_of_whole_kinds_and_single_fields(data: st.DataObject) -> None:
    body = data.draw(bodies())
    for kind in KINDS:
        body[kind] = data.draw(st.dictionaries(names | texts, metadata_values, max_size=5))
    fields = [f"user.{kind}.{name}" for kind in KINDS for name in ("a", "b", "role", "é", "profile", "zzz")]
    exact = [*(f"user.{kind}" for kind in KINDS), *fields, *(f"user.{name}" for name in OF_USER), *ASSUMED_BYTES]
    used = data.draw(st.lists(st.sampled_from(exact), max_size=6))
    template = compiled({f"c{at}": f"{{{{{path}}}}}" for at, path in enumerate(used)})
    of = read_user(envelope("user.updated", body, 1))
    weights = weigh_user(of)
    weight = measure(template, weights, {})
    assert weight == Range(*[len(render(template, of, {}))] * 2)


@given(value=metadata, ascii_only=st.booleans())
@settings(deadline=None, max_examples=100)
def test_a_kind_is_weighed_field_by_field(value: JSON, ascii_only: bool) -> None:
    fields = weigh_kind(json.dumps(value, ensure_ascii=ascii_only).encode())
    sizes = {name: len(compact_json(field)) for name, field in value.items() if len(name.encode()) <= NAME_BYTES}
    assert fields.total == len(compact_json(value))
    assert (fields.unexplained == 0) == (len(fields.by_name) == len(value))
    assert fields.by_name.items() <= sizes.items()
    assert len(fields.by_name) == min(len(sizes), FIELDS_KEPT)
    left_out = [size for name, size in sizes.items() if name not in fields.by_name]
    assert not left_out or max(left_out) <= min(fields.by_name.values())


# --- Sizes.


def test_the_largest_fields_are_kept_by_name_and_of_equal_ones_always_the_same() -> None:
    values = {f"f{at:03}": "x" * (at // 10) for at in range(100)}
    fields = weigh_kind(compact_json(values))
    backwards = weigh_kind(compact_json(dict(reversed(values.items()))))
    assert fields == backwards
    assert set(fields.by_name) == {f"f{at:03}" for at in (*range(40, 100), 30, 31, 32, 33)}
    assert fields.unexplained == 36 * len('"f000":"",') + sum(at // 10 for at in (*range(30), *range(34, 40)))
    assert fields.unexplained > 0


def test_a_long_name_is_not_kept() -> None:
    fields = weigh_kind(compact_json({"é" * (NAME_BYTES // 2): 1, "é" * (NAME_BYTES // 2) + "x": 22}))
    assert fields.by_name == {"é" * (NAME_BYTES // 2): 1}
    assert fields.unexplained == len(',"":22') + NAME_BYTES + 1


def test_equal_names_count_as_often_as_they_stand_there() -> None:
    fields = weigh_kind(b'{"a":1,"a":22}')
    assert fields == Fields(14, {"a": 2})
    assert fields.unexplained > 0


@pytest.mark.parametrize(
    "text", [b"{", b"[1]", b'{"a":}', b'{"\xff":1}', b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"]
)
def test_what_cannot_be_read_is_weighed_in_all(text: bytes) -> None:
    assert weigh_kind(text) == Fields(len(text), {})
    of = UserChanged("user_a", 1, 1, None, text, None)
    weight = measure(compiled({"a": "{{user.public_metadata.a.b}}"}), weigh_user(of), {})
    assert weight.low <= len(render(compiled({"a": "{{user.public_metadata.a.b}}"}), of, {})) <= weight.high


NOT_ALL: Final = Fields(100, {"role": 7})
ALL: Final = Fields(len('{"role":"admin"}'), {"role": 7})
UNNAMED: Final = Fields(100, {}, named=False)
LONG_NAME: Final = "x" * (NAME_BYTES + 1)


def weights(public: Fields, profile: tuple[int, ...] | None = (0,) * 11) -> Weights:
    return Weights("user_a", 5, profile, public, Fields(2, {}))


@pytest.mark.parametrize(
    ("expression", "public", "low", "high"),
    [
        ("{{user.public_metadata}}", NOT_ALL, 100, 100),
        ("{{user.public_metadata.role}}", NOT_ALL, 7, 7),
        ("{{user.public_metadata.plan}}", ALL, 4, 4),
        ("{{user.public_metadata.plan}}", NOT_ALL, 4, 4),  # so short a name would have been kept
        (f"{{{{user.public_metadata.{LONG_NAME}}}}}", NOT_ALL, 1, 100 - len('{"role":"admin","":}') - len(LONG_NAME)),
        ("{{user.public_metadata.plan}}", UNNAMED, 1, 100 - len('{"plan":}')),
        ("{{user.public_metadata.plan}}", Fields(len('{"plan":12}'), {}, named=False), 1, 4),
        ("{{user.public_metadata.plan.x}}", UNNAMED, 1, 100 - len('{"plan":{"x":}}')),
        ("{{user.public_metadata.plan.x}}", ALL, 4, 4),
        ("{{user.public_metadata.role.x}}", Fields(100, {"role": 50}), 1, 50 - len('{"x":}')),
        ("{{user.public_metadata.role.x.é}}", Fields(100, {"role": 50}), 1, 50 - len('{"x":{"éé":}}')),
        ("{{user.public_metadata.role.x.y}}", Fields(100, {"role": 9}), 4, 4),
        ("{{user.public_metadata.role || 'nobody'}}", ALL, 7, 7),
        ("{{user.public_metadata.plan || 'nobody'}}", ALL, 8, 8),
        ("{{user.public_metadata.role || 'nobody'}}", Fields(13, {"role": 4}), 4, 8),
        ("{{user.public_metadata.role || 'nobody'}}", Fields(14, {"role": 5}), 5, 8),
        ("{{user.public_metadata.role || user.id}}", Fields(18, {"role": 9}), 9, 9),
        ("{{false || user.id}}", ALL, 8, 8),
        ("{{user.first_name}}", ALL, 4, 4),
        ("{{user.nothing}}", ALL, 4, 4),
    ],
)
def test_sizes_tell_at_least_the_bounds_of_a_weight(expression: str, public: Fields, low: int, high: int) -> None:
    frame = len('{"a":}')
    assert measure(compiled({"a": expression}), weights(public), {}) == Range(frame + low, frame + high)


@pytest.mark.parametrize(
    ("expression", "low", "high"),
    [
        ("{{user.id}}", 6, 6),
        ("{{user.updated_at}}", 1, 1),
        ("{{user.first_name}}", 4, 4),
        ("{{user.last_name}}", 8, 8),
        ("{{user.public_metadata.role}}", 5, 14),
        ("{{user.public_metadata.plan}}", 4, 4),
        ("{{user.unsafe_metadata}}", 2, 2),
        ("{{user.public_metadata}}", 16, 30),
    ],
)
def test_inside_a_text_sizes_leave_open_what_is_escaped(expression: str, low: int, high: int) -> None:
    frame = len('{"a":"--"}')
    profile = (0, 10, *(0,) * 9)
    assert measure(compiled({"a": f"-{expression}-"}), weights(ALL, profile), {}) == Range(frame + low, frame + high)


def test_a_user_whose_profile_was_never_weighed_has_bounds() -> None:
    template = compiled({"a": "{{user.first_name}}", "b": "{{user.full_name}}", "c": "{{user.id}}"})
    static = len('{"a":,"b":,"c":"user_a"}')
    assert measure(template, weights(ALL, None), {}) == Range(static + 8, static + 1200)


def test_contributions_name_who_is_to_blame() -> None:
    of = user({"role": "admin", "bio": "x" * 100}, {"a": {"b": "y" * 50}}, first_name="Ada")
    template = compiled(
        {
            "all": "{{user.public_metadata}}",
            "b": "{{user.unsafe_metadata.a.b}}",
            "hi": "Hi {{user.first_name || 'you'}}",
            "org": "{{org.name}}",
            "no": "{{user.nothing}}",
        }
    )
    assert contributions(template, weigh_user(of), {"org.name": 12}) == {
        "public_metadata.bio": len('"bio":"",') + 100,
        "public_metadata.role": len('"role":"admin",'),
        "unsafe_metadata.a": len('""') + 50,
        "user.first_name": 3,
        "org.name (assumed)": 12,
        "template": len('{"all":{},"b":,"hi":"Hi ","org":,"no":null}'),
    }


def test_contributions_tell_of_fields_that_are_not_kept_by_name() -> None:
    parts = contributions(ASSUMED_TEMPLATE, weights(NOT_ALL), {})
    assert parts["public_metadata (other fields)"] == 100 - len('{"role":"admin"}')
    assert sum(parts.values()) >= measure(ASSUMED_TEMPLATE, weights(NOT_ALL), {}).high


# --- Hostile ones.

MIB: Final = 1024 * 1024
HOSTILE: Final = {
    "names": compact_json({f"field {at}": at for at in range(MIB // 22)}),
    "escapes": b'{"a":"' + b"\\u00e9" * (MIB // 6) + b'"}',
    "control": b'{"a":"' + b"\\u0001" * (MIB // 6) + b'"}',
    "spaces": b'{"a":[' + b"1 , " * (MIB // 4) + b"1]}",
    "quotes": b'{"a":[' + b'"\\"",' * (MIB // 5) + b"1]}",
    "equal names": b"{" + b'"a":1,' * (MIB // 6) + b'"a":{}}',
    "deep": b'{"a":' * 490 + b"1" + b"}" * 490,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)  # a second at most; what is quadratic takes an hour
def test_a_hostile_mebibyte_is_weighed_in_linear_time(name: str) -> None:
    body = changed(public="here").replace(b'"here"', HOSTILE[name])
    of = read_user(body)
    sizes = weigh_user(of)
    deep = ".".join(["user", "public_metadata", *["a"] * 2000])
    template = compiled({"b": "{{user.public_metadata.b || user.public_metadata.a.b}}", "deep": f"{{{{{deep}}}}}"})
    for one in (template, ASSUMED_TEMPLATE):
        low, high = measure(one, sizes, {})
        assert low <= len(render(one, of, {})) <= high
        assert sum(contributions(one, sizes, {}).values()) >= len(render(one, of, {}))


def test_a_shortcode_that_is_declared_weighs_what_is_said() -> None:
    template = parse_template('{"a": "{{user.has_image}}"}', {"user.has_image"})
    of, declared = user({}, {}), {"user.has_image": 5}
    assert len(render(template, of, declared)) == len('{"a":') + 5 + len("}")
    assert measure(template, weigh_user(of), declared) == Range(11, 11)
    assert contributions(template, weigh_user(of), declared)["user.has_image (assumed)"] == 5
