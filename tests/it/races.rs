//! Races: many clients at once, over one instance and over two. No change is lost, none is told that did not happen.

use std::collections::HashSet;

use futures_util::future::{join, join_all};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings_sdk::envelope::{Event, Notice};
use uuid::Uuid;

use crate::house::{self, Answer, House, Service};

/// Everything that was told of a user, in order of version.
async fn notices(house: &House, user: &Uuid) -> Vec<Notice> {
    house.settle().await;
    let mut notices: Vec<Notice> = house.audit.heard().into_iter().filter(|notice| notice.user_id == *user).collect();
    notices.sort_by_key(|notice| notice.version);
    notices
}

fn versions(notices: &[Notice]) -> Vec<i64> {
    notices.iter().map(|notice| notice.version).collect()
}

/// The same question to another instance.
fn ask(service: &Service, method: Method, user: &Uuid) -> RequestBuilder {
    house::http().request(method, format!("{}/v1/users/{user}", service.url))
}

#[sqlx::test]
async fn a_hundred_amendments_of_one_user_at_once_all_happen(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "social": {} })).await;
    let amend = async |n: i32| house.amend(&ana, json!({ "social": { format!("k{n}"): n } })).await.ok();
    let answers = join_all((0..100).map(amend)).await;

    let answered: HashSet<i64> = answers.iter().map(Answer::version).collect();
    assert_eq!(answered, (2..=101).collect());
    for (n, answer) in answers.iter().enumerate() {
        assert_eq!(answer.body["profile"]["social"][format!("k{n}")], n, "each sees its own change");
    }
    let last = house.get(&ana).await;
    assert_eq!((last.version(), last.body["profile"]["social"].as_object().unwrap().len()), (101, 100));
    assert_eq!(versions(&notices(&house, &ana).await), (1..=101).collect::<Vec<_>>());
}

#[sqlx::test]
async fn a_hundred_amendments_over_two_instances_all_happen(db: PgPool) {
    let house = House::open(db).await;
    let other = house.another(&["serve"]).await;
    let ana = house.user(json!({ "social": {} })).await;
    let amend = async |n: i32| {
        let patch = json!({ "profile": { "social": { format!("k{n}"): n } } });
        let there = ask(&other, Method::PATCH, &ana).header("content-type", "application/merge-patch+json");
        let request =
            if n % 2 == 0 { there.body(patch.to_string()) } else { house.patch(&ana, patch["profile"].clone()) };
        Answer::to(request).await.ok()
    };
    join_all((0..100).map(amend)).await;
    let last = house.get(&ana).await;
    assert_eq!((last.version(), last.body["profile"]["social"].as_object().unwrap().len()), (101, 100));
    assert_eq!(Answer::to(ask(&other, Method::GET, &ana)).await.body, last.body);
    assert_eq!(versions(&notices(&house, &ana).await), (1..=101).collect::<Vec<_>>());
}

#[sqlx::test]
async fn of_two_who_saw_the_same_version_one_wins(db: PgPool) {
    let house = House::open(db).await;
    for _ in 0..20 {
        let ana = house.user(json!({})).await;
        let amend =
            async |city: &str| Answer::to(house.patch(&ana, json!({ "city": city })).header("if-match", "\"1\"")).await;
        let (riga, oslo) = join(amend("Riga"), amend("Oslo")).await;
        let (winner, loser) = if riga.status == 200 { (riga, oslo) } else { (oslo, riga) };
        assert_eq!((loser.refusal(412), loser.version()), ("version_mismatch", 2));
        assert_eq!(house.get(&ana).await.body, winner.ok().body);
    }
}

#[sqlx::test]
async fn two_who_create_the_same_user_at_once_create_one(db: PgPool) {
    let house = House::open(db).await;
    let other = house.another(&["serve"]).await;
    for round in 0..20 {
        let ana = Uuid::new_v4();
        let profile = json!({ "profile": { "city": "Oslo" } });
        // In every second round through two instances.
        let second = if round % 2 == 0 {
            ask(&other, Method::PUT, &ana)
        } else {
            house.request(Method::PUT, &format!("/v1/users/{ana}"))
        };
        let (first, second) = join(house.put(&ana, json!({ "city": "Riga" })), Answer::to(second.json(&profile))).await;
        let mut statuses = [first.status.as_u16(), second.status.as_u16()];
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 201], "{first:?} {second:?}");
        let told = notices(&house, &ana).await;
        assert_eq!(versions(&told), [1, 2]);
        assert_eq!(told[0].event, Event::Created);
    }
}

