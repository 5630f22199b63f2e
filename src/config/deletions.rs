//! `tidings deletions`.

use clap::{Args, Subcommand};

use super::{Database, Erasure};

pub(super) const DELETIONS_HELP: &str = "\
Examples:
  tidings deletions show 0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a
  tidings deletions overdue --json";

#[derive(Debug, Subcommand)]
pub enum DeletionsAction {
    /// One deletion: who has confirmed it, and how.
    Show(DeletionsShow),
    /// All deletions that somebody has not confirmed in time, the oldest first, one a line.
    Overdue(DeletionsOverdue),
}

#[derive(Debug, Args)]
pub struct DeletionsShow {
    /// The user who was deleted.
    #[arg(value_name = "USER_ID")]
    pub user_id: String,
    #[command(flatten)]
    pub servers: DeletionsServers,
}

#[derive(Debug, Args)]
pub struct DeletionsOverdue {
    #[command(flatten)]
    pub servers: DeletionsServers,
}

/// What every command about deletions needs.
#[derive(Debug, Args)]
pub struct DeletionsServers {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub erasure: Erasure,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
