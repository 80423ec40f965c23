"""The schema's history: one plain SQL file a step in `versions/`, run in order by Alembic."""
