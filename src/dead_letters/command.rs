//! `tidings subscription dead-letters ..`: for operators, directly on database and broker.

use std::io::{BufRead, IsTerminal, Write, stdin, stdout};

use anyhow::{anyhow, bail, ensure};
use tidings_sdk::{letter::Reason, subscription::SubscriptionName};
use uuid::Uuid;

use super::{DeadLetter, DeadLetters, Selection, http::Shown};
use crate::config::{Amqp, Database, DeadLettersAction, DeadLettersList, DeadLettersPurge, DeadLettersRedrive, Faults};

const PAGE: i64 = 500;

/// # Errors
/// When what was asked for was not done.
pub async fn run(action: DeadLettersAction, faults: Faults) -> anyhow::Result<()> {
    match action {
        DeadLettersAction::List(asked) => list(asked, faults).await,
        DeadLettersAction::Redrive(asked) => redrive(asked, faults).await,
        DeadLettersAction::Purge(asked) => purge(asked, faults).await,
    }
}

/// One line a letter: a JSON object, or words.
async fn list(asked: DeadLettersList, mut faults: Faults) -> anyhow::Result<()> {
    let name = faults.note("NAME", asked.name.parse::<SubscriptionName>());
    let reason = asked.reason.as_deref().and_then(|reason| faults.note("--reason", parse_reason(reason)));
    let letters = open(&asked.database, None, &mut faults);
    faults.none()?;
    let (Some(name), Some(letters)) = (name, letters) else { unreachable!("no faults, so all are there") };
    let mut after = 0;
    loop {
        let page = letters.list(&name, after, PAGE, reason).await?;
        for letter in page.letters {
            print(letter, asked.json)?;
        }
        match page.next {
            Some(next) => after = next,
            None => {
                let by_reason: Vec<String> =
                    page.by_reason.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
                let said = if by_reason.is_empty() { "none".to_owned() } else { by_reason.join(", ") };
                eprintln!("dead letters of {name}: {said}");
                return Ok(());
            }
        }
    }
}

fn print(letter: DeadLetter, as_json: bool) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    if as_json {
        serde_json::to_writer(&mut out, &Shown::from(letter))?;
        return Ok(writeln!(out)?);
    }
    let DeadLetter { message_id, notice, reason, attempts, age_s, .. } = letter;
    let about = notice.map_or_else(
        || "no notice".to_owned(),
        |notice| format!("{} of {} to version {}", notice.event.name(), notice.user_id, notice.version),
    );
    Ok(writeln!(out, "{message_id}  {reason}, {attempts} attempts, {age_s} s ago: {about}")?)
}

/// Until none is left of those there were at the start.
async fn redrive(asked: DeadLettersRedrive, mut faults: Faults) -> anyhow::Result<()> {
    let name = faults.note("NAME", asked.name.parse::<SubscriptionName>());
    let selection = faults.note("--message, --reason or --all", selection(&asked));
    let letters = open(&asked.servers.database, Some(&asked.servers.amqp), &mut faults);
    faults.none()?;
    let (Some(name), Some(selection), Some(letters)) = (name, selection, letters) else {
        unreachable!("no faults, so all are there")
    };
    let up_to = letters.last_place(&name).await?;
    let mut total = 0;
    loop {
        let done = letters.redrive(&name, &selection, up_to).await?;
        total += done.redriven;
        eprintln!("{total} redriven, {} to go", done.left);
        if done.left == 0 || done.redriven == 0 {
            if done.not_redrivable > 0 {
                eprintln!("{} cannot be redriven: they were no notices", done.not_redrivable);
            }
            ensure!(done.left == 0, "the broker refused the rest; {} letters are kept", done.left);
            return Ok(writeln!(stdout().lock(), "{total}")?);
        }
    }
}

fn selection(asked: &DeadLettersRedrive) -> anyhow::Result<Selection> {
    match (asked.messages.is_empty(), &asked.reason, asked.all) {
        (false, None, false) => {
            let ids = asked.messages.iter().map(|id| id.parse().map_err(|_| anyhow!("expected a UUID, not {id:?}")));
            Ok(Selection::These(ids.collect::<anyhow::Result<Vec<Uuid>>>()?))
        }
        (true, Some(reason), false) => Ok(Selection::Reason(parse_reason(reason)?)),
        (true, None, true) => Ok(Selection::All),
        _ => bail!("say which, in exactly one of these ways"),
    }
}

/// Asks on a terminal; elsewhere nobody could answer.
async fn purge(asked: DeadLettersPurge, mut faults: Faults) -> anyhow::Result<()> {
    let name = faults.note("NAME", asked.name.parse::<SubscriptionName>());
    let reason = asked.reason.as_deref().and_then(|reason| faults.note("--reason", parse_reason(reason)));
    let letters = open(&asked.database, None, &mut faults);
    faults.none()?;
    let (Some(name), Some(letters)) = (name, letters) else { unreachable!("no faults, so all are there") };
    let up_to = letters.last_place(&name).await?;
    let count = letters.count(&name, reason).await?;
    if !asked.yes {
        ensure!(stdin().is_terminal(), "this would drop {count} dead letters for good\nhint: --yes confirms it");
        eprint!("drop {count} dead letters of {name} for good? Type its name: ");
        let mut answer = String::new();
        stdin().lock().read_line(&mut answer)?;
        ensure!(answer.trim() == name.as_str(), "nothing was dropped");
    }
    let purged = letters.purge(&name, reason, up_to).await?;
    Ok(writeln!(stdout().lock(), "{purged}")?)
}

fn parse_reason(name: &str) -> anyhow::Result<Reason> {
    let known = Reason::ALL.into_iter().find(|reason| reason.as_str() == name);
    let all = Reason::ALL.map(Reason::as_str).join(", ");
    known.ok_or_else(|| anyhow!("the reasons are {all}"))
}

fn open(database: &Database, amqp: Option<&Amqp>, faults: &mut Faults) -> Option<DeadLetters> {
    let db = database.open(faults);
    let broker = amqp.and_then(|amqp| amqp.open(faults)).map(|broker| broker.as_registry());
    Some(DeadLetters::new(db?.pool("command", 4, []), broker))
}
