"""The database's roles: what each needs, the SQL that grants it, and whether a connection has it.

What is written here is granted by each `clerk-sync migrate`, printed by `migrate --roles`, and asked of Postgres by the
processes before they work. A step that makes a table, a view, a function or a type has to be answered here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from psycopg.rows import class_row

from worker import db
from worker.db import Connection, deadline, schema_problem, schema_version

Privileges = Mapping[str, tuple[str, ...]]
"""Privileges on one object, each with the columns that it is for: none are all of them."""


@dataclass(frozen=True, slots=True)
class Role:
    """A role that logins are made members of. An object without a kind is a table or a view."""

    name: str
    purpose: str
    needs: Mapping[str, Privileges]


_WHOLE: Final = ()
_DELIVERED: Final = ("sent_at", "type", "user_id", "version", "state", "error", "processed_at", "body")

# It can't read a body, nor what is kept of a user but what their claims weigh, for the status page.
RECEIVER: Final = Role(
    "clerk_receiver",
    "records deliveries, counts what there is and shows how it stands, and reads neither bodies nor metadata",
    {
        "schema clerk": {"usage": _WHOLE},
        "clerk.schema_version": {"select": _WHOLE},
        "clerk.webhook_events": {
            "select": ("svix_id", "type", "user_id", "state", "attempts", "error", "received_at"),
            "insert": ("svix_id", *_DELIVERED),
            "update": (*_DELIVERED, "attempts", "received_at"),
        },
        "clerk.users": {"select": ("user_id", "claims_bytes", "deleted_at", "over_budget", "content_missing")},
        "clerk.runs": {"select": _WHOLE},
        "clerk.minutes": {"select": _WHOLE},
        "function clerk.run_is_under_way": {"execute": _WHOLE},
    },
)

WORKER: Final = Role(
    "clerk_worker",
    "applies events and pulls from Clerk; for operators' commands too",
    {
        "schema clerk": {"usage": _WHOLE},
        # A full reconcile notes in a temporary table whom it has met.
        "database": {"temporary": _WHOLE},
        "clerk.schema_version": {"select": _WHOLE},
        "clerk.webhook_events": {
            "select": _WHOLE,
            "update": ("state", "attempts", "error", "received_at", "processed_at", "body"),
            "delete": _WHOLE,
        },
        "clerk.users": {"select": _WHOLE, "insert": _WHOLE, "update": _WHOLE},
        "clerk.user_contents": {"select": _WHOLE, "insert": _WHOLE, "update": _WHOLE, "delete": _WHOLE},
        "clerk.changes": {"select": _WHOLE, "insert": _WHOLE, "update": _WHOLE, "delete": _WHOLE},
        "clerk.changes_pruned": {"select": _WHOLE, "update": _WHOLE},
        "clerk.policy": {"select": _WHOLE, "insert": _WHOLE, "update": _WHOLE},
        "clerk.api_budget": {"select": _WHOLE, "insert": _WHOLE, "update": _WHOLE},
        "clerk.runs": {"select": _WHOLE, "insert": _WHOLE, "update": _WHOLE, "delete": _WHOLE},
        "clerk.minutes": {"select": _WHOLE, "insert": _WHOLE, "update": _WHOLE, "delete": _WHOLE},
        "function clerk.gate_known": {"execute": _WHOLE},
        "function clerk.gate_users": {"execute": _WHOLE},
        "function clerk.gate_deletions": {"execute": _WHOLE},
        # What the gate does, it does as whoever calls it.
        "function clerk.field_hashes": {"execute": _WHOLE},
        "function clerk.can_notify": {"execute": _WHOLE},
        "function clerk.notify_changed": {"execute": _WHOLE},
        "function clerk.compare_users": {"execute": _WHOLE},
        "function clerk.book_api_call": {"execute": _WHOLE},
        "function clerk.block_api_calls": {"execute": _WHOLE},
        "function clerk.run_is_under_way": {"execute": _WHOLE},
    },
)

READER: Final = Role(
    "clerk_reader",
    "for applications: sees the view, and who has changed",
    {
        "schema clerk": {"usage": _WHOLE},
        "clerk.user_metadata": {"select": _WHOLE},
        "function clerk.change_cursor": {"execute": _WHOLE},
        "function clerk.changes_since": {"execute": _WHOLE},
    },
)

WRITER: Final = Role(
    "clerk_writer",
    "for applications: puts users as Clerk has them, and sees nothing",
    {"schema clerk": {"usage": _WHOLE}, "function clerk.put_user": {"execute": _WHOLE}},
)

ROLES: Final = (RECEIVER, WORKER, READER, WRITER)

NOBODYS: Final = frozenset(
    {
        "type clerk.clock",
        # Called by put_user, which is its owner's to do.
        "function clerk.refuse_user",
        "function clerk.compact_bytes",
        "function clerk.field_bytes",
        "function clerk.profile_bytes",
    }
)
"""What no role needs a privilege on."""


# --- Granting

# Whoever may not create roles may still grant to one that is there.
GRANT = """
-- {name}: {purpose}.
do $$
begin
  if not exists (select from pg_roles where rolname = '{name}') then
    begin
      create role {name} nologin;
    exception when duplicate_object or unique_violation then
      null; -- another database of this server made it at the same moment
    end;
  end if;
{grants}{or_else}
end
$$;
"""

# Everybody has it by default, and only the database's owner may give it where that was taken away.
GRANT_ON_DATABASE = """
do $$
begin
  if not has_database_privilege('{name}', current_database(), '{privilege}') then
    execute format('grant {privilege} on database %I to {name}', current_database());
  end if;{or_else}
