//! The digest: numbers that tell whether two sides hold the same, and where they do not.

use std::{cell::Cell, collections::BTreeMap};

use futures_util::future::{join, join_all};
use reqwest::Client;
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings::clients::{NewClient, Scope};
use tidings_sdk::digest::{self, Digest};
use uuid::Uuid;

use crate::house::{Answer, House, http, http_with, new_client, owner_at};

/// Living users with ids and versions of all kinds, and some tombstones among them.
async fn populate(db: &PgPool, count: i32) -> BTreeMap<Uuid, i64> {
    let living = "
        insert into users (id, version, profile, created_at, updated_at)
        select gen_random_uuid(), 1 + (random() * 9007199254740990)::bigint, '{}', now(), now() from generate_series(1, $1)
        returning id, version
    ";
    let deleted = "
        insert into users (id, version, deleted_at)
        select gen_random_uuid(), 2, now() from generate_series(1, 100)
    ";
    sqlx::query(deleted).execute(db).await.unwrap();
    sqlx::query_as(living).bind(count).fetch_all(db).await.unwrap().into_iter().collect()
}

/// What the living come to by the published definition, as Postgres computes it.
async fn computed(db: &PgPool, buckets: u32) -> BTreeMap<u32, Digest> {
    let sql = "
        select ((get_byte(sha256(uuid_send(id)), 0) << 8) | get_byte(sha256(uuid_send(id)), 1)) / $1 as bucket,
               count(*),
               bit_xor(('x' || encode(substr(sha256(uuid_send(id) || int8send(version)), 1, 8), 'hex'))::bit(64)::bigint)
          from users
         where deleted_at is null
         group by bucket
    ";
    let width = (digest::MAX_BUCKETS / buckets).cast_signed();
    let rows: Vec<(i32, i64, i64)> = sqlx::query_as(sql).bind(width).fetch_all(db).await.unwrap();
    let digest = |(bucket, count, hash): (i32, i64, i64)| {
        (bucket.cast_unsigned(), Digest { count: count.cast_unsigned(), hash: hash.cast_unsigned() })
    };
    rows.into_iter().map(digest).collect()
}

/// An answer with all of them.
fn whole(digests: &BTreeMap<u32, Digest>, buckets: u32) -> Value {
    let count: u64 = digests.values().map(|digest| digest.count).sum();
    let digest = |(bucket, digest): (&u32, &Digest)| json!({ "bucket": bucket, "count": digest.count, "hash": format!("{:016x}", digest.hash) });
    let digests: Vec<Value> = digests.iter().map(digest).collect();
    json!({ "buckets": buckets, "count": count, "digests": digests, "next": null })
}

async fn answered(house: &House, buckets: u32) -> Value {
    house.page(&format!("/v1/digest?buckets={buckets}")).await.ok().body
}

/// The users of a bucket, page after page.
async fn listed(house: &House, bucket: u32, buckets: u32, limit: usize) -> BTreeMap<Uuid, i64> {
    let mut users = BTreeMap::new();
    let mut after = String::new();
    loop {
        let page = house.page(&format!("/v1/digest/{bucket}?buckets={buckets}&limit={limit}{after}")).await.ok();
        for user in page.body["users"].as_array().unwrap() {
            let (id, version) = (user["id"].as_str().unwrap().parse().unwrap(), user["version"].as_i64().unwrap());
            assert_eq!(users.insert(id, version), None, "{id} twice");
        }
        let Some(next) = page.body["next"].as_str() else { return users };
        assert_eq!(page.body["users"].as_array().unwrap().len(), limit, "a page that is not the last is full");
        after = format!("&after={next}");
    }
}

