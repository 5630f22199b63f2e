//! tidings: the owner of user master data, which tells every other application *that* something changed, never *what to*.
//!
//! Read in the order of a change's walk: [`users`] keeps it and writes its event to the [`outbox`] in the same statement, the
//! [`relay`] carries the event to the [`broker`], a consumer fetches the latest record over [`web`].

pub mod app;
pub mod audit_leaks;
pub mod backfill;
pub mod broker;
pub mod clients;
pub mod config;
pub mod db;
pub mod dead_letters;
pub mod deletions;
pub mod descriptors;
pub mod docs;
pub mod feed;
pub mod import;
pub mod json;
pub mod lead;
pub mod lifecycle;
pub mod ops;
pub mod outbox;
pub mod profile;
pub mod relay;
pub mod roles;
pub mod subscriptions;
pub mod tail;
pub mod telemetry;
pub mod users;
pub mod web;
