r"""JSON text that Postgres can hold and a recursive parser can read, and its compact form. Bytes in, bytes out.

Nothing is decoded to objects, so numbers, key order and spelling survive untouched. Every function here is
linear in time and free of recursion, whatever the text.
"""

from __future__ import annotations

import json
import re
from typing import Final

DEPTH: Final = 500
"""The deepest level a container may stand at, the root being level 1. Parsers give up somewhere near 1000."""

NUMBER_INTEGER_DIGITS: Final = 131_072
NUMBER_FRACTION_DIGITS: Final = 16_383
"""What `numeric`, and so `jsonb`, takes before and after the point once the exponent is worked in:
https://www.postgresql.org/docs/current/datatype-numeric.html"""

NUMBER_WRITTEN_OUT: Final = 1000
"""How many digits an exponent may add: `jsonb` writes numbers out, so seven bytes of `1e99999` are 100 KB to whoever
reads the row, and 8 KB of them fill its memory."""

NUMBERS_WRITTEN_OUT: Final = 100_000
"""How many digits all exponents of a text may add: a mebibyte of `1e999` would be 175 MB, and hold up Postgres for so
long that nobody else's events are applied either."""

NUMBER_EXPONENT: Final = 1_073_741_823
"""An exponent from here on is refused even for zero (`INT_MAX / 2`; some releases still take this one)."""

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}".encode()
_REPLACEMENT_STRING: Final = b'"' + _REPLACEMENT + b'"'


def holdable(body: bytes) -> tuple[bytes, int]:
    r"""Replace what Postgres `jsonb` can't hold by U+FFFD; give the text and the number of replacements.

    In strings and keys that is `\u0000` and lone surrogates. A number out of `numeric`'s range, or written out to far
    more than was sent (by itself, or with those before it), and a container deeper than DEPTH with all that it holds,
    becomes a string of U+FFFD alone. All else stays byte for byte.

    Never raises. What is not JSON stays not JSON: numbers and containers are replaced only in a text that is
    valid throughout, and outside strings an escape is as illegal as the U+FFFD that replaces it. Keys that
    differ only in what was replaced become equal, and of equal keys jsonb keeps the last.
    """
    replaced = 0
    if _may_have_odd_values(body):
        body, replaced = _without_odd_values(body)
    if b"\\u" in body and _ODD_ESCAPE.search(body):
        body, escapes = _without_odd_escapes(body)
        replaced += escapes
    return body, replaced


# --- Escapes. A backslash is only legal inside a string, so no tokens are needed to find them.

_ODD_ESCAPE: Final = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
"""A cheap first look: also finds good surrogate pairs, and escaped backslashes before a `u0000`."""

_ESCAPE: Final = re.compile(
    # A whole run of backslashes: only an odd one makes an escape of what follows. The look-behind keeps the
    # search from trying again inside a long run.
    rb"(?<!\\)(\\++)"
    rb"(u(?:0000|[dD](?:[89abAB][0-9a-fA-F]{2}|[c-fC-F][0-9a-fA-F]{2})))"
    # A low surrogate right behind, if there is one.
    rb"((?<=u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2})?"
)


def _without_odd_escapes(body: bytes) -> tuple[bytes, int]:
    replaced = 0

    def repair(found: re.Match[bytes]) -> bytes:
        nonlocal replaced
        backslashes, code, low = found.groups()
        if len(backslashes) % 2 == 0:  # an escaped backslash before plain characters
            if low is None:
                return found[0]
            replaced += 1
            return backslashes + code + _REPLACEMENT
        if low is not None:
            return found[0]
        replaced += 1
        return backslashes[1:] + _REPLACEMENT

    return _ESCAPE.sub(repair, body), replaced


# --- Numbers and containers.

_SHAPE: Final = bytes.maketrans(b"123456789E+{", b"000000000e-[")
_LONG_EXPONENTS: Final = (b"0e0000", b"0e-0000")
_EXPONENTS: Final = (b"0e000", b"0e-000")
_LONG_RUN: Final = b"0" * (NUMBER_FRACTION_DIGITS - 999 + 1)
"""With an exponent of up to three digits, it takes a run of digits this long to leave `numeric`'s range."""


def _may_have_odd_values(body: bytes) -> bool:
    """Look cheaply for what is in hardly any body: several times as fast as a regular expression."""
    shape = body.translate(_SHAPE)
    return (
        shape.count(b"[") > DEPTH
        or any(exponent in shape for exponent in _LONG_EXPONENTS)
        or sum(map(shape.count, _EXPONENTS)) * NUMBER_WRITTEN_OUT > NUMBERS_WRITTEN_OUT
        or (len(shape) >= len(_LONG_RUN) and _LONG_RUN in shape)
    )


