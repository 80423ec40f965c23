"""Which claims template would fit all users: the fields that one can carry, and where to read the others.

Pure: users come in as a stream of sizes, as in `worker.budget`. Nothing is held of a user but a few numbers.
"""

from __future__ import annotations

import heapq
import json
import re
import shlex
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain, count
from typing import Final, Literal

from worker.budget import FIELDS_FOLLOWED, KINDS, Field, Kind, kinds
from worker.claims import NAME_BYTES, Weighed, Weights
from worker.errors import ConfigError, SyncError
from worker.jsontext import compact, is_visible, visible
from worker.measure import measure
from worker.policy import Policy
from worker.template import Expression, Shortcode, Template, lint, parse_template

MOVED_LISTED: Final = 1000

WANTED_PERCENT: Final = 1
"""Without a choice of fields, those are wanted that so many percent of the users have. Each costs everybody its name
and a null, and a browser can fill unsafe metadata with small ones."""

Reason = Literal[
    "does not fit", "not wanted", "too few users have it", "can't be a dot path", "its name is too long to be weighed"
]


@dataclass(frozen=True, slots=True)
class Moved:
    """A field that the suggested template leaves out: why, how many users have it, the bytes of its largest value,
    and the SQL that reads it (`$1` is the user's id)."""

    name: str
    reason: Reason
    users: int
    largest: int
    sql: str


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A claims template within the budget; `template` and `config_patch` are None where even the base is over, and
    where there are no users to fit.

    The base is those claims of the present template that carry no metadata, and `base_bytes` what it weighs for the
    heaviest user; `dropped` names its other claims. `over` and `max` are of the suggested template, or of the base
    where there is none. `kept` is in the order the fields were tried in; `moved` has those asked for first, then the
    largest. `other_moved` counts the moved fields that aren't listed.
    """

    template: str | None
    config_patch: str | None
    users: int
    budget: int
    over: int
    max: int
    base_bytes: int
    kept: tuple[Field, ...]
    moved: tuple[Moved, ...]
    other_moved: int
    dropped: tuple[str, ...]
    asked_for: tuple[str, ...]


def suggest(population: Iterable[Weighed], policy: Policy, keep: Sequence[str], percentile: float) -> Suggestion:
    """Suggest a template that fits, carrying the fields in `keep`, most important first; where it is empty, all that
    one percent of the users have: those that most have first, and of these the smallest.

    It goes on carrying those claims of the policy's template that have no metadata in them. At most
    100 - `percentile` percent of the users, rounded down, are over the budget under it. Of each kind the first 50,000
    different field names can be suggested. Raises ConfigError where a name in `keep` isn't written like a field's.
    """
    wanted = _wanted(keep)
    if not 0 <= percentile <= 100:
        raise ConfigError(f"percentile {percentile:g}: must be from 0 to 100")
    base = _base(policy.template)
    table = _Table(base.template, policy, wanted)
    for user in population:
        table.add(user.weights)
    fit = _Fit(table, base, policy.budget, allowed=int((100 - Decimal(str(percentile))) * len(table.weights) // 100))
    columns = [table.columns[kind][name] for kind, name in wanted] or table.common()
    fits = bool(table.weights) and fit.over <= fit.allowed
    kept = [column for column in columns if fits and _obstacle(column.name) is None and fit.add(column)]
    source = base.with_fields(kept) if fits else None
    if source is not None:
        _verify(source, table, fit, policy)
    moved = _moved(table, kept, wanted)
    return Suggestion(
        template=source,
        config_patch=None if source is None else _config_patch(source),
        users=len(table.weights),
        budget=policy.budget,
        over=fit.over,
        max=fit.max,
        base_bytes=max(table.weights, default=0),
        kept=_kept_fields(kept, fit.total),
        moved=tuple(
            Moved(column.title, _reason(column, wanted, table), len(column.users), column.largest, _sql(column))
            for column in moved[:MOVED_LISTED]
        ),
        other_moved=max(0, len(moved) - MOVED_LISTED),
        dropped=base.dropped,
        asked_for=tuple(f"{kind}.{name}" for kind, name in wanted),
    )


def _wanted(keep: Sequence[str]) -> list[tuple[Kind, str]]:
    wanted: dict[tuple[Kind, str], None] = {}
    for written in keep:
        kind = next((kind for kind in KINDS if written.startswith(f"{kind}.")), None)
        if kind is None:
            raise ConfigError(
                f"{written!a} is not a metadata field: write public_metadata.NAME or unsafe_metadata.NAME, "
                "such as public_metadata.role"
            )
        wanted[kind, written[len(kind) + 1 :]] = None
    return list(wanted)


def _kept_fields(kept: Sequence[_Column], claims_bytes: int) -> tuple[Field, ...]:
    return tuple(
        Field(
            column.title,
            len(column.users),
            column.total,
            column.largest,
            carried=True,
            share=column.total / claims_bytes if claims_bytes else 0.0,
        )
        for column in kept
    )


def _moved(table: _Table, kept: Sequence[_Column], wanted: Sequence[tuple[Kind, str]]) -> list[_Column]:
    asked_for = [table.columns[kind][name] for kind, name in wanted]
    largest_first = sorted(table.all(), key=lambda column: (-column.total, column.title))
    moved = dict.fromkeys([*asked_for, *largest_first])
    for column in kept:
        del moved[column]
    return list(moved)


def _reason(column: _Column, wanted: Sequence[tuple[Kind, str]], table: _Table) -> Reason:
    if wanted and (column.kind, column.name) not in wanted:
        return "not wanted"
    if obstacle := _obstacle(column.name):
        return obstacle
    return "does not fit" if wanted or table.is_common(column) else "too few users have it"


def _obstacle(name: str) -> Reason | None:
    """Why the name can't stand in a shortcode, which the dot path `user.public_metadata.name` is."""
    if not name.isprintable() or _NOT_IN_A_PATH.intersection(name) or name == "":
        return "can't be a dot path"
    return None if len(name.encode()) <= NAME_BYTES else "its name is too long to be weighed"


