-- The inbox, the users with their tombstones, the gate that every path passes, and the view that applications read.

-- The inbox -------------------------------------------------------------------------------------------------------
-- An acknowledged event stands here before the answer goes out. Its body is kept only until it has been applied.
create table clerk.webhook_events (
  svix_id      text primary key,
  type         text,                      -- null where the body didn't tell
  user_id      text,
  version      bigint,                    -- data.updated_at in ms; the envelope's timestamp where that is missing
  state        text not null default 'pending' check (state in ('pending', 'done', 'dead')),
  attempts     integer not null default 0,
  error        text,                      -- why it is dead: a reason, never a value
  sent_at      timestamptz not null,      -- Svix's clock: when this attempt was signed
  received_at  timestamptz not null default now(),
  processed_at timestamptz,
  body         bytea                      -- as it was sent (a dead body need not be JSON); null once done
) with (
  -- A queue: every row is updated once, soon after it came.
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_insert_scale_factor = 0.05,
  autovacuum_analyze_scale_factor = 0.05
);
create index webhook_events_pending on clerk.webhook_events (received_at) where state = 'pending';
create index webhook_events_dead on clerk.webhook_events (user_id) where state = 'dead';
create index webhook_events_received on clerk.webhook_events using brin (received_at);  -- for pruning

-- The users -------------------------------------------------------------------------------------------------------
-- Clerk's clock for one event: the version first, then the envelope's timestamp; between two events that are equal
-- in both but not in content, the hash makes the same one win on every path and in every order.
create type clerk.clock as (version bigint, event_at bigint, content_hash bigint);

-- One narrow row for each user that Clerk ever told of. Most events (every sign-in) only move its version, so the
-- metadata stands in a table of its own, which such an event doesn't touch.
create table clerk.users (
  user_id         text primary key,
  version         bigint not null check (version between 0 and 253402300799999),    -- data.updated_at in ms
  event_at        bigint not null check (event_at between 0 and 253402300799999),   -- the envelope's timestamp in ms
  content_hash    bigint not null,        -- of all metadata that the event carried, copied or not
  content_changed boolean not null,       -- whether the last event that moved this row changed the content
  -- Null: this kind came with the row's own clock. Otherwise the newest event lacked its key, and this is the clock
  -- of the event that the kind came from; before all time where no event has carried it yet.
  private_clock   clerk.clock,
  public_clock    clerk.clock,
  unsafe_clock    clerk.clock,
  private_copied  boolean not null,
  public_copied   boolean not null,
  unsafe_copied   boolean not null,
  public_bytes    integer not null,       -- compact JSON in UTF-8; known whether or not it is copied
  unsafe_bytes    integer not null,
  claims_bytes    integer not null,
  synced_at       timestamptz not null default now(),
  deleted_at      timestamptz             -- a tombstone: nothing undoes it
) with (
  -- Room in each page, so that moving a version is a HOT update.
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.05
);
create index users_tombstones on clerk.users (deleted_at) where deleted_at is not null;

-- What is copied of each live user. Written only by whoever holds the row in clerk.users.
create table clerk.user_contents (
  user_id          text primary key,
  private_metadata jsonb,                 -- each null: not copied
  public_metadata  jsonb,
  unsafe_metadata  jsonb
);

-- The gate --------------------------------------------------------------------------------------------------------
-- Every path to these tables goes through these two functions: webhooks, pulls and write-through alike.
--
-- gate_users applies users as Clerk had them at p_version: one element of each array for each user, and a user at
-- most once. A kind of metadata is null where its key was absent: our value stays. The p_copy_ flags say whether a
-- kind is kept here. An absent kind counts as {} (2 bytes) in p_claims_bytes. The outcome for each user:
--   applied    the content changed
--   unchanged  the same content: at most the version moved
--   older      what we have came later
--   deleted    the user has a tombstone
create function clerk.gate_users(
  p_user_id text[], p_version bigint[], p_event_at bigint[],
  p_private jsonb[], p_public jsonb[], p_unsafe jsonb[],
  p_copy_private boolean[], p_copy_public boolean[], p_copy_unsafe boolean[],
  p_public_bytes integer[], p_unsafe_bytes integer[], p_claims_bytes integer[]
) returns table (user_id text, outcome text)
language plpgsql as $$
#variable_conflict use_column
declare
  never constant clerk.clock := (-1, -1, 0);
  -- Of the text: jsonb holds 1.0 and 1 to be equal, but what was sent is what comes back.
  hashes constant bigint[] := array(
    select hashtextextended(
      concat_ws(' ', coalesce(private::text, '-'), coalesce(public::text, '-'), coalesce(unsafe::text, '-')), 0)
    from unnest(p_private, p_public, p_unsafe) with ordinality as event (private, public, unsafe, position)
    order by position
  );
  changed text[]; -- users whose content is to be written
  bumped  text[]; -- users whose version alone has moved
