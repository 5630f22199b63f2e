//! The face of the registry: `/v1/subscriptions`.

use std::time::Duration;

use axum::{
    Json,
    extract::{FromRequestParts, Path, State},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use tidings_sdk::subscription::{InvalidName, SubscriptionName};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Error, Listing, Put, Subscriptions, View, Waiting, Wish, desk::Trouble};
use crate::{
    telemetry::with_causes,
    web::{Body, Params, Problem, ProblemBody, Refusals},
};

pub fn routes() -> OpenApiRouter<Subscriptions> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(get, put, delete))
}

/// What is registered.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "routing_keys": ["user.deleted"], "fields": ["address"], "owner": "team-orders",
                           "purpose": "cancels pending orders", "expires_after_s": null }))]
struct Registration {
    /// Kinds of notice that wake it: `user.created`, `profile.updated`, `user.deleted`, or patterns of them. Without the
    /// deployment's prefix.
    #[serde(default)]
    routing_keys: Vec<String>,
    /// Profile fields whose change wakes it. At least one key or field is needed.
    #[serde(default)]
    fields: Vec<String>,
    /// The team that may change it, and whom to ask; one line, at most 200 characters.
    owner: String,
    /// What it is for; one line, at most 200 characters.
    purpose: String,
    /// Delete it when it had no consumer for so long. Without, or null: never.
    expires_after_s: Option<u64>,
}

/// Refusals of a name.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "only its derived description is used")]
enum Absence {
    /// `subscription_not_found`
    #[response(status = 404, content_type = "application/problem+json")]
    NotFound(ProblemBody),
}

/// Refusals of a registration.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "only its derived description is used")]
enum PutRefusals {
    /// `name_taken`: another owner has it, or it is the exchange's. `queue_differs`: the broker has a part of this name with other
    /// properties; nothing was changed. `too_many_subscriptions`.
    #[response(status = 409, content_type = "application/problem+json")]
    Conflict(ProblemBody),
    /// `payload_too_large`: the body has more than 64 KiB.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(ProblemBody),
    /// `unsupported_media_type`; `Accept` names the right one.
    #[response(status = 415, content_type = "application/problem+json")]
    UnsupportedMediaType(ProblemBody),
    /// `unacceptable_json`, `body_invalid` or `subscription_invalid`; `errors` has a JSON pointer per fault.
    #[response(status = 422, content_type = "application/problem+json")]
    Unprocessable(ProblemBody),
}

/// Refusals of a deletion.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "only its derived description is used")]
enum DeleteRefusals {
    /// `subscription_not_empty`: messages wait; `waiting=discard` deletes them too.
    #[response(status = 409, content_type = "application/problem+json")]
    Conflict(ProblemBody),
}

/// Register a subscription, or change it.
///
/// Its queue is declared and bound at the broker. Once this is answered with 200 or 201 no news is missed, and the consumer needs no
/// right to configure anything. What no longer wakes it is unbound after everything new is bound. After 503 `broker_unavailable` or
/// `broker_refused` it is registered, and declared as soon as the broker allows it; until then news is missed.
#[utoipa::path(put, path = "/v1/subscriptions/{name}", tag = "subscriptions", operation_id = "putSubscription",
    request_body = Registration,
    params(("name" = String, Path, description = "The subscription", example = "orders")),
    responses(
        (status = 200, description = "Registered as asked for now", body = View),
        (status = 201, description = "Registered for the first time", body = View,
         headers(("Location" = String, description = "Path of the subscription"))),
        PutRefusals, Refusals,
    ))]
async fn put(
    State(subscriptions): State<Subscriptions>,
    Name(name): Name,
    Params(NoParams {}): Params<NoParams>,
    Body(registration): Body<Registration>,
) -> Result<Response, Problem> {
    let put = subscriptions.put(name.clone(), registration.into()).await?;
    let view = Json(subscriptions.view(&name).await?);
    Ok(match put {
        Put::Created => {
            (StatusCode::CREATED, [(header::LOCATION, format!("/v1/subscriptions/{name}"))], view).into_response()
        }
        Put::Changed => view.into_response(),
    })
}

/// One subscription: what is registered, what was seen of it, and what its queue holds now.
#[utoipa::path(get, path = "/v1/subscriptions/{name}", tag = "subscriptions", operation_id = "getSubscription",
    params(("name" = String, Path, description = "The subscription", example = "orders")),
    responses((status = 200, description = "The subscription", body = View), Absence, Refusals))]
