//! Import: how fast an existing user base comes in.
//!
//! The limit writes the same users and their events into the same tables, a thousand a statement, over as many connections as is best. It
//! parses, validates and answers nothing, and checks nobody's key; `tidings import` sends them in batches and gets an
//! answer to each.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::ensure;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::{
    house::House,
    publishers::TRACE,
    report::{Findings, Goal, Row},
    scratch::{Scratch, user},
    service::{Relay, Service},
    settings::Settings,
};

const USERS: u64 = 100_000;
const FULL_USERS: u64 = 1_000_000;
/// Users in one statement of the limit.
const STATEMENT: u64 = 1_000;
/// Among which the best is looked for: connections of the limit, and users that the import sends at once.
const CONNECTIONS: [u64; 4] = [1, 2, 4, 8];
const AT_ONCE: [u64; 3] = [256, 1_000, 2_000];
/// An import and its limit take about so long.
const TURN: u64 = 25;

const INSERT: &str = "
with made as (
  insert into users (id, version, profile, external_id, created_at, updated_at)
  select id, 1, profile::json, external_id, now(), now()
    from unnest($1::uuid[], $2::text[], $3::text[]) as row (id, profile, external_id)
  returning id
)
insert into outbox (message_id, event, user_id, version, changed_fields, traceparent)
select gen_random_uuid(), 'user.created', id, 1, '[]', $4
  from made
";

pub fn turns(settings: &Settings) -> u64 {
    (users(settings) / USERS * TURN).div_ceil(settings.seconds)
}

fn users(settings: &Settings) -> u64 {
    if settings.full { FULL_USERS } else { USERS }
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let database = house.empty_database("import").await?;
    let service = house.serve(&database, Relay::Off).await?;
    let contest = Contest {
        house,
        database: &database,
        users: users(&house.settings),
        lines: Lines::write(users(&house.settings))?,
    };
    let connections = contest.best_insert().await?;
    let at_once = contest.best_import(&service).await?;
    let limit = format!("insert, {connections} connections");
    let mut row = Row::new(format!("{} users, {at_once} at once", contest.users), "1/s")
        .limit(&limit)
        .goal(Goal::RatioAtLeast(0.7));
    for round in 1..=house.settings.rounds {
        eprintln!("bench: import, round {round} of {}", house.settings.rounds);
        row.add(contest.import(&service, at_once).await?, contest.insert(connections).await?);
    }
    Ok(Findings { rows: vec![row], ..Findings::default() })
}

struct Contest<'a> {
    house: &'a House,
    database: &'a Scratch,
    users: u64,
    lines: Lines,
}

impl Contest<'_> {
    /// Users a second.
    async fn import(&self, service: &Service, at_once: u64) -> anyhow::Result<f64> {
        self.empty().await?;
        let (url, at_once) = (format!("http://{}", service.address), at_once.to_string());
        let arguments = ["import", self.lines.path(), "--restart", "--url", &url, "--concurrency", &at_once];
        let began = Instant::now();
        self.house.deployment().run(self.database, &arguments).await?;
        let took = began.elapsed();
        self.check().await?;
        Ok(self.users as f64 / took.as_secs_f64())
    }

    async fn best_import(&self, service: &Service) -> anyhow::Result<u64> {
        let mut tried = vec![];
        for at_once in AT_ONCE {
            tried.push((self.import(service, at_once).await?, at_once));
        }
        Ok(best("at once", &tried))
    }

    async fn best_insert(&self) -> anyhow::Result<u64> {
        let mut tried = vec![];
        for connections in CONNECTIONS {
            tried.push((self.insert(connections).await?, connections));
        }
        Ok(best("connections", &tried))
    }

    /// Users a second.
    async fn insert(&self, connections: u64) -> anyhow::Result<f64> {
        self.empty().await?;
        // What is sent was made beforehand.
        let mut shares = vec![];
        for share in 0..connections {
            let batches: Vec<Batch> =
                (share..self.users / STATEMENT).step_by(usize::try_from(connections)?).map(Batch::new).collect();
            shares.push((self.database.connect().await?, batches));
        }
        let (began, mut writers) = (Instant::now(), JoinSet::new());
        for (connection, batches) in shares {
            writers.spawn(insert(connection, batches));
        }
        for outcome in writers.join_all().await {
            outcome?;
        }
        let took = began.elapsed();
        self.check().await?;
        Ok(self.users as f64 / took.as_secs_f64())
    }

    async fn empty(&self) -> anyhow::Result<()> {
        self.database.run("truncate users, changes, outbox").await?;
        self.database.run("checkpoint").await
    }

    /// Everybody came in, and is to be told.
    async fn check(&self) -> anyhow::Result<()> {
        let mut connection = self.database.connect().await?;
        let count = "select (select count(*) from users), (select count(*) from outbox)";
        let (users, events): (i64, i64) = sqlx::query_as(count).fetch_one(&mut connection).await?;
        ensure!([users, events] == [i64::try_from(self.users)?; 2], "{users} users came in, and {events} events");
        Ok(connection.close().await?)
    }
}

