//! How a service serves: where it listens, whom it believes, what clients may take, and what it watches.
//!
//! Every setting arrives as text, so that all faults are found before any is reported.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;

use super::faults::{Faults, duration, named, number, path};
use crate::{
    clients::Tokens,
    web::{LimitSettings, Proxies},
};

#[derive(Debug, Args)]
pub struct Listen {
    /// Address to listen on.
    #[arg(long = "listen", env = "TIDINGS_LISTEN", default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub address: String,
}

impl Listen {
    pub fn parse(&self, faults: &mut Faults) -> Option<SocketAddr> {
        let address = self.address.parse().map_err(|_| "expected an IP address and a port, such as 127.0.0.1:8080");
        faults.note("TIDINGS_LISTEN", address)
    }
}

/// Tokens of the deployment's own identity provider, taken beside keys.
#[derive(Debug, Args)]
pub struct Jwt {
    /// File with the public keys that sign tokens, a JWK set. What is in it at start counts; with it issuer and audience are needed.
    #[arg(long, env = "TIDINGS_JWT_JWKS", value_name = "FILE", value_parser = path())]
    pub jwt_jwks: Option<PathBuf>,
    /// Who has to have made a token: its `iss`.
    #[arg(long, env = "TIDINGS_JWT_ISSUER", value_name = "TEXT")]
    pub jwt_issuer: Option<String>,
    /// For whom a token has to be made: its `aud`.
    #[arg(long, env = "TIDINGS_JWT_AUDIENCE", value_name = "TEXT")]
    pub jwt_audience: Option<String>,
    /// The claim that names the client, which has to be one of `tidings client create`.
    #[arg(long, env = "TIDINGS_JWT_CLIENT_CLAIM", default_value = "sub", value_name = "NAME")]
    pub jwt_client_claim: String,
}

impl Jwt {
    /// `None` when it is not set up.
    pub fn tokens(&self, faults: &mut Faults) -> Option<Tokens> {
        let (jwks, issuer, audience) = match (&self.jwt_jwks, &self.jwt_issuer, &self.jwt_audience) {
            (None, None, None) => return None,
            (Some(jwks), Some(issuer), Some(audience)) => (jwks, issuer, audience),
            _ => {
                let rule = "needs TIDINGS_JWT_ISSUER and TIDINGS_JWT_AUDIENCE beside it: all three or none";
                return faults.note("TIDINGS_JWT_JWKS", Err(rule));
            }
        };
        let jwks = faults.note("TIDINGS_JWT_JWKS", named(jwks))?;
        faults.note("TIDINGS_JWT_JWKS", Tokens::pinned(jwks, issuer, audience, &self.jwt_client_claim))
    }
}

#[derive(Debug, Args)]
pub struct Watching {
    /// A subscription without a consumer for so long is reported as idle.
    #[arg(long, env = "TIDINGS_SUBSCRIPTION_IDLE_AFTER", default_value = "7d", value_name = "DURATION")]
    pub subscription_idle_after: String,
    /// Between two looks at all subscriptions.
    #[arg(long, env = "TIDINGS_SUBSCRIPTION_CHECK_EVERY", default_value = "10s", value_name = "DURATION")]
    pub subscription_check_every: String,
}

/// How subscriptions are watched.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    pub idle_after: Duration,
    pub check_every: Duration,
}

const LONGEST_CHECK: Duration = Duration::from_secs(60);

impl Watching {
    pub fn parse(&self, faults: &mut Faults) -> Option<Watched> {
        let idle_after = faults.note("TIDINGS_SUBSCRIPTION_IDLE_AFTER", duration(&self.subscription_idle_after));
        // The session that leads the watch ends when nothing was said on it for two minutes.
        let in_time = duration(&self.subscription_check_every)
            .and_then(|every| if every <= LONGEST_CHECK { Ok(every) } else { Err("expected at most 60s") });
        let check_every = faults.note("TIDINGS_SUBSCRIPTION_CHECK_EVERY", in_time);
        Some(Watched { idle_after: idle_after?, check_every: check_every? })
    }
}

#[derive(Debug, Args)]
pub struct Erasure {
    /// How long after a deletion those who were told of it may take to confirm it; then they are late.
    #[arg(long, env = "TIDINGS_ERASURE_DEADLINE", default_value = "24h", value_name = "DURATION")]
    pub erasure_deadline: String,
}

impl Erasure {
    pub fn parse(&self, faults: &mut Faults) -> Option<Duration> {
        faults.note("TIDINGS_ERASURE_DEADLINE", duration(&self.erasure_deadline))
    }
}

#[derive(Debug, Args)]
pub struct Connections {
    /// Connections at once. Fewer if the limit of open files is lower. At the cap those are ended first that have kept us waiting
    /// longest.
    #[arg(long, env = "TIDINGS_MAX_CONNECTIONS", default_value = "10000", value_name = "NUMBER")]
    pub max_connections: String,
}

impl Connections {
    /// The limits where there is no `/v1`, which all the others are for.
    pub fn parse(&self, faults: &mut Faults) -> Option<LimitSettings> {
        let connections = faults.note("TIDINGS_MAX_CONNECTIONS", number(&self.max_connections))?;
        Some(LimitSettings { connections, requests: connections, rate: None, proxies: Proxies::default() })
    }
}

/// What clients may take.
#[derive(Debug, Args)]
pub struct Limits {
    #[command(flatten)]
    pub connections: Connections,
    /// Requests to /v1 under way at once; more are answered 503.
    #[arg(long, env = "TIDINGS_MAX_REQUESTS", default_value = "1024", value_name = "NUMBER")]
    pub max_requests: String,
    /// Requests of one client a second, and at once after a rest; or off. A client may have another (`tidings client create
    /// --rate-limit`). Counted by each instance for itself.
    #[arg(long, env = "TIDINGS_RATE_LIMIT", default_value = "5000/10000", value_name = "PER_SECOND/BURST")]
    pub rate_limit: String,
    /// Proxies whose X-Forwarded-For is believed: addresses or networks. It decides whom wrong keys are held against.
    #[arg(long, env = "TIDINGS_TRUSTED_PROXIES", value_name = "NETWORK", value_delimiter = ',')]
    pub trusted_proxies: Vec<String>,
}

impl Limits {
    pub fn parse(&self, faults: &mut Faults) -> Option<LimitSettings> {
        let limits = self.connections.parse(faults);
        let requests = faults.note("TIDINGS_MAX_REQUESTS", number(&self.max_requests));
        let rate = match self.rate_limit.as_str() {
            "off" => Some(None),
            rate => faults.note("TIDINGS_RATE_LIMIT", rate.parse().map(Some)),
        };
        let proxies = faults.note("TIDINGS_TRUSTED_PROXIES", Proxies::parse(&self.trusted_proxies));
        Some(LimitSettings { requests: requests?, rate: rate?, proxies: proxies?, ..limits? })
    }
}
