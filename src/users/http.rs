//! The face of the master data: `/v1/users`.

use axum::{
    Extension, Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use time::format_description::well_known::Rfc3339;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Change, Changed, Done, Error, ExternalId, Naming, Record, Refusal, Tombstone, User, UserId, Users, Verb, Version,
    body::{Document, Patch},
    many,
    reader::ReadError,
    repeat::Claim,
    writer::WriteError,
};
use crate::{
    clients::{Allowed, Caller, Guarded, ReadUsers, WriteUsers, field_forbidden},
    json::{Fault, step},
    profile::{EXTERNAL_ID, Fields, TOO_LARGE},
    web::{
        Code, Cursor, Id, IdempotencyKey, NoParams, NoPrecondition, Params, Place, Precondition, Problem,
        ReadCondition, Refusals, Trace, View, cursor, etag_of_view, page_limit, read_cursor, refuses,
    },
};

pub fn routes() -> OpenApiRouter<Guarded<Users>> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .merge(many::routes())
        .routes(routes!(get, amend, replace, delete))
}

/// A body that carries a profile.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "describes the request; extractors read it")]
struct ProfileDocument {
    /// The id that other systems know the user by. Absent: it stays as it is. Null: it goes away.
    #[schema(required = false, nullable = true, min_length = 1, max_length = 200, example = "E-123")]
    external_id: Option<String>,
    #[schema(example = json!({ "first_name": "Ana", "job_title": "Author" }))]
    profile: std::collections::HashMap<String, serde_json::Value>,
}

/// A body that carries a JSON merge patch (RFC 7396) of a profile: new values, and null where a field goes away.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "describes the request; extractors read it")]
struct ProfilePatch {
    /// The id that other systems know the user by. Absent: it stays as it is. Null: it goes away.
    #[schema(required = false, nullable = true, min_length = 1, max_length = 200, example = "E-123")]
    external_id: Option<String>,
    /// May be absent beside an external id.
    #[schema(required = false, example = json!({ "job_title": "Editor", "nickname": null }))]
    profile: std::collections::HashMap<String, serde_json::Value>,
}

/// What the document says of `Idempotency-Key`.
const KEY: &str = "1 to 255 visible ASCII characters, the same however often the request is sent: it is done once. Within 24 hours a \
                   repetition is answered with the same status and the user as it is then, and with `Idempotency-Replayed`";

/// The verbs' errors.
pub struct Reading;
pub struct Writing;
struct Listing;
struct Admitting;
struct Claiming;
struct Repeating;
struct Unconditional;
struct Missing;
struct Gone;
struct TooNew;
struct Narrow;

refuses!(
    Reading => [Overloaded, DatabaseUnavailable];
    Writing => [Overloaded, DatabaseUnavailable, OutcomeUnknown];
    Listing => [DatabaseUnavailable];
    Admitting => [ProfileInvalid];
    Claiming => [ExternalIdTaken];
    Repeating => [InvalidIdempotencyKey, IdempotencyKeyInFlight, IdempotencyKeyReused];
    Unconditional => [PreconditionRequired];
    Missing => [UserNotFound];
    Gone => [UserDeleted];
    TooNew => [NotYetVisible];
    Narrow => [FieldForbidden];
);

/// Create a user under a new id.
///
/// Tells `user.created`.
#[utoipa::path(post, path = "/v1/users", tag = "users", operation_id = "createUser", security(("key" = ["users:write"])), request_body = ProfileDocument,
    params(("Idempotency-Key" = Option<crate::web::KeyOfRequest>, Header, description = KEY, example = "0f6e9c0a-1")),
    responses(
        (status = 201, description = "The new user", body = User,
         headers(("Location" = String, description = "Path of the user"), ("ETag" = String, description = "The version, quoted; for who sees only some fields a hash of their names stands behind it"))),
        Refusals<(WriteUsers, NoPrecondition, Repeating, Params<NoParams>, Document, Narrow, Gone, (Admitting, Claiming), Writing)>,
    ))]
