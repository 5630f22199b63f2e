//! Events: attendee lists that show name and job title. It keeps neither: it fetches them when a list is asked for, and holds them
//! in a cache that a notice empties. It is woken for the fields that it shows, and for nothing else that happens to a person. Each process
//! has a cache of its own, and so needs a subscription of its own (`TIDINGS_SUBSCRIPTION`): of those that share one a notice reaches one.
//!
//! ```sh
//! ./dev app events run &                                                # prints its address
//! curl -X PUT http://127.0.0.1:8081/events/gala/attendees/USER_ID
//! curl http://127.0.0.1:8081/events/gala/attendees
//! ```
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../app/mod.rs"]
mod app;

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, put},
};
use clap::{Parser, Subcommand};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use sqlx::PgPool;
use tidings_sdk::{
    cache::Cache,
    consumer::{CatchUp, Failure, Gap, Handler, News},
    owner::{FetchError, Latest, Owner},
};
use tokio::net::TcpListener;
use uuid::Uuid;

const TABLES: &str = "
create table if not exists attendees (
  event text not null,
  person uuid not null,
  primary key (event, person)
);
create index if not exists attendees_person on attendees (person);
";

const SHOWN: [&str; 4] = ["first_name", "last_name", "full_name", "job_title"];
/// People whose names are held; those of the lists that are looked at.
const HELD: usize = 10_000;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the lists, and listen.
    Run {
        #[arg(long, default_value = "127.0.0.1:8081")]
        listen: String,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Command::Run { listen } = Cli::parse().command;
    app::log();
    let (owner, stop) = (app::owner()?, app::stop()?);
    let events =
        Events { pool: app::database(TABLES).await?, people: Cache::new(owner.clone(), HELD), owner: owner.clone() };
    let listener = TcpListener::bind(listen).await?;
    println!("events ready on http://{}", listener.local_addr()?);
    let lists = Router::new()
        .route("/events/{event}/attendees", get(attendees))
        .route("/events/{event}/attendees/{person}", put(attend))
        .with_state(events.clone());
    let serving = axum::serve(listener, lists).with_graceful_shutdown(stop.clone().cancelled_owned());
    let subscription = app::subscription("events", &["user.deleted"], &SHOWN)?;
    let listening = app::consumer(subscription, owner)?.catch_up(events.clone()).run(events, stop.clone());
    // Who cannot begin to listen does not serve either: what is held would never be found old.
    tokio::try_join!(async { anyhow::Ok(serving.await?) }, async { Ok(listening.await?) })?;
    Ok(())
}

#[derive(Clone)]
struct Events {
    pool: PgPool,
    people: Cache,
    owner: Owner,
}

impl Handler for Events {
    async fn updated(&self, news: News) -> Result<(), Failure> {
        self.people.heed(&news);
        Ok(())
    }

    async fn deleted(&self, news: News) -> Result<(), Failure> {
        self.people.heed(&news);
        // Nobody puts back on a list whom a forged message has struck from it.
        if let Latest::Gone(_) = news.latest().await? {
            self.strike(news.user_id).await?;
        }
        Ok(())
    }
}

impl CatchUp for Events {
    async fn catch_up(&self, _: Gap) -> Result<(), Failure> {
        self.people.clear();
        for person in self.everybody().await? {
            match self.owner.latest(person, 1).await {
                Ok(Latest::Gone(_)) => self.strike(person).await?,
                Ok(Latest::Living(_)) | Err(FetchError::UnknownUser) => {}
                Err(outage) if outage.is_outage() => return Err(outage.into()),
                // One whom the owner cannot show keeps nobody else from being caught up with.
                Err(refusal) => tracing::warn!(%person, "passed over: {refusal}"),
            }
        }
        Ok(())
    }
}

impl Events {
    /// Who is gone attends nothing.
    async fn strike(&self, person: Uuid) -> sqlx::Result<()> {
        sqlx::query("delete from attendees where person = $1").bind(person).execute(&self.pool).await.map(drop)
    }

    async fn everybody(&self) -> sqlx::Result<Vec<Uuid>> {
        sqlx::query_scalar("select distinct person from attendees").fetch_all(&self.pool).await
    }
}

/// What a list shows of a person.
#[derive(Serialize)]
struct Badge {
    name: Option<String>,
    job_title: Option<String>,
}

async fn attend(State(events): State<Events>, Path((event, person)): Path<(String, Uuid)>) -> StatusCode {
    let known = events.people.get(person).await;
    if !matches!(known, Ok(Latest::Living(_))) {
        return if known.is_ok() || known == Err(FetchError::UnknownUser) {
            StatusCode::NOT_FOUND
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
    }
    let attend = "insert into attendees values ($1, $2) on conflict do nothing";
    match sqlx::query(attend).bind(event).bind(person).execute(&events.pool).await {
        Ok(_) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn attendees(State(events): State<Events>, Path(event): Path<String>) -> Result<Json<Vec<Badge>>, StatusCode> {
    let unavailable = |_| StatusCode::SERVICE_UNAVAILABLE;
    let listed = "select person from attendees where event = $1 order by person";
    let people: Vec<Uuid> = sqlx::query_scalar(listed)
        .bind(event)
        .fetch_all(&events.pool)
        .await
        .map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let found: Vec<Latest> = stream::iter(people)
        .map(|person| events.people.get(person))
        .buffered(100)
        .try_collect()
        .await
        .map_err(unavailable)?;
    Ok(Json(found.into_iter().filter_map(Latest::living).map(|user| badge(&user)).collect()))
}

fn badge(user: &tidings_sdk::owner::User) -> Badge {
    let names: Vec<&str> = ["first_name", "last_name"].iter().filter_map(|field| user.text(field)).collect();
    let name = user.text("full_name").map(str::to_owned).or_else(|| (!names.is_empty()).then(|| names.join(" ")));
    Badge { name, job_title: user.text("job_title").map(str::to_owned) }
}
