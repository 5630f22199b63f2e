//! `tidings subscription ..`: the registry for operators, directly on database and broker.
//!
//! Promise: data on stdout and talk on stderr; a refusal says what can be done about it. A missing exchange is left alone once something
//! was bound to it: perhaps TIDINGS_EXCHANGE names another one than the service's.

use std::{
    io::{Write, stdout},
    path::Path,
    sync::Arc,
};

use anyhow::{anyhow, ensure};
use futures_util::{FutureExt, future::BoxFuture};
use serde::Serialize;
use sqlx::PgPool;
use tidings_sdk::subscription::SubscriptionName;

use super::{
    Asker, Desk, Error, Put, Subscriptions, View, Waiting, Wish, desk::Trouble, management::Unregistered, store,
};
use crate::{
    config::{
        self, Faults, ManagementApi, SubscriptionAction, SubscriptionPut, SubscriptionRecovered, SubscriptionServers,
        WrongSettings,
    },
    json::Fault,
    telemetry::with_causes,
};

/// Operators judge idleness by the service's own figures; the command has no setting for it.
const IDLE_AFTER: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 60 * 60);

/// # Errors
/// When what was asked for was not done.
pub async fn run(action: SubscriptionAction, faults: Faults) -> anyhow::Result<()> {
    match action {
        SubscriptionAction::Put(put) => Box::pin(register(put, faults)).await,
        SubscriptionAction::List(list) => {
            let asked = list.view;
            let (_, subscriptions) = open(None, &asked.servers, Some(&asked.management), None, false, faults)?;
            let looked = async {
                let listing = subscriptions.view_all(&Asker::Operator).await?;
                say_why_not(&subscriptions, &listing.subscriptions).await;
                Ok(listing)
            };
            let listing = ended(&subscriptions, looked).await?;
            if asked.json {
                return print_json(&listing);
            }
            print_table(&listing.subscriptions)?;
            print_unregistered(listing.unregistered.as_deref())
        }
        SubscriptionAction::Show(show) => {
            let (name, asked) = (Some(show.name.as_str()), show.view);
            let (name, subscriptions) = open(name, &asked.servers, Some(&asked.management), None, false, faults)?;
            let looked = async {
                let view = subscriptions.view(&named(name)).await?;
                say_why_not(&subscriptions, std::slice::from_ref(&view)).await;
                Ok(view)
            };
            print(&ended(&subscriptions, looked).await?, asked.json)
        }
        SubscriptionAction::Recovered(recovered) => recover(&recovered, faults).await,
        SubscriptionAction::Delete(delete) => {
            let (name, subscriptions) = open(Some(&delete.name), &delete.servers, None, None, false, faults)?;
            ended(&subscriptions, subscriptions.delete(named(name), delete.discard_waiting, Asker::Operator)).await?;
            eprintln!("{} is deleted", delete.name);
            Ok(())
        }
        SubscriptionAction::DeadLetters(action) => crate::dead_letters::command::run(action, faults).await,
        SubscriptionAction::Backfill(action) => crate::backfill::command::run(action, faults).await,
    }
}

async fn register(put: SubscriptionPut, mut faults: Faults) -> anyhow::Result<()> {
    let expires_after = put.expires_after.as_deref().map(config::duration).transpose();
    let expires_after = faults.note("--expires-after", expires_after).flatten();
    let (name, asked, schema) = (Some(put.name.as_str()), put.view, put.profile_schema.as_deref());
    let (name, subscriptions) = open(name, &asked.servers, Some(&asked.management), schema, true, faults)?;
    let name = named(name);
    let wish = Wish {
        routing_keys: put.keys,
        fields: put.fields,
        owner: put.owner,
        purpose: put.purpose,
        expires_after,
        client: put.client,
    };
    let done = async {
        let put = subscriptions.put(subscriptions.admit(name.clone(), wish, Asker::Operator)?).await?;
        Ok((put, subscriptions.view(&name).await?))
    };
    let (done, view) = ended(&subscriptions, done).await?;
    match done {
        Put::Created => eprintln!("{name} is registered and declared: its queue misses nothing from now on"),
        Put::Changed => eprintln!("{name} is registered and declared as asked for now"),
    }
    print(&view, asked.json)
}

