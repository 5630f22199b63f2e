//! Invoices: an application that joins while the others run, without a change to anything. It needs where people live, and it needs
//! those too who were there before it.
//!
//! The owner's operator registers it once, which makes its queue; it declares nothing itself. Then everybody who is there already is
//! told to that queue alone:
//!
//! ```sh
//! ./dev tidings subscription put invoices --key user.created --key user.deleted \
//!       --field address --field city --field postcode --field country --owner team-invoices --purpose "addresses on invoices"
//! ./dev app invoices run &
//! ./dev tidings subscription backfill start invoices --follow
//! ./dev app invoices issue USER_ID 4900
//! ```
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../app/mod.rs"]
mod app;

use anyhow::Context;
use clap::{Parser, Subcommand};
use serde_json::{Map, Value};
use sqlx::{PgPool, types::Json};
use tidings_sdk::{
    consumer::{Failure, Handler, News},
    owner::Latest,
};
use uuid::Uuid;

/// An invoice keeps the address that it was issued to; the row in `debtors` follows the person.
const TABLES: &str = "
create table if not exists debtors (
  id uuid primary key,
  version bigint not null,
  address jsonb
);
create table if not exists invoices (
  id bigint generated always as identity primary key,
  debtor uuid not null,
  cents bigint not null check (cents > 0),
  address jsonb not null
);
";

/// Nobody is moved back to where he lived before, unless a backfill says so of the version ($4) that was known when the owner was asked:
/// the owner itself may have been restored from a backup.
const MOVE: &str = "
insert into debtors as known (id, version, address)
values ($1, $2, $3)
on conflict (id) do update
   set version = excluded.version, address = excluded.address
 where known.version < excluded.version
    or known.version = $4
";

const KNOWN: &str = "select version from debtors where id = $1";

const ISSUE: &str = "
insert into invoices (debtor, cents, address)
select id, $2, address from debtors where id = $1 and address is not null
returning id
";

const ADDRESS: [&str; 4] = ["address", "city", "postcode", "country"];

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Listen, and follow people to where they live.
    Run,
    /// Issue an invoice, in cents.
    Issue { user: Uuid, cents: i64 },
    /// How many addresses are known.
    Count,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let debtors = Debtors { pool: app::database(TABLES).await? };
    match cli.command {
        Command::Run => {
            app::log();
            let subscription = app::subscription("invoices", &["user.created", "user.deleted"], &ADDRESS)?;
            app::consumer(subscription, app::owner()?)?.registered().run(debtors, app::stop()?).await?;
            Ok(())
        }
        Command::Issue { user, cents } => debtors.issue(user, cents).await,
        Command::Count => debtors.count().await,
    }
}

struct Debtors {
    pool: PgPool,
}

impl Handler for Debtors {
    async fn changed(&self, news: News) -> Result<(), Failure> {
        let over = if news.is_backfill() { self.known(news.user_id).await? } else { None };
        Ok(self.follow(&news.latest().await?, over).await?)
    }
}

impl Debtors {
    async fn known(&self, user: Uuid) -> sqlx::Result<Option<i64>> {
        sqlx::query_scalar(KNOWN).bind(user).fetch_optional(&self.pool).await
    }

    async fn follow(&self, latest: &Latest, over: Option<i64>) -> sqlx::Result<()> {
        let address = match latest {
            Latest::Living(user) => Some(Json(address(&user.profile))),
            Latest::Gone(_) => None,
        };
        let moved = sqlx::query(MOVE).bind(latest.id()).bind(latest.version()).bind(address).bind(over);
        moved.execute(&self.pool).await.map(drop)
    }

    async fn issue(&self, user: Uuid, cents: i64) -> anyhow::Result<()> {
        let id: Option<i64> = sqlx::query_scalar(ISSUE).bind(user).bind(cents).fetch_optional(&self.pool).await?;
        println!("invoice {}", id.context("this person is not known here")?);
        Ok(())
    }

    async fn count(&self) -> anyhow::Result<()> {
        let count = "select count(*) from debtors where address is not null";
        let known: i64 = sqlx::query_scalar(count).fetch_one(&self.pool).await?;
        println!("{known}");
        Ok(())
    }
}

/// What an invoice needs of a profile, and no more.
fn address(profile: &Map<String, Value>) -> Map<String, Value> {
    ADDRESS
        .iter()
        .filter_map(|field| profile.get_key_value(*field))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