async fn create(
    Allowed { caller, desk: users, .. }: Allowed<WriteUsers, Users>,
    NoPrecondition: NoPrecondition,
    key: IdempotencyKey,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
    Document { profile, external_id }: Document,
) -> Result<Seen, Problem> {
    check_fields(&caller, &profile, &external_id)?;
    let change = Change { external_id, ..Change::new(UserId::new(), Verb::Create(profile), trace) };
    Ok(users.change(key.claimed(&caller, change)).await?.seen_by(&caller))
}

/// One user, as of now.
#[utoipa::path(get, path = "/v1/users/{id}", tag = "users", operation_id = "getUser", security(("key" = ["users:read"])),
    params(("id" = UserId, Path, description = "The user"), AtLeast,
           ("If-Match" = Option<crate::web::EntityTags>, Header, description = "Only if the user has one of these ETags"),
           ("If-None-Match" = Option<crate::web::EntityTags>, Header, description = "ETags that the client holds")),
    responses(
        (status = 200, description = "The user", body = User, headers(("ETag" = String, description = "The version, quoted; for who sees only some fields a hash of their names stands behind it"))),
        (status = 304, description = "The client holds this version already", headers(("ETag" = String, description = "As of 200"))),
        Refusals<(ReadUsers, Id, Params<AtLeast>, ReadCondition, Missing, Gone, Reading, TooNew)>,
    ))]
async fn get(
    Allowed { caller, desk: users, .. }: Allowed<ReadUsers, Users>,
    Id(id): Id,
    Params(at_least): Params<AtLeast>,
    condition: ReadCondition,
) -> Result<Response, Problem> {
    if at_least.min_version.is_some_and(|version| version < 1) {
        return Err(Problem::new(Code::InvalidQuery, "min_version is a number from 1"));
    }
    let record = users.get(UserId(id)).await?;
    let version = record.as_ref().map_or(0, Record::version);
    if at_least.min_version.is_some_and(|wanted| version < wanted) {
        return Err(Problem::from(Code::NotYetVisible).with_version(Some(version)));
    }
    match record {
        None => Err(Refusal::Missing.into()),
        Some(Record::Deleted(tombstone)) => {
            let seen = SeenGone { caller, users: vec![id] };
            Ok((Extension(seen), Problem::from(Refusal::Gone(tombstone))).into_response())
        }
        Some(Record::Living(user)) if !condition.allows(user.version) => Err(Refusal::Stale(Some(user.version)).into()),
        Some(Record::Living(user)) if condition.holds(user.version, caller.view()) => {
            Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag_of_view(user.version, caller.view()))]).into_response())
        }
        Some(Record::Living(user)) => Ok(versioned(user.seen_by(&caller), caller.view())),
    }
}

/// Amend a user by a JSON merge patch (RFC 7396).
///
/// Tells `profile.updated` with the fields whose value really changed. A patch that changes nothing keeps the version and tells nobody.
#[utoipa::path(patch, path = "/v1/users/{id}", tag = "users", operation_id = "amendUser", security(("key" = ["users:write"])),
    request_body(content = ProfilePatch, content_type = "application/merge-patch+json"),
    params(("id" = UserId, Path, description = "The user"),
           ("Idempotency-Key" = Option<crate::web::KeyOfRequest>, Header, description = KEY, example = "0f6e9c0a-1"),
           ("If-Match" = Option<crate::web::EntityTags>, Header, description = "Only if the user has one of these ETags")),
    responses(
        (status = 200, description = "The user as it is now", body = User, headers(("ETag" = String, description = "The version, quoted; for who sees only some fields a hash of their names stands behind it"))),
        Refusals<(WriteUsers, Id, (Precondition, Unconditional), Repeating, Params<NoParams>, Patch, Narrow, (Missing, Gone), (Admitting, Claiming), Writing)>,
    ))]
async fn amend(
    Allowed { caller, desk: users, .. }: Allowed<WriteUsers, Users>,
    Id(id): Id,
    condition: Precondition,
    key: IdempotencyKey,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
    Patch { profile, external_id }: Patch,
) -> Result<Seen, Problem> {
    check_fields(&caller, &profile, &external_id)?;
    let change = Change { external_id, condition, ..Change::new(UserId(id), Verb::Amend(profile), trace) };
    Ok(users.change(key.claimed(&caller, change)).await?.seen_by(&caller))
}