def fits_numeric(number: bytes) -> bool:
    """Whether Postgres `numeric` takes this JSON number, by the same arithmetic on weight and scale."""
    digits = _digits(number)
    return digits is not None and digits[0] <= NUMBER_INTEGER_DIGITS and digits[1] <= NUMBER_FRACTION_DIGITS


def _digits(number: bytes) -> tuple[int, int] | None:
    """How many digits `numeric` writes before and after the point; None where it refuses the exponent itself."""
    mantissa, _, power = number.lower().partition(b"e")
    whole, _, fraction = mantissa.lstrip(b"-").partition(b".")
    power_digits = power.lstrip(b"+-").lstrip(b"0")
    # Compared by length first: int() refuses thousands of digits, and would be slow at it.
    if len(power_digits) > len(str(NUMBER_EXPONENT)):
        return None
    exponent = int(power_digits or b"0") * (-1 if power.startswith(b"-") else 1)
    if abs(exponent) >= NUMBER_EXPONENT:
        return None
    significant = (whole + fraction).lstrip(b"0")
    before = len(significant) - len(fraction) + exponent if significant else 0
    return max(before, 1), max(len(fraction) - exponent, 0)


# Every token takes the white space behind it along, so each match begins where the one before ended.
# Possessive, so nothing is tried twice. The last group is whatever can't begin a token.
_TOKEN: Final = re.compile(
    rb"""(?:
      ( " [^"\\\x00-\x1f]*+ (?: \\[^\x00-\x1f] [^"\\\x00-\x1f]*+ )*+ " )
    | ( -? (?:0|[1-9][0-9]*+) (?:\.[0-9]++)? (?:[eE][+-]?[0-9]++)? )
    | ( true | false | null )
    | (\{) | (\[) | (\}) | (\]) | (,) | (:)
    | ( [^\x20\t\r\n] )
    ) [\x20\t\r\n]*+""",
    re.VERBOSE,
)
_STRING, _NUMBER, _WORD, _OPEN_OBJECT, _OPEN_ARRAY, _CLOSE_OBJECT, _CLOSE_ARRAY, _COMMA, _COLON = range(1, 10)

_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_BAD_ESCAPE: Final = re.compile(rb'(?<!\\)(?:\\\\)*+\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4})')

# Where in the grammar the walk stands, named by what may come next. "First" also allows the closing bracket.
_ROOT, _FIRST_ITEM, _ITEM, _AFTER_ITEM, _FIRST_KEY = range(5)
_KEY, _AFTER_KEY, _MEMBER, _AFTER_MEMBER, _DONE = range(5, 10)
_OUT: Final = -1  # of the container, to where it was entered


def _value(then: int) -> dict[int, int]:
    return dict.fromkeys((_STRING, _NUMBER, _WORD, _OPEN_OBJECT, _OPEN_ARRAY), then)


# For each place the tokens that may come and the place after them; for a container, once it has closed.
_NEXT: Final[tuple[dict[int, int], ...]] = (
    _value(_DONE),
    {**_value(_AFTER_ITEM), _CLOSE_ARRAY: _OUT},
    _value(_AFTER_ITEM),
    {_COMMA: _ITEM, _CLOSE_ARRAY: _OUT},
    {_STRING: _AFTER_KEY, _CLOSE_OBJECT: _OUT},
    {_STRING: _AFTER_KEY},
    {_COLON: _MEMBER},
    _value(_AFTER_MEMBER),
    {_COMMA: _KEY, _CLOSE_OBJECT: _OUT},
    {},
)
_INTO: Final = {_OPEN_OBJECT: _FIRST_KEY, _OPEN_ARRAY: _FIRST_ITEM}


