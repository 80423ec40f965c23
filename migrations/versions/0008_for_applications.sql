-- For applications: put_user writes a user through the gate, notices tell what has changed, and changes_since tells it to
-- whoever was away.

-- Locked at once, and before clerk.users, so that no worker is in mid-batch: see the step before.
lock table clerk.webhook_events in access exclusive mode;

-- Whom put_user brought, until a worker has weighed them.
create index users_unweighed on clerk.users (user_id) where weighed_by is null and not claims_exact and deleted_at is null;

alter table clerk.user_contents
  -- Of a kind that isn't copied a hash of its text, and what field_hashes makes of it: so that the names of changed fields
  -- can be told.
  add column public_hash   integer,
  add column unsafe_hash   integer,
  add column public_hashes jsonb,
  add column unsafe_hashes jsonb;

-- A row for each change of what the view shows of a user, in the order in which they are written. Kept as long as applied
-- events are. A column and an index among the users would make every change write to all of their indexes.
create table clerk.changes (
  changed_in xid8 not null default pg_current_xact_id(),  -- the transaction
  user_id    text not null,
  changed_at timestamptz not null default now()           -- when it began, for pruning
) with (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
create index changes_in_order on clerk.changes (changed_in);

create table clerk.changes_pruned (
  the_only boolean primary key default true check (the_only),
  until    xid8 not null -- changes of this transaction and of earlier ones may be gone
);
insert into clerk.changes_pruned (until) values ('0');

-- Which kinds are copied of a user who hasn't been weighed: told by each worker as it begins, and needed by put_user.
create table clerk.policy (
  the_only     boolean primary key default true check (the_only),
  copy_private boolean not null,
  copy_public  boolean not null,
  copy_unsafe  boolean not null
);

-- What has changed --------------------------------------------------------------------------------------------------
-- field_hashes gives a hash of the value of each top-level field. Of the text, as everywhere: 1.0 and 1 differ.
create function clerk.field_hashes(metadata jsonb) returns jsonb
language plpgsql immutable strict parallel safe as $$
declare
  hashes jsonb := metadata;
begin
  if metadata <> '{}' then
    select jsonb_object_agg(key, hashtext(value::text)) into hashes from jsonb_each(metadata);
  end if;
  return hashes;
end
$$;

-- notify_changed sends the notice, which goes out with the commit. Names that aren't known, or don't fit into a notice,
-- which takes less than 8,000 bytes, are left out.
create function clerk.notify_changed(p_user_id text, p_version bigint, p_deleted boolean, p_changed jsonb) returns void
language plpgsql as $$
declare
  notice jsonb := jsonb_build_object(
    'user_id', p_user_id, 'version', p_version, 'deleted', p_deleted, 'changed', p_changed);
begin
  if octet_length(notice::text) >= 8000 then
    notice := jsonb_set(notice, '{changed}', 'null');
  end if;
  perform pg_notify('clerk_user_changed', notice::text);
end
$$;

-- can_notify says whether there is room for notices. Postgres keeps them for every listener, and refuses the commit once it
-- can't: rather than that, whoever sleeps in a transaction misses some, and so do the others; changes_since has them all.
create function clerk.can_notify() returns boolean
language plpgsql stable as $$
begin
  return pg_notification_queue_usage() < 0.5;
end
$$;

-- The gate ----------------------------------------------------------------------------------------------------------
-- gate_users applies users as Clerk had them at p_version: one element of each array for each user, and a user at
-- most once. A kind of metadata is null where its key was absent: our value stays. The p_copy_ flags say whether a
-- kind is kept here. p_profile_bytes are array literals, since an array of arrays can't be taken apart by row.
-- p_sent_hash is what gate_known compares. p_budget and p_weighed_by are those of the policy that weighed and decided;
-- without p_weighed_by p_claims_bytes is nobody's weight, counts for new users only, and a worker is to weigh them all.
-- Whoever listens is told of contents that changed. The outcome for each user:
--   applied    the content changed
--   unchanged  the same content: at most the version or the weights moved
--   older      what we have came later
--   deleted    the user has a tombstone
-- crossed: this took the user's claims over the budget. unweighed: the row now has kinds of several events, so that
-- the weight of its claims has to be reckoned from the sizes that are kept.
create or replace function clerk.gate_users(
  p_user_id text[], p_version bigint[], p_event_at bigint[],
  p_private jsonb[], p_public jsonb[], p_unsafe jsonb[],
  p_copy_private boolean[], p_copy_public boolean[], p_copy_unsafe boolean[],
  p_profile_bytes text[], p_public_bytes integer[], p_unsafe_bytes integer[],
  p_public_fields jsonb[], p_unsafe_fields jsonb[],
  p_claims_bytes integer[], p_sent_hash bytea[], p_budget integer, p_weighed_by bigint
) returns table (user_id text, outcome text, crossed boolean, unweighed boolean)
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
  -- Of each user whom this has moved: whether the content is to be written (otherwise the version or the weights alone
  -- have moved), whether they crossed the budget, and whether their row has kinds of several events.
  moved text[];
  changed boolean[];
  over boolean[];
  partial boolean[];
  noticed bigint;
begin
  with written as (
    insert into clerk.users as old (
      user_id, version, event_at, content_hash, content_changed,
      private_clock, public_clock, unsafe_clock,
      private_copied, public_copied, unsafe_copied,
      profile_bytes, public_bytes, unsafe_bytes, public_fields, unsafe_fields,
      claims_bytes, claims_exact, sent_hash, weighed_by, over_budget, crossed
    )
    select
      user_id, version, event_at, content_hash, true,
      case when private is null then never end,
      case when public is null then never end,
      case when unsafe is null then never end,
      copy_private, copy_public, copy_unsafe,
      profile_bytes::integer[], coalesce(public_bytes, 2), coalesce(unsafe_bytes, 2),
      coalesce(public_fields, '{}'), coalesce(unsafe_fields, '{}'),
      claims_bytes,
      p_weighed_by is not null,
      case when private is not null and public is not null and unsafe is not null then sent_hash end,
      case when public is not null and unsafe is not null then p_weighed_by end,
      public is not null and unsafe is not null and claims_bytes > p_budget,
      public is not null and unsafe is not null and claims_bytes > p_budget
    from unnest(
      p_user_id, p_version, p_event_at, hashes, p_private, p_public, p_unsafe,
      p_copy_private, p_copy_public, p_copy_unsafe,
      p_profile_bytes, p_public_bytes, p_unsafe_bytes, p_public_fields, p_unsafe_fields, p_claims_bytes, p_sent_hash
    ) as event (
      user_id, version, event_at, content_hash, private, public, unsafe,
      copy_private, copy_public, copy_unsafe,
      profile_bytes, public_bytes, unsafe_bytes, public_fields, unsafe_fields, claims_bytes, sent_hash
    )
    order by user_id collate "C" -- every worker locks in this order, so that none waits for another in a circle
    on conflict (user_id) do update set (
      version, event_at, content_hash, content_changed,
      private_clock, public_clock, unsafe_clock,
      private_copied, public_copied, unsafe_copied,
      profile_bytes, public_bytes, unsafe_bytes, public_fields, unsafe_fields,
      claims_bytes, claims_exact, sent_hash, weighed_by, over_budget, crossed, content_missing, synced_at
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
        -- Not known where a user was put without any of it.
        case when event >= stored then coalesce(excluded.profile_bytes, old.profile_bytes) else old.profile_bytes end,
        case when takes_public then excluded.public_bytes else old.public_bytes end,
        case when takes_unsafe then excluded.unsafe_bytes else old.unsafe_bytes end,
        -- The same content has the same fields: the stored ones stay, which may be large.
        case when takes_public and (changes or old.public_fields is null)
          then excluded.public_fields else old.public_fields end,
        case when takes_unsafe and (changes or old.unsafe_fields is null)
          then excluded.unsafe_fields else old.unsafe_fields end,
        -- Of a row with kinds of several events the claims are still to be weighed.
        case when weighed then excluded.claims_bytes else old.claims_bytes end,
        p_weighed_by is not null and (whole or old.claims_exact),
        case when whole then excluded.sent_hash end,
        case when whole then excluded.weighed_by end,
        case when weighed then excluded.over_budget else old.over_budget end,
        weighed and excluded.over_budget and not old.over_budget,
        -- Of a row with kinds of several events this is still to be found out, but for private metadata alone.
        case when whole then excluded.private_clock is not null and excluded.private_copied and not old.private_copied
          else old.content_missing end,
        case when changes or excluded.version > old.version then now() else old.synced_at end
      from (
        select
          *,
          whole and p_weighed_by is not null as weighed,
          excluded.content_hash <> old.content_hash
            or takes_private and excluded.private_copied <> old.private_copied
            or takes_public and excluded.public_copied <> old.public_copied
            or takes_unsafe and excluded.unsafe_copied <> old.unsafe_copied as changes
        from (
          select
            *,
            event > stored as newest,
            excluded.private_clock is null and event >= coalesce(old.private_clock, stored) as takes_private,
            excluded.public_clock is null and event >= coalesce(old.public_clock, stored) as takes_public,
            excluded.unsafe_clock is null and event >= coalesce(old.unsafe_clock, stored) as takes_unsafe,
            event >= stored and excluded.public_clock is null and excluded.unsafe_clock is null as whole
          from (
            select
              (
                excluded.version,
                -- The same content of the same version is the same event, whenever it was sent.
                case when excluded.version = old.version and excluded.content_hash = old.content_hash
                  then greatest(excluded.event_at, old.event_at) else excluded.event_at end,
                excluded.content_hash
              )::clerk.clock as event,
              (old.version, old.event_at, old.content_hash)::clerk.clock as stored
            offset 0 -- reckoned once for each row, not wherever it is used
          ) as clocks
        ) as taken
      ) as decision
    )
    where old.deleted_at is null and (
      (excluded.version, excluded.event_at, excluded.content_hash)
        > (old.version, old.event_at, old.content_hash)
      -- the same event, weighed by another policy or with another decision on what is copied
      or (excluded.version, excluded.content_hash) = (old.version, old.content_hash)
        and excluded.weighed_by is not null
        and (
          (excluded.private_copied, excluded.public_copied, excluded.unsafe_copied)
            <> (old.private_copied, old.public_copied, old.unsafe_copied)
          or excluded.weighed_by is distinct from old.weighed_by
          or old.content_missing
          or not old.claims_exact
          or old.profile_bytes is null
        )
      -- the same event, brought without a weight, with what is to be kept and isn't here
      or (excluded.version, excluded.content_hash) = (old.version, old.content_hash)
        and p_weighed_by is null and old.content_missing
      -- an older event, with a kind that the newer ones lacked
      or excluded.private_clock is null
        and (excluded.version, excluded.event_at, excluded.content_hash)::clerk.clock > old.private_clock
      or excluded.public_clock is null
        and (excluded.version, excluded.event_at, excluded.content_hash)::clerk.clock > old.public_clock
      or excluded.unsafe_clock is null
        and (excluded.version, excluded.event_at, excluded.content_hash)::clerk.clock > old.unsafe_clock
    )
    returning old.user_id, old.content_changed, old.crossed, old.weighed_by
  )
  select
    coalesce(array_agg(user_id), '{}'), array_agg(content_changed), array_agg(crossed), array_agg(weighed_by is null)
  into moved, changed, over, partial
  from written;

  -- A statement of its own, so that it sees what was committed while the rows above were waited for. They are locked
  -- now, and nobody writes a content without that lock.
  if true = any(changed) then
    with fresh as materialized (
      select
        user_id,
        now_is.version,
        was.user_id is null as is_new,
        was.public_metadata is not null and copy_public as both_public, -- here, before and after
        was.unsafe_metadata is not null and copy_unsafe as both_unsafe,
        was.private_metadata as was_private,
        was.public_metadata as was_public,
        was.unsafe_metadata as was_unsafe,
        was.public_hash as was_public_hash,
        was.unsafe_hash as was_unsafe_hash,
        was.public_hashes as was_public_hashes,
        was.unsafe_hashes as was_unsafe_hashes,
        case
          when takes_private then case when copy_private then private end
          when was.user_id is null then case when copy_private then '{}'::jsonb end
          else was.private_metadata
        end as private_metadata,
        case when takes_public then case when copy_public then public end else was.public_metadata end as public_metadata,
        case when takes_unsafe then case when copy_unsafe then unsafe end else was.unsafe_metadata end as unsafe_metadata,
        case
          when takes_public then case when not copy_public then hashtext(public::text) end
          when was.user_id is null then hashtext('{}')
          else was.public_hash
        end as public_hash,
        case
          when takes_unsafe then case when not copy_unsafe then hashtext(unsafe::text) end
          when was.user_id is null then hashtext('{}')
          else was.unsafe_hash
        end as unsafe_hash,
        -- The same hash is of the same text.
        case
          when takes_public then case
            when copy_public then null
            when was.public_hash = hashtext(public::text) then was.public_hashes
            else clerk.field_hashes(public)
          end
          when was.user_id is null then '{}'
          else was.public_hashes
        end as public_hashes,
        case
          when takes_unsafe then case
            when copy_unsafe then null
            when was.unsafe_hash = hashtext(unsafe::text) then was.unsafe_hashes
            else clerk.field_hashes(unsafe)
          end
          when was.user_id is null then '{}'
          else was.unsafe_hashes
        end as unsafe_hashes,
        takes_private,
        takes_public,
        takes_unsafe,
        -- What was here before hashes were kept can't be compared.
        was.user_id is not null
          and (takes_public and coalesce(was.public_metadata, was.public_hashes) is null
            or takes_unsafe and coalesce(was.unsafe_metadata, was.unsafe_hashes) is null) as is_unknown
      from unnest(
        p_user_id, p_version, p_event_at, hashes, p_private, p_public, p_unsafe,
        p_copy_private, p_copy_public, p_copy_unsafe
      ) as event (
        user_id, version, event_at, content_hash, private, public, unsafe, copy_private, copy_public, copy_unsafe
      )
      join (
        select user_id from unnest(moved, changed) as one (user_id, is_changed) where is_changed
      ) as written using (user_id)
      join clerk.users as now_is using (user_id)
      left join clerk.user_contents as was using (user_id)
      cross join lateral (
        select
          case when (event.version, event.content_hash) = (now_is.version, now_is.content_hash)
            then (now_is.version, now_is.event_at, now_is.content_hash)::clerk.clock
            else (event.version, event.event_at, event.content_hash)::clerk.clock end as event_clock,
          (now_is.version, now_is.event_at, now_is.content_hash)::clerk.clock as newest
      ) as clocks
      cross join lateral (
        select
          private is not null and coalesce(now_is.private_clock, newest) = event_clock as takes_private,
          public is not null and coalesce(now_is.public_clock, newest) = event_clock as takes_public,
          unsafe is not null and coalesce(now_is.unsafe_clock, newest) = event_clock as takes_unsafe
      ) as taken
    ),
    stored as (
      insert into clerk.user_contents (
        user_id, private_metadata, public_metadata, unsafe_metadata, public_hash, unsafe_hash, public_hashes, unsafe_hashes
      )
      select
        user_id, private_metadata, public_metadata, unsafe_metadata, public_hash, unsafe_hash, public_hashes, unsafe_hashes
      from fresh
      on conflict (user_id) do update set
        private_metadata = excluded.private_metadata,
        public_metadata = excluded.public_metadata,
        unsafe_metadata = excluded.unsafe_metadata,
        public_hash = excluded.public_hash,
        unsafe_hash = excluded.unsafe_hash,
        public_hashes = excluded.public_hashes,
        unsafe_hashes = excluded.unsafe_hashes
    ),
    logged as (
      insert into clerk.changes (user_id) select user_id from fresh
    )
    select count(clerk.notify_changed(user_id, version, false, case when not is_unknown then coalesce(fields, '{}') end))
    into noticed
    from fresh
    cross join lateral (
      select jsonb_object_agg(kind, names) filter (where names is not null) as fields
      from (
        values
          -- Where it wasn't here, or isn't any more, the settings have changed.
          (
            'private_metadata', takes_private and private_metadata is not null and (is_new or was_private is not null),
            was_private, private_metadata
          ),
          (
            'public_metadata', takes_public and (is_new or both_public or public_hash is distinct from was_public_hash),
            case when both_public then was_public else coalesce(was_public_hashes, clerk.field_hashes(was_public)) end,
            case when both_public then public_metadata else coalesce(public_hashes, clerk.field_hashes(public_metadata)) end
          ),
          (
            'unsafe_metadata', takes_unsafe and (is_new or both_unsafe or unsafe_hash is distinct from was_unsafe_hash),
            case when both_unsafe then was_unsafe else coalesce(was_unsafe_hashes, clerk.field_hashes(was_unsafe)) end,
            case when both_unsafe then unsafe_metadata else coalesce(unsafe_hashes, clerk.field_hashes(unsafe_metadata)) end
          )
      ) as kinds (kind, may_differ, was, now_is)
      cross join lateral (
        -- By the text, as everywhere: 1.0 and 1 differ.
        select jsonb_agg(name order by name collate "C") as names
        from jsonb_each(coalesce(was, '{}')) as before (name, value)
        full join jsonb_each(coalesce(now_is, '{}')) as after (name, value) using (name)
        where before.value::text is distinct from after.value::text
      ) as differing
      where may_differ
    ) as compared
    where (is_new or is_unknown or fields is not null) and clerk.can_notify();
  end if;

  -- A full join, since Postgres can't do it by comparing each with each: of how many elements an array has it only knows
  -- once it has made its plan.
  return query
  select
    event.user_id,
    case
      when written.is_changed then 'applied'
      when not written.is_changed then 'unchanged'
      else (
        select
          case
            when users.deleted_at is not null then 'deleted'
            when (users.version, users.content_hash) = (event.version, event.content_hash) then 'unchanged'
            else 'older'
          end
        from clerk.users
        where users.user_id = event.user_id
      )
    end,
    coalesce(written.has_crossed, false),
    coalesce(written.is_partial, false)
  from unnest(p_user_id, p_version, hashes) as event (user_id, version, content_hash)
  full join unnest(moved, changed, over, partial) as written (user_id, is_changed, has_crossed, is_partial)
    using (user_id);
end
$$;

-- gate_deletions leaves tombstones and erases what we keep of the users, events set aside included. Whoever listens is
-- told of those who were live. Events that are
-- still pending meet the tombstone and lose their bodies when they are drained. The earliest known deletion is the
-- one that stays, so repeated ones change nothing. The outcome for each user: deleted, or unchanged where there was
-- a tombstone already.
create or replace function clerk.gate_deletions(p_user_id text[], p_event_at bigint[])
returns table (user_id text, outcome text)
language plpgsql as $$
#variable_conflict use_column
declare
  tombstones constant text[] := array(
    select user_id from clerk.users where user_id = any(p_user_id) and deleted_at is not null
  );
  noticed bigint;
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
    sent_hash = null, profile_bytes = null, public_bytes = 0, unsafe_bytes = 0, public_fields = null, unsafe_fields = null,
    claims_bytes = 0, claims_exact = true, weighed_by = null, over_budget = false, crossed = false, content_missing = false,
    synced_at = now(), deleted_at = excluded.deleted_at
  where old.deleted_at is null or old.deleted_at > excluded.deleted_at;

  -- Everybody live has one of these, so those who are told of were live.
  with gone as (
    delete from clerk.user_contents where user_id = any(p_user_id)
    returning user_id
  ),
  logged as (
    insert into clerk.changes (user_id) select user_id from gone
  )
  select count(clerk.notify_changed(user_id, event_at, true, '{}'))
  into noticed
  from gone join unnest(p_user_id, p_event_at) as event (user_id, event_at) using (user_id)
  where clerk.can_notify();

  update clerk.webhook_events
  set state = 'done', body = null, error = 'the user was deleted', processed_at = now()
  where user_id = any(p_user_id) and state = 'dead';

  return query
  select user_id, case when user_id = any(tombstones) then 'unchanged' else 'deleted' end
  from unnest(p_user_id) as event (user_id);
end
$$;

-- Who has changed since ---------------------------------------------------------------------------------------------
-- change_cursor says where changes_since is to begin for whoever reads the users now. Of the cluster's name and its
-- timeline, since transactions are counted anew in another one, and the transaction before which all are over.
create function clerk.change_cursor() returns text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select system_identifier || '-' || timeline_id || '-' || pg_snapshot_xmin(pg_current_snapshot())
  from pg_control_system(), pg_control_checkpoint()
$$;

-- changes_since tells who has changed since the cursor (null: everybody), deletions included, and how to go on: each row
-- has the same next_cursor, which counts once all have been used. Nothing is left out: what a transaction that is still
-- under way may yet commit comes before that cursor. So some users may come twice.
create function clerk.changes_since(cursor text)
returns table (user_id text, version bigint, deleted boolean, next_cursor text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  here constant text := clerk.change_cursor();
  parts constant text[] := regexp_match(cursor, '^([0-9]{1,19}-[0-9]{1,10})-([0-9]{1,18})$');
  since constant xid8 := parts[2];
  next constant xid8 := pg_snapshot_xmax(pg_current_snapshot());
begin
  if cursor is null then
    return query
    select user_id, version, deleted_at is not null, here from clerk.users;
    return;
  end if;
  if parts is null then
    raise exception using errcode = 'invalid_parameter_value',
      message = 'clerk.changes_since: this is no cursor that it gave',
      hint = 'Begin with clerk.change_cursor().';
  end if;
  if not starts_with(here, parts[1] || '-') or since > next then
    raise exception using errcode = 'invalid_parameter_value',
      message = 'clerk.changes_since: this cursor is of another Postgres server, or of before a failover or a restore',
      hint = 'Begin anew: take clerk.change_cursor(), and forget what was read before.';
  end if;
  -- A dump may have brought transactions that this server is yet to count to.
  if exists (select from clerk.changes_pruned where until >= since and until < next) then
    raise exception using errcode = 'invalid_parameter_value',
      message = 'clerk.changes_since: this cursor is too old: changes are kept as long as applied events are',
      hint = 'Begin anew: take clerk.change_cursor(), and forget what was read before.';
  end if;
  return query
  select user_id, version, deleted_at is not null, here
  from clerk.users
  where user_id in (select user_id from clerk.changes where changed_in >= since and changed_in < next);
end
$$;

-- Writing through ---------------------------------------------------------------------------------------------------
-- compact_bytes is what a value weighs as compact JSON: jsonb's own text has a space after each colon and comma.
create function clerk.compact_bytes(value jsonb) returns integer
language plpgsql immutable strict parallel safe as $$
declare
  written constant text := value::text;
  bare    constant text := regexp_replace(written, '"[^"\\]*(?:\\.[^"\\]*)*"', '', 'g');
begin
  return octet_length(convert_to(written, 'UTF8')) - length(bare) + length(replace(bare, ' ', ''));
end
$$;

-- field_bytes is the weight of each top-level field: the 64 largest of those with names of up to 64 bytes.
create function clerk.field_bytes(metadata jsonb) returns jsonb
language plpgsql immutable strict parallel safe as $$
declare
  weights jsonb;
begin
  select coalesce(jsonb_object_agg(key, bytes), '{}') into weights
  from (
    select key, clerk.compact_bytes(value) as bytes
    from jsonb_each(metadata)
    where octet_length(convert_to(key, 'UTF8')) <= 64
    order by 2 desc, key collate "C"
    limit 64
  ) as largest;
  return weights;
end
$$;

-- profile_bytes is the weight of what a claims template can carry of a user besides metadata, in the order of PROFILE in
-- worker/events.py; 0: null. Null where none of it was given.
create function clerk.profile_bytes(clerk_user jsonb) returns integer[]
language plpgsql immutable strict parallel safe as $$
declare
  email constant jsonb := (
    select one from jsonb_path_query(clerk_user, 'strict $.email_addresses[*]', '{}', true) as one
    where one -> 'id' = clerk_user -> 'primary_email_address_id' and jsonb_typeof(one -> 'id') = 'string'
    limit 1
  );
  phone constant jsonb := (
    select one from jsonb_path_query(clerk_user, 'strict $.phone_numbers[*]', '{}', true) as one
    where one -> 'id' = clerk_user -> 'primary_phone_number_id' and jsonb_typeof(one -> 'id') = 'string'
    limit 1
  );
begin
  if not clerk_user ?| '{first_name,last_name,username,external_id,created_at,email_addresses,phone_numbers,image_url}' then
    return null;
  end if;
  return array(
    select case when jsonb_typeof(value) = type then octet_length(convert_to(value::text, 'UTF8')) else 0 end
    from (
      values
        (1, clerk_user -> 'first_name', 'string'),
        (2, clerk_user -> 'last_name', 'string'),
        (3, clerk_user -> 'username', 'string'),
        (4, clerk_user -> 'external_id', 'string'),
        (5, clerk_user -> 'created_at', 'number'),
        (6, coalesce(email -> 'email_address', email -> 'emailAddress'), 'string'),
        (7, coalesce(phone -> 'phone_number', phone -> 'phoneNumber'), 'string'),
        (8, to_jsonb(coalesce(email #>> '{verification,status}' = 'verified', false)), 'boolean'),
        (9, to_jsonb(coalesce(phone #>> '{verification,status}' = 'verified', false)), 'boolean'),
        (10, clerk_user -> 'image_url', 'string'),
        (11, clerk_user -> 'two_factor_enabled', 'boolean')
    ) as profile (position, value, type)
    order by position
  );
end
$$;

-- put_user passes a Clerk User through the gate, at once: as Clerk's Backend API gives it, or as the objects of its
-- JavaScript SDK serialise. For an application that has just changed a user at Clerk, or found no row yet. It says what
-- it did, in the gate's words: applied, unchanged, older or deleted.
--
-- The version is updated_at, as everywhere. It comes without an envelope and is dated before all of them, so a webhook of
-- the same version has the last word. Which kinds are copied stands in clerk.policy; a kind that depends on the weight is
-- kept until a worker has weighed the user.
create function clerk.put_user(clerk_user jsonb) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
set lock_timeout = '5s'
as $$
declare
  policy clerk.policy;
  given jsonb := clerk_user;
  kind text;
  kinds jsonb[] := '{}';
  user_id text;
  version numeric;
  public_bytes integer;
  unsafe_bytes integer;
  result text;
begin
  select * into policy from clerk.policy;
  if not found then
    raise exception using errcode = 'object_not_in_prerequisite_state',
      message = 'clerk.put_user: no worker has said yet what is to be copied',
      hint = 'Start a worker of this version on this database.';
  end if;

  if jsonb_typeof(given) is distinct from 'object' then
    perform clerk.refuse_user('it is not a JSON object', 'Give the whole User, as Clerk''s Backend API returns it.');
  end if;
  -- Before anything is made a text of: a few bytes of jsonb can be very many digits.
  if jsonb_path_exists(given,
    'strict $.** ? (@.type() == "number" && (@.abs() >= 1e1000 || @ != 0 && @.abs() < 1e-1000))') then
    perform clerk.refuse_user('it has a number of over a thousand digits', 'Clerk''s webhook brings the user without it.');
  end if;
  -- As deep as in an event; not every reader could read it.
  if jsonb_path_exists(given, 'strict $.**{499 to last} ? (@.type() == "object" || @.type() == "array")') then
    perform clerk.refuse_user('it is over 500 levels deep', 'Clerk''s webhook brings the user without what is deeper.');
  end if;
  if jsonb_typeof(given -> '_raw') = 'object' then
    given := given -> '_raw'; -- what the JavaScript SDK read
  elsif given ? 'updatedAt' and not given ? 'updated_at' then
    given := (
      select jsonb_object_agg(lower(regexp_replace(key collate "C", '([A-Z])', '_\1', 'g')), value) from jsonb_each(given)
    );
  end if;

  if given ->> 'object' = 'event' then
    perform clerk.refuse_user('it is an event, not a user', 'Give the event''s data.');
  elsif given ->> 'object' <> 'user' then
    perform clerk.refuse_user('its object is not "user"', 'Give a User, as Clerk''s Backend API returns it.');
  elsif given ->> 'deleted' = 'true' then
    perform clerk.refuse_user('it says that a user was deleted', 'Clerk''s webhook user.deleted erases them here.');
  end if;
  user_id := given ->> 'id';
  if jsonb_typeof(given -> 'id') is distinct from 'string' or user_id collate "C" !~ '^[!-~]{1,255}$' then
    perform clerk.refuse_user('id is missing, or no user id', 'It is what Clerk calls user_….');
  end if;
  version := case when jsonb_typeof(given -> 'updated_at') = 'number' then (given -> 'updated_at')::numeric end;
  if version is null or version <> trunc(version) or version not between 0 and 253402300799999 then
    perform clerk.refuse_user(
      'updated_at is missing, or no whole number of milliseconds since 1970', 'Give it as Clerk''s Backend API does.');
  end if;
  if not given ?| '{private_metadata,public_metadata,unsafe_metadata}' then
    perform clerk.refuse_user('it has no metadata', 'Give the whole User, as Clerk''s Backend API returns it.');
  end if;
  foreach kind in array '{private_metadata,public_metadata,unsafe_metadata}'::text[] loop
    if jsonb_typeof(given -> kind) not in ('object', 'null') then
      perform clerk.refuse_user(kind || ' is not an object', 'Give the whole User, as Clerk''s Backend API returns it.');
    end if;
    -- Absent: ours stays. Null: empty.
    kinds := array_append(kinds, case when jsonb_typeof(given -> kind) = 'null' then '{}' else given -> kind end);
  end loop;
  if octet_length(given::text) > 1048576 then
    perform clerk.refuse_user('it is over 1 MiB', 'Clerk has no such user.');
  end if;

  public_bytes := clerk.compact_bytes(kinds[2]);
  unsafe_bytes := clerk.compact_bytes(kinds[3]);
  select outcome into result
  from clerk.gate_users(
    array[user_id], array[version::bigint], array[0::bigint],
    kinds[1:1], kinds[2:2], kinds[3:3],
    array[policy.copy_private], array[policy.copy_public], array[policy.copy_unsafe],
    array[clerk.profile_bytes(given)::text],
    array[public_bytes], array[unsafe_bytes],
    array[clerk.field_bytes(kinds[2])], array[clerk.field_bytes(kinds[3])],
    -- By the template that is assumed where none is set: a new user's, for the moment until a worker has weighed them.
    array[octet_length('{"public_metadata":,"unsafe_metadata":}') + coalesce(public_bytes, 2) + coalesce(unsafe_bytes, 2)],
    array[null::bytea], 2147483647, null
  );
  return result;
end
$$;

create function clerk.refuse_user(problem text, hint text) returns void
language plpgsql as $$
begin
  raise exception using errcode = 'invalid_parameter_value',
    message = 'clerk.put_user: this is no Clerk User: ' || problem, hint = hint;
end
$$;

-- A function made anew is everybody's to call, by Postgres's default.
revoke all on function
  clerk.field_hashes, clerk.can_notify, clerk.notify_changed,
  clerk.change_cursor, clerk.changes_since,
  clerk.compact_bytes, clerk.field_bytes, clerk.profile_bytes, clerk.put_user, clerk.refuse_user
from public;
