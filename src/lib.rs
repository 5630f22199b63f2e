//! tidings: the owner of user master data, which tells every other application *that* something changed, never *what to*.
//!
//! Read in the order of a change's walk: [`users`] keeps it and writes its event to the [`outbox`] in the same statement, the
//! [`relay`] carries the event to the [`broker`], a consumer fetches the latest record over [`web`].

pub mod db;
pub mod json;
pub mod lifecycle;
pub mod profile;
pub mod telemetry;
