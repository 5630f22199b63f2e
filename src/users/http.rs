//! The face of the master data: `/v1/users`.

use std::collections::HashSet;

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Change, Changed, Error, Record, Refusal, Tombstone, User, UserId, Users, Verb, Version, reader::ReadError,
    writer::WriteError,
};
use crate::{
    json::Fault,
    web::{
        Body, BodyRefusals, Document, Id, IfNoneMatch, Params, Patch, Precondition, Problem, ProblemBody, Refusals,
        Trace, body_invalid, cursor, etag, read_cursor,
    },
};

pub fn routes() -> OpenApiRouter<Users> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(get_many))
        .routes(routes!(get, amend, replace, delete))
}

/// A body that carries a profile.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "describes the request; extractors read it")]
struct ProfileDocument {
    #[schema(example = json!({ "first_name": "Ana", "job_title": "Author" }))]
    profile: std::collections::HashMap<String, serde_json::Value>,
}

/// A body that carries a JSON merge patch (RFC 7396) of a profile: new values, and null where a field goes away.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "describes the request; extractors read it")]
struct ProfilePatch {
    #[schema(example = json!({ "job_title": "Editor", "nickname": null }))]
    profile: std::collections::HashMap<String, serde_json::Value>,
}

/// Refusals of a conditional request.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "only its derived description is used")]
enum ConditionRefusals {
    /// `version_mismatch`: If-Match or If-None-Match does not hold; `version` is the one that does, if there is a user.
    #[response(status = 412, content_type = "application/problem+json")]
    VersionMismatch(ProblemBody),
}

/// Refusals when there is no such user.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "only its derived description is used")]
enum Absences {
    /// `user_not_found`: nobody ever had this id.
    #[response(status = 404, content_type = "application/problem+json")]
    NotFound(ProblemBody),
    /// `user_deleted`, with `deleted_at` and `version`. Deletion is final: the id is not used again.
    #[response(status = 410, content_type = "application/problem+json")]
    Gone(ProblemBody),
}

/// Create a user under a new id.
///
/// Tells `user.created`.
#[utoipa::path(post, path = "/v1/users", tag = "users", operation_id = "createUser", request_body = ProfileDocument,
    responses(
        (status = 201, description = "The new user", body = User,
         headers(("Location" = String, description = "Path of the user"), ("ETag" = String, description = "The version, quoted"))),
        BodyRefusals, Refusals,
    ))]
async fn create(
    State(users): State<Users>,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
    Document(fields): Document,
) -> Result<Changed, Problem> {
    let verb = Verb::Create(users.admit(&fields).map_err(Refusal::Invalid)?);
    let change = Change { id: UserId::new(), verb, condition: Precondition::None, trace };
    Ok(users.change(change).await?)
}

/// One user, as of now.
#[utoipa::path(get, path = "/v1/users/{id}", tag = "users", operation_id = "getUser",
    params(("id" = UserId, Path, description = "The user"), AtLeast,
           ("If-None-Match" = Option<String>, Header, description = "ETags that the client holds")),
    responses(
        (status = 200, description = "The user", body = User, headers(("ETag" = String, description = "The version, quoted"))),
        (status = 304, description = "The client holds this version already"),
        Absences, Refusals,
    ))]
async fn get(
    State(users): State<Users>,
    Id(id): Id,
    Params(at_least): Params<AtLeast>,
    held: IfNoneMatch,
) -> Result<Response, Problem> {
    let record = users.get(UserId(id)).await?;
    let version = record.as_ref().map_or(0, Record::version);
    if at_least.min_version.is_some_and(|wanted| version < wanted) {
        return Err(Problem::unavailable("not_yet_visible", "a state this new cannot be seen here yet")
            .with_version(Some(version)));
    }
    match record {
        None => Err(Refusal::Missing.into()),
        Some(Record::Deleted(tombstone)) => Err(Refusal::Gone(tombstone).into()),
        Some(Record::Living(user)) if held.holds(user.version) => Ok(not_modified(user.version)),
        Some(Record::Living(user)) => Ok(Versioned(user).into_response()),
    }
}

/// Many users, as of now.
///
/// One result per id, in order of first mention. For consumers that handle many messages at once.
#[utoipa::path(post, path = "/v1/users:batchGet", tag = "users", operation_id = "batchGetUsers", request_body = Ids,
    responses((status = 200, description = "What is kept under each id", body = Results), BodyRefusals, Refusals))]