/// The number of the fastest.
fn best(what: &str, tried: &[(f64, u64)]) -> u64 {
    for (per_second, number) in tried {
        eprintln!("bench: import, {number} {what}: {per_second:.0}/s");
    }
    tried.iter().max_by(|one, other| one.0.total_cmp(&other.0)).map_or(1, |(_, number)| *number)
}

/// Of one statement.
struct Batch {
    ids: Vec<Uuid>,
    profiles: Vec<String>,
    external_ids: Vec<String>,
}

impl Batch {
    fn new(number: u64) -> Self {
        let users = number * STATEMENT..(number + 1) * STATEMENT;
        Self {
            ids: users.clone().map(|n| Uuid::new_v5(&user(n), b"import")).collect(),
            profiles: users.clone().map(profile).collect(),
            external_ids: users.map(external_id).collect(),
        }
    }
}

async fn insert(mut connection: PgConnection, batches: Vec<Batch>) -> anyhow::Result<()> {
    for Batch { ids, profiles, external_ids } in batches {
        sqlx::query(INSERT).bind(ids).bind(profiles).bind(external_ids).bind(TRACE).execute(&mut connection).await?;
    }
    Ok(connection.close().await?)
}

/// The file to import. It goes when this is dropped, with its journal.
struct Lines(PathBuf);

impl Lines {
    fn write(users: u64) -> anyhow::Result<Self> {
        let lines = Self(std::env::temp_dir().join(format!("tidings-bench-{}.jsonl", Uuid::new_v4())));
        let mut file = BufWriter::new(File::create(&lines.0)?);
        for n in 0..users {
            writeln!(file, r#"{{"external_id":"{}","profile":{}}}"#, external_id(n), profile(n))?;
        }
        file.flush()?;
        Ok(lines)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        for file in [self.0.as_path(), Path::new(&format!("{}.import", self.path()))] {
            // The machine clears up what we cannot.
            let _ = std::fs::remove_file(file);
        }
    }
}

fn external_id(n: u64) -> String {
    format!("E-{n:07}")
}

/// As a company has it of its people: a dozen fields, some of which most have in common.
fn profile(n: u64) -> String {
    let pick = |from: &[&str]| from[usize::try_from(n % from.len() as u64).unwrap_or_default()].to_owned();
    let first = pick(&["Ana", "Bo", "Chidi", "Dana", "Emre", "Fatou", "Goran", "Hye-jin", "Ines", "Jürgen", "Kwame"]);
    let last = format!("{}{n}", pick(&["Example", "Sample", "Muster", "Ejemplo", "Primer", "Voorbeeld", "Exemple"]));
    let city = pick(&["Berlin", "Lyon", "Porto", "Gdańsk", "Tartu"]);
    json!({
        "first_name": first,
        "last_name": last,
        "email": format!("user{n}@example.org"),
        "phone": format!("+49 30 {n:07}"),
        "job_title": pick(&["Editor", "Author", "Engineer", "Clerk", "Director", "Head of Something Long"]),
        "company": "Example Ltd",
        "department": pick(&["Sales", "Research", "Production", "Finance"]),
        "address": format!("{} Example Street", n % 200 + 1),
        "city": city,
        "country": pick(&["DE", "FR", "PT", "PL", "EE"]),
        "language": pick(&["de", "fr", "es", "pl", "it"]),
        "timezone": "Europe/Berlin",
        "social": { "mastodon": format!("@user{n}@example.org") },
    })
    .to_string()
}
