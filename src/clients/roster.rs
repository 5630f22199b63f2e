//! Roster: who may ask, as every instance has it in memory.
//!
//! Promise: a caller is judged by what the database said less than a second ago, and never by anything older: rather 503.
//! Not here, on purpose: a look at the database for each request, or for each wrong key that somebody tries.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::PgPool;
use subtle::ConstantTimeEq;
use tidings_sdk::subscription::SubscriptionName;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};

use super::{
    key::{Key, KeyId},
    model::{Caller, Facts, Scope, declared},
    store::{self, Asker, KeyRow},
    token::{Claimed, Tokens},
};
use crate::{
    db::{self, Db, Line, Trouble},
    lifecycle::Roles,
    profile::FieldSet,
};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(250);
/// A look older than this decides nothing any more.
const BELIEVED: Duration = Duration::from_millis(900);
/// Between two looks that somebody waits for: whoever tries keys costs the database twenty looks a second, however many he tries.
const GAP: Duration = Duration::from_millis(50);
/// For a look that somebody waits for.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two notes of which keys were used.
const NOTE_USE_EVERY: Duration = Duration::from_secs(60);

/// Who may ask. Cheap to clone.
#[derive(Clone)]
pub struct Clients {
    /// `None`: whoever asks, may.
    roster: Option<Roster>,
    queries: PgPool,
}

#[derive(Clone)]
struct Roster {
    /// `None`: only keys are taken.
    tokens: Option<Arc<Tokens>>,
    looks: watch::Receiver<Look>,
    wanted: Arc<Notify>,
    used: Used,
}

/// The keys that were used since that was last noted.
type Used = Arc<Mutex<HashSet<KeyId>>>;

/// The latest look at the database.
#[derive(Clone)]
struct Look {
    /// When it began: what was committed before is in it.
    began: Instant,
    /// Or why it failed.
    seen: Result<Arc<Seen>, Unknowable>,
}

struct Seen {
    by_key: HashMap<KeyId, ([u8; 32], Caller)>,
    /// Only who takes tokens: who can give names at the identity provider has not all that keys open.
    by_name: HashMap<String, Caller>,
}

/// Why nobody can be told who asks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the database does not say who may ask: {0}")]
pub struct Unknowable(Arc<str>);

impl Clients {
    /// Starts looking, on `roles`. Looks until the last clone is gone.
    pub fn open(db: &Db, queries: PgPool, tokens: Option<Tokens>, roles: &Roles) -> Self {
        let nothing = Look { began: Instant::now(), seen: Err(Unknowable("it was not asked yet".into())) };
        let (sender, looks) = watch::channel(nothing);
        let (wanted, used) = <(Arc<Notify>, Used)>::default();
        roles.spawn("clients", look_on(db.line("clients", db::LOCALLY), sender, wanted.clone(), used.clone()));
        Self { roster: Some(Roster { tokens: tokens.map(Arc::new), looks, wanted, used }), queries }
    }

    /// Asks nobody for a key.
    pub fn anybody(queries: PgPool) -> Self {
        Self { roster: None, queries }
    }

    /// Whether nobody is asked for a key.
    pub fn is_anybody(&self) -> bool {
        self.roster.is_none()
    }

    /// A key, or a token that was verified before: what can be told for nothing.
    pub fn recall(&self, bearer: &str) -> Option<Sought> {
        if Key::is_meant(bearer) {
            return bearer.parse().ok().map(Sought::Key);
        }
        self.roster.as_ref()?.tokens.as_ref()?.recall(bearer).map(Sought::Token)
    }

    /// A token whose signature is right, which takes the processor a while to tell.
    pub fn verify(&self, bearer: &str) -> Option<Sought> {
        self.roster.as_ref()?.tokens.as_ref()?.verify(bearer).map(Sought::Token)
    }

    /// Whether nobody had this when the database last said whose it is, however long ago: whoever makes the machine slow gains
    /// nothing by it, and nobody whom it had known becomes a stranger. False while the database does not answer.
    pub fn is_strange(&self, sought: &Sought) -> bool {
        let Some(roster) = &self.roster else { return false };
        let Ok(seen) = roster.looks.borrow().seen.clone() else { return false };
        sought.in_roster(&seen).is_none()
    }

