"""Less work for an event that changes nothing, which most of them are, and for every event in the inbox."""

from migrations.steps import run_sql_beside

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Run the SQL file of the same name."""
    run_sql_beside(__file__)