async fn get(
    State(subscriptions): State<Subscriptions>,
    Name(name): Name,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Json<View>, Problem> {
    Ok(Json(subscriptions.view(&name).await?))
}

/// All subscriptions in order of name, and queues that listen without being registered.
#[utoipa::path(get, path = "/v1/subscriptions", tag = "subscriptions", operation_id = "listSubscriptions",
    responses((status = 200, description = "All subscriptions; there are at most 1,000", body = Listing), Refusals))]
async fn list(
    State(subscriptions): State<Subscriptions>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Json<Listing>, Problem> {
    Ok(Json(subscriptions.view_all().await?))
}

/// Delete a subscription, with its queues and bindings.
#[utoipa::path(delete, path = "/v1/subscriptions/{name}", tag = "subscriptions", operation_id = "deleteSubscription",
    params(("name" = String, Path, description = "The subscription", example = "orders"), Deletion),
    responses(
        (status = 204, description = "There is no such subscription any more"),
        Absence, DeleteRefusals, Refusals,
    ))]
async fn delete(
    State(subscriptions): State<Subscriptions>,
    Name(name): Name,
    Params(deletion): Params<Deletion>,
) -> Result<StatusCode, Problem> {
    subscriptions.delete(name, deletion.waiting.is_some()).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Deletion {
    /// `discard`: also when messages wait, which are lost then.
    #[param(required = false, inline)]
    waiting: Option<MayBe>,
}

/// What may become of the messages that wait.
#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
enum MayBe {
    Discard,
}

/// A subscription's name in the path.
pub struct Name(pub SubscriptionName);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let name = Path::<String>::from_request_parts(parts, state).await.ok();
        let name = name.and_then(|Path(name)| name.parse().ok());
        name.map(Self).ok_or_else(|| Problem::bad_request("invalid_subscription_name", InvalidName.to_string()))
    }
}

impl From<Registration> for Wish {
    fn from(registration: Registration) -> Self {
        let Registration { routing_keys, fields, owner, purpose, expires_after_s } = registration;
        Self { routing_keys, fields, owner, purpose, expires_after: expires_after_s.map(Duration::from_secs) }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        const UNDECLARED: &str =
            "it is registered, and will be declared as soon as possible; until then its queue misses what is published";
        let conflict = |code, detail: String| Self::new(StatusCode::CONFLICT, code, detail);
        match error {
            Error::Invalid(faults) => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "subscription_invalid",
                "the registration cannot be taken, see errors",
            )
            .with_errors(faults),
            Error::NoBroker => Self::unavailable(
                "no_broker_here",
                "this instance was started without a broker; ask one that has one, or use `tidings subscription`",
            ),
            Error::Taken(owner) => {
                conflict("name_taken", format!("{owner:?} has registered this name; only the same owner may change it"))
            }
            Error::NameOfExchange => {
                conflict("name_taken", "the exchange that everything is published to has this name".to_owned())
            }
            error @ Error::Full => conflict("too_many_subscriptions", error.to_string()),
            Error::NotFound => {
                Self::new(StatusCode::NOT_FOUND, "subscription_not_found", "nobody registered this name")
            }
            Error::NotEmpty(Waiting { ready, retrying, dead_letters }) => conflict(
                "subscription_not_empty",
                format!(
                    "{ready} messages wait, {retrying} are on their way back, {dead_letters} are dead letters; \
                     have them handled, or lose them with ?waiting=discard"
                ),
            ),
            Error::Busy => Self::unavailable("subscription_busy", "it is being changed by somebody else"),
            Error::Differs(error) => conflict("queue_differs", format!("{error}; nothing was changed")),
            Error::Undeclared(trouble) => broker_problem(&trouble, UNDECLARED),
            Error::Broker(trouble) => broker_problem(&trouble, "nothing was changed in the registry; try again"),
            Error::Database(trouble) => {
                tracing::warn!("the registry cannot be asked: {}", trouble.report());
                Self::unavailable("database_unavailable", "the database does not answer; try again")
            }
        }
    }
}

/// `so`: what follows for the subscription.
fn broker_problem(trouble: &Trouble, so: &str) -> Problem {
    match trouble {
        Trouble::Differs(error) => Problem::new(StatusCode::CONFLICT, "queue_differs", format!("{error}; {so}")),
        Trouble::Refused(error) => {
            tracing::warn!("the broker refused: {}", with_causes(error));
            Problem::unavailable("broker_refused", format!("the broker refused: {so}"))
        }
        Trouble::Away(error) => {
            tracing::warn!("the broker does not answer: {}", with_causes(error));
            Problem::unavailable("broker_unavailable", format!("the broker does not answer: {so}"))
        }
    }
}
