"""`clerk-sync erase`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import psycopg

from worker import db, users
from worker.cli.options import connect, info_option, json_option, settings, to_json
from worker.errors import SyncError
from worker.events import is_user_id


@click.command()
@click.argument("user_id", metavar="USER")
@info_option
@json_option
def erase(*, user_id: str, info: Path | None, as_json: bool) -> None:
    """Erase what is kept of USER, as the user.deleted event would.

    \b
    clerk-sync erase user_2abc...

    Metadata, sizes and names of fields, and events that were set aside are erased at once. A tombstone stays, which no
    late event, replay or pull undoes: a user who is erased here but goes on in Clerk never comes back.
    """
    if not is_user_id(user_id):
        raise click.BadParameter("not a user id (1 to 255 visible ASCII characters)", param_hint="USER")
    with connect(settings(info, "database_url", claims=False).database_url) as connection:
        try:
            erased = users.erase(connection, user_id)
        except psycopg.Error as error:
            raise SyncError(f"Postgres failed, and nothing was erased: {db.describe(error)}") from None
    if as_json:
        click.echo(to_json({"user_id": user_id, **dataclasses.asdict(erased)}))
        return
    if erased.was_deleted:
        click.echo(f"{user_id} was deleted before.")
    elif erased.user:
        kinds = ", ".join(erased.kinds) or "none was kept"
        click.echo(f"clerk.users          erased, a tombstone stays\nclerk.user_contents  erased: {kinds}")
    else:
        click.echo(f"clerk.users          nothing was kept of {user_id}; a tombstone keeps later events out")
    click.echo(f"clerk.webhook_events {_bodies(erased.dead_bodies)}")
    if erased.pending:
        click.echo(f"Still pending: {erased.pending}. They lose their bodies when a worker meets the tombstone.")


def _bodies(count: int) -> str:
    return f"erased: {count} set aside" if count else "none of this user was set aside"
