//! Tokens: JWTs (RFC 7519) of the deployment's own identity provider, in place of keys.
//!
//! Promise: a token only says who asks; what he may is kept here, so that a revoked client is refused although its token still lives.
//! Not here, on purpose: anything fetched. The keys are pinned by a file, and what a token's header says of others is not looked at.

use std::{collections::HashMap, fs, path::Path};

use anyhow::{Context, bail, ensure};
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse},
};
use serde_json::{Map, Value};

/// Between the clocks of two machines, in seconds.
const LEEWAY_S: u64 = 30;
/// A larger one is somebody's attempt.
const LIMIT_BYTES: usize = 8 * 1024;

/// What tokens are checked against.
pub struct Tokens {
    keys: HashMap<String, (DecodingKey, Validation)>,
    client_claim: String,
}

/// What a valid token says.
#[derive(Debug, PartialEq, Eq)]
pub struct Claimed {
    pub client: String,
    /// The scopes that it is limited to; `None`: all that its client has.
    pub scopes: Option<Vec<String>>,
}

impl Tokens {
    /// Tokens of this issuer for this audience, signed with a key of the JWK set (RFC 7517) in `jwks`.
    ///
    /// # Errors
    /// When the file is no such set, or has a key that cannot verify a signature of ours.
    pub fn pinned(jwks: &Path, issuer: &str, audience: &str, client_claim: &str) -> anyhow::Result<Self> {
        let text = fs::read_to_string(jwks).with_context(|| format!("cannot read {}", jwks.display()))?;
        let set: JwkSet = serde_json::from_str(&text).with_context(|| format!("{} is no JWK set", jwks.display()))?;
        ensure!(!set.keys.is_empty(), "{} holds no key", jwks.display());
        let mut keys = HashMap::new();
        for jwk in &set.keys {
            let Some(id) = jwk.common.key_id.clone() else { bail!("a key in {} has no kid", jwks.display()) };
            let algorithm = algorithm(jwk).with_context(|| format!("key {id:?}"))?;
            let mut validation = Validation::new(algorithm);
            validation.leeway = LEEWAY_S;
            validation.validate_nbf = true;
            validation.set_issuer(&[issuer]);
            validation.set_audience(&[audience]);
            validation.set_required_spec_claims(&["exp", "iss", "aud"]);
            let key = DecodingKey::from_jwk(jwk).with_context(|| format!("key {id:?}"))?;
            ensure!(keys.insert(id.clone(), (key, validation)).is_none(), "two keys have the kid {id:?}");
        }
        Ok(Self { keys, client_claim: client_claim.to_owned() })
    }

    /// What the token says, if it is valid now.
    pub fn verify(&self, token: &str) -> Option<Claimed> {
        if token.len() > LIMIT_BYTES {
            return None;
        }
        let header = decode_header(token).ok()?;
        // Extensions that have to be understood (RFC 7515, section 4.1.11): we understand none.
        if header.crit.is_some() {
            return None;
        }
        let (key, validation) = self.keys.get(&header.kid?)?;
        let claims = decode::<Map<String, Value>>(token, key, validation).ok()?.claims;
        let scopes = match claims.get("scope") {
            None => None,
            Some(Value::String(scopes)) => Some(scopes.split(' ').map(str::to_owned).collect()),
            Some(_) => return None,
        };
        Some(Claimed { client: claims.get(&self.client_claim)?.as_str()?.to_owned(), scopes })
    }
}

/// The one algorithm that a key is for: a token does not choose.
fn algorithm(jwk: &Jwk) -> anyhow::Result<Algorithm> {
    ensure!(
        matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)),
        "it is not for signatures (\"use\")"
    );
    let of_type = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => None,
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => Some(Algorithm::ES256),
            EllipticCurve::P384 => Some(Algorithm::ES384),
            _ => bail!("its curve is none of P-256 and P-384"),
        },
        AlgorithmParameters::OctetKeyPair(key) => match key.curve {
            EllipticCurve::Ed25519 => Some(Algorithm::EdDSA),
            _ => bail!("its curve is not Ed25519"),
        },
        _ => bail!("only public keys are pinned: RSA, EC or OKP"),
    };
    let said = jwk.common.key_algorithm.map(|said| said.to_string().parse::<Algorithm>()).transpose()?;
    let algorithm = said.or(of_type).context("an RSA key has to say its algorithm (\"alg\")")?;
    let is_rsa = matches!(
        algorithm,
        Algorithm::RS256 | Algorithm::RS384 | Algorithm::RS512 | Algorithm::PS256 | Algorithm::PS384 | Algorithm::PS512
    );
    ensure!(
        if of_type.is_some() { Some(algorithm) == of_type } else { is_rsa },
        "its algorithm does not go with its type"
    );
    Ok(algorithm)
}
