//! Roles: what a process of this binary does for a living.
//!
//! Promise: a role that returns has finished what it owed, or says in its error what it could not.

use std::{
    io::{Write, stdout},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    app,
    backfill::{Backfills, Runner},
    broker::Broker,
    config,
    db::{Db, Trouble},
    dead_letters::{Collector, DeadLetters},
    feed::{self, Feed},
    lead,
    lifecycle::{Roles, leave_on_signal},
    ops::Ops,
    outbox::Bell,
    relay::{Relay, Status},
    subscriptions::{self, Desk, Subscriptions, Watch},
    users::Users,
    web,
};

/// How long a starting instance waits for its database.
const PATIENCE: u32 = 30;

/// The API and, unless told otherwise, the relay.
pub async fn serve(settings: config::Serve, mut faults: config::Faults) -> anyhow::Result<()> {
    warn_of_unknown_settings();
    let db = settings.database.open(&mut faults);
    let broker = if settings.no_relay { None } else { settings.amqp.open(&mut faults) };
    let address = settings.listen.parse(&mut faults);
    let schema = settings.schema(&mut faults);
    let watching = settings.watching.parse(&mut faults);
    let management = broker.as_ref().and_then(|broker| settings.watching.management(broker, &mut faults));
    faults.none()?;
    let (Some(db), Some(address), Some(schema), Some(watching)) = (db, address, schema, watching) else {
        unreachable!("no faults, so all are there")
    };

    let stop = CancellationToken::new();
    leave_on_signal(stop.clone())?;
    let listener = listen(address).await?;
    let Some(found) = stop.run_until_cancelled(await_database(&db, !settings.no_migrate)).await else { return Ok(()) };
    found?;

    let (keeping, telling) = (Roles::new(stop.clone()), Roles::new(stop.clone()));
    let (bell, queries) = (Bell::default(), db.pool("queries", []));
    let telling_stop = CancellationToken::new();
    let desk = broker.clone().map(Desk::new);
    let letters = DeadLetters::new(queries.clone(), broker.clone());
    let status = broker.map(|broker| tell(&telling, &db, broker, watching, &bell, &telling_stop));
    telling.spawn("hints", bell.clone().pass_on(db.line("hints", []), telling_stop.clone()));
    let schema = Arc::new(schema);
    let users = Users::open(&db, queries.clone(), schema.clone(), bell, &keeping);
    let feed = Feed::open(&db);
    let subscriptions = Subscriptions::new(&db, queries.clone(), schema, desk, management, watching.idle_after);
    let backfills = Backfills::new(queries.clone());
    let ops = Ops::new(queries.clone(), status);
    let app = app::full(users, feed.clone(), subscriptions.clone(), letters, backfills, ops)?;

    announce(&listener)?;
    web::serve(listener, app, stop).await;
    // In this order: the last changes are kept before the telling ends.
    let kept = keeping.ended().await;
    telling_stop.cancel();
    let told = telling.ended().await;
    feed.close().await;
    subscriptions.close().await;
    queries.close().await;
    ensure!(kept && told, "a role fell, see the log");
    Ok(())
}

fn warn_of_unknown_settings() {
    for name in config::unknown_settings() {
        tracing::warn!("{name} is set, and there is no such setting; see `tidings serve --help`");
    }
}

/// The relay alone.
pub async fn relay(settings: config::Relay, mut faults: config::Faults) -> anyhow::Result<()> {
    warn_of_unknown_settings();
    let db = settings.database.open(&mut faults);
    let broker = settings.amqp.open(&mut faults);
    let address = settings.listen.parse(&mut faults);
    let watching = settings.watching.parse(&mut faults);
    faults.none()?;
    let (Some(db), Some(broker), Some(address), Some(watching)) = (db, broker, address, watching) else {
        unreachable!("no faults, so all are there")
    };

    let stop = CancellationToken::new();
    leave_on_signal(stop.clone())?;
    let listener = listen(address).await?;
    let Some(found) = stop.run_until_cancelled(await_database(&db, false)).await else { return Ok(()) };
    found?;
    let telling = Roles::new(stop.clone());
    let status = tell(&telling, &db, broker, watching, &Bell::default(), &stop);
    let queries = db.pool("queries", []);
    let app = app::ops_only(Ops::new(queries.clone(), Some(status)));

    announce(&listener)?;
    web::serve(listener, app, stop).await;
    let told = telling.ended().await;
    queries.close().await;
    ensure!(told, "a role fell, see the log");
    Ok(())
}

/// Starts a relay and its ear for other processes, the watch over the subscriptions, and what else is carried between database and
/// broker.
fn tell(
    telling: &Roles,
    db: &Db,
    broker: Broker,
    watching: config::Watched,
    bell: &Bell,
    stop: &CancellationToken,
) -> (Status, subscriptions::Status) {
    let (status, watched) = (Status::default(), subscriptions::Status::default());
    let config::Watched { idle_after, check_every } = watching;
    let watch = Watch::new(db.clone(), Desk::new(broker.clone()), watched.clone(), idle_after, check_every);
    telling.spawn("subscriptions watch", watch.run(stop.clone()));
    let (collector, runner) = (Collector::new(db, broker.clone()), Runner::new(db, broker.clone()));
    telling.spawn("dead letters", lead::serve(collector, db.clone(), stop.clone()));
    telling.spawn("backfill", lead::serve(runner, db.clone(), stop.clone()));
    let relay = Relay::new(db.clone(), broker, bell.clone(), status.clone());
    telling.spawn("relay", relay.run(stop.clone()));
    telling.spawn("ear", bell.clone().listen(db.listener_pool(), stop.clone()));
    (status, watched)
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; free it, or choose another with --listen or TIDINGS_LISTEN")
    })
}

/// Servers that start together find their database not yet up: wait for it, and say so.
async fn await_database(db: &Db, migrate: bool) -> anyhow::Result<()> {
    for tries_left in (0..PATIENCE).rev() {
        let Err(error) = db.check_durability().await else { break };
        let Some(trouble) = error.downcast_ref::<Trouble>().map(Trouble::report) else { return Err(error) };
        ensure!(tries_left > 0, trouble);
        tracing::warn!(tries_left, "waiting for the database: {trouble}");
        sleep(Duration::from_secs(1)).await;
    }
    if migrate { bring_up_to_date(db).await } else { Ok(()) }
}

/// The schema as this binary wants it, and the data as its database wants it.
pub async fn bring_up_to_date(db: &Db) -> anyhow::Result<()> {
    db.migrate().await?;
    feed::restamp(db).await?;
    Ok(())
}

/// The ready line: where, on stdout, for people and for scripts that wait for it.
fn announce(listener: &TcpListener) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let mut out = stdout().lock();
    writeln!(out, "tidings ready on http://{address}")?;
    Ok(out.flush()?)
}
