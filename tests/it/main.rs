//! The story, on the real servers: one chapter a file. `./dev test` brings the servers up and runs it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "a test holds transactions open on purpose, and nobody cancels it")]

mod certificates;
mod house;
mod hurt;
mod languages;
mod load;
mod proxy;
mod registry;
mod sessions;
mod subscribed;

mod applications;
mod authorisation;
mod backfill;
mod batch;
mod broker;
mod clients;
mod cluster;
mod command_line;
mod consumers;
mod contract;
mod convergence;
mod dead_letters;
mod deletions;
mod digest;
mod external_ids;
mod feed;
mod forged;
mod fuzzed;
mod hardship;
mod idempotency;
mod import;
mod import_changed;
mod limits;
mod losses;
mod messages;
mod mirror;
mod operations;
mod outbox;
mod privacy;
mod races;
mod refusals;
mod relay;
mod rights;
mod sdk;
mod sdk_faults;
mod statements;
mod storm;
mod subscriptions;
mod tls;
mod tokens;
mod upgrade;
mod users;
mod watch;
