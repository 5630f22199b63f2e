//! The mirror: what an application downstream holds, which knows of the service only its messages and `GET`.
//!
//! Promise: a notice is acknowledged once the state it tells of, or a later one, is held; duplicates and reordering do no harm.
//! Not here, on purpose: the change log, and whatever else the driver knows. All that stands here was fetched.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use lapin::{Acker, message::Delivery, options::BasicAckOptions};
use reqwest::StatusCode;
use serde_json::Value;
use tidings_sdk::envelope::Notice;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    api::Api,
    changelog::Fields,
    progress::Progress,
    queue::{Queue, Session},
};

/// Fetches at once. Each fetcher has users of its own, so that one user's notices are handled in sequence.
const FETCHERS: usize = 16;
const FETCHER_QUEUE: usize = 64;
/// Between two tries to reach a broker that is gone.
const PAUSE: Duration = Duration::from_millis(500);
/// Before asking again after an answer that the contract does not know.
const STRANGE_PAUSE: Duration = Duration::from_secs(1);

/// What is held of one user.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    pub version: i64,
    /// Nothing of a deleted user.
    pub profile: Option<Fields>,
}

/// What came in.
#[derive(Default)]
pub struct Counts {
    /// About users of this replay.
    pub received: AtomicU64,
    /// Of these: told before, by `message_id`.
    pub duplicates: AtomicU64,
    /// Of these: handed out before by the broker, and again after a lost connection.
    pub redelivered: AtomicU64,
    /// Of these: of a version that is held already.
    pub outrun: AtomicU64,
    /// Of these: lost on purpose.
    pub lost: AtomicU64,
    /// About users that somebody else changes.
    pub foreign: AtomicU64,
    /// No notices at all.
    pub malformed: AtomicU64,
    pub outages: AtomicU64,
}

pub struct Mirror {
    api: Arc<Api>,
    /// Whom this replay is about; news of others is let pass.
    users: HashSet<Uuid>,
    /// Whom to lose all news of.
    lose: HashSet<Uuid>,
    held: Mutex<HashMap<Uuid, Held>>,
    pub counts: Counts,
    /// The last answer to a fetch that the contract does not know.
    strange: Mutex<Option<StatusCode>>,
}

/// A notice, and how to tell the broker that it was dealt with.
struct Letter {
    notice: Notice,
    acker: Acker,
}

impl Mirror {
    pub fn new(api: Arc<Api>, users: HashSet<Uuid>, lose: HashSet<Uuid>) -> Self {
        Self { api, users, lose, held: Mutex::default(), counts: Counts::default(), strange: Mutex::default() }
    }

    pub fn version(&self, user: Uuid) -> i64 {
        lock(&self.held).get(&user).map_or(0, |held| held.version)
    }

    pub fn held(&self) -> HashMap<Uuid, Held> {
        lock(&self.held).clone()
    }

    pub fn strange(&self) -> Option<StatusCode> {
        *lock(&self.strange)
    }

    /// Listens until `stop`, through any number of outages.
    pub async fn listen(
        self: Arc<Self>,
        queue: Arc<Queue>,
        first: Session,
        progress: Progress,
        stop: CancellationToken,
    ) {
        let mut fetchers = Fetchers::start(&self);
        let mut session = first;
        while let Some(why) = stop.run_until_cancelled(fetchers.hear(&self, &mut session)).await {
            self.counts.outages.fetch_add(1, Relaxed);
            progress.say(&format!("the consumer lost the broker ({why}); its news waits in the queue"));
            let began = Instant::now();
            let Some(next) = stop.run_until_cancelled(reconnect(&queue)).await else { return };
            progress.say(&format!("the consumer is back after {:.1} s", began.elapsed().as_secs_f64()));
            session = next;
        }
        session.close().await;
    }

    /// Brings the mirror to the state that the notice tells of, or a later one.
    async fn follow(&self, notice: &Notice) {
        while self.version(notice.user_id) < notice.version {
            let answer = self.api.fetch(notice.user_id, notice.version).await;
            let profile = match (answer.status, answer.body.get("profile")) {
                (StatusCode::OK, Some(Value::Object(profile))) => Some(profile.clone()),
                (StatusCode::GONE, _) => None,
                _ => {
                    *lock(&self.strange) = Some(answer.status);
                    sleep(STRANGE_PAUSE).await;
                    continue;
                }
            };
            self.keep(notice.user_id, Held { version: answer.version().unwrap_or(0), profile });
        }
    }

