"""The status page in a real browser, on the real system: what it shows, what its buttons do, whom it asks for what."""

from __future__ import annotations

import os
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from tests.acceptance.system import CANARY, Client, System, new_user, now_ms, user_event
from tests.waiting import until

TOKEN: Final = "status-token-9f3b1c77e0a24d5e"

CHROMIUM: Final = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian's chromium) is installed")

FLAGS: Final = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync"]  # fmt: skip

Scheme = Literal["light", "dark"]
SCREENS: Final[dict[str, tuple[int, int]]] = {"desktop": (1280, 900), "phone": (360, 740)}
SCHEMES: Final[tuple[Scheme, ...]] = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without its sandbox only where it refuses to have one: for root."""
    assert CHROMIUM
    flags = FLAGS + (["--no-sandbox"] if os.geteuid() == 0 else [])
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def watched(new_system: Callable[..., System]) -> Iterator[System]:
    """A system with a status page, at its most talkative, that has been at work for hours."""
    system = new_system(LOG_LEVEL="DEBUG", STATUS_TOKEN=TOKEN)
    system.start()
    with system.connect() as connection:
        connection.execute(HOURS)
    yield system
    url = status_url(system.url)
    assert system.stop() == 0
    assert TOKEN not in system.output
    assert f"status page   {url}" in system.output


HOURS: Final = """
insert into clerk.minutes
select minute, 40, 40, 0, 0.5, 1.2, 2
from generate_series(
  date_trunc('minute', now() - interval '47 hours'), date_trunc('minute', now() - interval '2 minutes'),
  interval '1 minute'
) as minute
where minute not between now() - interval '3 hours' and now() - interval '2 hours'
on conflict do nothing
"""


def set_aside(client: Client) -> str:
    """An event that can't be applied; its id."""
    answer = client.deliver(
        user_event(new_user(), now_ms()).replace(b'"private_metadata": {', b'"private_metadata": [', 1)
    )
    assert answer.outcome == (202, "dead")
    return answer.svix_id


