"""Who may see the status page, and which forms are its own."""

from __future__ import annotations

import base64
import logging

import pytest

from webhooks.access import FORM_SECONDS, Access, is_from_here

TOKEN = "a-token:of 24 characters".replace(" ", "-")


def basic(credentials: str | bytes) -> str:
    encoded = credentials.encode() if isinstance(credentials, str) else credentials
    return "Basic " + base64.b64encode(encoded).decode()


@pytest.mark.parametrize(
    "header",
    [
        f"Bearer {TOKEN}",
        f"bearer {TOKEN}",
        f"BEARER   {TOKEN} ",
        basic(f"operator:{TOKEN}"),
        basic(f":{TOKEN}"),
        basic(f"käthe:{TOKEN}"),
        basic(b"\xff\xfe:" + TOKEN.encode()),
        basic(f"operator:{TOKEN}").replace("Basic", "bAsIc"),
    ],
)
def test_the_token_opens_as_a_bearer_s_and_as_any_user_s_password(header: str) -> None:
    assert Access(TOKEN).allows(header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        " ",
        TOKEN,
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer{TOKEN}",
        f"Bearer {TOKEN},Bearer {TOKEN}",
        f"Bearer {basic(TOKEN)[6:]}",
        f"Token {TOKEN}",
        "Digest username=operator",
        "Basic",
        "Basic ",
        "Basic =",
        "Basic %%%%",
        "Basic ÿþ",
        "Bearer ÿþ\ud800",
        f"Basic {TOKEN}",
        f"Basic operator:{TOKEN}",
        basic(TOKEN.replace(":", "")),
        basic(f"{TOKEN}:"),
        basic(f"{TOKEN}:operator"),
        basic(f"operator:{TOKEN}\n"),
        basic(f"operator:x{TOKEN}"),
        basic("operator:"),
        basic(b"\xff" * 30_000),
        basic(f"operator:{TOKEN}") + "!",
    ],
)
def test_nothing_else_does(header: str) -> None:
    assert not Access(TOKEN).allows(header)


def test_refusals_are_logged_now_and_then_with_nothing_of_what_was_sent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 1000.0
    monkeypatch.setattr("webhooks.access.time.monotonic", lambda: seconds)
    access = Access(TOKEN)
    assert not access.allows(None), "a browser's first request is nobody's mistake"
    assert caplog.records == []
    for _ in range(5):
        assert not access.allows(basic("operator:c4nary-c4nary-c4nary"))
    seconds += 31
    assert not access.allows("Bearer c4nary")
    assert access.allows(basic(f"operator:{TOKEN}"))
    assert [(record.levelno, vars(record)["times"]) for record in caplog.records] == [
        (logging.WARNING, 1),
        (logging.WARNING, 5),
    ]
    said = str([vars(record) for record in caplog.records])
    assert "c4nary" not in said
    assert "operator" not in said
    assert TOKEN not in said


def test_a_form_is_known_for_an_hour_and_not_for_longer_than_two() -> None:
    now = 10 * FORM_SECONDS - 1.0
    access = Access(TOKEN, lambda: now)
    key = access.form_key()
    assert access.knows(key)
    now += FORM_SECONDS
    assert access.knows(key)
    assert access.form_key() != key
    now += 1
    assert not access.knows(key)
    now -= 3 * FORM_SECONDS
    assert not access.knows(key), "one of a later hour"


@pytest.mark.parametrize("key", ["", TOKEN, "0" * 64, "ÿ", "\ud800"])
def test_no_other_form_is_known(key: str) -> None:
    assert not Access(TOKEN).knows(key)
    assert not Access(TOKEN).knows(Access(TOKEN + "x").form_key())


def test_a_form_key_tells_nothing_of_the_token() -> None:
    key = Access(TOKEN).form_key()
    assert TOKEN not in key
    assert len(key) == 64


@pytest.mark.parametrize(
    ("fetch_site", "origin", "ours"),
    [
        ("same-origin", None, True),
        ("same-origin", "https://sync.example", True),
        ("same-origin", "null", True),
        (None, "https://sync.example", True),
        (None, "http://SYNC.example", True),
        (None, None, True),
        ("same-site", "https://sync.example", False),
        ("cross-site", None, False),
        ("none", None, False),
        ("", None, False),
        (None, "https://evil.example", False),
        (None, "https://sync.example.evil", False),
        (None, "https://sync.example:8443", False),
        (None, "null", False),
        (None, "", False),
        (None, "https://[", False),
        (None, "sync.example", False),
    ],
)
def test_a_browser_says_which_site_sent_a_form(fetch_site: str | None, origin: str | None, ours: bool) -> None:
    assert is_from_here(fetch_site, origin, "sync.example") is ours
