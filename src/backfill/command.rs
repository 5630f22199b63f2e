//! `tidings subscription backfill ..`: for operators. It writes what is wanted into the database; a service that relays does it.

use std::{
    io::{Write, stdout},
    time::Duration,
};

use anyhow::ensure;
use tidings_sdk::subscription::SubscriptionName;
use tokio::time::sleep;

use super::{Action, Backfill, Backfills, Plan, Start, State, http::Progress};
use crate::{
    config::{BackfillAction, BackfillStart, Database, Faults},
    json::{Fault, MAX_FAULTS},
};

/// Between two looks of one who follows.
const LOOK: Duration = Duration::from_millis(500);

/// # Errors
/// When what was asked for was not done.
pub async fn run(action: BackfillAction, mut faults: Faults) -> anyhow::Result<()> {
    let (asked, action) = match action {
        BackfillAction::Start(asked) => return start(asked, faults).await,
        BackfillAction::Show(asked) => (asked, None),
        BackfillAction::Pause(asked) => (asked, Some(Action::Pause)),
        BackfillAction::Resume(asked) => (asked.backfill, Some(Action::Resume(asked.rate))),
        BackfillAction::Cancel(asked) => (asked, Some(Action::Cancel)),
    };
    let name = faults.note("NAME", asked.name.parse::<SubscriptionName>());
    let backfills = open(&asked.database, &mut faults);
    faults.none()?;
    let (Some(name), Some(backfills)) = (name, backfills) else { unreachable!("no faults, so all are there") };
    let now = match action {
        None => backfills.get(&name).await?,
        Some(action) => backfills.act(&name, action).await?,
    };
    print(&name, &now, asked.json)
}

async fn start(asked: BackfillStart, mut faults: Faults) -> anyhow::Result<()> {
    let name = faults.note("NAME", asked.backfill.name.parse::<SubscriptionName>());
    let plan = plan(&asked, &mut faults);
    let backfills = open(&asked.backfill.database, &mut faults);
    faults.none()?;
    let (Some(name), Some(plan), Some(backfills)) = (name, plan, backfills) else {
        unreachable!("no faults, so all are there")
    };
    let mut now = backfills.start(&name, &plan).await?;
    while asked.follow && !now.state.is_over() {
        eprintln!("{}", words(&now));
        sleep(LOOK).await;
        now = backfills.get(&name).await?;
    }
    print(&name, &now, asked.backfill.json)?;
    ensure!(!asked.follow || now.state == State::Done, "it was cancelled");
    Ok(())
}

fn plan(asked: &BackfillStart, faults: &mut Faults) -> Option<Plan> {
    let everybody = (asked.users.is_empty() && asked.changed_since.is_none()).then(|| "all".to_owned());
    let start = Start {
        users: everybody,
        user_ids: Some(asked.users.clone()).filter(|ids| !ids.is_empty()),
        changed_since: asked.changed_since.clone(),
        rate_per_s: asked.rate.map(i64::from),
        max_waiting: None,
    };
    let found = match start.plan() {
        Ok(plan) => return Some(plan),
        Err(found) => found,
    };
    for Fault { pointer, detail, .. } in found.into_iter().take(MAX_FAULTS) {
        let given = |place: &str| asked.users.get(place.parse::<usize>().ok()?);
        let (setting, detail) = match (pointer.as_str(), pointer.strip_prefix("/user_ids/").and_then(given)) {
            (_, Some(given)) => ("--user", format!("{detail}, not {given:?}")),
            ("/user_ids", _) => ("--user", detail),
            ("/rate_per_s", _) => ("--rate", detail),
            _ => ("--changed-since", detail),
        };
        faults.note::<(), _>(setting, Err(detail));
    }
    None
}

fn print(name: &SubscriptionName, backfill: &Backfill, as_json: bool) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    if as_json {
        serde_json::to_writer(&mut out, &Progress::of(name, backfill))?;
        return Ok(writeln!(out)?);
    }
    Ok(writeln!(out, "{name}: {}", words(backfill))?)
}

fn words(backfill: &Backfill) -> String {
    let Backfill { state, waiting_for, sent, skipped, total, rate_per_s, .. } = backfill;
    let state = match waiting_for {
        Some(why) => format!("waiting for {}", why.as_str()),
        None => format!("{state:?}").to_lowercase(),
    };
    let about = if backfill.total_is_estimate { "about " } else { "" };
    let percent = (backfill.progress() * 100.0) as u32;
    let eta = backfill.eta_s().map(|eta_s| format!(", {eta_s} s to go at {rate_per_s}/s")).unwrap_or_default();
    format!("{state}, {percent} %: {sent} sent and {skipped} skipped of {about}{total}{eta}")
}

fn open(database: &Database, faults: &mut Faults) -> Option<Backfills> {
    Some(Backfills::new(database.open(faults)?.pool("command", 4, [])))
}
