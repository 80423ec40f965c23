"""The session-token budget of a running system: what a template makes of rows, warnings, commands and start-up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from tests.acceptance.system import CANARY, PROGRAMS, System, new_user, now_ms, user_event
from tests.waiting import until

ROLE: Final = '{"role": "{{user.public_metadata.role}}", "name": "{{user.first_name}}"}'
WHOLE: Final = '{"public_metadata": "{{user.public_metadata}}", "unsafe_metadata": "{{user.unsafe_metadata}}"}'
BAD: Final = {
    "line 1, column 11": '{"role": "{{user.pubic_metadata.role}}"}',
    "line 2, column 12": '{\n  "plan": "{{user.private_metadata.plan}}"}',
    "line 1, column 2": "{role: 1}",
}


@pytest.fixture(scope="module")
def role_system(new_system: Callable[..., System]) -> Iterator[System]:
    """A system whose token carries one field and the name."""
    system = new_system(SESSION_CLAIMS=ROLE, LOG_LEVEL="DEBUG")
    system.start()
    yield system
    if system.running:
        assert system.stop() == 0
    assert CANARY not in system.output


def claims_of(user_id: str, **public: Any) -> bytes:
    return user_event(user_id, now_ms(), public=public)


def report(system: System, *arguments: str, template: str = ROLE) -> dict[str, Any]:
    ran = system.command("budget", "report", "--json", *arguments, SESSION_CLAIMS=template)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    assert CANARY not in ran.stdout
    return found


def test_what_the_template_does_not_carry_whole_is_copied_and_claims_weigh_what_it_renders_to(
    role_system: System,
) -> None:
    user_id = new_user()
    with role_system.client() as client:
        client.deliver(claims_of(user_id, role="admin"))
    role_system.settle()
    _, public, unsafe, _ = role_system.rows(user_id)[user_id]
    assert (public, unsafe) == ({"canary": CANARY, "role": "admin"}, {"canary": CANARY})
    with role_system.connect() as connection:
        query = "select claims_bytes from clerk.user_metadata where user_id = %s"
        rendered = {"role": "admin", "name": f"First {CANARY}"}
        weight = len(json.dumps(rendered, separators=(",", ":"), ensure_ascii=False).encode())
        assert connection.execute(query, (user_id,)).fetchone() == (weight,)


def test_a_user_who_crosses_the_budget_is_warned_about_once(role_system: System) -> None:
    user_id = new_user()
    before = role_system.metrics()["clerk_sync_users_over_budget"]
    with role_system.client() as client:
        for role in ("small", "x" * 1300, "x" * 1400, "small"):
            client.deliver(claims_of(user_id, role=role))
            role_system.settle()
            over = role_system.metrics()["clerk_sync_users_over_budget"] - before
            assert over == (1 if len(role) > 1200 else 0)
    warned = [line for line in role_system.output.splitlines() if user_id in line and "budget" in line]
    assert len(warned) == 1
    assert "public_metadata.role" in warned[0]


def test_report_check_and_suggest_speak_of_the_same_users(role_system: System, tmp_path: Path) -> None:
    heavy = new_user()
    with role_system.client() as client:
        client.deliver(claims_of(heavy, role="x" * 2000, plan="free", **{f"f{n}": "y" * 90 for n in range(9)}))
        client.deliver(claims_of(new_user(), role="admin", plan="pro"))
    role_system.settle()
    page = tmp_path / "budget.html"
    found = report(role_system, "--html", str(page))
    assert found["over"] == 1
    assert found["worst"][0]["user_id"] == heavy
    assert found["worst"][0]["blame"] == "public_metadata.role"
    assert found["stale"] == 0
    html = page.read_text("utf-8")
    assert CANARY not in html
    assert heavy in html
    plain = role_system.program("budget", "report")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert "1,200" in plain.stdout
    assert max(map(len, plain.stdout.splitlines())) <= 100

    unwritable = role_system.command("budget", "report", "--html", "/proc/budget.html")
    assert unwritable.returncode == 1
    assert unwritable.stdout == plain.stdout
    assert unwritable.stderr.startswith("clerk-sync: --html /proc/budget.html can't be written")

    checked = role_system.program("budget", "check", ROLE, "--json")
    assert checked.returncode == 1
    told = json.loads(checked.stdout)
    assert (told["over"], told["findings"]) == (1, [])
    template = tmp_path / "claims.json"
    template.write_text('{"plan": "{{user.public_metadata.plan}}"}')
    for spelling in (str(template), f"@{template}"):
        fits = role_system.command("budget", "check", spelling)
        assert (fits.returncode, fits.stderr) == (0, "")
    assert role_system.command("budget", "check", "-", text=template.read_text()).returncode == 0

    suggested = role_system.program(
        "budget", "suggest", "--keep", "public_metadata.plan public_metadata.role", "--json"
    )
    assert (suggested.returncode, suggested.stderr) == (1, "")  # the role was asked for and doesn't fit
    suggestion = json.loads(suggested.stdout)
    kept = suggestion["template"] if isinstance(suggestion["template"], str) else json.dumps(suggestion["template"])
    assert "{{user.public_metadata.plan}}" in kept
    assert "{{user.public_metadata.role}}" not in kept
    assert "{{user.first_name}}" in kept
    assert role_system.command("budget", "check", kept).returncode == 0
    moved = {field["name"]: field["sql"] for field in suggestion["moved"]}
    with role_system.connect() as connection:
        read = moved["public_metadata.role"].replace("$1", "%s")
        assert connection.execute(read, (heavy,)).fetchone() == ("x" * 2000,)


def test_after_a_new_template_users_are_weighed_again_by_a_command(role_system: System) -> None:
    user_id = new_user()
    with role_system.client() as client:
        client.deliver(claims_of(user_id, role="admin"))
    role_system.settle()
    assert report(role_system, template=WHOLE)["stale"] > 0
    # Tokens made by the old template are still about: copies stay until they are said to be dropped.
    ran = role_system.command("budget", "reweigh", "--json", SESSION_CLAIMS=WHOLE)
    assert (ran.returncode, ran.stderr) == (0, "")
    kept = json.loads(ran.stdout)
    assert kept["droppable"] >= 1
    assert kept["dropped"] == 0
    assert role_system.rows(user_id)[user_id][1] == {"canary": CANARY, "role": "admin"}
    assert report(role_system, template=WHOLE)["stale"] == 0
    ran = role_system.program("budget", "reweigh", "--drop", "--json", SESSION_CLAIMS=WHOLE)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["dropped"] == kept["droppable"]
    assert role_system.rows(user_id)[user_id][1:3] == (None, None)
    back = json.loads(role_system.command("budget", "reweigh", "--json").stdout)
    assert back["missing"] >= 1
    assert report(role_system)["missing"] == back["missing"]
    status = json.loads(role_system.command("status", "--json").stdout)
    assert status["counts"]["users_content_missing"] == back["missing"]
    # What only Clerk has comes back with the user's next event.
    with role_system.client() as client:
        client.deliver(claims_of(user_id, role="admin"))
    until(lambda: role_system.rows(user_id)[user_id][1] == {"canary": CANARY, "role": "admin"})


@pytest.mark.parametrize(("position", "template"), BAD.items())
def test_a_template_that_is_wrong_is_refused_at_start_up_and_by_check(
    role_system: System, position: str, template: str, tmp_path: Path
) -> None:
    checked = role_system.command("budget", "check", template)
    assert checked.returncode == 2
    assert position in checked.stderr
    env = {**os.environ, "SESSION_CLAIMS": template, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    env |= {"DATABASE_URL": role_system.database_url, "REDIS_URL": role_system.redis_url}
    env |= {"CLERK_WEBHOOK_SIGNING_SECRET": role_system.signing_secret}
    commands = (
        ["clerk-sync", "up", "--port", "0", "--data-dir", str(tmp_path / "data")],
        ["gunicorn", "--config", "python:webhooks.server", "webhooks.main:app", "--bind", "127.0.0.1:0"],
        ["celery", "--app", "worker.main", "worker"],
    )

    def start(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    with ThreadPoolExecutor(len(commands)) as pool:
        for command, ran in zip(commands, pool.map(start, commands), strict=True):
            assert f"SESSION_CLAIMS: {position}" in ran.stdout + ran.stderr, command
            assert ran.returncode == 2 or command[0] == "gunicorn", ran.stderr


def test_what_has_nothing_to_do_with_the_template_works_while_it_is_wrong(role_system: System) -> None:
    wrong = '{"role": "{{user.pubic_metadata.role}}"}'
    for command in (("events", "list"), ("migrate",), ("erase", new_user())):
        ran = role_system.program(*command, SESSION_CLAIMS=wrong)
        assert (ran.returncode, ran.stderr) == (0, ""), command
    status = role_system.command("status", SESSION_CLAIMS=wrong)
    assert status.returncode == 1
    assert "line 1, column 11" in " ".join(status.stdout.split())
