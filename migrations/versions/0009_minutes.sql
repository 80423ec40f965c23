-- What happened in each minute of the last days: the workers count it from the inbox once the minute is over, so that
-- whoever shows hours of it reads a few hundred rows, whatever the inbox holds. A minute without a row is one in which no
-- worker kept house.
create table clerk.minutes (
  minute       timestamptz primary key,   -- when it began, by this database's clock
  acknowledged integer not null,          -- events that came in: delivered, or made pending again
  applied      integer not null,
  dead         integer not null,          -- events that were set aside
  -- Seconds from Svix's signature until the event was applied; null where none was.
  fresh_p50    double precision,
  fresh_p99    double precision,
  fresh_max    double precision
);
