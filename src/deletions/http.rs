//! The face of deletions: `/v1/deletions`.

use axum::{
    Json,
    extract::{Request, State as Of},
    http::StatusCode,
    middleware::{FromFnLayer, Next, from_fn_with_state},
    response::Response,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tidings_sdk::subscription::SubscriptionName;
use time::OffsetDateTime;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{Confirmation, Deletion, Deletions, Error, How, Overdue, Place, Recorder, State};
use crate::{
    clients::{Administer, Allowed, Guarded, ReadUsers},
    json::Fault,
    users::SeenGone,
    web::{
        Body, Code, Cursor, Id, NoParams, Params, Plain, Problem, Refusals, body_invalid, invalid_cursor, page_limit,
        refuses,
    },
};

/// The verbs' errors.
struct Finding;
struct Confirming;
struct Listing;

refuses!(
    Finding => [UserNotFound, UserNotDeleted, DatabaseUnavailable];
    Confirming => [UserNotFound, UserNotDeleted, SubscriptionNotFound, Overloaded, DatabaseUnavailable];
    Listing => [DatabaseUnavailable];
);

pub fn routes() -> OpenApiRouter<Guarded<Deletions>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(find)).routes(routes!(confirm))
}

/// A deletion, and who has confirmed it.
///
/// Who has to is fixed by the moment of the deletion: every subscription that was registered, and bound, for `user.deleted` then. One that
/// is deleted owes nothing any more; what it confirmed stays.
#[utoipa::path(get, path = "/v1/deletions/{user_id}", tag = "deletions", operation_id = "getDeletion", security(("key" = ["admin"])),
    params(("user_id" = Uuid, Path, description = "The user who was deleted")),
    responses((status = 200, description = "The deletion", body = Shown), Refusals<(Administer, Id, Params<NoParams>, Finding)>))]
async fn find(
    Allowed { desk: deletions, .. }: Allowed<Administer, Deletions>,
    Id(user_id): Id,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Json<Shown>, Problem> {
    Ok(Json(deletions.ledger().find(user_id).await?.into()))
}

/// Say for a subscription that it is done with a deletion: whatever it held of that user is gone.
///
/// Only for a subscription that the client stands for. Send it when the work is committed; again and again does no harm. `tidings-sdk` sends it after its handler's success.
#[utoipa::path(post, path = "/v1/deletions/{user_id}/receipts", tag = "deletions", operation_id = "confirmDeletion", security(("key" = ["users:read"])),
    request_body(content = Receipt, example = json!({ "subscription": "orders" })),
    params(("user_id" = Uuid, Path, description = "The user who was deleted")),
    responses((status = 204, description = "Kept"), Refusals<(ReadUsers, Id, Plain, Params<NoParams>, Body<Receipt>, Confirming)>))]
async fn confirm(
    Allowed { caller, desk: deletions, .. }: Allowed<ReadUsers, Deletions>,
    Id(user_id): Id,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    Body(receipt): Body<Receipt>,
) -> Result<StatusCode, Problem> {
    let client = (!caller.is_admin()).then(|| caller.client.clone());
    deletions.confirm(user_id, receipt.subscription()?, client).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Deletions that some subscription has not confirmed in time, the oldest first, and by whom.
///
/// A deletion is listed within seconds after its deadline (`TIDINGS_ERASURE_DEADLINE`), until the last who is late has confirmed it.
#[utoipa::path(get, path = "/v1/deletions", tag = "deletions", operation_id = "listDeletions", security(("key" = ["admin"])), params(PageAfter),
    responses((status = 200, description = "A page of deletions", body = Page), Refusals<(Administer, Params<PageAfter>, Cursor, Listing)>))]
