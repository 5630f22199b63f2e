-- $1: the first number, $2: how many. The n-th row is about the n-th user. Without the library's hint, see POLL_S in relay.py.
insert into outbox (queue, payload, headers)
select 'profile.updated',
       convert_to('{"user_id":"00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0') || '","changed_fields":["job_title"]}', 'utf8'),
       jsonb_build_object(
         'id', gen_random_uuid(),
         'subject', '00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'),
         'version', '2',
         'traceparent', '00-' || replace(gen_random_uuid()::text, '-', '') || '-b7ad6b7169203331-01',
         'time', to_char(now() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
         'fields', 'job_title',
         'content-type', 'application/json',
         'correlation_id', gen_random_uuid()
       )
  from generate_series($1::bigint, $1::bigint + $2::bigint - 1) as n
