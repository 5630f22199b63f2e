//! Load, and the oracle that knows what should have been told.
//!
//! The truth does not come from the service: a trigger that only tests have notes every version that was committed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::Client;
use serde_json::json;
use sqlx::PgPool;
use tokio::{task::JoinHandle, time::sleep};
use uuid::Uuid;

use crate::house::{self, Answer, House, eventually};

/// A version of a user.
pub type Change = (Uuid, i64);

/// What was to be written by changes that were answered as not made.
#[derive(Clone, Default)]
pub struct Refused(Arc<Mutex<Vec<Uuid>>>);

impl Refused {
    pub fn all(&self) -> Vec<Uuid> {
        self.0.lock().unwrap().clone()
    }
}

/// The longest that a request took.
#[derive(Clone, Default)]
pub struct Slowest(Arc<Mutex<Duration>>);

impl Slowest {
    pub fn so_far(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    fn took(&self, time: Duration) {
        let mut slowest = self.0.lock().unwrap();
        *slowest = time.max(*slowest);
    }
}

/// Clients that amend users, each one change after the other.
pub struct Load {
    answered: Arc<Mutex<Vec<Change>>>,
    refused: Refused,
    failed: Arc<AtomicUsize>,
    slowest: Slowest,
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn on(house: &House, users: &[Uuid], clients: usize) -> Self {
        Self::at(&house.service.url, users, clients)
    }

    /// On the instance that listens there.
    pub fn at(url: &str, users: &[Uuid], clients: usize) -> Self {
        let http = house::http();
        let (answered, failed, over) = (Arc::default(), Arc::default(), Arc::default());
        let (refused, slowest) = (Refused::default(), Slowest::default());
        let clients = (0..clients)
            .map(|place| {
                let client = Amending {
                    http: http.clone(),
                    url: url.to_owned(),
                    users: users.to_vec(),
                    answered: Arc::clone(&answered),
                    refused: refused.clone(),
                    failed: Arc::clone(&failed),
                    slowest: slowest.clone(),
                    over: Arc::clone(&over),
                };
                tokio::spawn(client.run(place))
            })
            .collect();
        Self { answered, refused, failed, slowest, over, clients }
    }

    /// Waits until this many more changes were answered.
    pub async fn goes_on(&self, more: usize) {
        let goal = self.count() + more;
        eventually("changes to be answered", async || if self.count() >= goal { Ok(()) } else { Err(self.count()) })
            .await;
    }

    fn count(&self) -> usize {
        self.answered.lock().unwrap().len()
    }

    pub fn refused(&self) -> Refused {
        self.refused.clone()
    }

    pub fn slowest(&self) -> Slowest {
        self.slowest.clone()
    }

    /// Ends the load, of which every request must have been answered 2xx; the changes.
    pub async fn end_well(self) -> Vec<Change> {
        let failed = self.failed.clone();
        let answered = self.end().await;
        assert_eq!(failed.load(Ordering::Relaxed), 0, "requests that failed");
        answered
    }

