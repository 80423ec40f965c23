"""The runs that pull from Clerk, and how our users compare with what Clerk has."""

from migrations.steps import run_sql_beside

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Run the SQL file of the same name."""
    run_sql_beside(__file__)
