"""What jsonb can't hold is replaced and nothing else, and the compact form means the same, judged by Python's own
json and Decimal."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import jsontext
from worker.jsontext import DEPTH, compact, fits_numeric, holdable

MIB = 1024 * 1024
MARK = "\ufffd"
ODD = '"\ufffd"'


# --- Tables of odd cases.


@pytest.mark.parametrize(
    ("sent", "expected", "replaced"),
    [
        (r'"\u0000"', ODD, 1),
        (r'"a\u0000\u0000b"', f'"a{MARK}{MARK}b"', 2),
        (r'"\\u0000"', r'"\\u0000"', 0),
        (r'"\\\u0000"', rf'"\\{MARK}"', 1),
        (r'"\\\\u0000"', r'"\\\\u0000"', 0),
        (r'"\\\\\u0000"', rf'"\\\\{MARK}"', 1),
        (r'"\n\u0000\""', rf'"\n{MARK}\""', 1),
        (r'"\"\u0000"', rf'"\"{MARK}"', 1),
        (r'"\u00000"', f'"{MARK}0"', 1),
        (r'"\u0001\u000a\u00e9"', r'"\u0001\u000a\u00e9"', 0),
        (r'{"\u0000": 1}', f'{{"{MARK}": 1}}', 1),
        (r'{"a\udc00b": {"\ud800": "\u0000"}}', f'{{"a{MARK}b": {{"{MARK}": "{MARK}"}}}}', 3),
        (r'"\ud83d\ude00"', r'"\ud83d\ude00"', 0),
        (r'"\uD83D\uDE00"', r'"\uD83D\uDE00"', 0),
        (r'"\ud800"', ODD, 1),
        (r'"\uDBFF"', ODD, 1),
        (r'"\udc00"', ODD, 1),
        (r'"\uDFFF"', ODD, 1),
        (r'"\ude00\ud83d"', f'"{MARK}{MARK}"', 2),
        (r'"\ud83d\ud83d\ude00"', rf'"{MARK}\ud83d\ude00"', 1),
        (r'"\ud83d\ude00\ude00"', rf'"\ud83d\ude00{MARK}"', 1),
        (r'"\ud83d\\ude00"', rf'"{MARK}\\ude00"', 1),
        (r'"\\ud83d\ude00"', rf'"\\ud83d{MARK}"', 1),
        (r'"\\ud83d\\ude00"', r'"\\ud83d\\ude00"', 0),
        (r'"\\ud83d\ud83d\ude00"', r'"\\ud83d\ud83d\ude00"', 0),
        (r'"\\\ud83d\ude00"', r'"\\\ud83d\ude00"', 0),
        (r'"\ud83dx\ude00"', f'"{MARK}x{MARK}"', 2),
        (r'"\ud83d\u0041"', rf'"{MARK}\u0041"', 1),
        (r'"\ud83d\u0000"', f'"{MARK}{MARK}"', 2),
        (r'"\ud83d\n"', rf'"{MARK}\n"', 1),
        (r'"\ud7ff\ue000"', r'"\ud7ff\ue000"', 0),
        ('"\U0001f600\ufffd"', '"\U0001f600\ufffd"', 0),
    ],
)
def test_an_escape_that_no_text_can_hold_is_replaced(sent: str, expected: str, replaced: int) -> None:
    assert holdable(sent.encode()) == (expected.encode(), replaced)


HELD = [
    "0",
    "-0",
    "0.0",
    "1e400",
    "-1E+400",
    "9" * 131_072,
    "-" + "9" * 131_072 + "." + "9" * 16_383,
    "0e200000",
    "0.0e1073741822",
    "-0e1073741822",
    "0." + "1" * 16_383,
    "0." + "0" * 20_000 + "1e20000",
    "1" * 140_000 + "e-10000",
    "1e" + "0" * 200_000 + "5",
    "1e+0005",
    "1" * 5_000,
]
WRITTEN_OUT_TOO_LONG = [
    "1e131071",
    "0.001e131074",
    "1e-16383",
    "0e-16383",
    "123.4e-16382",
    "0." + "0" * 20_000 + "1e151072",
    "1e1007",
    "1e-1008",
]
NOT_HELD = [
    "9" * 131_073,
    "1e131072",
    "-1E+131072",
    "10e131071",
    "0.001e131075",
    "1e400000",
    "1e1073741823",
    "0e1073741823",
    "0e1073741824",
    "0e99999999999999999999",
    "1e-16384",
    "0e-16384",
    "0.0e-16383",
    "1.5e-16383",
    "1e-20000",
    "1e-99999999999999999999",
    "0." + "1" * 16_384,
    "1." + "0" * 16_384,
    "0." + "0" * 15_385 + "e-999",
    "1" * 200_000 + "e-70000",
    "0." + "0" * 20_000 + "1e151073",
    "1" * MIB,
    "1e" + "9" * MIB,
]


@pytest.mark.parametrize("number", HELD, ids=lambda number: number[:20])
def test_a_number_in_the_range_of_numeric_stays(number: str) -> None:
    for text in (number, f'[{number}, {{"a": {number}}}]'):
        assert holdable(text.encode()) == (text.encode(), 0)
    assert fits_numeric(number.encode())


@pytest.mark.parametrize("number", WRITTEN_OUT_TOO_LONG, ids=lambda number: number[:20])
def test_a_number_that_would_be_written_out_to_far_more_than_was_sent_is_replaced(number: str) -> None:
    assert fits_numeric(number.encode())
    assert holdable(f"[{number}, 1]".encode()) == (f"[{ODD}, 1]".encode(), 1)


@pytest.mark.parametrize("number", ["1e999", "-1E-999", "1.5e+950"])
def test_numbers_that_would_together_be_written_out_to_far_more_than_was_sent_are_replaced(number: str) -> None:
    text = f"[{number}{f', {number}' * 9_999}]"
    body, replaced = holdable(text.encode())
    numbers = json.loads(body, parse_int=Number, parse_float=Number)
    held = [one for one in numbers if one != MARK]
    assert held == [number] * len(held)
    assert 100 <= len(held) <= 110
    assert replaced == 10_000 - len(held)
    assert holdable(body) == (body, 0)
    few = f"[{number}{f', {number}' * 99}]".encode()
    assert holdable(few) == (few, 0)


@pytest.mark.parametrize("number", NOT_HELD, ids=lambda number: number[:20])
def test_a_number_out_of_the_range_of_numeric_is_replaced(number: str) -> None:
    assert holdable(number.encode()) == (ODD.encode(), 1)
    text = '{"1e99999": [%s , 1, %s], "b": "x 1e99999", "c":%s}'
    expected = text % (ODD, ODD, ODD)
    assert holdable((text % (number, number, number)).encode()) == (expected.encode(), 3)


def nested(levels: int, inside: str = "") -> str:
    return "[" * levels + inside + "]" * levels


def test_a_container_as_deep_as_allowed_stays() -> None:
    for text in (nested(DEPTH), nested(DEPTH, "1"), '{"a":' * DEPTH + "1" + "}" * DEPTH):
        assert holdable(text.encode()) == (text.encode(), 0)


def test_a_container_that_is_too_deep_is_replaced_whole() -> None:
    deep = nested(70_000, r'"\u0000", 1e999999')
    text = nested(DEPTH, f'0, [], {deep}, {{"a": [1, "]"]}} , "[["')
    expected = nested(DEPTH, f'0, {ODD}, {ODD}, {ODD} , "[["')
    assert holdable(text.encode()) == (expected.encode(), 3)
    text = '{"a":' * 600 + "1" + "}" * 600
    assert holdable(text.encode()) == (('{"a":' * DEPTH + ODD + "}" * DEPTH).encode(), 1)


def test_many_containers_side_by_side_stay() -> None:
    text = json.dumps([{"a": [1], "b": '[{\\"'}] * 2000)
    assert holdable(text.encode()) == (text.encode(), 0)


def test_brackets_in_strings_are_no_containers() -> None:
    text = json.dumps(["[" * 5000 + '"{' * 5000 + "\\"])
    assert holdable(text.encode()) == (text.encode(), 0)


# What a careless repair would make valid.
INVALID = [
    b"",
    b" ",
    b"1e400000 1",
    b"01e400000",
    b"1e400000x",
    b"1e400000-",
    b"1e400000.5",
    b"+1e400000",
    b".1e400000",
    b"1.e400000",
    b"-e400000",
    b"1e400000e1",
    b"{1e400000: 1}",
    b"{1e400000}",
    b"[1e400000",
    b"[1e400000,]",
    b"[1e400000 1e400000]",
    b'{"a": 1e400000,}',
    b'{"a" 1e400000}',
    b'{"a", 1e400000}',
    b'["a": 1e400000]',
    b"[1e400000}",
    b"1e400000\x00",
    b"\x0b1e400000",
    b"\xc2\xa01e400000",
    b"\xef\xbb\xbf1e400000",
    b"nul, 1e400000",
    b'"a\n", 1e400000',
    b'["\x01", 1e400000]',
    b'["\\x", 1e400000]',
    b'["\\u12", 1e400000]',
    b'["\\u12g4", 1e400000]',
    b"[\\u0000]",
    b"\\u0000",
    b'{\\u0000"a": 1}',
    b'"\\u0000',
    b'"\\u0000\\"',
    b'"\\ud800\\u',
    b'"\\ud800\\ude0"',
    b'"\\u000"',
    b'"\\U0000"',
    b"[" * 600,
    b"]" * 600,
    b"[" * 600 + b"]" * 599,
    b"[" * 600 + b"]" * 601,
    b"[" * 600 + b"}" * 600,
    b"{" * 600 + b"}" * 600,
    b"[" * 600 + b"garbage" + b"]" * 600,
    b"[" * 600 + b"1,," + b"]" * 600,
    b"[" * 600 + b'"a":1' + b"]" * 600,
    b"[" * 600 + b'"\xff"' + b"]" * 600,
    b"[" * 600 + b'"\xed\xa0\x80"' + b"]" * 600,
    b"[" * 600 + b'"\\x"' + b"]" * 600,
    b"[" * 600 + b'"\t"' + b"]" * 600,
    b"[" * 500 + b"{[]: 1}" + b"]" * 500,
    b"[" * 499 + b"{[]: 1}" + b"]" * 499,
]


def is_json(body: bytes) -> bool:
    """RFC 8259, by Python's own parser once what it takes beyond that is refused."""

    def refuse(constant: str) -> None:
        raise ValueError

    try:
        # Texts out of generators and tables here are shallow enough for it, or else broken deep inside.
        json.loads(body.decode(), parse_constant=refuse, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True


@pytest.mark.parametrize("body", INVALID, ids=lambda body: repr(body[:24]))
def test_what_is_not_json_is_not_made_json(body: bytes) -> None:
    assert not is_json(body)
    assert not is_json(holdable(body)[0])


HOSTILE = {
    "open brackets": b"[" * MIB,
    "nested": b"[" * (MIB // 2) + b"]" * (MIB // 2),
    "open keys": b'{"a":' * (MIB // 5),
    "escaped NULs": b'"' + b"\\u0000" * (MIB // 6) + b'"',
    "high surrogates": b'"' + b"\\ud800" * (MIB // 6) + b'"',
    "backslashes": b'"' + b"\\" * MIB,
    "escaped quotes": b'[1e99999,"' + b'\\"' * (MIB // 2),
    "quotes": b'"' * MIB,
    "spaces": b"1e99999" + b" " * MIB,
    "long numbers": b"[" + (b"1" * 15_383 + b",") * 68 + b"1]",
    "short numbers": b"[" + b"1," * (MIB // 2) + b"1e99999]",
    "too deep ones": b"[" * 500 + b"[]," * (MIB // 3) + b"1" + b"]" * 500,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)  # a second at most; what is quadratic takes an hour
def test_a_hostile_mebibyte_takes_linear_time(name: str) -> None:
    body, replaced = holdable(HOSTILE[name])
    assert replaced or body == HOSTILE[name]
    compact(body)


# --- Any text. Strings, numbers and depth are each hostile now and then.

digits = st.text("0123456789", min_size=1, max_size=3)
integers = st.one_of(st.integers().map(str), st.builds("{}{}".format, st.integers().filter(bool), digits))
numbers = st.one_of(
    integers,
    st.builds("{}.{}".format, integers, digits),
    st.builds(
        "{}{}{}{}{}".format,
        integers,
        st.one_of(st.just(""), digits.map(".{}".format)),
        st.sampled_from(["e", "E"]),
        st.sampled_from(["", "+", "-", "00", "-00"]),
        st.one_of(
            st.integers(0, 30),
            st.integers(16_370, 16_390),
            st.integers(131_060, 131_080),
            st.sampled_from([9999, 1_073_741_822, 1_073_741_823, 10**30]),
        ),
    ),
    st.sampled_from(["9" * 131_072, "9" * 131_073, "0." + "9" * 16_383, "0." + "9" * 16_384]),
)
pieces = st.one_of(
    st.text(max_size=4).map(lambda text: json.dumps(text, ensure_ascii=False)[1:-1]),
    st.text(max_size=4).map(lambda text: json.dumps(text)[1:-1]),
    st.sampled_from([r"\\", r"\"", r"\n", r"\/", "u0000", "ud800", "[", "{", "]", "1e99999", " ", "\u2028"]),
    st.sampled_from([r"\u0000", r"\ud800", r"\uDBff", r"\udc00", r"\uDFFF", r"\ud83d\ude00", r"\u005c", r"\u0022"]),
)
strings = st.lists(pieces, max_size=5).map(lambda found: '"' + "".join(found) + '"')
space = st.sampled_from(["", "", "", " ", "\n", "\t \r"])


def arrays(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda found, gap: f"[{gap}{f'{gap},'.join(found)}{gap}]", st.lists(items, max_size=4), space)


def objects(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.builds("{}{}:{}{}".format, strings, space, space, items)
    return st.builds(lambda found, gap: f"{{{gap}{f',{gap}'.join(found)}{gap}}}", st.lists(members, max_size=4), space)


texts = st.recursive(
    st.one_of(st.sampled_from(["true", "false", "null"]), numbers, strings),
    lambda items: st.one_of(arrays(items), objects(items)),
    max_leaves=12,
)


class Number(str):
    """A number as it was sent; unlike a plain string also to `==` of its type."""

    __slots__ = ()


class Pairs(list[tuple[str, object]]):
    """An object with its keys in order, equal ones too."""


def read(text: str) -> object:
    return json.loads(text, parse_int=Number, parse_float=Number, object_pairs_hook=Pairs)


def numeric_takes(number: str) -> bool:
    """As the documentation of `numeric` puts it, by Decimal's arithmetic."""
    try:
        decimal = Decimal(number)
    except InvalidOperation:
        return False
    if not decimal.is_finite():
        return False
    exponent = decimal.as_tuple().exponent
    assert isinstance(exponent, int)
    power = re.search("[eE](.*)", number)
    if power and abs(int(power[1])) >= 1_073_741_823:
        return False
    return -exponent <= 16_383 and (decimal.is_zero() or decimal.adjusted() + 1 <= 131_072)


def written_out(number: str) -> int:
    """How long `numeric` writes it, but for sign and point; only of numbers that it takes."""
    digits = f"{Decimal(number):f}".lstrip("-").replace(".", "")
    return len(digits)


class Cleaner:
    """Replaces in a read value what jsonb can't hold, and counts."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.replaced = 0

    def text(self, text: str) -> str:
        clean, count = re.subn("[\x00\ud800-\udfff]", MARK, text)
        self.replaced += count
        return clean

    def value(self, value: object, level: int = 1) -> object:
        match value:
            case Pairs() | list() if level > self.depth:
                self.replaced += 1
                return MARK
            case Pairs():
                return Pairs((self.text(key), self.value(item, level + 1)) for key, item in value)
            case list():
                return [self.value(item, level + 1) for item in value]
            case Number() if not numeric_takes(value) or written_out(value) > len(value) + 1000:
                self.replaced += 1
                return MARK
            case str() if not isinstance(value, Number):
                return self.text(value)
        return value


def same(one: object, other: object) -> bool:
    """Equal, and of equal types all through."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Pairs) and isinstance(other, Pairs):
        return len(one) == len(other) and all(a == b and same(x, y) for (a, x), (b, y) in zip(one, other, strict=True))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
    return one == other


@given(text=texts)
@settings(deadline=None, max_examples=100)
def test_the_whole_text_is_replaced_as_python_and_decimal_judge(text: str) -> None:
    with patch.object(jsontext, "DEPTH", 3):
        body, replaced = holdable(text.encode())
    cleaner = Cleaner(3)
    expected = cleaner.value(read(text))
    assert same(read(body.decode()), expected)
    assert replaced == cleaner.replaced
    assert replaced or body == text.encode()


@given(text=texts)
@settings(deadline=None, max_examples=100)
def test_a_second_pass_finds_nothing(text: str) -> None:
    with patch.object(jsontext, "DEPTH", 3):
        body, _ = holdable(text.encode())
        assert holdable(body) == (body, 0)


@given(number=numbers)
@settings(deadline=None, max_examples=100)
def test_numbers_are_judged_as_decimal_judges_them(number: str) -> None:
    if is_json(number.encode()):
        assert fits_numeric(number.encode()) == numeric_takes(number)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Surrogates can't be encoded, and NUL can't be held.
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda items: (
        st.lists(items, max_size=5)
        | st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), items, max_size=5)
    ),
    max_leaves=30,
)


@given(value=values, ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2, "\t"]))
@settings(deadline=None, max_examples=100)
def test_what_jsonb_can_hold_stays_byte_for_byte(value: object, ascii_only: bool, indent: int | str | None) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert holdable(body) == (body, 0)
    with patch.object(jsontext, "DEPTH", 30):  # the slow path, whatever the size
        assert holdable(b"[" * 20 + body + b"]" * 20) == (b"[" * 20 + body + b"]" * 20, 0)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_arbitrary_bytes_never_raise(body: bytes) -> None:
    with patch.object(jsontext, "DEPTH", 1):
        holdable(body)
    compact(body)


tokens = st.one_of(
    st.sampled_from([*'[[]]{{}},,::""', "\\", "\\\\", "\\u", "u0000", "\\u0000", "\\ud800", "\\udc00", '\\"', "\\x"]),
    st.sampled_from([*"10-.e+", "1e99999", "e99999", "9999"]),
    st.sampled_from([" ", "\n", "\x00", "\x0b", "\ufeff", "\xa0", "true", "null", '"a"', '"a":1', "NaN", "\ufffd"]),
).map(str.encode) | st.sampled_from([b"\xff", b"\xef", b"\xbf\xbd", b"\xed\xa0\x80"])


@given(st.lists(tokens, max_size=14).map(b"".join))
@settings(deadline=None, max_examples=150)
def test_scraps_of_json_stay_valid_or_invalid(body: bytes) -> None:
    with patch.object(jsontext, "DEPTH", 1):
        repaired, replaced = holdable(body)
    assert is_json(repaired) == is_json(body)
    assert replaced or repaired == body
    compact(body)


@given(text=texts, data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_spoilt_text_is_not_repaired_into_json(text: str, data: st.DataObject) -> None:
    body = text.encode()
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 3)))
    body = body[:start] + data.draw(tokens | st.just(b"")) + body[end:]
    with patch.object(jsontext, "DEPTH", 2):
        repaired, _ = holdable(body)
    assert is_json(repaired) == is_json(body)


# --- The compact form.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"{}", b"{}"),
        (b" { } ", b"{}"),
        (b'{ "a b" : [ 1 , 2 ] }\r\n\t', b'{"a b":[1,2]}'),
        (b'" "', b'" "'),
        (rb'"\u0041"', b'"A"'),
        (rb'"\u00e9\u00E9"', '"éé"'.encode()),
        (rb'"\u20ac"', '"€"'.encode()),
        (rb'"\ud83d\ude00\uD83D\uDE00"', '"\U0001f600\U0001f600"'.encode()),
        (rb'"\uDBFF\uDFFF"', '"\U0010ffff"'.encode()),
        (rb'"\u0000\u001F\u000B"', rb'"\u0000\u001f\u000b"'),
        (rb'"\u000a\u0008\u000C\u000d\u0009"', rb'"\n\b\f\r\t"'),
        (rb'"\n\b\f\r\t"', rb'"\n\b\f\r\t"'),
        (rb'"\u0022\u005c\u005C"', rb'"\"\\\\"'),
        (rb'"\u005cu0041\u005c\u005c"', rb'"\\u0041\\\\"'),
        (rb'"\u0022 , \u0022"', rb'"\" , \""'),
        (rb'"\u007f\u0080"', b'"\x7f\xc2\x80"'),
        (rb'"\/\/"', b'"//"'),
        (rb'"\\u0041"', rb'"\\u0041"'),
        (rb'"\\\u0041"', rb'"\\A"'),
        (rb'"\\/"', rb'"\\/"'),
        (rb'"\\\/"', rb'"\\/"'),
        (rb'"\"  \\" ', rb'"\"  \\"'),
        (rb'[ "\\" , "\"", " \\\" "]', rb'["\\","\""," \\\" "]'),
        (rb'"\ud83d"', f'"{MARK}"'.encode()),
        (rb'"\ud83d\\\ude00"', rf'"{MARK}\\{MARK}"'.encode()),
        (rb'"\ud83d\ud83d\ude00"', f'"{MARK}\U0001f600"'.encode()),
        ('"é \U0001f600"'.encode(), '"é \U0001f600"'.encode()),
        (b"[1.50, 1E+5, -0, 1e400000]", b"[1.50,1E+5,-0,1e400000]"),
        (b'{"a" : 1, "a" : 2}', b'{"a":1,"a":2}'),
        (b" " + b"9" * 200_000, b"9" * 200_000),
        (b"[ " * 200_000 + b"] " * 200_000, b"[" * 200_000 + b"]" * 200_000),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_the_compact_form_holds_what_has_to_be_sent(value: bytes, expected: bytes) -> None:
    assert compact(value) == expected
    assert compact(expected) == expected


def test_what_is_compact_is_not_copied() -> None:
    value = '{"a":["é",1.50,null]}'.encode()
    assert compact(value) is value


def utf16(text: str) -> list[int]:
    units = text.encode("utf-16-be")
    return [units[at] << 8 | units[at + 1] for at in range(0, len(units), 2)]


@pytest.mark.parametrize("escape", ["\\u{:04x}", "\\u{:04X}"])
def test_every_character_written_as_an_escape_becomes_what_python_writes(escape: str) -> None:
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x11000), 0x1F600, 0x10FFFF)]
    for start in range(0, len(characters), 4096):
        text = "".join(characters[start : start + 4096])
        expected = json.dumps(text, ensure_ascii=False).encode()
        assert compact(f'"{"".join(map(escape.format, utf16(text)))}"'.encode()) == expected


@given(value=values, ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2, "\t"]))
@settings(deadline=None, max_examples=100)
def test_the_compact_form_is_python_s_compact_dump(value: object, ascii_only: bool, indent: int | str | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    expected = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    assert compact(text.encode()) == expected
    assert compact(expected) is expected or b" " in expected or b"\\" in expected


def rewritten(value: object) -> str:
    match value:
        case Pairs():
            return "{" + ",".join(f"{rewritten(key)}:{rewritten(item)}" for key, item in value) + "}"
        case list():
            return "[" + ",".join(rewritten(item) for item in value) + "]"
        case Number():
            return str(value)
    return json.dumps(value, ensure_ascii=False)


@given(text=texts)
@settings(deadline=None, max_examples=100)
def test_the_compact_form_of_any_spelling_means_the_same_and_is_that_of_the_text_rewritten(text: str) -> None:
    body, _ = holdable(text.encode())
    short = compact(body)
    assert short == rewritten(read(body.decode())).encode()
    assert same(read(short.decode()), read(body.decode()))
    assert compact(short) == short
