//! The face of backfills: `/v1/subscriptions/{name}/backfill`.

use std::ops::RangeInclusive;

use axum::{
    Json,
    http::{StatusCode, header},
};
use serde::{Deserialize, Serialize};
use tidings_sdk::{envelope::read_time, subscription::SubscriptionName};
use time::OffsetDateTime;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Action, Backfill, Backfills, DEFAULT_MAX_WAITING, DEFAULT_RATE, Error, MAX_USER_IDS, Plan, RATES, State,
    WaitingFor, Whom,
};
use crate::{
    clients::{Allowed, Guarded, ManageSubscriptions, Mine},
    json::Fault,
    web::{Body, Code, Id, NoParams, Params, Place, Plain, Problem, Refusals, body_invalid, refuses},
};

pub fn routes() -> OpenApiRouter<Guarded<Backfills>> {
    OpenApiRouter::new()
        .routes(routes!(start, show))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(cancel))
}

/// The verbs' errors.
struct Finding;
struct Starting;
struct Acting;

refuses!(
    Finding => [SubscriptionNotFound, BackfillNotFound, DatabaseUnavailable];
    Starting => [SubscriptionNotFound, BackfillRunning, DatabaseUnavailable];
    Acting => [BackfillOver];
);

/// Tell a subscription of users as if each had just changed.
///
/// One message per user goes to this subscription's queue alone, with the header `tidings-backfill`: `user.created` if the subscription
/// wants that, else `profile.updated` with the subscription's fields; of deleted users `user.deleted`. Of whom it wants to hear nothing,
/// it hears nothing. News goes first: nothing is sent while `max_waiting` messages wait in the queue, or while news is held up.
#[utoipa::path(post, path = "/v1/subscriptions/{name}/backfill", tag = "subscriptions", operation_id = "startBackfill", security(("key" = ["subscriptions"])),
    request_body(content = Start, example = json!({ "users": "all", "rate_per_s": 2000 })),
    params(("name" = crate::web::Name, Path, description = "The subscription")),
    responses((status = 202, description = "Accepted: it begins within a second", body = Progress,
               headers(("Location" = String, description = "Where to look at it"))),
        Refusals<(ManageSubscriptions, Mine, Plain, Params<NoParams>, Body<Start>, Starting)>))]
async fn start(
    Allowed { caller, desk: backfills, .. }: Allowed<ManageSubscriptions, Backfills>,
    Mine(name): Mine,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
    Body(asked): Body<Start, START_LIMIT_BYTES>,
) -> Result<(StatusCode, [(header::HeaderName, String); 1], Json<Progress>), Problem> {
    let plan = asked.plan().map_err(body_invalid)?;
    place.turn_at_the_registry(&caller.client).await?;
    let started = backfills.start(&name, &plan).await?;
    let location = [(header::LOCATION, format!("/v1/subscriptions/{name}/backfill"))];
    Ok((StatusCode::ACCEPTED, location, Json(Progress::of(&name, &started))))
}

/// The backfill under way, or the last one.
#[utoipa::path(get, path = "/v1/subscriptions/{name}/backfill", tag = "subscriptions", operation_id = "getBackfill", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription")),
    responses((status = 200, description = "How far it is", body = Progress), Refusals<(ManageSubscriptions, Mine, Params<NoParams>, Finding)>))]
async fn show(
    Allowed { caller, desk: backfills, .. }: Allowed<ManageSubscriptions, Backfills>,
    Mine(name): Mine,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
) -> Result<Json<Progress>, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    Ok(Json(Progress::of(&name, &backfills.get(&name).await?)))
}

/// Pause a backfill.
///
/// Within a second nothing more is sent. It stays where it is until it is resumed or cancelled.
#[utoipa::path(post, path = "/v1/subscriptions/{name}/backfill:pause", tag = "subscriptions", operation_id = "pauseBackfill", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription")),
    responses((status = 200, description = "How far it is", body = Progress), Refusals<(ManageSubscriptions, Mine, Plain, Params<NoParams>, Finding, Acting)>))]
