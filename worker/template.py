"""A claims template as it stands in Clerk's editor: parsed into parts to render, with what is wrong or risky in it.

https://clerk.com/docs/guides/sessions/jwt-templates is the grammar. Where that leaves a doubt, a template is refused
rather than guessed. Rendering is `worker.claims`. Every function is linear in time, whoever wrote the template.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from worker.errors import TemplateError
from worker.shortcodes import RESERVED, closest, known

DEPTH: Final = 100
"""The deepest level that an object or array may stand at, the root being level 1."""

FINDINGS: Final = 100
"""How many errors, and how many warnings, are told of one template; one more then says that there are others."""

SHOWN: Final = 60
"""How many characters of a template a message shows at most."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong (`error`) or risky (`warning`) in a template; lines and columns count characters from 1."""

    severity: Literal["error", "warning"]
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.message}"


@dataclass(frozen=True, slots=True)
class Shortcode:
    """An operand that Clerk looks up: `user.public_metadata.role` is the path of three names."""

    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """An operand that stands for itself, as compact JSON."""

    json: bytes


Operand = Shortcode | Constant


@dataclass(frozen=True, slots=True)
class Expression:
    """One operand, or several with `||` between them; gives a JSON value."""

    operands: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A string with something put in, which gives a JSON string; bytes are JSON-escaped text without the quotes."""

    parts: tuple[bytes | Expression, ...]


Part = bytes | Expression | Text
"""Bytes are compact JSON that stands as it is: punctuation, keys, static values."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template to render: the parts one after the other are the claims.

    `carries_public` and `carries_unsafe` say whether that whole kind of metadata stands in it as a value.
    """

    source: str
    parts: tuple[Part, ...]
    warnings: tuple[Finding, ...]
    carries_public: bool
    carries_unsafe: bool

    @property
    def shortcodes(self) -> tuple[tuple[str, ...], ...]:
        """Every distinct path, in order of first use."""
        found = (
            operand.path
            for expression in _expressions(self.parts)
            for operand in expression.operands
            if isinstance(operand, Shortcode)
        )
        return tuple(dict.fromkeys(found))


def _expressions(parts: tuple[Part, ...]) -> Iterator[Expression]:
    for part in parts:
        if isinstance(part, Expression):
            yield part
        elif isinstance(part, Text):
            yield from (inner for inner in part.parts if isinstance(inner, Expression))


def parse_template(source: str, declared: Collection[str] = ()) -> Template:
    """Give the template; TemplateError tells every error. Warnings are left to whoever asks for them.

    `declared` has shortcodes that are known besides Clerk's documented ones, as they are written.
    """
    template, findings = lint(source, declared)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if template is None or errors:
        raise TemplateError(*errors)
    return template


def lint(source: str, declared: Collection[str] = ()) -> tuple[Template | None, tuple[Finding, ...]]:
    """Give the template and all findings, in order of position; None only where it isn't a JSON object.

    With other errors it renders what Clerk would: null for an operand that means nothing.
    """
    report = _Report(source, declared)
    parts = _walk(source, report) if _is_object(source, report) else None
    findings = report.findings()
    if parts is None:
        return None, findings
    first = {part.operands[0] for part in parts if isinstance(part, Expression)}
    template = Template(
        source,
        parts,
        tuple(finding for finding in findings if finding.severity == "warning"),
        carries_public=Shortcode(_PUBLIC) in first,
        carries_unsafe=Shortcode(_UNSAFE) in first,
    )
    return template, findings


class _Report:
    """Collects findings by their offset in the source, as many as anybody reads."""

    def __init__(self, source: str, declared: Collection[str]) -> None:
        self.declared = declared
        self._source = source
        self._errors: list[tuple[int, str]] = []
        self._warnings: list[tuple[int, str]] = []

    @property
    def full(self) -> bool:
        """Whether further errors are not told."""
        return len(self._errors) > FINDINGS

    def error(self, offset: int, message: str) -> None:
        _add(self._errors, offset, message)

    def warning(self, offset: int, message: str) -> None:
        _add(self._warnings, offset, message)

    def findings(self) -> tuple[Finding, ...]:
        errors = [self._finding("error", offset, message) for offset, message in self._errors]
        warnings = [self._finding("warning", offset, message) for offset, message in self._warnings]
        return tuple(sorted(errors + warnings, key=lambda finding: (finding.line, finding.column)))

    def _finding(self, severity: Literal["error", "warning"], offset: int, message: str) -> Finding:
        line = self._source.count("\n", 0, offset) + 1
        return Finding(severity, line, offset - self._source.rfind("\n", 0, offset), message)


def _add(told: list[tuple[int, str]], offset: int, message: str) -> None:
    if len(told) < FINDINGS:
        told.append((offset, message))
    elif len(told) == FINDINGS:
        told.append((offset, "there are more from here on: mend those above first"))


# --- JSON. Python's parser says whether it is; then the tokens of a text known to be JSON are walked for their offsets.

# A string (or an unterminated one, to the end), a bracket, or all that may stand between those. Possessive, so that
# nothing is tried twice.
_TOKEN: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]|[^"\[\]{}]++', re.DOTALL)
_NOT_JSON: Final = re.compile("-?Infinity|NaN")

_HINTS: Final = {
    "//": "a comment, which JSON doesn't have: remove it",
    "/*": "a comment, which JSON doesn't have: remove it",
    "'": "strings stand in double quotes in JSON",
    "\ufeff": "a byte order mark stands before the JSON: remove it",
}


def _is_object(source: str, report: _Report) -> bool:
    if not _is_shallow(source, report):
        return False
    try:
        # Numbers stay text: Python refuses to convert very long ones.
        value = json.loads(source, parse_int=str, parse_float=str)
    except json.JSONDecodeError as error:
        report.error(*_explained(source, error.pos, error.msg))
        return False
    if isinstance(value, dict):
        return _has_only_json_numbers(source, report)
    report.error(len(source) - len(source.lstrip()), "not a JSON object: put the claims between { and }")
    return False


def _is_shallow(source: str, report: _Report) -> bool:
    level = 0
    for token in _TOKEN.finditer(source):
        if token[0] in ("{", "["):
            level += 1
            if level > DEPTH:
                report.error(token.start(), f"nested deeper than {DEPTH} levels: make it flatter")
                return False
        elif token[0] in ("}", "]"):
            level -= 1
    return True


def _has_only_json_numbers(source: str, report: _Report) -> bool:
    # Python's parser takes three words more than JSON does.
    for token in _TOKEN.finditer(source):
        if not token[0].startswith('"') and (word := _NOT_JSON.search(token[0])):
            report.error(token.start() + word.start(), f"not JSON: {word[0]} is no number there; write one, or null")
            return False
    return True


def _explained(source: str, offset: int, reason: str) -> tuple[int, str]:
    """Give the place of what is wrong and what to do, where a reason of Python's parser has a likely cause."""
    here = source[offset : offset + 2]
    before = source[:offset].rstrip()
    for start, hint in _HINTS.items():
        if here.startswith(start):
            return offset, f"not JSON: {hint}"
    if source[max(offset - 1, 0) : offset + 1] == "{{":
        return offset - 1, "not JSON: a shortcode stands in a string; put double quotes around {{…}}"
    if before.endswith('"') and before.rfind("{{") > before.rfind("}}"):
        return len(before) - 1, "not JSON: the string ends inside {{…}}; text in there stands in single quotes"
    # Python names the comma from 3.13 on, what comes behind it before.
    if here.startswith(",") and source[offset + 1 :].lstrip()[:1] in ("}", "]"):
        return offset, "not JSON: nothing follows this comma; remove it"
    if here.startswith(("}", "]")) and before.endswith(","):
        return len(before) - 1, "not JSON: nothing follows this comma; remove it"
    return offset, f"not JSON: {reason[:1].lower()}{re.sub(' at$', ' here', reason[1:])}"


