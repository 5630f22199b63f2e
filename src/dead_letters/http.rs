//! The face of dead letters: `/v1/subscriptions/{name}/dead-letters`.

use std::collections::BTreeMap;

use axum::{Json, http::StatusCode};
use serde::{Deserialize, Serialize};
use tidings_sdk::{envelope::FieldName, letter::Reason};
use time::OffsetDateTime;
use utoipa::{
    IntoParams,
    openapi::{ObjectBuilder, RefOr, Schema, schema::Type},
};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{DeadLetter, DeadLetters, Error, Redriven, Selection};
use crate::{
    clients::{Allowed, Guarded, ManageSubscriptions, Mine},
    json::Fault,
    telemetry::with_causes,
    web::{
        Body, Code, Cursor, MessageId, NoParams, Params, Place, Plain, Problem, Refusals, body_invalid, cursor,
        invalid_cursor, page_limit, read_cursor, refuses,
    },
};

pub fn routes() -> OpenApiRouter<Guarded<DeadLetters>> {
    OpenApiRouter::new().routes(routes!(list, purge)).routes(routes!(redrive)).routes(routes!(forget))
}

/// The verbs' errors.
struct Reading;
struct Redriving;
struct Confirming;
struct Missing;

refuses!(
    Reading => [SubscriptionNotFound, DatabaseUnavailable];
    Redriving => [QueueLost, NoBrokerHere, BrokerUnavailable];
    Confirming => [ConfirmationRequired];
    Missing => [DeadLetterNotFound];
);

/// What a subscription could not handle, in the order in which it came.
///
/// Ids, names of fields and reasons; never a value. Letters are here within seconds after the consumer gave up on them.
#[utoipa::path(get, path = "/v1/subscriptions/{name}/dead-letters", tag = "subscriptions", operation_id = "listDeadLetters", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription"), PageAfter),
    responses((status = 200, description = "A page of dead letters", body = Page), Refusals<(ManageSubscriptions, Mine, Params<PageAfter>, Cursor, Reading)>))]
async fn list(
    Allowed { caller, desk: letters, .. }: Allowed<ManageSubscriptions, DeadLetters>,
    Mine(name): Mine,
    Params(page): Params<PageAfter>,
    place: Place,
) -> Result<Json<Page>, Problem> {
    let limit = page_limit(page.limit, DEFAULT_PAGE, MAX_PAGE)?;
    let after = page.after.as_deref().map(read_place).transpose()?.unwrap_or_default();
    place.turn_at_the_registry(&caller.client).await?;
    let found = letters.list(&name, after, limit, page.reason).await?;
    let next = found.next.map(|place| cursor(Uuid::from_u128(place.unsigned_abs().into())));
    let total = found.by_reason.values().sum();
    let dead_letters = found.letters.into_iter().map(Shown::from).collect();
    Ok(Json(Page { dead_letters, next, total, by_reason: found.by_reason }))
}

/// Put dead letters back into the subscription's queue, once what was wrong is mended.
///
/// Up to 1,000 a request, the oldest first; repeat while `left` is not 0. Their attempts start anew; the header `tidings-redriven` says
/// how often a message was put back. A letter goes from the list when the broker has confirmed the message: a crash in between, or two
/// requests at once, put it into the queue twice, and lose nothing. Malformed letters cannot be put back.
#[utoipa::path(post, path = "/v1/subscriptions/{name}/dead-letters:redrive", tag = "subscriptions", operation_id = "redriveDeadLetters", security(("key" = ["subscriptions"])),
    request_body(content = Redrive, example = json!({ "reason": "handler_failed" })),
    params(("name" = crate::web::Name, Path, description = "The subscription")),
    responses((status = 200, description = "What was done, and what is left", body = Done),
        Refusals<(ManageSubscriptions, Mine, Plain, Params<NoParams>, Body<Redrive>, Reading, Redriving)>))]