async fn get_many(
    State(users): State<Users>,
    Params(NoParams {}): Params<NoParams>,
    Body(asked): Body<Ids>,
) -> Result<Json<Results>, Problem> {
    let ids = asked.parse().map_err(body_invalid)?;
    let records = users.get_many(&ids).await?;
    let results = ids.into_iter().zip(records).map(|(id, record)| Lookup::new(id, record)).collect();
    Ok(Json(Results { results }))
}

/// Amend a user by a JSON merge patch (RFC 7396).
///
/// Tells `profile.updated` with the fields whose value really changed. A patch that changes nothing keeps the version and tells nobody.
#[utoipa::path(patch, path = "/v1/users/{id}", tag = "users", operation_id = "amendUser",
    request_body(content = ProfilePatch, content_type = "application/merge-patch+json"),
    params(("id" = UserId, Path, description = "The user"),
           ("If-Match" = Option<String>, Header, description = "Only if the user has one of these ETags")),
    responses(
        (status = 200, description = "The user as it is now", body = User, headers(("ETag" = String, description = "The version, quoted"))),
        Absences, BodyRefusals, ConditionRefusals, Refusals,
    ))]
async fn amend(
    State(users): State<Users>,
    Id(id): Id,
    condition: Precondition,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
    Patch(patch): Patch,
) -> Result<Changed, Problem> {
    Ok(users.change(Change { id: UserId(id), verb: Verb::Amend(patch), condition, trace }).await?)
}

/// Replace a user's profile, or create the user under an id of the client's own.
///
/// Tells `profile.updated` or `user.created`. With `If-None-Match: *` it only creates.
#[utoipa::path(put, path = "/v1/users/{id}", tag = "users", operation_id = "replaceUser", request_body = ProfileDocument,
    params(("id" = UserId, Path, description = "The user"),
           ("If-Match" = Option<String>, Header, description = "Only if the user has one of these ETags"),
           ("If-None-Match" = Option<String>, Header, description = "`*`: only if there is no such user")),
    responses(
        (status = 200, description = "The user as it is now", body = User, headers(("ETag" = String, description = "The version, quoted"))),
        (status = 201, description = "The new user", body = User,
         headers(("Location" = String, description = "Path of the user"), ("ETag" = String, description = "The version, quoted"))),
        (status = 410, description = "`user_deleted`, with `deleted_at` and `version`. Deletion is final: the id is not used again.",
         body = ProblemBody, content_type = "application/problem+json"),
        BodyRefusals, ConditionRefusals, Refusals,
    ))]
async fn replace(
    State(users): State<Users>,
    Id(id): Id,
    condition: Precondition,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
    Document(fields): Document,
) -> Result<Changed, Problem> {
    let verb = Verb::Replace(users.admit(&fields).map_err(Refusal::Invalid)?);
    Ok(users.change(Change { id: UserId(id), verb, condition, trace }).await?)
}

/// Delete a user for good.
///
/// Tells `user.deleted`. Of the user stay the id, the version and the time of deletion. Again: 204, and nobody is told.
#[utoipa::path(delete, path = "/v1/users/{id}", tag = "users", operation_id = "deleteUser",
    params(("id" = UserId, Path, description = "The user"),
           ("If-Match" = Option<String>, Header, description = "Only if the user has one of these ETags")),
    responses(
        (status = 204, description = "There is no such user any more"),
        (status = 404, description = "`user_not_found`: nobody ever had this id", body = ProblemBody, content_type = "application/problem+json"),
        ConditionRefusals, Refusals,
    ))]
async fn delete(
    State(users): State<Users>,
    Id(id): Id,
    condition: Precondition,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
) -> Result<Changed, Problem> {
    Ok(users.change(Change { id: UserId(id), verb: Verb::Delete, condition, trace }).await?)
}

/// A page of users in order of id.
#[utoipa::path(get, path = "/v1/users", tag = "users", operation_id = "listUsers", params(PageAfter),
    responses((status = 200, description = "A page of users", body = Page), Refusals))]
async fn list(State(users): State<Users>, Params(page): Params<PageAfter>) -> Result<Json<Page>, Problem> {
    let limit = page.limit.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Problem::bad_request("invalid_query", format!("limit is a number from 1 to {MAX_PAGE}")));
    }
    let after = page.after.as_deref().map(read_cursor).transpose()?.unwrap_or_default();
    // One more than asked for tells whether there is a next page.
    let mut found = users.list(UserId(after), limit + 1).await?;
    let is_last = found.len() as i64 <= limit;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| !is_last).map(|user| cursor(user.id.0));
    Ok(Json(Page { users: found, next }))
}

const DEFAULT_PAGE: i64 = 100;
const MAX_PAGE: i64 = 500;

/// A change takes none: a condition put there by mistake must not be silently without effect.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

