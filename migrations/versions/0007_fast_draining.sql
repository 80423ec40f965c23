-- Most events are sign-ins: they bring nothing new, and what each of them costs is what draining costs.

-- Locked at once, and before clerk.users: then no worker is in mid-batch, where it would go on writing users by the
-- function as it was, which leaves the hash alone.
lock table clerk.webhook_events in access exclusive mode;

alter table clerk.users
  add column sent_hash bytea; -- of what the newest event sent, as it was sent; null where the row isn't that event's alone

-- gate_known passes the events that bring what their users have already: whoever's p_sent_hash is the row's own is not
-- weighed, hashed or written again; the version moves, and that is all. Returns those users. The others are for
-- gate_users. It waits for nobody, so that it may come after whatever else a transaction has locked: a row that another
-- one holds, or has just changed, is not among them.
create function clerk.gate_known(
  p_user_id text[], p_version bigint[], p_event_at bigint[], p_sent_hash bytea[], p_weighed_by bigint
) returns setof text
language plpgsql as $$
#variable_conflict use_column
begin
  return query
  with known as materialized (
    select users.ctid as place, event.version, event.event_at
    from unnest(p_user_id, p_version, p_event_at, p_sent_hash) as event (user_id, version, event_at, sent_hash)
    join clerk.users on users.user_id = event.user_id
    where users.sent_hash = event.sent_hash
      and users.version < event.version
      and users.weighed_by = p_weighed_by
      and users.claims_exact and not users.content_missing
      and users.deleted_at is null
    for no key update of users skip locked
  )
  update clerk.users as old
  set version = new.version, event_at = new.event_at, content_changed = false, crossed = false, synced_at = now()
  from known as new
  where old.ctid = new.place
  returning old.user_id;
end
$$;

-- The gate takes the hash along. Workers of the step before refuse a newer schema, so none calls the old one.
drop function clerk.gate_users(
  text[], bigint[], bigint[], jsonb[], jsonb[], jsonb[], boolean[], boolean[], boolean[], text[], integer[], integer[],
  jsonb[], jsonb[], integer[], integer, bigint
);

-- gate_users applies users as Clerk had them at p_version: one element of each array for each user, and a user at
-- most once. A kind of metadata is null where its key was absent: our value stays. The p_copy_ flags say whether a
-- kind is kept here. p_profile_bytes are array literals, since an array of arrays can't be taken apart by row.
-- p_sent_hash is what gate_known compares. p_budget and p_weighed_by are those of the policy that weighed and decided.
-- The outcome for each user:
--   applied    the content changed
--   unchanged  the same content: at most the version or the weights moved
--   older      what we have came later
--   deleted    the user has a tombstone
-- crossed: this took the user's claims over the budget. unweighed: the row now has kinds of several events, so that
-- the weight of its claims has to be reckoned from the sizes that are kept.
create function clerk.gate_users(
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
begin
  with written as (
    insert into clerk.users as old (
      user_id, version, event_at, content_hash, content_changed,
      private_clock, public_clock, unsafe_clock,
      private_copied, public_copied, unsafe_copied,
      profile_bytes, public_bytes, unsafe_bytes, public_fields, unsafe_fields,
      claims_bytes, sent_hash, weighed_by, over_budget, crossed
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
        case when event >= stored then excluded.profile_bytes else old.profile_bytes end,
        case when takes_public then excluded.public_bytes else old.public_bytes end,
        case when takes_unsafe then excluded.unsafe_bytes else old.unsafe_bytes end,
        -- The same content has the same fields: the stored ones stay, which may be large.
        case when takes_public and (changes or old.public_fields is null)
          then excluded.public_fields else old.public_fields end,
        case when takes_unsafe and (changes or old.unsafe_fields is null)
          then excluded.unsafe_fields else old.unsafe_fields end,
        -- Of a row with kinds of several events the claims are still to be weighed.
        case when whole then excluded.claims_bytes else old.claims_bytes end,
        whole or old.claims_exact,
        case when whole then excluded.sent_hash end,
        case when whole then excluded.weighed_by end,
        case when whole then excluded.over_budget else old.over_budget end,
        whole and excluded.over_budget and not old.over_budget,
        -- Of a row with kinds of several events this is still to be found out, but for private metadata alone.
        case when whole then excluded.private_clock is not null and excluded.private_copied and not old.private_copied
          else old.content_missing end,
        case when changes or excluded.version > old.version then now() else old.synced_at end
      from (
        select
          *,
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
    on conflict (user_id) do update set
      private_metadata = excluded.private_metadata,
      public_metadata = excluded.public_metadata,
      unsafe_metadata = excluded.unsafe_metadata;
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

-- gate_deletions leaves tombstones and erases what we keep of the users, events set aside included. Events that are
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

  delete from clerk.user_contents where user_id = any(p_user_id);

  update clerk.webhook_events
  set state = 'done', body = null, error = 'the user was deleted', processed_at = now()
  where user_id = any(p_user_id) and state = 'dead';

  return query
  select user_id, case when user_id = any(tombstones) then 'unchanged' else 'deleted' end
  from unnest(p_user_id) as event (user_id);
end
$$;

-- A function made anew is everybody's to call, by Postgres's default.
revoke all on function clerk.gate_known, clerk.gate_users from public;

-- Room in each page here too, so that a changed content needs no new entry in the index.
alter table clerk.user_contents set (fillfactor = 80);

-- A body stays as it is, in its row's page, unless it is larger than a page: it lives for milliseconds, and to compress
-- it took a third of the time of recording it.
alter table clerk.webhook_events set (toast_tuple_target = 8160);
