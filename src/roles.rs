//! Roles: what a process of this binary does for a living.
//!
//! Promise: a role that returns has finished what it owed, or says in its error what it could not.

use std::{
    io::{Write, stdout},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, ensure};
use axum::Router;
use sqlx::Connection;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    app::{self, Desks},
    backfill::{Backfills, Runner},
    broker::{Broker, DEFAULT_VHOST},
    clients::{self, Clients, Processing},
    config,
    db::{self, Db, Trouble},
    dead_letters::{Collector, DeadLetters},
    deletions::{Deletions, Ledger, Reminder},
    descriptors,
    feed::{self, Feed},
    lead,
    lifecycle::{Roles, leave_on_signal},
    ops::{self, Looks, Ops, Starting},
    outbox::Bell,
    profile::Schema,
    relay::{Relay, Status},
    subscriptions::{self, Desk, Management, Subscriptions, Watch},
    users::{self, Users},
    web::{self, Door, LimitSettings, Limits},
};

/// How often a starting instance looks for its database, a second after each time in vain. A look itself may take some seconds.
const PATIENCE: u32 = 30;

const FELL: &str = "a role fell, see the log";

const HELD: &str =
    "\nhint: somebody holds a table; pg_stat_activity and pg_blocking_pids(pid) tell who, while an instance waits";

