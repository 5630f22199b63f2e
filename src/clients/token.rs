//! Tokens: JWTs (RFC 7519) of the deployment's own identity provider, in place of keys.
//!
//! Promise: a token only says who asks; what he may is kept here, so that a revoked client is refused although its token still lives.
//! Not here, on purpose: anything fetched. The keys are pinned by a file, and what a token's header says of others is not looked at.

use std::{
    collections::HashMap,
    fs,
    ops::RangeInclusive,
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, bail, ensure};
use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind, Validation, crypto, decode, decode_header, get_current_timestamp,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse},
};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Between the clocks of two machines, in seconds.
const LEEWAY_S: u64 = 30;
/// A larger one is somebody's attempt.
const LIMIT_BYTES: usize = 8 * 1024;

/// Tokens that are remembered. Each has some hundred bytes.
const MOST_REMEMBERED: usize = 10_000;

/// What tokens are checked against.
pub struct Tokens {
    keys: HashMap<String, (DecodingKey, Validation)>,
    client_claim: String,
    /// What was verified, by the token's SHA-256, and when it ends.
    verified: Mutex<HashMap<[u8; 32], (Claimed, u64)>>,
}

/// What a valid token says.
#[derive(Debug, Clone, PartialEq, Eq)]
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
            let key = verifying(jwk, algorithm).with_context(|| format!("key {id:?}"))?;
            ensure!(keys.insert(id.clone(), (key, validation)).is_none(), "two keys have the kid {id:?}");
        }
        Ok(Self { keys, client_claim: client_claim.to_owned(), verified: Mutex::default() })
    }

    /// What the token says, if it was verified before and has not ended.
    pub fn recall(&self, token: &str) -> Option<Claimed> {
        if token.len() > LIMIT_BYTES {
            return None;
        }
        let verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        let (claimed, ends) = verified.get(&<[u8; 32]>::from(Sha256::digest(token)))?;
        (get_current_timestamp() < ends.saturating_add(LEEWAY_S)).then(|| claimed.clone())
    }

    /// What the token says, if it is valid now; looks at its signature.
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
        let claimed = Claimed { client: claims.get(&self.client_claim)?.as_str()?.to_owned(), scopes };
        // Seconds, and perhaps parts of one (RFC 7519, section 2).
        if let Some(ends) = claims.get("exp").and_then(Value::as_f64) {
            self.remember(token, claimed.clone(), ends as u64);
        }
        Some(claimed)
    }

    fn remember(&self, token: &str, claimed: Claimed, ends: u64) {
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.len() >= MOST_REMEMBERED {
            // Rarely, and it costs each of them one look at its signature.
            verified.clear();
        }
        verified.insert(Sha256::digest(token).into(), (claimed, ends));
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

/// Of an Ed25519 key, in bytes.
const ED25519_BYTES: usize = 32;
/// Of an RSA key's modulus, in bits: RFC 7518, section 3.3, asks for no less, and the library takes no more.
const RSA_BITS: RangeInclusive<usize> = 2048..=4096;
/// Of its exponent.
const RSA_EXPONENT_BITS: RangeInclusive<usize> = 2..=33;

/// The key, which is sound: the library itself looks when a token comes, and panics at an Ed25519 key that was cut off.
fn verifying(jwk: &Jwk, algorithm: Algorithm) -> anyhow::Result<DecodingKey> {
    let key = DecodingKey::from_jwk(jwk)?;
    match key.kind() {
        DecodingKeyKind::RsaModulusExponent { n, e } => {
            let is_sound =
                RSA_BITS.contains(&bits(n)) && RSA_EXPONENT_BITS.contains(&bits(e)) && is_odd(n) && is_odd(e);
            ensure!(is_sound, "its \"n\" and \"e\" are no RSA key of 2048 to 4096 bits");
        }
        DecodingKeyKind::SecretOrDer(bytes) => {
            let is_whole = algorithm != Algorithm::EdDSA || bytes.len() == ED25519_BYTES;
            // No signature is right; whether one can be looked at is what is asked.
            ensure!(is_whole && crypto::verify("", &[], &key, algorithm).is_ok(), "it is no public key of its curve");
        }
    }
    Ok(key)
}

/// How long a big-endian number is, without what is zero before it.
fn bits(number: &[u8]) -> usize {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let first = number.get(zeros).map_or(0, |byte| byte.leading_zeros() as usize);
    (number.len() - zeros) * 8 - first
}

fn is_odd(number: &[u8]) -> bool {
    number.last().is_some_and(|last| last % 2 == 1)
}

#[cfg(test)]
mod tests {
    use std::env::temp_dir;

    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    /// With the key pair of RFC 8037, appendix A.
    fn tokens() -> (Tokens, impl Fn(&Value) -> String) {
        let public = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let private = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20".to_vec();
        let seed = URL_SAFE_NO_PAD.decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A").unwrap();
        let signing = EncodingKey::from_ed_der(&[private, seed].concat());
        let tokens = pinned(&json!({ "kty": "OKP", "crv": "Ed25519", "kid": "one", "x": public })).unwrap();
        let header = Header { kid: Some("one".to_owned()), ..Header::new(Algorithm::EdDSA) };
        (tokens, move |claims| encode(&header, claims, &signing).unwrap())
    }

    fn pinned(key: &Value) -> anyhow::Result<Tokens> {
        let jwks = temp_dir().join(Uuid::new_v4().to_string());
        fs::write(&jwks, json!({ "keys": [key] }).to_string()).unwrap();
        let tokens = Tokens::pinned(&jwks, "https://id.example.org", "tidings", "sub");
        fs::remove_file(jwks).unwrap();
        tokens
    }

    fn claims(ends_in_s: i64) -> Value {
        let ends = get_current_timestamp().saturating_add_signed(ends_in_s);
        json!({ "iss": "https://id.example.org", "aud": "tidings", "sub": "crm", "exp": ends })
    }

    #[test]
    fn a_signature_is_looked_at_once() {
        let (tokens, token) = tokens();
        let (good, over) = (token(&claims(300)), token(&claims(-60)));
        assert_eq!(tokens.recall(&good), None);
        let claimed = tokens.verify(&good).unwrap();
        assert_eq!(tokens.recall(&good), Some(claimed));
        let mut in_parts = claims(300);
        in_parts["exp"] = json!(in_parts["exp"].as_f64().unwrap() + 0.5);
        let in_parts = token(&in_parts);
        assert!(tokens.verify(&in_parts).is_some() && tokens.recall(&in_parts).is_some());
        let forged = format!("{good}A");
        assert_eq!((tokens.verify(&forged), tokens.recall(&forged)), (None, None));
        assert_eq!((tokens.verify(&over), tokens.recall(&over)), (None, None));
    }

    #[test]
    fn what_is_remembered_ends_with_its_token() {
        let (tokens, token) = tokens();
        let ending = token(&claims(0));
        let claimed = tokens.verify(&ending).unwrap();
        assert!(tokens.recall(&ending).is_some(), "clocks may differ");
        tokens.remember(&ending, claimed, get_current_timestamp() - LEEWAY_S);
        assert_eq!(tokens.recall(&ending), None);
    }

    /// Those of RFC 7515, appendices A.2 and A.3, and the base point of P-384. What is refused is told by the chapter `tokens`.
    #[test]
    fn sound_keys_are_taken() {
        let n = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-\
                 yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e\
                 -KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco\
                 9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ";
        let (x, y) = ("f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0");
        let (base_x, base_y) = (
            "qofKIr6LBTeOscce8yCtdG4dO2KLp5uYWfdB4IJUKjhVAvJdv1UpbDpUXjhydgq3",
            "NhfeSpYmLG9dnpi_kpLcKfj0Hb0omhR86doxE7XwuMAKYLHOHX6BnXpDHXyQ6g5f",
        );
        for key in [
            json!({ "kty": "RSA", "kid": "one", "alg": "RS256", "n": n, "e": "AQAB" }),
            json!({ "kty": "RSA", "kid": "one", "alg": "PS512", "n": n, "e": "AQAB" }),
            json!({ "kty": "EC", "crv": "P-256", "kid": "one", "x": x, "y": y }),
            json!({ "kty": "EC", "crv": "P-384", "kid": "one", "x": base_x, "y": base_y }),
        ] {
            assert!(pinned(&key).is_ok(), "{key}");
        }
    }

    #[test]
    fn a_number_is_as_long_as_it_is_without_the_zeros_before_it() {
        let numbers: [&[u8]; 6] = [&[], &[0, 0], &[1], &[0, 3], &[1, 0, 1], &[0, 255, 1]];
        assert_eq!(numbers.map(bits), [0, 0, 1, 2, 17, 16]);
    }

    #[test]
    fn no_more_is_remembered_than_there_is_room_for() {
        let (tokens, _) = tokens();
        for n in 0..=MOST_REMEMBERED {
            tokens.remember(&n.to_string(), Claimed { client: "crm".to_owned(), scopes: None }, u64::MAX);
        }
        assert_eq!(tokens.verified.lock().unwrap().len(), 1);
    }
}
