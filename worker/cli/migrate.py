"""`clerk-sync migrate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from sqlalchemy.exc import DBAPIError

from worker import db, schema
from worker.cli.options import info_option, settings
from worker.errors import SyncError

NO_READER = """
The role clerk_reader isn't there, and this role may not make it. Applications need it (or another one) to read; an
administrator makes it with:

  create role clerk_reader nologin;
  grant usage on schema clerk to clerk_reader;
  grant select on clerk.user_metadata to clerk_reader;"""


@click.command()
@click.option("--sql", is_flag=True, help="Print the SQL of every step and run nothing.")
@info_option
def migrate(info: Path | None, sql: bool) -> None:
    """Bring the database to the newest schema.

    Safe to run from several hosts at once: they wait for one another, and all steps are one transaction. Needs
    DATABASE_URL, with a role that may create a schema. The role clerk_reader is made where that role may make it.
    """
    if sql:
        schema.print_sql(sys.stdout)
        return
    url = settings(info, "database_url", claims=False).database_url
    try:
        before, after = schema.migrate(url)
    except DBAPIError as error:
        lines = str(error.orig).splitlines()
        raise SyncError(f"the migration failed, nothing was changed: {lines[0] if lines else error}") from None
    if before == after:
        click.echo(f"The schema is at {after}: nothing to do.")
    else:
        click.echo(f"The schema went from {before or 'nothing'} to {after}.")
    with db.connect(url, "migrate") as connection:
        if not db.has_reader(connection):
            click.echo(NO_READER)
