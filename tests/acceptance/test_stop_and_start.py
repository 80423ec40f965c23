"""`up` stops cleanly on either signal and goes on, at its next start, where it was."""

from __future__ import annotations

import signal
import stat
from collections.abc import Callable

from tests.acceptance.system import System, children, new_user, now_ms, user_event
from tests.waiting import until
from worker.local import command_line


def processes(system: System) -> list[int]:
    """All of its processes, those that its parts have started included."""
    found = list(system.pids.values())
    return found + [child for pid in found for child in children(pid)]


def test_up_stops_cleanly_on_either_signal_and_goes_on_where_it_was(new_system: Callable[..., System]) -> None:
    system = new_system(CLERK_INSTANCE_ID="ins_ours")
    system.start()
    assert stat.S_IMODE(system.info_path.stat().st_mode) == 0o600
    assert system.info.keys() == {"url", "database_url", "redis_url", "signing_secret", "pids"}
    assert system.pids.keys() == {"postgres", "redis", "web", "worker", "beat"}
    secret, version = system.signing_secret, now_ms()
    assert secret.startswith("whsec_")
    seen, unseen, theirs = new_user(), new_user(), new_user()
    with system.client() as client:
        assert client.deliver(user_event(seen, version, instance_id="ins_ours")).outcome == (202, "accepted")
        until(lambda: system.rows(seen))
        other = client.deliver(user_event(theirs, version, instance_id="ins_another"))
        assert other.outcome == (200, "ignored")
        assert system.event(other.svix_id) is None
        before = processes(system)
        assert len(before) > 10
        with system.hung("worker"):
            assert client.deliver(user_event(unseen, version)).outcome == (202, "accepted")
            system.kill("worker")
            assert system.stop(signal.SIGTERM) == 0
    assert not list(filter(command_line, before))
    assert not system.info_path.exists()

    system.start()
    assert system.signing_secret == secret
    assert system.rows(seen)[seen][3] == version
    until(lambda: system.rows(unseen))
    assert not system.rows(theirs)
    with system.client() as client:
        assert client.deliver(user_event(seen, version + 1)).outcome == (202, "accepted")
    until(lambda: system.rows(seen)[seen][3] == version + 1)
    before = processes(system)
    assert system.stop(signal.SIGINT) == 0
    assert not list(filter(command_line, before))
    assert "Traceback" not in system.output
