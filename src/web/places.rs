//! Places: how many requests may be under way at once.
//!
//! Promise: more than this many are never worked on at the same time; who finds no place hears 503 `overloaded` at once. A client who
//! is slow to send its body holds no place meanwhile. Of large bodies no client has more than its share in hand. Long answers are made, and
//! the registry is asked, in turn.
//! Not here, on purpose: how often a client may ask (see `rate`).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use axum::{
    extract::FromRequestParts,
    http::{Extensions, request::Parts},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Code, Problem,
    connections::{Seat, Waiting},
    traffic::{Counted, Traffic},
    turns::{LineFull, Turn, Turns},
};

/// Bodies that may have more than 64 KiB and are in hand: coming in, or being worked on. With half a mebibyte each, and six times that
/// while they are parsed, they are about a hundred mebibytes.
const LARGE_BODIES: usize = 32;
/// Of one client: however slowly it sends them, there is room for others.
const LARGE_BODIES_OF_ONE: usize = LARGE_BODIES / 2;
/// Requests that change many users and are worked on at once: while two are written, another is planned.
const LONG_WRITES: usize = 3;
/// Requests about subscriptions, and what belongs to them, that are worked on at once. Some wait for the broker.
const AT_THE_REGISTRY: usize = 8;
/// Of all places, those whose requests of one client may wait for a turn are one in so many: nobody's line takes all of them.
const LINE_SHARE: usize = 4;

#[derive(Clone)]
pub struct Places {
    free: Arc<Semaphore>,
    large_bodies: LargeBodies,
    turns: Turns,
    writing_turns: Turns,
    registry_turns: Turns,
    traffic: Traffic,
}

impl Places {
    pub fn new(count: usize, traffic: Traffic) -> Self {
        // A short answer is looked at by several tasks, one after the other: half of the cores stay free of long ones.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let line_limit = (count / LINE_SHARE).max(1);
        Self {
            free: Arc::new(Semaphore::new(count)),
            large_bodies: LargeBodies::default(),
            turns: Turns::new((cores / 2).max(1), line_limit),
            writing_turns: Turns::new(LONG_WRITES, line_limit),
            registry_turns: Turns::new(AT_THE_REGISTRY, line_limit),
            traffic,
        }
    }

    /// A place, kept until the last clone of it is gone.
    pub fn take(&self) -> Result<Place, Problem> {
        let held = self.held()?;
        let held = Arc::new(Mutex::new(Some(held)));
        let client = Arc::default();
        let (turn, large_body, left) = (Arc::default(), Arc::default(), CancellationToken::new());
        Ok(Place { places: self.clone(), held, client, turn, large_body, left })
    }

    fn held(&self) -> Result<Held, Problem> {
        let permit = self.free.clone().try_acquire_owned().map_err(|_| {
            self.traffic.shed();
            Problem::new(Code::Overloaded, "too many requests are under way")
        })?;
        Ok(Held { _permit: permit, _counted: self.traffic.begun() })
    }
}

struct Held {
    _permit: OwnedSemaphorePermit,
    _counted: Counted,
}

/// How many large bodies each client has in hand. Never 0 of one.
#[derive(Clone, Default)]
struct LargeBodies(Arc<Mutex<HashMap<Arc<str>, usize>>>);

impl LargeBodies {
    /// `None` when there are as many as there may be, of this client or of all.
    fn take(&self, client: Arc<str>) -> Option<LargeBody> {
        let mut in_hand = self.in_hand();
        let (of_one, of_all) = (in_hand.get(&client).copied().unwrap_or(0), in_hand.values().sum::<usize>());
        if of_one >= LARGE_BODIES_OF_ONE || of_all >= LARGE_BODIES {
            return None;
        }
        in_hand.insert(client.clone(), of_one + 1);
        Some(LargeBody { all: self.clone(), client })
    }

    fn in_hand(&self) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of them, until it is dropped.
struct LargeBody {
    all: LargeBodies,
    client: Arc<str>,
}

impl Drop for LargeBody {
    fn drop(&mut self) {
        let mut in_hand = self.all.in_hand();
        match in_hand.get_mut(&self.client) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(in_hand.remove(&self.client)),
        }
    }
}

