-- $1: the first number, $2: how many. The n-th row is about the n-th user. Messages may be handled in parallel.
insert into outbox (id, aggregate_type, aggregate_id, message_type, concurrency, payload, metadata, created_at)
select gen_random_uuid(),
       'user',
       '00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'),
       'profile.updated',
       'parallel',
       jsonb_build_object(
         'user_id', '00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'),
         'changed_fields', '["job_title"]'::jsonb
       ),
       jsonb_build_object(
         'version', 2,
         'traceparent', '00-' || replace(gen_random_uuid()::text, '-', '') || '-b7ad6b7169203331-01',
         'time', to_char(now() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
       ),
       clock_timestamp()
  from generate_series($1::bigint, $1::bigint + $2::bigint - 1) as n