_NOT_IN_A_PATH: Final = frozenset(" .'\"`{}|")


def _sql(column: _Column) -> str:
    """The query for one field. In its literal whatever can't be seen is escaped, as users' browsers choose names."""
    literal = column.name.replace("'", "''")
    if visible(column.name) == column.name:
        literal = f"'{literal}'"
    else:
        literal = literal.replace("\\", "\\\\")
        literal = "".join(char if is_visible(char) else f"\\U{ord(char):08X}" for char in literal)
        literal = f"E'{literal}'"
    return f"select {column.kind} -> {literal} from clerk.user_metadata where user_id = $1"  # noqa: S608 - shown, not run


def _config_patch(source: str) -> str:
    claims = compact(source.encode()).decode()
    return "clerk config patch --json " + shlex.quote(f'{{"session":{{"claims":{claims}}}}}')


# What stays of the present template.

_json: Final = json.JSONEncoder(ensure_ascii=False).encode
_DECODER: Final = json.JSONDecoder(parse_int=str, parse_float=str)
_BEFORE_NAME: Final = re.compile(r"[\s{,]*")
_BEFORE_VALUE: Final = re.compile(r"[\s:]*")


@dataclass(frozen=True, slots=True)
class _Base:
    """The claims that a suggestion leaves as they are, by name as JSON text, and where it puts each kind's fields."""

    claims: Mapping[str, str]
    dropped: tuple[str, ...]
    objects: Mapping[Kind, str]

    @property
    def template(self) -> Template:
        """The claims alone."""
        return _compiled(self.with_fields(()))

    def with_fields(self, columns: Sequence[_Column]) -> str:
        """The claims and those fields as the source of a template."""
        claims = [f"  {_json(name)}: {value}" for name, value in self.claims.items()]
        for kind in KINDS:
            fields = [
                f"    {_json(column.name)}: {_json(f'{{{{user.{column.title}}}}}')}"
                for column in columns
                if column.kind == kind
            ]
            if fields:
                claims.append(f"  {_json(self.objects[kind])}: {{\n" + ",\n".join(fields) + "\n  }")
        return "{\n" + ",\n".join(claims) + "\n}" if claims else "{}"