async fn pause(
    Allowed { caller, desk: backfills, .. }: Allowed<ManageSubscriptions, Backfills>,
    Mine(name): Mine,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
) -> Result<Json<Progress>, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    act(&backfills, &name, Action::Pause).await
}

/// Go on with a backfill that was paused, or change the rate of one that runs.
#[utoipa::path(post, path = "/v1/subscriptions/{name}/backfill:resume", tag = "subscriptions", operation_id = "resumeBackfill", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription"), NewRate),
    responses((status = 200, description = "How far it is", body = Progress), Refusals<(ManageSubscriptions, Mine, Plain, Params<NewRate>, Finding, Acting)>))]
async fn resume(
    Allowed { caller, desk: backfills, .. }: Allowed<ManageSubscriptions, Backfills>,
    Mine(name): Mine,
    Plain: Plain,
    Params(asked): Params<NewRate>,
    place: Place,
) -> Result<Json<Progress>, Problem> {
    let invalid = || Problem::new(Code::InvalidQuery, format!("rate_per_s {}", is_within(&RATES)));
    let rate = asked.rate_per_s.map(|rate| within(&RATES, rate).ok_or_else(invalid)).transpose()?;
    place.turn_at_the_registry(&caller.client).await?;
    act(&backfills, &name, Action::Resume(rate)).await
}

/// Cancel a backfill. What was sent stays in the queue.
#[utoipa::path(post, path = "/v1/subscriptions/{name}/backfill:cancel", tag = "subscriptions", operation_id = "cancelBackfill", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription")),
    responses((status = 200, description = "How far it was", body = Progress), Refusals<(ManageSubscriptions, Mine, Plain, Params<NoParams>, Finding, Acting)>))]
async fn cancel(
    Allowed { caller, desk: backfills, .. }: Allowed<ManageSubscriptions, Backfills>,
    Mine(name): Mine,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
) -> Result<Json<Progress>, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    act(&backfills, &name, Action::Cancel).await
}

async fn act(backfills: &Backfills, name: &SubscriptionName, action: Action) -> Result<Json<Progress>, Problem> {
    Ok(Json(Progress::of(name, &backfills.act(name, action).await?)))
}

const MAX_WAITING: RangeInclusive<i32> = 1..=1_000_000;
/// Room for 10,000 ids.
const START_LIMIT_BYTES: usize = 512 * 1024;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct NewRate {
    /// Messages a second from now on.
    #[param(required = false, minimum = 1, maximum = 50000)]
    rate_per_s: Option<i64>,
}

/// Whom to tell, exactly one of the three, and how fast. What is left out may be null.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = StartBackfill)]
pub struct Start {
    /// `all`: everybody, the deleted too.
    #[schema(example = "all")]
    pub users: Option<String>,
    /// These.
    #[schema(value_type = Option<Vec<Uuid>>, max_items = 10000)]
    pub user_ids: Option<Vec<String>>,
    /// Everybody whose latest change, deletion included, was made then or later.
    #[schema(value_type = Option<String>, format = DateTime, example = "2026-11-01T00:00:00Z")]
    pub changed_since: Option<String>,
    /// Messages a second, at most.
    #[schema(minimum = 1, maximum = 50000, default = 1000)]
    pub rate_per_s: Option<i64>,
    /// Nothing is sent while this many messages wait in the queue.
    #[schema(minimum = 1, maximum = 1000000, default = 2000)]
    pub max_waiting: Option<i64>,
}

impl Start {
    /// # Errors
    /// All that is wrong.
    pub fn plan(self) -> Result<Plan, Vec<Fault>> {
        let mut faults = vec![];
        let mut number = |pointer, asked: Option<i64>, or: i32, range: RangeInclusive<i32>| {
            let number = asked.map_or(Some(or), |asked| within(&range, asked));
            faults.extend(number.is_none().then(|| Fault::new(pointer, "range", is_within(&range))));
            number
        };
        let rate_per_s = number("/rate_per_s", self.rate_per_s, DEFAULT_RATE, RATES);
        let max_waiting = number("/max_waiting", self.max_waiting, DEFAULT_MAX_WAITING, MAX_WAITING);
        match (self.whom(), rate_per_s, max_waiting) {
            (Ok(users), Some(rate_per_s), Some(max_waiting)) => Ok(Plan { users, rate_per_s, max_waiting }),
            (whom, ..) => {
                faults.extend(whom.err().into_iter().flatten());
                Err(faults)
            }
        }
    }

