//! Descriptors: how many files and sockets the process may have open.
//!
//! Promise: as many as the system lets it have, and never so many connections that none is left for the database and the broker.
//! Not here, on purpose: asking for more than the hard limit, which is the operator's to set.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Kept free of connections: for the database (at most 45 where it leads everything), the broker, the listener, the runtime, the schema file, and
/// clients that are being turned away.
pub const RESERVE: u64 = 192;

/// Raises the soft limit to the hard one; the limit as it is then. `None`: there is none.
pub fn raise() -> Option<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "the limit of open files could not be raised");
        }
    }
    getrlimit(Resource::Nofile).current
}

/// As many connections as wanted, or as there are descriptors for.
pub fn connections(wanted: usize, limit: Option<u64>) -> usize {
    let room = limit.map_or(u64::MAX, |limit| limit.saturating_sub(RESERVE).max(1));
    wanted.min(usize::try_from(room).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_database_and_the_broker_keep_their_descriptors() {
        assert_eq!(connections(10_000, None), 10_000);
        assert_eq!(connections(10_000, Some(20_000)), 10_000);
        assert_eq!(connections(10_000, Some(1024)), 832);
        assert_eq!(connections(10_000, Some(64)), 1);
    }
}