    /// Compare and set: an answer that was overtaken on its way changes nothing.
    fn keep(&self, user: Uuid, fetched: Held) {
        let mut held = lock(&self.held);
        if held.get(&user).is_none_or(|held| held.version < fetched.version) {
            held.insert(user, fetched);
        }
    }
}

/// Handles notices, and remembers over all sessions which were heard.
struct Fetchers {
    inboxes: Vec<mpsc::Sender<Letter>>,
    heard: HashSet<Uuid>,
}

impl Fetchers {
    fn start(mirror: &Arc<Mirror>) -> Self {
        let start = |_| {
            let (inbox, letters) = mpsc::channel(FETCHER_QUEUE);
            tokio::spawn(fetch(mirror.clone(), letters));
            inbox
        };
        Self { inboxes: (0..FETCHERS).map(start).collect(), heard: HashSet::new() }
    }

    /// Returns why the session is over.
    async fn hear(&mut self, mirror: &Mirror, session: &mut Session) -> String {
        loop {
            match session.news.next().await {
                Some(Ok(delivery)) => self.sort(mirror, delivery).await,
                Some(Err(error)) => return error.to_string(),
                None => return "the queue was deleted".to_owned(),
            }
        }
    }

    /// Hands a message to the fetcher of its user; one that needs no fetch is acknowledged here.
    async fn sort(&mut self, mirror: &Mirror, delivery: Delivery) {
        let counts = &mirror.counts;
        let passed_over = match Notice::from_message(&delivery.properties, &delivery.data) {
            Err(_) => &counts.malformed,
            Ok(notice) if !mirror.users.contains(&notice.user_id) => &counts.foreign,
            Ok(notice) => {
                counts.received.fetch_add(1, Relaxed);
                counts.redelivered.fetch_add(u64::from(delivery.redelivered), Relaxed);
                if mirror.lose.contains(&notice.user_id) {
                    &counts.lost
                } else if !self.heard.insert(notice.message_id) {
                    &counts.duplicates
                } else {
                    let inbox = &self.inboxes[(notice.user_id.as_u128() % FETCHERS as u128) as usize];
                    // A fetcher ends when its inbox does.
                    let _ = inbox.send(Letter { notice, acker: delivery.acker }).await;
                    return;
                }
            }
        };
        passed_over.fetch_add(1, Relaxed);
        acknowledge(&delivery.acker).await;
    }
}

async fn fetch(mirror: Arc<Mirror>, mut letters: mpsc::Receiver<Letter>) {
    while let Some(Letter { notice, acker }) = letters.recv().await {
        if mirror.version(notice.user_id) >= notice.version {
            mirror.counts.outrun.fetch_add(1, Relaxed);
        }
        mirror.follow(&notice).await;
        acknowledge(&acker).await;
    }
}

/// On a connection that is gone this does nothing, and the message comes again. lapin (4.12) may never say so.
async fn acknowledge(acker: &Acker) {
    let _ = timeout(PAUSE, acker.ack(BasicAckOptions::default())).await;
}

async fn reconnect(queue: &Queue) -> Session {
    loop {
        sleep(PAUSE).await;
        if let Ok(session) = queue.open().await {
            return session;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the mirror is at these versions; false when it makes no headway for as long as `patience`.
pub async fn caught_up(mirror: &Mirror, targets: &[(Uuid, i64)], reached: &AtomicU64, patience: Duration) -> bool {
    const LOOK: Duration = Duration::from_millis(20);
    let (mut before, mut headway) = (0, Instant::now());
    loop {
        let at = targets.iter().filter(|(user, version)| mirror.version(*user) >= *version).count();
        reached.store(at as u64, Relaxed);
        if at > before {
            (before, headway) = (at, Instant::now());
        }
        if at == targets.len() || headway.elapsed() > patience {
            return at == targets.len();
        }
        sleep(LOOK).await;
    }
}
