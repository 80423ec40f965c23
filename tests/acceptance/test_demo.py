"""`demo` as a newcomer runs it, here on a database in use and with the key of a real instance."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.acceptance.system import ENVIRONMENT, PROGRAMS
from tests.clerk import SECRET
from tests.populations import user
from worker.db import Connection
from worker.policy import Policy
from worker.standin import StandIn
from worker.users import gate_users, weigh

READ = "select user_id from clerk.user_metadata order by user_id"


def test_the_demonstration_is_right_and_does_nothing_to_other_users_or_with_the_key_that_is_set(
    connect: Callable[[], Connection], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    connection = connect()
    gate_users(connection, Policy(), [weigh(Policy(), one) for one in (user(user_id="user_of_an_application"),)])
    with StandIn("sk_live_of_somebody") as theirs:
        environment = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
            "CLERK_SECRET_KEY": theirs.secret_key,
            "CLERK_API_URL": theirs.url,
            "RECONCILE_SECONDS": "1",
        }
        done = subprocess.run(
            (str(PROGRAMS / "clerk-sync"), "demo", "--once", "--port", "0", "--data-dir", str(tmp_path)),
            env=ENVIRONMENT | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not theirs.calls
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  applied        Zoe" in done.stdout
    assert "  erased         Dan" in done.stdout
    assert "  1 call for both" in done.stdout
    names = [user_id.split("_")[1] for (user_id,) in connection.execute(READ)]
    assert names == ["ada", "bob", "of", "zoe"]
