//! `tidings client ..`: who may ask, for operators, directly on the database.
//!
//! Promise: a key stands alone on stdout, once; talk goes to stderr; a refusal says what can be done about it.

use std::{
    collections::BTreeSet,
    fmt::Display,
    io::{Write, stdout},
    str::FromStr,
    time::Duration,
};

use anyhow::{anyhow, ensure};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use sqlx::PgConnection;
use tidings_sdk::envelope::FieldName;
use time::OffsetDateTime;

use super::{
    key::Key,
    model::{Client, NewClient, Scope},
    store::{self, KeyFacts},
};
use crate::{
    config::{self, ClientAction, ClientCreate, ClientRevoke, ClientRotate, Faults},
    db::{Db, Trouble},
    profile::Schema,
    telemetry::rfc3339,
};

/// # Errors
/// When what was asked for was not done.
pub async fn run(action: ClientAction, mut faults: Faults) -> anyhow::Result<()> {
    match action {
        ClientAction::Create(create) => self::create(create, faults).await,
        ClientAction::Rotate(rotate) => self::rotate(rotate, faults).await,
        ClientAction::Revoke(revoke) => self::revoke(revoke, faults).await,
        ClientAction::List(list) => {
            let db = list.database.open(&mut faults);
            faults.none()?;
            let mut connection = open(db).await?;
            let clients = asked(store::find(&mut connection).await)?;
            let clients: Vec<Client> = clients.into_iter().map(Client::effective).collect();
            let keys = asked(store::keys(&mut connection).await)?;
            if list.json { print_json(&clients, &keys) } else { print_table(&clients, &keys) }
        }
    }
}

async fn create(asked_for: ClientCreate, mut faults: Faults) -> anyhow::Result<()> {
    let scopes: BTreeSet<Scope> = parsed("--scope", &asked_for.scopes, &mut faults);
    for (setting, fields) in [("--field", &asked_for.fields), ("--write-field", &asked_for.write_fields)] {
        if scopes.contains(&Scope::Admin) && !fields.is_empty() {
            faults.note::<(), _>(setting, Err("admin is every field: leave this out, or give other scopes"));
        }
    }
    let client = faults.note("NAME", NewClient::named(&asked_for.name, scopes));
    let schema = config::schema(asked_for.profile_schema.as_deref(), &mut faults);
    let fields = fields("--field", &asked_for.fields, schema.as_ref(), &mut faults);
    let write_fields = self::fields("--write-field", &asked_for.write_fields, schema.as_ref(), &mut faults);
    let expires_after = duration("--expires-after", asked_for.expires_after.as_deref(), &mut faults);
    let rate = faults.note("--rate-limit", asked_for.rate_limit.as_deref().map(str::parse).transpose()).flatten();
    let db = asked_for.database.open(&mut faults);
    faults.none()?;
    let (purpose, takes_tokens) = (asked_for.purpose, asked_for.no_key);
    let client = NewClient { fields, write_fields, rate, purpose, takes_tokens, ..client.expect("no faults") };

    let mut connection = open(db).await?;
    let created = asked(store::create(&mut connection, &client).await)?;
    ensure!(created, "there is a client {} already\nhint: `tidings client rotate` gives it another key", client.name);
    if asked_for.no_key {
        eprintln!("{} is made, without a key: it comes with tokens", client.name);
        return Ok(());
    }
    let (key, text) = Key::generate()?;
    issue(&mut connection, &client.name, &key, expires_after).await?;
    print_key(&client.name, &key, &text)
}

async fn rotate(asked_for: ClientRotate, mut faults: Faults) -> anyhow::Result<()> {
    let overlap = duration("--overlap", Some(&asked_for.overlap), &mut faults);
    let expires_after = duration("--expires-after", asked_for.expires_after.as_deref(), &mut faults);
    let db = asked_for.database.open(&mut faults);
    faults.none()?;
    let mut connection = open(db).await?;
    let (key, text) = Key::generate()?;
    issue(&mut connection, &asked_for.name, &key, expires_after).await?;
    let overlap = overlap.expect("no faults, and it has a default");
    let retired = asked(store::retire(&mut connection, &asked_for.name, &key.id, overlap).await)?;
    if retired > 0 {
        eprintln!("the key before goes on for {}", asked_for.overlap);
    }
    print_key(&asked_for.name, &key, &text)
}

async fn revoke(asked_for: ClientRevoke, mut faults: Faults) -> anyhow::Result<()> {
    let db = asked_for.database.open(&mut faults);
    faults.none()?;
    let mut connection = open(db).await?;
    let name = &asked_for.name;
    match &asked_for.key {
        Some(key) => {
            let revoked = asked(store::revoke_key(&mut connection, name, key).await)?;
            ensure!(revoked, "{name} has no such key\nhint: `tidings client list` tells which it has");
            eprintln!("the key {key} is revoked: within a second every instance refuses it");
        }
        None => {
            let revoked = asked(store::revoke(&mut connection, name).await)?;
            let is_known =
                revoked || asked(store::find(&mut connection).await)?.iter().any(|known| known.name == *name);
            ensure!(is_known, "there is no client {name}\nhint: `tidings client list` tells which there are");
            match revoked {
                true => eprintln!("{name} is revoked: within a second every instance refuses it"),
                false => eprintln!("{name} was revoked before"),
            }
        }
    }
    Ok(())
}