end
$$;
"""

OR_ELSE = """
exception when insufficient_privilege or undefined_object then
  raise notice '{name} needs an administrator: clerk-sync migrate --roles prints the SQL';"""


def grants(*, forgiving: bool = False) -> str:
    """The SQL that makes the roles and gives each what it needs; it may be run again.

    Where it is `forgiving`, it passes over what the role that runs it may not do.
    """
    return "".join(text for role in ROLES for text in _grants(role, forgiving))


def _grants(role: Role, forgiving: bool) -> Iterator[str]:
    or_else = OR_ELSE.format(name=role.name) if forgiving else ""
    statements = [
        f"grant {_listed(privileges)} on {thing} to {role.name};"
        for thing, privileges in role.needs.items()
        if thing != "database"
    ]
    lines = [textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    ") for text in statements]
    yield GRANT.format(name=role.name, purpose=role.purpose, grants="\n".join(lines), or_else=or_else)
    for privilege in role.needs.get("database", ()):
        yield GRANT_ON_DATABASE.format(name=role.name, privilege=privilege, or_else=or_else)


def _listed(privileges: Privileges) -> str:
    return ", ".join(f"{name} ({', '.join(columns)})" if columns else name for name, columns in privileges.items())


# --- Asking

# By the catalogs, which are everybody's: names are looked up only for who may use their schema. What isn't there at all
# is a matter of the schema's version, and nothing that a role lacks.
ASK = """
select
  pg_is_in_recovery() as standby,
  current_setting('transaction_read_only')::bool as read_only,
  exists (
    select from pg_class
    where relnamespace = (select oid from pg_namespace where nspname = 'clerk') and relname = 'schema_version'
  ) as migrated,
  array(
    select privilege || ' on ' || thing
    from unnest(%(thing)s::text[], %(kind)s::text[], %(name)s::text[], %(privilege)s::text[], %(part)s::text[])
      with ordinality as needed (thing, kind, name, privilege, part, position)
    cross join (select coalesce(%(role)s::name, current_user) as who) as asked
    left join pg_namespace as clerk on clerk.nspname = 'clerk'
    where not case kind
      when 'database' then has_database_privilege(who, current_database(), privilege)
      when 'schema' then has_schema_privilege(who, clerk.oid, privilege)
      when 'function' then has_function_privilege(
        who, (select max(oid) from pg_proc where pronamespace = clerk.oid and proname = name), privilege)
      else (
        select case when part is null then has_table_privilege(who, pg_class.oid, privilege)
          else has_column_privilege(
            who, pg_class.oid, (select attnum from pg_attribute where attrelid = pg_class.oid and attname = part),
            privilege)
          end
        from pg_class
        where relnamespace = clerk.oid and relname = name
      )
    end
    order by position
  ) as lacking