    /// Ends the load; the changes that were answered 2xx.
    pub async fn end(self) -> Vec<Change> {
        self.over.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
        std::mem::take(&mut self.answered.lock().unwrap())
    }
}

struct Amending {
    http: Client,
    url: String,
    users: Vec<Uuid>,
    answered: Arc<Mutex<Vec<Change>>>,
    refused: Refused,
    failed: Arc<AtomicUsize>,
    slowest: Slowest,
    over: Arc<AtomicBool>,
}

impl Amending {
    async fn run(self, place: usize) {
        let mut turn = place;
        while !self.over.load(Ordering::Relaxed) {
            let user = self.users[turn % self.users.len()];
            turn += 1;
            let began = Instant::now();
            let version = self.amend(user).await;
            self.slowest.took(began.elapsed());
            match version {
                Some(version) => self.answered.lock().unwrap().push((user, version)),
                // Nobody is there to answer: do not knock without a pause.
                None => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    /// The new version; `None` when there is none, or it is unknown whether there is one.
    async fn amend(&self, user: Uuid) -> Option<i64> {
        let job_title = Uuid::new_v4();
        let request = self
            .http
            .patch(format!("{}/v1/users/{user}", self.url))
            .header("content-type", "application/merge-patch+json")
            .body(json!({ "profile": { "job_title": job_title } }).to_string());
        let response = request.send().await.ok()?;
        let is_made = response.status().is_success();
        let body: serde_json::Value = response.json().await.ok()?;
        if is_made {
            return body["version"].as_i64();
        }
        if body["code"].as_str()? != "outcome_unknown" {
            self.refused.0.lock().unwrap().push(job_title);
        }
        None
    }
}

/// `count` new users.
pub async fn users(house: &House, count: usize) -> Vec<Uuid> {
    let mut users = Vec::with_capacity(count);
    for number in 0..count {
        users.push(house.user(json!({ "first_name": format!("Ana {number}") })).await);
    }
    users
}

/// Has every version noted that is committed from now on, by the transaction that commits it.
pub async fn watch(db: &PgPool) {
    let trigger = "
        create table shadow (user_id uuid not null, version bigint not null, job_title text, primary key (user_id, version));
        create function note() returns trigger language plpgsql security definer as $$
        begin
          insert into shadow
          select new.id, generate_series(case when tg_op = 'UPDATE' then old.version else 0 end + 1, new.version),
                 new.profile ->> 'job_title';
          return null;
        end $$;
        create trigger note after insert or update on users for each row execute function note();
    ";
    sqlx::raw_sql(trigger).execute(db).await.unwrap();
}

/// Asserts that exactly what was committed was told, and that what was answered was committed. Gives the number of duplicates.
pub async fn all_told(house: &House, answered: &[Change]) -> usize {
    house.settle().await;
    // The last statement of a service that was killed may commit after the outbox was looked at.
    eventually("what was told to be what was committed", async || {
        let (committed, told) = (committed(&house.db).await, told(house));
        let lost: Vec<Change> = committed.difference(&told).copied().collect();
        let made_up: Vec<Change> = told.difference(&committed).copied().collect();
        if lost.is_empty() && made_up.is_empty() { Ok(()) } else { Err(format!("lost {lost:?}, made up {made_up:?}")) }
    })
    .await;
    let committed = committed(&house.db).await;
    let forgotten: Vec<&Change> = answered.iter().filter(|change| !committed.contains(change)).collect();
    assert!(forgotten.is_empty(), "answered and not kept: {forgotten:?}");
    assert_eq!(told_per_user(house), versions(&house.db).await, "a user's version is the number of his told events");
    let heard = house.audit.heard();
    let ids: BTreeSet<Uuid> = heard.iter().map(|notice| notice.message_id).collect();
    assert_eq!(ids.len(), told(house).len(), "a change has one message_id, whenever it is sent");
    heard.len() - ids.len()
}

/// Asserts that no change that was answered as not made was made.
pub async fn none_made(db: &PgPool, refused: &[Uuid]) {
    let made = "select job_title from shadow where job_title = any($1)";
    let refused: Vec<String> = refused.iter().map(Uuid::to_string).collect();
    let made: Vec<String> = sqlx::query_scalar(made).bind(refused).fetch_all(db).await.unwrap();
    assert!(made.is_empty(), "refused, and made: {made:?}");
}

pub async fn committed(db: &PgPool) -> BTreeSet<Change> {
    sqlx::query_as("select user_id, version from shadow").fetch_all(db).await.unwrap().into_iter().collect()
}

pub fn told(house: &House) -> BTreeSet<Change> {
    house.audit.heard().iter().map(|notice| (notice.user_id, notice.version)).collect()
}

fn told_per_user(house: &House) -> BTreeMap<Uuid, i64> {
    told(house).into_iter().fold(BTreeMap::new(), |mut counts, (user, _)| {
        *counts.entry(user).or_default() += 1;
        counts
    })
}

pub async fn versions(db: &PgPool) -> BTreeMap<Uuid, i64> {
    sqlx::query_as("select id, version from users").fetch_all(db).await.unwrap().into_iter().collect()
}

/// Waits until at least this many messages were heard.
pub async fn heard(house: &House, messages: usize) {
    eventually("messages to be heard", async || {
        let heard = house.audit.heard().len();
        if heard >= messages { Ok(()) } else { Err(heard) }
    })
    .await;
}

/// The message_ids of what was heard, in order.
pub fn heard_ids(house: &House) -> Vec<Uuid> {
    house.audit.heard().iter().map(|notice| notice.message_id).collect()
}

/// Puts events into the outbox that no request made: created, updated and deleted in turn. Their message_ids, in order.
pub async fn backlog(db: &PgPool, events: i32) -> Vec<Uuid> {
    let filled = "
        with filled as (
          insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
          select gen_random_uuid(), (array['user.created', 'profile.updated', 'user.deleted'])[(place - 1) % 3 + 1],
                 gen_random_uuid(), (place - 1) % 3 + 1,
                 case (place - 1) % 3 when 1 then '[\"job_title\"]' else '[]' end::jsonb,
                 '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
            from generate_series(1, $1) as place
           order by place
          returning id, message_id
        )
        select message_id from filled order by id
    ";
    sqlx::query_scalar(filled).bind(events).fetch_all(db).await.unwrap()
}

/// Many changes of every user at once: as many further versions, each with its event, the last of them kept.
pub async fn many_versions(db: &PgPool, versions: i64) {
    let change = "
        with told as (
          insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
          select gen_random_uuid(), 'profile.updated', id, version + further, '[\"job_title\"]', ''
            from users, generate_series(1, $1) as further
           where deleted_at is null
           order by further, id
        )
        update users
           set version = version + $1,
               profile = (profile::jsonb || jsonb_build_object('job_title', 'number ' || version + $1))::json
         where deleted_at is null
    ";
    sqlx::query(change).bind(versions).execute(db).await.unwrap();
}

/// A change whose transaction took its place in the outbox and is still open.
pub async fn open_change(db: &PgPool) -> (Uuid, sqlx::Transaction<'static, sqlx::Postgres>) {
    let change = "
        with born as (
          insert into users (id, version, profile, created_at, updated_at)
          values (gen_random_uuid(), 1, '{\"first_name\":\"Late\"}', now(), now())
          returning id
        )
        insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
        select gen_random_uuid(), 'user.created', id, 1, '[]', '' from born
        returning user_id
    ";
    let mut transaction = db.begin().await.unwrap();
    let user = sqlx::query_scalar(change).fetch_one(&mut *transaction).await.unwrap();
    (user, transaction)
}

/// What `/readyz` says of the broker, once the instance is degraded.
pub async fn degraded(house: &House) -> String {
    eventually("a degraded instance", async || {
        let ready = house.page("/readyz").await;
        if ready.status == 200 && ready.body["status"] == "degraded" {
            Ok(["database", "broker"].map(|of| ready.body[of].as_str().unwrap()).join(" "))
        } else {
            Err(ready.body)
        }
    })
    .await
}

/// Waits until it is degraded for this reason. Before the first answer of a broker it is, as it is still connecting.
pub async fn degraded_by(house: &House, why: &str) {
    eventually(&format!("an instance that is degraded by {why:?}"), async || {
        let reason = degraded(house).await;
        if reason.contains(why) { Ok(()) } else { Err(reason) }
    })
    .await;
}

pub async fn ready(house: &House) {
    eventually("a ready instance", async || {
        let ready: Answer = house.page("/readyz").await;
        if ready.body["status"] == "ready" { Ok(()) } else { Err(ready.body) }
    })
    .await;
}