#[derive(Debug, Clone, Copy, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AtLeast {
    /// Never answer with a state older than this version: rather 503 `not_yet_visible`.
    #[param(minimum = 1, required = false)]
    min_version: Option<i64>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PageAfter {
    /// Users in a page.
    #[param(minimum = 1, maximum = 500, default = 100, required = false)]
    limit: Option<i64>,
    /// `next` of the page before.
    #[param(required = false)]
    after: Option<String>,
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
        if !(1..=MAX_IDS).contains(&self.ids.len()) {
            return Err(vec![Fault::new("/ids", "length", format!("must be 1 to {MAX_IDS} ids"))]);
        }
        let (mut ids, mut mentioned, mut faults) = (vec![], HashSet::new(), vec![]);
        for (place, text) in self.ids.iter().enumerate() {
            match Id::from_text(text) {
                Some(Id(id)) if mentioned.insert(id) => ids.push(UserId(id)),
                Some(_) => {}
                None => faults.push(Fault::new(format!("/ids/{place}"), "format", "must be a UUID")),
            }
        }
        if faults.is_empty() { Ok(ids) } else { Err(faults) }
    }
}

const MAX_IDS: usize = 500;

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
    fn new(id: UserId, record: Option<Record>) -> Self {
        match record {
            Some(Record::Living(user)) => Self::Found { id, user },
            Some(Record::Deleted(Tombstone { version, deleted_at, .. })) => Self::Gone { id, version, deleted_at },
            None => Self::Missing { id },
        }
    }
}

/// A page of users.
#[derive(Serialize, utoipa::ToSchema)]
struct Page {
    users: Vec<User>,
    /// For the page after this one; null on the last page.
    #[schema(required = true)]
    next: Option<String>,
}

/// A user with its version as the entity tag.
struct Versioned(User);

impl IntoResponse for Versioned {
    fn into_response(self) -> Response {
        ([(header::ETAG, etag(self.0.version)), (header::CACHE_CONTROL, NO_CACHE)], Json(self.0)).into_response()
    }
}

/// A client may keep a copy, and has to ask each time whether it is still the latest.
const NO_CACHE: HeaderValue = HeaderValue::from_static("private, no-cache");

fn not_modified(version: i64) -> Response {
    (StatusCode::NOT_MODIFIED, [(header::ETAG, etag(version)), (header::CACHE_CONTROL, NO_CACHE)]).into_response()
}

impl IntoResponse for Changed {
    fn into_response(self) -> Response {
        match self.record {
            Record::Living(user) if self.created => {
                let location = [(header::LOCATION, format!("/v1/users/{}", user.id))];
                (StatusCode::CREATED, location, Versioned(user)).into_response()
            }
            Record::Living(user) => Versioned(user).into_response(),
            Record::Deleted(_) => StatusCode::NO_CONTENT.into_response(),
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Missing => Self::new(StatusCode::NOT_FOUND, "user_not_found", "nobody ever had this id"),
            Refusal::Gone(Tombstone { version, deleted_at, .. }) => {
                let deleted_at =
                    deleted_at.format(&Rfc3339).expect("a timestamp of the database has a four-digit year");
                Self::new(StatusCode::GONE, "user_deleted", "this user was deleted")
                    .with_version(Some(version))
                    .with_deleted_at(deleted_at)
            }
            Refusal::Stale(version) => {
                const DETAIL: &str =
                    "the user is not at the version that the condition asks for; read it and decide anew";
                Self::new(StatusCode::PRECONDITION_FAILED, "version_mismatch", DETAIL).with_version(version)
            }
            Refusal::Invalid(faults) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "profile_invalid",
                "the profile breaks the schema, see errors",
            )
            .with_errors(faults),
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        const OVERLOADED: &str = "more is waiting than can be done in good time";
        const UNREACHABLE: &str = "the database does not answer; nothing was changed";
        match error {
            Error::Refused(refusal) => refusal.into(),
            Error::Write(WriteError::Overloaded) | Error::Read(ReadError::Overloaded) => {
                Self::unavailable("overloaded", OVERLOADED)
            }
            Error::Write(WriteError::Unknown(_)) => Self::unavailable(
                "outcome_unknown",
                "the connection to the database broke while the change was under way: it may have been made",
            ),
            Error::Write(WriteError::NotWritten(_)) | Error::Read(ReadError::Failed(_)) => {
                Self::unavailable("database_unavailable", UNREACHABLE)
            }
            Error::Query(trouble) => {
                tracing::warn!("a query failed: {}", trouble.report());
                Self::unavailable("database_unavailable", UNREACHABLE)
            }
        }
    }
}