async fn list(
    Allowed { desk: deletions, .. }: Allowed<Administer, Deletions>,
    Params(page): Params<PageAfter>,
) -> Result<Json<Page>, Problem> {
    let Wanted::Overdue = page.state;
    let limit = page_limit(page.limit, DEFAULT_PAGE, MAX_PAGE)?;
    let after = page.after.as_deref().map(read_place).transpose()?.unwrap_or(Place::START);
    // One more than asked for tells whether there is a next page.
    let mut found = deletions.ledger().overdue(after, limit + 1).await?;
    let is_last = found.len() as i64 <= limit;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| !is_last).map(place);
    Ok(Json(Page { deletions: found.into_iter().map(Late::from).collect(), next }))
}

type Observing = fn(Of<Recorder>, Request, Next) -> BoxFuture<'static, Response>;

/// Around everything that an answer may turn into: notes who was told that one is gone. A client that stands for one subscription has then asked
/// for it; of one that stands for several nobody could say for which.
pub fn observing(deletions: &Deletions) -> FromFnLayer<Observing, Recorder, (Of<Recorder>, Request)> {
    from_fn_with_state(deletions.recorder().clone(), observe as Observing)
}

fn observe(Of(recorder): Of<Recorder>, request: Request, next: Next) -> BoxFuture<'static, Response> {
    Box::pin(async move {
        let response = next.run(request).await;
        if let Some(SeenGone { caller, users }) = response.extensions().get()
            && let (Some(subscription), 1) = (caller.subscriptions.first(), caller.subscriptions.len())
        {
            users.iter().for_each(|user| recorder.observe(*user, subscription));
        }
        response
    })
}

const DEFAULT_PAGE: i64 = 100;
const MAX_PAGE: i64 = 500;

/// Where a page ended: microseconds, as the database counts, and an id.
fn place(last: &Overdue) -> String {
    let micros = (last.deleted_at.unix_timestamp_nanos() / 1_000) as i64;
    URL_SAFE_NO_PAD.encode([&micros.to_be_bytes()[..], last.user_id.as_bytes()].concat())
}