"""


class Asked(NamedTuple):
    """What Postgres answered: whether it takes no writes, being a `standby` or told so; whether there is a schema; and
    what the role lacks, such as "select on clerk.users"."""

    standby: bool
    read_only: bool
    migrated: bool
    lacking: list[str]


def ask(connection: Connection, role: Role, *, as_role: bool = False) -> Asked:
    """Ask what a role's work meets on this database, for whoever is connected; `as_role` for that role itself."""
    rows = [
        (thing, *_kind_and_name(thing), privilege, column)
        for thing, privileges in role.needs.items()
        for privilege, columns in privileges.items()
        for column in columns or (None,)
    ]
    columns = map(list, zip(*rows, strict=True))
    parameters = dict(zip(("thing", "kind", "name", "privilege", "part"), columns, strict=True))
    with connection.cursor(row_factory=class_row(Asked)) as cursor:
        asked = cursor.execute(ASK, {**parameters, "role": role.name if as_role else None}).fetchone()
    assert asked is not None  # noqa: S101 - it has no from clause
    # A privilege on several columns is one that is lacking.
    return asked._replace(lacking=list(dict.fromkeys(asked.lacking)))


def _kind_and_name(thing: str) -> tuple[str, str]:
    kind, _, name = ("table " + thing if thing.startswith("clerk.") else thing).partition(" ")
    return kind, name.removeprefix("clerk.")


THERE = """
select rolname from pg_roles where rolname = any(%(names)s)
"""


def there(connection: Connection) -> list[str]:
    """The roles that are there."""
    names = {name for (name,) in connection.execute(THERE, {"names": [role.name for role in ROLES]})}
    return [role.name for role in ROLES if role.name in names]


def incomplete(connection: Connection) -> list[str]:
    """The roles that aren't there, or lack something that they need."""
    found = there(connection)
    return [role.name for role in ROLES if role.name not in found or ask(connection, role, as_role=True).lacking]


SCHEMA: Final = "schema"
PRIVILEGES: Final = "privileges"
WRITING: Final = "writing"

HIDDEN: Final = "its version can't be read without the privileges that are missing"
STANDBY: Final = "Postgres is a standby, which takes no writes: connect to the primary"
READ_ONLY: Final = (
    "Postgres takes no writes here, since default_transaction_read_only is on: turn it off, or connect elsewhere"
)


def look(connection: Connection, role: Role) -> dict[str, str | None]:
    """What has to hold before a role's work can begin over this connection (SCHEMA, PRIVILEGES, WRITING): each None, or
    what is wrong and what to do. Raises psycopg.Error, also where Postgres falls silent."""
    with deadline(connection, db.ANSWER_SECONDS):
        asked = ask(connection, role)
        readable = not {"usage on schema clerk", "select on clerk.schema_version"} & set(asked.lacking)
        if asked.migrated and not readable:
            schema: str | None = HIDDEN
        else:
            schema = schema_problem(schema_version(connection) if asked.migrated else None)
    privileges = _privileges_problem(role, asked.lacking) if asked.migrated and asked.lacking else None
    writing = STANDBY if asked.standby else READ_ONLY if asked.read_only else None
    return {SCHEMA: schema, PRIVILEGES: privileges, WRITING: writing}


def _privileges_problem(role: Role, lacking: list[str]) -> str:
    return (
        f"this database role lacks {', '.join(lacking)}: grant it {role.name}, which clerk-sync migrate makes "
        "(clerk-sync migrate --roles prints the SQL for an administrator)"
    )


def problems(connection: Connection, role: Role) -> list[str]:
    """Why a role's work can't begin over this connection, each with what to do; empty where it can."""
    return [problem for problem in look(connection, role).values() if problem]
