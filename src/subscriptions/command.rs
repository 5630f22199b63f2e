//! `tidings subscription ..`: the registry for operators, directly on database and broker.

use anyhow::bail;

use crate::config::{Faults, SubscriptionAction};

/// # Errors
/// When what was asked for was not done.
pub async fn run(action: SubscriptionAction, faults: Faults) -> anyhow::Result<()> {
    match action {
        SubscriptionAction::DeadLetters(action) => crate::dead_letters::command::run(action, faults).await,
        SubscriptionAction::Backfill(action) => crate::backfill::command::run(action, faults).await,
        SubscriptionAction::Put(_)
        | SubscriptionAction::List(_)
        | SubscriptionAction::Show(_)
        | SubscriptionAction::Delete(_) => {
            faults.none()?;
            bail!("not there yet")
        }
    }
}
