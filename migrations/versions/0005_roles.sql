-- Nothing of ours is everybody's by default. What each role may do is written in one place, worker/roles.py, and granted
-- after the steps, by every run of clerk-sync migrate.

revoke all on all tables in schema clerk from public;
revoke all on all routines in schema clerk from public;
revoke all on type clerk.clock from public;
