//! What the service and its consumers agree on, and what a consumer in Rust needs to keep up.
//!
//! [`envelope`], [`subscription`], [`topology`], [`letter`], [`digest`] and [`trace`] are the contract, which the service stands on too, as it does on [`trust`];
//! [`consumer`], [`owner`], [`cache`] and (with the feature of that name) `mirror` are for applications that listen.
//!
//! Promise: one definition of the wire contract; the service publishes with it, a consumer reads with it.
//! Not here, on purpose: SQL unless a feature asks for it, and any place in a message for a user's data.

use std::time::Duration;

/// As good as for ever. A clock that is asked for more overflows.
pub(crate) const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

pub mod cache;
pub mod consumer;
mod dial;
pub mod digest;
pub mod envelope;
pub mod letter;
#[cfg(feature = "mirror")]
pub mod mirror;
pub mod owner;
pub mod subscription;
pub mod topology;
pub mod trace;
pub mod trust;
