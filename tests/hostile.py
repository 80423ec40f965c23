"""Bodies that a hostile user makes Clerk send, or that somebody sends who holds the secret."""

from __future__ import annotations

from typing import Final

from tests.events import changed, deleted

MIB: Final = 1024 * 1024

HONEST: Final = changed("user_p", private={"plan": "pro"}, unsafe=0).replace(b'"unsafe_metadata": 0', b"%s")


def event(unsafe: bytes, more: bytes = b"") -> bytes:
    """An event of which the unsafe metadata is this text, and where more stands in `data`."""
    return HONEST.replace(b"%s", b'"unsafe_metadata": ' + unsafe + more)


def metadata(size: int) -> dict[str, bytes]:
    """What a user's browser can write: JSON objects, whatever is in them. Most make a body of about this size."""

    def fill(unit: bytes, head: bytes, tail: bytes) -> bytes:
        return head + unit * ((size - 400 - len(head) - len(tail)) // len(unit)) + tail

    return {
        "NULs": fill(rb"\u0000", b'{"a":"', b'"}'),
        "NULs in keys": fill(rb'"\u0000":1,', b"{", b'"b":2}'),
        "lone surrogates": fill(rb"\ud800", b'{"a":"', b'"}'),
        "surrogates the wrong way round": fill(rb"\udc00\ud800", b'{"a":"', b'"}'),
        "odd and even backslashes": b'{"a":"%s"}' % b" ".join(b"\\" * n + b"u0000" for n in (1, 2, 3, 4, 5, 6, 7)),
        "escaped letters": fill(rb"\u0041", b'{"a":"', b'"}'),
        "escaped slashes": fill(rb"\/", b'{"a":"', b'"}'),
        "escaped quotes": fill(rb"\"", b'{"a":"', b'"}'),
        "backslashes": fill(rb"\\", b'{"a":"', b'"}'),
        "spaces": fill(b" \t\r\n", b'{"a":', b"1}"),
        "a million digits": b'{"a":' + b"1" * 1_000_000 + b"}",
        "a million decimals": b'{"a":0.' + b"1" * 1_000_000 + b"}",
        "a million digits of an exponent": b'{"a":1e' + b"1" * 1_000_000 + b"}",
        "as many digits as numeric takes": fill(b"9" * 131_072 + b",", b'{"a":[', b"0]}"),
        "exponents that write out long": fill(b"1e999,", b'{"a":[', b"0]}"),
        "exponents that write out long behind the point": fill(b"-1e-999,", b'{"a":[', b"0]}"),
        "exponents out of range": fill(b"1e1000000,", b'{"a":[', b"0]}"),
        "numbers of all sorts": (
            b'{"a":[1e400,1e-400,1e1000000,-0,0.0,-0.0,0.1e999999,1E+5,1.50,100e-2,9007199254740993,0e99999999999,'
            b"123456789012345678901234567890.123456789012345678901234567890]}"
        ),
        "equal keys": fill(b'"a":1,', b"{", b'"b":2}'),
        "keys equal once unescaped": rb'{"a":1,"\u0061":2,"\u0000":3,"\ud800":4,"__proto__":{"a":1},"":5}',
        "nested arrays": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "nested as deep as may be, and wide": b'{"a":' + b"[" * 490 + b"[]," * (size // 4) + b"[]" + b"]" * 490 + b"}",
        "keys of 100 KB": b"{" + b",".join(b'"%s%d":%d' % (b"k" * 100_000, n, n) for n in range(10)) + b"}",
        "a long key": b'{"' + b"k" * (size - 400) + b'":1}',
        "many keys": b"{" + b",".join(b'"k%d":%d' % (n, n) for n in range(size // 15)) + b"}",
        "many empty objects": fill(b"{},", b'{"a":[', b"{}]}"),
        "many empty strings": fill(b'"",', b'{"a":[', b'""]}'),
        "what breaks other languages": (
            rb"""{"a":"\u2028\ufeff\uffff\ufffe\u202e","b":"'; drop table clerk; --","c":"{{user.id}}","$d":"%s"}"""
        ),
    }


METADATA: Final = metadata(MIB)

# What only a broken or hostile sender makes of the rest of the body: not JSON, or JSON of wrong types.
VALID: Final = event(b'{"a":1}')
BROKEN: Final[dict[str, bytes]] = {
    "nothing": b"",
    "two bodies": VALID + VALID,
    "two bodies and a line between": VALID + b"\n" + VALID,
    "a byte order mark": b"\xef\xbb\xbf" + VALID,
    "NaN": event(b'{"a":NaN}'),
    "Infinity": event(b'{"a":-Infinity}'),
    "a comment": event(b'{"a":1/* */}'),
    "a comma too many": event(b'{"a":1,}'),
    "single quotes": event(b"{'a':1}"),
    "a control character": event(b'{"a":"\x01"}'),
    "a NUL": event(b'{"a":"\x00"}'),
    "a line's end in a string": event(b'{"a":"\n"}'),
    "an unknown escape": event(rb'{"a":"\x"}'),
    "half an escape": event(rb'{"a":"\u12"}'),
    "a leading zero": event(b'{"a":01}'),
    "a plus": event(b'{"a":+1}'),
    "half a number": event(b'{"a":1.}'),
    "half an exponent": event(b'{"a":1e}'),
    "UTF-16": VALID.decode().encode("utf-16-le"),
    "open brackets": b"[" * 100_000,
    "metadata left open": event(b'{"a":[[['),
}
NOT_UTF8: Final[dict[str, bytes]] = {
    "invalid UTF-8": event(b'{"a":"\xff"}'),
    "overlong UTF-8": event(b'{"a":"\xc0\x80"}'),
    "a surrogate in UTF-8": event(b'{"a":"\xed\xa0\x80"}'),
    "beyond Unicode": event(b'{"a":"\xf4\x90\x80\x80"}'),
    "UTF-16 with a mark": VALID.decode().encode("utf-16"),
}
DEEP_ELSEWHERE: Final = (
    event(b"{}", b', "other": ' + b"[" * 100_000 + b"]" * 100_000),
    VALID[:-1] + b', "other": ' + b'{"a":' * 100_000 + b"1" + b"}" * 101_000,
    deleted("user_d")[:-1] + b', "other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
)