/// Replace a user's profile, or create the user under an id of the client's own.
///
/// Tells `profile.updated` or `user.created`. With `If-None-Match: *` it only creates.
#[utoipa::path(put, path = "/v1/users/{id}", tag = "users", operation_id = "replaceUser", security(("key" = ["users:write"])), request_body = ProfileDocument,
    params(("id" = UserId, Path, description = "The user"),
           ("Idempotency-Key" = Option<crate::web::KeyOfRequest>, Header, description = KEY, example = "0f6e9c0a-1"),
           ("If-Match" = Option<crate::web::EntityTags>, Header, description = "Only if the user has one of these ETags"),
           ("If-None-Match" = Option<crate::web::AnyTag>, Header, description = "`*`: only if there is no such user")),
    responses(
        (status = 200, description = "The user as it is now", body = User, headers(("ETag" = String, description = "The version, quoted; for who sees only some fields a hash of their names stands behind it"))),
        (status = 201, description = "The new user", body = User,
         headers(("Location" = String, description = "Path of the user"), ("ETag" = String, description = "The version, quoted; for who sees only some fields a hash of their names stands behind it"))),
        Refusals<(WriteUsers, Id, (Precondition, Unconditional), Repeating, Params<NoParams>, Document, Narrow, Gone, (Admitting, Claiming), Writing)>,
    ))]
async fn replace(
    Allowed { caller, desk: users, .. }: Allowed<WriteUsers, Users>,
    Id(id): Id,
    condition: Precondition,
    key: IdempotencyKey,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
    Document { profile, external_id }: Document,
) -> Result<Seen, Problem> {
    check_fields(&caller, &profile, &external_id)?;
    let verb = Verb::Replace { fields: profile, within: caller.replaces() };
    let change = Change { external_id, condition, ..Change::new(UserId(id), verb, trace) };
    Ok(users.change(key.claimed(&caller, change)).await?.seen_by(&caller))
}

/// Delete a user for good.
///
/// Tells `user.deleted`. Of the user stay the id, the version and the time of deletion. Again: 204, and nobody is told.
#[utoipa::path(delete, path = "/v1/users/{id}", tag = "users", operation_id = "deleteUser", security(("key" = ["users:write"])),
    params(("id" = UserId, Path, description = "The user"),
           ("Idempotency-Key" = Option<crate::web::KeyOfRequest>, Header, description = KEY, example = "0f6e9c0a-1"),
           ("If-Match" = Option<crate::web::EntityTags>, Header, description = "Only if the user has one of these ETags")),
    responses(
        (status = 204, description = "There is no such user any more"),
        Refusals<(WriteUsers, Id, (Precondition, Unconditional), Repeating, Params<NoParams>, Narrow, Missing, Writing)>,
    ))]
async fn delete(
    Allowed { caller, desk: users, .. }: Allowed<WriteUsers, Users>,
    Id(id): Id,
    condition: Precondition,
    key: IdempotencyKey,
    Params(NoParams {}): Params<NoParams>,
    Trace(trace): Trace,
) -> Result<Seen, Problem> {
    if !caller.writes.is_all() {
        return Err(Problem::new(
            Code::FieldForbidden,
            "deleting a user takes every field from it, and this client may write only some",
        ));
    }
    let change = Change { condition, ..Change::new(UserId(id), Verb::Delete, trace) };
    Ok(users.change(key.claimed(&caller, change)).await?.seen_by(&caller))
}

/// A page of users in order of id; or, with `external_id`, the one user who has it, if there is one.
#[utoipa::path(get, path = "/v1/users", tag = "users", operation_id = "listUsers", security(("key" = ["users:read"])), params(PageAfter),
    responses((status = 200, description = "A page of users", body = Page), Refusals<(ReadUsers, Params<PageAfter>, Cursor, Narrow, Listing)>))]
