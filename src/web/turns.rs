//! Turns: how many long answers are made at the same time, and whose is next.
//!
//! Promise: however many pages and batches are asked for at once, only so many are in the making, so that a short answer does not wait
//! behind a crowd of long ones; and clients take turns, so that nobody waits behind another's crowd.
//! Not here, on purpose: how long an answer waits for its client to take it (see `answers`).

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

#[derive(Clone)]
pub struct Turns(Arc<Mutex<Inner>>);

struct Inner {
    free: usize,
    /// Requests of one client that may wait.
    line_limit: usize,
    /// Clients who wait, in the order of their turns.
    lines: VecDeque<Line>,
}

/// Of one client: never empty.
struct Line {
    client: Arc<str>,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

/// Goes to whoever is next when it is dropped.
pub struct Turn(Option<Turns>);

/// As many requests of this client wait as may.
#[derive(Debug, PartialEq, Eq)]
pub struct LineFull;

impl Turns {
    pub fn new(at_once: usize, line_limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner { free: at_once, line_limit, lines: VecDeque::new() })))
    }

    /// Waits until it is `client`'s turn. Cancel safe.
    pub async fn take(&self, client: &Arc<str>) -> Result<Turn, LineFull> {
        let coming = {
            let mut inner = self.inner();
            if inner.free > 0 {
                inner.free -= 1;
                return Ok(Turn(Some(self.clone())));
            }
            inner.wait(client)?
        };
        Ok(coming.await.expect("who still waits is not forgotten"))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn wait(&mut self, client: &Arc<str>) -> Result<oneshot::Receiver<Turn>, LineFull> {
        let (turn, coming) = oneshot::channel();
        let Some(line) = self.lines.iter_mut().find(|line| line.client == *client) else {
            self.lines.push_back(Line { client: client.clone(), waiting: VecDeque::from([turn]) });
            return Ok(coming);
        };
        if line.waiting.len() >= self.line_limit {
            line.waiting.retain(|waiting| !waiting.is_closed());
        }
        if line.waiting.len() >= self.line_limit {
            return Err(LineFull);
        }
        line.waiting.push_back(turn);
        Ok(coming)
    }

    /// Who is next. His client's others come after everybody else.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let mut line = self.lines.pop_front()?;
        let next = line.waiting.pop_front();
        if !line.waiting.is_empty() {
            self.lines.push_back(line);
        }
        next
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.0.take() else { return };
        loop {
            let mut inner = turns.inner();
            let Some(next) = inner.next() else {
                inner.free += 1;
                return;
            };
            drop(inner);
            match next.send(Self(Some(turns.clone()))) {
                Ok(()) => return,
                // He has left. It is still our turn to give away, and not its own.
                Err(mut unwanted) => unwanted.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, task::Poll};

    use futures_util::{FutureExt, poll};

    use super::*;

    const LINE_LIMIT: usize = 8;

    #[tokio::test]
    async fn clients_take_turns_however_many_ask_for_one() {
        let turns = Turns::new(1, LINE_LIMIT);
        let (crowd, alone): (Arc<str>, Arc<str>) = ("crowd".into(), "alone".into());
        let first = turns.take(&crowd).await.unwrap();
        let (mut second, mut third) = (pin!(turns.take(&crowd)), pin!(turns.take(&crowd)));
        assert!(poll!(&mut second).is_pending());
        assert!(poll!(&mut third).is_pending());
        let mut other = pin!(turns.take(&alone));
        assert!(poll!(&mut other).is_pending());
        drop(first);
        let Poll::Ready(Ok(turn)) = poll!(&mut second) else { panic!("who came first is first") };
        assert!(poll!(&mut third).is_pending() && poll!(&mut other).is_pending(), "one at a time");
        drop(turn);
        let Poll::Ready(Ok(turn)) = poll!(&mut other) else { panic!("it is the other's turn") };
        assert!(poll!(&mut third).is_pending());
        drop(turn);
        assert!(poll!(&mut third).is_ready());
    }

    #[tokio::test]
    async fn a_turn_does_not_get_lost_with_who_left() {
        let turns = Turns::new(1, LINE_LIMIT);
        let client: Arc<str> = "client".into();
        let turn = turns.take(&client).await.unwrap();
        let mut kept = Box::pin(turns.take(&client));
        {
            let mut left = pin!(turns.take(&client));
            assert!(poll!(&mut left).is_pending());
            assert!(poll!(&mut kept).is_pending());
        }
        drop(turn);
        assert!(poll!(&mut kept).is_ready());
        drop(kept);
        assert!(turns.take(&client).now_or_never().is_some(), "the turn is free again");
    }

    #[tokio::test]
    async fn a_turn_that_was_given_and_not_taken_comes_back() {
        let turns = Turns::new(1, LINE_LIMIT);
        let client: Arc<str> = "client".into();
        let turn = turns.take(&client).await.unwrap();
        let mut unlucky = Box::pin(turns.take(&client));
        assert!(poll!(&mut unlucky).is_pending());
        drop(turn);
        drop(unlucky);
        assert!(turns.take(&client).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_line_is_bounded_and_only_its_own_client_hears_so() {
        let turns = Turns::new(1, LINE_LIMIT);
        let (crowd, alone): (Arc<str>, Arc<str>) = ("crowd".into(), "alone".into());
        let _turn = turns.take(&crowd).await.unwrap();
        let mut waiting: Vec<_> = (0..LINE_LIMIT).map(|_| Box::pin(turns.take(&crowd))).collect();
        for waiting in &mut waiting {
            assert!(poll!(waiting).is_pending());
        }
        assert_eq!(turns.take(&crowd).await.err(), Some(LineFull));
        assert!(turns.take(&alone).now_or_never().is_none(), "there is room in another's line");
        drop(waiting.pop());
        assert!(turns.take(&crowd).now_or_never().is_none(), "who left makes room");
    }
}
