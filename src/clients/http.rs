//! The door of every room under `/v1`: who asks, and whether he may.
//!
//! Promise: a handler comes to its feature only through [`Allowed`], which asks for a permission: a route without a policy does not
//! compile.

use std::{marker::PhantomData, sync::Arc};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderValue, Uri, header, request::Parts},
};
use tidings_sdk::subscription::SubscriptionName;

use super::{
    Caller, Clients, Scope,
    roster::{Sought, Unknowable},
};
use crate::{
    db::is_loopback,
    json::Fault,
    web::{Code, Meter, Name, Place, Problem, refuses},
};

/// A feature behind the door: the state of its routes. Cheap to clone, whatever the feature is.
pub struct Guarded<T>(Arc<Behind<T>>);

struct Behind<T> {
    clients: Clients,
    desk: T,
}

impl<T> Guarded<T> {
    pub fn new(clients: &Clients, desk: T) -> Self {
        Self(Arc::new(Behind { clients: clients.clone(), desk }))
    }
}

impl<T> Clone for Guarded<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// What a route demands of its caller.
pub trait Permission {
    const SCOPE: Scope;
}

pub struct ReadUsers;
pub struct WriteUsers;
pub struct ManageSubscriptions;
pub struct Administer;

impl Permission for ReadUsers {
    const SCOPE: Scope = Scope::ReadUsers;
}

impl Permission for WriteUsers {
    const SCOPE: Scope = Scope::WriteUsers;
}

impl Permission for ManageSubscriptions {
    const SCOPE: Scope = Scope::Subscriptions;
}

impl Permission for Administer {
    const SCOPE: Scope = Scope::Admin;
}

refuses!(
    ReadUsers => [Unauthenticated, Forbidden, RateLimited, Overloaded, DatabaseUnavailable];
    WriteUsers => [Unauthenticated, Forbidden, RateLimited, Overloaded, DatabaseUnavailable];
    ManageSubscriptions => [Unauthenticated, Forbidden, RateLimited, Overloaded, DatabaseUnavailable];
    Administer => [Unauthenticated, Forbidden, RateLimited, Overloaded, DatabaseUnavailable];
    Mine => [InvalidSubscriptionName, SubscriptionNotFound, DatabaseUnavailable];
);

/// A caller who may do what `P` stands for, and the feature that does it. First among a handler's arguments: nothing of a request is
/// looked at before it is known whose it is.
pub struct Allowed<P, T> {
    pub caller: Caller,
    pub desk: T,
    permission: PhantomData<P>,
}

impl<P: Permission, T: Clone + Send + Sync> FromRequestParts<Guarded<T>> for Allowed<P, T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &Guarded<T>) -> Result<Self, Problem> {
        let caller = authenticate(parts, &state.0.clients).await?;
        if !caller.may(P::SCOPE) {
            return Err(forbidden(P::SCOPE));
        }
        if let Some(place) = parts.extensions.get::<Place>() {
            place.is_of(&caller.client);
        }
        parts.extensions.insert(caller.clone());
        Ok(Self { caller, desk: state.0.desk.clone(), permission: PhantomData })
    }
}

async fn authenticate(parts: &Parts, clients: &Clients) -> Result<Caller, Problem> {
    if clients.is_anybody() {
        return if is_of_this_machine(&parts.headers) { Ok(Caller::anonymous()) } else { Err(from_elsewhere()) };
    }
    let caller = identify(parts, clients).await?;
    if let Some(meter) = Meter::of(&parts.extensions) {
        meter.client(&caller.client, caller.rate)?;
    }
    Ok(caller)
}

async fn identify(parts: &Parts, clients: &Clients) -> Result<Caller, Problem> {
    let token = bearer(&parts.headers).ok_or_else(|| unauthenticated("Bearer realm=\"tidings\""))?;
    let unknown = || unauthenticated("Bearer realm=\"tidings\", error=\"invalid_token\"");
    let meter = Meter::of(&parts.extensions);
    let sought = match clients.recall(token) {
        Some(sought) => sought,
        None => verify(token, clients, meter)?.ok_or_else(unknown)?,
    };
    if let Some(caller) = clients.known(&sought) {
        return Ok(caller);
    }
    // While the database is away or slow, nobody is known, which is not their fault.
    let Some(meter) = meter.filter(|_| clients.is_strange(&sought)) else {
        return clients.caller(&sought).await?.ok_or_else(unknown);
    };
    meter.guess()?;
    let caller = clients.caller(&sought).await;
    if !matches!(caller, Ok(None)) {
        meter.no_guess();
    }
    caller?.ok_or_else(unknown)
}

/// Whoever makes tokens up pays before the signature is looked at, which costs more than anything else that a stranger can ask for.
fn verify(token: &str, clients: &Clients, meter: Option<&Meter>) -> Result<Option<Sought>, Problem> {
    meter.map_or(Ok(()), Meter::guess)?;
    let sought = clients.verify(token);
    if sought.is_some() {
        meter.inspect(|meter| meter.no_guess());
    }
    Ok(sought)
}

