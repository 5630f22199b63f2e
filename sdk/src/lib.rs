//! What the service and its consumers agree on, and nothing of either side.
//!
//! Promise: one definition of the wire contract; the service publishes with it, a consumer reads with it.
//! Not here, on purpose: SQL by default, and any place in a message for a user's data.

pub mod cache;
pub mod consumer;
pub mod digest;
pub mod envelope;
pub mod letter;
#[cfg(feature = "mirror")]
pub mod mirror;
pub mod owner;
pub mod subscription;
pub mod topology;
pub mod trace;