    /// Whose it is, if that is known already; without a look at the database.
    pub fn known(&self, sought: &Sought) -> Option<Caller> {
        let roster = self.roster.as_ref()?;
        let caller = sought.in_roster(&*roster.latest()?)?;
        roster.note_use(&caller);
        Some(caller)
    }

    /// Whose it is; `None` when it opens nothing.
    ///
    /// # Errors
    /// When the database has not said so for a second, and does not now.
    pub async fn caller(&self, sought: &Sought) -> Result<Option<Caller>, Unknowable> {
        let Some(roster) = &self.roster else { return Ok(Some(Caller::anonymous())) };
        let caller = roster.find(|seen| sought.in_roster(seen)).await?;
        caller.iter().for_each(|caller| roster.note_use(caller));
        Ok(caller)
    }

    /// Waits until it is known who may ask.
    ///
    /// # Errors
    /// When the database has not said so for a second, and does not now.
    pub async fn known_now(&self) -> Result<(), Unknowable> {
        match &self.roster {
            Some(roster) if roster.latest().is_none() => roster.look_now().await.map(drop),
            _ => Ok(()),
        }
    }

    /// Whether `caller` may look after this subscription; `None` when there is none of this name.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn stands_for(&self, caller: &Caller, name: &SubscriptionName) -> Result<Option<bool>, Trouble> {
        let (queries, name) = (self.queries.clone(), name.clone());
        let client = db::ask(async move { store::client_of(&queries, &name).await }).await?;
        Ok(client.map(|client| caller.is_admin() || client.as_deref() == Some(&*caller.client)))
    }
}

impl Roster {
    /// What was seen last, if that was lately.
    fn latest(&self) -> Option<Arc<Seen>> {
        let latest = self.looks.borrow().clone();
        latest.seen.ok().filter(|_| latest.began.elapsed() < BELIEVED)
    }

    async fn find(&self, find: impl Fn(&Seen) -> Option<Caller>) -> Result<Option<Caller>, Unknowable> {
        if let Some(found) = self.latest().and_then(|seen| find(&seen)) {
            return Ok(Some(found));
        }
        // Unknown until now: made a moment ago, perhaps, on another instance.
        Ok(find(&*self.look_now().await?))
    }

    /// What a look sees that begins from now on.
    async fn look_now(&self) -> Result<Arc<Seen>, Unknowable> {
        let asked = Instant::now();
        let mut looks = self.looks.clone();
        self.wanted.notify_one();
        match timeout(PATIENCE, looks.wait_for(|look| look.began >= asked)).await {
            Ok(Ok(look)) => look.seen.clone(),
            Ok(Err(_)) => Err(Unknowable("nobody asks it any more".into())),
            Err(_) => Err(Unknowable(format!("no answer within {PATIENCE:?}").into())),
        }
    }

    fn note_use(&self, caller: &Caller) {
        let Some(key) = &caller.key else { return };
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if !used.contains(key) {
            used.insert(key.clone());
        }
    }
}

/// What somebody came with: something that may have been made by us, or by who may.
pub enum Sought {
    Key(Key),
    Token(Claimed),
}

impl Sought {
    fn in_roster(&self, seen: &Seen) -> Option<Caller> {
        match self {
            Self::Key(key) => seen.with_key(key),
            Self::Token(claimed) => {
                let caller = seen.by_name.get(&claimed.client).cloned()?;
                Some(match &claimed.scopes {
                    Some(scopes) => caller.limited_to(scopes),
                    None => caller,
                })
            }
        }
    }
}

impl Seen {
    fn of(keys: Vec<KeyRow>, askers: Vec<Asker>) -> Self {
        let callers: HashMap<String, Asker> = askers.into_iter().map(|asker| (asker.name.clone(), asker)).collect();
        let entry = |key: KeyRow| {
            let (asker, id) = (callers.get(&key.client)?, KeyId::from_kept(key.id));
            let sha256 = key.sha256.try_into().ok()?;
            Some((id.clone(), (sha256, asker.caller(Some(id)))))
        };
        let by_key = keys.into_iter().filter_map(entry).collect();
        let take_tokens = callers.iter().filter(|(_, asker)| asker.takes_tokens);
        let by_name = take_tokens.map(|(name, asker)| (name.clone(), asker.caller(None))).collect();
        Self { by_key, by_name }
    }

