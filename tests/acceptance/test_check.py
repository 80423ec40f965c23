"""`clerk-sync check` beside a running system: all is well, no worker works, and it is stopped in the middle."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
from typing import Final

from tests.acceptance.system import PROGRAMS, System
from tests.waiting import until

TRACES: Final = """
select user_id from clerk.users where starts_with(user_id, 'user_clerk_sync_check_')
union all
select svix_id from clerk.webhook_events where starts_with(svix_id, 'msg_clerk_sync_check_')
"""


def traces(system: System) -> list[str]:
    with system.connect() as connection:
        return [name for (name,) in connection.execute(TRACES)]


def test_a_system_that_is_well_passes_and_keeps_no_trace(system: System) -> None:
    ran = system.program("check", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert found["ok"] is True
    assert system.url == found["url"] + "/webhooks/clerk"
    states = {check["name"]: check["state"] for check in found["checks"]}
    skipped = [name for name, state in states.items() if state != "pass"]
    assert skipped == ["template", "Clerk's API"], found["checks"]
    assert list(states)[-7:] == ["healthz", "readyz", "delivery", "row", "repeat", "deletion", "removal"]
    assert traces(system) == []


def test_a_worker_that_does_nothing_fails_the_row_and_nothing_comes_of_it_later(system: System) -> None:
    with system.hung("worker"):
        ran = system.command("check", "--wait", "0.5")
    assert ran.returncode == 1
    lines = [line.split(maxsplit=2) for line in ran.stdout.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["fail"]] == ["row"]
    assert "no worker applied it within 0.5 s" in " ".join(ran.stdout.split())
    system.settle()
    assert traces(system) == []


def test_stopped_in_the_middle_it_removes_what_it_sent(system: System) -> None:
    command = [str(PROGRAMS / "clerk-sync"), "check", "--info", str(system.info_path)]
    # Whoever runs the tests in the background of a shell has it ignored, and so would the command.
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with (
        system.hung("worker"),
        subprocess.Popen(
            command,
            env=system._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heeded,  # noqa: PLW1509 - no other thread holds a lock that this needs
        ) as program,
    ):
        until(lambda: traces(system) or program.poll() is not None, 20, "the event")
        program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=20)
    assert program.returncode == 130
    assert errors.strip().splitlines()[-1] == "Stopped."
    assert output.splitlines()[-1].split() == ["pass", "removal", "no", "trace", "is", "left"]
    assert traces(system) == []