/// The registry alone keeps a loss: no broker is asked.
async fn recover(asked: &SubscriptionRecovered, mut faults: Faults) -> anyhow::Result<()> {
    let name = faults.note("NAME", asked.name.parse::<SubscriptionName>());
    let (db, schema) = (asked.database.open(&mut faults), config::schema(None, &mut faults));
    faults.none()?;
    let (Some(name), Some(db), Some(schema)) = (name, db, schema) else { unreachable!("no faults, so all are there") };
    let queries = db.pool("queries", 4, []);
    let subscriptions = Subscriptions::new(&db, queries, Arc::new(schema), None, None, IDLE_AFTER);
    subscriptions.recovered(&name).await.map_err(explained)?;
    eprintln!("{name} misses nothing any more");
    Ok(())
}

/// Where the broker told nothing of a subscription, why.
async fn say_why_not(subscriptions: &Subscriptions, views: &[View]) {
    let silent = views.iter().find(|view| view.queue.is_none() && view.dead_letters.is_none());
    let Some(Ok(name)) = silent.map(|view| view.name.parse::<SubscriptionName>()) else { return };
    let Some(registrar) = &subscriptions.registrar else { return };
    if let Err(trouble) = registrar.desk().look(&name).await {
        eprintln!("warning: what the queues hold is not known: {}", with_causes(&trouble.into()));
    }
}

/// What came of a verb, with the connection to the broker ended in order.
async fn ended<T>(subscriptions: &Subscriptions, verb: impl Future<Output = Result<T, Error>>) -> anyhow::Result<T> {
    let outcome = verb.await;
    subscriptions.close().await;
    outcome.map_err(explained)
}

/// The registry, and the name if there is one to parse. All faults of the settings are told at once.
fn open(
    name: Option<&str>,
    servers: &SubscriptionServers,
    management: Option<&ManagementApi>,
    schema: Option<&Path>,
    may_be_first: bool,
    mut faults: Faults,
) -> anyhow::Result<(Option<SubscriptionName>, Subscriptions)> {
    let name = name.and_then(|name| faults.note("NAME", name.parse::<SubscriptionName>()));
    let db = servers.database.open(&mut faults);
    let broker = servers.amqp.open(&mut faults);
    let schema = config::schema(schema, &mut faults);
    let management = management.and_then(|api| match &broker {
        Some(broker) => api.open(broker, &mut faults),
        None => {
            api.check(&mut faults);
            None
        }
    });
    faults.none()?;
    let (Some(db), Some(broker), Some(schema)) = (db, broker, schema) else {
        unreachable!("no faults, so all are there")
    };
    let queries = db.pool("queries", 4, []);
    let broker = if may_be_first { broker.noting_missing(refuse_if_bound(&queries)) } else { broker };
    let desk = Some(Desk::new(broker.as_registry()));
    Ok((name, Subscriptions::new(&db, queries, Arc::new(schema), desk, management, IDLE_AFTER)))
}

/// The first registration of all may make the exchange. Once others were bound to it, it is the service that sees to what they lost.
fn refuse_if_bound(queries: &PgPool) -> impl Fn() -> BoxFuture<'static, anyhow::Result<()>> + use<> {
    let queries = queries.clone();
    move || {
        let queries = queries.clone();
        let looked = async move {
            let known = store::find(&queries, None).await?;
            ensure!(
                known.iter().all(|row| row.declared_revision == 0),
                "there are subscriptions; `tidings serve` and `tidings relay` make it for them"
            );
            Ok(())
        };
        looked.boxed()
    }
}

fn named(name: Option<SubscriptionName>) -> SubscriptionName {
    name.expect("a name that does not parse is a fault, and was told")
}

