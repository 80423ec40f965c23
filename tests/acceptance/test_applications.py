"""Applications in Python and Node against the running system, with the code that docs/applications.md gives them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from tests import nodejs
from tests.acceptance.system import CANARY, Client, System, new_user, now_ms, user_event
from tests.events import deleted
from tests.pulling import webhook
from tests.snippets import CUT, HEAR, LISTENER, ROOT, Reader, as_login
from tests.waiting import until
from worker.standin import StandIn

LANGUAGES: Final = [
    "python",
    pytest.param("node", marks=pytest.mark.skipif(not nodejs.INSTALLED, reason=nodejs.WHY_NOT)),
]
READ: Final = 'return page.metadata("USER")'
WRITE_AND_READ: Final = {
    "python": """
        from metadata import metadata
        return [page.set_plan("USER", "pro"), metadata("USER")]
    """,
    "node": """
        const { metadata } = await import("./metadata.mjs");
        return [await page.setPlan("USER", "pro"), await metadata("USER")];
    """,
}
LISTEN: Final = {
    "python": """
        import psycopg, os
        with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
            connection.execute("listen clerk_user_changed")
            print('"listening"', flush=True)
            for notice in connection.notifies():
                print(notice.payload, flush=True)
    """,
    "node": """
        const client = await page.pool.connect();
        client.on("notification", ({ payload }) => console.log(payload));
        await client.query("listen clerk_user_changed");
        console.log('"listening"');
        await new Promise(() => {});
    """,
}
FILES: Final = {
    "python": {"metadata": "metadata.py", "write": "write.py", "changes": "changes.py"},
    "node": {"metadata": "metadata.mjs", "write": "write.mjs", "changes": "changes.mjs"},
}


@pytest.fixture
def clerk() -> Iterator[StandIn]:
    """Clerk's API, as the application asks it."""
    with StandIn(limit=1000) as standin:
        yield standin


@pytest.fixture(scope="module")
def login(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The application's own login, made as the page has it; its address."""
    with system.connect() as connection:
        Reader(tmp_path_factory.mktemp("login")).sql("login.sql", connection)
    yield as_login(system.database_url, "my_app")
    with system.connect() as connection:
        connection.execute("drop role my_app")


@pytest.fixture
def reader(tmp_path: Path, login: str, clerk: StandIn) -> Reader:
    """An application."""
    return Reader(tmp_path, DATABASE_URL=login, CLERK_SECRET_KEY=clerk.secret_key, CLERK_API_URL=clerk.url)


def test_the_readmes_python_reads_every_user_of_a_running_system(
    system: System, client: Client, tmp_path: Path
) -> None:
    small, large = new_user(), new_user()
    client.deliver(user_event(small, now_ms(), {"plan": "free"}))
    client.deliver(user_event(large, now_ms(), {"plan": "pro"}, public={"text": "x" * 1300}))
    until(lambda: len(system.rows(small, large)) == 2, what="two rows")
    (text,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "read.py").write_text(text)
    (tmp_path / ".clerk-sync").mkdir()
    (tmp_path / ".clerk-sync" / "info.json").symlink_to(system.info_path)
    command = [sys.executable, "-W", "error", "read.py"]
    said = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=30, check=True).stdout
    rows = {user_id: ast.literal_eval(row) for user_id, _, row in (line.partition(" ") for line in said.splitlines())}
    assert rows[small] == ({"canary": CANARY, "plan": "free"}, {"from": "the token"})
    assert rows[large] == ({"canary": CANARY, "plan": "pro"}, {"canary": CANARY, "text": "x" * 1300})


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_application_reads_what_a_webhook_brought(
    language: str, reader: Reader, system: System, client: Client
) -> None:
    user_id = new_user()
    assert client.deliver(user_event(user_id, now_ms(), {"plan": "free"})).status == 202
    until(lambda: system.rows(user_id), what="the row")
    found = reader.run(FILES[language]["metadata"], READ.replace("USER", user_id))
    assert found == {"private": {"canary": CANARY, "plan": "free"}, "public": None}


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_application_reads_its_own_write_at_once_and_the_webhook_changes_nothing(
    language: str, reader: Reader, system: System, client: Client, clerk: StandIn
) -> None:
    user_id = new_user()
    kinds = {"private_metadata": {"plan": "free"}, "public_metadata": {"role": "admin"}}
    clerk.put({"id": user_id, "first_name": CANARY, **kinds})
    said, row = reader.run(FILES[language]["write"], WRITE_AND_READ[language].replace("USER", user_id))
    assert said == "applied"
    assert row == {"private": {"plan": "pro"}, "public": {"role": "admin"}}
    until(lambda: system.rows(user_id)[user_id][1] is None, 20, "a worker to drop what the token carries")
    assert client.deliver(webhook(clerk, user_id)).status == 202
    system.settle()
    found = reader.run(FILES[language]["metadata"], READ.replace("USER", user_id))
    assert found == {"private": {"plan": "pro"}, "public": None}


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_application_hears_which_fields_changed_and_no_value(
    language: str, reader: Reader, system: System, client: Client
) -> None:
    user_id, version = new_user(), now_ms()
    client.deliver(user_event(user_id, version, {"plan": "free"}))
    until(lambda: system.rows(user_id), what="the row")
    with reader.running(FILES[language]["metadata"], LISTEN[language]) as heard:
        until(lambda: heard == ["listening"], 20, "a listener")

        def told() -> list[Any]:
            """What it was told of this user."""
            return [one for one in heard[1:] if one["user_id"] == user_id]

        client.deliver(user_event(user_id, version + 1, {"plan": "free"}))  # a sign-in
        client.deliver(user_event(user_id, version + 2, {"plan": CANARY, "credits": 1}, public={"role": CANARY}))
        until(told, what="a notice")
        client.deliver(deleted(user_id, version + 3))
        until(lambda: len(told()) > 1, what="the notice of a deletion")
        for names in told()[0]["changed"].values():
            names.sort()
        assert told() == [
            {
                "user_id": user_id,
                "version": version + 2,
                "deleted": False,
                "changed": {"private_metadata": ["credits", "plan"], "public_metadata": ["role"]},
            },
            {"user_id": user_id, "version": version + 3, "deleted": True, "changed": {}},
        ]
        assert CANARY not in json.dumps(heard)


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_application_that_was_away_catches_up(language: str, reader: Reader, system: System, client: Client) -> None:
    user_id, name = new_user(), FILES[language]["changes"]
    reader.settings["PGAPPNAME"] = LISTENER
    with reader.running(name, HEAR[name].replace("EVERY", "600")) as heard:
        until(lambda: heard, 20, "a listener")
        with psycopg.connect(system.database_url, autocommit=True) as connection:
            assert connection.execute(CUT, (LISTENER,)).fetchall()
        client.deliver(user_event(user_id, now_ms(), {"plan": "free"}))
        expected = [user_id, {"private": {"canary": CANARY, "plan": "free"}, "public": None}]
        until(lambda: expected in heard, what="catching up")