fn read_place(text: &str) -> Result<Place, Problem> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| <[u8; 24]>::try_from(bytes).ok());
    let bytes = bytes.ok_or_else(invalid_cursor)?;
    let (micros, id) = bytes.split_first_chunk::<8>().ok_or_else(invalid_cursor)?;
    let nanos = i128::from(i64::from_be_bytes(*micros)) * 1_000;
    let deleted_at = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok();
    // Nobody was deleted before, and of times far before the database knows nothing.
    let deleted_at = deleted_at.filter(|at| *at >= Place::START.deleted_at).ok_or_else(invalid_cursor)?;
    Ok(Place { deleted_at, user_id: Uuid::from_slice(id).map_err(|_| invalid_cursor())? })
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PageAfter {
    /// Which deletions.
    #[param(inline)]
    state: Wanted,
    /// Deletions in a page.
    #[param(minimum = 1, maximum = 500, default = 100, required = false)]
    limit: Option<i64>,
    /// `next` of the page before.
    #[param(required = false)]
    after: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
enum Wanted {
    Overdue,
}

/// Who confirms.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = DeletionReceipt)]
struct Receipt {
    /// A registered subscription.
    #[schema(value_type = crate::web::Name)]
    subscription: String,
}

impl Receipt {
    fn subscription(&self) -> Result<SubscriptionName, Problem> {
        self.subscription
            .parse()
            .map_err(|_| body_invalid(vec![Fault::new("/subscription", "format", "is no name of a subscription")]))
    }
}

/// A deletion.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = Deletion)]
pub struct Shown {
    user_id: Uuid,
    /// The version that the deletion made.
    #[schema(minimum = 1, example = 5)]
    version: i64,
    #[serde(with = "time::serde::rfc3339")]
    deleted_at: OffsetDateTime,
    /// Everybody who has to confirm it or has, in order of their names.
    subscriptions: Vec<ShownConfirmation>,
}

/// How a subscription stands to a deletion.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = DeletionConfirmation)]
struct ShownConfirmation {
    #[schema(example = "orders")]
    subscription: String,
    /// `confirmed`; `pending` while there is time; `overdue` after.
    #[schema(example = "confirmed")]
    state: &'static str,
    /// With `confirmed`: when; else null.
    #[serde(with = "time::serde::rfc3339::option")]
    #[schema(required = true)]
    confirmed_at: Option<OffsetDateTime>,
    /// With `confirmed`: `receipt`, it said that it is done; or `fetched`, it was seen fetching the user and was answered 410. Else null.
    #[schema(required = true, example = "receipt")]
    how: Option<&'static str>,
}

impl From<Deletion> for Shown {
    fn from(deletion: Deletion) -> Self {
        let Deletion { user_id, version, deleted_at, confirmations } = deletion;
        let subscriptions = confirmations.into_iter().map(ShownConfirmation::from).collect();
        Self { user_id, version, deleted_at, subscriptions }
    }
}

impl From<Confirmation> for ShownConfirmation {
    fn from(Confirmation { subscription, state }: Confirmation) -> Self {
        let (state, confirmed_at, how) = match state {
            State::Confirmed { at, how } => ("confirmed", Some(at), Some(How::as_str(how))),
            State::Pending => ("pending", None, None),
            State::Overdue => ("overdue", None, None),
        };
        Self { subscription, state, confirmed_at, how }
    }
}

/// A page of deletions.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = OverdueDeletions)]
struct Page {
    deletions: Vec<Late>,
    /// For the page after this one; null on the last page.
    #[schema(required = true)]
    next: Option<String>,
}

/// A deletion that some have not confirmed in time.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = OverdueDeletion)]
pub struct Late {
    user_id: Uuid,
    /// The version that the deletion made.
    #[schema(minimum = 1, example = 5)]
    version: i64,
    #[serde(with = "time::serde::rfc3339")]
    deleted_at: OffsetDateTime,
    /// Who is late.
    #[schema(example = json!(["orders"]))]
    overdue: Vec<String>,
}

impl From<Overdue> for Late {
    fn from(Overdue { user_id, version, deleted_at, subscriptions }: Overdue) -> Self {
        Self { user_id, version, deleted_at, overdue: subscriptions }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        const UNREACHABLE: &str = "the database does not answer; send it again";
        match error {
            Error::UnknownUser => Code::UserNotFound.into(),
            Error::Living(version) => Self::from(Code::UserNotDeleted).with_version(Some(version)),
            Error::UnknownSubscription => Code::SubscriptionNotFound.into(),
            Error::Overloaded => Code::Overloaded.into(),
            // Told in the log by the recorder.
            Error::Record(_) => Self::new(Code::DatabaseUnavailable, UNREACHABLE),
            Error::Query(trouble) => {
                tracing::warn!("a query failed: {}", trouble.report());
                Self::new(Code::DatabaseUnavailable, UNREACHABLE)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_goes_on_where_the_last_one_ended() {
        let deleted_at = time::macros::datetime!(2026-11-24 06:00:00.123456 UTC);
        let last = Overdue { user_id: Uuid::from_u128(7), version: 2, deleted_at, subscriptions: vec![] };
        assert_eq!(read_place(&place(&last)).unwrap(), Place { deleted_at, user_id: Uuid::from_u128(7) });
        for wrong in ["", "x", "AAAA", &URL_SAFE_NO_PAD.encode([0xff; 25])] {
            assert!(read_place(wrong).is_err(), "{wrong}");
        }
        // Far from any time, or from any that the database knows.
        let at = |micros: i64| URL_SAFE_NO_PAD.encode([&micros.to_be_bytes()[..], &[0; 16]].concat());
        let years = |count: i64| count * 365 * 24 * 3600 * 1_000_000;
        for wrong in [i64::MAX, years(9000), years(-9000), -1] {
            assert!(read_place(&at(wrong)).is_err(), "{wrong}");
        }
        assert!(read_place(&at(years(50))).is_ok());
    }
}