#[sqlx::test]
async fn the_service_and_its_consumers_compute_the_same(db: PgPool) {
    let house = House::open(db).await;
    // More than one statement looks at, and more than the SDK asks for at once, so that the parts have to fit together.
    populate(&house.db, 100_100).await;
    let owner = owner_at(&house.service.url);
    for buckets in [1, 2, 256, 65_536] {
        let expected = computed(&house.db, buckets).await;
        // Not assert_eq: a failure would print it all.
        assert!(answered(&house, buckets).await == whole(&expected, buckets), "{buckets} buckets");
        assert!(owner.digest(buckets).await.unwrap() == expected, "{buckets} buckets, in the SDK");
    }
    let usual = house.page("/v1/digest").await.ok().body;
    assert_eq!((&usual["buckets"], &usual["count"]), (&json!(256), &json!(100_100)));
}

#[sqlx::test]
async fn pages_of_a_digest_add_up(db: PgPool) {
    let house = House::open(db).await;
    populate(&house.db, 5_000).await;
    let expected = computed(&house.db, 16).await;
    // Smaller and larger than what one statement looks at; and one that ends where the users do.
    for (limit, counts) in
        [(1_900, vec![1_900, 1_900, 1_200]), (2_500, vec![2_500; 2]), (4_999, vec![4_999, 1]), (5_000, vec![5_000])]
    {
        let (mut sum, mut pages, mut after) = (BTreeMap::<u32, Digest>::new(), vec![], String::new());
        loop {
            let page = house.page(&format!("/v1/digest?buckets=16&limit={limit}{after}")).await.ok().body;
            pages.push(page["count"].as_u64().unwrap());
            for part in page["digests"].as_array().unwrap() {
                let hash = u64::from_str_radix(part["hash"].as_str().unwrap(), 16).unwrap();
                let count = part["count"].as_u64().unwrap();
                sum.entry(part["bucket"].as_u64().unwrap() as u32).or_default().merge(Digest { count, hash });
            }
            let Some(next) = page["next"].as_str() else { break };
            after = format!("&after={next}");
        }
        assert_eq!(pages, counts, "{limit}");
        assert_eq!(sum, expected, "{limit}");
    }
}

#[sqlx::test]
async fn nobody_comes_to_nothing(db: PgPool) {
    let house = House::open(db).await;
    assert_eq!(answered(&house, 256).await, json!({ "buckets": 256, "count": 0, "digests": [], "next": null }));
    assert_eq!(house.page("/v1/digest/255").await.ok().body, json!({ "users": [], "next": null }));
}

#[sqlx::test]
async fn buckets_list_every_living_user_once(db: PgPool) {
    let house = House::open(db).await;
    let users = populate(&house.db, 300).await;
    let mut all = BTreeMap::new();
    for bucket in 0..8 {
        let found = listed(&house, bucket, 8, 7).await;
        assert!(found.keys().all(|id| digest::bucket(*id, 8) == bucket), "{bucket}");
        all.extend(found);
    }
    assert_eq!(all, users);
    assert_eq!(listed(&house, 0, 1, 1_000).await, users, "a single page, a single bucket");
}

#[sqlx::test]
async fn one_version_that_is_wrong_is_found(db: PgPool) {
    let house = House::open(db).await;
    let mut users = populate(&house.db, 500).await;
    let before = answered(&house, 64).await;
    let wrong = *users.keys().nth(123).unwrap();
    *users.get_mut(&wrong).unwrap() += 1;
    sqlx::query("update users set version = version + 1 where id = $1").bind(wrong).execute(&house.db).await.unwrap();
    let after = answered(&house, 64).await;
    let different: Vec<&Value> = before["digests"]
        .as_array()
        .unwrap()
        .iter()
        .zip(after["digests"].as_array().unwrap())
        .filter_map(|(before, after)| (before != after).then_some(&after["bucket"]))
        .collect();
    let bucket = digest::bucket(wrong, 64);
    assert_eq!(different, [&json!(bucket)]);
    let listed = listed(&house, bucket, 64, 1_000).await;
    assert_eq!(listed[&wrong], users[&wrong]);
    assert_eq!(listed, users.into_iter().filter(|(id, _)| digest::bucket(*id, 64) == bucket).collect());
}