def _walk(source: str, report: _Report) -> tuple[Part, ...]:
    parts: list[Part] = []
    static = bytearray()
    keys: list[set[str] | None] = []  # those seen of each open object; None for an array
    before = ""  # the last character that isn't white space
    for token in _TOKEN.finditer(source):
        text = token[0]
        if text[0] == '"' and before in ("{", ",") and keys[-1] is not None:
            static += _json_string(_key(token, keys[-1], len(keys) == 1, report))
        elif text[0] == '"':
            part = _string(token, report)
            if isinstance(part, bytes):
                static += part
            else:
                parts += [bytes(static), part]
                static.clear()
        else:
            if text in ("{", "["):
                keys.append(set() if text == "{" else None)
            elif text in ("}", "]"):
                keys.pop()
            text = "".join(text.split())  # all that isn't in a string, numbers too, but for white space
            static += text.encode()
        before = text[-1:] or before
    parts.append(bytes(static))
    return tuple(parts)


def _key(token: re.Match[str], seen: set[str], top: bool, report: _Report) -> str:
    start = token.start()
    key = _content(token, report)
    if key in seen:
        report.error(start, f"{_shown(key)} stands in this object before: remove one of them")
    seen.add(key)
    if top and key in RESERVED:
        report.error(start, f"{key} is a claim that Clerk sets itself: give yours another name")
    if "{{" in key:
        offset = _places(token)(key.index("{{"))
        report.error(offset, "Clerk substitutes values only, not names: take {{ out of this name")
    return key


