-- Pruning finds what is past its time, and reads nothing else. New rows take the room of pruned ones, so the table
-- isn't in the order of received_at for long: after a few weeks the BRIN index on it led to every page of the table.
-- Locked at once: with the lock of `create index` alone, a worker would wait for us in mid-batch, and `drop index` for it.
lock table clerk.webhook_events in access exclusive mode;
create index webhook_events_done on clerk.webhook_events (processed_at) where state = 'done';
drop index clerk.webhook_events_received;
