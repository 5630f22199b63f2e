-- The master data, and what has to be told about it. Both change in one statement (src/users/store.rs).

create table users (
  -- Chosen by the owner (UUIDv7, so that new rows go to one end of the index) or by the client that creates the user.
  -- One key for the living and the dead: a create that races with a delete cannot bring a deleted user back.
  id uuid primary key,
  -- Starts at 1 and grows by one with every change; the ETag, and what an amendment compares before it writes.
  version bigint not null check (version > 0),
  -- `json`, not `jsonb`: the service alone interprets it and wants back, byte for byte, the text it validated.
  -- Null once the user is deleted: a tombstone has no place for data.
  profile json check (json_typeof(profile) = 'object'),
  created_at timestamptz,
  updated_at timestamptz,
  deleted_at timestamptz,
  constraint users_tombstone_holds_no_data check (
    (deleted_at is null and profile is not null and created_at is not null and updated_at is not null)
    or (deleted_at is not null and profile is null and created_at is null and updated_at is null)
  )
) with (
  -- An amendment rewrites the row and no index: leave room for it on its own page (HOT update).
  fillfactor = 80
);

-- For pages of `GET /v1/users`: the living in order of id, however many tombstones lie between them.
create index users_living on users (id) where deleted_at is null;

-- Events that were committed and that the broker has not confirmed yet. A confirmed event is deleted: what is here is what is owed.
create table outbox (
  -- Order of leaving. Not order of commit: a transaction may take its id first and commit last.
  id bigint generated always as identity primary key,
  -- The message's id, the same on every resend.
  message_id uuid not null,
  event text not null check (event in ('user.created', 'profile.updated', 'user.deleted')),
  user_id uuid not null,
  -- The version that this change made.
  version bigint not null,
  -- Names of top-level profile fields, as a JSON array; empty unless the event is profile.updated. Never a value.
  changed_fields jsonb not null,
  -- When the change was made, by the database's clock; for the message's timestamp and for the age of the oldest.
  occurred_at timestamptz not null default now(),
  -- W3C trace context of the request: the relay runs in another trace.
  traceparent text not null
) with (
  -- Rows live for milliseconds. Clean up after a fixed number of them, not after a share of a table that is usually empty.
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 20000,
  autovacuum_vacuum_insert_scale_factor = 0,
  autovacuum_vacuum_insert_threshold = 100000,
  autovacuum_analyze_scale_factor = 0,
  autovacuum_analyze_threshold = 50000,
  autovacuum_vacuum_cost_delay = 0
);
