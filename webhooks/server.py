"""How gunicorn serves the receiver (`gunicorn --config python:webhooks.server`). Its own flags still win."""

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gunicorn.workers import gthread

# Two processes of eight threads: a thread only waits, for its body and for the commit that it shares.
workers = int(os.environ.get("WEB_CONCURRENCY") or 2)
worker_class = "gthread"
threads = 8
bind = f"0.0.0.0:{os.environ.get('PORT') or 8000}"
# Loaded once and shared: the processes fork from it. Connections and threads come with the first request.
preload_app = True
timeout = 30
graceful_timeout = 20
keepalive = 75
# Heartbeats in memory, not on a disk that may be slow.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - files without a name
# Every delivery has its own line; gunicorn's would tell addresses.
accesslog = None
loglevel = "warning"

# A connection that says nothing gives its thread back to the others at once, not after 5 s: two hundred idle ones would
# otherwise hold up every delivery for a minute.
gthread.DEFAULT_WORKER_DATA_TIMEOUT = 0.05  # type: ignore[misc] # gunicorn has no setting for it

# The web processes count together even where no one set the variable.
_own_metrics = not os.environ.get("PROMETHEUS_MULTIPROC_DIR")
if _own_metrics:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="clerk-sync-metrics-")


def on_starting(_server: Any) -> None:
    """Let gunicorn log as everything else does, now that the application has said how, and without its senders."""
    log = logging.getLogger("gunicorn.error")
    log.handlers.clear()
    log.propagate = True
    log.addFilter(_without_sender)


def _without_sender(record: logging.LogRecord) -> bool:
    """gunicorn quotes the address and the bytes of a request that isn't HTTP."""
    if str(record.msg).startswith("Invalid request from"):
        record.msg, record.args = "a request that isn't valid HTTP was refused", ()
    return True


def on_exit(_server: Any) -> None:
    """Leave no folder behind."""
    if _own_metrics:
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
