-- For those who poll (`GET /v1/changes`) and those who compare (`GET /v1/digest`).

alter table users
  -- The transaction that made the latest version, so that the next one finds the entry in `changes` that it replaces. Not indexed:
  -- an amendment stays a HOT update. Rows from before this migration get the migration's own.
  add column changed_xid xid8 not null default pg_current_xact_id();

-- One entry per user, living or dead, in the order of the transactions that made their latest versions. Written by the statement
-- that writes the user (src/users/store.rs), which also takes the entry before it away.
create table changes (
  -- Given out before the commit, as any number is. But what is below the oldest transaction still open has all been committed or
  -- rolled back: a reader that stops there misses nothing.
  xid xid8 not null,
  -- Tells apart, and puts in order, what one transaction changed.
  user_id uuid not null,
  primary key (xid, user_id)
);

insert into changes (xid, user_id)
select changed_xid, id
  from users;

-- The living in order of the first two bytes of SHA-256 over the id: one bucket of a digest is a range of it.
create index users_digest on users (
  ((get_byte(sha256(uuid_send(id)), 0) << 8) | get_byte(sha256(uuid_send(id)), 1)),
  id
) where deleted_at is null;
