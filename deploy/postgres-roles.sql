-- The database roles of tidings, once for a server. Run by a superuser, as often as you like:
--   psql -d postgres -f deploy/postgres-roles.sql
-- It gives no passwords: \password tidings_owner, and so on, asks for them and sends only their hashes.
-- What each role may do is in deploy/postgres-grants.sql, which is run in the database.
--
--   tidings_owner   `tidings migrate`, `tidings client ..`: owns the tables
--   tidings_api     `tidings serve --no-relay`: users, registry and what callers ask; never takes an event out of the outbox
--   tidings_relay   `tidings relay`: outbox, queues, dead letters, backfills; cannot read a profile or a key
--   tidings_serve   `tidings serve`: API and relay in one process, so the rights of both

do $$
declare
  role text;
begin
  foreach role in array array['tidings_owner', 'tidings_api', 'tidings_relay', 'tidings_serve'] loop
    if not exists (select from pg_roles where rolname = role) then
      execute format('create role %I login', role);
    end if;
    execute format('alter role %I nosuperuser nocreatedb nocreaterole noreplication nobypassrls inherit', role);
    -- Names mean our tables, never something put before them.
    execute format('alter role %I set search_path = public, pg_temp', role);
    -- The server's log is no place for users' values: neither the row of a failed statement, nor its text, nor what it was given.
    execute format('alter role %I set log_error_verbosity = terse', role);
    execute format('alter role %I set log_min_error_statement = panic', role);
    execute format('alter role %I set log_statement = none', role);
    execute format('alter role %I set log_min_duration_statement = -1', role);
    execute format('alter role %I set log_min_duration_sample = -1', role);
    execute format('alter role %I set log_transaction_sample_rate = 0', role);
    execute format('alter role %I set log_parameter_max_length = 0', role);
    execute format('alter role %I set log_parameter_max_length_on_error = 0', role);
  end loop;
end
$$;

grant tidings_api, tidings_relay to tidings_serve;
