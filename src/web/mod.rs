//! Web: HTTP manners, the same for every feature.
//!
//! Promise: every refusal is a problem+json with a stable code and the request's id; every wait has a deadline.
//! Not here, on purpose: any feature.

mod body;
mod etag;
mod manners;
mod params;
mod problem;
mod server;
mod typed;

pub use body::{Body, BodyRefusals, Document, Patch, body_invalid};
pub use etag::{IfNoneMatch, Precondition, etag};
pub use manners::{Trace, manners, method_not_allowed, route_not_found};
pub use params::{Id, MessageId, Name, Params, cursor, invalid_cursor, read_cursor};
pub use problem::{Problem, ProblemBody, Refusals};
pub use server::serve;