#[sqlx::test]
async fn who_asks_for_many_digests_keeps_nobody_else_from_one(db: PgPool) {
    let house = House::open(db).await;
    let mirror = new_client(&house.db, NewClient::named("mirror", [Scope::ReadUsers]).unwrap()).await;
    // Several chunks.
    populate(&house.db, 5_000).await;
    let ask = async |http: &Client| Answer::to(http.get(format!("{}/v1/digest", house.service.url))).await;
    let (over, refused) = (Cell::new(false), Cell::new(0));
    let insist = async |_| {
        let http = http();
        while !over.get() {
            let answer = ask(&http).await;
            if answer.status != 200 {
                assert_eq!(answer.refusal(503), "overloaded");
                assert_eq!(answer.headers["retry-after"], "1");
                refused.set(refused.get() + 1);
            }
        }
    };
    let compare = async {
        let http = http_with(&mirror);
        for _ in 0..5 {
            ask(&http).await.ok();
        }
        over.set(true);
    };
    // One whose turn it is, eight that wait, and three for whom there is no room in the line.
    join(join_all((0..12).map(insist)), compare).await;
    assert!(refused.get() > 0, "the line has no end");
}

#[sqlx::test]
async fn a_digest_that_makes_no_sense_is_refused(db: PgPool) {
    let house = House::open(db).await;
    populate(&house.db, 20).await;
    let of_another_bucket = {
        let page = house.page("/v1/digest/0?buckets=1&limit=19").await.ok();
        let last: Uuid = page.body["users"][18]["id"].as_str().unwrap().parse().unwrap();
        let other = 1 - digest::bucket(last, 2);
        format!("/v1/digest/{other}?buckets=2&after={}", page.body["next"].as_str().unwrap())
    };
    let table = [
        ("/v1/digest?buckets=0", "invalid_query"),
        ("/v1/digest?buckets=3", "invalid_query"),
        ("/v1/digest?buckets=131072", "invalid_query"),
        ("/v1/digest?buckets=-1", "invalid_query"),
        ("/v1/digest?bucket=1", "invalid_query"),
        ("/v1/digest?limit=0", "invalid_query"),
        ("/v1/digest?limit=1000001", "invalid_query"),
        ("/v1/digest?after=!", "invalid_cursor"),
        ("/v1/digest/0?buckets=3", "invalid_query"),
        ("/v1/digest/0?limit=0", "invalid_query"),
        ("/v1/digest/0?limit=10001", "invalid_query"),
        ("/v1/digest/256", "invalid_bucket"),
        ("/v1/digest/16?buckets=16", "invalid_bucket"),
        ("/v1/digest/-1", "invalid_bucket"),
        ("/v1/digest/first", "invalid_bucket"),
        ("/v1/digest/%ff", "invalid_bucket"),
        ("/v1/digest/0?after=!", "invalid_cursor"),
        (&of_another_bucket, "invalid_cursor"),
    ];
    for (path, code) in table {
        assert_eq!(house.page(path).await.refusal(400), code, "{path}");
    }
}

/// The example that is published for those who write it in another language.
#[test]
fn the_published_example_is_right() {
    let page = include_str!("../../docs/consuming/reconciling.md");
    let ana: Uuid = "0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a".parse().unwrap();
    let ben: Uuid = "00000000-0000-4000-8000-000000000001".parse().unwrap();
    let mut both = Digest::default();
    for (id, version) in [(ana, 7), (ben, 1)] {
        let row = format!(
            "| `{id}` | {version} | `{:016x}` | {} | {} |",
            digest::entry_hash(id, version),
            digest::bucket(id, digest::MAX_BUCKETS),
            digest::bucket(id, 256)
        );
        assert!(page.contains(&row), "{row}");
        both.add(id, version);
    }
    let hash = format!("`{:016x}`", both.hash);
    assert!(page.contains(&hash), "{hash}");
}
