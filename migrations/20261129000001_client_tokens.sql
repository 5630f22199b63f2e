-- Which clients are named by tokens (src/clients/roster.rs): who can give names at the identity provider has not all that keys open.

alter table clients add column takes_tokens boolean not null default false;
update clients
   set takes_tokens = true
 where not exists (select from client_keys where client_keys.client = clients.name);