/// One request's place, and its turn if its answer is long. In the request's extensions, so that it can be given back while its body
/// comes in.
#[derive(Clone)]
pub struct Place {
    places: Places,
    held: Arc<Mutex<Option<Held>>>,
    client: Arc<OnceLock<Arc<str>>>,
    turn: Arc<OnceLock<Turn>>,
    large_body: Arc<OnceLock<LargeBody>>,
    /// That nobody waits for the answer any more, where it is made all the same.
    left: CancellationToken,
}

impl Place {
    /// Says whose request it is, as soon as that is known.
    pub fn is_of(&self, client: &Arc<str>) {
        // A request has one client.
        let _ = self.client.set(client.clone());
    }

    /// Waits until a long answer to `client` may be made. The turn is kept until the answer is there, and until what goes on
    /// [to its end](Self::to_the_end) has come there.
    ///
    /// # Errors
    /// `overloaded` when too many requests of this client wait already.
    pub async fn turn(&self, client: &Arc<str>) -> Result<(), Problem> {
        self.turn_of(&self.places.turns, client, "too many long answers to this client are to be made").await
    }

    /// Waits until `client` may change many users in one request. The turn is kept until the answer is there.
    ///
    /// # Errors
    /// `overloaded` when too many such requests of this client wait already.
    pub async fn turn_to_write(&self, client: &Arc<str>) -> Result<(), Problem> {
        self.turn_of(&self.places.writing_turns, client, "too many requests of this client to change many users wait")
            .await
    }

    /// Waits until `client` may ask the registry. The turn is kept until the answer is there.
    ///
    /// # Errors
    /// `overloaded` when too many such requests of this client wait already.
    pub async fn turn_at_the_registry(&self, client: &Arc<str>) -> Result<(), Problem> {
        self.turn_of(&self.places.registry_turns, client, "too many requests of this client about subscriptions wait")
            .await
    }

    async fn turn_of(&self, turns: &Turns, client: &Arc<str>, full: &str) -> Result<(), Problem> {
        // Whoever has left leaves the line, too: what he has not begun is not done.
        let Some(turn) = self.left.run_until_cancelled(turns.take(client)).await else {
            return Err(Code::Overloaded.into());
        };
        let turn = turn.map_err(|LineFull| {
            self.places.traffic.shed();
            Problem::new(Code::Overloaded, full)
        })?;
        // A second one of the same request is given back at once.
        let _ = self.turn.set(turn);
        Ok(())
    }

    /// Does what goes on although its client hangs up, as a query does at the database: place and turn are kept meanwhile.
    ///
    /// # Errors
    /// `internal` when it panics.
    pub async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Problem> {
        let kept = self.clone();
        let done = tokio::spawn(async move {
            let _kept = kept;
            work.await
        });
        done.await.map_err(|_| Code::Internal.into())
    }

    /// Lets this request's body be a large one. Kept until the answer is there.
    ///
    /// # Errors
    /// `overloaded` when too many such are in hand, of this client or of all.
    pub(super) fn large_body(&self) -> Result<(), Problem> {
        let client = self.client.get().cloned().unwrap_or_default();
        let large_body = self.places.large_bodies.take(client).ok_or_else(|| {
            self.places.traffic.shed();
            Problem::new(Code::Overloaded, "too many large requests are under way")
        })?;
        // There is one body.
        let _ = self.large_body.set(large_body);
        Ok(())
    }

    /// Once this is dropped nobody waits for the answer.
    pub(super) fn awaited(&self) -> DropGuard {
        self.left.clone().drop_guard()
    }

    fn hold(&self, held: Option<Held>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }
}

impl<S: Sync> FromRequestParts<S> for Place {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        parts.extensions.get().cloned().ok_or_else(|| Code::Internal.into())
    }
}

/// For as long as it lives, it is the client's turn: to send the body. Its place serves others meanwhile.
pub struct ClientsTurn {
    place: Option<Place>,
    _waiting: Option<Waiting>,
}

impl ClientsTurn {
    pub fn of(request: &Extensions) -> Self {
        let place = request.get::<Place>().cloned();
        if let Some(place) = &place {
            place.hold(None);
        }
        Self { place, _waiting: request.get::<Arc<Seat>>().map(Seat::waiting) }
    }