def _base(present: Template) -> _Base:
    objects: dict[Kind, str] = {}
    claims: dict[str, str] = {}
    dropped: list[str] = []
    for name, value in _claims(present.source):
        template = _compiled(f"{{{_json(name)}: {value}}}")
        whole = [kind for kind in KINDS if template.parts[1:2] == (Expression((Shortcode(("user", kind)),)),)]
        if whole and whole[0] not in objects and len(template.parts) == 3 and template.parts[2] == b"}":
            objects[whole[0]] = name  # where the application looks for its fields today
        elif any(path[:2] == ("user", kind) for path in template.shortcodes for kind in KINDS):
            dropped.append(name)
        else:
            claims[name] = value
    for kind in KINDS:
        objects.setdefault(kind, _free_name(kind, {*claims, *objects.values()}))
    return _Base(claims, tuple(dropped), objects)


def _compiled(source: str) -> Template:
    """A template made of a valid one; what it may name was judged when that was read."""
    template, _ = lint(source)
    if template is None:
        raise SyncError("the suggested template is no JSON object: please report this")
    return template


def _claims(source: str) -> Iterator[tuple[str, str]]:
    """Give the name and the JSON text of each top-level claim of a template."""
    at = _after(_BEFORE_NAME, source, 0)
    while source[at] == '"':
        name, end = _DECODER.raw_decode(source, at)
        start = _after(_BEFORE_VALUE, source, end)
        _, end = _DECODER.raw_decode(source, start)
        yield name, source[start:end]
        at = _after(_BEFORE_NAME, source, end)


def _after(separator: re.Pattern[str], source: str, at: int) -> int:
    found = separator.match(source, at)
    return found.end() if found else at


def _free_name(kind: Kind, taken: Collection[str]) -> str:
    short = kind.removesuffix("_metadata")
    numbered = (f"{short}_{number}" for number in count(2))
    return next(name for name in chain((kind, short), numbered) if name not in taken)


# What everybody would weigh.

_NULL_BYTES: Final = len("null")
_SHORTEST_KEY: Final = len('"":,')
_SAMPLED: Final = 100


def _key_bytes(name: str) -> int:
    """The bytes of a field without its value."""
    # What a command line gives needn't be valid Unicode.
    return len(_json(name).encode(errors="replace")) + len(":,")


@dataclass(slots=True, eq=False)
class _Column:
    """One field of all users: the places of those who have it, and what its values weigh beyond null."""

    kind: Kind
    name: str
    users: array[int] = field(default_factory=lambda: array("I"))
    beyond: array[int] = field(default_factory=lambda: array("i"))
    key_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.key_bytes = _key_bytes(self.name)

    @property
    def title(self) -> str:
        """The field as people write it."""
        return f"{self.kind}.{self.name}"

    @property
    def total(self) -> int:
        """The bytes of all its values."""
        return sum(self.beyond) + _NULL_BYTES * len(self.users)

    @property
    def largest(self) -> int:
        """The bytes of its largest value; 0 where nobody has it."""
        return max(self.beyond) + _NULL_BYTES if self.beyond else 0


