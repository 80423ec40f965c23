"""An index by which applied events that are past their time are found, in place of one that stopped finding them."""

from migrations.steps import run_sql_beside

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Run the SQL file of the same name."""
    run_sql_beside(__file__)
