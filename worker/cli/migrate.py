"""`clerk-sync migrate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from sqlalchemy.exc import DBAPIError

from worker import db, roles, schema
from worker.cli.options import info_option, settings
from worker.errors import SyncError

INCOMPLETE = """
Not there, or without all that they need, and this role may not mend it: {roles}. Processes that log in with the role
that migrates need none of them, but applications should have clerk_reader. For an administrator to run:

  clerk-sync migrate --roles    # prints the SQL"""


@click.command()
@click.option("--sql", is_flag=True, help="Print the SQL of every step and run nothing.")
@click.option("--roles", "only_roles", is_flag=True, help="Print the SQL of the roles alone and run nothing.")
@info_option
def migrate(*, info: Path | None, sql: bool, only_roles: bool) -> None:
    """Bring the database to the newest schema.

    Safe to run from several hosts at once: they wait for one another, and all steps are one transaction. Needs
    DATABASE_URL, with a role that may create a schema.

    Each run makes the roles clerk_receiver, clerk_worker and clerk_reader, where the role that migrates may make roles,
    and grants each what it needs. Where it may not, an administrator runs, after this, what --roles prints.
    """
    if only_roles:
        # Whoever runs it may do everything: nothing that others left in `public` is to be found by it.
        click.echo("set search_path = '';\n" + roles.grants().strip())
        return
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
        if lacking := roles.incomplete(connection):
            click.echo(INCOMPLETE.format(roles=", ".join(lacking)))
