-- When the watch last saw this queue, while it did not see all (src/subscriptions/watch.rs): one that the broker keeps from its sight is not to
-- have the loss of another told from further back. Null: as subscriptions_looked_at has it for all. The later of both counts.
alter table subscriptions add column seen_at timestamptz;