    fn whom(self) -> Result<Whom, Vec<Fault>> {
        let fault = |pointer: &str, code: &str, detail: &str| vec![Fault::new(pointer, code, detail)];
        match (self.users.as_deref(), self.user_ids, self.changed_since) {
            (Some("all"), None, None) => Ok(Whom::All),
            (Some(_), None, None) => Err(fault("/users", "value", "is \"all\"")),
            (None, Some(ids), None) if (1..=MAX_USER_IDS).contains(&ids.len()) => {
                Id::in_array(&ids, "/user_ids").map(Whom::These)
            }
            (None, Some(_), None) => Err(fault("/user_ids", "length", "has 1 to 10000 ids")),
            (None, None, Some(since)) => parse_time(&since).map(Whom::ChangedSince).map_err(|fault| vec![fault]),
            _ => {
                const DETAIL: &str = "has exactly one of \"users\", \"user_ids\" and \"changed_since\"";
                Err(fault("", "exactly_one", DETAIL))
            }
        }
    }
}

fn within(range: &RangeInclusive<i32>, number: i64) -> Option<i32> {
    i32::try_from(number).ok().filter(|number| range.contains(number))
}

fn is_within(range: &RangeInclusive<i32>) -> String {
    format!("is a number from {} to {}", range.start(), range.end())
}

fn parse_time(text: &str) -> Result<OffsetDateTime, Fault> {
    const DETAIL: &str = "is a time such as 2026-11-01T00:00:00Z (RFC 3339)";
    read_time(text).ok_or_else(|| Fault::new("/changed_since", "format", DETAIL))
}

/// A backfill, as programs and people see it.
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = Backfill)]
pub struct Progress {
    #[schema(example = "orders")]
    subscription: String,
    /// In the header `tidings-backfill` of its messages.
    id: Uuid,
    state: State,
    /// With `waiting`: for what.
    waiting_for: Option<WaitingFor>,
    /// Users told.
    sent: i64,
    /// Users looked at and not told: nobody has the id, they did not change since, or the subscription does not want to know.
    skipped: i64,
    /// Users to look at.
    total: i64,
    /// Whether `total` was estimated: above 100,000 users nobody counts.
    total_is_estimate: bool,
    /// From 0 to 1.
    progress: f64,
    rate_per_s: i32,
    max_waiting: i32,
    #[serde(with = "time::serde::rfc3339::option")]
    changed_since: Option<OffsetDateTime>,
    /// Seconds to go at this rate, if nothing holds it up; null when it is over.
    eta_s: Option<i64>,
    #[serde(with = "time::serde::rfc3339")]
    started_at: OffsetDateTime,
    /// When it was done or cancelled.
    #[serde(with = "time::serde::rfc3339::option")]
    finished_at: Option<OffsetDateTime>,
}

impl Progress {
    pub fn of(subscription: &SubscriptionName, backfill: &Backfill) -> Self {
        Self {
            subscription: subscription.to_string(),
            id: backfill.id,
            state: backfill.state,
            waiting_for: backfill.waiting_for,
            sent: backfill.sent,
            skipped: backfill.skipped,
            total: backfill.total,
            total_is_estimate: backfill.total_is_estimate,
            progress: backfill.progress(),
            rate_per_s: backfill.rate_per_s,
            max_waiting: backfill.max_waiting,
            changed_since: backfill.changed_since,
            eta_s: backfill.eta_s(),
            started_at: backfill.started_at,
            finished_at: backfill.finished_at,
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::NoSubscription => Code::SubscriptionNotFound.into(),
            Error::NoBackfill => Code::BackfillNotFound.into(),
            Error::Running => Code::BackfillRunning.into(),
            Error::Over => Code::BackfillOver.into(),
            Error::Query(trouble) => {
                tracing::warn!("a query failed: {}", trouble.report());
                Code::DatabaseUnavailable.into()
            }
        }
    }
}
