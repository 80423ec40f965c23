-- The runs that pull from Clerk: what each covered, how far it came, and what it did.

create table clerk.runs (
  id          bigint generated always as identity primary key,
  kind        text not null check (kind in ('backfill', 'full', 'incremental')),
  cause       text not null,              -- asked, periodic, daily, first, small, many, counts
  state       text not null default 'running' check (state in ('running', 'done', 'failed')),
  started_at  timestamptz not null default now(),
  finished_at timestamptz,                -- when it was done or failed; a failed backfill may go on
  covers      bigint,                     -- Clerk's clock (ms): a run that is done has compared every user updated before
  cursor      jsonb,                      -- where a backfill is, committed with the users before that
  counters    jsonb not null default '{}',
  unusable    jsonb not null default '[]', -- ids and reasons of the first ones, never a value
  calls       integer not null default 0, -- to Clerk's API
  error       text                        -- why it failed: a reason, never a value
);
-- A run whose process was killed stays 'running' until the next one begins; whether one is, an advisory lock tells.
create index runs_latest on clerk.runs (kind, id desc);

-- run_is_under_way tells whether somebody holds the advisory lock of all runs (1668048242 is "cler" in ASCII).
create function clerk.run_is_under_way() returns boolean
language sql stable as $$
  select exists (
    select from pg_locks
    where locktype = 'advisory' and classid = 1668048242 and objid = 1 and objsubid = 2 and granted
      and database = (select oid from pg_database where datname = current_database())
  )
$$;

-- compare_users tells how users stand here, without writing: one element of each array for each user, as Clerk has
-- them. p_weighed_by is the fingerprint of the settings they are to be weighed by. The difference for each user:
--   missing     there is no row
--   tombstoned  the user was deleted here, which is for ever
--   newer       what is here came later
--   outdated    what is here is older, or differs
--   incomplete  a kind of metadata is to be kept that isn't here
--   unweighed   only the weights, or the decision what is copied, are of other settings
--   same
create function clerk.compare_users(
  p_user_id text[], p_version bigint[], p_private jsonb[], p_public jsonb[], p_unsafe jsonb[], p_weighed_by bigint
) returns table (user_id text, difference text)
language sql stable as $$
  select
    event.user_id,
    case
      when users.user_id is null then 'missing'
      when users.deleted_at is not null then 'tombstoned'
      -- What is newer here may have come without a kind that this brings.
      when users.version > event.version
        and (event.private is not null and (users.private_clock).version < event.version
          or event.public is not null and (users.public_clock).version < event.version
          or event.unsafe is not null and (users.unsafe_clock).version < event.version) then 'incomplete'
      when users.version > event.version then 'newer'
      when users.version < event.version then 'outdated'
      -- The same hash as the gate's.
      when users.content_hash <> hashtextextended(
        concat_ws(' ',
          coalesce(event.private::text, '-'), coalesce(event.public::text, '-'), coalesce(event.unsafe::text, '-')),
        0) then 'outdated'
      when users.content_missing then 'incomplete'
      when users.weighed_by is distinct from p_weighed_by or not users.claims_exact or users.profile_bytes is null
        then 'unweighed'
      else 'same'
    end
  from unnest(p_user_id, p_version, p_private, p_public, p_unsafe)
    as event (user_id, version, private, public, unsafe)
  left join clerk.users on users.user_id = event.user_id
$$;

revoke all on function clerk.run_is_under_way, clerk.compare_users from public;
