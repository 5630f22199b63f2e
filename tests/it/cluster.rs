//! A cluster of brokers that loses nodes: fault runs of their own, three brokers being much beside all other tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use serde_json::json;
use sqlx::PgPool;
use tidings_sdk::topology::{self, Source};
use uuid::Uuid;

use crate::{
    house::{self, House, Service, eventually},
    hurt::Cluster,
    load::{self, Change, Load},
    relay::{leader, leads},
    rights,
    sdk::{self, Curse, Listener, SOON},
    subscribed::{Subscribed, notice, take},
};

/// A relay of the House's deployment at this broker.
async fn relay_at(house: &House, amqp_url: &str) -> Service {
    let mut settings = house.settings().to_vec();
    settings.extend(rights::at_broker(amqp_url).map(|(name, value)| (name.to_owned(), value)));
    Service::start(&["relay"], &settings).await
}

/// The node that is killed has the leading relay and the leader of a subscription's queue, and does not come back.
#[sqlx::test]
#[ignore = "a fault run of its own: ./dev test --test it -- --ignored cluster"]
async fn a_relay_at_another_node_takes_over_when_the_leaders_broker_dies(db: PgPool) {
    let cluster = Cluster::set_up().await;
    let [first, second, third] = &cluster.amqp_urls;
    let house = House::at(db, third, &[("TIDINGS_NO_RELAY", "true")]).await;
    let orders = Subscribed::at(&house, first, "orders", &["#"], &[]).await;
    let mut relays = vec![relay_at(&house, first).await];
    leader(&relays).await;
    relays.push(relay_at(&house, second).await);
    load::watch(&house.db).await;
    let users = load::users(&house, 8).await;
    let load = Load::on(&house, &users, 4);
    load.goes_on(200).await;
    assert!(cluster.leads(0, orders.name.queue()).await);
    cluster.kill(0).await;
    let killed = Instant::now();
    eventually("the other one to lead", async || if leads(&relays[1]).await { Ok(()) } else { Err(()) }).await;
    load::heard(&house, house.audit.heard().len() + 200).await;
    // A lead that is not given up lapses after ten.
    assert!(killed.elapsed() < Duration::from_secs(9), "{:?}", killed.elapsed());
    let answered = load.end_well().await;
    load::all_told(&house, &answered).await;

    assert_eq!(waiting_at(second, &orders).await, load::committed(&house.db).await);
    cluster.tear_down().await;
}

/// A queue that has lost its leader and finds no other takes nothing. When it has found one, RabbitMQ (3.10) goes on refusing what comes
/// by the channel that was refused before.
#[sqlx::test]
#[ignore = "a fault run of its own: ./dev test --test it -- --ignored cluster"]
async fn a_queue_that_finds_another_leader_is_told_what_it_refused(db: PgPool) {
    let cluster = Cluster::set_up().await;
    let [first, _, third] = &cluster.amqp_urls;
    let house = House::at(db, third, &[]).await;
    let orders = Subscribed::at(&house, first, "orders", &["#"], &[]).await;
    load::watch(&house.db).await;
    // Its leader last: two of three are enough to find another.
    cluster.kill(1).await;
    cluster.kill(0).await;
    house.user(json!({ "first_name": "Ana" })).await;
    eventually("a refusal", async || {
        let refused = house.metric(r#"tidings_publish_results_total{result="refused"}"#).await;
        if refused > 0.0 { Ok(()) } else { Err(refused) }
    })
    .await;
    cluster.start(1).await;
    house.settle().await;
    assert_eq!(waiting_at(third, &orders).await, load::committed(&house.db).await);
    cluster.tear_down().await;
}

/// The node that is killed has the leaders of all the queues of a consumer who is at another one, and does not come back.
#[sqlx::test]
#[ignore = "a fault run of its own: ./dev test --test it -- --ignored cluster"]
async fn a_consumer_goes_on_when_the_leaders_of_his_queues_die(db: PgPool) {
    let cluster = Cluster::set_up().await;
    let [first, second, third] = &cluster.amqp_urls;
    let house = House::at(db, third, &[]).await;
    // A queue is led where it was declared.
    let connection = house::connect(first).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let source = Source { exchange: house.exchange.clone(), prefix: None };
    topology::declare(&channel, &source, &sdk::subscription(&house), &SOON).await.unwrap();
    let listener = Listener::with(&house, second, |consumer| consumer).await;
    let users = load::users(&house, 8).await;
    let cursed = house.user(json!({ "first_name": "Bea" })).await;
    listener.called(9).await;
    let load = Load::on(&house, &users, 4);
    load.goes_on(200).await;
    assert!(cluster.leads(0, listener.subscription.name.queue()).await);
    cluster.kill(0).await;
    listener.diary.curse(cursed, Curse::Fails);
    house.amend(&cursed, json!({ "city": "Riga" })).await.ok();
    load.goes_on(200).await;
    load.end_well().await;
    let mut owed = load::versions(&house.db).await;
    owed.insert(cursed, 1);
    eventually("everybody's latest to be handled", async || {
        let mut handled: BTreeMap<Uuid, i64> = BTreeMap::new();
        for call in listener.diary.calls() {
            // What was fetched may be newer than the news, which is then dropped when it comes.
            let latest = handled.entry(call.user).or_default();
            *latest = call.latest.unwrap_or_default().max(*latest);
        }
        if handled == owed { Ok(()) } else { Err(handled) }
    })
    .await;
    let dead = notice(&listener.dead_letter().await.delivery);
    assert_eq!((dead.user_id, dead.version), (cursed, 2));
    cluster.tear_down().await;
}

async fn waiting_at(amqp_url: &str, subscribed: &Subscribed) -> BTreeSet<Change> {
    let connection = house::connect(amqp_url).await.unwrap();
    let waiting = take(&connection.create_channel().await.unwrap(), subscribed.name.queue()).await;
    waiting.iter().map(notice).map(|news| (news.user_id, news.version)).collect()
}