async fn list(
    Allowed { caller, desk: users, .. }: Allowed<ReadUsers, Users>,
    Params(page): Params<PageAfter>,
    place: Place,
) -> Result<Json<Page>, Problem> {
    if let Some(external_id) = page.only(&caller)? {
        let found = place.to_the_end(async move { users.find(external_id).await }).await??;
        return Ok(Json(Page { users: found.into_iter().map(|user| user.seen_by(&caller)).collect(), next: None }));
    }
    let limit = page_limit(page.limit, DEFAULT_PAGE, MAX_PAGE)?;
    let after = page.after.as_deref().map(read_cursor).transpose()?.unwrap_or_default();
    place.turn(&caller.client).await?;
    // One more than asked for tells whether there is a next page.
    let mut found = place.to_the_end(async move { users.list(UserId(after), limit + 1).await }).await??;
    let is_last = found.len() as i64 <= limit;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| !is_last).map(|user| cursor(user.id.0));
    let users = found.into_iter().map(|user| user.seen_by(&caller)).collect();
    Ok(Json(Page { users, next }))
}

const DEFAULT_PAGE: i64 = 100;
const MAX_PAGE: i64 = 500;

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
    /// Only the user whom other systems know by this id; without `limit` and `after`.
    #[param(min_length = 1, max_length = 200, required = false, example = "E-123")]
    external_id: Option<String>,
}

impl PageAfter {
    /// Whom alone it asks for.
    fn only(&self, caller: &Caller) -> Result<Option<ExternalId>, Problem> {
        let Some(text) = &self.external_id else { return Ok(None) };
        if !caller.sees_field(EXTERNAL_ID) {
            const UNSEEN: &str = "this client does not read external_id, so it cannot ask by it";
            return Err(Problem::new(Code::FieldForbidden, UNSEEN));
        }
        let invalid = |detail: String| Problem::new(Code::InvalidQuery, detail);
        if self.limit.is_some() || self.after.is_some() {
            return Err(invalid("external_id stands alone: it asks for one user".to_owned()));
        }
        text.parse().map(Some).map_err(|error| invalid(format!("external_id {error}")))
    }
}

/// Goes with an answer, inside this service: whom its caller was told to be deleted.
#[derive(Clone)]
pub struct SeenGone {
    pub caller: Caller,
    pub users: Vec<Uuid>,
}

/// A page of users.
#[derive(Serialize, utoipa::ToSchema)]
struct Page {
    users: Vec<User>,
    /// For the page after this one; null on the last page.
    #[schema(required = true)]
    next: Option<String>,
}

/// Every field that is to be written has to be one that the caller may write.
pub fn check_fields(caller: &Caller, fields: &Fields, external_id: &Naming) -> Result<(), Problem> {
    if *external_id != Naming::Stays && !caller.writes.has(EXTERNAL_ID) {
        return Err(field_forbidden([step("", EXTERNAL_ID)]));
    }
    match caller.writes.strangers(fields) {
        strangers if strangers.is_empty() => Ok(()),
        strangers => Err(field_forbidden(strangers.into_iter().map(|name| step("/profile", name)))),
    }
}

impl User {
    pub fn seen_by(self, caller: &Caller) -> Self {
        let external_id = self.external_id.filter(|_| caller.sees_field(EXTERNAL_ID));
        Self { profile: caller.sees(self.profile), external_id, ..self }
    }
}

impl IdempotencyKey {
    /// `change`, as the one request that it is however often it is sent.
    fn claimed(self, caller: &Caller, change: Change) -> Change {
        let claim = self.0.map(|key| Claim::of(&caller.client, &key, &change));
        Change { claim, ..change }
    }
}

impl Done {
    fn seen_by(self, caller: &Caller) -> Seen {
        let done = Self { decided: seen_by(self.decided, caller), ..self };
        Seen { done, view: caller.view() }
    }
}

/// What was decided, as `caller` may hear it.
pub fn seen_by(decided: Result<Changed, Refusal>, caller: &Caller) -> Result<Changed, Refusal> {
    decided.map(|changed| changed.seen_by(caller)).map_err(|refusal| refusal.seen_by(caller))
}

impl Refusal {
    /// Of faults in fields that the caller may neither see nor write, no more than that there are some.
    fn seen_by(self, caller: &Caller) -> Self {
        let Self::Invalid(faults) = self else { return self };
        let (mut seen, hidden): (Vec<_>, Vec<_>) = faults.into_iter().partition(|fault| may_hear(caller, fault));
        if !hidden.is_empty() {
            const HIDDEN: &str = "with it the profile would break the schema in fields that are not for this client";
            seen.push(Fault::new("/profile", "hidden_field", HIDDEN));
        }
        Self::Invalid(seen)
    }
}

