"""unit: no I/O. integration: real Postgres and a real Redis-compatible server. acceptance: the Procfile's processes."""
