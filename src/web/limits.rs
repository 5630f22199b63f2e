//! Limits: everything that turns away, and what it is set to.
//!
//! Promise: whatever clients do, the process keeps within these figures, and says 503 or 429 with `Retry-After` to whoever has to come again.
//! Not here, on purpose: deadlines, which are constants beside what they end.

use std::sync::Arc;

use axum::{
    extract::Request,
    http::{HeaderValue, Version, header, uri::Authority},
};

use super::{
    Code, Peer, Problem,
    address::Proxies,
    answers::Answers,
    connections::Connections,
    manners::URI_LIMIT_BYTES,
    meter::{Meter, Tolls},
    places::{Place, Places},
    rate::Rate,
    traffic::Traffic,
};

/// What takes a place. The operator's questions do not: they are asked when all places are taken.
const LIMITED: &str = "/v1/";

/// What the limits are set to.
#[derive(Debug, Clone)]
pub struct LimitSettings {
    pub connections: usize,
    pub requests: usize,
    /// For a client without one of its own. `None`: unlimited.
    pub rate: Option<Rate>,
    pub proxies: Proxies,
}

/// All limits of a process. Cheap to clone.
#[derive(Clone)]
pub struct Limits(Arc<All>);

pub struct All {
    pub traffic: Traffic,
    pub(super) connections: Arc<Connections>,
    places: Places,
    pub(super) answers: Answers,
    tolls: Arc<Tolls>,
    proxies: Proxies,
}

impl std::ops::Deref for Limits {
    type Target = All;

    fn deref(&self) -> &All {
        &self.0
    }
}

impl Limits {
    pub fn new(settings: LimitSettings) -> Self {
        let traffic = Traffic::default();
        Self(Arc::new(All {
            connections: Connections::new(settings.connections),
            places: Places::new(settings.requests, traffic.clone()),
            answers: Answers::new(traffic.clone()),
            tolls: Arc::new(Tolls::new(settings.rate, traffic.clone())),
            proxies: settings.proxies,
            traffic,
        }))
    }

    /// Lets a request in, and gives it its place and its meter if it needs them.
    pub(super) fn admit(&self, request: &mut Request, route: &str) -> Result<Option<(Place, Meter)>, Problem> {
        if !has_right_host(request) {
            const DETAIL: &str =
                "a request of HTTP/1.1 has one header Host, which is a host, perhaps with a port, or empty";
            return Err(Problem::new(Code::MalformedRequest, DETAIL).with_header(header::CONNECTION, "close"));
        }
        let uri = request.uri();
        if uri.path().len() + uri.query().map_or(0, str::len) > URI_LIMIT_BYTES {
            return Err(Code::UriTooLong.into());
        }
        if !route.starts_with(LIMITED) {
            return Ok(None);
        }
        let peer = request.extensions().get::<Peer>();
        let address = peer.map(|Peer(peer)| self.proxies.client(peer.ip(), request.headers()));
        let meter = Meter::new(self.tolls.clone(), address);
        let place = self.places.take()?;
        request.extensions_mut().insert(meter.clone());
        request.extensions_mut().insert(place.clone());
        Ok(Some((place, meter)))
    }
}

/// RFC 9112, section 3.2. hyper leaves it to us.
fn has_right_host(request: &Request) -> bool {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => request.version() != Version::HTTP_11,
        (Some(host), None) => is_host(host),
        (Some(_), Some(_)) => false,
    }
}

/// Empty where the target of the request has no host either.
fn is_host(value: &HeaderValue) -> bool {
    let host = value.as_bytes();
    host.is_empty() || !host.contains(&b'@') && Authority::try_from(host).is_ok()
}