/// The API and, unless told otherwise, the relay.
pub async fn serve(settings: config::Serve, mut faults: config::Faults) -> anyhow::Result<()> {
    warn_of_unknown_settings();
    let db = settings.database.open(&mut faults);
    let relays = settings.relays(&mut faults);
    let broker = if relays { settings.amqp.open(&mut faults) } else { None };
    let source = match &broker {
        Some(broker) => Some(broker.topology()),
        None if relays => None,
        None => settings.amqp.source(&mut faults),
    };
    let address = settings.listen.parse(&mut faults);
    let schema = config::schema(settings.profile_schema.as_deref(), &mut faults);
    let tokens = settings.jwt.tokens(&mut faults);
    let asks_nobody = settings.asks_nobody(address, &mut faults);
    let (migrates, requires_if_match) = (settings.migrates(&mut faults), settings.requires_if_match(&mut faults));
    let watching = settings.watching.parse(&mut faults);
    let deadline = settings.erasure.parse(&mut faults);
    let limits = settings.limits.parse(&mut faults);
    let management = broker.as_ref().and_then(|broker| settings.management.open(broker, &mut faults));
    if relays && broker.is_none() {
        settings.management.check(&mut faults);
    }
    faults.none()?;
    let (Some(db), Some(address), Some(schema), Some(watching), Some(deadline), Some(limits), Some(source)) =
        (db, address, schema, watching, deadline, limits, source)
    else {
        unreachable!("no faults, so all are there")
    };

    let stop = CancellationToken::new();
    leave_on_signal(stop.clone())?;
    warn_of_listeners(&db, broker.as_ref(), management.as_ref());
    let (limits, starting) = (within_descriptors(limits), Starting::default());
    let port = Port::open(address, &starting, &limits, &stop)?;
    let looks = async {
        let acts_as: &[&str] = if relays { &[db::API_ROLE, db::RELAY_ROLE] } else { &[db::API_ROLE] };
        await_database(&db, migrates, acts_as, &starting).await?;
        if !asks_nobody {
            patiently(&starting, async || clients::check(&db).await).await?;
        }
        patiently(&starting, async || refuse_schema_without_declared_fields(&db, &schema).await).await
    };
    let Some(found) = stop.run_until_cancelled(looks).await else { return port.close().await };
    found?;

    let (keeping, telling) = (Roles::new(stop.clone()), Roles::new(stop.clone()));
    let vhost = broker.as_ref().map_or(DEFAULT_VHOST, Broker::vhost).to_owned();
    let broker = broker.map(|broker| broker.noting_missing(subscriptions::note_missing_exchange(&db)));
    // Plans are not made for what is asked for: auto_explain would write it into the log.
    let (bell, queries) = (Bell::default(), db.pool("queries", 4, users::BY_KEY));
    // About subscriptions: counting takes a while, and no reader of users waits behind it.
    let records = db.pool("records", 4, [("plan_cache_mode", "force_generic_plan")]);
    let (telling_stop, duties) = (CancellationToken::new(), lead::Status::default());
    let registry = broker.as_ref().map(Broker::as_registry);
    let desk = registry.clone().map(Desk::new);
    let letters = DeadLetters::new(records.clone(), registry);
    let status = broker.map(|broker| tell(&telling, &db, broker, watching, &bell, &duties, &telling_stop));
    telling.spawn("hints", bell.clone().pass_on(db.line("hints", db::LOCALLY), telling_stop.clone()));
    let schema = Arc::new(schema);
    let clients = if asks_nobody {
        tracing::warn!("whoever reaches {address} may do everything: no key is asked for (--insecure-no-auth)");
        Clients::anybody(queries.clone())
    } else {
        Clients::open(&db, queries.clone(), tokens, &keeping)
    };
    let feed = Feed::open(&db);
    let subscriptions = Subscriptions::new(&db, records.clone(), schema.clone(), desk, management, watching.idle_after);
    telling.spawn("idempotency keys", users::purge(db.line("purge", []), telling_stop.clone()));
    let ledger = Ledger::new(&db, deadline);
    let deletions = Deletions::open(&db, ledger.clone(), &keeping);
    let reminder = Reminder::new(&db, deadline);
    telling.spawn("deletions", lead::serve(reminder, db.clone(), duties.clone(), telling_stop.clone()));
    let looks = Looks::new(&db);
    let serving = Some((clients.clone(), deletions.clone()));
    let ops = Ops::new(queries.clone(), looks.clone(), serving, status, &duties, &limits.traffic);
    let desks = Desks {
        users: Users::open(&db, queries.clone(), schema.clone(), bell, requires_if_match, &keeping),
        feed: feed.clone(),
        subscriptions: subscriptions.clone(),
        dead_letters: letters,
        backfills: Backfills::new(records.clone()),
        deletions,
        processing: Processing::new(records.clone(), schema),
    };
    let app = app::full(&clients, desks, ops, limits, (&vhost, &source))?;
    drop(clients);

    let answered = port.answer(app).await?;
    // In this order: the last changes are kept before the telling ends.
    let kept = keeping.ended().await;
    telling_stop.cancel();
    let told = telling.ended().await;
    tokio::join!(
        feed.close(),
        subscriptions.close(),
        ledger.close(),
        db::close(&queries),
        db::close(&records),
        looks.close()
    );
    ensure!(answered && kept && told, FELL);
    Ok(())
}

fn warn_of_unknown_settings() {
    for name in config::unknown_settings() {
        tracing::warn!("{name} is set, and there is no such setting; see `tidings serve --help`");
    }
}

/// Of what strangers on the network could read or forge.
fn warn_of_listeners(db: &Db, broker: Option<&Broker>, management: Option<&Management>) {
    if db.is_overheard() {
        tracing::warn!(
            "DATABASE_URL: the database is on another machine, and anybody between could read or be it; add ?sslmode=verify-full"
        );
    }
    if broker.is_some_and(Broker::is_overheard) {
        tracing::warn!(
            "AMQP_URL or AMQP_REGISTRY_URL: the broker is on another machine, and anybody between could read or be it; use amqps://"
        );
    }
    if management.is_some_and(Management::is_overheard) {
        tracing::warn!(
            "TIDINGS_RABBITMQ_MANAGEMENT_URL: the management API is on another machine, and anybody between could read its password or be \
             it; use https://"
        );
    }
}

