-- The calls to Clerk's Backend API that all processes share. The database's clock decides, and the row's lock.

create table clerk.api_budget (
  instance      text primary key,         -- a hash of the secret key
  paid_until    timestamptz not null default '-infinity', -- every booked call moves this on by its share of the time
  blocked_until timestamptz not null default '-infinity', -- Clerk told us to hold still until then
  -- Whose users Clerk was seen to know by this key: of those here some were told of by webhooks, or all were pulled.
  known_by      text check (known_by in ('webhooks', 'pulls'))
) with (
  -- One row, updated with every call: room in its page for the versions that come and go.
  fillfactor = 20
);

-- book_api_call books one call and returns 0, or books nothing and returns the seconds after which to ask again.
--
-- In no 10 seconds, wherever they begin, are more than p_allowed calls booked. Each costs a step of time, and a tenth
-- of them (the burst) may be ahead of the clock. (n - burst) calls after the first burst take (n - burst) steps, so a
-- closed window holds at most burst + window / step calls; the step is just long enough for that to be p_allowed.
-- p_at stands for the clock in tests.
create function clerk.book_api_call(p_instance text, p_allowed integer, p_at timestamptz default null)
returns double precision
language plpgsql as $$
declare
  burst constant integer := greatest(1, p_allowed / 10);
  step constant interval := (10000000 / (greatest(1, p_allowed) - burst + 1) + 1) * interval '1 microsecond';
  mine clerk.api_budget;
  at timestamptz;
  earliest timestamptz;
begin
  insert into clerk.api_budget (instance) values (p_instance) on conflict do nothing;
  select instance, paid_until, blocked_until into strict mine
  from clerk.api_budget where instance = p_instance
  for no key update;
  -- Read once the row is ours: now() would be from before the wait for it.
  at := coalesce(p_at, clock_timestamp());
  -- Neither can be further ahead, unless the clock was set back.
  mine.paid_until := least(mine.paid_until, at + interval '10.000001 seconds');
  mine.blocked_until := least(mine.blocked_until, at + interval '1 hour');
  earliest := greatest(mine.blocked_until, mine.paid_until - (burst - 1) * step);
  if earliest > at then
    return extract(epoch from earliest - at);
  end if;
  update clerk.api_budget set paid_until = greatest(mine.paid_until, at) + step where instance = p_instance;
  return 0;
end
$$;

-- block_api_calls keeps everybody from calling for some seconds from now, an hour at most.
create function clerk.block_api_calls(p_instance text, p_seconds double precision)
returns void
language sql as $$
  insert into clerk.api_budget as old (instance, blocked_until)
  values (p_instance, clock_timestamp() + make_interval(secs => least(p_seconds, 3600)))
  on conflict (instance) do update set blocked_until = greatest(old.blocked_until, excluded.blocked_until)
$$;

-- Functions made anew are everybody's to call, by Postgres's default.
revoke all on all functions in schema clerk from public;
