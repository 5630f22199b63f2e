//! Runner: carries on every backfill that is to run, some of them side by side.
//!
//! Promise: what an operator asks for takes effect within a second, whichever instance leads; and one that is slow, or cannot go on,
//! keeps no other from its turn for longer than seconds.
//! Not here, on purpose: memory, but for who had a turn. The table says what is to be done, and is asked twice a second.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use lapin::Connection;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    model::WaitingFor,
    run::{Orders, Run},
    store::{self, Running},
};
use crate::{
    broker::Broker,
    db::{Db, Line},
    lead::Duty,
    outbox::{self, Floor},
    telemetry::with_causes,
};

/// Between two looks at what is to be done.
const LOOK: Duration = Duration::from_millis(500);
/// Backfills under way at once; the others wait for their turn: the oldest first, and behind them those who had one.
const SIDE_BY_SIDE: usize = 4;
/// News that waits for longer than this goes first.
const LAG_LIMIT_S: f64 = 5.0;
/// Before one that broke off begins again.
const REST: Duration = Duration::from_secs(3);
/// For confirms that are under way when a backfill is to stop.
const FAREWELL: Duration = Duration::from_secs(4);

pub struct Runner {
    db: Db,
    broker: Broker,
}

impl Runner {
    pub fn new(db: &Db, broker: Broker) -> Self {
        Self { db: db.clone(), broker }
    }
}

impl Duty for Runner {
    const NAME: &'static str = "backfill";
    /// "backfil" in ASCII.
    const KEY: i64 = 0x62_61_63_6b_66_69_6c;

    async fn turn(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut table = self.db.line("backfill table", []);
        let (broker, db) = (self.broker.clone(), self.db.clone());
        let mut runs = Runs {
            broker,
            db,
            tasks: JoinSet::new(),
            hands: HashMap::new(),
            had_turn: HashMap::new(),
            floor: Floor::default(),
        };
        let outcome = stop.run_until_cancelled(runs.carry_on(&mut table)).await.unwrap_or(Ok(()));
        runs.end().await;
        table.hang_up().await;
        outcome
    }
}

/// The backfills under way.
struct Runs {
    broker: Broker,
    db: Db,
    tasks: JoinSet<Uuid>,
    hands: HashMap<Uuid, Hand>,
    /// When the turn of each ended that is not done: it gave way to others, or broke off.
    had_turn: HashMap<Uuid, Instant>,
    floor: Floor,
}

/// What holds one of them.
struct Hand {
    stop: CancellationToken,
    orders: watch::Sender<Orders>,
}

impl Runs {
    /// Until the first fault.
    async fn carry_on(&mut self, table: &mut Line) -> anyhow::Result<()> {
        let mut connection = None;
        loop {
            let mut wanted = table.run(async |session| store::running(session).await).await?;
            self.stop_others(&wanted);
            self.line_up(&mut wanted);
            if !wanted.is_empty() {
                let connection = self.connection(&mut connection, table, &wanted).await?;
                self.arrange(table, connection, &wanted).await?;
            }
            sleep(LOOK).await;
            self.see_who_ended().await;
        }
    }

    fn stop_others(&self, wanted: &[Running]) {
        let others = self.hands.iter().filter(|(id, _)| !wanted.iter().any(|running| running.id == **id));
        others.for_each(|(_, hand)| hand.stop.cancel());
    }

    /// Who had a turn stands behind those who had none, and behind those whose turn was earlier.
    fn line_up(&mut self, wanted: &mut [Running]) {
        self.had_turn.retain(|id, _| wanted.iter().any(|running| running.id == *id));
        wanted.sort_by_key(|running| self.had_turn.get(&running.id).copied());
    }

    /// The connection of all of them, dialled when the first one is to run.
    async fn connection<'a>(
        &self,
        connection: &'a mut Option<Arc<Connection>>,
        table: &mut Line,
        wanted: &[Running],
    ) -> anyhow::Result<&'a Arc<Connection>> {
        let is_lost = connection.as_ref().is_some_and(|connection| !connection.status().connected());
        ensure!(!is_lost, "the connection to the broker is lost");
        if connection.is_none() {
            match self.broker.connect("backfill").await {
                Ok(dialled) => *connection = Some(Arc::new(dialled)),
                Err(error) => {
                    wait(table, wanted, WaitingFor::Broker).await?;
                    return Err(error);
                }
            }
        }
        connection.as_ref().context("it was dialled")
    }

    async fn arrange(
        &mut self,
        table: &mut Line,
        connection: &Arc<Connection>,
        wanted: &[Running],
    ) -> anyhow::Result<()> {
        let place = self.floor.place();
        let lag = table.run(async |session| outbox::lag(session, place).await).await?;
        self.floor.note(&lag, Instant::now());
        let (news_first, others_wait) = (lag.oldest_seconds > LAG_LIMIT_S, wanted.len() > SIDE_BY_SIDE);
        let mut others = vec![];
        for running in wanted {
            let &Running { rate_per_s, max_waiting, .. } = running;
            let orders = Orders { rate_per_s, max_waiting, news_first, others_wait };
            if let Some(hand) = self.hands.get(&running.id) {
                hand.orders.send_if_modified(|now| std::mem::replace(now, orders) != orders);
            } else if self.hands.len() < SIDE_BY_SIDE {
                self.begin(connection, running, orders);
            } else {
                others.push(running.clone());
            }
        }
        wait(table, &others, WaitingFor::Turn).await
    }

    fn begin(&mut self, connection: &Arc<Connection>, running: &Running, orders: Orders) {
        let (id, stop) = (running.id, CancellationToken::new());
        let over = stop.clone();
        let (orders, heard) = watch::channel(orders);
        let line = self.db.line("backfill walk", []);
        let run = Run::new(running.clone(), self.broker.clone(), connection.clone(), line, heard, stop.clone());
        self.hands.insert(id, Hand { stop, orders });
        self.tasks.spawn(async move {
            if let Err(error) = run.carry_on().await {
                tracing::warn!(backfill = %id, "interrupted, and will go on: {}", with_causes(&error));
                over.run_until_cancelled(sleep(REST)).await;
            }
            id
        });
    }

    /// One that is not done begins again when its turn has come, where its row says.
    async fn see_who_ended(&mut self) {
        while let Some(ended) = self.tasks.try_join_next() {
            match ended {
                Ok(id) => {
                    self.hands.remove(&id);
                    self.had_turn.insert(id, Instant::now());
                }
                // The place of the panic is in the log; whose it was is not known, so all begin again.
                Err(_) => {
                    self.tasks.shutdown().await;
                    self.hands.clear();
                }
            }
        }
    }

    /// Lets what is under way arrive, within bounds.
    async fn end(mut self) {
        self.hands.values().for_each(|hand| hand.stop.cancel());
        let _ = timeout(FAREWELL, async { while self.tasks.join_next().await.is_some() {} }).await;
        self.tasks.shutdown().await;
    }
}

async fn wait(table: &mut Line, who: &[Running], why: WaitingFor) -> anyhow::Result<()> {
    let untold = who.iter().filter(|running| running.waiting_for != Some(why));
    let ids: Vec<Uuid> = untold.map(|running| running.id).collect();
    if ids.is_empty() {
        return Ok(());
    }
    Ok(table.run(async |session| store::wait(session, &ids, why).await).await?)
}