async fn redrive(
    Allowed { caller, desk: letters, .. }: Allowed<ManageSubscriptions, DeadLetters>,
    Mine(name): Mine,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
    Body(asked): Body<Redrive>,
) -> Result<Json<Done>, Problem> {
    let selection = asked.selection().map_err(body_invalid)?;
    place.turn_at_the_registry(&caller.client).await?;
    let up_to = letters.last_place(&name).await?;
    Ok(Json(letters.redrive(&name, &selection, up_to).await?.into()))
}

/// Drop dead letters for good.
///
/// The users they speak of are not told again. `confirm` repeats the subscription's name; without it nothing is dropped, and the
/// refusal says how many there are.
#[utoipa::path(delete, path = "/v1/subscriptions/{name}/dead-letters", tag = "subscriptions", operation_id = "purgeDeadLetters", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription"), Purge),
    responses((status = 200, description = "How many were dropped", body = Purged),
        Refusals<(ManageSubscriptions, Mine, Plain, Params<Purge>, Reading, Confirming)>))]
async fn purge(
    Allowed { caller, desk: letters, .. }: Allowed<ManageSubscriptions, DeadLetters>,
    Mine(name): Mine,
    Plain: Plain,
    Params(asked): Params<Purge>,
    place: Place,
) -> Result<Json<Purged>, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    if asked.confirm.as_deref() != Some(name.as_str()) {
        let count = letters.count(&name, asked.reason).await?;
        let detail = format!("this would drop {count} dead letters for good; repeat it with confirm={name}");
        return Err(Problem::new(Code::ConfirmationRequired, detail));
    }
    let up_to = letters.last_place(&name).await?;
    Ok(Json(Purged { purged: letters.purge(&name, asked.reason, up_to).await? }))
}

/// Drop one dead letter for good.
#[utoipa::path(delete, path = "/v1/subscriptions/{name}/dead-letters/{message_id}", tag = "subscriptions", operation_id = "forgetDeadLetter", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription"),
           ("message_id" = Uuid, Path, description = "The message")),
    responses((status = 204, description = "It is gone"),
        Refusals<(ManageSubscriptions, Mine, MessageId, Plain, Params<NoParams>, Reading, Missing)>))]
async fn forget(
    Allowed { caller, desk: letters, .. }: Allowed<ManageSubscriptions, DeadLetters>,
    Mine(name): Mine,
    MessageId(message_id): MessageId,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
) -> Result<StatusCode, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    letters.forget(&name, message_id).await?;
    Ok(StatusCode::NO_CONTENT)
}

const DEFAULT_PAGE: i64 = 100;
const MAX_PAGE: i64 = 500;

fn read_place(text: &str) -> Result<i64, Problem> {
    i64::try_from(read_cursor(text)?.as_u128()).map_err(|_| invalid_cursor())
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PageAfter {
    /// Letters in a page.
    #[param(minimum = 1, maximum = 500, default = 100, required = false)]
    limit: Option<i64>,
    /// `next` of the page before.
    #[param(required = false)]
    after: Option<String>,
    /// Only letters of this reason.
    #[param(required = false, inline, value_type = DeadLetterReason, example = "handler_failed")]
    reason: Option<Reason>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Purge {
    /// The subscription's name once more.
    #[param(required = false, example = "orders")]
    confirm: Option<String>,
    /// Only letters of this reason.
    #[param(required = false, inline, value_type = DeadLetterReason, example = "malformed")]
    reason: Option<Reason>,
}

/// What a [`Reason`] is called, for the document.
struct DeadLetterReason;

impl utoipa::PartialSchema for DeadLetterReason {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .enum_values(Some(Reason::ALL.map(Reason::as_str)))
            .examples(["handler_failed"])
            .into()
    }
}

impl utoipa::ToSchema for DeadLetterReason {}

/// Which letters to put back: one of the three. The others are left out, or null.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Redrive {
    /// These.
    #[schema(value_type = Option<Vec<Uuid>>, max_items = 1000)]
    message_ids: Option<Vec<String>>,
    /// All of this reason.
    #[schema(value_type = Option<DeadLetterReason>)]
    reason: Option<Reason>,
    /// All: `true`.
    all: Option<bool>,
}

