//! A batch: which changes are written together, and what each caller hears of it. Pure: decides, and writes nothing.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use super::{
    change::{Change, Changed, Plan, Refusal, Step},
    model::{Record, UserId},
    store::{Kept, Stack},
};
use crate::profile::Schema;

/// A change that is to be written: `step` is what it makes of the state that `caller` saw.
pub struct Order<C> {
    pub change: Arc<Change>,
    pub step: Step,
    pub caller: C,
}

/// How the answer to a change ended.
#[derive(Debug)]
pub enum Answer {
    /// Committed, together with its event; or nothing had to change.
    Done(Changed),
    /// Final for a state that is committed.
    Refused(Refusal),
    /// The state it was planned on is no more; plan again on this one.
    Moved(Option<Record>),
    /// It could not be in this batch: plan again, on what there is now.
    Again,
}

/// What one caller will hear if the stack his change is in gets kept.
pub struct Promise<C> {
    pub user: UserId,
    pub caller: C,
    pub if_kept: Answer,
    /// Whether it is this one that claims the external id, if the stack claims any.
    pub renames: bool,
}

/// One stack per user. The first change of a user brings its plan; the others are planned again, on top of it.
pub fn pile_up<C>(orders: impl Iterator<Item = Order<C>>, schema: &Schema) -> (Vec<Stack>, Vec<Promise<C>>) {
    let mut stacks: HashMap<UserId, Stack> = HashMap::new();
    let mut promises = vec![];
    for Order { change, step, caller } in orders {
        let user = change.id;
        let mut renames = false;
        let if_kept = match stacks.entry(user) {
            Entry::Vacant(place) => {
                let changed = Changed::from(&step);
                renames = step.renames;
                place.insert(Stack::new(step));
                Answer::Done(changed)
            }
            Entry::Occupied(mut stack) => match change.plan(Some(stack.get().top()), schema) {
                Ok(Plan::Write(step)) => {
                    let changed = Changed::from(&step);
                    renames = step.renames;
                    if stack.get_mut().push(step) { Answer::Done(changed) } else { Answer::Again }
                }
                Ok(Plan::Nothing(record)) => Answer::Done(Changed::nothing(record)),
                Err(refusal) => Answer::Refused(refusal),
            },
        };
        promises.push(Promise { user, caller, if_kept, renames });
    }
    (stacks.into_values().collect(), promises)
}

impl Answer {
    /// What was to be heard if the stack was kept, now that it is known whether it was.
    pub fn given(self, kept: Kept, renames: bool) -> Self {
        match (kept, self) {
            (Kept::Taken(_), Self::Done(_)) if renames => Self::Refused(Refusal::Taken),
            (Kept::Repeated | Kept::Outdated, _) => Self::Again,
            (Kept::Moved(now) | Kept::Taken(now), _) => Self::Moved(now),
            (Kept::Done { at }, Self::Done(changed)) => {
                Self::Done(Changed { record: changed.record.stamped(at), ..changed })
            }
            (Kept::Done { at }, Self::Refused(Refusal::Gone(tombstone))) => {
                Self::Refused(Refusal::Gone(tombstone.stamped(at)))
            }
            (Kept::Done { .. }, other) => other,
        }
    }
}
