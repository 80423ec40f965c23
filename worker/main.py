"""The entry for `celery --app worker.main`: reads the environment and builds the app."""

import sys
import warnings

from worker import tracing
from worker.app import create_worker
from worker.errors import ConfigError
from worker.settings import Settings

# Celery warns of root for the sake of pickle, which this app refuses.
warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")

try:
    settings = Settings.from_env(need=("database_url", "redis_url"))
    tracing.start(wanted=settings.traces)
    app = create_worker(settings)
except ConfigError as error:
    sys.stderr.write("clerk-sync worker can't start:\n" + "".join(f"  {line}\n" for line in error.problems))
    sys.exit(2)