class Watched:
    """A page of the browser, with all that it asked for, and what it complained of."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, query: str = "") -> None:
        """Go to the page."""
        answer = self.page.goto(self.url + query)
        assert answer
        assert answer.status == 200


@contextmanager
def opened(browser: Browser, system: System, screen: str = "desktop", scheme: Scheme = "light") -> Iterator[Watched]:
    """The page in a window of its own; afterwards it has asked nobody else for anything, and found nothing wrong."""
    width, height = SCREENS[screen]
    url = status_url(system.url)
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=2,
        color_scheme=scheme,
        http_credentials={"username": "operator", "password": TOKEN},
    )
    try:
        watched = Watched(context.new_page(), url)
        watched.open()
        yield watched
        assert watched.complaints == []
        assert {urllib.parse.urlsplit(asked).netloc for asked in watched.asked} == {urllib.parse.urlsplit(url).netloc}
        assert not any(TOKEN in asked for asked in watched.asked)
        assert context.cookies() == []
    finally:
        context.close()


def status_url(webhook_url: str) -> str:
    """Where the page is."""
    return urllib.parse.urljoin(webhook_url, "/status")


def test_a_browser_without_the_token_sees_nothing(browser: Browser, watched: System) -> None:
    with browser.new_context() as context, pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
        context.new_page().goto(status_url(watched.url))  # it asks its user, who isn't there
    with browser.new_context(http_credentials={"username": "operator", "password": TOKEN + "x"}) as context:
        answer = context.new_page().goto(status_url(watched.url))
        assert answer
        assert (answer.status, "STATUS_TOKEN" in answer.text()) == (401, True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("screen", SCREENS)
def test_it_is_readable_on_every_screen(
    browser: Browser, watched: System, tmp_path: Path, screen: str, scheme: Scheme
) -> None:
    with watched.client() as own:
        set_aside(own)
    with opened(browser, watched, screen, scheme) as seen:
        page = seen.page
        assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen][0], "nothing to scroll sideways"
        assert page.get_by_role("heading", level=1).inner_text().strip() == "Fresh"
        # The style is applied, so the policy allows it; and it heeds the scheme.
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
        for name in ("Freshness", "Events"):
            chart = page.get_by_role("img", name=f"{name} over the last 6 hours")
            assert chart.locator("rect").count() > 20
            assert chart.locator("rect.gap").count() >= 1
        button = page.get_by_role("button", name="Retry msg_").first.bounding_box()
        assert button
        assert button["height"] >= (44 if screen == "phone" else 32), "large enough for a finger"
        assert CANARY not in page.content()
        page.screenshot(path=tmp_path / f"{screen}-{scheme}.png", full_page=True)


def brightness(colour: str) -> int:
    """Of `rgb(1, 2, 3)`."""
    return sum(map(int, re.findall(r"[0-9]+", colour)[:3]))


def test_it_looks_further_back_when_asked_and_shows_the_numbers(browser: Browser, watched: System) -> None:
    with opened(browser, watched) as seen:
        seen.page.get_by_role("link", name="24 h").click()
        assert seen.page.get_by_role("img", name="Freshness over the last 24 hours").is_visible()
        table = seen.page.locator("section", has_text="Events").locator("table").first
        assert not table.is_visible()
        seen.page.locator("summary").first.click()
        assert table.is_visible()


def await_end(system: System, svix_id: str, state: str) -> None:
    """Wait until an event was tried once more and ended so."""

    def ended() -> bool:
        found = system.event(svix_id)
        return found is not None and found[:2] == (state, 1)

    until(ended, what=f"{svix_id} {state}")


def test_a_button_retries_its_event(browser: Browser, watched: System) -> None:
    """First one that is refused again, then one whose user can be applied by now."""
    with watched.client() as client, opened(browser, watched) as seen:
        again = set_aside(client)
        user_id = new_user()
        mended = client.deliver(user_event(user_id, now_ms(), {"n": 1})).svix_id
        watched.settle()
        with watched.connect() as connection:
            connection.execute(AS_IF_REFUSED, {"svix_id": mended, "user_id": user_id})
        seen.open()
        for svix_id, state in ((again, "dead"), (mended, "done")):
            seen.page.get_by_role("button", name=f"Retry {svix_id}").click()
            assert seen.page.url == f"{seen.url}#dead"
            await_end(watched, svix_id, state)
        assert watched.rows(user_id)[user_id][0]["n"] == 2
        seen.open()
        assert seen.page.get_by_text(mended).count() == 0
        assert seen.page.get_by_text(again).count() == 1


# With a body that can be applied, as if what refused it had been mended.
AS_IF_REFUSED: Final = """
update clerk.webhook_events
set state = 'dead', error = 'refused', attempts = 0, body = convert_to(jsonb_build_object(
  'type', 'user.updated', 'object', 'event', 'timestamp', 4102444800000,
  'data', jsonb_build_object(
    'id', %(user_id)s::text, 'updated_at', 4102444800000, 'private_metadata', '{"n": 2}'::jsonb
  )
)::text, 'UTF8')
where svix_id = %(svix_id)s
"""


def test_one_button_retries_all_of_them(browser: Browser, watched: System) -> None:
    with watched.client() as client, opened(browser, watched) as seen:
        dead = [set_aside(client) for _ in range(2)]
        seen.open()
        seen.page.get_by_role("button", name="Retry all events").click()
        for svix_id in dead:
            await_end(watched, svix_id, "dead")


def test_another_site_can_make_a_browser_send_nothing(browser: Browser, watched: System) -> None:
    """It knows the page's address, and its visitor's browser the token."""
    with watched.client() as client:
        svix_id = set_aside(client)
    context = browser.new_context(http_credentials={"username": "operator", "password": TOKEN})
    try:
        page = context.new_page()
        page.goto(status_url(watched.url))
        target = f"{status_url(watched.url)}/retry"
        elsewhere = "http://evil.invalid/"
        form = f'<form method="post" action="{target}"><input name="all" value="yes"><button>Win</button></form>'
        page.route(elsewhere, lambda route: route.fulfill(body=form, content_type="text/html"))
        page.goto(elsewhere)
        with page.expect_navigation() as navigation:
            page.get_by_role("button").click()
        assert navigation.value.status == 403
        assert "Nothing was retried" in navigation.value.text()
        page.goto(elsewhere)
        page.evaluate("location => { document.body.innerHTML = '<iframe></iframe>'; "
                      "document.querySelector('iframe').src = location }", status_url(watched.url))  # fmt: skip
        page.wait_for_function("document.querySelector('iframe').contentDocument === null")
        assert "Fresh" not in " ".join(frame.content() for frame in page.frames)
    finally:
        context.close()
    assert (watched.event(svix_id) or ("",))[:2] == ("dead", 0)


def test_the_page_reloads_by_itself_and_by_no_script(browser: Browser, watched: System) -> None:
    """The policy would forbid a script; it doesn't forbid this."""
    with opened(browser, watched) as seen:
        seen.page.route(
            seen.url,
            lambda route: route.fulfill(
                response=(answer := route.fetch()),
                body=answer.text().replace('http-equiv="refresh" content="60"', 'http-equiv="refresh" content="1"'),
            ),
        )
        seen.open()
        before = len(seen.asked)
        with seen.page.expect_request(seen.url, timeout=10_000):
            pass
        assert len(seen.asked) > before