# --- Strings.

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ESCAPE: Final = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|.)")
"""In a valid string literal: what becomes one character."""


_encode: Final = json.JSONEncoder(ensure_ascii=False).encode


def _json_string(text: str) -> bytes:
    return _encode(text).encode()


def _content(token: re.Match[str], report: _Report) -> str:
    """Decode a string literal; half a surrogate pair becomes U+FFFD."""
    literal = token[0]
    content: str = json.loads(literal) if "\\" in literal else literal[1:-1]
    if lone := _SURROGATE.search(content):
        report.error(_places(token)(lone.start()), "half a surrogate pair is no character: remove it")
        content = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", content)
    return content


def _places(token: re.Match[str]) -> Callable[[int], int]:
    """Tell of an index into a string's content where in the source it was written."""
    ends: list[int] = []  # of each escape, in the content
    spared: list[int] = [0]  # how much shorter the content has become by then
    if "\\" in token[0]:
        for escape in _ESCAPE.finditer(token[0]):
            ends.append(escape.start() - spared[-1])
            spared.append(spared[-1] + len(escape[0]) - 1)

    def place(index: int) -> int:
        return token.start() + 1 + index + spared[bisect_left(ends, index + 1)]

    return place


_BRACES: Final = re.compile(r"\{\{|\}\}")


def _string(token: re.Match[str], report: _Report) -> Part:
    content = _content(token, report)
    if "{{" not in content and "}}" not in content:
        return _json_string(content)
    parts = _interpolated(content, _places(token), report)
    match parts:
        case [Expression() as alone]:
            return alone
        case [bytes() as static]:
            return b'"' + static + b'"'
    return Text(tuple(parts))


def _interpolated(content: str, place: Callable[[int], int], report: _Report) -> list[bytes | Expression]:
    parts: list[bytes | Expression] = []
    copied = 0
    opened = -1
    unpaired: list[int] = []
    for brace in _BRACES.finditer(content):
        at = brace.start()
        if brace[0] == "{{":
            unpaired += [opened] if opened >= 0 else []
            opened = at
        elif opened < 0:
            unpaired.append(at)
        else:
            parts.append(_json_string(content[copied:opened])[1:-1])
            parts.append(_expression(content[opened + 2 : at], place(opened), report))
            copied, opened = brace.end(), -1
    unpaired += [opened] if opened >= 0 else []
    if unpaired:
        _tell_unpaired(content, unpaired[0], place, report)
    parts.append(_json_string(content[copied:])[1:-1])
    return [part for part in parts if part != b""]


def _tell_unpaired(content: str, at: int, place: Callable[[int], int], report: _Report) -> None:
    # The first of a string is enough: the others come from it as often as not.
    if content.startswith("{{", at):
        report.error(place(at), "no }} closes this {{: write it like {{user.id}}, or take it out")
    else:
        report.error(place(at), "no {{ opens this }}: write it like {{user.id}}, or take it out")


# --- Expressions.

_NULL: Final = Constant(b"null")
_CONSTANT_WORDS: Final = ("true", "false")
_PIECE: Final = re.compile(r"'[^']*+'|\|\||[^'|]++|.", re.DOTALL)
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?")
_LIKE_NUMBER: Final = re.compile(r"[+-]|\.?[0-9]")
_QUOTES: Final = ("'", '"', "`", "\u2018", "\u2019", "\u201c", "\u201d")
_NAME: Final = re.compile(r"""[^\s'"`{}|.]++""")


