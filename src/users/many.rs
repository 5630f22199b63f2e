//! Many users in one request: `POST /v1/users:batchGet` and `POST /v1/users:batchReplace`.
//!
//! Promise: each user is answered for by itself, as the request for that one would have been.

use std::collections::HashSet;

use axum::{Extension, Json};
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tidings_sdk::trace::Traceparent;
use time::OffsetDateTime;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Change, Changed, Record, Tombstone, User, UserId, Users, Verb, Version,
    body::{Document, Documents, Entry, MAX_ENTRIES},
    http::{Reading, SeenGone, Writing, check_fields, seen_by},
    writer,
};
use crate::{
    clients::{Allowed, Caller, Guarded, ReadUsers, WriteUsers},
    json::Fault,
    web::{Body, Id, NoParams, Params, Place, Plain, Price, Problem, ProblemBody, Refusals, Trace, body_invalid},
};

/// Users of one request who are planned or written at the same time: as many as go in one statement.
const AT_ONCE: usize = writer::BATCH;

pub fn routes() -> OpenApiRouter<Guarded<Users>> {
    OpenApiRouter::new().routes(routes!(get_many)).routes(routes!(replace_many))
}

/// Many users, as of now.
///
/// One result per id, in order of first mention. For consumers that handle many messages at once.
#[utoipa::path(post, path = "/v1/users:batchGet", tag = "users", operation_id = "batchGetUsers", security(("key" = ["users:read"])), request_body = Ids,
    responses((status = 200, description = "What is kept under each id", body = Results), Refusals<(ReadUsers, Params<NoParams>, Body<Ids>, Reading)>))]
async fn get_many(
    Allowed { caller, desk: users, .. }: Allowed<ReadUsers, Users>,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
    Body(asked): Body<Ids>,
) -> Result<(Extension<SeenGone>, Json<Results>), Problem> {
    let ids = asked.parse().map_err(body_invalid)?;
    place.turn(&caller.client).await?;
    let records = users.get_many(&ids).await?;
    let results: Vec<_> = ids.into_iter().zip(records).map(|(id, record)| Lookup::new(id, record, &caller)).collect();
    let users = results.iter().filter_map(Lookup::gone).collect();
    Ok((Extension(SeenGone { caller, users }), Json(Results { results })))
}

/// Whom to look up.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Ids {
    /// Who is named more than once is answered once.
    #[schema(value_type = Vec<UserId>, min_items = 1, max_items = 500)]
    ids: Vec<String>,
}

impl Ids {
    /// Each id once, in order of first mention; or what is wrong with all of them.
    fn parse(&self) -> Result<Vec<UserId>, Vec<Fault>> {
        if !(1..=MAX_ENTRIES).contains(&self.ids.len()) {
            return Err(vec![Fault::new("/ids", "length", format!("must be 1 to {MAX_ENTRIES} ids"))]);
        }
        let mut mentioned = HashSet::new();
        let ids = Id::in_array(&self.ids, "/ids")?;
        Ok(ids.into_iter().filter(|id| mentioned.insert(*id)).map(UserId).collect())
    }
}

/// What was found, in order of first mention.
#[derive(Serialize, utoipa::ToSchema)]
struct Results {
    results: Vec<Lookup>,
}

/// What is kept under an id.
#[derive(Serialize, utoipa::ToSchema)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Lookup {
    Found {
        id: UserId,
        user: User,
    },
    /// Deleted.
    Gone {
        id: UserId,
        /// The version that the deletion made.
        #[schema(value_type = i64, minimum = 1, example = 5)]
        version: Version,
        #[serde(with = "time::serde::rfc3339")]
        deleted_at: OffsetDateTime,
    },
    /// Nobody ever had this id.
    Missing {
        id: UserId,
    },
}

impl Lookup {
    fn gone(&self) -> Option<Uuid> {
        match self {
            Self::Gone { id, .. } => Some(id.0),
            Self::Found { .. } | Self::Missing { .. } => None,
        }
    }

    fn new(id: UserId, record: Option<Record>, caller: &Caller) -> Self {
        match record {
            Some(Record::Living(user)) => Self::Found { id, user: user.seen_by(caller) },
            Some(Record::Deleted(Tombstone { version, deleted_at, .. })) => Self::Gone { id, version, deleted_at },
            None => Self::Missing { id },
        }
    }
}