/// Who reads a field has to hear of it before it goes: a schema without one that somebody declared is refused.
async fn refuse_schema_without_declared_fields(db: &Db, schema: &Schema) -> anyhow::Result<()> {
    let mut connection = db.maintenance("schema check").await?;
    let declared = clients::declared_fields(&mut connection).await.map_err(Trouble::from).map_err(db::explained)?;
    connection.close().await?;
    let gone = declared.iter().filter(|(field, _)| field.parse().is_ok_and(|field| !schema.has(&field)));
    let gone: Vec<String> = gone.map(|(field, who)| format!("\n  {field}: {who}")).collect();
    ensure!(
        gone.is_empty(),
        "the profile schema lacks fields that somebody declared; keep them, or have these changed first:{}",
        gone.concat()
    );
    Ok(())
}

/// The relay alone.
pub async fn relay(settings: config::Relay, mut faults: config::Faults) -> anyhow::Result<()> {
    warn_of_unknown_settings();
    let db = settings.database.open(&mut faults);
    let broker = settings.amqp.open(&mut faults);
    let address = settings.listen.parse(&mut faults);
    let watching = settings.watching.parse(&mut faults);
    let limits = settings.connections.parse(&mut faults);
    faults.none()?;
    let (Some(db), Some(broker), Some(address), Some(watching), Some(limits)) = (db, broker, address, watching, limits)
    else {
        unreachable!("no faults, so all are there")
    };

    let stop = CancellationToken::new();
    leave_on_signal(stop.clone())?;
    warn_of_listeners(&db, Some(&broker), None);
    let (limits, starting) = (within_descriptors(limits), Starting::default());
    let port = Port::open(address, &starting, &limits, &stop)?;
    let looks = await_database(&db, false, &[db::RELAY_ROLE], &starting);
    let Some(found) = stop.run_until_cancelled(looks).await else { return port.close().await };
    found?;
    let telling = Roles::new(stop.clone());
    let broker = broker.noting_missing(subscriptions::note_missing_exchange(&db));
    let duties = lead::Status::default();
    let status = tell(&telling, &db, broker, watching, &Bell::default(), &duties, &stop);
    let (queries, looks) = (db.pool("queries", 1, []), Looks::new(&db));
    let ops = Ops::new(queries.clone(), looks.clone(), None, Some(status), &duties, &limits.traffic);
    let answered = port.answer(app::ops_only(ops, limits)).await?;
    let told = telling.ended().await;
    tokio::join!(db::close(&queries), looks.close());
    ensure!(answered && told, FELL);
    Ok(())
}

/// Where a process answers: while it starts, that it lives and what it waits for; and everything once it is ready.
struct Port {
    address: SocketAddr,
    door: Arc<Door>,
    answering: Roles,
}

impl Port {
    fn open(
        address: SocketAddr,
        starting: &Starting,
        limits: &Limits,
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let listener = web::listen(address).with_context(|| {
            format!("cannot listen on {address}; free it, or choose another with --listen or TIDINGS_LISTEN")
        })?;
        let address = listener.local_addr()?;
        let door = Door::new(ops::PROBES, app::while_starting(starting.clone(), limits.clone()));
        let answering = Roles::new(stop.clone());
        // In a task of the runtime: from the main thread each connection would have to be handed over to the runtime's threads, behind
        // all that is handed over already.
        answering.spawn("web", web::serve(listener, door.clone(), limits.clone(), stop.clone()));
        Ok(Self { address, door, answering })
    }

    /// Says that the process is ready, and has `app` answer until it is told to leave; false if that fell. Keeps nothing of `app`.
    async fn answer(self, app: Router) -> anyhow::Result<bool> {
        let Self { address, door, answering } = self;
        door.open(app);
        drop(door);
        announce(address)?;
        Ok(answering.ended().await)
    }

    /// Of a process that was told to leave before it was ready.
    async fn close(self) -> anyhow::Result<()> {
        ensure!(self.answering.ended().await, FELL);
        Ok(())
    }
}

