-- Messages that a subscription could not handle. They are moved here from its queue NAME.dead: to look at messages in a queue is to
-- take them out and put them back, which RabbitMQ counts as deliveries and, in the end, drops them for.
create table dead_letters (
  -- Whose letter. It goes with its subscription.
  subscription text not null references subscriptions (name) on delete cascade,
  -- The message's own id, by which it is redriven, dropped, and kept once however often it arrives. A malformed message without one
  -- gets one made up.
  message_id uuid not null,
  -- Given anew whenever the letter arrives: the order of a list, and what a redrive compares before it deletes, so that a letter
  -- that came back meanwhile stays.
  place bigint generated always as identity,
  -- The notice, as far as the message was one; all null when it was not. There is no place for a body or for foreign headers, which
  -- may hold anybody's data.
  user_id uuid,
  version bigint,
  event text check (event in ('user.created', 'profile.updated', 'user.deleted')),
  -- Names of top-level profile fields, as a JSON array. Never a value.
  changed_fields jsonb,
  -- When the change was made, which the message says again when it is redriven.
  occurred_at timestamptz,
  -- The trace of the change goes on in the redriven message. Null also when the message had none.
  traceparent text,
  -- Why it could not be handled: one of a closed list of words (sdk/src/letter.rs).
  reason text not null,
  -- How often its consumer tried.
  attempts integer not null,
  -- When the last try failed, by the consumer's clock; null when nobody said so.
  failed_at timestamptz,
  -- How often it was redriven before, to tell a letter that keeps coming back from one that fails for the first time.
  redriven integer not null,
  -- Of the body: tells a 16 MiB message from a typing error without keeping either.
  size_bytes bigint not null,
  -- By the database's clock; the age of letters whose consumer gave no time.
  collected_at timestamptz not null default now(),
  primary key (subscription, message_id),
  constraint dead_letters_notice_is_whole check (
    (event is null and user_id is null and version is null and changed_fields is null and occurred_at is null and traceparent is null)
    or (event is not null and user_id is not null and version is not null and changed_fields is not null and occurred_at is not null)
  )
);

-- For pages of all letters of a subscription.
create index dead_letters_by_place on dead_letters (subscription, place);
-- For pages of one reason, and for counting by reason from the index alone.
create index dead_letters_by_reason on dead_letters (subscription, reason, place);

-- The telling of every user to one subscription alone: the one under way, or the last one.
create table backfills (
  -- One at a time: a second one would tell the same users the same. The next one takes this row over.
  subscription text primary key references subscriptions (name) on delete cascade,
  -- This backfill: goes into the ids and headers of its messages, and tells a late runner that its row was taken over.
  id uuid not null,
  -- What was asked for. `running` also while it waits; done and cancelled are final.
  state text not null check (state in ('running', 'paused', 'done', 'cancelled')),
  -- Why nothing is sent although it runs: no room in the queue, no queue, no broker, news in the outbox that goes first, or others
  -- before it. For those who look.
  waiting_for text check (waiting_for in ('room', 'queue', 'broker', 'news', 'turn')),
  -- Whom to tell, in order of id; null: every user.
  user_ids uuid[],
  -- Only users changed or deleted since then; null: whenever.
  changed_since timestamptz,
  -- Messages a second, at most.
  rate_per_s integer not null check (rate_per_s between 1 and 50000),
  -- Nothing is sent while this many messages wait in the queue: news is never behind more than these.
  max_waiting integer not null check (max_waiting >= 1),
  -- Everybody up to here is told: the last page whose messages were all confirmed ended here. Null before the first.
  cursor uuid,
  -- The highest id when it began. Who came later is told by the news; without an end, a slow backfill would chase them for ever.
  up_to uuid not null,
  -- Users told.
  sent bigint not null default 0,
  -- Users looked at and not told: the subscription does not want what there is to say, they did not change since, or nobody has the id.
  skipped bigint not null default 0,
  -- Users to look at, for the progress.
  total bigint not null,
  -- Whether `total` was estimated, as counting a large table takes too long.
  total_is_estimate boolean not null,
  started_at timestamptz not null default now(),
  -- When it was done or cancelled.
  finished_at timestamptz,
  -- By whatever moved it last, be it a command or a page.
  updated_at timestamptz not null default now()
);
