//! Entity tags and conditional requests (RFC 9110, sections 8.8.3 and 13).

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts},
};

use super::{Code, Problem, refuses};

/// The entity tag of a version, for who sees all of the record.
pub fn etag(version: i64) -> HeaderValue {
    etag_of_view(version, None)
}

/// The entity tag of what a client sees of a version. Parts of it are representations of their own (RFC 9110, section 8.8.1): when a client
/// comes to see more, its copy is no longer the latest.
pub fn etag_of_view(version: i64, view: Option<View>) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{}\"", opaque(version, view))).expect("digits and quotes are a valid header")
}

/// Names a part of every record: a hash of its fields' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View(pub u32);

fn opaque(version: i64, view: Option<View>) -> String {
    view.map_or_else(|| version.to_string(), |View(hash)| format!("{version}-{hash:08x}"))
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

refuses!(
    Precondition => [InvalidHeader, VersionMismatch];
    ReadCondition => [InvalidHeader, VersionMismatch];
    NoPrecondition => [InvalidHeader];
);

impl<S: Sync> FromRequestParts<S> for Precondition {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match (if_match(&parts.headers)?, tags(&parts.headers, header::IF_NONE_MATCH)?) {
            (wanted, None) => Ok(wanted),
            (Self::None, Some(Tags::Any)) => Ok(Self::Absent),
            // That there is a user, and that there is none: nobody meets both.
            (_, Some(Tags::Any)) => Ok(Self::VersionIn(vec![])),
            (_, Some(Tags::These(_))) => {
                Err(invalid(&header::IF_NONE_MATCH, "a request that changes something takes only *"))
            }
        }
    }
}

fn if_match(headers: &HeaderMap) -> Result<Precondition, Problem> {
    Ok(match tags(headers, header::IF_MATCH)? {
        None => Precondition::None,
        Some(Tags::Any) => Precondition::Exists,
        // Strong comparison: a weak tag never matches.
        Some(Tags::These(tags)) => {
            Precondition::VersionIn(tags.iter().filter(|tag| !tag.weak).filter_map(Tag::version).collect())
        }
    })
}

/// `If-Match` and `If-None-Match` of a GET: what the client wants to meet, and what it holds already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadCondition {
    wanted: Precondition,
    held: Option<Tags>,
}

impl ReadCondition {
    /// Whether this version is what the client wants to meet.
    pub fn allows(&self, version: i64) -> bool {
        self.wanted.allows(Some(version))
    }

    /// Whether the client holds what it sees of this version. Weak comparison.
    pub fn holds(&self, version: i64, view: Option<View>) -> bool {
        match &self.held {
            None => false,
            Some(Tags::Any) => true,
            Some(Tags::These(tags)) => tags.iter().any(|tag| tag.opaque == opaque(version, view)),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ReadCondition {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Ok(Self { wanted: if_match(&parts.headers)?, held: tags(&parts.headers, header::IF_NONE_MATCH)? })
    }
}

/// A change that knows no condition in its headers: one put there by mistake must not be silently without effect.
pub struct NoPrecondition;

impl<S: Sync> FromRequestParts<S> for NoPrecondition {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match [header::IF_MATCH, header::IF_NONE_MATCH].iter().find(|name| parts.headers.contains_key(*name)) {
            Some(name) => Err(invalid(name, "this request takes no condition here")),
            None => Ok(Self),
        }
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
    /// The version, if this tag is one that we could have given, whatever its client sees.
    fn version(&self) -> Option<i64> {
        let (version, view) =
            self.opaque.split_once('-').map_or((&*self.opaque, None), |(version, view)| (version, Some(view)));
        let view = view.map(|view| u32::from_str_radix(view, 16).map(View)).transpose().ok()?;
        version.parse().ok().filter(|version| opaque(*version, view) == self.opaque)
    }
}

fn invalid(name: &HeaderName, reason: &str) -> Problem {
    Problem::new(Code::InvalidHeader, format!("{name}: {reason}"))
}

fn tags(headers: &HeaderMap, name: HeaderName) -> Result<Option<Tags>, Problem> {
    let expected = || invalid(&name, "expected * or a list of entity tags such as \"7\"");
    let mut tags = vec![];
    let mut present = false;
    for value in headers.get_all(&name) {
        present = true;
        let value = value.to_str().unwrap_or_default().trim();
        if value == "*" {
            return Ok(Some(Tags::Any));
        }
        tags.extend(parse(value).ok_or_else(expected)?);
    }
    if present && tags.is_empty() {
        return Err(expected());
    }
    Ok(present.then_some(Tags::These(tags)))
}

/// `#entity-tag`: any number, commas between them; a comma inside the quotes belongs to the tag. Elements that are empty are none (RFC 9110,
/// section 5.6.1.2).
fn parse(mut list: &str) -> Option<Vec<Tag>> {
    let mut tags = vec![];
    loop {
        list = list.trim_start_matches([',', ' ', '\t']);
        if list.is_empty() {
            return Some(tags);
        }
        let weak = list.starts_with("W/");
        let quoted = list.strip_prefix("W/").unwrap_or(list).strip_prefix('"')?;
        let (opaque, rest) = quoted.split_once('"')?;
        tags.push(Tag { weak, opaque: opaque.to_owned() });
        list = rest.trim_start();
        if !list.is_empty() && !list.starts_with(',') {
            return None;
        }
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
        assert_eq!(versions(",\"7\", ,,W/\"8\" ,"), Some(vec![Some(7), Some(8)]));
        for wrong in ["7", "\"7", "\"7\" \"8\"", "w/\"7\"", "\"7\", 8"] {
            assert_eq!(versions(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_a_client_sees_of_a_version_has_a_tag_of_its_own() {
        let [all, part, more] = [None, Some(View(0xa7)), Some(View(0x0123_4567))];
        assert_eq!(
            [all, part].map(|view| etag_of_view(7, view)),
            [etag(7), HeaderValue::from_static("\"7-000000a7\"")]
        );
        let held = Some(Tags::These(parse("\"7-000000a7\"").unwrap()));
        let held = ReadCondition { wanted: Precondition::None, held };
        assert!(held.holds(7, part) && !held.holds(7, more) && !held.holds(7, all) && !held.holds(8, part));
        // Of a change it is the version that counts, whoever saw it.
        assert_eq!(versions("\"7-000000a7\", \"7-A7\", \"7-000000A7\", \"7-\""), Some(vec![Some(7), None, None, None]));
    }
}
