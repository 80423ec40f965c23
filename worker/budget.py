"""The session token's budget over a whole population of users: how their claims weigh, whether a template fits them
all, and which one would. Pure: users come in as a stream of sizes, and nothing is asked of a database here."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from worker.claims import Fields, Weighed, Weights
from worker.measure import FRAME, contributions, measure
from worker.policy import Policy
from worker.shortcodes import assumed_bytes
from worker.template import ASSUMED_TEMPLATE, Template

Exactly = Callable[[Weights], int | None]
"""Asks for the exact weight of a user's claims where sizes alone don't tell; None where that can't be known."""

Kind = Literal["public_metadata", "unsafe_metadata"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

WORST: Final = 10
FIELDS_LISTED: Final = 50
FIELDS_FOLLOWED: Final = 50_000
"""How many field names of each kind are counted: unsafe metadata is written by browsers, and memory ends somewhere."""

COOKIE_BASE_BYTES: Final = len("__session=") + 888
COOKIE_ORG_BYTES: Final = 190
COOKIE_LIMIT: Final = 4096
COOKIE_ASSUMPTIONS: Final = (
    "a session token without custom claims is 888 bytes: version 2, signed with RS256",
    "base64 makes 4 bytes of 3",
    "an active organization adds 190 bytes, more where its members have many permissions",
    "browsers drop a cookie whose name and value are over 4,096 bytes; servers and proxies may take less",
)


@dataclass(frozen=True, slots=True)
class Claims:
    """One user's claims; `exact` is False for an upper bound, `blame` names what weighs most (None: nothing does)."""

    user_id: str
    bytes: int
    exact: bool
    blame: str | None


@dataclass(frozen=True, slots=True)
class Field:
    """One metadata field over all users: how many have it, the bytes of its values, its share of all claims."""

    name: str
    users: int
    total: int
    largest: int
    carried: bool
    share: float


@dataclass(frozen=True, slots=True)
class Bar:
    """How many users' claims weigh from `low` to `high` bytes; None: or more. The budget is the end of a bar."""

    low: int
    high: int | None
    users: int


@dataclass(frozen=True, slots=True)
class Cookie:
    """Estimated bytes of the session cookie: for the median user and the heaviest, and what claims would just fit."""

    base_bytes: int
    org_bytes: int
    limit: int
    median: int
    largest: int
    largest_with_org: int
    largest_claims: int
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What the claims of all users weigh, in bytes, and what weighs in them.

    `stale` counts users whose kept weight is by another policy, so that they were measured from sizes; `inexact`
    those whose weight here is an upper bound. `template` is None where the assumed one stands in.
    """

    users: int
    budget: int
    over: int
    p50: int
    p90: int
    p99: int
    max: int
    stale: int
    inexact: int
    histogram: tuple[Bar, ...]
    worst: tuple[Claims, ...]
    fields: tuple[Field, ...]
    other_fields: int
    cookie: Cookie
    assumed: dict[str, int]
    template: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """How a template fits all users; `over_bounds` counts those who are over by an upper bound only."""

    users: int
    budget: int
    over: int
    over_bounds: int
    max: int
    worst: tuple[Claims, ...]

    @property
    def fits(self) -> bool:
        """Whether no user is over the budget, for all that is known."""
        return self.over + self.over_bounds == 0


# --- How much everybody's claims weigh.


class _Scale:
    """Weighs users one by one under a template: how many weigh what, whose weight isn't exact, who is heaviest."""

    def __init__(self, template: Template, policy: Policy, exactly: Exactly) -> None:
        self._template = template
        self._policy = policy
        self._exactly = exactly
        # What a template is made of decides, not how it was spaced.
        self._kept_holds = template.parts == policy.template.parts
        self._worst: list[tuple[int, int, bool, Weights]] = []
        self.spread: dict[int, int] = {}  # how many users have claims of so many bytes
        self.users = 0
        self.inexact = 0
        self.over_bounds = 0

    def add(self, user: Weighed) -> None:
        low = high = user.claims_bytes
        if not (user.current and user.exact and self._kept_holds):
            low, high = self._measured(user.weights)
        if low != high:
            self.inexact += 1
            self.over_bounds += low <= self._policy.budget < high
        self.spread[high] = self.spread.get(high, 0) + 1
        self.users += 1
        if len(self._worst) < WORST:
            heapq.heappush(self._worst, (high, -self.users, low == high, user.weights))
        elif high > self._worst[0][0]:
            heapq.heapreplace(self._worst, (high, -self.users, low == high, user.weights))

    def _measured(self, weights: Weights) -> tuple[int, int]:
        low, high = measure(self._template, weights, self._policy.assumed)
        if low <= self._policy.budget < high:
            exact = self._exactly(weights)
            if exact is not None:
                return exact, exact
        return low, high

    @property
    def over(self) -> int:
        """How many users are over the budget, those by an upper bound included."""
        return sum(users for weight, users in self.spread.items() if weight > self._policy.budget)

    @property
    def worst(self) -> tuple[Claims, ...]:
        """The heaviest users, heaviest first; of equals the one that came first."""
        return tuple(
            Claims(weights.user_id, weight, exact, self._blame(weights))
            for weight, _, exact, weights in sorted(self._worst, reverse=True)
        )

    def _blame(self, weights: Weights) -> str | None:
        parts = contributions(self._template, weights, self._policy.assumed)
        parts.pop(FRAME, None)
        return max(parts, key=lambda name: parts[name], default=None)

    def percentile(self, percent: int) -> int:
        """The weight that so many percent of the users don't exceed (nearest rank); 0 without users."""
        rank = -(-self.users * percent // 100)
        for weight in sorted(self.spread):
            rank -= self.spread[weight]
            if rank <= 0:
                return weight
        return 0


def report(population: Iterable[Weighed], policy: Policy, exactly: Exactly) -> Report:
    """Weigh everybody's claims under the policy's template.

    Of each kind the first 50,000 different field names are followed; a warning says where there are more.
    """
    scale = _Scale(policy.template, policy, exactly)
    tallies: dict[Kind, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    stale = 0
    followed = True
    for user in population:
        scale.add(user)
        stale += not user.current
        for kind, fields in kinds(user.weights):
            followed &= _tally(tallies[kind], fields.by_name)
    claims_bytes = sum(weight * users for weight, users in scale.spread.items())
    listed = _report_fields(tallies, policy.template, claims_bytes)
    warnings = [str(finding) for finding in policy.template.warnings]
    if not followed:
        warnings.append(f"more than {FIELDS_FOLLOWED:,} different field names: those met later are not in this report")
    median, largest = scale.percentile(50), scale.percentile(100)
    return Report(
        users=scale.users,
        budget=policy.budget,
        over=scale.over,
        p50=median,
        p90=scale.percentile(90),
        p99=scale.percentile(99),
        max=largest,
        stale=stale,
        inexact=scale.inexact,
        histogram=histogram(scale.spread, policy.budget),
        worst=scale.worst,
        fields=tuple(listed[:FIELDS_LISTED]),
        other_fields=max(0, len(listed) - FIELDS_LISTED),
        cookie=_cookie(median, largest),
        assumed=_assumed(policy),
        template=None if policy.template is ASSUMED_TEMPLATE else policy.template.source,
        warnings=tuple(warnings),
    )


def kinds(weights: Weights) -> tuple[tuple[Kind, Fields], tuple[Kind, Fields]]:
    """The two kinds that a token can carry, with their sizes."""
    return ("public_metadata", weights.public), ("unsafe_metadata", weights.unsafe)


def _tally(tallies: dict[str, list[int]], by_name: Mapping[str, int]) -> bool:
    """Add one user's fields to [users, total, largest] by name; False where one is not followed."""
    followed = True
    for name, size in by_name.items():
        tally = tallies.get(name)
        if tally is not None:
            tally[0] += 1
            tally[1] += size
            if size > tally[2]:  # noqa: PLR1730 - max() costs three times as much, and this runs for every field
                tally[2] = size
        elif len(tallies) < FIELDS_FOLLOWED:
            tallies[name] = [1, size, size]
        else:
            followed = False
    return followed


def _report_fields(tallies: Mapping[Kind, dict[str, list[int]]], template: Template, claims_bytes: int) -> list[Field]:
    carried = {path[1:3] for path in template.shortcodes if path[0] == "user"}
    fields = []
    for kind in KINDS:
        whole = (kind,) in carried
        for name, (users, total, largest) in tallies[kind].items():
            in_claims = whole or (kind, name) in carried
            share = min(1.0, total / claims_bytes) if in_claims and claims_bytes else 0.0
            fields.append(Field(f"{kind}.{name}", users, total, largest, in_claims, share))
    return sorted(fields, key=lambda field: (-field.total, field.name))


def histogram(spread: Mapping[int, int], budget: int) -> tuple[Bar, ...]:
    """Users by what their claims weigh; `spread` tells how many weigh how many bytes. Ten bars are up to the budget,
    ten up to twice as much, and one is of those beyond."""
    ends = sorted({budget * step // 10 for step in range(1, 21)})
    users = [0] * (len(ends) + 1)
    for weight, having in spread.items():
        users[bisect_left(ends, weight)] += having
    return tuple(map(Bar, [0, *(end + 1 for end in ends)], [*ends, None], users))


def _assumed(policy: Policy) -> dict[str, int]:
    found = {".".join(path): assumed_bytes(path, policy.assumed) for path in policy.template.shortcodes}
    return {shortcode: size for shortcode, size in found.items() if size is not None}


# --- The cookie that the token travels in.


def cookie_bytes(claims_bytes: int) -> int:
    """Estimate the session cookie, name included, from the bytes of custom claims: base64 makes 4 bytes of 3."""
    return COOKIE_BASE_BYTES - -claims_bytes * 4 // 3


def _cookie(median: int, largest: int) -> Cookie:
    return Cookie(
        base_bytes=COOKIE_BASE_BYTES,
        org_bytes=COOKIE_ORG_BYTES,
        limit=COOKIE_LIMIT,
        median=cookie_bytes(median),
        largest=cookie_bytes(largest),
        largest_with_org=cookie_bytes(largest) + COOKIE_ORG_BYTES,
        largest_claims=(COOKIE_LIMIT - COOKIE_BASE_BYTES) * 3 // 4,
        assumptions=COOKIE_ASSUMPTIONS,
    )


# --- Whether a template fits.


def check(population: Iterable[Weighed], template: Template, policy: Policy, exactly: Exactly) -> Checked:
    """Weigh everybody's claims under a template, with the policy's budget and assumptions."""
    scale = _Scale(template, policy, exactly)
    for user in population:
        scale.add(user)
    return Checked(
        users=scale.users,
        budget=policy.budget,
        over=scale.over - scale.over_bounds,
        over_bounds=scale.over_bounds,
        max=scale.percentile(100),
        worst=scale.worst,
    )
