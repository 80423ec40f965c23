"""One process of the receiver under gunicorn's master, which starts it anew when it dies or says nothing for 30 s."""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import time

from gunicorn.workers import base

from webhooks.connections import Connections, Limits

SPARE_FILES = 100
"""Open files that Postgres, the broker, logs and metrics have for themselves, however many clients there are."""


def make_room(connections: int) -> int:
    """Raise our limit of open files to what so many connections need, as far as we may; how many it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return connections if soft == resource.RLIM_INFINITY else max(10, min(connections, soft - SPARE_FILES))


class Worker(base.Worker):
    """An event loop reads requests, threads answer them."""

    def run(self) -> None:
        """Serve until told to stop, or until the master is gone."""
        gc.freeze()  # what was loaded before the fork stays: no need to look at it again and again
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, stop.set)
        connections = Connections(self.wsgi, self.cfg.threads, Limits(connections=make_room(Limits().connections)))
        connections.listen(self.sockets)
        # A signal that came before the loop had its handlers ended `alive` only.
        while self.alive and not stop.is_set() and os.getppid() == self.ppid:
            self.notify()
            connections.sweep()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1)
        connections.stop()
        deadline = time.monotonic() + self.cfg.graceful_timeout
        while not connections.finished and time.monotonic() < deadline:
            self.notify()
            connections.sweep()
            await asyncio.sleep(0.02)
        connections.close()
