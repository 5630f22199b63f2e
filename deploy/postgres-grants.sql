-- What the roles of tidings may do in its database. Run in that database by a superuser, before the first migration and after each
-- further one (a new table is nobody's until its line below has run), as often as you like:
--   psql -d tidings -f deploy/postgres-grants.sql
-- Each table of the schema has lines here; a test fails when one has none.

-- Nobody else gets in, and nobody but the owner makes anything.
do $$
begin
  execute format('revoke all on database %I from public', current_database());
  execute format('grant connect on database %I to tidings_owner, tidings_api, tidings_relay, tidings_serve', current_database());
end
$$;
revoke all on schema public from public;
grant usage on schema public to tidings_api, tidings_relay;
grant usage, create on schema public to tidings_owner;

-- Before the first migration there are no tables: then there is nothing more to do.
do $$
begin
  if to_regclass('public.users') is null then
    return;
  end if;

  -- Anew from nothing, so that what a line no longer gives is taken away.
  revoke all on all tables in schema public from public, tidings_api, tidings_relay, tidings_serve;
  revoke all on all sequences in schema public from public, tidings_api, tidings_relay, tidings_serve;

  -- users. The API keeps them; a deletion leaves the row, so nobody deletes one. The relay backfills by id, version and time.
  grant select, insert, update on users to tidings_api;
  grant select (id, version, updated_at, deleted_at) on users to tidings_relay;

  -- changes: the feed's order, moved on with each user.
  grant select, insert, delete on changes to tidings_api;

  -- outbox. The API adds and looks how long it is; the relay reads, and takes out what the broker has confirmed.
  grant insert, select on outbox to tidings_api;
  grant select, delete on outbox to tidings_relay;
  grant select on sequence outbox_id_seq to tidings_relay;

  -- subscriptions: registered by callers of the API; watched, marked and expired by the relay's process.
  grant select, insert, update, delete on subscriptions to tidings_api;
  grant select, delete on subscriptions to tidings_relay;
  grant update (declared_revision, bound_keys, bound_fields, has_fields_exchange, unattended_since, consumer_seen_at, waiting_since,
    last_activity_at, expiry_warned_at, lost_at, missing_since, seen_at) on subscriptions to tidings_relay;

  -- subscriptions_looked_at: the watch's, and read by whoever finds a queue gone.
  grant select on subscriptions_looked_at to tidings_api;
  grant select, insert, update on subscriptions_looked_at to tidings_relay;

  -- dead_letters: collected by the relay's process; listed, redriven and purged by callers.
  grant select, delete on dead_letters to tidings_api;
  grant select, insert, update on dead_letters to tidings_relay;

  -- backfills: started, paused and cancelled by callers (and for a queue that was lost); carried on by the relay's process.
  grant select, insert, update on backfills to tidings_api;
  grant select, insert, update on backfills to tidings_relay;

  -- deletion_duties: who has to confirm deletions, since its queue is there; begun and ended with a declaration, whoever declares.
  grant select, insert, update on deletion_duties to tidings_api;
  grant select, insert, update on deletion_duties to tidings_relay;

  -- deletion_receipts, deletions_looked_at: who has confirmed, and who is reminded; the API's. The relay's process asks who is late, as such
  -- a subscription does not expire.
  grant select, insert, update, delete on deletion_receipts to tidings_api;
  grant select (subscription, confirmed_at) on deletion_receipts to tidings_relay;
  grant select, update on deletions_looked_at to tidings_api;

  -- clients, client_keys: read by the API, which notes when a key was used. Only the owner makes, changes or revokes one.
  grant select on clients to tidings_api;
  grant select on client_keys to tidings_api;
  grant update (last_used_at) on client_keys to tidings_api;

  -- idempotency_keys: what came of requests, kept by the API and let go after a day.
  grant select, insert, update, delete on idempotency_keys to tidings_api;

  -- _sqlx_migrations: the owner's; whoever serves looks whether its version's are there.
  grant select (version) on _sqlx_migrations to tidings_api, tidings_relay;
end
$$;
