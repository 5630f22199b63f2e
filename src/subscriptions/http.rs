//! The face of the registry: `/v1/subscriptions`.

use std::time::Duration;

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Asker, Error, Listing, Put, Subscriptions, View, Waiting, Wish, desk::Trouble};
use crate::{
    clients::{Allowed, Guarded, ManageSubscriptions, Mine, field_forbidden},
    telemetry::with_causes,
    web::{Body, Code, Name, NoParams, Params, Place, Plain, Problem, Refusals, refuses},
};

pub fn routes() -> OpenApiRouter<Guarded<Subscriptions>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(get, put, delete))
}

/// What is registered.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "routing_keys": ["user.deleted"], "fields": ["address"], "owner": "team-orders",
                           "purpose": "cancels pending orders", "expires_after_s": null, "client": null }))]
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
    /// The client that stands for it, and may read what it declares, which has to be within its list; only an administrator may name
    /// another than itself. Without, or null: the client that registers it, or, for an administrator, whoever stood for it before.
    client: Option<String>,
}

/// The verbs' errors.
struct Reading;
struct Registering;
struct Deleting;
struct Missing;

refuses!(
    Reading => [DatabaseUnavailable];
    Registering => [
        NameTaken, QueueDiffers, TooManySubscriptions, SubscriptionInvalid, SubscriptionBusy, DatabaseUnavailable, NoBrokerHere,
        BrokerUnavailable, BrokerRefused, FieldForbidden,
    ];
    Deleting => [
        SubscriptionNotEmpty, SubscriptionBusy, DatabaseUnavailable, NoBrokerHere, BrokerUnavailable, BrokerRefused,
    ];
    // To register may end so too: somebody deleted it before it could be shown.
    Missing => [SubscriptionNotFound];
);

/// Register a subscription, or change it.
///
/// Its queue is declared and bound at the broker. Once this is answered with 200 or 201 no news is missed, and the consumer needs no
/// right to configure anything. What no longer wakes it is unbound after everything new is bound. After 503 `broker_unavailable` or
/// `broker_refused` it is registered, and declared as soon as the broker allows it; until then news is missed. Where a queue of this
/// name is at the broker and nobody registered it, only an administrator may; for another client's first registration the broker has to
/// say that there is none, and without its answer nothing is registered.
#[utoipa::path(put, path = "/v1/subscriptions/{name}", tag = "subscriptions", operation_id = "putSubscription", security(("key" = ["subscriptions"])),
    request_body = Registration,
    params(("name" = crate::web::Name, Path, description = "The subscription")),
    responses(
        (status = 200, description = "Registered as asked for now", body = View),
        (status = 201, description = "Registered for the first time", body = View,
         headers(("Location" = String, description = "Path of the subscription"))),
        Refusals<(ManageSubscriptions, Name, Plain, Params<NoParams>, Body<Registration>, Registering, Missing)>,
    ))]
async fn put(
    Allowed { caller, desk: subscriptions, .. }: Allowed<ManageSubscriptions, Subscriptions>,
    Name(name): Name,
    Plain: Plain,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
    Body(registration): Body<Registration>,
) -> Result<Response, Problem> {
    let fields = registration.fields.iter().enumerate();
    let strangers: Vec<String> = fields
        .filter(|(_, field)| !caller.may_declare.has(field))
        .map(|(number, _)| format!("/fields/{number}"))
        .collect();
    if !strangers.is_empty() {
        return Err(field_forbidden(strangers));
    }
    let admitted = subscriptions.admit(name.clone(), registration.into(), Asker::of(&caller))?;
    place.turn_at_the_registry(&caller.client).await?;
    let put = subscriptions.put(admitted).await?;
    let view = Json(subscriptions.view(&name).await?);
    Ok(match put {
        Put::Created => {
            (StatusCode::CREATED, [(header::LOCATION, format!("/v1/subscriptions/{name}"))], view).into_response()
        }
        Put::Changed => view.into_response(),
    })
}

/// One subscription: what is registered, what was seen of it, and what its queue holds now.
#[utoipa::path(get, path = "/v1/subscriptions/{name}", tag = "subscriptions", operation_id = "getSubscription", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription")),
    responses((status = 200, description = "The subscription", body = View), Refusals<(ManageSubscriptions, Mine, Params<NoParams>, Missing, Reading)>))]
async fn get(
    Allowed { caller, desk: subscriptions, .. }: Allowed<ManageSubscriptions, Subscriptions>,
    Mine(name): Mine,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
) -> Result<Json<View>, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    Ok(Json(subscriptions.view(&name).await?))
}

