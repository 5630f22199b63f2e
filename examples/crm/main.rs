//! CRM: an application that needs everybody, and to search them. It keeps a full mirror in its own database.
//!
//! ```sh
//! ./dev app crm run &
//! ./dev app crm find city=Riga
//! ./dev app crm verify --repair
//! ```
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../app/mod.rs"]
mod app;

use anyhow::Context;
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use sqlx::PgPool;
use tidings_sdk::mirror::Mirror;
use uuid::Uuid;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Listen, and keep the mirror level.
    Run {
        /// Do not ask the owner for what was missed while nobody listened; rely on the queue alone.
        #[arg(long)]
        no_catch_up: bool,
    },
    /// Search the mirror: FIELD=VALUE.
    Find { wanted: String },
    /// Compare the mirror with the owner.
    Verify {
        /// Mend what differs.
        #[arg(long)]
        repair: bool,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let (mirror, pool) = (Mirror::new(), app::database("").await?);
    mirror.prepare(&pool).await?;
    match cli.command {
        Command::Run { no_catch_up } => run(mirror, pool, !no_catch_up).await,
        Command::Find { wanted } => find(&pool, &wanted).await,
        Command::Verify { repair } => verify(&mirror, &pool, repair).await,
    }
}

async fn run(mirror: Mirror, pool: PgPool, catches_up: bool) -> anyhow::Result<()> {
    app::log();
    let owner = app::owner()?;
    let keeper = mirror.keeper(pool, owner.clone());
    let mut consumer = app::consumer(app::subscription("crm", &["#"], &[])?, owner)?;
    if catches_up {
        consumer = consumer.catch_up(keeper.clone());
    }
    consumer.run(keeper, app::stop()?).await?;
    Ok(())
}

/// Ids and not profiles: whoever wants a profile knows where to look.
async fn find(pool: &PgPool, wanted: &str) -> anyhow::Result<()> {
    let (field, value) = wanted.split_once('=').context("expected FIELD=VALUE")?;
    let like = json!({ field: Value::from(value) });
    let found: Vec<(Uuid, i64)> =
        sqlx::query_as("select id, version from tidings_users where profile @> $1 order by id")
            .bind(like)
            .fetch_all(pool)
            .await?;
    for (id, version) in found {
        println!("{id}\t{version}");
    }
    Ok(())
}

async fn verify(mirror: &Mirror, pool: &PgPool, repair: bool) -> anyhow::Result<()> {
    let owner = app::owner()?;
    let difference = mirror.verify(pool, &owner).await?;
    println!(
        "{} missing, {} stale, {} ghosts",
        difference.missing.len(),
        difference.stale.len(),
        difference.ghosts.len()
    );
    if repair {
        mirror.repair(pool, &owner, &difference).await?;
    }
    Ok(())
}