    /// It is our turn again, if there is a place.
    pub fn end(self) -> Result<(), Problem> {
        let Some(place) = &self.place else { return Ok(()) };
        place.hold(Some(place.places.held()?));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures_util::poll;
    use tokio::{sync::oneshot, task::yield_now};

    use super::*;

    #[test]
    fn only_so_many_large_bodies_are_in_hand() {
        let places = Places::new(LARGE_BODIES + 3, Traffic::default());
        let place = |client: &str| {
            let place = places.take().unwrap_or_else(|_| panic!("there is one"));
            place.is_of(&client.into());
            place
        };
        let share = |client: &str| -> Vec<Place> {
            let all: Vec<Place> = (0..LARGE_BODIES_OF_ONE).map(|_| place(client)).collect();
            assert!(all.iter().all(|place| place.large_body().is_ok()), "{client}");
            all
        };
        let (greedy, other) = (share("greedy"), place("greedy"));
        assert!(other.large_body().is_err());
        let _rest = share("another");
        assert!(place("third").large_body().is_err(), "there are no more");
        drop(greedy);
        assert!(other.large_body().is_ok());
    }

    #[tokio::test]
    async fn nobody_s_line_takes_all_places() {
        let places = Places::new(8, Traffic::default());
        let client: Arc<str> = "crowd".into();
        let all: Vec<Place> = (0..8).filter_map(|_| places.take().ok()).collect();
        let mut turns: Vec<_> = all.iter().map(|place| Box::pin(place.turn_to_write(&client))).collect();
        let (at_work, in_line) = (LONG_WRITES, LONG_WRITES + 2);
        for (n, turn) in turns.iter_mut().enumerate() {
            match poll!(turn) {
                Poll::Ready(Ok(())) => assert!(n < at_work, "{n}"),
                Poll::Pending => assert!((at_work..in_line).contains(&n), "{n}"),
                Poll::Ready(Err(_)) => assert!(n >= in_line, "{n}"),
            }
        }
    }

    #[tokio::test]
    async fn who_has_left_waits_for_no_turn_and_begins_nothing() {
        let places = Places::new(100, Traffic::default());
        let client: Arc<str> = "crowd".into();
        let all: Vec<Place> = (0..=AT_THE_REGISTRY).filter_map(|_| places.take().ok()).collect();
        let (last, others) = all.split_last().unwrap();
        for place in others {
            assert!(place.turn_at_the_registry(&client).await.is_ok());
        }
        let awaited = last.awaited();
        let mut turn = Box::pin(last.turn_at_the_registry(&client));
        assert!(poll!(&mut turn).is_pending());
        drop(awaited);
        assert!(matches!(poll!(&mut turn), Poll::Ready(Err(_))));
    }

    #[tokio::test]
    async fn what_goes_on_without_its_client_keeps_its_place() {
        let places = Places::new(1, Traffic::default());
        let place = places.take().unwrap_or_else(|_| panic!("there is one"));
        let (end, ended) = oneshot::channel::<()>();
        let mut work = Box::pin(place.to_the_end(ended));
        assert!(poll!(&mut work).is_pending());
        drop(work);
        drop(place);
        yield_now().await;
        assert!(places.take().is_err(), "it is still at work");
        end.send(()).unwrap();
        while places.take().is_err() {
            yield_now().await;
        }
    }

    #[test]
    fn a_place_serves_others_while_its_client_is_slow() {
        let places = Places::new(1, Traffic::default());
        let place = places.take().unwrap_or_else(|_| panic!("there is one"));
        let mut request = Extensions::new();
        request.insert(place.clone());
        assert!(places.take().is_err(), "it is taken");
        let turn = ClientsTurn::of(&request);
        let other = places.take();
        assert!(other.is_ok(), "the client is slow");
        assert!(turn.end().is_err(), "and now there is none left for it");
        drop(other);
        assert!(ClientsTurn::of(&request).end().is_ok());
        assert!(places.take().is_err());
        drop((request, place));
        assert!(places.take().is_ok());
    }
}
