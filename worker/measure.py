"""What claims weigh by kept sizes alone, without values: exact, but for what a size leaves open. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Final, NamedTuple

import msgspec

from worker.claims import EMPTY, FALSY, NAME_BYTES, Assumed, Fields, Weights, as_text, chosen, key_bytes, values_of
from worker.events import NULL, PROFILE, UserChanged
from worker.shortcodes import assumed_bytes
from worker.template import Constant, Expression, Operand, Shortcode, Template, Text

FRAME: Final = "template"
"""What `contributions` calls that which stands in the claims whoever the user is."""


class Range(NamedTuple):
    """From how many bytes to how many; equal where it is exact."""

    low: int
    high: int


class _Size(NamedTuple):
    """What an operand weighs by itself, and inside a text; `falsy`: whether it is null or false, None if it may be."""

    value: Range
    text: Range
    falsy: bool | None


_Sizer = Callable[[Weights, Assumed], _Size]


def measure(template: Template, weights: Weights, assumed: Assumed) -> Range:
    """What `render` would weigh, as far as sizes tell."""
    static, values, texts = _sizers(template)
    low = high = static
    for sizer in values:
        (least, most), _, _ = sizer(weights, assumed)
        low += least
        high += most
    for sizer in texts:
        _, (least, most), _ = sizer(weights, assumed)
        low += least
        high += most
    return Range(low, high)


def measure_kept(
    template: Template, weights: Weights, assumed: Assumed, *, public: bytes | None, unsafe: bytes | None
) -> Range:
    """As `measure`, but where the JSON of a kind is given (None: it isn't kept) its values tell exactly."""
    value_of = values_of(UserChanged(weights.user_id, weights.version, 0, None, public, unsafe), assumed)
    kept = {"public_metadata": public, "unsafe_metadata": unsafe}

    def tells(operand: Operand, in_text: bool) -> bool:
        match operand:
            case Shortcode(path=("user", kind)) if not in_text:
                return False  # the whole is known to the byte, as it was sent
            case Shortcode(path=("user", kind, *_)):
                return kept.get(kind) is not None
        return isinstance(operand, Constant)

    static, values, texts = _split(template)
    low = high = static
    for expressions, in_text in ((values, False), (texts, True)):
        for expression in expressions:
            if all(tells(operand, in_text) for operand in expression.operands):
                value = chosen(expression, value_of)
                least = most = len(as_text(value) if in_text else value)
            else:
                sized, text, _ = _expression_sizer(expression)(weights, assumed)
                least, most = text if in_text else sized
            low += least
            high += most
    return Range(low, high)


def contributions(template: Template, weights: Weights, assumed: Assumed) -> dict[str, int]:
    """What adds how many bytes to the claims at most, by name; FRAME is what stands there whoever the user is.

    A whole kind of metadata is named field by field, each with its key, colon and comma; a path by its field.
    """
    static, values, texts = _split(template)
    found = Counter({FRAME: static})
    for expressions, in_text in ((values, False), (texts, True)):
        for expression in expressions:
            sizes = [_sizer(operand)(weights, assumed) for operand in expression.operands]
            for operand, size in _results(expression.operands, sizes):
                for name, added in _named(operand, weights, assumed, size, in_text):
                    found[name] += added
    return dict(+found)  # without those that add nothing


def _named(
    operand: Operand, weights: Weights, assumed: Assumed, size: _Size, in_text: bool
) -> Iterator[tuple[str, int]]:
    most = size.text.high if in_text else size.value.high
    path = operand.path if isinstance(operand, Shortcode) else ()
    match path:
        case ("user", "public_metadata" | "unsafe_metadata" as kind):
            yield FRAME, len(EMPTY)
            fields = _FIELDS_OF[kind](weights)
            times = 2 if in_text else 1  # every byte may need an escape there
            for name, field in fields.by_name.items():
                yield f"{kind}.{name}", times * (key_bytes(name) + field + len(":,"))
            if fields.unexplained > 0:
                yield f"{kind} (other fields)", times * fields.unexplained
        case ("user", "public_metadata" | "unsafe_metadata" as kind, name, *_):
            yield f"{kind}.{name}", most
        case ("user", name) if name in _USER_SIZERS:
            yield f"user.{name}", most
        case _ if assumed_bytes(path, assumed) is not None:
            yield f"{'.'.join(path)} (assumed)", most
        case _:
            yield FRAME, most


def _split(template: Template) -> tuple[int, list[Expression], list[Expression]]:
    """The bytes that stand in a template as they are; its expressions that are values; those inside a text."""
    static = 0
    values: list[Expression] = []
    texts: list[Expression] = []
    for part in template.parts:
        static += len('""') if isinstance(part, Text) else 0
        for inner in part.parts if isinstance(part, Text) else (part,):
            if isinstance(inner, bytes):
                static += len(inner)
            else:
                (texts if isinstance(part, Text) else values).append(inner)
    return static, values, texts


@lru_cache(maxsize=64)
def _sizers(template: Template) -> tuple[int, tuple[_Sizer, ...], tuple[_Sizer, ...]]:
    static, values, texts = _split(template)
    return static, tuple(map(_expression_sizer, values)), tuple(map(_expression_sizer, texts))


def _expression_sizer(expression: Expression) -> _Sizer:
    operands = expression.operands
    sizers = [_sizer(operand) for operand in operands]
    if len(sizers) == 1:
        return sizers[0]

    def union(weights: Weights, assumed: Assumed) -> _Size:
        sizes = [size for _, size in _results(operands, [sizer(weights, assumed) for sizer in sizers])]
        return _Size(_hull([size.value for size in sizes]), _hull([size.text for size in sizes]), None)

    return union


def _results(operands: Sequence[Operand], sizes: Sequence[_Size]) -> Iterator[tuple[Operand, _Size]]:
    """The operands that may be what the expression gives: the first that is neither null nor false, or the last."""
    last = len(sizes) - 1
    for at, size in enumerate(sizes):
        if at == last or not size.falsy:
            yield operands[at], size
        if size.falsy is False:
            return


def _hull(ranges: Sequence[Range]) -> Range:
    return Range(min(low for low, _ in ranges), max(high for _, high in ranges))


def _sizer(operand: Operand) -> _Sizer:
    if isinstance(operand, Constant):
        text = as_text(operand.json)
        return _always(_Size(_exactly(len(operand.json)), _exactly(len(text)), operand.json in FALSY))
    match operand.path:
        case ("user", "public_metadata" | "unsafe_metadata" as kind):
            return _kind_sizer(_FIELDS_OF[kind])
        case ("user", "public_metadata" | "unsafe_metadata" as kind, name, *below):
            return _field_sizer(_FIELDS_OF[kind], name, below)
        case ("user", name) if name in _USER_SIZERS:
            return _USER_SIZERS[name]
        case path:
            return _assumed_sizer(path)


def _assumed_sizer(path: tuple[str, ...]) -> _Sizer:
    def sizer(_: Weights, assumed: Assumed) -> _Size:
        size = assumed_bytes(path, assumed)
        return _NULL if size is None else _text(size)

    return sizer


def _always(size: _Size) -> _Sizer:
    return lambda _, __: size


_FieldsOf = Callable[[Weights], Fields]
_FIELDS_OF: Final[Mapping[str, _FieldsOf]] = {
    "public_metadata": attrgetter("public"),
    "unsafe_metadata": attrgetter("unsafe"),
}


def _kind_sizer(fields_of: _FieldsOf) -> _Sizer:
    return lambda weights, _: _object(fields_of(weights).total)


def _field_sizer(fields_of: _FieldsOf, name: str, below: Sequence[str]) -> _Sizer:
    around = sum(len("{:}") + key_bytes(inner) for inner in below)
    own_key_bytes = key_bytes(name)
    short = len(name.encode(errors="replace")) <= NAME_BYTES

    def sizer(weights: Weights, _: Assumed) -> _Size:
        fields = fields_of(weights)
        size = fields.by_name.get(name)
        if size is None:
            if short and not fields.may_have_others:
                return _NULL
            comma = 1 if fields.by_name else 0
            return _within(fields.unexplained - comma - own_key_bytes - len(":") - around)
        return _within(size - around) if below else _any(size)

    return sizer


# --- What a size tells, by what kind of value it is of.


def _exactly(size: int) -> Range:
    return Range(size, size)


_NULL: Final = _Size(_exactly(len(NULL)), _exactly(len(NULL)), falsy=True)
_NOT_KNOWN: Final = _Size(Range(4, 600), Range(0, 600), falsy=None)
"""Of a user whose profile hasn't been weighed."""


@lru_cache(maxsize=4096)
def _object(size: int) -> _Size:
    # Inside a text each quote and backslash is escaped, and a brace never is.
    return _Size(_exactly(size), Range(size, 2 * size - len(EMPTY)), falsy=False)


@lru_cache(maxsize=4096)
def _any(size: int) -> _Size:
    return _Size(_exactly(size), Range(max(0, size - 2), 2 * size), None if size in (4, 5) else False)


@lru_cache(maxsize=4096)
def _within(room: int) -> _Size:
    """A value that has at most this room, or is missing, or stands in what is no object."""
    if room < 1:
        return _NULL
    most = max(room, len(NULL))
    return _Size(Range(1, most), Range(0, 2 * most), falsy=None)


@lru_cache(maxsize=4096)
def _text(size: int) -> _Size:
    return _Size(_exactly(size), _exactly(size - 2), falsy=False)


def _integer(size: int) -> _Size:
    return _Size(_exactly(size), _exactly(size), falsy=False)


def _boolean(size: int) -> _Size:
    return _Size(_exactly(size), _exactly(size), size == len(b"false"))


def _profile_sizer(at: int, size_of: Callable[[int], _Size]) -> _Sizer:
    def sizer(weights: Weights, _: Assumed) -> _Size:
        if weights.profile is None:
            return _NOT_KNOWN
        size = weights.profile[at]
        return size_of(size) if size else _NULL

    return sizer


def _id_size(weights: Weights, _: Assumed) -> _Size:
    return _text(len(msgspec.json.encode(weights.user_id)))


def _updated_at_size(weights: Weights, _: Assumed) -> _Size:
    size = _exactly(len(str(weights.version)))
    return _Size(size, size, falsy=False)


def _full_name_size(weights: Weights, _: Assumed) -> _Size:
    if weights.profile is None:
        return _NOT_KNOWN
    letters = [size - 2 for size in weights.profile[:2] if size > 2]
    return _text(sum(letters) + len(letters) - 1 + 2) if letters else _NULL


_OTHER_PROFILE: Final = {
    "created_at": _integer,
    "email_verified": _boolean,
    "phone_number_verified": _boolean,
    "two_factor_enabled": _boolean,
}
_USER_SIZERS: Final[Mapping[str, _Sizer]] = {
    "id": _id_size,
    "updated_at": _updated_at_size,
    "full_name": _full_name_size,
    **{name: _profile_sizer(at, _OTHER_PROFILE.get(name, _text)) for at, name in enumerate(PROFILE)},
}
