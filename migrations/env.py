"""Alembic's entry: one transaction for all pending steps and the grants, under a lock that several hosts share.

The lock is released with the transaction, so nothing is left behind by a run that was killed.
"""

from typing import Any

from alembic import context

# "clerk-sync" in digits; any constant that no other program takes would do.
ADVISORY_LOCK = 0x636C65726B73796E

VERSION_TABLE = "schema_version"

# What others made in `public` is not to be run by whoever migrates.
SEARCH_PATH = "set local search_path = ''"


def _run() -> None:
    options: dict[str, Any] = {"version_table": VERSION_TABLE, "version_table_schema": "clerk"}
    if context.is_offline_mode():
        context.configure(dialect_name="postgresql", as_sql=True, literal_binds=True, **options)
        with context.begin_transaction():
            context.get_context().impl.static_output(SEARCH_PATH + ";")
            context.get_context().impl.static_output("create schema if not exists clerk;")
            context.run_migrations()
            context.get_context().impl.static_output(context.config.attributes["grants"])
        return
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, **options)
    with context.begin_transaction():
        # Another host that migrates is waited for; a table in use by a long query isn't: better to fail
        # and be tried again than to queue every reader behind this lock.
        connection.exec_driver_sql(SEARCH_PATH)
        connection.exec_driver_sql("set local lock_timeout = '120s'")
        connection.exec_driver_sql(f"select pg_advisory_xact_lock({ADVISORY_LOCK})")
        connection.exec_driver_sql("set local lock_timeout = '4s'")
        connection.exec_driver_sql("create schema if not exists clerk")
        # Read under the lock: whoever waited for another host finds its work done.
        context.config.attributes["before"] = context.get_context().get_current_revision()
        context.run_migrations()
        # With each run: a role may have been made since the last one, and a newer code may need more.
        connection.exec_driver_sql(context.config.attributes["grants"], execution_options={"no_parameters": True})


_run()
