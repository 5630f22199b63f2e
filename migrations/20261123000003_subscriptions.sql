-- Who listens to what: the owner's registry of subscriptions (src/subscriptions/). Names and times, no user's data.

create table subscriptions (
  -- The subscription's name is its queue's name at the broker.
  name text primary key,
  -- What wakes it: patterns of routing keys, without the deployment's prefix, ..
  routing_keys text[] not null,
  -- .. and top-level profile fields whose change does.
  fields text[] not null,
  -- The team that may change it, and whom to ask.
  owner text not null,
  -- What it is for, so that somebody who finds it years later knows whether it may go.
  purpose text not null,
  created_at timestamptz not null default now(),
  -- When it was last registered.
  updated_at timestamptz not null default now(),
  -- Grows with every registration, so that who declared an older one cannot mark the newer as declared.
  revision bigint not null default 1 check (revision > 0),
  -- The revision that the broker is known to have; 0 while it never had any. Less than revision: to be declared.
  declared_revision bigint not null default 0,
  -- Everything that may still be bound at the broker; what is no longer registered is unbound from here.
  bound_keys text[] not null,
  bound_fields text[] not null,
  -- Set by its owner: deleted after it had no consumer for so long. Null: never.
  expires_after_s bigint check (expires_after_s > 0),
  -- Since when no consumer was seen; null while one is there. Counts for idle and for expiry.
  unattended_since timestamptz default now(),
  -- When a consumer was last seen; null if never.
  consumer_seen_at timestamptz,
  -- Since when the queue was not seen empty; null when it was empty at the last look.
  waiting_since timestamptz,
  -- When something last moved in the queue, to the minute.
  last_activity_at timestamptz,
  -- When the queue, once declared, was found gone, ..
  lost_at timestamptz,
  -- .. since when news may be missing therefore (the last look that saw it), ..
  missing_since timestamptz,
  -- .. and when that was made good.
  recovered_at timestamptz,
  -- When its coming expiry was first told; it is deleted no sooner than a notice period later.
  expiry_warned_at timestamptz,
  constraint subscriptions_are_woken_by_something check (cardinality(routing_keys) + cardinality(fields) > 0)
);

-- When the watch last looked at all queues: a queue that is missing at the next look was seen then.
create table subscriptions_looked_at (
  -- One row.
  only_row boolean primary key default true check (only_row),
  looked_at timestamptz not null
);
