"""Reports and checks over generated populations, judged by weighing every user's rendered claims."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.populations import TEMPLATES, USERS, padded, population, unknown, users, weight
from worker import budget
from worker.budget import Bar, Field, check, cookie_bytes, report
from worker.claims import Weights, weigh_user
from worker.events import UserChanged
from worker.measure import measure
from worker.policy import Policy
from worker.suggest import suggest
from worker.template import Template, parse_template

# --- Reports.


def nearest_rank(weights: Sequence[int], percent: int) -> int:
    rank = -(-len(weights) * percent // 100)
    return sorted(weights)[rank - 1] if weights else 0


@settings(deadline=None)
@given(of=USERS, template=TEMPLATES, limit=st.integers(0, 300))
def test_a_report_says_what_the_users_rendered_claims_weigh(
    of: list[UserChanged], template: Template, limit: int
) -> None:
    policy = Policy(template=template, budget=limit)
    weights = [weight(template, one, policy) for one in of]
    found = report(population(of, policy), policy, unknown)
    assert (found.users, found.stale, found.inexact) == (len(of), 0, 0)
    assert found.over == sum(weight > limit for weight in weights)
    assert (found.p50, found.p90, found.p99) == tuple(nearest_rank(weights, percent) for percent in (50, 90, 99))
    assert found.max == max(weights, default=0)
    assert [claims.bytes for claims in found.worst] == sorted(weights, reverse=True)[:10]
    assert found.histogram == tuple(bars(weights, limit))


def bars(weights: Sequence[int], limit: int) -> Iterator[Bar]:
    ends = sorted({limit * step // 10 for step in range(1, 21)})
    assert limit in ends
    for low, high in zip([0, *(end + 1 for end in ends)], [*ends, None], strict=True):
        yield Bar(low, high, sum(low <= weight and (high is None or weight <= high) for weight in weights))


@settings(deadline=None)
@given(of=USERS, template=TEMPLATES, limit=st.integers(0, 300), kept=st.booleans())
def test_a_user_weighed_by_another_policy_is_measured_and_rendered_where_that_does_not_tell(
    of: list[UserChanged], template: Template, limit: int, kept: bool
) -> None:
    policy = Policy(template=template, budget=limit)
    by_id = {one.user_id: one for one in of}
    asked: set[str] = set()

    def exactly(weights: Weights) -> int | None:
        asked.add(weights.user_id)
        return weight(template, by_id[weights.user_id], policy) if kept else None

    found = report(population(of, policy, current=False), policy, exactly)
    ranges = {one.user_id: measure(template, weigh_user(one), policy.assumed) for one in of}
    assert asked == {user_id for user_id, (low, high) in ranges.items() if low <= limit < high}
    bounds = {
        user_id: weight(template, by_id[user_id], policy) if kept and user_id in asked else high
        for user_id, (_, high) in ranges.items()
    }
    assert found.stale == len(of)
    assert found.inexact == sum(
        low != high and not (kept and user_id in asked) for user_id, (low, high) in ranges.items()
    )
    assert found.over == sum(bound > limit for bound in bounds.values())
    assert found.max == max(bounds.values(), default=0)
    assert {claims.user_id: claims.bytes for claims in found.worst}.items() <= bounds.items()


@settings(deadline=None)
@given(of=USERS, template=TEMPLATES)
def test_a_report_counts_every_field_that_is_kept_by_name(of: list[UserChanged], template: Template) -> None:
    policy = Policy(template=template)
    sizes: dict[str, list[int]] = {}
    for one in of:
        weights = weigh_user(one)
        for kind, fields in (("public_metadata", weights.public), ("unsafe_metadata", weights.unsafe)):
            for name, size in fields.by_name.items():
                sizes.setdefault(f"{kind}.{name}", []).append(size)
    found = report(population(of, policy), policy, unknown)
    assert len(found.fields) + found.other_fields == len(sizes)
    assert [field.total for field in found.fields] == sorted(map(sum, sizes.values()), reverse=True)[:50]
    for field in found.fields:
        assert (field.users, field.total, field.largest) == (
            len(sizes[field.name]),
            sum(sizes[field.name]),
            max(sizes[field.name]),
        )
        assert 0 <= field.share <= 1


def test_the_shares_of_fields_are_of_all_claims_and_of_those_that_the_template_carries() -> None:
    of = users(({"role": "admin", "bio": "x" * 98}, {"theme": "dark"}), ({"role": "user"}, {}))
    policy = Policy(template=parse_template('{"r": "{{user.public_metadata.role}}", "u": "{{user.unsafe_metadata}}"}'))
    claims = len('{"r":"admin","u":{"theme":"dark"}}') + len('{"r":"user","u":{}}')
    assert report(population(of, policy), policy, unknown).fields == (
        Field("public_metadata.bio", 1, 100, 100, carried=False, share=0.0),
        Field("public_metadata.role", 2, 13, 7, carried=True, share=13 / claims),
        Field("unsafe_metadata.theme", 1, 6, 6, carried=True, share=6 / claims),
    )


def test_a_path_into_a_field_counts_as_the_whole_field_and_never_as_more_than_everything() -> None:
    of = users(({"a": {"b": 1, "rest": "x" * 500}}, {}))
    policy = Policy(template=parse_template('{"b": "{{user.public_metadata.a.b}}"}'))
    (field,) = report(population(of, policy), policy, unknown).fields
    assert (field.carried, field.share) == (True, 1.0)


@pytest.mark.parametrize(("claims_bytes", "over"), [(1199, 0), (1200, 0), (1201, 1)])
def test_over_the_budget_is_one_byte_more_than_the_budget(claims_bytes: int, over: int) -> None:
    of, policy = users((padded(claims_bytes), {})), Policy()
    assert report(population(of, policy), policy, unknown).over == over
    checked = check(population(of, policy), parse_template(policy.template.source), policy, unknown)
    assert (checked.over, checked.fits, checked.max) == (over, not over, claims_bytes)


def test_the_worst_ten_come_heaviest_first_with_what_is_to_blame() -> None:
    of = users(*(({"bio": "x" * size, "role": "admin"}, {}) for size in (*range(20, 32), 25)))
    policy = Policy()
    worst = report(population(of, policy), policy, unknown).worst
    assert [claims.user_id for claims in worst][:8] == [
        "user_0011", "user_0010", "user_0009", "user_0008", "user_0007", "user_0006", "user_0005", "user_0012",
    ]  # fmt: skip
    assert len(worst) == 10
    assert {claims.blame for claims in worst} == {"public_metadata.bio"}
    nothing = Policy(template=parse_template("{}"))
    assert report(population(of[:1], nothing), nothing, unknown).worst[0].blame is None


def test_of_users_of_equal_weight_the_first_ten_are_the_worst() -> None:
    of, policy = users(*[({"role": "admin"}, {})] * 12), Policy()
    worst = report(population(of, policy), policy, unknown).worst
    assert [claims.user_id for claims in worst] == [f"user_{number:04}" for number in range(10)]


def test_without_users_everything_is_zero() -> None:
    policy = Policy()
    found = report([], policy, unknown)
    assert (found.users, found.over, found.p50, found.p99, found.max, found.worst, found.fields) == (
        0,
        0,
        0,
        0,
        0,
        (),
        (),
    )
    assert len(found.histogram) == 21
    assert not any(bar.users for bar in found.histogram)
    assert check([], policy.template, policy, unknown).fits


def test_a_report_says_what_it_assumes() -> None:
    template = parse_template(
        '{"org": "{{org.name}}", "t": "{{org.public_metadata.tier}}", "n": "{{user.first_name}}"}'
    )
    found = report([], Policy(template=template, assumed={"org.name": 7}), unknown)
    assert found.assumed == {"org.name": 7, "org.public_metadata.tier": 50}
    assert found.template == template.source
    assert report([], Policy(), unknown).template is None


def test_a_report_passes_on_what_the_template_risks() -> None:
    template = parse_template('{"all": "{{user.unsafe_metadata}}"}')
    assert report([], Policy(template=template), unknown).warnings == tuple(map(str, template.warnings))


def test_the_cookie_is_estimated_from_the_claims() -> None:
    policy = Policy()
    cookie = report(
        population(users((padded(300), {}), (padded(1200), {}), (padded(90), {})), policy), policy, unknown
    ).cookie
    assert (cookie.median, cookie.largest, cookie.largest_with_org) == (898 + 400, 898 + 1600, 898 + 1600 + 190)
    assert cookie_bytes(0) == cookie.base_bytes
    assert cookie_bytes(1) == 900
    assert cookie_bytes(cookie.largest_claims) <= cookie.limit < cookie_bytes(cookie.largest_claims + 1)


def test_names_beyond_those_that_are_followed_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "FIELDS_FOLLOWED", 3)
    policy = Policy()
    of = users(*(({}, {f"x{number}": "y" * 30}) for number in range(5)), ({"role": 1}, {"x0": 1}))
    found = report(population(of, policy), policy, unknown)
    assert {field.name: field.users for field in found.fields} == {
        "unsafe_metadata.x0": 2, "unsafe_metadata.x1": 1, "unsafe_metadata.x2": 1, "public_metadata.role": 1,
    }  # fmt: skip
    assert "3 different field names" in found.warnings[-1]
    suggestion = suggest(population(of, policy), policy, ["unsafe_metadata.x4"], 100)
    assert [field.name for field in suggestion.kept] == ["unsafe_metadata.x4"]


# --- Checks.


@settings(deadline=None)
@given(of=USERS, kept=TEMPLATES, asked=TEMPLATES, limit=st.integers(0, 300), current=st.booleans())
def test_a_template_that_fits_is_over_for_nobody(
    of: list[UserChanged], kept: Template, asked: Template, limit: int, current: bool
) -> None:
    policy = Policy(template=kept, budget=limit)
    by_id = {one.user_id: one for one in of}
    weights = [weight(asked, one, policy) for one in of]
    exact = check(
        population(of, policy, current=current), asked, policy, lambda of: weight(asked, by_id[of.user_id], policy)
    )
    assert (exact.users, exact.over, exact.over_bounds) == (len(of), sum(weight > limit for weight in weights), 0)
    bound = check(population(of, policy, current=current), asked, policy, unknown)
    assert bound.over <= exact.over <= bound.over + bound.over_bounds
    assert bound.max >= max(weights, default=0)
    assert bound.fits is (bound.over + bound.over_bounds == 0)


def test_who_is_over_by_an_upper_bound_only_is_counted_apart() -> None:
    of = users(({"a": {"b": 1, "rest": "x" * 100}}, {}), ({}, {}))
    policy = Policy(budget=50)
    template = parse_template('{"b": "{{user.public_metadata.a.b}}"}')
    found = check(population(of, policy), template, policy, unknown)
    assert (found.over, found.over_bounds, found.fits) == (0, 1, False)
    assert [(claims.exact, claims.bytes) for claims in found.worst][1] == (True, len('{"b":null}'))
    assert not found.worst[0].exact


@pytest.mark.parametrize(("limit", "over", "over_bounds"), [(6, 1, 0), (7, 0, 1), (8, 0, 1), (500, 0, 0)])
def test_bounds_leave_a_doubt_only_where_the_budget_lies_between_them(limit: int, over: int, over_bounds: int) -> None:
    least = len('{"b":1}')
    assert least == 7
    of, policy = users(({"a": {"b": 1, "rest": "x" * 100}}, {})), Policy(budget=limit)
    found = check(population(of, policy), parse_template('{"b": "{{user.public_metadata.a.b}}"}'), policy, unknown)
    assert (found.over, found.over_bounds) == (over, over_bounds)
