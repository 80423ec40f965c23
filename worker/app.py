"""Builds the Celery app: how it talks to the broker, what runs when, and the sweeper and the reconciler beside it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

from celery import Celery, signals
from kombu import Connection as BrokerConnection
from kombu import Exchange, Queue
from kombu.asynchronous import get_event_loop
from kombu.exceptions import ChannelError

from worker import db, log, metrics, sentry, tasks
from worker.errors import BrokerDown
from worker.housekeeper import Housekeeper
from worker.reconciler import Reconciler
from worker.settings import Settings
from worker.sweeper import LINGER_SECONDS, Drainer, Sweeper, Watch
from worker.sync import LOCK_MS, STATEMENT_MS

logger = logging.getLogger(__name__)

QUEUE: Final = "clerk"

STOP_SECONDS: Final = 3.0
"""How long a worker that stops waits for a reconcile to be recorded as cut short; what supervises it is not patient."""


def create_celery(redis_url: str, *, reconcile_seconds: int = 0) -> Celery:
    """A Celery app for senders and workers, by default without the periodic reconcile. It connects to nothing yet."""
    app = Celery("clerk-sync", broker=redis_url, set_as_current=False)
    app.conf.update(
        # Whoever owns the broker can ring the doorbell and nothing else.
        accept_content=["json"],
        task_serializer="json",
        event_serializer="json",
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_queues=[Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE)],
        task_default_queue=QUEUE,
        task_create_missing_queues=False,
        worker_prefetch_multiplier=1,
        # Ours don't run on for long, and acknowledge early; unset, each lost connection is a warning.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            # A silent peer is noticed instead of waited for.
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 10,
        }
        if _is_redis(redis_url)
        else {},
        beat_schedule={
            # Finds what a lost wake-up left behind while every worker is between two sweeps. Old ones expire: after
            # an outage one is enough.
            "drain": {"task": tasks.DRAIN, "schedule": 10.0, "options": {"expires": 10}},
        },
    )
    if reconcile_seconds:
        app.conf.beat_schedule["reconcile"] = {
            "task": tasks.RECONCILE,
            "schedule": float(reconcile_seconds),
            "options": {"expires": reconcile_seconds},
        }
    return app


def create_worker(settings: Settings) -> Celery:
    """The app for `celery worker` and `celery beat`, with its tasks and, once a worker starts, its threads.

    Raises ConfigError where a setting needs a package that isn't installed.
    """
    reporters = sentry.reporters(settings.sentry_dsn)
    off = why_off(settings)
    app = create_celery(settings.redis_url, reconcile_seconds=0 if off else settings.reconcile_seconds)
    app.conf.worker_consumer = "worker.listener:Listener"
    drainer = Drainer(
        lambda: db.connect(settings.database_url, "worker", statement_ms=STATEMENT_MS, lock_ms=LOCK_MS),
        settings.policy,
        linger=LINGER_SECONDS,
    )
    sweeper = Sweeper(drainer)
    housekeeper = Housekeeper(
        lambda: db.connect(settings.database_url, "housekeeper"),
        timedelta(days=settings.event_retention_days),
        settings.policy,
    )
    watch = Watch(lambda: waiting(app), drainer.busy)
    reconciler = None if off else Reconciler(settings)
    stopping = threading.Event()
    tasks.register(
        app,
        drain=lambda: drainer.ring("doorbell"),
        # Another host's beat may ring where this worker has no key.
        reconcile=reconciler.ring if reconciler else lambda: None,
    )

    def set_up_logging(**_: Any) -> None:
        log.configure(settings.log_format, settings.log_level, *reporters)

    def start(**_: Any) -> None:
        waker = threading.Thread(target=_wake_to_stop, args=(stopping,), name="waker", daemon=True)
        for thread in (sweeper, housekeeper, watch, waker):
            thread.start()
        if reconciler:
            reconciler.start()
        else:
            logger.info("the periodic reconcile is off", extra={"reason": off})

    def stop(**_: Any) -> None:
        stopping.set()
        drainer.stop()
        sweeper.stop()
        housekeeper.stop()
        watch.stop()
        if reconciler:
            reconciler.stop()

    def end(**_: Any) -> None:
        if reconciler:
            reconciler.stop()
            reconciler.join(STOP_SECONDS)

    def heard(**_: Any) -> None:
        metrics.WAKE_UPS.inc()
        watch.heard()

    def forked(**_: Any) -> None:
        drainer.reset()
        if reconciler:
            reconciler.reset()

    # weak=False: nothing else holds these functions.
    signals.setup_logging.connect(set_up_logging, weak=False)
    # worker_init comes before Celery reaches for the broker, which may be away.
    signals.worker_init.connect(start, weak=False)
    signals.task_received.connect(heard, weak=False)
    signals.task_rejected.connect(heard, weak=False)
    signals.worker_shutting_down.connect(stop, weak=False)
    # Once no task runs any more; and in a forked process, which Celery tells nothing else.
    signals.worker_shutdown.connect(end, weak=False)
    signals.worker_process_shutdown.connect(end, weak=False)
    signals.worker_process_init.connect(forked, weak=False)
    return app


def _wake_to_stop(stopping: threading.Event) -> None:
    """Celery's loop sleeps through the signal to stop until its next message or timer: with RabbitMQ, for seconds."""
    stopping.wait()
    if (loop := get_event_loop()) is not None:
        loop.call_soon(lambda: None)


def why_off(settings: Settings) -> str | None:
    """Why there is no periodic reconcile; None where there is one."""
    if not settings.reconcile_seconds:
        return "RECONCILE_SECONDS is 0"
    if not settings.secret_key:
        return "CLERK_SECRET_KEY is missing"
    return None


def waiting(app: Celery) -> int | None:
    """How many wake-ups wait in the broker, asked over a fresh connection; None where it doesn't answer in time."""
    connection = quick_connection(app)
    try:
        with reaching():
            connection.connect()
            with connection.channel() as channel:
                return queue_length(channel)
    except BrokerDown:
        return None
    finally:
        hang_up(connection)


def quick_connection(app: Celery) -> BrokerConnection:
    """A connection, not yet made, that gives up within some 5 s on a broker that is silent."""
    url = app.conf.broker_url
    # Redis's client tries four times; other brokers' clients know no such options.
    limits = {"socket_timeout": 1, "socket_connect_timeout": 1} if _is_redis(url) else {}
    return app.connection_for_write(transport_options=limits)


def _is_redis(url: str) -> bool:
    return url.startswith(("redis", "valkey"))


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Turn whatever a broker's client library raises into BrokerDown, with the error's class as its text.

    Everything, not only what it declares: on a connection that was reset, kombu has raised AttributeError.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise BrokerDown(type(error).__name__) from None


def hang_up(connection: BrokerConnection) -> None:
    """Close a connection to the broker, dead or alive."""
    with contextlib.suppress(BrokerDown), reaching():
        connection.release()


def queue_length(channel: Any) -> int:
    """Messages waiting in our queue. Some brokers close the channel where there is no such queue yet."""
    try:
        return int(channel.queue_declare(QUEUE, passive=True).message_count)
    except ChannelError:
        # On Redis, an empty one.
        return 0
