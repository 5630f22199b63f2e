-- Of a column's values ANALYZE keeps some for the planner: beyond the deletion of their user, and in every base backup. Of these it shall
-- keep none. The planner needs none of them: an index says that an external id is one user's, and a fingerprint is never looked for.

alter table users alter column external_id set statistics 0;
-- The hash of a request goes with the user.
alter table idempotency_keys alter column fingerprint set statistics 0;

-- What was kept goes when the type is set anew. That makes the index on external ids anew, and reads the table once: a second for a million
-- users, while nobody is served. So only where something was kept.
do $$
begin
  if exists (select from pg_stats where schemaname = current_schema() and tablename = 'users' and attname = 'external_id' and null_frac < 1) then
    alter table users alter column external_id type text collate "C";
  end if;
  if exists (select from pg_stats where schemaname = current_schema() and tablename = 'idempotency_keys' and attname = 'fingerprint' and null_frac < 1) then
    alter table idempotency_keys alter column fingerprint type bytea;
  end if;
end
$$;
