//! Lag: how far behind the telling is.
//!
//! Promise: a look costs no more when more waits, nor, for who looks again and again, when more died since the last vacuum.
//! Not here, on purpose: who is behind. What is not confirmed counts, whoever it was for.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use sqlx::PgExecutor;

use super::OutboxId;

/// How far behind the telling is, from a place on. Counts exactly up to a limit and estimates beyond it by the span of ids. In order,
/// so that it goes by the index and does not see what died before that place.
pub const LAG: &str = "
select case
         when counted.pending < $1 then counted.pending
         else greatest(counted.pending, latest.id - oldest.id + 1)
       end as pending,
       coalesce(extract(epoch from clock_timestamp() - oldest.occurred_at)::float8, 0) as oldest_seconds,
       oldest.id as oldest,
       latest.id as latest,
       ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int as timeline
  from (select count(*) as pending from (select from outbox where id >= $2 order by id limit $1) as first_rows) as counted
 cross join (select max(id) as id from outbox where id >= $2) as latest
  left join (select id, occurred_at from outbox where id >= $2 order by id limit 1) as oldest on true
";

/// Rows counted one by one before [`LAG`] estimates.
const COUNT_LIMIT: i64 = 10_000;
/// A place that was given out so long ago is filled, or stays empty: no session of ours may stay in a transaction for a quarter of it.
const SETTLED_AFTER: Duration = Duration::from_secs(60);

/// How far behind the telling is.
#[derive(Debug, Clone, Copy, PartialEq, sqlx::FromRow)]
pub struct Lag {
    /// Events that the broker has not confirmed yet.
    pub pending: i64,
    /// Age of the oldest of them; 0 when there is none.
    pub oldest_seconds: f64,
    oldest: Option<OutboxId>,
    latest: Option<OutboxId>,
    /// Another one since a standby took over, or the database was set back.
    timeline: i32,
}

/// From this place on.
pub async fn lag(on: impl PgExecutor<'_>, Place(first): Place) -> sqlx::Result<Lag> {
    sqlx::query_as(LAG).bind(COUNT_LIMIT).bind(first).fetch_one(on).await
}

/// Where a look begins. Only a [`Floor`] gives one, so that nobody who looks again and again can leave it out.
#[derive(Debug, Clone, Copy)]
pub struct Place(OutboxId);

/// Where the next look may begin: rows that died keep their place while an old snapshot may still see them, and to walk over an hour of
/// them takes longer than a look may. Pure.
#[derive(Debug, Default)]
pub struct Floor {
    /// The first place that somebody waited at, of each look.
    seen: VecDeque<(Instant, OutboxId)>,
    latest: OutboxId,
    timeline: i32,
}

impl Floor {
    /// Below it nothing waits and nothing will come. A place below what a look saw may be filled later, so that one look proves
    /// nothing: the lowest of all does that were made while a place that was given out could still be filled.
    pub fn place(&self) -> Place {
        let (Some((first, _)), Some((last, _))) = (self.seen.front(), self.seen.back()) else { return Place(0) };
        let is_settled = last.duration_since(*first) >= SETTLED_AFTER;
        let lowest = if is_settled { self.seen.iter().map(|(_, place)| *place).min() } else { None };
        Place(lowest.unwrap_or(0))
    }

    /// A look from [`Self::place`] on has seen this.
    pub fn note(&mut self, lag: &Lag, now: Instant) {
        // Its places are given out anew, from below where they had come to.
        if self.timeline != lag.timeline {
            *self = Self { timeline: lag.timeline, ..Self::default() };
        }
        self.latest = self.latest.max(lag.latest.unwrap_or(0));
        self.seen.push_back((now, lag.oldest.unwrap_or(self.latest + 1)));
        while self.seen.get(1).is_some_and(|(second, _)| now.duration_since(*second) >= SETTLED_AFTER) {
            self.seen.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saw(floor: &mut Floor, waiting: Option<(OutboxId, OutboxId)>, now: Instant) {
        saw_on(1, floor, waiting, now);
    }

    fn saw_on(timeline: i32, floor: &mut Floor, waiting: Option<(OutboxId, OutboxId)>, now: Instant) {
        let (oldest, latest) = waiting.unzip();
        floor.note(&Lag { pending: 0, oldest_seconds: 0.0, oldest, latest, timeline }, now);
    }

    #[test]
    fn looks_begin_where_the_oldest_waited_once_nothing_can_come_before_it() {
        let (began, mut floor) = (Instant::now(), Floor::default());
        let at = |seconds| began + Duration::from_secs(seconds);
        saw(&mut floor, Some((100, 900)), began);
        saw(&mut floor, Some((400, 900)), at(30));
        assert_eq!(floor.place().0, 0, "what took an id before these may yet commit");
        saw(&mut floor, None, at(60));
        assert_eq!(floor.place().0, 100);
        saw(&mut floor, None, at(90));
        assert_eq!(floor.place().0, 400);
        saw(&mut floor, None, at(120));
        assert_eq!(floor.place().0, 901, "all that was there was told");
    }

    #[test]
    fn what_commits_late_holds_the_floor_down_until_it_is_told() {
        let (began, mut floor) = (Instant::now(), Floor::default());
        let at = |seconds| began + Duration::from_secs(seconds);
        saw(&mut floor, Some((100, 900)), began);
        for seconds in [15, 30, 45, 60, 75, 90] {
            saw(&mut floor, Some((50, 900)), at(seconds));
        }
        assert_eq!(floor.place().0, 50);
        for seconds in [105, 120, 135, 150] {
            saw(&mut floor, None, at(seconds));
        }
        assert_eq!(floor.place().0, 50, "the last look that saw it was a minute ago at most");
        saw(&mut floor, None, at(165));
        assert_eq!(floor.place().0, 901);
    }

    #[test]
    fn a_database_that_was_set_back_is_looked_at_from_the_start() {
        let (began, mut floor) = (Instant::now(), Floor::default());
        let at = |seconds| began + Duration::from_secs(seconds);
        saw(&mut floor, Some((100, 900)), began);
        saw(&mut floor, None, at(60));
        assert_eq!(floor.place().0, 100);
        saw_on(2, &mut floor, None, at(61));
        assert_eq!(floor.place().0, 0);
        saw_on(2, &mut floor, Some((70, 80)), at(121));
        assert_eq!(floor.place().0, 1, "what was seen from a floor of before proves nothing");
    }

    #[test]
    fn no_more_looks_are_remembered_than_prove_something() {
        let (began, mut floor) = (Instant::now(), Floor::default());
        for second in 0..1000 {
            saw(&mut floor, None, began + Duration::from_secs(second));
        }
        assert_eq!(floor.seen.len(), 61);
    }
}
