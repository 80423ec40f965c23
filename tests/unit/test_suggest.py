"""Suggestions over generated populations, judged by another way to make them and by rendering every user's claims."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.populations import NAMES, USERS, population, unknown, users, weight
from worker import budget
from worker.budget import Field, Kind, report
from worker.claims import Fields, Weighed, Weights, weigh_user
from worker.errors import ConfigError, SyncError
from worker.events import UserChanged
from worker.measure import measure
from worker.policy import Policy
from worker.suggest import Suggestion, suggest
from worker.template import Template, lint, parse_template

PUBLIC, UNSAFE = budget.KINDS

BASES: Final = st.sampled_from(
    [
        ('{"public_metadata": "{{user.public_metadata}}"}', {}),
        ('{"n": "{{user.first_name}}", "deep": {"m": "{{user.unsafe_metadata.a}}"}}', {"n": "{{user.first_name}}"}),
        ('{"public_metadata": {"v": 2}, "unsafe_metadata": "{{org.name}}"}',
         {"public_metadata": {"v": 2}, "unsafe_metadata": "{{org.name}}"}),
    ]
)  # fmt: skip
TITLES: Final = st.builds(lambda kind, name: f"{kind}.{name}", st.sampled_from(budget.KINDS), NAMES)


def built(base: Mapping[str, Any], titles: Iterable[str]) -> Template:
    """The template that carries these fields, made another way."""
    claims: dict[str, Any] = dict(base)
    fields: dict[str, dict[str, str]] = {PUBLIC: {}, UNSAFE: {}}
    for title in titles:
        kind, _, name = title.partition(".")
        fields[kind][name] = f"{{{{user.{title}}}}}"
    for kind, carried in fields.items():
        if carried:
            claims[kind.removesuffix("_metadata") if kind in base else kind] = carried
    return parse_template(json.dumps(claims))


def can_be_carried(title: str) -> bool:
    template, findings = lint(json.dumps({"a": f"{{{{user.{title}}}}}"}))
    path = ("user", *title.split(".", 1))
    short = len(title.partition(".")[2].encode()) <= 64
    return template is not None and not findings and template.shortcodes == (path,) and title.isprintable() and short


def over(template: Template, of: Iterable[Weights], policy: Policy) -> int:
    return sum(measure(template, weights, policy.assumed).high > policy.budget for weights in of)


def greedily(
    base: Mapping[str, Any], titles: Iterable[str], of: Sequence[Weights], policy: Policy, allowed: int
) -> list[str]:
    kept: list[str] = []
    for title in titles:
        if can_be_carried(title) and over(built(base, [*kept, title]), of, policy) <= allowed:
            kept.append(title)
    return kept


def common_first(of: Iterable[UserChanged]) -> list[str]:
    sizes: dict[str, list[int]] = {}
    for one in of:
        weights = weigh_user(one)
        for kind, fields in ((PUBLIC, weights.public), (UNSAFE, weights.unsafe)):
            for name, size in fields.by_name.items():
                sizes.setdefault(f"{kind}.{name}", []).append(size)
    return sorted(sizes, key=lambda title: (-len(sizes[title]), max(sizes[title]), title))


@settings(max_examples=50, deadline=None)
@given(
    of=USERS,
    bases=BASES,
    limit=st.integers(2, 400),
    keep=st.lists(TITLES, max_size=8),
    percentile=st.sampled_from([100, 99, 92.5, 90, 75, 50, 0]),
)
@example(of=users(*(({"a": number}, {}) for number in range(10))), bases=("{}", {}), limit=20, keep=[], percentile=90)
def test_a_suggestion_carries_every_field_that_fits_in_order_and_is_over_for_no_more_users_than_allowed(
    of: list[UserChanged], bases: tuple[str, dict[str, Any]], limit: int, keep: list[str], percentile: float
) -> None:
    present, base = bases
    policy = Policy(template=parse_template(present), budget=limit)
    allowed = int(len(of) * (100 - percentile) / 100)
    sizes = [weigh_user(one) for one in of]
    found = suggest(population(of, policy), policy, keep, percentile)
    assert found.users == len(of)
    assert found.base_bytes == max((weight(built(base, []), one, policy) for one in of), default=0)
    wanted = list(dict.fromkeys(keep)) or common_first(of)
    everything = list(dict.fromkeys([*keep, *common_first(of)]))
    assert sorted([*(field.name for field in found.kept), *(field.name for field in found.moved)]) == sorted(everything)
    if not of or over(built(base, []), sizes, policy) > allowed:
        assert (found.template, found.config_patch, found.kept) == (None, None, ())
        assert found.over == over(built(base, []), sizes, policy)
        return
    assert [field.name for field in found.kept] == greedily(base, wanted, sizes, policy, allowed)
    judge(found, of, policy, allowed)
    for field in found.moved:
        fits = can_be_carried(field.name)
        assert field.reason == (
            "not wanted"
            if field.name not in wanted
            else "does not fit"
            if fits
            else "its name is too long to be weighed"
            if field.name.endswith("long" * 20)
            else "can't be a dot path"
        )


def judge(found: Suggestion, of: list[UserChanged], policy: Policy, allowed: int) -> None:
    assert found.template is not None
    template = parse_template(found.template)
    weights = [measure(template, weigh_user(one), policy.assumed).high for one in of]
    assert found.over == sum(weight > policy.budget for weight in weights) <= allowed
    assert found.max == max(weights, default=0)
    assert sum(weight(template, one, policy) > policy.budget for one in of) <= allowed
    assert found.config_patch is not None
    command, _, _, option, argument = shlex.split(found.config_patch)
    assert (command, option) == ("clerk", "--json")
    assert json.loads(argument) == {"session": {"claims": json.loads(found.template)}}


def test_what_is_not_wanted_or_does_not_fit_is_read_by_sql() -> None:
    of, policy = users(({"role": "admin", "bio": "x" * 2000}, {"it's": 1})), Policy()
    found = suggest(population(of, policy), policy, ["public_metadata.role", "public_metadata.bio"], 100)
    assert [field.name for field in found.kept] == ["public_metadata.role"]
    assert [(field.name, field.reason, field.sql) for field in found.moved] == [
        (
            "public_metadata.bio",
            "does not fit",
            "select public_metadata -> 'bio' from clerk.user_metadata where user_id = $1",
        ),
        (
            "unsafe_metadata.it's",
            "not wanted",
            "select unsafe_metadata -> 'it''s' from clerk.user_metadata where user_id = $1",
        ),
    ]


@pytest.mark.parametrize(
    ("name", "literal"),
    [
        ("", "''"),
        ("back\\slash", "'back\\slash'"),
        ("größe 😀", "'größe 😀'"),
        ('"; drop table x; --', "'\"; drop table x; --'"),
        ("a\nb\\'\u202e", "E'a\\U0000000Ab\\\\''\\U0000202E'"),
    ],
)
def test_any_name_is_a_literal_of_sql_without_anything_that_cannot_be_seen(name: str, literal: str) -> None:
    of, policy = users(({}, {name: 1, "role": 1})), Policy()
    found = suggest(population(of, policy), policy, ["unsafe_metadata.role"], 100)
    (moved,) = found.moved
    assert (
        moved.sql.removeprefix("select unsafe_metadata -> ") == literal + " from clerk.user_metadata where user_id = $1"
    )


def test_the_base_is_kept_as_it_was_written_and_what_carried_metadata_is_named() -> None:
    source = (
        '{ "n" : "{{user.first_name || \'no one\'}}",\n'
        ' "big": 1e400, "m": {"x": "{{user.public_metadata}}"}, "k": [ {} ]}'
    )
    of, policy = users(({"role": "admin"}, {})), Policy(template=parse_template(source))
    found = suggest(population(of, policy), policy, [], 100)
    assert found.dropped == ("m",)
    assert found.template == (
        '{\n  "n": "{{user.first_name || \'no one\'}}",\n  "big": 1e400,\n  "k": [ {} ],\n'
        '  "public_metadata": {\n    "role": "{{user.public_metadata.role}}"\n  }\n}'
    )
    assert found.base_bytes == len('{"n":"Ada","big":1e400,"k":[{}]}')
    judge(found, of, policy, 0)


def test_metadata_goes_under_another_name_where_the_base_has_taken_its_own() -> None:
    source = '{"public_metadata": 1, "public": 2, "unsafe_metadata": 3}'
    of, policy = users(({"role": "admin"}, {"theme": "dark"})), Policy(template=parse_template(source))
    found = suggest(population(of, policy), policy, [], 100)
    assert found.template is not None
    claims = json.loads(found.template)
    assert claims["public_2"] == {"role": "{{user.public_metadata.role}}"}
    assert claims["unsafe"] == {"theme": "{{user.unsafe_metadata.theme}}"}


def test_what_is_known_of_a_limit_is_forgotten_once_a_field_was_added() -> None:
    # The first field's key takes as much room as those of the other two, so that both are tried against one limit.
    of, policy = users(({"b": "x" * 28}, {}), ({"a" * 10: "x" * 30}, {})), Policy(budget=60)
    keep = [f"public_metadata.{name}" for name in ("a" * 10, "b", "c")]
    assert [field.name for field in suggest(population(of, policy), policy, keep, 100).kept] == ["public_metadata.b"]


def test_a_field_that_nobody_has_costs_null_for_everybody() -> None:
    of, policy = users(({}, {}), ({}, {})), Policy(budget=len('{"public_metadata":{"role":null}}'))
    (field,) = suggest(population(of, policy), policy, ["public_metadata.role"], 100).kept
    assert field == Field("public_metadata.role", 0, 0, 0, carried=True, share=0.0)
    smaller = Policy(budget=policy.budget - 1)
    found = suggest(population(of, policy), smaller, ["public_metadata.role"], 100)
    assert (found.template, found.moved[0].reason) == ("{}", "does not fit")


@pytest.mark.parametrize("name", ["role", "user.public_metadata.role", "private_metadata.role", "public_metadata", ""])
def test_what_is_no_field_is_refused_with_how_to_write_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r"write public_metadata\.NAME or unsafe_metadata\.NAME"):
        suggest([], Policy(), [name], 100)


@pytest.mark.parametrize("percentile", [-1, 100.5, float("nan")])
def test_a_percentile_is_of_a_hundred(percentile: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to 100"):
        suggest([], Policy(), [], percentile)


def test_without_users_there_is_nothing_to_suggest_from() -> None:
    found = suggest([], Policy(), ["unsafe_metadata.theme"], 99)
    assert (found.template, found.config_patch, found.kept, found.users) == (None, None, (), 0)
    assert found.asked_for == ("unsafe_metadata.theme",)


def test_a_base_over_the_budget_leaves_nothing_to_suggest() -> None:
    of, policy = users(({"a": 1}, {})), Policy(template=parse_template('{"n": "{{user.first_name}}"}'), budget=10)
    found = suggest(population(of, policy), policy, [], 100)
    assert (found.template, found.config_patch, found.over, found.max) == (None, None, 1, len('{"n":"Ada"}'))
    assert [(field.name, field.reason) for field in found.moved] == [("public_metadata.a", "does not fit")]


def test_a_suggestion_that_would_weigh_other_than_computed_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    of, policy = users(({"a": 1}, {}), ({}, {})), Policy()
    monkeypatch.setattr("worker.suggest._NULL_BYTES", 3)
    with pytest.raises(SyncError, match="weighs other than was computed"):
        suggest(population(of, policy), policy, [], 100)


def hostile(number: int) -> Weighed:
    names = {f"x{number}_{field}": 1 + (number + field) % 2000 for field in range(5)}
    total = 1 + sum(len(name) + 4 + size for name, size in names.items())
    kinds: dict[Kind, Fields] = {PUBLIC: Fields(len('{"a":1}'), {"a": 1}), UNSAFE: Fields(total, names)}
    weights = Weights(f"user_{number:06}", 1, None, kinds[PUBLIC], kinds[UNSAFE])
    return Weighed(weights, 46 + total, current=True, exact=True)


def test_ten_thousand_names_that_one_user_each_has_take_seconds_at_most() -> None:
    policy = Policy()
    begun = time.perf_counter()
    found = suggest(map(hostile, range(2000)), policy, [], 100)
    assert (len(found.kept) + len(found.moved), found.other_moved) == (1000 + len(found.kept), 9001 - len(found.kept))
    assert found.over == 0
    told = report(map(hostile, range(2000)), policy, unknown)
    assert (len(told.fields), told.other_fields) == (50, 9951)
    assert time.perf_counter() - begun < 10


def test_what_everybody_has_comes_before_what_is_small() -> None:
    often = [({"role": "administrator", "bio": "x" * 1500}, {f"seen_{n:02}": True for n in range(60)})] * 3
    of, policy = users(*[({"role": "user"}, {})] * 100, *often), Policy()
    found = suggest(population(of, policy), policy, [], 100)
    assert found.kept[0].name == "public_metadata.role"


def test_a_whole_kind_is_replaced_under_the_name_it_has() -> None:
    policy = Policy(template=parse_template('{"metadata": "{{user.public_metadata}}", "id": "{{user.id}}"}'))
    found = suggest(population(users(({"role": "admin"}, {})), policy), policy, [], 100)
    assert json.loads(found.template or "") == {
        "metadata": {"role": "{{user.public_metadata.role}}"},
        "id": "{{user.id}}",
    }
    assert found.dropped == ()


@pytest.mark.parametrize(
    ("present", "names", "dropped"),
    [
        ('{"public_metadata": "{{user.unsafe_metadata}}"}', ("public", "public_metadata"), ()),
        ('{"a": "{{user.public_metadata}}", "b": "{{user.public_metadata}}"}', ("a", "unsafe_metadata"), ("b",)),
        ('{"": "{{user.public_metadata}}"}', ("", "unsafe_metadata"), ()),
        ('{"a": {"b": "{{user.public_metadata}}"}}', ("public_metadata", "unsafe_metadata"), ("a",)),
    ],
)
def test_each_kind_has_a_name_of_its_own(present: str, names: tuple[str, str], dropped: tuple[str, ...]) -> None:
    policy = Policy(template=parse_template(present))
    found = suggest(population(users(({"role": "admin"}, {"theme": "dark"})), policy), policy, [], 100)
    assert json.loads(found.template or "") == {
        names[0]: {"role": "{{user.public_metadata.role}}"},
        names[1]: {"theme": "{{user.unsafe_metadata.theme}}"},
    }
    assert found.dropped == dropped


def test_what_few_users_have_is_not_wanted_unasked() -> None:
    rare: list[tuple[Any, Any]] = [({}, {f"f{number}": 1}) for number in range(50)]
    of, policy = users(*[({"role": "admin"}, {"theme": "x" * 1200})] * 150, *rare), Policy()
    found = suggest(population(of, policy), policy, [], 100)
    assert [field.name for field in found.kept] == ["public_metadata.role"]
    reasons = {field.name: field.reason for field in found.moved}
    assert reasons.pop("unsafe_metadata.theme") == "does not fit"
    assert set(reasons.values()) == {"too few users have it"}
    asked = suggest(population(of, policy), policy, ["unsafe_metadata.f1"], 100)
    assert [field.name for field in asked.kept] == ["unsafe_metadata.f1"]
