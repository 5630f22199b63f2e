-- Who may ask, for what, and for which fields (src/clients/). Names, hashes and times, no user's data.

create table clients (
  -- Stands in the record of who reads what, and is what a JWT's `sub` says.
  name text primary key,
  -- What it may do; nothing else.
  scopes text[] not null check (scopes <@ array['users:read', 'users:write', 'subscriptions', 'admin'] and cardinality(scopes) > 0),
  -- The fields that it may read at most. Null: every field.
  fields text[],
  -- The fields that it may write. Null: those in `fields`.
  write_fields text[],
  -- What it needs them for, for the record of processing; a subscription says it for itself.
  purpose text,
  created_at timestamptz not null default now(),
  -- From then on nothing of it is accepted. The row stays, as a record of who could read what.
  revoked_at timestamptz
);

create table client_keys (
  -- The part of a key that may be seen: finds the row, and names the key in lists.
  id text primary key,
  client text not null references clients (name),
  -- SHA-256 of the part that may not. 256 random bits need no slow hash.
  sha256 bytea not null check (octet_length(sha256) = 32),
  created_at timestamptz not null default now(),
  -- Null: never.
  expires_at timestamptz,
  revoked_at timestamptz,
  -- To the minute; null while it was never used.
  last_used_at timestamptz
);

create index client_keys_by_client on client_keys (client);

-- The client that stands for a subscription: it registered it, or an operator said so. What its subscriptions declare is what it may
-- read. Null: nobody, only an administrator changes it.
alter table subscriptions add column client text references clients (name);

-- For the record of who reads what, and for what a client may read.
create index subscriptions_by_client on subscriptions (client);
