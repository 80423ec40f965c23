"""How gunicorn serves the receiver (`gunicorn --config python:webhooks.server`). Its own flags still win."""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Every delivery has its own line; gunicorn's would tell addresses.
accesslog = None
loglevel = "warning"
# By name: it counts, and may be loaded only once it is settled where to, below.
worker_class = "webhooks.process.Worker"
workers = int(os.environ.get("WEB_CONCURRENCY") or 2)
# For deliveries: each takes all that wait, and commits them together while another one takes the next.
threads = 2
bind = f"0.0.0.0:{os.environ.get('PORT') or 8000}"
backlog = 2048
# Loaded once and shared: the processes fork from it. Connections and threads come with the first request.
preload_app = True
timeout = 30
graceful_timeout = 8
# Heartbeats in memory, not on a disk that may be slow.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - files without a name


def _metrics_folder() -> str:
    """A folder for the counts of this start. A lock on it lasts as long as its processes; others are left behind."""
    for old in Path(tempfile.gettempdir()).glob("clerk-sync-metrics-*"):
        with contextlib.suppress(OSError):
            if _lock(old):
                shutil.rmtree(old)
    while True:
        folder = tempfile.mkdtemp(prefix="clerk-sync-metrics-")
        with contextlib.suppress(OSError):  # another start found it before it was locked
            if _lock(Path(folder)):
                return folder


def _lock(folder: Path) -> bool:
    """Lock a folder until this process and its children have ended; False where another one holds it."""
    # Whoever else may write to the temporary folder may have put a pipe or a link there.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


# The web processes count together even where no one set the variable.
_given = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
# On SIGUSR2 a new master inherits the variable of the old one, which takes its folder along when it ends.
_own_metrics = not _given or Path(_given).name.startswith("clerk-sync-metrics-")
if _own_metrics:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics_folder()


def on_starting(_server: Any) -> None:
    """Let gunicorn log as everything else does, now that the application has said how."""
    log = logging.getLogger("gunicorn.error")
    log.handlers.clear()
    log.propagate = True


def on_exit(_server: Any) -> None:
    """Leave no folder behind."""
    if _own_metrics:
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