def _without_odd_values(body: bytes) -> tuple[bytes, int]:
    """Replace numbers out of range and containers too deep if the whole text is valid JSON, else leave it."""
    if not _is_utf8(body) or _BAD_ESCAPE.search(body):
        return body, 0
    replaced = 0
    text = bytearray()
    copied = 0  # how much of the body is in the text, or replaced in it
    written_out = 0  # digits that exponents have added
    deep = -1  # where the too deep container that we are in begins
    place = _ROOT
    returns = bytearray()  # the place to go on from once a container closes, for each that is open
    leading = _SPACE.match(body)
    for token in _TOKEN.finditer(body, leading.end() if leading else 0):
        kind = token.lastindex or 0
        then = _NEXT[place].get(kind)
        if then is None:
            return body, 0
        odd_from = -1
        if kind in _INTO:
            if len(returns) == DEPTH:
                deep = token.start()
            returns.append(then)
            place = _INTO[kind]
        elif then == _OUT:
            place = returns.pop()
            if len(returns) == DEPTH:
                odd_from, deep = deep, -1
        else:
            place = then
            added = _written_out(token) if kind == _NUMBER and deep < 0 else 0
            if written_out + added > NUMBERS_WRITTEN_OUT:
                odd_from, added = token.start(), 0
            written_out += added
        if odd_from >= 0:
            text += body[copied:odd_from]
            text += _REPLACEMENT_STRING
            copied = token.end(kind)
            replaced += 1
    if place != _DONE:
        return body, 0
    text += body[copied:]
    return bytes(text), replaced


def _written_out(token: re.Match[bytes]) -> int:
    """How many digits an exponent adds to a number; more than may be, where that is too many or jsonb can't hold it."""
    # What is shorter than 1e100 adds next to nothing.
    if token.end() - token.start() < 5:
        return 0
    number = token[_NUMBER]
    digits = _digits(number)
    added = 0 if digits is None else max(sum(digits) - len(number), 0)
    held = digits is not None and added <= NUMBER_WRITTEN_OUT and fits_numeric(number)
    return added if held else NUMBERS_WRITTEN_OUT + 1


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- The compact form.

# Bytes that no UTF-8 text contains stand in for escaped backslashes and quotes while the rest is looked at: then
# each backslash begins an escape, and a string ends at the next quote.
_BACKSLASH: Final = b"\xfe"
_QUOTE: Final = b"\xff"

_LENGTHENED: Final = re.compile(
    rb"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|/)"
)
"""Escapes that JSON doesn't demand, or not in this form; those that are as short as can be too."""

_DEMANDED: Final = {
    **{code: b"\\u%04x" % code for code in range(0x20)},
    **dict(zip(b"\b\t\n\f\r", (b"\\b", b"\\t", b"\\n", b"\\f", b"\\r"), strict=True)),
    ord("\\"): _BACKSLASH,
    ord('"'): _QUOTE,
}
"""How the characters are written that JSON demands an escape for."""


def compact(value: bytes) -> bytes:
    """The compact form of a valid JSON text: what Python's `json.dumps(…, ensure_ascii=False, separators=(",", ":"))`
    makes of it, but for the numbers.

    That is: no white space outside strings, strings with only those escapes that JSON demands and in their
    shortest form, numbers as they were sent. Equal keys stay as often as they stand there; a lone surrogate
    becomes U+FFFD. Never raises.
    """
    escaped = b"\\" in value
    if escaped:
        value = value.replace(b"\\\\", _BACKSLASH)
        value = _LENGTHENED.sub(_shortened, value)
        value = value.replace(b'\\"', _QUOTE)
    if b" " in value or b"\n" in value or b"\t" in value or b"\r" in value:
        parts = value.split(b'"')
        parts[::2] = b'"'.join(parts[::2]).translate(None, b" \t\r\n").split(b'"')
        value = b'"'.join(parts)
    if escaped:
        value = value.replace(_QUOTE, b'\\"').replace(_BACKSLASH, b"\\\\")
    return value


def _shortened(escape: re.Match[bytes]) -> bytes:
    high, low, code = escape.groups()
    if high is not None:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF)).encode()
    if code is None:
        return b"/"
    character = int(code, 16)
    if 0xD800 <= character <= 0xDFFF:
        return _REPLACEMENT
    return _DEMANDED.get(character) or chr(character).encode()


# --- For people.

# Printable by Unicode's book, and yet nothing is seen: fillers, joiners, vowels without a sign, variation selectors.
_UNSEEN: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0") | {
    chr(code) for low, high in ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF)) for code in range(low, high + 1)
}


def is_visible(char: str) -> bool:
    """Whether a character neither controls, reorders nor hides."""
    return char.isprintable() and char not in _UNSEEN


def visible(text: str) -> str:
    r"""The text with every character that controls, reorders or hides escaped as in JSON, like `\u202e`.

    Field names of unsafe metadata are chosen by users' browsers. JSON text stays the same JSON.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if is_visible(char) else json.dumps(char)[1:-1] for char in text)