begin
  with moved as (
    insert into clerk.users as old (
      user_id, version, event_at, content_hash, content_changed,
      private_clock, public_clock, unsafe_clock,
      private_copied, public_copied, unsafe_copied,
      public_bytes, unsafe_bytes, claims_bytes
    )
    select
      user_id, version, event_at, content_hash, true,
      case when private is null then never end,
      case when public is null then never end,
      case when unsafe is null then never end,
      copy_private, copy_public, copy_unsafe,
      coalesce(public_bytes, 2), coalesce(unsafe_bytes, 2), claims_bytes
    from unnest(
      p_user_id, p_version, p_event_at, hashes, p_private, p_public, p_unsafe,
      p_copy_private, p_copy_public, p_copy_unsafe, p_public_bytes, p_unsafe_bytes, p_claims_bytes
    ) as event (
      user_id, version, event_at, content_hash, private, public, unsafe,
      copy_private, copy_public, copy_unsafe, public_bytes, unsafe_bytes, claims_bytes
    )
    order by user_id collate "C" -- every worker locks in this order, so that none waits for another in a circle
    on conflict (user_id) do update set (
      version, event_at, content_hash, content_changed,
      private_clock, public_clock, unsafe_clock,
      private_copied, public_copied, unsafe_copied,
      public_bytes, unsafe_bytes, claims_bytes, synced_at
    ) = (
      select
        case when newest then excluded.version else old.version end,
        case when newest then excluded.event_at else old.event_at end,
        case when newest then excluded.content_hash else old.content_hash end,
        changes,
        -- A kind taken from an event that isn't the newest remembers where it came from; so does one that stays
        -- behind when the row moves on without it.
        case when takes_private then case when event < stored then event end
          when newest then coalesce(old.private_clock, stored) else old.private_clock end,
        case when takes_public then case when event < stored then event end
          when newest then coalesce(old.public_clock, stored) else old.public_clock end,
        case when takes_unsafe then case when event < stored then event end
          when newest then coalesce(old.unsafe_clock, stored) else old.unsafe_clock end,
        case when takes_private then excluded.private_copied else old.private_copied end,
        case when takes_public then excluded.public_copied else old.public_copied end,
        case when takes_unsafe then excluded.unsafe_copied else old.unsafe_copied end,
        case when takes_public then excluded.public_bytes else old.public_bytes end,
        case when takes_unsafe then excluded.unsafe_bytes else old.unsafe_bytes end,
        case when newest then
            excluded.claims_bytes
            + case when excluded.public_clock is null then 0 else old.public_bytes - 2 end
            + case when excluded.unsafe_clock is null then 0 else old.unsafe_bytes - 2 end
          else
            old.claims_bytes
            + case when takes_public then excluded.public_bytes - old.public_bytes else 0 end
            + case when takes_unsafe then excluded.unsafe_bytes - old.unsafe_bytes else 0 end
          end,
        case when changes or excluded.version > old.version then now() else old.synced_at end
      from (
        select
          *,
          event > stored as newest,
          excluded.private_clock is null and event >= coalesce(old.private_clock, stored) as takes_private,
          excluded.public_clock is null and event >= coalesce(old.public_clock, stored) as takes_public,
          excluded.unsafe_clock is null and event >= coalesce(old.unsafe_clock, stored) as takes_unsafe,
          excluded.content_hash <> old.content_hash
            or (excluded.private_copied, excluded.public_copied, excluded.unsafe_copied)
              <> (old.private_copied, old.public_copied, old.unsafe_copied) as changes
        from (
          select
            (excluded.version, excluded.event_at, excluded.content_hash)::clerk.clock as event,
            (old.version, old.event_at, old.content_hash)::clerk.clock as stored
        ) as clocks
      ) as decision
    )
    where old.deleted_at is null and (
      (excluded.version, excluded.event_at, excluded.content_hash)
        > (old.version, old.event_at, old.content_hash)
      -- the same event, with another decision on what is copied
      or (excluded.version, excluded.event_at, excluded.content_hash)
          = (old.version, old.event_at, old.content_hash)
        and (excluded.private_copied, excluded.public_copied, excluded.unsafe_copied)
          <> (old.private_copied, old.public_copied, old.unsafe_copied)
      -- an older event, with a kind that the newer ones lacked
      or excluded.private_clock is null
        and (excluded.version, excluded.event_at, excluded.content_hash)::clerk.clock > old.private_clock
      or excluded.public_clock is null
        and (excluded.version, excluded.event_at, excluded.content_hash)::clerk.clock > old.public_clock
      or excluded.unsafe_clock is null
        and (excluded.version, excluded.event_at, excluded.content_hash)::clerk.clock > old.unsafe_clock
    )
    returning old.user_id, old.content_changed
  )
  select
    coalesce(array_agg(user_id) filter (where content_changed), '{}'),
    coalesce(array_agg(user_id) filter (where not content_changed), '{}')
  into changed, bumped
  from moved;

  -- A statement of its own, so that it sees what was committed while the rows above were waited for. They are locked
  -- now, and nobody writes a content without that lock.
  if changed <> '{}' then
    insert into clerk.user_contents (user_id, private_metadata, public_metadata, unsafe_metadata)
    select
      user_id,
      case
        when private is not null and coalesce(now_is.private_clock, newest) = event_clock then
          case when copy_private then private end
        when was.user_id is null then case when copy_private then '{}'::jsonb end
        else was.private_metadata
      end,
      case
        when public is not null and coalesce(now_is.public_clock, newest) = event_clock then
          case when copy_public then public end
        else was.public_metadata
      end,
      case
        when unsafe is not null and coalesce(now_is.unsafe_clock, newest) = event_clock then
          case when copy_unsafe then unsafe end
        else was.unsafe_metadata
      end
    from unnest(
      p_user_id, p_version, p_event_at, hashes, p_private, p_public, p_unsafe,
      p_copy_private, p_copy_public, p_copy_unsafe
    ) as event (
      user_id, version, event_at, content_hash, private, public, unsafe, copy_private, copy_public, copy_unsafe
    )
    join clerk.users as now_is using (user_id)
    left join clerk.user_contents as was using (user_id)
    cross join lateral (
      select
        (event.version, event.event_at, event.content_hash)::clerk.clock as event_clock,
        (now_is.version, now_is.event_at, now_is.content_hash)::clerk.clock as newest
    ) as clocks
    where user_id = any(changed)
    on conflict (user_id) do update set
      private_metadata = excluded.private_metadata,
      public_metadata = excluded.public_metadata,
      unsafe_metadata = excluded.unsafe_metadata;
  end if;

  return query
  select
    event.user_id,
    case
      when event.user_id = any(changed) then 'applied'
      when event.user_id = any(bumped) then 'unchanged'
      when users.deleted_at is not null then 'deleted'
      when (users.version, users.content_hash) = (event.version, event.content_hash) then 'unchanged'
      else 'older'
    end
  from unnest(p_user_id, p_version, hashes) as event (user_id, version, content_hash)
  join clerk.users on users.user_id = event.user_id;
