//! Clients: who may ask, for what, and for which fields.
//!
//! Promise: no route under `/v1` does anything before its caller is known and may do it; what was revoked or has expired is refused
//! by every instance within a second.
//! Not here, on purpose: a key that can be read again. What is kept of one is a hash.

pub mod command;
mod fields;
mod http;
mod key;
mod model;
mod roster;
mod store;
mod token;

pub use fields::{Processing, routes};
pub(crate) use http::field_forbidden;
pub use http::{Administer, Allowed, Guarded, ManageSubscriptions, Mine, Permission, ReadUsers, WriteUsers};
pub use key::{Key, KeyId};
pub use model::{Caller, Client, InvalidName, InvalidScope, NewClient, Scope};
pub use roster::{Clients, check};
pub use store::{
    CLIENT_OF, CREATE, DECLARED, FIND, GRANTED, ISSUE, KEYS, LIVE_KEYS, PROCESSING, RETIRE, REVOKE, REVOKE_KEY, ROSTER,
    USED, create, declared_fields, issue, may_declare,
};
pub use token::Tokens;
