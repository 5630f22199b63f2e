//! Convergence: whatever happens to messages and consumers, a mirror ends up equal to its owner.

use std::time::Instant;

use lapin::{
    Channel,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use sqlx::PgPool;
use tidings_sdk::envelope::Notice;
use uuid::Uuid;

use crate::{
    applications::{App, is_level},
    house::{House, connect, declare, env, eventually},
    load::{self, Load},
};

const CHANGES: usize = 10_000;
const TIMES: usize = 5;
const KILLS: usize = 50;

/// A number below `bound`; nobody knows which.
fn any(bound: usize) -> usize {
    (Uuid::new_v4().as_u128() % bound as u128) as usize
}

/// Every message several times, in an order that nobody chose.
async fn shuffled(notices: Vec<Notice>, channel: &Channel, exchange: &str) {
    let mut messages: Vec<(Uuid, &Notice)> =
        notices.iter().flat_map(|notice| (0..TIMES).map(move |_| (Uuid::new_v4(), notice))).collect();
    messages.sort_unstable_by_key(|(place, _)| *place);
    let mut confirms = vec![];
    for (_, notice) in messages {
        let (properties, body) = notice.to_message("urn:test");
        let (exchange, key) = (exchange.into(), notice.event.name().into());
        confirms.push(
            channel.basic_publish(exchange, key, BasicPublishOptions::default(), &body, properties).await.unwrap(),
        );
    }
    for confirm in confirms {
        assert!(confirm.await.unwrap().is_ack());
    }
}

/// Changes and kills go on side by side: what a killed consumer had in hand is, for many a user, the last there is to hear of him.
#[sqlx::test]
async fn ten_thousand_changes_told_five_times_each_in_any_order_to_a_consumer_that_is_killed_fifty_times(db: PgPool) {
    let house = House::open(db).await;
    let users = load::users(&house, 400).await;
    let connection = connect(&env("AMQP_URL")).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let elsewhere = format!("{}.shuffled", house.exchange);
    declare(&channel, &elsewhere).await;
    let crm = App::of(&house, "crm").await.at(&elsewhere);
    let mut listening = crm.run(&["--no-catch-up"]).await;
    let (mut told, mut living) = (0, &users[..]);
    for _ in 0..KILLS {
        let load = Load::on(&house, living, 8);
        load.goes_on(CHANGES / KILLS).await;
        load.end_well().await;
        house.delete(&living[0]).await.ok();
        living = &living[1..];
        house.settle().await;
        let news = house.audit.heard().split_off(told);
        told += news.len();
        shuffled(news, &channel, &elsewhere).await;
        let until = any(CHANGES / KILLS * TIMES) as u32;
        eventually("the consumer to get on", async || match crm.depth().await.unwrap().ready {
            ready if ready <= until => Ok(()),
            ready => Err((ready, until)),
        })
        .await;
        listening.process.kill().await.unwrap();
        listening = crm.run(&["--no-catch-up"]).await;
    }
    assert!(told >= CHANGES, "{told} changes");
    let mirror = crm.database().await;
    is_level(&house, &mirror).await;
    eventually("the queue to be empty", async || match crm.depth().await.unwrap().ready {
        0 => Ok(()),
        ready => Err(ready),
    })
    .await;
    is_level(&house, &mirror).await;
    listening.leave().await;
    mirror.close().await;
    crm.end().await;
}

#[sqlx::test]
async fn a_consumer_that_was_away_during_fifty_thousand_changes_is_level_again(db: PgPool) {
    let house = House::open(db).await;
    let crm = App::of(&house, "crm").await;
    crm.run(&["--no-catch-up"]).await.leave().await;
    let users = load::users(&house, 1_000).await;
    load::many_versions(&house.db, 49).await;
    house.settle().await;
    assert_eq!(house.audit.heard().len(), 50_000);
    let began = Instant::now();
    let listening = crm.run(&["--no-catch-up"]).await;
    let mirror = crm.database().await;
    is_level(&house, &mirror).await;
    eprintln!("level again after 50,000 changes of {} users: {:.2?}", users.len(), began.elapsed());
    listening.leave().await;
    mirror.close().await;
    crm.end().await;
}
