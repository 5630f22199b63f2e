//! The face of the feed: `/v1/changes` and `/v1/digest`.

use axum::{
    Json,
    extract::{FromRequestParts, Path},
    http::request::Parts,
};
use serde::{Deserialize, Serialize};
use tidings_sdk::digest::{self, Digest, MAX_BUCKETS};
use utoipa::{
    IntoParams,
    openapi::{ObjectBuilder, RefOr, Schema, schema::Type},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Change, Entry, Error, Feed, Sum, cursor::Cursor};
use crate::{
    clients::{Allowed, Guarded, ReadUsers},
    web::{self, Code, Params, Place, Problem, Refusals, cursor, invalid_cursor, page_limit, read_cursor, refuses},
};

pub fn routes() -> OpenApiRouter<Guarded<Feed>> {
    OpenApiRouter::new().routes(routes!(changes)).routes(routes!(compare)).routes(routes!(list_bucket))
}

/// The verbs' errors.
struct Reading;
struct Expiring;
struct Digesting;

refuses!(
    Number => [InvalidBucket];
    Reading => [DatabaseUnavailable];
    Expiring => [CursorExpired];
    Digesting => [Overloaded];
);

/// The users that changed since a cursor, each with its latest version, deletions included.
///
/// Without a cursor: all users there ever were. Keep `next`, and come back with it for what changes later. A page may lag behind a
/// transaction that is still open, and never skips it.
#[utoipa::path(get, path = "/v1/changes", tag = "reconciling", operation_id = "listChanges", security(("key" = ["users:read"])), params(PageAfter),
    responses(
        (status = 200, description = "A page of changes", body = Changes),
        Refusals<(ReadUsers, Params<PageAfter>, web::Cursor, Reading, Expiring)>,
    ))]
async fn changes(
    Allowed { caller, desk: feed, .. }: Allowed<ReadUsers, Feed>,
    Params(page): Params<PageAfter>,
    place: Place,
) -> Result<Json<Changes>, Problem> {
    let limit = page_limit(page.limit, DEFAULT_PAGE, MAX_PAGE)?;
    let after = page.after.map(|text| Cursor::from_text(&text).ok_or_else(invalid_cursor)).transpose()?;
    place.turn(&caller.client).await?;
    let page = place.to_the_end(async move { feed.changes(after, limit).await }).await??;
    let (next, held_back) = (page.next.to_text(), page.is_held_back);
    Ok(Json(Changes { changes: page.changes, next, more: page.more, held_back }))
}

/// What the living users come to, bucket by bucket.
///
/// An entry's hash is the first 8 bytes of SHA-256 over the 16 bytes of the user's id and its version as 8 bytes, big endian; a
/// bucket's hash is the XOR of its entries. A user's bucket is the top bits of the first 2 bytes of SHA-256 over the 16 bytes of the id.
/// Changes go on meanwhile: a difference is a question, not yet a fault. An instance works at one digest at a time, and clients take
/// turns: of one client nine may be under way. All users in one answer take a second for some hundred thousand, and an answer has 30:
/// beyond a million ask page by page, with a `limit`, and add the pages up, counts by addition and hashes by XOR.
#[utoipa::path(get, path = "/v1/digest", tag = "reconciling", operation_id = "digest", security(("key" = ["users:read"])), params(Spread),
    responses((status = 200, description = "Count and hash of each bucket that has users", body = Digests), Refusals<(ReadUsers, Params<Spread>, web::Cursor, Reading, Digesting)>))]
async fn compare(
    Allowed { caller, desk: feed, .. }: Allowed<ReadUsers, Feed>,
    Params(spread): Params<Spread>,
) -> Result<Json<Digests>, Problem> {
    let buckets = buckets(spread.buckets)?;
    let limit =
        spread.limit.map_or(Ok(usize::MAX), |asked| page_limit(Some(asked), MAX_DIGEST_PAGE, MAX_DIGEST_PAGE))?;
    let after = spread.after.as_deref().map(read_cursor).transpose()?;
    let Sum { digests, next } = feed.digest(&caller.client, buckets, after, limit).await?;
    let digests: Vec<BucketDigest> = digests.into_iter().map(BucketDigest::from).collect();
    let count = digests.iter().map(|digest| digest.count).sum();
    Ok(Json(Digests { buckets, count, digests, next: next.map(cursor) }))
}

/// The living users of one bucket, with their versions.
#[utoipa::path(get, path = "/v1/digest/{bucket}", tag = "reconciling", operation_id = "listBucket", security(("key" = ["users:read"])),
    params(("bucket" = u32, Path, description = "The bucket", minimum = 0, maximum = 65535, example = 4), BucketAfter),
    responses((status = 200, description = "A page of the bucket's users", body = Bucket), Refusals<(ReadUsers, Number, Params<BucketAfter>, web::Cursor, Reading)>))]