impl Redrive {
    fn selection(self) -> Result<Selection, Vec<Fault>> {
        let fault = |pointer: &str, code: &str, detail: &str| Err(vec![Fault::new(pointer, code, detail)]);
        match (self.message_ids, self.reason, self.all) {
            (Some(ids), None, None) if ids.len() <= 1_000 => {
                Ok(Selection::These(MessageId::in_array(&ids, "/message_ids")?))
            }
            (Some(_), None, None) => fault("/message_ids", "too_many", "at most 1000 in one request"),
            (None, Some(reason), None) => Ok(Selection::Reason(reason)),
            (None, None, Some(true)) => Ok(Selection::All),
            (None, None, Some(false)) => fault("/all", "value", "is true, or is left out"),
            _ => fault("", "exactly_one", "has exactly one of \"message_ids\", \"reason\" and \"all\""),
        }
    }
}

/// What a request to redrive did.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = Redriven)]
struct Done {
    /// Messages that are in the queue again.
    redriven: u64,
    /// Selected letters that are still here, and could be put back.
    left: i64,
    /// Selected letters that were no notices.
    not_redrivable: i64,
}

impl From<Redriven> for Done {
    fn from(Redriven { redriven, left, not_redrivable }: Redriven) -> Self {
        Self { redriven, left, not_redrivable }
    }
}

#[derive(Serialize, utoipa::ToSchema)]
struct Purged {
    purged: u64,
}

/// A page of dead letters.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = DeadLetters)]
struct Page {
    dead_letters: Vec<Shown>,
    /// For the page after this one; null on the last page.
    #[schema(required = true)]
    next: Option<String>,
    /// All letters of the subscription that are kept, 100,000 at most, whatever the filter.
    total: i64,
    /// The same by reason.
    #[schema(example = json!({ "handler_failed": 12, "malformed": 1 }))]
    by_reason: BTreeMap<String, i64>,
}

/// A dead letter, as programs and people see it.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = DeadLetter)]
pub struct Shown {
    message_id: Uuid,
    /// Whom it was about; null, as the next three, when the message was no notice.
    user_id: Option<Uuid>,
    version: Option<i64>,
    #[schema(example = "profile.updated")]
    event: Option<&'static str>,
    #[schema(value_type = Option<Vec<String>>, example = json!(["job_title"]))]
    changed_fields: Option<Vec<FieldName>>,
    /// Why it was given up.
    #[schema(value_type = DeadLetterReason)]
    reason: Reason,
    /// How often its consumer tried.
    attempts: i32,
    /// When it failed last, by the consumer's clock; null when nobody said so.
    #[serde(with = "time::serde::rfc3339::option")]
    failed_at: Option<OffsetDateTime>,
    /// Seconds since then, or since it came here.
    age_s: i64,
    /// How often it was put back before.
    redriven: i32,
    /// Of the message's body.
    size_bytes: i64,
}

impl From<DeadLetter> for Shown {
    fn from(letter: DeadLetter) -> Self {
        let notice = letter.notice.as_ref();
        Self {
            message_id: letter.message_id,
            user_id: notice.map(|notice| notice.user_id),
            version: notice.map(|notice| notice.version),
            event: notice.map(|notice| notice.event.name()),
            changed_fields: notice.map(|notice| notice.event.changed_fields().to_vec()),
            reason: letter.reason,
            attempts: letter.attempts,
            failed_at: letter.failed_at,
            age_s: letter.age_s,
            redriven: letter.redriven,
            size_bytes: letter.size_bytes,
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::NoSubscription => Code::SubscriptionNotFound.into(),
            Error::NoLetter => Code::DeadLetterNotFound.into(),
            Error::QueueLost => Code::QueueLost.into(),
            Error::NoBroker => Code::NoBrokerHere.into(),
            Error::Broker(cause) => {
                tracing::warn!("the broker did not take dead letters back: {}", with_causes(&cause));
                Self::new(Code::BrokerUnavailable, "the broker does not take messages; what it did not confirm is kept")
            }
            Error::Query(trouble) => {
                tracing::warn!("a query failed: {}", trouble.report());
                Self::new(Code::DatabaseUnavailable, "the database does not answer; nothing was lost")
            }
        }
    }
}
