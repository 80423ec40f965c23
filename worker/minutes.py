"""The last hours minute by minute, `clerk.minutes`: counted from the inbox by workers, read by whoever shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from psycopg.rows import class_row

from worker.db import Connection

MINUTE: Final = timedelta(minutes=1)

KEPT: Final = timedelta(hours=48)

CAUGHT_UP: Final = 10
"""The most minutes that are counted at a time. After a longer time without any worker the ones between have no rows."""

COUNT_MS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Minute:
    """One minute, or several that were `put_together`; freshness in seconds, None where nothing was applied."""

    minute: datetime
    acknowledged: int
    applied: int
    dead: int
    fresh_p50: float | None
    fresh_p99: float | None
    fresh_max: float | None


# The last minute that has a row is counted once more: a batch that marked its events done in it may have been committed
# a moment after it was over. Rows of minutes that aren't over are from before the clock was set back.
SPAN = """
select
  case when last.minute >= this.minute - make_interval(mins => %(most)s) then last.minute
    else this.minute - interval '1 minute' end as first,
  this.minute as until
from
  (select date_bin('1 minute', now(), timestamptz '2000-01-01 00:00:00+00') as minute) as this,
  (select max(minute) as minute from clerk.minutes where minute <= now() - interval '1 minute') as last
where last.minute is distinct from this.minute - interval '1 minute'
"""

# By the partial indexes: what is done by when it was, what is pending by when it came; and all that is dead. Nothing is
# done before it has come, so what came in these minutes and is done was done in them or later. An event that was made
# pending again long after Svix signed it counts from then: no signature is taken that is older than five minutes.
COUNT = """
with came (at) as (
  select received_at from clerk.webhook_events
  where state = 'done' and processed_at >= %(first)s and received_at >= %(first)s and received_at < %(until)s
  union all
  select received_at from clerk.webhook_events
  where state = 'pending' and received_at >= %(first)s and received_at < %(until)s
  union all
  select received_at from clerk.webhook_events
  where state = 'dead' and received_at >= %(first)s and received_at < %(until)s
),
acknowledged as (
  select date_bin('1 minute', at, %(first)s) as minute, count(*) as events from came group by 1
),
applied as (
  select
    minute, count(*) as events, max(age) as longest,
    percentile_disc(array[0.5, 0.99]) within group (order by age) as quantiles
  from (
    select
      date_bin('1 minute', processed_at, %(first)s) as minute,
      greatest(0, extract(epoch from processed_at
        - case when received_at - sent_at > interval '5 minutes' then received_at else sent_at end))::float8 as age
    from clerk.webhook_events
    where state = 'done' and error is null and processed_at >= %(first)s and processed_at < %(until)s
  ) as done
  group by 1
),
dead as (
  select date_bin('1 minute', processed_at, %(first)s) as minute, count(*) as events
  from clerk.webhook_events
  where state = 'dead' and processed_at >= %(first)s and processed_at < %(until)s
  group by 1
)
insert into clerk.minutes (minute, acknowledged, applied, dead, fresh_p50, fresh_p99, fresh_max)
select
  minute, coalesce(acknowledged.events, 0), coalesce(applied.events, 0), coalesce(dead.events, 0),
  quantiles[1], quantiles[2], longest
from generate_series(%(first)s, %(until)s - interval '1 minute', interval '1 minute') as minute
left join acknowledged using (minute)
left join applied using (minute)
left join dead using (minute)
on conflict (minute) do update set
  (acknowledged, applied, dead, fresh_p50, fresh_p99, fresh_max) = (
    excluded.acknowledged, excluded.applied, excluded.dead, excluded.fresh_p50, excluded.fresh_p99, excluded.fresh_max)
"""
COUNT_LIMIT = "select set_config('statement_timeout', %(ms)s::text, true)"

PRUNE = """
delete from clerk.minutes where minute < now() - %(keep)s or minute > now() - interval '1 minute'
"""


def count(connection: Connection) -> int:
    """Count the minutes that are over and have no row yet, and drop old ones; returns how many were counted. Several
    workers may do it at once: they count the same."""
    span = connection.execute(SPAN, {"most": CAUGHT_UP}).fetchone()
    if span is None:
        return 0
    first, until = span
    with connection.transaction():
        connection.execute(COUNT_LIMIT, {"ms": COUNT_MS})
        counted = connection.execute(COUNT, {"first": first, "until": until}).rowcount
    connection.execute(PRUNE, {"keep": KEPT})
    return counted


SINCE = """
select minute, acknowledged, applied, dead, fresh_p50, fresh_p99, fresh_max
from clerk.minutes
where minute >= date_bin('1 minute', now(), timestamptz '2000-01-01 00:00:00+00') - %(length)s
  and minute <= now() - interval '1 minute'
order by minute
"""


def since(connection: Connection, length: timedelta) -> list[Minute]:
    """The minutes that were over in this time before the present one, the oldest first."""
    with connection.cursor(row_factory=class_row(Minute)) as cursor:
        return cursor.execute(SINCE, {"length": length}).fetchall()


NEWEST = """
select minute, acknowledged, applied, dead, fresh_p50, fresh_p99, fresh_max
from clerk.minutes
where minute <= now() - interval '1 minute'
order by minute desc
limit 1
"""


def newest(connection: Connection) -> Minute | None:
    """The last minute that a worker counted; None where none ever did."""
    with connection.cursor(row_factory=class_row(Minute)) as cursor:
        return cursor.execute(NEWEST).fetchone()


def put_together(minutes: Sequence[Minute]) -> Minute:
    """Several minutes as one, which begins with the first. Its p50 is that of the middle event's minute. Its p99 is the
    most that it can be, as if of each minute's events all but a hundredth had taken as long as its p99."""
    fresh = [
        (minute.applied, minute.fresh_p50, minute.fresh_p99, minute.fresh_max)
        for minute in minutes
        if minute.fresh_p50 is not None and minute.fresh_p99 is not None and minute.fresh_max is not None
    ]
    return Minute(
        minute=minutes[0].minute,
        acknowledged=sum(minute.acknowledged for minute in minutes),
        applied=sum(minute.applied for minute in minutes),
        dead=sum(minute.dead for minute in minutes),
        fresh_p50=_quantile(((p50, applied) for applied, p50, _, _ in fresh), 50),
        fresh_p99=_quantile(
            (part for applied, _, p99, longest in fresh for part in ((p99, 99 * applied), (longest, applied))), 99
        ),
        fresh_max=max((longest for _, _, _, longest in fresh), default=None),
    )


def _quantile(weighed: Iterable[tuple[float, int]], percent: int) -> float | None:
    """What so many percent of the weight don't exceed; None where there is none."""
    ordered = sorted(weighed)
    wanted = percent * sum(weight for _, weight in ordered)
    reached = 0
    for value, weight in ordered:
        reached += 100 * weight
        if reached >= wanted:
            return value
    return None