async fn issue(
    connection: &mut PgConnection,
    client: &str,
    key: &Key,
    expires_after: Option<Duration>,
) -> anyhow::Result<()> {
    let issued = asked(store::issue(&mut *connection, client, key, expires_after).await)?;
    ensure!(
        issued,
        "{client} gets no key: there is no such client, or it has two keys already\n\
         hint: `tidings client list` tells; `tidings client revoke {client} --key ID` makes room"
    );
    Ok(())
}

async fn open(db: Option<Db>) -> anyhow::Result<PgConnection> {
    let db = db.ok_or_else(|| anyhow!("no database"))?;
    db.maintenance("client command").await.map_err(explained)
}

fn asked<T>(outcome: sqlx::Result<T>) -> anyhow::Result<T> {
    outcome.map_err(|error| explained(error.into()))
}

fn explained(trouble: Trouble) -> anyhow::Error {
    anyhow!("{}\nhint: {}", trouble.report(), trouble.advice())
}

fn parsed<T>(setting: &str, texts: &[String], faults: &mut Faults) -> BTreeSet<T>
where
    T: FromStr + Ord,
    T::Err: Display,
{
    texts.iter().filter_map(|text| faults.note(setting, text.parse())).collect()
}

/// `None` when none is named.
fn fields(
    setting: &str,
    names: &[String],
    schema: Option<&Schema>,
    faults: &mut Faults,
) -> Option<BTreeSet<FieldName>> {
    let fields: BTreeSet<FieldName> = parsed(setting, names, faults);
    for field in fields.iter().filter(|field| schema.is_some_and(|schema| !schema.has(field))) {
        faults.note::<(), _>(setting, Err(format!("the profile schema has no field {field}")));
    }
    (!fields.is_empty()).then_some(fields)
}

fn duration(setting: &str, text: Option<&str>, faults: &mut Faults) -> Option<Duration> {
    faults.note(setting, text.map(config::duration).transpose()).flatten()
}

fn print_key(client: &str, key: &Key, text: &SecretString) -> anyhow::Result<()> {
    eprintln!("{client} has the key {}; it is shown this once:", key.id);
    writeln!(stdout().lock(), "{}", text.expose_secret()).map_err(|error| {
        anyhow!(
            "it could not be written, and is lost: {error}\nhint: `tidings client revoke {client} --key {}`",
            key.id
        )
    })
}

#[derive(Serialize)]
struct Shown<'a> {
    name: &'a str,
    scopes: &'a [String],
    fields: Option<&'a [String]>,
    write_fields: Option<&'a [String]>,
    purpose: Option<&'a str>,
    rate_limit: Option<&'a str>,
    takes_tokens: bool,
    subscriptions: &'a [String],
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    revoked_at: Option<OffsetDateTime>,
    keys: Vec<ShownKey<'a>>,
}

#[derive(Serialize)]
struct ShownKey<'a> {
    id: &'a str,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    last_used_at: Option<OffsetDateTime>,
}

fn print_json(clients: &[Client], keys: &[KeyFacts]) -> anyhow::Result<()> {
    let shown: Vec<Shown<'_>> = clients
        .iter()
        .map(|client| Shown {
            name: &client.name,
            scopes: &client.scopes,
            fields: client.fields.as_deref(),
            write_fields: client.write_fields.as_deref(),
            purpose: client.purpose.as_deref(),
            rate_limit: client.rate_limit.as_deref(),
            takes_tokens: client.takes_tokens,
            subscriptions: &client.subscriptions,
            created_at: client.created_at,
            revoked_at: client.revoked_at,
            keys: keys
                .iter()
                .filter(|key| key.client == client.name)
                .map(|key| ShownKey {
                    id: &key.id,
                    created_at: key.created_at,
                    expires_at: key.expires_at,
                    last_used_at: key.last_used_at,
                })
                .collect(),
        })
        .collect();
    let mut out = stdout().lock();
    serde_json::to_writer_pretty(&mut out, &shown)?;
    Ok(out.write_all(b"\n")?)
}

fn print_table(clients: &[Client], keys: &[KeyFacts]) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    for client in clients {
        let fields = client.fields.as_ref().map_or_else(|| "every field".to_owned(), |fields| fields.join(","));
        let state = match client {
            Client { revoked_at: Some(_), .. } => "  revoked",
            Client { takes_tokens: true, .. } => "  takes tokens",
            _ => "",
        };
        writeln!(out, "{}  {}  {fields}{state}", client.name, client.scopes.join(","))?;
        for key in keys.iter().filter(|key| key.client == client.name) {
            let used = key.last_used_at.map_or_else(|| "never used".to_owned(), |at| format!("used {}", rfc3339(at)));
            let ends = match key.expires_at {
                None => String::new(),
                Some(at) if key.is_expired => format!(", expired {}", rfc3339(at)),
                Some(at) => format!(", expires {}", rfc3339(at)),
            };
            writeln!(out, "  {}  made {}, {used}{ends}", key.id, rfc3339(key.created_at))?;
        }
    }
    Ok(())
}
