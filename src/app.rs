//! App: hangs the doors. The only room that knows every feature.

use axum::{Router, middleware};
use tidings_sdk::topology::Source;
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};
use utoipa_axum::router::OpenApiRouter;

use crate::{
    backfill::{self, Backfills},
    clients::{self, Clients, Guarded, Processing},
    dead_letters::{self, DeadLetters},
    deletions::{self, Deletions},
    docs::{self, Docs},
    feed::{self, Feed},
    ops::{self, Ops, Starting},
    subscriptions::{self, Subscriptions},
    users::{self, Users},
    web::{self, Code, Limits, Problem, ProblemBody, manners, method_not_allowed, route_not_found, to_the_end},
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "tidings",
        description = "The owner of user master data, which tells every other application that something changed. \
                       A message carries ids and names of changed fields; fetch the latest record here.\n\n\
                       Each refusal is a problem (RFC 9457) with a stable `code`. A path that is not in this document, nor under `/docs`, is refused with 404 \
                       `route_not_found`, a method that a path does not have with 405 `method_not_allowed` and `Allow`.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    servers((url = "/", description = "Whoever serves this document")),
    components(schemas(ProblemBody, web::Name, web::EntityTags, web::AnyTag, web::KeyOfRequest)),
    security(("key" = [])),
    modifiers(&Keys),
    tags(
        (name = "users", description = "The master data"),
        (name = "reconciling", description = "For those who keep a copy: what changed, and whether it is the same"),
        (name = "subscriptions", description = "Who listens to what, what they could not handle, and telling them anew"),
        (name = "deletions", description = "Who has confirmed that a user is deleted, and who is late"),
        (name = "operations", description = "For operators"),
    )
)]
struct Api;

/// How a client says who it is.
struct Keys;

impl Modify for Keys {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        const DESCRIPTION: &str = "A key that `tidings client create` made. Each route names the scope that it demands; `admin` may do everything. \
                                   A client with a list of fields sees and writes these alone.";
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(DESCRIPTION)).build();
        openapi.components.get_or_insert_default().add_security_scheme("key", SecurityScheme::Http(scheme));
    }
}

/// The OpenAPI document, from the routes themselves.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut api = Api::openapi();
    api.merge(users::routes().into_openapi());
    api.merge(feed::routes().into_openapi());
    api.merge(subscriptions::routes().into_openapi());
    api.merge(dead_letters::routes().into_openapi());
    api.merge(backfill::routes().into_openapi());
    api.merge(deletions::routes().into_openapi());
    api.merge(clients::routes().into_openapi());
    api.merge(ops::routes().into_openapi());
    api.merge(docs::routes().into_openapi());
    api.components.get_or_insert_default().examples.extend(web::examples());
    docs::declare(&mut api);
    docs::finish(&mut api);
    api
}

/// The same as a file.
///
/// # Errors
/// When a description cannot be written as YAML.
pub fn openapi() -> anyhow::Result<String> {
    Ok(document().to_yaml()?)
}

/// The features of an instance that serves everything.
pub struct Desks {
    pub users: Users,
    pub feed: Feed,
    pub subscriptions: Subscriptions,
    pub dead_letters: DeadLetters,
    pub backfills: Backfills,
    pub deletions: Deletions,
    pub processing: Processing,
}

/// Everything: the master data, its feed, who listens to it and with what trouble, for clients that may; and the operator's questions.
///
/// # Errors
/// When a document cannot be written.
pub fn full(
    clients: &Clients,
    desks: Desks,
    ops: Ops,
    limits: Limits,
    (vhost, telling): (&str, &Source),
) -> anyhow::Result<Router> {
    let files = Docs::new(openapi()?, docs::asyncapi_at(vhost, telling)?);
    let observing = deletions::observing(&desks.deletions);
    let app = Router::new()
        .merge(guarded(users::routes(), clients, desks.users))
        .merge(guarded(feed::routes(), clients, desks.feed))
        .merge(registry(guarded(subscriptions::routes(), clients, desks.subscriptions)))
        .merge(registry(guarded(dead_letters::routes(), clients, desks.dead_letters)))
        .merge(registry(guarded(backfill::routes(), clients, desks.backfills)))
        .merge(guarded(deletions::routes(), clients, desks.deletions))
        .merge(registry(guarded(clients::routes(), clients, desks.processing)))
        .merge(Router::from(ops::routes()).with_state(ops))
        .merge(Router::from(docs::routes()).with_state(files))
        .merge(docs::pages())
        .fallback(route_not_found);
    // Outermost: who was refused for want of room, or was too late, was told of nobody.
    Ok(with_manners(app, limits).layer(observing))
}

/// The routes of a feature, behind the door.
fn guarded<T: Clone + Send + Sync + 'static>(routes: OpenApiRouter<Guarded<T>>, clients: &Clients, desk: T) -> Router {
    Router::from(routes).with_state(Guarded::new(clients, desk))
}

/// Routes about subscriptions, which keep a session of the database or a channel of the broker busy for a while.
fn registry(routes: Router) -> Router {
    routes.layer(middleware::from_fn(to_the_end))
}

/// The operator's questions alone, for an instance that only relays. It has no document that would list them.
pub fn ops_only(ops: Ops, limits: Limits) -> Router {
    let not_here = async || Problem::new(Code::RouteNotFound, "this is a relay: it has /healthz, /readyz and /metrics");
    with_manners(Router::from(ops::routes()).fallback(not_here).with_state(ops), limits)
}

/// The same for an instance that is not ready yet, as far as it can answer them; to all else it says that it waits.
pub fn while_starting(starting: Starting, limits: Limits) -> Router {
    let manners = middleware::from_fn_with_state(limits, manners);
    let not_yet =
        async || Problem::new(Code::DatabaseUnavailable, "this instance waits for its database; nothing was changed");
    let app = ops::routes_while_starting(starting).fallback(not_yet);
    app.method_not_allowed_fallback(method_not_allowed).layer(manners)
}

fn with_manners(app: Router, limits: Limits) -> Router {
    let manners = middleware::from_fn_with_state(limits, manners);
    app.method_not_allowed_fallback(method_not_allowed).layer(manners)
}
