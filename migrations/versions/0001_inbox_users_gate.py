"""The inbox, the users with their tombstones, the gate, and the view that applications read."""

from migrations.steps import run_sql_beside

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Run the SQL file of the same name."""
    run_sql_beside(__file__)
