//! Entity tags and conditional requests (RFC 9110, sections 8.8.3 and 13).

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts},
};

use super::{Code, Problem, refuses};

/// The entity tag of a version.
pub fn etag(version: i64) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{version}\"")).expect("digits and quotes are a valid header")
}

/// `*`, or entity tags with commas between them. An `ETag` that was answered is one.
#[derive(utoipa::ToSchema)]
#[schema(value_type = String, example = json!("\"7\""), pattern = r#"^(\*|(W/)?"[!#-~]*"( *, *(W/)?"[!#-~]*")*)$"#)]
pub struct EntityTags(pub String);

/// Any there is.
#[derive(utoipa::ToSchema)]
#[schema(value_type = String, example = json!("*"), pattern = r"^\*$")]
pub struct AnyTag(pub String);

/// `If-Match` and `If-None-Match` of a request that changes something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Precondition {
    None,
    /// `If-Match: "7", "8"`; empty when none of the tags can be one of ours.
    VersionIn(Vec<i64>),
    /// `If-Match: *`
    Exists,
    /// `If-None-Match: *`
    Absent,
}

impl Precondition {
    /// Whether a user of this version, or none, is what the client wants to meet.
    pub fn allows(&self, version: Option<i64>) -> bool {
        match (self, version) {
            (Self::None, _) => true,
            (Self::VersionIn(versions), Some(version)) => versions.contains(&version),
            (Self::VersionIn(_), None) => false,
            (Self::Exists, version) => version.is_some(),
            (Self::Absent, version) => version.is_none(),
        }
    }
}

refuses!(Precondition => [InvalidHeader, VersionMismatch]; IfNoneMatch => [InvalidHeader]);

impl<S: Sync> FromRequestParts<S> for Precondition {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match (tags(&parts.headers, header::IF_MATCH)?, tags(&parts.headers, header::IF_NONE_MATCH)?) {
            (None, None) => Ok(Self::None),
            (Some(Tags::Any), None) => Ok(Self::Exists),
            // Strong comparison: a weak tag never matches.
            (Some(Tags::These(tags)), None) => {
                Ok(Self::VersionIn(tags.iter().filter(|tag| !tag.weak).filter_map(Tag::version).collect()))
            }
            (None, Some(Tags::Any)) => Ok(Self::Absent),
            // That there is a user, and that there is none: nobody meets both.
            (Some(_), Some(Tags::Any)) => Ok(Self::VersionIn(vec![])),
            (_, Some(Tags::These(_))) => {
                Err(invalid(&header::IF_NONE_MATCH, "a request that changes something takes only *"))
            }
        }
    }
}

/// `If-None-Match` of a GET: the versions that the client holds already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IfNoneMatch(Option<Tags>);

impl IfNoneMatch {
    /// Whether the client holds this version. Weak comparison.
    pub fn holds(&self, version: i64) -> bool {
        match &self.0 {
            None => false,
            Some(Tags::Any) => true,
            Some(Tags::These(tags)) => tags.iter().any(|tag| tag.version() == Some(version)),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for IfNoneMatch {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Ok(Self(tags(&parts.headers, header::IF_NONE_MATCH)?))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Tags {
    Any,
    These(Vec<Tag>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Tag {
    weak: bool,
    opaque: String,
}

impl Tag {
    /// The version, if this tag is one that we could have given.
    fn version(&self) -> Option<i64> {
        let canonical = !self.opaque.starts_with(['0', '+', '-']);
        self.opaque.parse().ok().filter(|_| canonical)
    }
}

fn invalid(name: &HeaderName, reason: &str) -> Problem {
    Problem::new(Code::InvalidHeader, format!("{name}: {reason}"))
}

fn tags(headers: &HeaderMap, name: HeaderName) -> Result<Option<Tags>, Problem> {
    let mut tags = vec![];
    let mut present = false;
    for value in headers.get_all(&name) {
        present = true;
        let value = value.to_str().unwrap_or_default().trim();
        if value == "*" {
            return Ok(Some(Tags::Any));
        }
        tags.extend(parse(value).ok_or_else(|| invalid(&name, "expected * or a list of entity tags such as \"7\""))?);
    }
    Ok(present.then_some(Tags::These(tags)))
}

/// `#entity-tag`: one or more, commas between them; a comma inside the quotes belongs to the tag.
fn parse(mut list: &str) -> Option<Vec<Tag>> {
    let mut tags = vec![];
    loop {
        let weak = list.starts_with("W/");
        let quoted = list.strip_prefix("W/").unwrap_or(list).strip_prefix('"')?;
        let (opaque, rest) = quoted.split_once('"')?;
        tags.push(Tag { weak, opaque: opaque.to_owned() });
        list = match rest.trim_start() {
            "" => return Some(tags),
            rest => rest.strip_prefix(',')?.trim_start(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(list: &str) -> Option<Vec<Option<i64>>> {
        parse(list).map(|tags| tags.iter().map(Tag::version).collect())
    }

    #[test]
    fn entity_tags_are_read_as_the_standard_writes_them() {
        assert_eq!(versions("\"7\""), Some(vec![Some(7)]));
        assert_eq!(versions("\"7\" , W/\"8\",\"a,b\""), Some(vec![Some(7), Some(8), None]));
        assert_eq!(versions("\"07\",\"+7\",\"-7\",\"\""), Some(vec![None, None, None, None]));
        for wrong in ["", "7", "\"7", "\"7\",", "\"7\" \"8\"", "w/\"7\""] {
            assert_eq!(versions(wrong), None, "{wrong}");
        }
    }
}
