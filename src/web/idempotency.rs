//! `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): one request, however often it is sent.

use axum::{extract::FromRequestParts, http::request::Parts};

use super::{Code, NoPrecondition, Problem, refuses};

const MAX_BYTES: usize = 255;

/// The key of a request, if it has one. Taken with the quotes that the draft asks for, and without, as most clients send it. No Debug: a
/// client may have put anything into it.
pub struct IdempotencyKey(pub Option<String>);

/// Visible ASCII characters, with or without quotes around them.
#[derive(utoipa::ToSchema)]
#[schema(as = IdempotencyKey, value_type = String, example = "0f6e9c0a-1", pattern = r#"^("[!#-~]{1,255}"|[!#-~]{1,255})$"#)]
pub struct KeyOfRequest(pub String);

impl<S: Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let mut values = parts.headers.get_all("idempotency-key").iter();
        match (values.next(), values.next()) {
            (None, _) => Ok(Self(None)),
            (Some(value), None) => {
                let key = value.to_str().ok().and_then(read);
                key.map(|key| Self(Some(key.to_owned()))).ok_or_else(|| Code::InvalidIdempotencyKey.into())
            }
            _ => Err(Code::InvalidIdempotencyKey.into()),
        }
    }
}

/// A change that knows no condition in its headers, and is not kept, so that a repetition would be done anew: neither a condition nor a key
/// may be silently without effect.
pub struct Plain;

refuses!(Plain => [InvalidHeader, InvalidIdempotencyKey]);

impl<S: Sync> FromRequestParts<S> for Plain {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        NoPrecondition::from_request_parts(parts, state).await?;
        if parts.headers.contains_key("idempotency-key") {
            return Err(Problem::new(Code::InvalidIdempotencyKey, "Idempotency-Key: this request takes none"));
        }
        Ok(Self)
    }
}

fn read(text: &str) -> Option<&str> {
    let text = text.trim();
    let key = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
    let is_visible = key.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    (is_visible && (1..=MAX_BYTES).contains(&key.len())).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_with_quotes_and_without() {
        assert_eq!(read("abc-1"), Some("abc-1"));
        assert_eq!(read(" \"abc-1\" "), Some("abc-1"));
        for wrong in ["", "\"\"", "a b", "a\"b", "\"a", "\u{e9}", &"a".repeat(256)] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
