"""Everything that is true without HTTP: what an event means, what is copied, and how it reaches Postgres."""
