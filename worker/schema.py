"""Brings the database to the schema that this code needs, and says which one it has.

Alembic and SQLAlchemy are loaded here only, and only by `clerk-sync migrate`.
"""

from __future__ import annotations

import logging
import random
import threading
from pathlib import Path
from typing import TextIO

import alembic.command
import alembic.config
import alembic.script
import sqlalchemy
from sqlalchemy.exc import OperationalError

import migrations
from worker import roles

log = logging.getLogger(__name__)

LOCK_ATTEMPTS = 5
IN_USE = ("55P03", "40P01")
"""The lock isn't to be had in time, or whoever has it waits for us."""


def migrate(database_url: str) -> tuple[str | None, str]:
    """Run every pending step and grant what the roles need, in one transaction; returns the version before and after.

    Safe from several hosts at once: they wait for one another. Tries again where a step's lock isn't to be had within
    4 s because of a long query, or somebody who has it waits for one of ours. Raises sqlalchemy's OperationalError when
    Postgres can't be reached.
    """
    url = sqlalchemy.make_url(database_url).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args={"connect_timeout": 10})
    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            with engine.connect() as connection:
                return _upgrade(connection)
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) not in IN_USE or attempt == LOCK_ATTEMPTS:
                raise
            log.warning("a table is in use; trying again", extra={"attempt": attempt})
            threading.Event().wait(random.uniform(0.5, 1.5) * attempt)  # noqa: S311 - jitter, not a secret
    raise AssertionError("unreachable")


def _upgrade(connection: sqlalchemy.Connection) -> tuple[str | None, str]:
    config = _config()
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
    connection.commit()
    return config.attributes["before"], newest()


def print_sql(output: TextIO) -> None:
    """Write the SQL of every step, for those who review it or run it by other means."""
    config = _config()
    config.output_buffer = output
    alembic.command.upgrade(config, "head", sql=True)


def newest() -> str:
    """The version of the last step."""
    return str(alembic.script.ScriptDirectory.from_config(_config()).get_current_head())


def _config() -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["grants"] = roles.grants(forgiving=True)
    return config
