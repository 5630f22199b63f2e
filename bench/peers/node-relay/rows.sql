-- $1: the first number, $2: how many. The n-th row is about the n-th user.
insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
select gen_random_uuid(),
       'profile.updated',
       ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
       2,
       '["job_title"]',
       '00-' || replace(gen_random_uuid()::text, '-', '') || '-b7ad6b7169203331-01'
  from generate_series($1::bigint, $1::bigint + $2::bigint - 1) as n