/// Replace the profiles of many users, or create them under ids of the client's own.
///
/// Each is done as `PUT /v1/users/{id}` would have done it, and has an outcome of its own, in the order of the body: what refuses one does
/// not hold up the others, and they are not one transaction. A list with something in it that is no user is refused as a whole. Costs a
/// token for each user.
#[utoipa::path(post, path = "/v1/users:batchReplace", tag = "users", operation_id = "batchReplaceUsers", security(("key" = ["users:write"])),
    request_body = ProfileDocuments,
    responses((status = 200, description = "What became of each user", body = Outcomes),
              Refusals<(WriteUsers, Plain, Params<NoParams>, Documents, Writing)>))]
async fn replace_many(
    Allowed { caller, desk: users, .. }: Allowed<WriteUsers, Users>,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
    place: Place,
    Documents(entries): Documents,
) -> Result<(Extension<Price>, Json<Outcomes>), Problem> {
    place.turn_to_write(&caller.client).await?;
    let ids: Vec<UserId> = entries.iter().map(|entry| entry.id).collect();
    let before = users.get_many(&ids).await?;
    let lane = users.lane();
    let results: Vec<Outcome> = stream::iter(entries.into_iter().zip(before))
        .map(async |(entry, before)| {
            let (id, change) = (entry.id, entry.replacement(&caller, trace));
            let decided = match change {
                Ok(change) => users.change_read(lane, change, before).await.map_err(Problem::from),
                Err(problem) => Err(problem),
            };
            Outcome::new(id, decided.and_then(|decided| seen_by(decided, &caller).map_err(Problem::from)))
        })
        .buffered(AT_ONCE)
        .collect()
        .await;
    Ok((Extension(Price::of_many(results.len())), Json(Outcomes { results })))
}

impl Entry {
    /// What this entry asks for.
    fn replacement(self, caller: &Caller, trace: Traceparent) -> Result<Change, Problem> {
        let Self { id, condition, document: Document { profile, external_id } } = self;
        check_fields(caller, &profile, &external_id)?;
        let verb = Verb::Replace { fields: profile, within: caller.replaces() };
        Ok(Change { external_id, condition, ..Change::new(id, verb, trace) })
    }
}

/// Bodies of `PUT`, each with whose it is.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "describes the request; extractors read it")]
struct ProfileDocuments {
    /// No two of the same id.
    #[schema(min_items = 1, max_items = 500)]
    users: Vec<ProfileEntry>,
}

/// A user as it should be.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "describes the request; extractors read it")]
struct ProfileEntry {
    id: UserId,
    /// Only if the user has this version; 0: only if there is no such user.
    #[schema(value_type = i64, required = false, minimum = 0, example = 6)]
    if_version: Option<i64>,
    /// The id that other systems know the user by. Absent: it stays as it is. Null: it goes away.
    #[schema(required = false, nullable = true, min_length = 1, max_length = 200, example = "E-123")]
    external_id: Option<String>,
    #[schema(example = json!({ "first_name": "Ana", "job_title": "Author" }))]
    profile: std::collections::HashMap<String, serde_json::Value>,
}

/// What became of each, in the order of the body.
#[derive(Serialize, utoipa::ToSchema)]
struct Outcomes {
    results: Vec<Outcome>,
}

/// What became of one.
#[derive(Serialize, utoipa::ToSchema)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Outcome {
    Replaced {
        id: UserId,
        /// As it is now.
        #[schema(value_type = i64, minimum = 1, example = 7)]
        version: Version,
    },
    Created {
        id: UserId,
        #[schema(value_type = i64, minimum = 1, example = 1)]
        version: Version,
    },
    /// It was so already; nobody is told.
    Unchanged {
        id: UserId,
        #[schema(value_type = i64, minimum = 1, example = 7)]
        version: Version,
    },
    Refused {
        id: UserId,
        /// What `PUT` would have answered; pointers begin at this entry.
        problem: ProblemBody,
    },
}

impl Outcome {
    fn new(id: UserId, decided: Result<Changed, Problem>) -> Self {
        match decided {
            Err(problem) => Self::Refused { id, problem: problem.inside() },
            Ok(Changed { record, created: true, .. }) => Self::Created { id, version: record.version() },
            Ok(Changed { record, is_written: true, .. }) => Self::Replaced { id, version: record.version() },
            Ok(Changed { record, .. }) => Self::Unchanged { id, version: record.version() },
        }
    }
}
