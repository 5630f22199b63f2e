//! Tokens: JWTs of the deployment's own identity provider, in place of keys.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::house::{Answer, House, eventually, file, http_with, tidings};

/// The key pair of RFC 8037, appendix A: what is published can be in a test.
const PUBLIC: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
const SEED: &str = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
/// 32 bytes that are no point of the curve: there is none with y = 2.
const NO_POINT: [u8; 32] = {
    let mut y = [0; 32];
    y[0] = 2;
    y
};
const ISSUER: &str = "https://id.example.org";
const AUDIENCE: &str = "tidings";

fn jwks() -> Value {
    json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "kid": "one", "use": "sig", "x": PUBLIC }] })
}

/// A private key from its 32 bytes, as PKCS #8 (RFC 8410, section 7).
fn signing(seed: &[u8]) -> EncodingKey {
    const HEAD: [u8; 16] =
        [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    EncodingKey::from_ed_der(&[&HEAD, seed].concat())
}

fn in_seconds(seconds: i64) -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 + seconds
}

fn claims() -> Value {
    json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": "crm", "exp": in_seconds(300) })
}

fn header() -> Header {
    Header { kid: Some("one".to_owned()), ..Header::new(Algorithm::EdDSA) }
}

fn token(header: &Header, claims: &Value) -> String {
    encode(header, claims, &signing(&URL_SAFE_NO_PAD.decode(SEED).unwrap())).unwrap()
}

fn with(claim: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[claim] = value;
    claims
}

fn without(claim: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(claim);
    claims
}

async fn house(db: PgPool) -> House {
    let jwks = file(&jwks().to_string());
    let settings = [
        ("TIDINGS_JWT_JWKS", jwks.to_str().unwrap()),
        ("TIDINGS_JWT_ISSUER", ISSUER),
        ("TIDINGS_JWT_AUDIENCE", AUDIENCE),
    ];
    House::with(db, &settings).await
}

async fn client(house: &House, words: &str) {
    let words: Vec<&str> = ["client"].into_iter().chain(words.split(' ')).collect();
    let output = tidings(&words, house.settings()).output().await.unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
}

async fn asked(house: &House, token: &str, method: Method, path: &str) -> Answer {
    Answer::to(http_with(token).request(method, format!("{}{path}", house.service.url))).await
}

#[sqlx::test]
async fn a_token_says_who_asks_and_the_registry_what_he_may(db: PgPool) {
    let house = house(db).await;
    let ana = house.user(json!({ "first_name": "Ana", "city": "Berlin" })).await;
    let (user, crm) = (format!("/v1/users/{ana}"), token(&header(), &claims()));
    assert_eq!(asked(&house, &crm, Method::GET, &user).await.refusal(401), "unauthenticated", "nobody knows it yet");
    client(&house, "create crm --scope users:read,users:write --field city --no-key").await;
    assert_eq!(asked(&house, &crm, Method::GET, &user).await.ok().body["profile"], json!({ "city": "Berlin" }));
    assert_eq!(asked(&house, &crm, Method::GET, "/v1/subscriptions").await.refusal(403), "forbidden");
    // What a token claims can only be less.
    let less = token(&header(), &with("scope", json!("openid users:write admin")));
    assert_eq!(asked(&house, &less, Method::GET, &user).await.refusal(403), "forbidden");
    let claims_all = token(&header(), &with("scope", json!("admin users:read")));
    assert_eq!(asked(&house, &claims_all, Method::GET, "/v1/subscriptions").await.refusal(403), "forbidden");
    asked(&house, &claims_all, Method::GET, &user).await.ok();

    client(&house, "revoke crm").await;
    eventually("the token to be refused although it lives", async || {
        match asked(&house, &crm, Method::GET, &user).await.status.as_u16() {
            401 => Ok(()),
            other => Err(other),
        }
    })
    .await;
}

