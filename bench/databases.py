"""One database for each contender and population, made when it is first asked for."""

from __future__ import annotations

from typing import Final

from bench.population import populate_ours, populate_rival
from bench.servers import Servers
from worker.schema import migrate

SMALL: Final = 50_000
"""Populations up to this are made anew each time: one run's events would soon have changed everybody."""


def ready(servers: Servers, design: str, users: int) -> str:
    """The name of a database with so many users. The design is `ours`, or what a rival's is called."""
    name = f"{design}_{users}"
    new = not exists(servers, name)
    if design == "ours":
        if new:
            servers.make_database(name)
            migrate(servers.database_url(name))
        if new or users <= SMALL:
            with servers.connect(name) as connection:
                populate_ours(connection, users)
        return name
    if users <= SMALL:
        if new:
            servers.make_database(name)
        with servers.connect(name) as connection:
            populate_rival(connection, users)
    elif new:
        servers.make_database(name, template=_rivals_template(servers, users))
    return name


def ready_inbox(servers: Servers) -> str:
    """The name of a database with the product's tables and nobody in them."""
    name = "insert_alone"
    if not exists(servers, name):
        servers.make_database(name)
        migrate(servers.database_url(name))
    return name


def _rivals_template(servers: Servers, users: int) -> str:
    name = f"rivals_{users}"
    if not exists(servers, name):
        servers.make_database(name)
        with servers.connect(name) as connection:
            populate_rival(connection, users)
    return name


EXISTS = "select exists (select from pg_database where datname = %s)"


def exists(servers: Servers, name: str) -> bool:
    """Whether there is a database of this name."""
    with servers.connect("postgres") as connection:
        (found,) = connection.execute(EXISTS, (name,)).fetchone() or (False,)
    return bool(found)
