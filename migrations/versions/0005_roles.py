"""Nothing of ours is everybody's by default; what each role may do, `clerk-sync migrate` grants after the steps."""

from migrations.steps import run_sql_beside

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Run the SQL file of the same name."""
    run_sql_beside(__file__)