class _Table:
    """What of all users decides a suggestion, each at a place: what the base weighs, and who has which field.

    Where fields of a user aren't kept by name, any field may be one of them and weigh as much as they do. `rooms`
    has that by place, as bytes beyond null that still contain a field's key, colon and comma; `unclear` has the
    places where it is more than the shortest key.
    """

    def __init__(self, base: Template, policy: Policy, wanted: Iterable[tuple[Kind, str]]) -> None:
        self._base = base
        self._assumed = policy.assumed
        self.weights = array("q")
        self.columns: dict[Kind, dict[str, _Column]] = {kind: {} for kind in KINDS}
        for kind, name in wanted:
            self.columns[kind][name] = _Column(kind, name)
        self.rooms: dict[Kind, array[int]] = {kind: array("i") for kind in KINDS}
        self.unclear: dict[Kind, array[int]] = {kind: array("I") for kind in KINDS}
        self.sample: list[tuple[int, int, Weights]] = []  # the heaviest users: bytes of metadata, place negated

    def all(self) -> Iterator[_Column]:
        """Every field that is followed."""
        for kind in KINDS:
            yield from self.columns[kind].values()

    def is_common(self, column: _Column) -> bool:
        """Whether enough users have the field for it to be wanted unasked."""
        return len(column.users) * 100 >= len(self.weights) * WANTED_PERCENT

    def common(self) -> list[_Column]:
        """The fields that are wanted unasked: those that most users have first, and of these the smallest."""
        wanted = filter(self.is_common, self.all())
        return sorted(wanted, key=lambda column: (-len(column.users), column.largest, column.title))

    def add(self, weights: Weights) -> None:
        """Take one user in."""
        place = len(self.weights)
        self.weights.append(measure(self._base, weights, self._assumed).high)
        for kind, fields in kinds(weights):
            unexplained = fields.total - self._take(kind, place, fields.by_name)
            comma = 1 if fields.by_name else 0
            # The one added is for the comma in a field's key_bytes, which has been taken off.
            room = max(0, unexplained - comma - _NULL_BYTES + 1) if fields.may_have_others else 0
            self.rooms[kind].append(room)
            if room > _SHORTEST_KEY:
                self.unclear[kind].append(place)
        metadata = weights.public.total + weights.unsafe.total
        if len(self.sample) < _SAMPLED:
            heapq.heappush(self.sample, (metadata, -place, weights))
        elif metadata > self.sample[0][0]:
            heapq.heapreplace(self.sample, (metadata, -place, weights))

    def _take(self, kind: Kind, place: int, by_name: Mapping[str, int]) -> int:
        """Take in one user's fields; the bytes of an object that has these and no others."""
        columns = self.columns[kind]
        size = len("{") if by_name else len("{}")
        for name, value_bytes in by_name.items():
            column = columns.get(name)
            if column is None:
                if len(columns) >= FIELDS_FOLLOWED:
                    size += _key_bytes(name) + value_bytes
                    continue
                column = columns[name] = _Column(kind, name)
            column.users.append(place)
            column.beyond.append(value_bytes - _NULL_BYTES)
            size += column.key_bytes + value_bytes
        return size


