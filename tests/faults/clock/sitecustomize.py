"""Sets the wall clock off in some of the Python processes that have this directory on PYTHONPATH.

CLOCK_OFF_SECONDS: by how much, e.g. 600 or -240. Without it nothing is done.
CLOCK_OFF_IN: a text in the command line of the processes meant; without it, all.
Monotonic clocks, and the clocks of other programs and of libraries not written in Python, stay right.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsIndex


def set_clock_off(seconds: float) -> None:
    """From now on this process's wall clock is so much fast, or slow where negative."""
    import ctypes  # noqa: PLC0415 - none of these in a process that is left alone
    import datetime as dt  # noqa: PLC0415
    import gc  # noqa: PLC0415
    import time  # noqa: PLC0415

    right_time, right_time_ns = time.time, time.time_ns
    right_gmtime, right_localtime = time.gmtime, time.localtime
    right_asctime, right_strftime = time.asctime, time.strftime
    nanoseconds = round(seconds * 1_000_000_000)

    def now() -> float:
        return right_time() + seconds

    def gmtime(at: float | SupportsIndex | None = None, /) -> time.struct_time:
        return right_gmtime(now() if at is None else at)

    def localtime(at: float | SupportsIndex | None = None, /) -> time.struct_time:
        return right_localtime(now() if at is None else at)

    # These two refuse None: the argument is there or isn't.
    def asctime(*at: Any) -> str:
        return right_asctime(*(at or [localtime()]))

    def strftime(shape: str, /, *at: Any) -> str:
        return right_strftime(shape, *(at or [localtime()]))

    time.time = now
    time.time_ns = lambda: right_time_ns() + nanoseconds
    time.gmtime = gmtime
    time.localtime = localtime
    time.ctime = lambda at=None, /: right_asctime(localtime(at))
    time.asctime = asctime
    time.strftime = strftime

    def replace(kind: type, name: str, function: Callable[..., object]) -> None:
        # A subclass in the module's place would not be the type that C code makes: pickle and `type(x) is datetime`
        # would fail. So the method is replaced in the type itself, which Python allows for its own types only so.
        gc.get_referents(kind.__dict__)[0][name] = classmethod(function)
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))

    # datetime's too. Many versions of Python ask time.time here, but none promises it.
    replace(dt.date, "today", lambda kind: kind.fromtimestamp(now()))
    replace(dt.datetime, "now", lambda kind, tz=None: kind.fromtimestamp(now(), tz))
    replace(dt.datetime, "utcnow", lambda kind: kind.fromtimestamp(now(), dt.UTC).replace(tzinfo=None))


def run_the_next_one() -> None:
    """This module hides any other of its name: run that too."""
    here = Path(__file__).parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here.resolve()]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if found is not None and found.loader is not None:
        found.loader.exec_module(importlib.util.module_from_spec(found))


if "CLOCK_OFF_SECONDS" in os.environ and os.environ.get("CLOCK_OFF_IN", "") in " ".join(sys.orig_argv):
    set_clock_off(float(os.environ["CLOCK_OFF_SECONDS"]))
run_the_next_one()