async fn list_bucket(
    Allowed { caller, desk: feed, .. }: Allowed<ReadUsers, Feed>,
    Number(bucket): Number,
    Params(page): Params<BucketAfter>,
    place: Place,
) -> Result<Json<Bucket>, Problem> {
    let buckets = buckets(page.buckets)?;
    if bucket >= buckets {
        return Err(invalid_bucket());
    }
    let limit = page_limit(page.limit, MAX_BUCKET_PAGE, MAX_BUCKET_PAGE)?;
    let after = page.after.as_deref().map(read_cursor).transpose()?;
    if after.is_some_and(|id| digest::bucket(id, buckets) != bucket) {
        return Err(invalid_cursor());
    }
    place.turn(&caller.client).await?;
    // One more than asked for tells whether there is a next page.
    let read = async move { feed.bucket(bucket, buckets, after, limit as i64 + 1).await };
    let mut users = place.to_the_end(read).await??;
    let is_last = users.len() <= limit;
    users.truncate(limit);
    let next = users.last().filter(|_| !is_last).map(|user| cursor(user.id));
    Ok(Json(Bucket { users, next }))
}

const DEFAULT_PAGE: usize = 500;
const MAX_PAGE: usize = 1_000;
const MAX_BUCKET_PAGE: usize = 10_000;
const MAX_DIGEST_PAGE: usize = 1_000_000;
const DEFAULT_BUCKETS: u32 = 256;

fn buckets(asked: Option<u32>) -> Result<u32, Problem> {
    match asked.unwrap_or(DEFAULT_BUCKETS) {
        buckets if buckets.is_power_of_two() && buckets <= MAX_BUCKETS => Ok(buckets),
        _ => Err(Problem::new(Code::InvalidQuery, format!("buckets is a power of two from 1 to {MAX_BUCKETS}"))),
    }
}

fn invalid_bucket() -> Problem {
    Code::InvalidBucket.into()
}

/// A bucket's number in the path.
struct Number(u32);

impl<S: Send + Sync> FromRequestParts<S> for Number {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        Path::from_request_parts(parts, state).await.map(|Path(number)| Self(number)).map_err(|_| invalid_bucket())
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PageAfter {
    /// Changes in a page.
    #[param(minimum = 1, maximum = 1000, default = 500, required = false)]
    limit: Option<usize>,
    /// `next` of an earlier page; none for a full pass.
    #[param(required = false)]
    after: Option<String>,
}

/// How many buckets there may be, for the document.
struct PowerOfTwo;

impl utoipa::PartialSchema for PowerOfTwo {
    fn schema() -> RefOr<Schema> {
        let powers = (0..=MAX_BUCKETS.ilog2()).map(|power| 1_u32 << power);
        let number = ObjectBuilder::new().schema_type(Type::Integer).enum_values(Some(powers));
        number.default(Some(DEFAULT_BUCKETS.into())).into()
    }
}

impl utoipa::ToSchema for PowerOfTwo {}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Spread {
    /// Among how many buckets to spread the users: a power of two.
    #[param(inline, value_type = PowerOfTwo, required = false)]
    buckets: Option<u32>,
    /// Users in a page; without it all of them.
    #[param(minimum = 1, maximum = 1000000, required = false)]
    limit: Option<usize>,
    /// `next` of the page before.
    #[param(required = false)]
    after: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct BucketAfter {
    /// Among how many buckets the users are spread: a power of two.
    #[param(inline, value_type = PowerOfTwo, required = false)]
    buckets: Option<u32>,
    /// Users in a page.
    #[param(minimum = 1, maximum = 10000, default = 10000, required = false)]
    limit: Option<usize>,
    /// `next` of the page before.
    #[param(required = false)]
    after: Option<String>,
}

/// A page of changes.
#[derive(Serialize, utoipa::ToSchema)]
struct Changes {
    changes: Vec<Change>,
    /// For what comes after; always there. Keep it, and poll with it later.
    next: String,
    /// Whether another page is there now.
    more: bool,
    /// Whether committed changes wait for a transaction that is still open, and come on a later page. Where `more` and this are false,
    /// everything that was committed when it was asked for has been shown.
    held_back: bool,
}

/// What the living users come to.
#[derive(Serialize, utoipa::ToSchema)]
struct Digests {
    /// Among how many buckets the users are spread.
    #[schema(example = 256)]
    buckets: u32,
    /// Users in all of them, on this page.
    #[schema(example = 1)]
    count: u64,
    /// In order of the bucket; those without users are left out.
    digests: Vec<BucketDigest>,
    /// For the page after this one; null on the last page.
    #[schema(required = true)]
    next: Option<String>,
}

#[derive(Serialize, utoipa::ToSchema)]
struct BucketDigest {
    #[schema(example = 4)]
    bucket: u32,
    #[schema(minimum = 1, example = 1)]
    count: u64,
    /// 16 hex digits.
    #[schema(example = "aa665fab35e92c5f")]
    hash: String,
}

impl From<(u32, Digest)> for BucketDigest {
    fn from((bucket, Digest { count, hash }): (u32, Digest)) -> Self {
        Self { bucket, count, hash: format!("{hash:016x}") }
    }
}

/// A page of a bucket.
#[derive(Serialize, utoipa::ToSchema)]
struct Bucket {
    users: Vec<Entry>,
    /// For the page after this one; null on the last page.
    #[schema(required = true)]
    next: Option<String>,
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match error {
            Error::Expired => Code::CursorExpired.into(),
            Error::Overloaded => Self::new(Code::Overloaded, "too many digests of this client are under way"),
            Error::Query(trouble) => {
                tracing::warn!("a query failed: {}", trouble.report());
                Code::DatabaseUnavailable.into()
            }
        }
    }
}
