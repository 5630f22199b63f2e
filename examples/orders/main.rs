//! Orders: an application that does one thing when a person is deleted. His pending orders are cancelled.
//!
//! ```sh
//! ./dev app orders run &
//! ./dev app orders place USER_ID teapot
//! ./dev app orders list
//! ```
//!
//! It is woken for `user.deleted` alone, and asks the owner whether it is so: a message may be forged, or from before a restore, and what is
//! cancelled stays cancelled.
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../app/mod.rs"]
mod app;

use clap::{Parser, Subcommand};
use sqlx::PgPool;
use tidings_sdk::{
    consumer::{CatchUp, Failure, Gap, Handler, News},
    owner::{FetchError, Latest, Owner},
};
use uuid::Uuid;

/// The row in `people` is what placing and cancelling wait for each other on: no order slips in between.
const TABLES: &str = "
create table if not exists people (
  id uuid primary key,
  is_gone boolean not null
);
create table if not exists orders (
  id bigint generated always as identity primary key,
  person uuid not null references people,
  item text not null,
  state text not null default 'pending' check (state in ('pending', 'shipped', 'cancelled'))
);
create index if not exists orders_pending on orders (person) where state = 'pending';
create or replace function forget(gone uuid) returns bigint language plpgsql as $$
declare
  cancelled bigint;
begin
  insert into people values (gone, true) on conflict (id) do update set is_gone = true;
  update orders set state = 'cancelled' where person = gone and state = 'pending';
  get diagnostics cancelled = row_count;
  return cancelled;
end
$$;
";

const PLACE: &str = "
with buyer as (
  insert into people values ($1, false)
  on conflict (id) do update set is_gone = people.is_gone
  returning id, is_gone
)
insert into orders (person, item)
select id, $2 from buyer where not is_gone
returning id
";

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Listen, and cancel what is to be cancelled.
    Run,
    /// Place an order.
    Place { user: Uuid, item: String },
    /// Show all orders.
    List,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let orders = Orders { pool: app::database(TABLES).await? };
    match cli.command {
        Command::Run => run(orders).await,
        Command::Place { user, item } => orders.place(user, &item).await,
        Command::List => orders.list().await,
    }
}

async fn run(orders: Orders) -> anyhow::Result<()> {
    app::log();
    let owner = app::owner()?;
    let subscription = app::subscription("orders", &["user.deleted"], &[])?;
    let missed = Missed { orders: orders.clone(), owner: owner.clone() };
    app::consumer(subscription, owner)?.catch_up(missed).run(orders, app::stop()?).await?;
    Ok(())
}

#[derive(Clone)]
struct Orders {
    pool: PgPool,
}

impl Handler for Orders {
    async fn deleted(&self, news: News) -> Result<(), Failure> {
        if let Latest::Gone(_) = news.latest().await? {
            self.forget(news.user_id).await?;
        }
        Ok(())
    }
}

impl Orders {
    /// One statement, and harmless when it is repeated.
    async fn forget(&self, person: Uuid) -> sqlx::Result<()> {
        let cancelled: i64 = sqlx::query_scalar("select forget($1)").bind(person).fetch_one(&self.pool).await?;
        tracing::info!(%person, cancelled, "forgotten");
        Ok(())
    }

    async fn place(&self, person: Uuid, item: &str) -> anyhow::Result<()> {
        let id: Option<i64> = sqlx::query_scalar(PLACE).bind(person).bind(item).fetch_optional(&self.pool).await?;
        let id = id.ok_or_else(|| anyhow::anyhow!("this person is gone"))?;
        println!("order {id}");
        Ok(())
    }

    async fn list(&self) -> anyhow::Result<()> {
        let orders: Vec<(i64, Uuid, String, String)> =
            sqlx::query_as("select id, person, item, state from orders order by id").fetch_all(&self.pool).await?;
        for (id, person, item, state) in orders {
            println!("{id}\t{person}\t{state}\t{item}");
        }
        Ok(())
    }

    async fn waiting(&self) -> sqlx::Result<Vec<Uuid>> {
        sqlx::query_scalar("select distinct person from orders where state = 'pending'").fetch_all(&self.pool).await
    }
}

/// What may have been missed: only people with something to cancel matter.
struct Missed {
    orders: Orders,
    owner: Owner,
}

impl CatchUp for Missed {
    async fn catch_up(&self, _: Gap) -> Result<(), Failure> {
        for person in self.orders.waiting().await? {
            match self.owner.latest(person, 1).await {
                Ok(Latest::Gone(_)) => self.orders.forget(person).await?,
                // Nobody ever had the id that somebody mistyped.
                Ok(Latest::Living(_)) | Err(FetchError::UnknownUser) => {}
                Err(outage) if outage.is_outage() => return Err(outage.into()),
                // One whom the owner cannot show keeps nobody else from being caught up with.
                Err(refusal) => tracing::warn!(%person, "passed over: {refusal}"),
            }
        }
        Ok(())
    }
}
