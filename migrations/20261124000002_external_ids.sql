-- The ids that other systems know users by. One scan of `users`; the index is empty when it is made.

alter table users
  -- Given by the client: the id of the same person in the company's own numbering. Compared byte by byte: no two systems' collations
  -- have to agree, and an upgrade of the operating system breaks no index.
  add column external_id text collate "C",
  drop constraint users_tombstone_holds_no_data,
  add constraint users_tombstone_holds_no_data check (
    (deleted_at is null and profile is not null and created_at is not null and updated_at is not null)
    or (deleted_at is not null and profile is null and created_at is null and updated_at is null and external_id is null)
  );

-- One living user per external id; a deletion frees it. An amendment that leaves it alone stays a HOT update.
create unique index users_external_id on users (external_id) where external_id is not null;