/// Whether nobody else's page can have sent it. A browser on this machine sends what any page tells it to: it says whose page that is
/// in `Origin`, and by which name the page has called us in `Host`, though that name may lead here.
fn is_of_this_machine(headers: &HeaderMap) -> bool {
    [header::HOST, header::ORIGIN].iter().flat_map(|name| headers.get_all(name)).all(|value| {
        let uri = value.to_str().ok().and_then(|text| text.parse::<Uri>().ok());
        uri.as_ref().and_then(Uri::host).is_some_and(is_loopback)
    })
}

/// The token of `Authorization: Bearer ..` (RFC 6750, section 2.1), if there is exactly one.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// The same words whatever is wrong with a key: unknown, revoked, expired or misspelt.
fn unauthenticated(challenge: &'static str) -> Problem {
    Problem::from(Code::Unauthenticated).with_header(header::WWW_AUTHENTICATE, challenge)
}

fn from_elsewhere() -> Problem {
    let words = "no key is asked for here, so nobody else's page is heard: Host, and Origin if there is one, have to name localhost or a \
                 loopback address";
    Problem::new(Code::Forbidden, words)
}

/// RFC 6750, section 3: who is refused for want of a scope is told which, as a challenge too.
fn forbidden(scope: Scope) -> Problem {
    let challenge = format!("Bearer realm=\"tidings\", error=\"insufficient_scope\", scope=\"{scope}\"");
    let challenge = HeaderValue::try_from(challenge).expect("a scope is a word of ours");
    Problem::new(Code::Forbidden, format!("the key lacks the scope {scope}"))
        .with_header_value(header::WWW_AUTHENTICATE, challenge)
}

/// Fields outside a client's list stand at these places of its document.
pub(crate) fn field_forbidden(pointers: impl IntoIterator<Item = String>) -> Problem {
    const WHY: &str = "this client may not have to do with this field";
    let faults = pointers.into_iter().map(|pointer| Fault::new(pointer, "field_forbidden", WHY));
    Problem::from(Code::FieldForbidden).with_errors(faults.collect())
}

impl From<Unknowable> for Problem {
    fn from(_: Unknowable) -> Self {
        Code::DatabaseUnavailable.into()
    }
}

/// The name of a subscription that the caller looks after, in the path as `{name}`. Of another client's nothing is told, not even
/// that it is there; only who would register its name hears that it is taken, and by which team.
pub struct Mine(pub SubscriptionName);

impl<T: Send + Sync> FromRequestParts<Guarded<T>> for Mine {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &Guarded<T>) -> Result<Self, Problem> {
        let Name(name) = Name::from_request_parts(parts, state).await?;
        let caller = parts.extensions.get::<Caller>().cloned().ok_or(Code::Internal)?;
        // An administrator looks after all of them, and the feature itself tells whether there is this one.
        if caller.is_admin() {
            return Ok(Self(name));
        }
        match state.0.clients.stands_for(&caller, &name).await {
            Ok(Some(true)) => Ok(Self(name)),
            Ok(_) => Err(Code::SubscriptionNotFound.into()),
            Err(trouble) => {
                tracing::warn!("the registry cannot be asked: {}", trouble.report());
                Err(Code::DatabaseUnavailable.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_this_machine_is_told_from_anothers() {
        let is_ours = |named: &[(header::HeaderName, &str)]| {
            is_of_this_machine(&named.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect())
        };
        for ours in ["127.0.0.1:8080", "127.8.0.1", "localhost", "LOCALHOST:1", "[::1]:8080", "[::1]"] {
            assert!(is_ours(&[(header::HOST, ours)]), "{ours}");
            assert!(is_ours(&[(header::HOST, ours), (header::ORIGIN, &format!("http://{ours}"))]), "{ours}");
        }
        let here = (header::HOST, "127.0.0.1:8080");
        for other in
            ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "", "/"]
        {
            assert!(!is_ours(&[(header::HOST, other)]), "{other}");
            assert!(!is_ours(&[here.clone(), (header::HOST, other)]), "{other}");
            assert!(!is_ours(&[here.clone(), (header::ORIGIN, &format!("https://{other}"))]), "{other}");
        }
        assert!(!is_ours(&[here, (header::ORIGIN, "null")]));
    }

    #[test]
    fn a_bearer_token_stands_alone() {
        let token = |values: &[&str]| {
            let headers: HeaderMap =
                values.iter().map(|value| (header::AUTHORIZATION, value.parse().unwrap())).collect();
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(token(&["Bearer abc"]), Some("abc".to_owned()));
        assert_eq!(token(&["bearer  abc "]), Some("abc".to_owned()));
        for none in [vec![], vec!["abc"], vec!["Basic abc"], vec!["Bearer"], vec!["Bearer a", "Bearer b"]] {
            assert_eq!(token(&none), None, "{none:?}");
        }
    }
}