/// All subscriptions of the caller in order of name. For an administrator: everybody's, and queues that listen without being registered.
#[utoipa::path(get, path = "/v1/subscriptions", tag = "subscriptions", operation_id = "listSubscriptions", security(("key" = ["subscriptions"])),
    responses((status = 200, description = "All subscriptions; there are at most 1,000", body = Listing), Refusals<(ManageSubscriptions, Params<NoParams>, Reading)>))]
async fn list(
    Allowed { caller, desk: subscriptions, .. }: Allowed<ManageSubscriptions, Subscriptions>,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
) -> Result<Json<Listing>, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    Ok(Json(subscriptions.view_all(&Asker::of(&caller)).await?))
}

/// Delete a subscription, with its queues and bindings.
///
/// What it still has to confirm of deletions goes with it: one that is late with them is deleted by an administrator alone.
#[utoipa::path(delete, path = "/v1/subscriptions/{name}", tag = "subscriptions", operation_id = "deleteSubscription", security(("key" = ["subscriptions"])),
    params(("name" = crate::web::Name, Path, description = "The subscription"), Deletion),
    responses(
        (status = 204, description = "There is no such subscription any more"),
        Refusals<(ManageSubscriptions, Mine, Plain, Params<Deletion>, Missing, Deleting)>,
    ))]
async fn delete(
    Allowed { caller, desk: subscriptions, .. }: Allowed<ManageSubscriptions, Subscriptions>,
    Mine(name): Mine,
    Plain: Plain,
    Params(deletion): Params<Deletion>,
    place: Place,
) -> Result<StatusCode, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    subscriptions.delete(name, deletion.waiting.is_some(), Asker::of(&caller)).await?;
    Ok(StatusCode::NO_CONTENT)
}

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

impl From<Registration> for Wish {
    fn from(registration: Registration) -> Self {
        let Registration { routing_keys, fields, owner, purpose, expires_after_s, client } = registration;
        Self { routing_keys, fields, owner, purpose, expires_after: expires_after_s.map(Duration::from_secs), client }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        const UNDECLARED: &str =
            "it is registered, and will be declared as soon as possible; until then its queue misses what is published";
        match error {
            Error::Invalid(faults) => Self::from(Code::SubscriptionInvalid).with_errors(faults),
            Error::NotReadable(faults) => Self::new(
                Code::FieldForbidden,
                "some fields are not for the client that is to stand for it, see errors",
            )
            .with_errors(faults),
            Error::NoBroker => Self::new(
                Code::NoBrokerHere,
                "this instance was started without a broker; ask one that has one, or use `tidings subscription`",
            ),
            Error::Taken(owner) => Self::new(
                Code::NameTaken,
                format!(
                    "{owner:?} has registered this name: it is changed with the same owner, by the same client or an administrator"
                ),
            ),
            Error::NameOfExchange => {
                Self::new(Code::NameTaken, "the exchange that everything is published to has this name")
            }
            Error::Adopted => Self::new(
                Code::NameTaken,
                "a queue of this name, or a part of one, is at the broker, and nobody registered it; an administrator can, if it is yours",
            ),
            error @ Error::Full => Self::new(Code::TooManySubscriptions, error.to_string()),
            Error::NotFound => Code::SubscriptionNotFound.into(),
            Error::NotEmpty(Waiting { ready, retrying, dead_letters }) => Self::new(
                Code::SubscriptionNotEmpty,
                format!(
                    "{ready} messages wait, {retrying} are on their way back, {dead_letters} are dead letters; \
                     have them handled, or lose them with ?waiting=discard"
                ),
            ),
            Error::Owing => Self::new(
                Code::SubscriptionNotEmpty,
                "it has not confirmed deletions whose deadline has passed; confirm them, or have an administrator delete it",
            ),
            Error::Busy => Code::SubscriptionBusy.into(),
            Error::Differs(error) => Self::new(Code::QueueDiffers, format!("{error}; nothing was changed")),
            Error::Undeclared(trouble) => broker_problem(&trouble, UNDECLARED),
            Error::Broker(trouble) => broker_problem(&trouble, "nothing was changed in the registry; try again"),
            Error::Database(trouble) => {
                tracing::warn!("the registry cannot be asked: {}", trouble.report());
                Self::new(Code::DatabaseUnavailable, "the database does not answer; try again")
            }
        }
    }
}

/// `so`: what follows for the subscription.
fn broker_problem(trouble: &Trouble, so: &str) -> Problem {
    match trouble {
        Trouble::Differs(error) => Problem::new(Code::QueueDiffers, format!("{error}; {so}")),
        Trouble::Refused(error) => {
            tracing::warn!("the broker refused: {}", with_causes(error));
            Problem::new(Code::BrokerRefused, format!("the broker refused: {so}"))
        }
        Trouble::Away(error) => {
            tracing::warn!("the broker does not answer: {}", with_causes(error));
            Problem::new(Code::BrokerUnavailable, format!("the broker does not answer: {so}"))
        }
    }
}
