"""The entry for the worker of *task per event* (`celery --app bench.rival_worker`)."""

import os
import warnings

from bench.rival_upsert import celery

# Celery warns of root for the sake of pickle, which this app doesn't take.
warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")

app = celery(os.environ["REDIS_URL"])
