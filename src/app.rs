//! App: hangs the doors. The only room that knows every feature.

use axum::{Router, http::header, middleware, routing::get};
use utoipa::OpenApi;

use crate::{
    backfill::{self, Backfills},
    dead_letters::{self, DeadLetters},
    feed::{self, Feed},
    ops::{self, Ops},
    subscriptions::{self, Subscriptions},
    users::{self, Users},
    web::{manners, method_not_allowed, route_not_found},
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "tidings",
        description = "The owner of user master data, which tells every other application that something changed. \
                       A message carries ids and names of changed fields; fetch the latest record here.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    servers((url = "http://127.0.0.1:8080", description = "As `tidings serve` listens unless told otherwise")),
    security(()),
    tags(
        (name = "users", description = "The master data"),
        (name = "reconciling", description = "For those who keep a copy: what changed, and whether it is the same"),
        (name = "subscriptions", description = "Who listens to what, what they could not handle, and telling them anew"),
        (name = "operations", description = "For operators"),
    )
)]
struct Api;

/// The OpenAPI document, from the routes themselves.
///
/// # Errors
/// When a description cannot be written as YAML.
pub fn openapi() -> anyhow::Result<String> {
    let mut api = Api::openapi();
    api.merge(users::routes().into_openapi());
    api.merge(feed::routes().into_openapi());
    api.merge(subscriptions::routes().into_openapi());
    api.merge(dead_letters::routes().into_openapi());
    api.merge(backfill::routes().into_openapi());
    api.merge(ops::routes().into_openapi());
    Ok(api.to_yaml()?)
}

/// Everything: the master data, its feed, who listens to it and with what trouble, and the operator's questions.
pub fn full(
    users: Users,
    feed: Feed,
    subscriptions: Subscriptions,
    dead_letters: DeadLetters,
    backfills: Backfills,
    ops: Ops,
) -> anyhow::Result<Router> {
    let document = openapi()?;
    let served = get(|| async { ([(header::CONTENT_TYPE, "application/yaml")], document) });
    let app = Router::from(users::routes()).with_state(users).route("/openapi.yaml", served);
    let app = app.merge(Router::from(feed::routes()).with_state(feed));
    let app = app.merge(Router::from(subscriptions::routes()).with_state(subscriptions));
    let app = app.merge(Router::from(dead_letters::routes()).with_state(dead_letters));
    let app = app.merge(Router::from(backfill::routes()).with_state(backfills));
    Ok(with_manners(app.merge(Router::from(ops::routes()).with_state(ops))))
}

/// The operator's questions alone, for an instance that only relays.
pub fn ops_only(ops: Ops) -> Router {
    with_manners(Router::from(ops::routes()).with_state(ops))
}

fn with_manners(app: Router) -> Router {
    app.fallback(route_not_found).method_not_allowed_fallback(method_not_allowed).layer(middleware::from_fn(manners))
}
