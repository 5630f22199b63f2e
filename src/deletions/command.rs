//! `tidings deletions ..`: who has confirmed a deletion, for operators, directly on the database.

use std::{
    io::{Write, stdout},
    str::FromStr,
};

use anyhow::anyhow;
use uuid::Uuid;

use super::{
    Confirmation, Deletion, Error, Ledger, Overdue, Place, State,
    http::{Late, Shown},
};
use crate::{
    config::{DeletionsAction, DeletionsServers, Faults},
    telemetry::rfc3339,
};

const PAGE: i64 = 500;

/// # Errors
/// When what was asked for cannot be told.
pub async fn run(action: DeletionsAction, mut faults: Faults) -> anyhow::Result<()> {
    match action {
        DeletionsAction::Show(asked) => {
            let user = faults.note("USER_ID", Uuid::from_str(&asked.user_id).map_err(|_| "expected a UUID"));
            let ledger = open(&asked.servers, faults)?;
            let Some(user) = user else { unreachable!("no faults, so it is there") };
            let deletion = ledger.find(user).await.map_err(explained)?;
            if asked.servers.json { print_json(&Shown::from(deletion)) } else { print(&deletion) }
        }
        DeletionsAction::Overdue(asked) => {
            let ledger = open(&asked.servers, faults)?;
            let mut after = Place::START;
            let mut told = 0;
            loop {
                let page = ledger.overdue(after, PAGE).await.map_err(explained)?;
                let Some(last) = page.last() else { break };
                after = Place { deleted_at: last.deleted_at, user_id: last.user_id };
                told += page.len();
                page.into_iter().try_for_each(|late| print_late(late, asked.servers.json))?;
            }
            eprintln!("{told} deletions are overdue");
            Ok(())
        }
    }
}

fn open(servers: &DeletionsServers, mut faults: Faults) -> anyhow::Result<Ledger> {
    let (db, deadline) = (servers.database.open(&mut faults), servers.erasure.parse(&mut faults));
    faults.none()?;
    let (Some(db), Some(deadline)) = (db, deadline) else { unreachable!("no faults, so all are there") };
    Ok(Ledger::new(&db, deadline))
}

fn explained(error: Error) -> anyhow::Error {
    match error {
        Error::Query(trouble) => anyhow!("{}\nhint: {}", trouble.report(), trouble.advice()),
        error => error.into(),
    }
}

fn print_json(data: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    serde_json::to_writer(&mut out, data)?;
    Ok(out.write_all(b"\n")?)
}

fn print(deletion: &Deletion) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}  version {}, deleted {}", deletion.user_id, deletion.version, rfc3339(deletion.deleted_at))?;
    for Confirmation { subscription, state } in &deletion.confirmations {
        match state {
            State::Confirmed { at, how } => {
                writeln!(out, "{subscription}  confirmed {} ({})", rfc3339(*at), how.as_str())?;
            }
            State::Pending => writeln!(out, "{subscription}  pending")?,
            State::Overdue => writeln!(out, "{subscription}  overdue")?,
        }
    }
    Ok(())
}

fn print_late(late: Overdue, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return print_json(&Late::from(late));
    }
    let Overdue { user_id, deleted_at, subscriptions, .. } = late;
    Ok(writeln!(stdout().lock(), "{user_id}  deleted {}: {}", rfc3339(deleted_at), subscriptions.join(", "))?)
}