class _Fit:
    """Adds fields to a template one by one as long as it fits, keeping up what every user weighs under it.

    A user's weight is the constant, which keys and nulls make alike for everybody, and what stands in an array. A
    field changes the array only for who has it, or may have it; for all others it is enough to know how many are
    above a limit. So fields that few have cost little, however many they are.
    """

    def __init__(self, table: _Table, base: _Base, budget: int, *, allowed: int) -> None:
        self.allowed = allowed
        self._budget = budget
        self._base = base
        self._rooms = table.rooms
        self._unclear = table.unclear
        self._weights = array("q", table.weights)
        self._spread = Counter(self._weights)
        self._constant = 0
        self._begun: set[Kind] = set()
        # Counted since a field was last added: by limit, and by kind and bytes of a key.
        self._heavier_than: dict[int, int] = {}
        self._heavier_with: dict[tuple[Kind, int], int] = {}

    @property
    def over(self) -> int:
        """How many users are over the budget."""
        limit = self._budget - self._constant
        return sum(weight > limit for weight in self._weights)

    @property
    def max(self) -> int:
        """The heaviest user's claims; 0 without users."""
        return max(self._weights) + self._constant if self._weights else 0

    @property
    def total(self) -> int:
        """The bytes of all users' claims."""
        return sum(self._weights) + self._constant * len(self._weights)

    def weight(self, place: int) -> int:
        """What the user at this place weighs."""
        return self._weights[place] + self._constant

    def add(self, column: _Column) -> bool:
        """Add a field if not more users than allowed are over the budget then; whether it was added."""
        constant = self._constant + self._constant_bytes(column)
        if not self._fits(column, self._budget - constant):
            return False
        self._constant = constant
        self._begun.add(column.kind)
        self._grow(zip(column.users, column.beyond, strict=True))
        if self._unclear[column.kind]:
            self._grow(self._may_have(column))
        self._heavier_than.clear()
        self._heavier_with.clear()
        return True

    def _constant_bytes(self, column: _Column) -> int:
        """What the field adds to everybody: its key and a null, and the object it is the first field in."""
        size = column.key_bytes + _NULL_BYTES
        if column.kind in self._begun:
            return size
        comma = 1 if self._begun or self._base.claims else 0
        return comma + len(_json(self._base.objects[column.kind])) + len(":{}") + size - len(",")

    def _fits(self, column: _Column, limit: int) -> bool:
        """Whether not too many elements of the array are over the limit once the field is in it."""
        # Those who have the field are counted as if they hadn't; at most so many are too much.
        slack = self.allowed + len(column.users)
        over = self._heavier(limit)
        if over > slack:
            return False
        over += self._heavier_by_rooms(column, limit)
        if over > slack:
            return False
        weights, rooms, key_bytes = self._weights, self._rooms[column.kind], column.key_bytes
        for place, beyond in zip(column.users, column.beyond, strict=True):
            weight = weights[place]
            room = rooms[place] - key_bytes
            over += (weight + beyond > limit) - ((weight + room if room > 0 else weight) > limit)
        return over <= self.allowed

    def _heavier(self, limit: int) -> int:
        """Count the elements of the array that are over the limit."""
        found = self._heavier_than.get(limit)
        if found is None:
            found = sum(users for weight, users in self._spread.items() if weight > limit)
            self._heavier_than[limit] = found
        return found

    def _heavier_by_rooms(self, column: _Column, limit: int) -> int:
        """Count the elements that are over the limit only if users have the field among those not kept by name."""
        # The limit depends on the kind and the bytes of the key alone.
        found = self._heavier_with.get((column.kind, column.key_bytes))
        if found is None:
            weights, rooms = self._weights, self._rooms[column.kind]
            least = limit + column.key_bytes
            found = sum(
                weights[place] <= limit and weights[place] + rooms[place] > least
                for place in self._unclear[column.kind]
            )
            self._heavier_with[column.kind, column.key_bytes] = found
        return found

    def _may_have(self, column: _Column) -> Iterator[tuple[int, int]]:
        """Who may have the field among those not kept by name, and by how much it may weigh beyond null."""
        known = bytearray(len(self._weights))
        for place in column.users:
            known[place] = True
        rooms = self._rooms[column.kind]
        for place in self._unclear[column.kind]:
            if not known[place] and rooms[place] > column.key_bytes:
                yield place, rooms[place] - column.key_bytes

    def _grow(self, more: Iterable[tuple[int, int]]) -> None:
        weights, spread = self._weights, self._spread
        for place, beyond in more:
            weight = weights[place]
            spread[weight] -= 1
            spread[weight + beyond] += 1
            weights[place] = weight + beyond


def _verify(source: str, table: _Table, fit: _Fit, policy: Policy) -> None:
    """Weigh the heaviest users by the template itself, and count again: what is over is never suggested."""
    template = parse_template(source, policy.assumed)
    weighed = all(
        measure(template, weights, policy.assumed).high == fit.weight(-place) for _, place, weights in table.sample
    )
    if not weighed or fit.over > fit.allowed:
        raise SyncError("the suggested template weighs other than was computed: please report this")
