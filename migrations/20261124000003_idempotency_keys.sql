-- Requests that came with an Idempotency-Key, and what came of them (src/users/repeat.rs). Hashes, ids and times, no user's value.

create table idempotency_keys (
  -- SHA-256 of the client's name and the key: what a client writes into a header may be anything.
  key bytea primary key check (octet_length(key) = 32),
  -- Random, so that two equal requests do not look alike here.
  salt bytea not null,
  -- SHA-256 of salt and request: tells another request under the same key. Null once the user is deleted: a hash of what was written
  -- about him could be tried out.
  fingerprint bytea check (octet_length(fingerprint) = 32),
  -- What the request came to.
  outcome text not null
    check (outcome in ('created', 'changed', 'unchanged', 'deleted', 'missing', 'gone', 'stale', 'taken')),
  -- Whom it was about.
  user_id uuid not null,
  -- The version that it made, or met; 0 when there was no user.
  version bigint not null,
  -- When it was answered, and when the user was deleted if that was what it came to. After 24 hours the row goes.
  kept_at timestamptz not null default now()
);

-- For the purge.
create index idempotency_keys_by_age on idempotency_keys (kept_at);
-- For a deletion, which takes the fingerprints of that user's requests away.
create index idempotency_keys_by_user on idempotency_keys (user_id) where fingerprint is not null;