/// The error, and on a line of its own what can be done.
fn explained(error: Error) -> anyhow::Error {
    let hint = match &error {
        Error::Invalid(faults) | Error::NotReadable(faults) => return wrong_settings(faults).into(),
        Error::Taken(_) => "give the same --owner, choose another name, or delete it first",
        Error::NameOfExchange | Error::Adopted => "choose another name",
        Error::NotFound => "`tidings subscription list` tells what there is",
        Error::NotEmpty(Waiting { .. }) => "have them handled, or lose them with --discard-waiting",
        Error::Owing => "`tidings deletions overdue` tells which",
        Error::Busy => "try again",
        Error::Differs(_) => "nothing was changed",
        Error::Undeclared(Trouble::Refused(_)) => {
            "it is registered; give the broker's user the right, and the running service declares it"
        }
        Error::Undeclared(_) => "it is registered; the running service declares it, as soon as its broker is there",
        Error::Database(trouble) => trouble.advice(),
        Error::Broker(_) | Error::NoBroker => {
            "nothing was changed; is the broker up, and TIDINGS_EXCHANGE as it is for the service?"
        }
        Error::Full => "delete some",
    };
    let error = match error {
        Error::Database(trouble) => trouble.report(),
        error => with_causes(&error.into()),
    };
    anyhow!("{error}\nhint: {hint}")
}

/// What is wrong with a registration, by the flags that say it.
fn wrong_settings(faults: &[Fault]) -> WrongSettings {
    let mut settings = Faults::default();
    for fault in faults {
        let setting = match fault.pointer.split('/').nth(1).unwrap_or_default() {
            "" => "--key or --field",
            "routing_keys" => "--key",
            "fields" => "--field",
            "expires_after_s" => "--expires-after",
            "owner" => "--owner",
            "purpose" => "--purpose",
            _ => "--client",
        };
        settings.note::<(), _>(setting, Err(&fault.detail));
    }
    settings.none().expect_err("an invalid registration has faults")
}

fn print_json(data: &impl Serialize) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    serde_json::to_writer_pretty(&mut out, data)?;
    Ok(out.write_all(b"\n")?)
}

fn print(view: &View, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(view);
    }
    let serde_json::Value::Object(members) = serde_json::to_value(view)? else { unreachable!("a view is an object") };
    let mut out = stdout().lock();
    for (member, value) in members {
        writeln!(out, "{member:18} {}", readable(&value))?;
    }
    Ok(())
}

/// A JSON value as a person would write it.
fn readable(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(readable).collect::<Vec<_>>().join(", "),
        Value::Object(members) => {
            let members = members.iter().map(|(name, value)| format!("{name} {}", readable(value)));
            members.collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// What the broker tells, or not.
fn figure(told: Option<impl ToString>) -> String {
    told.map_or_else(|| "?".to_owned(), |told| told.to_string())
}

fn print_table(views: &[View]) -> anyhow::Result<()> {
    let mut rows = vec![["NAME", "STATE", "READY", "CONSUMERS", "DEAD", "OWNER", "WOKEN BY"].map(str::to_owned)];
    rows.extend(views.iter().map(|view| {
        let woken_by = view.routing_keys.iter().chain(&view.fields).map(String::as_str).collect::<Vec<_>>().join(",");
        [
            view.name.clone(),
            readable(&serde_json::to_value(view.state).unwrap_or_default()),
            figure(view.queue.as_ref().map(|queue| queue.ready)),
            figure(view.queue.as_ref().map(|queue| queue.consumers)),
            figure(view.dead_letters),
            view.owner.clone(),
            woken_by,
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..7).map(width).collect();
    let mut out = stdout().lock();
    for row in &rows {
        let line: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", line.join("  ").trim_end())?;
    }
    Ok(())
}

fn print_unregistered(queues: Option<&[Unregistered]>) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    for found in queues.unwrap_or_default() {
        let [ready, consumers] = [found.ready, found.consumers].map(figure);
        writeln!(out, "unregistered: {} ({ready} ready, {consumers} consumers)", found.queue)?;
    }
    Ok(())
}
