-- Whether the broker is known to have the exchange that chooses by field (src/subscriptions/registrar.rs). bound_fields is no proof: it has what
-- is wanted before it is declared, and what was never there is not lost.
alter table subscriptions add column has_fields_exchange boolean not null default false;
update subscriptions
   set has_fields_exchange = true
 where declared_revision > 0 and cardinality(bound_fields) > 0;
