-- Who has to confirm a deletion, and who has (src/deletions/). Ids, names and times, no user's data.

-- When which subscription was told of deletions. Who has to confirm a deletion is read off from here: whoever was told at that moment.
-- So the statement that deletes a user has nothing to add.
create table deletion_duties (
  -- A subscription that is deleted owes nothing any more.
  subscription text not null references subscriptions (name) on delete cascade,
  -- When its queue was first known to be bound for user.deleted: a deletion from then on is told to it, whatever happens.
  since timestamptz not null default now(),
  -- When the binding was given up by its owner; null while it stands. What was deleted before stays owed.
  until timestamptz,
  primary key (subscription, since),
  constraint deletion_duties_end_after_they_began check (until >= since)
);

-- One at a time.
create unique index deletion_duties_open on deletion_duties (subscription) where until is null;

-- Who is told of deletions today has to confirm those from now on. As a topic exchange matches: `*` is one word, `#` any number.
insert into deletion_duties (subscription)
select name
  from subscriptions
 where declared_revision > 0
   and exists (
     select
       from unnest(routing_keys) as key
      where '.user.deleted' ~ (
        select '^' || string_agg(case word when '#' then '(\.[^.]+)*' when '*' then '\.[^.]+' else '\.' || word end, '' order by place) || '$'
          from unnest(string_to_array(key, '.')) with ordinality as part (word, place)
      )
   );

-- One row for each deletion and subscription that confirmed it, or that is late.
create table deletion_receipts (
  -- Of a tombstone, which is never taken away: no foreign key, whose check would cost each receipt a lock there.
  user_id uuid not null,
  -- A name, kept also when the subscription is deleted: a receipt stays a proof.
  subscription text not null,
  -- Copied from the tombstone, for the order in which late ones are listed.
  deleted_at timestamptz not null,
  -- Null: not confirmed when the deadline passed, and not since.
  confirmed_at timestamptz,
  -- `receipt`: it said so. `fetched`: it was seen fetching the user and was answered that he is gone.
  how text check (how in ('receipt', 'fetched')),
  primary key (user_id, subscription),
  constraint deletion_receipts_say_how check ((confirmed_at is null) = (how is null))
);

-- For pages of those who are late, ..
create index deletion_receipts_late on deletion_receipts (deleted_at, user_id, subscription) where confirmed_at is null;
-- .. and for counting them by subscription.
create index deletion_receipts_late_by_subscription on deletion_receipts (subscription, deleted_at) where confirmed_at is null;

-- Up to which deletion it was looked who is late.
create table deletions_looked_at (
  -- One row.
  only_row boolean primary key default true check (only_row),
  deleted_at timestamptz not null,
  user_id uuid not null
);

-- Who was deleted before there were receipts owes none.
insert into deletions_looked_at (deleted_at, user_id) values (now(), '00000000-0000-0000-0000-000000000000');

-- The dead in the order of their deletion. An amendment leaves deleted_at as it is and stays a HOT update.
create index users_deleted on users (deleted_at, id) where deleted_at is not null;
