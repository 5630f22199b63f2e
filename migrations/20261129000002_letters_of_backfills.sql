-- The backfill whose message a dead letter was: a redriven one says so again, or a consumer would drop it as older than what it holds.
alter table dead_letters add column backfill uuid;