fn may_hear(caller: &Caller, fault: &Fault) -> bool {
    // No field's name has a character that a pointer spells otherwise.
    match fault.pointer.strip_prefix("/profile/").and_then(|rest| rest.split('/').next()) {
        Some(field) => caller.writes.has(field) || caller.sees_field(field),
        None => caller.writes.is_all() || caller.view().is_none() || fault.code == TOO_LARGE,
    }
}

/// What a change came to, as its client sees it.
struct Seen {
    done: Done,
    view: Option<View>,
}

/// That an answer is to a repetition, and the version that the request made when it was new.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const MADE_VERSION: HeaderName = HeaderName::from_static("idempotency-version");

impl IntoResponse for Seen {
    fn into_response(self) -> Response {
        let mut response = match self.done.decided {
            Ok(changed) => changed.answered(self.view),
            Err(refusal) => Problem::from(refusal).into_response(),
        };
        if let Some(version) = self.done.replayed {
            let headers = response.headers_mut();
            headers.insert(REPLAYED, HeaderValue::from_static("true"));
            headers.insert(MADE_VERSION, HeaderValue::from(version));
        }
        response
    }
}

impl Changed {
    fn seen_by(self, caller: &Caller) -> Self {
        match self.record {
            Record::Living(user) => Self { record: Record::Living(user.seen_by(caller)), ..self },
            Record::Deleted(_) => self,
        }
    }
}

/// A user, or what is seen of it, with the entity tag of that.
fn versioned(user: User, view: Option<View>) -> Response {
    ([(header::ETAG, etag_of_view(user.version, view))], Json(user)).into_response()
}

impl Changed {
    fn answered(self, view: Option<View>) -> Response {
        match self.record {
            Record::Living(user) if self.created => {
                let location = [(header::LOCATION, format!("/v1/users/{}", user.id))];
                (StatusCode::CREATED, location, versioned(user, view)).into_response()
            }
            Record::Living(user) => versioned(user, view),
            Record::Deleted(_) => StatusCode::NO_CONTENT.into_response(),
        }
    }
}

/// The condition does not hold; of `If-None-Match: *` that is so because there is somebody.
fn stale(version: Option<Version>) -> Problem {
    let detail = match version {
        Some(version) => format!(
            "the user is at version {version}, which is not what the condition asks for; read the user and decide anew"
        ),
        None => "nobody has this id, and the condition asks for somebody who has".to_owned(),
    };
    Problem::new(Code::VersionMismatch, detail).with_version(version)
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Missing => Code::UserNotFound.into(),
            Refusal::Gone(Tombstone { version, deleted_at, .. }) => {
                let deleted_at =
                    deleted_at.format(&Rfc3339).expect("a timestamp of the database has a four-digit year");
                Self::from(Code::UserDeleted).with_version(Some(version)).with_deleted_at(deleted_at)
            }
            Refusal::Stale(version) => stale(version),
            Refusal::Invalid(faults) => Self::from(Code::ProfileInvalid).with_errors(faults),
            Refusal::Taken => Code::ExternalIdTaken.into(),
            Refusal::Unconditional => Code::PreconditionRequired.into(),
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::InFlight => Self::from(Code::IdempotencyKeyInFlight).with_header(header::RETRY_AFTER, "1"),
            Error::Reused => Code::IdempotencyKeyReused.into(),
            Error::Write(WriteError::Overloaded) | Error::Read(ReadError::Overloaded) => Code::Overloaded.into(),
            Error::Write(WriteError::Unknown(_)) => Code::OutcomeUnknown.into(),
            Error::Write(WriteError::NotWritten(_)) | Error::Read(ReadError::Failed(_)) => {
                Code::DatabaseUnavailable.into()
            }
            Error::Query(trouble) => {
                tracing::warn!("a query failed: {}", trouble.report());
                Code::DatabaseUnavailable.into()
            }
            Error::Untold(why) => {
                // What is behind it is logged as elsewhere.
                drop(Self::from(*why));
                Code::OutcomeUnknown.into()
            }
        }
    }
}
