//! Web: HTTP manners, the same for every feature.
//!
//! Promise: every refusal is a problem+json with a stable code and the request's id; every wait has a deadline.
//! Not here, on purpose: any feature.

mod address;
mod answers;
mod body;
mod code;
mod connections;
mod etag;
mod idempotency;
mod limits;
mod manners;
mod meter;
mod params;
mod places;
mod problem;
mod rate;
mod server;
mod traffic;
mod turns;
mod typed;
mod wire;

pub use address::Proxies;
pub use body::{Body, Document, LIMIT_BYTES as BODY_LIMIT_BYTES, MergePatch, body_invalid};
pub use code::Code;
pub use etag::{AnyTag, EntityTags, NoPrecondition, Precondition, ReadCondition, View, etag, etag_of_view};
pub use idempotency::{IdempotencyKey, KeyOfRequest, Plain};
pub use limits::{LimitSettings, Limits};
pub use manners::{Trace, manners, may_be_done, method_not_allowed, route_not_found, to_the_end};
pub use meter::{Meter, Price};
pub use params::{Cursor, Id, MessageId, Name, NoParams, Params, cursor, invalid_cursor, page_limit, read_cursor};
pub use places::Place;
pub(crate) use problem::refuses;
pub use problem::{Problem, ProblemBody, Refusals, Refuses, examples};
pub use rate::Rate;
pub use server::{Door, Peer, listen, serve};
pub use traffic::Traffic;
pub use turns::{LineFull, Turns};