end
$$;

-- gate_deletions leaves tombstones and erases what we keep of the users, events set aside included. Events that are
-- still pending meet the tombstone and lose their bodies when they are drained. The earliest known deletion is the
-- one that stays, so repeated ones change nothing. The outcome for each user: deleted, or unchanged where there was
-- a tombstone already.
create function clerk.gate_deletions(p_user_id text[], p_event_at bigint[])
returns table (user_id text, outcome text)
language plpgsql as $$
#variable_conflict use_column
declare
  tombstones constant text[] := array(
    select user_id from clerk.users where user_id = any(p_user_id) and deleted_at is not null
  );
begin
  insert into clerk.users as old (
    user_id, version, event_at, content_hash, content_changed, private_copied, public_copied, unsafe_copied,
    public_bytes, unsafe_bytes, claims_bytes, deleted_at
  )
  select
    user_id, event_at, event_at, 0, true, false, false, false,
    0, 0, 0, to_timestamp(event_at / 1000.0)
  from unnest(p_user_id, p_event_at) as event (user_id, event_at)
  order by user_id collate "C"
  on conflict (user_id) do update set
    version = excluded.version, event_at = excluded.event_at, content_hash = 0, content_changed = true,
    private_clock = null, public_clock = null, unsafe_clock = null,
    private_copied = false, public_copied = false, unsafe_copied = false,
    public_bytes = 0, unsafe_bytes = 0, claims_bytes = 0,
    synced_at = now(), deleted_at = excluded.deleted_at
  where old.deleted_at is null or old.deleted_at > excluded.deleted_at;

  delete from clerk.user_contents where user_id = any(p_user_id);

  update clerk.webhook_events
  set state = 'done', body = null, error = 'the user was deleted', processed_at = now()
  where user_id = any(p_user_id) and state = 'dead';

  return query
  select user_id, case when user_id = any(tombstones) then 'unchanged' else 'deleted' end
  from unnest(p_user_id) as event (user_id);
end
$$;

-- What applications read ------------------------------------------------------------------------------------------
create view clerk.user_metadata as
select
  users.user_id,
  user_contents.private_metadata,
  user_contents.public_metadata,
  user_contents.unsafe_metadata,
  users.claims_bytes,
  to_timestamp(users.version / 1000.0) as updated_at,
  users.synced_at
from clerk.users
join clerk.user_contents using (user_id)
where users.deleted_at is null;

comment on view clerk.user_metadata is
  'One row for each live Clerk user. public_metadata and unsafe_metadata are null where the session token carries them.';

revoke all on all functions in schema clerk from public;

-- The role for applications: it sees the view and nothing else. Where this role may not be made here, an
-- administrator makes it, and runs the two grants.
do $$
begin
  if not exists (select from pg_roles where rolname = 'clerk_reader') then
    create role clerk_reader nologin;
  end if;
exception
  when insufficient_privilege then
    raise notice 'role clerk_reader was not made: this role may not create roles';
  when duplicate_object or unique_violation then
    null; -- another database of this server made it at the same moment
end
$$;
do $$
begin
  if exists (select from pg_roles where rolname = 'clerk_reader') then
    grant usage on schema clerk to clerk_reader;
    grant select on clerk.user_metadata to clerk_reader;
  end if;
end
$$;
