"""What gunicorn is told: the folder for metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

START = """
import os, webhooks.server
print(os.environ["PROMETHEUS_MULTIPROC_DIR"])
webhooks.server.on_exit(None)
"""


def start(folder: Path, given: str) -> Path:
    """The folder that a start chooses, which ends at once."""
    env = {**os.environ, "TMPDIR": str(folder), "PROMETHEUS_MULTIPROC_DIR": given}
    done = subprocess.run(
        (sys.executable, "-c", START), env=env, capture_output=True, text=True, timeout=20, check=True
    )
    return Path(done.stdout.strip())


def test_master_that_replaces_another_one_makes_a_folder_of_its_own(tmp_path: Path) -> None:
    old = tmp_path / "clerk-sync-metrics-old"
    assert start(tmp_path, str(old)) != old


def test_folder_that_was_given_is_used_and_left(tmp_path: Path) -> None:
    assert start(tmp_path, str(tmp_path)) == tmp_path
    assert tmp_path.exists()


def test_pipe_in_the_temporary_folder_holds_up_no_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clerk-sync-metrics-pipe")
    assert start(tmp_path, "").parent == tmp_path