    fn with_key(&self, key: &Key) -> Option<Caller> {
        let (sha256, caller) = self.by_key.get(&key.id)?;
        bool::from(sha256.ct_eq(&key.sha256)).then(|| caller.clone())
    }
}

impl Asker {
    fn caller(&self, key: Option<KeyId>) -> Caller {
        let may_declare = FieldSet::of(self.fields.clone());
        let is_admin = self.scopes.contains(&Scope::Admin);
        let reads = if is_admin {
            FieldSet::All
        } else if self.subscriptions.is_empty() {
            may_declare.clone()
        } else {
            may_declare.and(&declared(&self.declared_keys, self.declared_fields.clone()))
        };
        let writes = self.write_fields.clone().map_or_else(|| may_declare.clone(), |fields| FieldSet::of(Some(fields)));
        Facts {
            client: self.name.as_str().into(),
            key,
            scopes: self.scopes.clone(),
            reads,
            writes: if is_admin { FieldSet::All } else { writes },
            may_declare: if is_admin { FieldSet::All } else { may_declare },
            subscriptions: self.subscriptions.clone(),
            rate: self.rate,
        }
        .into()
    }
}

/// One look, before anybody asks.
///
/// # Errors
/// When the database does not let itself be asked, with what is to be done.
pub async fn check(db: &Db) -> anyhow::Result<()> {
    let mut line = db.line("clients", []);
    look(&mut line).await.map_err(db::explained)?;
    line.hang_up().await;
    Ok(())
}

/// Looks, and looks again, until nobody wants to know.
async fn look_on(mut line: Line, looks: watch::Sender<Look>, wanted: Arc<Notify>, used: Used) {
    // An outage is told once.
    let (mut is_well, mut noted) = (true, Instant::now());
    while !looks.is_closed() {
        let began = Instant::now();
        let looked = tokio::select! {
            looked = look(&mut line) => looked,
            // A database that does not answer holds up no leaving.
            () = looks.closed() => break,
        };
        let seen = match looked {
            Ok(seen) => {
                is_well = true;
                Ok(Arc::new(seen))
            }
            Err(trouble) => {
                let why = trouble.report();
                if std::mem::take(&mut is_well) {
                    tracing::warn!("clients cannot be told from strangers until the database answers: {why}");
                }
                Err(Unknowable(why.into()))
            }
        };
        looks.send_replace(Look { began, seen });
        if noted.elapsed() >= NOTE_USE_EVERY {
            noted = Instant::now();
            note_use(&mut line, &used).await;
        }
        tokio::select! {
            () = sleep(EVERY) => {}
            () = async { wanted.notified().await; sleep(GAP.saturating_sub(began.elapsed())).await } => {}
            () = looks.closed() => {}
        }
    }
    note_use(&mut line, &used).await;
    line.hang_up().await;
}

async fn look(line: &mut Line) -> Result<Seen, Trouble> {
    // A look that failed because the connection was lost is worth one more on a new one.
    let outcome = match line.run(async |connection| store::roster(connection).await).await {
        Err(Trouble::Broken(_)) => line.run(async |connection| store::roster(connection).await).await,
        outcome => outcome,
    };
    outcome.map(|(keys, askers)| Seen::of(keys, askers))
}

async fn note_use(line: &mut Line, used: &Used) {
    let used = std::mem::take(&mut *used.lock().unwrap_or_else(PoisonError::into_inner));
    if used.is_empty() {
        return;
    }
    let ids: Vec<KeyId> = used.into_iter().collect();
    if let Err(trouble) = line.run(async |connection| store::used(connection, &ids).await).await {
        tracing::debug!("which keys were used could not be noted: {}", trouble.report());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// While the database neither answers nor refuses, nothing else tells that what was seen may be over.
    #[tokio::test(start_paused = true)]
    async fn a_look_is_believed_for_less_than_a_second() {
        let seen = Ok(Arc::new(Seen::of(vec![], vec![])));
        let (_looks, looks) = watch::channel(Look { began: Instant::now(), seen });
        let roster = Roster { tokens: None, looks, wanted: Arc::default(), used: Used::default() };
        assert!(roster.latest().is_some());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(roster.latest().is_none());
    }
}
