"""The entry for the web server (`webhooks.main:app`): reads the environment and builds the receiver."""

import atexit
import sys

from webhooks.access import Access
from webhooks.app import create_app
from webhooks.doorbell import Doorbell, Publisher
from webhooks.health import Health
from webhooks.recorder import Recorder
from webhooks.signature import make_verifier
from webhooks.status import status_page
from worker import db, log, sentry, tracing
from worker.app import create_celery
from worker.errors import ConfigError
from worker.settings import Settings

try:
    settings = Settings.from_env(need=("signing_secrets", "database_url", "redis_url"))
    reporters = sentry.reporters(settings.sentry_dsn)
    tracing.start(wanted=settings.traces)
except ConfigError as error:
    sys.stderr.write("clerk-sync receiver can't start:\n" + "".join(f"  {line}\n" for line in error.problems))
    sys.exit(2)

log.configure(settings.log_format, settings.log_level, *reporters)
health = Health(lambda: db.connect(settings.database_url, "health", statement_ms=2000, lock_ms=1000))
recorder = Recorder(
    lambda: db.connect(settings.database_url, "receiver", statement_ms=3000, lock_ms=700, answer_seconds=1)
)
atexit.register(recorder.close)
ring = Doorbell(Publisher(create_celery(settings.redis_url))).ring
status = None
if settings.status_token:
    status = status_page(
        connect=lambda: db.connect(settings.database_url, "status page", statement_ms=2000, lock_ms=1000),
        ring=ring,
        access=Access(settings.status_token),
        budget=settings.policy.budget,
    )
app = create_app(
    verify=make_verifier(settings.signing_secrets),
    record=recorder.record,
    ring=ring,
    problems=health.problems,
    counts=health.counts,
    instance_id=settings.instance_id,
    status=status,
)
