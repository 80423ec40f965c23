"""What happened in each of the last minutes, for the status page and for alerts."""

from migrations.steps import run_sql_beside

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Run the SQL file of the same name."""
    run_sql_beside(__file__)