def _expression(text: str, offset: int, report: _Report) -> Expression:
    operands = tuple(_operand(written, offset, report) for written in _split(text))
    for operand in operands[:-1]:
        if isinstance(operand, Constant) and operand.json not in (b"false", b"null"):
            shown = _shown(operand.json.decode())
            report.warning(offset, f"what follows {shown} is never reached, since it always has a value: remove it")
            break
    return Expression(operands)


def _split(text: str) -> Iterator[str]:
    """Cut at every `||` outside single quotes."""
    start = 0
    for piece in _PIECE.finditer(text):
        if piece[0] == "||":
            yield text[start : piece.start()].strip()
            start = piece.end()
    yield text[start:].strip()


def _operand(written: str, offset: int, report: _Report) -> Operand:
    if written in _CONSTANT_WORDS or _NUMBER.fullmatch(written):
        return Constant(written.encode())
    if len(written) > 1 and written[0] == written[-1] == "'" and "'" not in written[1:-1]:
        return Constant(_json_string(written[1:-1]))
    names = tuple(written.split("."))
    if problem := _malformed(written, names):
        report.error(offset, problem)
        return _NULL
    if not known(names) and written not in report.declared:
        if not report.full:
            report.error(offset, _misnamed(names))
    elif names in _UNBOUNDED:
        report.warning(offset, f"{written} can be of any size: {_UNBOUNDED[names]}")
    return Shortcode(names)


def _malformed(written: str, names: tuple[str, ...]) -> str | None:
    if not written:
        return "a shortcode is missing here: write one, like {{user.id}} or {{user.username || 'nobody'}}"
    if written.startswith(_QUOTES) or written.endswith(("'", '"')):
        return f"{_shown(written)} is no text: put it in single quotes, with no quote or }}}} inside"
    if _LIKE_NUMBER.match(written):
        return f"{_shown(written)} is no number of JSON: write it like 30 or -1.5, or as a text in single quotes"
    if written == "null":
        return "null can't be written here, only texts, numbers, true and false: leave it out"
    if not all(_NAME.fullmatch(name) for name in names):
        return f"{_shown(written)} is no shortcode: join names by single dots, without white space, quotes, braces or |"
    return None


# --- Shortcodes.

_PUBLIC: Final = ("user", "public_metadata")
_UNSAFE: Final = ("user", "unsafe_metadata")
_UNBOUNDED: Final = {
    _PUBLIC: "name the single fields that are needed instead",
    _UNSAFE: "name the single fields that are needed instead",
    ("org", "public_metadata"): "name the single fields that are needed instead",
    ("org_membership", "public_metadata"): "name the single fields that are needed instead",
    ("user", "organizations"): "look it up where it is needed instead",
}


def _misnamed(path: tuple[str, ...]) -> str:
    """Say what is wrong with a shortcode that Clerk doesn't know, and what was probably meant."""
    written = ".".join(path)
    meant = closest(path)
    if meant[1:2] == ("private_metadata",):
        where = "Postgres (clerk.user_metadata)" if meant[0] == "user" else "the backend"
        return f"a browser can read the token, so private metadata can't stand in it: read it from {where}"
    if meant == path[:2]:
        return f"{_shown(written)} doesn't exist, {'.'.join(meant)} has no fields: leave out what is below it"
    if meant:
        below = meant[2:]
        # What is below stands in the message twice, and must not make it show more than it may.
        suggestion = _shown(".".join(meant)) if len(written) + len(".".join(below)) < SHOWN else ".".join(meant[:2])
        return f"{_shown(written)} is no shortcode of Clerk's: did you mean {suggestion}?"
    advice = "if it is a text, put it in single quotes" if len(path) == 1 else _UNKNOWN
    return f"{_shown(written)} is no shortcode of Clerk's: {advice}"


_UNKNOWN: Final = (
    "it would be null; correct or remove it, or where Clerk does have it, say its bytes in SESSION_CLAIMS_ASSUMED_BYTES"
)


def _shown(text: str) -> str:
    """Make a piece of a template fit to be shown: cut, and with what can't be seen written as escapes."""
    seen = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:SHOWN])
    return seen if len(text) <= SHOWN else f"{seen}…"


ASSUMED_TEMPLATE: Final = replace(
    parse_template('{"public_metadata": "{{user.public_metadata}}", "unsafe_metadata": "{{user.unsafe_metadata}}"}'),
    warnings=(),  # nobody wrote it
)
"""What a session token is taken to carry until the real template is given."""
