//! Places: how many requests may be under way at once.
//!
//! Promise: more than this many are never worked on at the same time; who finds no place hears 503 `overloaded` at once. A client who
//! is slow to send its body holds no place meanwhile. Long answers are made in turn.
//! Not here, on purpose: how often a client may ask (see `rate`).

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::{
    extract::FromRequestParts,
    http::{Extensions, request::Parts},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    Code, Problem,
    connections::{Seat, Waiting},
    traffic::{Counted, Traffic},
    turns::{LineFull, Turn, Turns},
};

/// Bodies that may have more than 64 KiB and are in hand: coming in, or being worked on. With half a mebibyte each, and six times that
/// while they are parsed, they are about a hundred mebibytes.
const LARGE_BODIES: usize = 32;
/// Requests that change many users and are worked on at once: while two are written, another is planned.
const LONG_WRITES: usize = 3;

#[derive(Clone)]
pub struct Places {
    free: Arc<Semaphore>,
    large_bodies: Arc<Semaphore>,
    turns: Turns,
    writing_turns: Turns,
    traffic: Traffic,
}

impl Places {
    pub fn new(count: usize, traffic: Traffic) -> Self {
        // A short answer is looked at by several tasks, one after the other: half of the cores stay free of long ones.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            free: Arc::new(Semaphore::new(count)),
            large_bodies: Arc::new(Semaphore::new(LARGE_BODIES)),
            turns: Turns::new((cores / 2).max(1)),
            writing_turns: Turns::new(LONG_WRITES),
            traffic,
        }
    }

    /// A place, kept until the last clone of it is gone.
    pub fn take(&self) -> Result<Place, Problem> {
        let held = self.held()?;
        let held = Arc::new(Mutex::new(Some(held)));
        Ok(Place { places: self.clone(), held, turn: Arc::default(), large_body: Arc::default() })
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

/// One request's place, and its turn if its answer is long. In the request's extensions, so that it can be given back while its body
/// comes in.
#[derive(Clone)]
pub struct Place {
    places: Places,
    held: Arc<Mutex<Option<Held>>>,
    turn: Arc<OnceLock<Turn>>,
    large_body: Arc<OnceLock<OwnedSemaphorePermit>>,
}

impl Place {
    /// Waits until a long answer to `client` may be made. The turn is kept until the answer is there.
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

    async fn turn_of(&self, turns: &Turns, client: &Arc<str>, full: &str) -> Result<(), Problem> {
        let turn = turns.take(client).await.map_err(|LineFull| {
            self.places.traffic.shed();
            Problem::new(Code::Overloaded, full)
        })?;
        // A second one of the same request is given back at once.
        let _ = self.turn.set(turn);
        Ok(())
    }

    /// Lets this request's body be a large one. Kept until the answer is there.
    ///
    /// # Errors
    /// `overloaded` when too many such are in hand.
    pub(super) fn large_body(&self) -> Result<(), Problem> {
        let permit = self.places.large_bodies.clone().try_acquire_owned().map_err(|_| {
            self.places.traffic.shed();
            Problem::new(Code::Overloaded, "too many large requests are under way")
        })?;
        // There is one body.
        let _ = self.large_body.set(permit);
        Ok(())
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
    use super::*;

    #[test]
    fn only_so_many_large_bodies_are_in_hand() {
        let places = Places::new(LARGE_BODIES + 1, Traffic::default());
        let place = || places.take().unwrap_or_else(|_| panic!("there is one"));
        let all: Vec<Place> = (0..LARGE_BODIES).map(|_| place()).collect();
        assert!(all.iter().all(|place| place.large_body().is_ok()));
        let other = place();
        assert!(other.large_body().is_err());
        drop(all);
        assert!(other.large_body().is_ok());
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
