-- How often a client may ask (src/web/rate.rs).

-- Requests a second and at once, such as 100/500. Null: as every instance is set (TIDINGS_RATE_LIMIT).
alter table clients add column rate_limit text check (rate_limit ~ '^[1-9][0-9]{0,6}/[1-9][0-9]{0,6}$');
