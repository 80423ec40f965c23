-- The runs of the commands that pull from Clerk: how far each came, so that one that was cut short goes on there.

create table clerk.runs (
  id          bigint generated always as identity primary key,
  kind        text not null,              -- backfill
  state       text not null default 'running' check (state in ('running', 'done', 'failed')),
  started_at  timestamptz not null default now(),
  finished_at timestamptz,                -- when it was done or failed; a failed one may go on
  cursor      jsonb,                      -- where it is, committed with the users before that; null: at the beginning
  counters    jsonb not null default '{}',
  unusable    jsonb not null default '[]', -- ids and reasons of the first ones, never a value
  calls       integer not null default 0, -- to Clerk's API
  error       text                        -- why it failed: a reason, never a value
);
-- A run whose process was killed stays 'running'; whether one is, an advisory lock tells.
create index runs_latest on clerk.runs (kind, id desc);
