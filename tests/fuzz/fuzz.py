"""Coverage-guided fuzzing of everything that reads what others wrote: `make fuzz`, `make fuzz ARGS="--seconds 600"`.

One run after the other for each target, the seconds shared among them. A finding ends its run with a traceback and is
kept in the corpus's folder; it then becomes an ordinary test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["worker", "webhooks"]):
    from tests.hostile import BROKEN, METADATA, NOT_UTF8, event
    from webhooks.signature import make_verifier
    from worker.claims import render
    from worker.errors import SignatureError
    from worker.events import Unusable, UserChanged, parse_event, parse_user
    from worker.jsontext import compact, holdable
    from worker.policy import Policy
    from worker.template import lint

FOLDER: Final = Path(".fuzz")
LONGEST: Final = 4096
POLICY: Final = Policy()
verify = make_verifier(["whsec_" + "A" * 32])


def parsed(text: bytes) -> object:
    """What Python's json reads; None where that is no JSON. Numbers by their text, constants refused."""

    def refuse(constant: str) -> object:
        raise ValueError(constant)

    try:
        return [json.loads(text.decode(), parse_int=str, parse_float=str, parse_constant=refuse)]
    except (ValueError, RecursionError):
        return None


def text(data: bytes) -> None:
    """Repairing twice changes nothing more, JSON stays JSON and the rest doesn't become any, compacting keeps it."""
    repaired, replaced = holdable(data)
    assert holdable(repaired) == (repaired, 0)
    assert replaced or repaired == data
    before, after = parsed(data), parsed(repaired)
    assert (before is None) == (after is None)
    short = compact(repaired)
    if after is not None:
        assert parsed(short) == after
        assert compact(short) == short


def weighed(user: UserChanged) -> None:
    for kind in (user.private_metadata, user.public_metadata, user.unsafe_metadata):
        assert kind is None or parsed(kind) is not None
    assert all(parsed(value) is not None for value in user.profile)
    assert parsed(render(POLICY.template, user, POLICY.assumed)) is not None


def body(data: bytes) -> None:
    """An event is used only if it is JSON, and its claims are JSON."""
    found = parse_event(data)
    if not isinstance(found, Unusable):
        assert parsed(data) is not None
        if isinstance(found[1], UserChanged):
            weighed(found[1])


def pulled(data: bytes) -> None:
    """The same for a user of the Backend API."""
    found = parse_user(data, 5)
    if not isinstance(found, Unusable):
        assert parsed(data) is not None
        weighed(found)


def headers(data: bytes) -> None:
    """Nobody without the secret is authentic, and every refusal is one of ours."""
    lines = data.decode("latin-1").split("\n")
    names = ("svix-id", "svix-timestamp", "svix-signature", "webhook-id", "webhook-timestamp", "webhook-signature")
    try:
        verify(dict(zip(names, lines, strict=False)), b"{}")
    except SignatureError:
        return
    raise AssertionError("a forged signature was taken")


def template(data: bytes) -> None:
    """A template is usable, or it is told why not."""
    found, findings = lint(data.decode("utf-8", "replace"))
    assert found is not None or findings


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "text": text,
    "body": body,
    "pulled": pulled,
    "headers": headers,
    "template": template,
}


def seeds(name: str) -> list[bytes]:
    if name == "headers":
        return [b"msg_1\n1700000000\nv1,AAAA v2,AAAA v1a,%%%", b"msg\n-1\nv1", b"\n\n\nm\n99999999999\nv1,"]
    if name == "template":
        return [
            b'{"a":"{{user.public_metadata.b || \'x\'}}","b":{"c":["{{user.id}} {{org.name}}",1]}}',
            b"{",
            b'{"{{":1}',
        ]
    real = [path.read_bytes() for path in Path("tests/data").glob("*.json")]
    hostile = [event(metadata) for metadata in METADATA.values() if len(metadata) < LONGEST]
    found = [*real, *hostile, *BROKEN.values(), *NOT_UTF8.values()]
    if name == "pulled":
        found += [one.partition(b'"data": ')[2].removesuffix(b"}") for one in found]
    return [one for one in found if len(one) <= LONGEST]


def run(name: str, seconds: int) -> int:
    """Fuzz one target in a process of its own, since libFuzzer ends it; the exit code."""
    corpus = FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = (f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=10", "-rss_limit_mb=2048", "-verbosity=1")
    command = (sys.executable, "-m", "tests.fuzz.fuzz", "--target", name, str(corpus), *limits)
    print(f"== {name}, {seconds} s", flush=True)
    return subprocess.run(
        (*command, f"-artifact_prefix={FOLDER}/{name}-", "-print_final_stats=1"), check=False, env=os.environ
    ).returncode


def main() -> int:
    """Fuzz all targets, or the one that is named; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument("--only", choices=TARGETS, help="this target alone")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(TARGETS)
    return max(int(run(name, max(asked.seconds // len(names), 1)) != 0) for name in names)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--target"]:
        atheris.Setup([sys.argv[0], *sys.argv[3:]], TARGETS[sys.argv[2]])
        atheris.Fuzz()
    sys.exit(main())