#[sqlx::test]
async fn a_token_that_is_not_right_in_every_point_is_refused(db: PgPool) {
    let house = house(db).await;
    client(&house, "create crm --scope users:read --no-key").await;
    let path = format!("/v1/users/{}", Uuid::new_v4());
    let good = token(&header(), &claims());
    assert_eq!(asked(&house, &good, Method::GET, &path).await.refusal(404), "user_not_found");

    let key = |kid: Option<&str>| Header { kid: kid.map(str::to_owned), ..header() };
    let crit = Header { crit: Some(vec!["b64".to_owned()]), ..header() };
    let elsewhere = Header { jku: Some("https://evil.example.org/keys".to_owned()), ..key(Some("theirs")) };
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let unsigned = format!("{}.{}.", part(r#"{"alg":"none","kid":"one"}"#), part(&claims().to_string()));
    // The public key as a shared secret.
    let confused = Header { kid: Some("one".to_owned()), ..Header::new(Algorithm::HS256) };
    let confused = encode(&confused, &claims(), &EncodingKey::from_secret(PUBLIC.as_bytes())).unwrap();
    let (head, rest) = good.split_once('.').unwrap();
    let (_, signature) = rest.split_once('.').unwrap();
    let other_claims = format!("{head}.{}.{signature}", part(&with("sub", json!("tests")).to_string()));
    for (what, wrong) in [
        ("expired", token(&header(), &with("exp", json!(in_seconds(-60))))),
        ("without an end", token(&header(), &without("exp"))),
        ("not yet valid", token(&header(), &with("nbf", json!(in_seconds(300))))),
        ("of another issuer", token(&header(), &with("iss", json!("https://evil.example.org")))),
        ("without an issuer", token(&header(), &without("iss"))),
        ("for another audience", token(&header(), &with("aud", json!("billing")))),
        ("without an audience", token(&header(), &without("aud"))),
        ("without a client", token(&header(), &without("sub"))),
        ("with a client that is no text", token(&header(), &with("sub", json!(7)))),
        ("of a client that nobody made", token(&header(), &with("sub", json!("nobody")))),
        // That of all tests.
        ("of a client that has a key", token(&header(), &with("sub", json!("tests")))),
        ("with scopes that are no text", token(&header(), &with("scope", json!(["users:read"])))),
        ("without the id of a key", token(&key(None), &claims())),
        ("of a key that is not pinned", token(&key(Some("two")), &claims())),
        ("of a key from elsewhere", token(&elsewhere, &claims())),
        ("with extensions", token(&crit, &claims())),
        ("signed by another", encode(&header(), &claims(), &signing(&[7; 32])).unwrap()),
        ("unsigned", unsigned),
        ("of a confused algorithm", confused),
        ("with other claims", other_claims),
        ("cut off", good[..good.len() - 4].to_owned()),
        ("without end", "a".repeat(10_000)),
    ] {
        let refused = asked(&house, &wrong, Method::GET, &path).await;
        assert_eq!(refused.refusal(401), "unauthenticated", "{what}");
    }
    let log = house.service.log();
    assert!(!log.contains(signature) && !log.contains(rest), "{log}");
}

/// Each costs a look at a signature, which is more than any other question of a stranger's.
#[sqlx::test]
async fn who_makes_tokens_up_is_held_back_and_who_was_known_is_not(db: PgPool) {
    let house = house(db).await;
    client(&house, "create crm --scope users:read --no-key").await;
    let path = format!("/v1/users/{}", Uuid::new_v4());
    let good = token(&header(), &claims());
    assert_eq!(asked(&house, &good, Method::GET, &path).await.refusal(404), "user_not_found");
    let made_up = async |n: i64| {
        let forged = encode(&header(), &with("jti", json!(n)), &signing(&[7; 32])).unwrap();
        asked(&house, &forged, Method::GET, &path).await
    };
    let answers = join_all((0..400).map(made_up)).await;
    let held_back = answers.iter().filter(|answer| answer.status == 429).count();
    assert!(held_back > 0 && answers.iter().all(|answer| [401, 429].contains(&answer.status.as_u16())), "{held_back}");
    assert_eq!(asked(&house, &good, Method::GET, &path).await.refusal(404), "user_not_found");
}

#[sqlx::test]
async fn keys_that_cannot_verify_are_named_at_start(db: PgPool) {
    let mut settings = vec![
        ("DATABASE_URL", crate::house::database_url(&db)),
        ("TIDINGS_LISTEN", "127.0.0.1:0".to_owned()),
        ("TIDINGS_JWT_ISSUER", ISSUER.to_owned()),
        ("TIDINGS_JWT_AUDIENCE", AUDIENCE.to_owned()),
    ];
    let start = async |settings: &[(&str, String)]| {
        let settings: Vec<_> = settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let output =
            tokio::time::timeout(Duration::from_secs(20), tidings(&["serve", "--no-relay"], &settings).output());
        let output = output.await.expect("it serves").unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = start(&settings).await;
    assert!(said.contains("TIDINGS_JWT_JWKS: needs"), "{said}");
    let of = |key: Value| json!({ "keys": [key] }).to_string();
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let ed25519 = |x: &[u8]| of(json!({ "kty": "OKP", "crv": "Ed25519", "kid": "one", "x": part(x) }));
    let ec = |curve: &str, x: &[u8]| of(json!({ "kty": "EC", "crv": curve, "kid": "one", "x": part(x), "y": part(x) }));
    let rsa =
        |n: &[u8], e: &[u8]| of(json!({ "kty": "RSA", "kid": "one", "alg": "RS256", "n": part(n), "e": part(e) }));
    for (text, reason) in [
        ("{".to_owned(), "no JWK set"),
        (json!({ "keys": [] }).to_string(), "holds no key"),
        (of(json!({ "kty": "OKP", "crv": "Ed25519", "x": PUBLIC })), "no kid"),
        (of(json!({ "kty": "oct", "kid": "one", "alg": "HS256", "k": PUBLIC })), "only public keys"),
        (of(json!({ "kty": "OKP", "crv": "Ed25519", "kid": "one", "use": "enc", "x": PUBLIC })), "not for signatures"),
        (of(json!({ "kty": "OKP", "crv": "Ed25519", "kid": "one", "alg": "RS256", "x": PUBLIC })), "does not go with"),
        (of(json!({ "kty": "RSA", "kid": "one", "n": "AQAB", "e": "AQAB" })), "has to say its algorithm"),
        (of(json!({ "kty": "RSA", "kid": "one", "alg": "HS256", "n": "AQAB", "e": "AQAB" })), "does not go with"),
        // Well-formed, and no keys: whoever names one in a token would find out, and everybody would be refused for ever.
        (ed25519(b""), "no public key of its curve"),
        (ed25519(&[7; 15]), "no public key of its curve"),
        (ed25519(&[7; 33]), "no public key of its curve"),
        (ed25519(&NO_POINT), "no public key of its curve"),
        (ec("P-256", &[0; 3]), "no public key of its curve"),
        (ec("P-256", &[1; 32]), "no public key of its curve"),
        (ec("P-384", &[1; 48]), "no public key of its curve"),
        (rsa(b"", &[1, 0, 1]), "no RSA key"),
        (rsa(&[255; 128], &[1, 0, 1]), "no RSA key"),
        (rsa(&[255; 513], &[1, 0, 1]), "no RSA key"),
        (rsa(&[254; 256], &[1, 0, 1]), "no RSA key"),
        (rsa(&[255; 256], b""), "no RSA key"),
        (rsa(&[255; 256], &[1]), "no RSA key"),
        (rsa(&[255; 256], &[1, 0, 0]), "no RSA key"),
        (rsa(&[255; 256], &[2, 0, 0, 0, 1]), "no RSA key"),
    ] {
        settings.push(("TIDINGS_JWT_JWKS", file(&text).to_str().unwrap().to_owned()));
        let said = start(&settings).await;
        assert!(said.contains(reason), "{reason}: {said}");
        settings.pop();
    }
}
