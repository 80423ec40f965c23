"""How one step runs: the plain SQL file beside its Alembic revision, exactly as it reads."""

from pathlib import Path

from alembic import context, op


def run_sql_beside(revision_file: str) -> None:
    """Run (or, with `migrate --sql`, print) the .sql file of the same name as the revision."""
    sql = Path(revision_file).with_suffix(".sql").read_text(encoding="utf-8")
    if context.is_offline_mode():
        context.get_context().impl.static_output(sql)
    else:
        # no_parameters: percent signs and colons in the file mean themselves.
        op.get_bind().exec_driver_sql(sql, execution_options={"no_parameters": True})
