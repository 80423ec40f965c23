"""For applications: putting a user, change notices, and the changes since a cursor."""

from migrations.steps import run_sql_beside

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Run the SQL file of the same name."""
    run_sql_beside(__file__)