#[sqlx::test]
async fn whoever_only_creates_meets_nobody_or_is_refused(db: PgPool) {
    let house = House::open(db).await;
    for _ in 0..10 {
        let ana = Uuid::new_v4();
        let path = format!("/v1/users/{ana}");
        let create = async |city: &str| {
            let request = house.request(Method::PUT, &path).header("if-none-match", "*");
            Answer::to(request.json(&json!({ "profile": { "city": city } }))).await
        };
        let answers = join_all(["Riga", "Oslo", "Bern", "Rome"].map(create)).await;
        let (created, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 201);
        assert_eq!(created.len(), 1);
        assert!(refused.iter().all(|answer| answer.refusal(412) == "version_mismatch"));
        assert_eq!(house.get(&ana).await.body, created[0].body);
    }
}

#[sqlx::test]
async fn two_hundred_users_are_created_and_amended_at_once(db: PgPool) {
    let house = House::open(db).await;
    let users = join_all((0..200).map(async |n| {
        let id = house.user(json!({ "city": format!("{n}") })).await;
        house.amend(&id, json!({ "nickname": format!("{n}") })).await.ok();
        id
    }))
    .await;
    house.settle().await;
    for (n, id) in users.iter().enumerate() {
        let user = house.get(id).await;
        assert_eq!(user.body["profile"], json!({ "city": n.to_string(), "nickname": n.to_string() }));
    }
    let told: HashSet<(Uuid, i64)> =
        house.audit.heard().iter().map(|notice| (notice.user_id, notice.version)).collect();
    assert_eq!(told, users.iter().flat_map(|id| [(*id, 1), (*id, 2)]).collect());
}

/// A deletion that was answered is final, whoever writes at the same time and through whichever instance.
#[sqlx::test]
async fn a_create_that_races_a_delete_never_resurrects(db: PgPool) {
    let house = House::open(db).await;
    let other = house.another(&["serve"]).await;
    let profile = |city: &str| json!({ "profile": { "city": city } });
    let mut deletions = 0;
    for round in 0..30 {
        let ana = Uuid::new_v4();
        if round % 2 == 0 {
            house.put(&ana, json!({})).await.ok();
        }
        let (first, deleted, second) = tokio::join!(
            house.put(&ana, json!({ "city": "Riga" })),
            Answer::to(ask(&other, Method::DELETE, &ana)),
            Answer::to(ask(&other, Method::PUT, &ana).json(&profile("Oslo"))),
        );
        let events: Vec<Event> = notices(&house, &ana).await.into_iter().map(|notice| notice.event).collect();
        let count = |wanted: &Event| events.iter().filter(|event| *event == wanted).count();
        assert_eq!((count(&Event::Created), events.first()), (1, Some(&Event::Created)), "{first:?} {second:?}");
        if deleted.status == 204 {
            deletions += 1;
            assert_eq!((count(&Event::Deleted), events.last()), (1, Some(&Event::Deleted)));
            assert_eq!(house.get(&ana).await.refusal(410), "user_deleted");
            assert_eq!(house.put(&ana, json!({})).await.refusal(410), "user_deleted");
            assert_eq!(
                Answer::to(ask(&other, Method::PUT, &ana).json(&profile("Bern"))).await.refusal(410),
                "user_deleted"
            );
        } else {
            assert_eq!(deleted.refusal(404), "user_not_found");
            assert_eq!((count(&Event::Deleted), house.get(&ana).await.status.as_u16()), (0, 200));
        }
    }
    assert!(deletions >= 15, "{deletions}: too few rounds had anything to delete");
}

/// Every verb at once on a few users: what is kept and what was told agree, version by version.
#[sqlx::test]
async fn what_is_kept_and_what_is_told_agree_after_a_turmoil(db: PgPool) {
    let house = House::open(db).await;
    let other = house.another(&["serve"]).await;
    let users: Vec<Uuid> = (0..5).map(|_| Uuid::new_v4()).collect();
    let act = async |n: usize| {
        let ana = &users[n % users.len()];
        let profile: Value = json!({ "profile": { "city": (n % 7).to_string() } });
        match n % 4 {
            0 => drop(Answer::to(ask(&other, Method::PUT, ana).json(&profile)).await),
            1 => drop(house.amend(ana, profile["profile"].clone()).await),
            2 => drop(house.put(ana, json!({ "nickname": n.to_string() })).await),
            // One deletion for each of the later users.
            _ if n >= 240 => drop(house.delete(ana).await),
            _ => drop(house.get(ana).await),
        }
    };
    join_all((0..260).map(act)).await;
    for ana in &users {
        let last = house.get(ana).await;
        assert_eq!(versions(&notices(&house, ana).await), (1..=last.version()).collect::<Vec<_>>(), "{last:?}");
    }
}
