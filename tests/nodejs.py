"""Node for the tests, where it is installed, with the packages that tests/node/package-lock.json names."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "node"
OLDEST: Final = 20
"""What the packages need."""


def _installed() -> bool:
    if not all(map(shutil.which, ("node", "npm"))):
        return False
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    return int(said.removeprefix("v").partition(".")[0] or 0) >= OLDEST


INSTALLED: Final = _installed()
WHY_NOT: Final = f"Node isn't installed: no node of version {OLDEST} or newer on PATH, or no npm"


def modules() -> Path:
    """The packages, installed by whoever comes first, and again once the lock has changed."""
    found = FOLDER / "node_modules"
    done = found / ".installed"
    lock = (FOLDER / "package-lock.json").read_bytes()
    with (FOLDER / ".lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        if not done.exists() or done.read_bytes() != lock:
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
            ran = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=100, check=False)
            assert ran.returncode == 0, f"npm ci failed:\n{ran.stderr[-2000:]}"
            done.write_bytes(lock)
    return found