/// Starts a relay and its ear for other processes, the watch over the subscriptions, and what else is carried between database and
/// broker.
fn tell(
    telling: &Roles,
    db: &Db,
    broker: Broker,
    watching: config::Watched,
    bell: &Bell,
    duties: &lead::Status,
    stop: &CancellationToken,
) -> (Status, subscriptions::Status) {
    let (status, watched) = (Status::default(), subscriptions::Status::default());
    let config::Watched { idle_after, check_every } = watching;
    let registry = broker.as_registry();
    let watch = Watch::new(db.clone(), Desk::new(registry.clone()), watched.clone(), idle_after, check_every);
    telling.spawn("subscriptions watch", watch.run(stop.clone()));
    let (collector, runner) = (Collector::new(db, registry.clone()), Runner::new(db, registry));
    telling.spawn("dead letters", lead::serve(collector, db.clone(), duties.clone(), stop.clone()));
    telling.spawn("backfill", lead::serve(runner, db.clone(), duties.clone(), stop.clone()));
    let relay = Relay::new(db.clone(), broker, bell.clone(), status.clone());
    telling.spawn("relay", relay.run(stop.clone()));
    telling.spawn("ear", bell.clone().listen(db.clone(), stop.clone()));
    (status, watched)
}

/// The limits, with no more connections than there are descriptors for.
fn within_descriptors(mut settings: LimitSettings) -> Limits {
    let (wanted, limit) = (settings.connections, descriptors::raise());
    settings.connections = descriptors::connections(wanted, limit);
    if settings.connections < wanted {
        let connections = settings.connections;
        tracing::warn!(wanted, connections, limit, "fewer connections than set: the limit of open files is too low");
    }
    Limits::new(settings)
}

/// A database that is up, keeps what it is given, and has our tables: this instance makes them, or else somebody has, and gave the rights of
/// the roles that it acts as.
async fn await_database(db: &Db, migrate: bool, acts_as: &[&str], starting: &Starting) -> anyhow::Result<()> {
    starting.waits("it is asked for the first time");
    patiently(starting, async || db.check_durability().await).await?;
    for line in db.told_to_the_log().await {
        tracing::warn!("{line}");
    }
    if migrate {
        starting.waits("its schema is being brought up to date, by this instance or another");
        patiently(starting, async || bring_up_to_date(db).await).await
    } else {
        patiently(starting, async || db.check_upgraded(acts_as).await).await
    }
}

/// `tidings migrate`: waits for a table as a service does. That nobody answers is told at once to who is at the terminal.
pub async fn migrate(db: &Db) -> anyhow::Result<()> {
    wait_out(Trouble::is_of_a_lock, &Starting::default(), async || bring_up_to_date(db).await).await
}

/// Servers that start together find their database not yet up, and somebody may hold a table for a while: wait for it, and say so.
async fn patiently(starting: &Starting, look: impl AsyncFnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    wait_out(|_| true, starting, look).await
}

/// Looks until there is no trouble any more of a kind that `passes`.
async fn wait_out(
    passes: fn(&Trouble) -> bool,
    starting: &Starting,
    mut look: impl AsyncFnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for tries_left in (0..PATIENCE).rev() {
        let Err(error) = look().await else { break };
        let Some(trouble) = error.downcast_ref().filter(|trouble| passes(trouble)) else { return Err(error) };
        let (why, is_held) = (trouble.report(), trouble.is_of_a_lock());
        ensure!(tries_left > 0, "{why}{}", if is_held { HELD } else { "" });
        let why = format!("{why}{}", if is_held { ", somebody holds a table" } else { "" });
        tracing::warn!(tries_left, "waiting for the database: {why}");
        starting.waits(why);
        sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

/// The schema as this binary wants it, and the data as its database wants it.
async fn bring_up_to_date(db: &Db) -> anyhow::Result<()> {
    db.migrate().await?;
    feed::restamp(db).await?;
    Ok(())
}

/// The ready line: where, on stdout, for people and for scripts that wait for it.
fn announce(address: SocketAddr) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    let told = writeln!(out, "tidings ready on http://{address}").and_then(|()| out.flush());
    told.map_err(|error| anyhow!("the ready line cannot be written: {error}"))
}
