//! What a client asks to happen to one user, and what that makes of the state it meets. Pure: decides, and writes nothing.

use tidings_sdk::{envelope::Event, trace::Traceparent};
use time::OffsetDateTime;

use super::model::{Record, Tombstone, User, UserId, Version};
use crate::{
    json::Fault,
    profile::{self, Fields, Profile, Schema},
    web::Precondition,
};

/// A change that a client asked for.
#[derive(Debug, Clone)]
pub struct Change {
    pub id: UserId,
    pub verb: Verb,
    pub condition: Precondition,
    pub trace: Traceparent,
}

#[derive(Clone)]
pub enum Verb {
    /// A new user under an id of ours.
    Create(Profile),
    /// Merge this patch (RFC 7396) into the profile.
    Amend(Fields),
    /// Replace the profile, or create the user under the client's own id.
    Replace(Profile),
    Delete,
}

/// Says which verb and nothing else: a patch holds values.
impl std::fmt::Debug for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Create(_) => "Create",
            Self::Amend(_) => "Amend",
            Self::Replace(_) => "Replace",
            Self::Delete => "Delete",
        })
    }
}

/// What a change comes to, given the state it meets.
#[derive(Debug, Clone)]
pub enum Plan {
    /// Write `after` over `seen` and tell `event`.
    Write(Step),
    /// The state is already so: nothing to write, nobody to tell.
    Nothing(Record),
}

/// One change of one user, ready to be written if version `seen` still holds.
#[derive(Debug, Clone)]
pub struct Step {
    /// The version this step was planned on; 0 when there was no such user.
    pub seen: Version,
    pub after: Record,
    pub event: Event,
    pub trace: Traceparent,
}

/// What a change has led to.
#[derive(Debug, Clone)]
pub struct Changed {
    pub record: Record,
    /// Whether this change brought the user into being.
    pub created: bool,
}

impl Changed {
    /// The record was so already.
    pub fn nothing(record: Record) -> Self {
        Self { record, created: false }
    }
}

impl From<&Step> for Changed {
    fn from(step: &Step) -> Self {
        Self { record: step.after.clone(), created: step.event == Event::Created }
    }
}

/// Why a change does not happen. Final for the state it met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// No user ever had this id.
    Missing,
    Gone(Tombstone),
    /// The condition does not hold; the version that does, if there is a user.
    Stale(Option<Version>),
    /// The profile would break the schema.
    Invalid(Vec<Fault>),
}

impl Change {
    /// Decides what this change makes of `before`.
    ///
    /// # Errors
    /// [`Refusal`] when it makes nothing of it.
    pub fn plan(&self, before: Option<&Record>, schema: &Schema) -> Result<Plan, Refusal> {
        match (before, &self.verb) {
            (Some(Record::Deleted(tombstone)), Verb::Delete) => Ok(Plan::Nothing(Record::Deleted(*tombstone))),
            (Some(Record::Deleted(tombstone)), _) => Err(Refusal::Gone(*tombstone)),
            (Some(Record::Living(user)), verb) => {
                self.check(Some(user))?;
                self.plan_on(user, verb, schema)
            }
            (None, Verb::Create(profile) | Verb::Replace(profile)) => {
                self.check(None)?;
                Ok(self.create(profile))
            }
            (None, Verb::Amend(_) | Verb::Delete) => Err(Refusal::Missing),
        }
    }

    fn check(&self, user: Option<&User>) -> Result<(), Refusal> {
        let version = user.map(|user| user.version);
        if self.condition.allows(version) { Ok(()) } else { Err(Refusal::Stale(version)) }
    }

    fn plan_on(&self, user: &User, verb: &Verb, schema: &Schema) -> Result<Plan, Refusal> {
        match verb {
            Verb::Create(_) => Err(Refusal::Stale(Some(user.version))),
            Verb::Delete => Ok(self.delete(user)),
            Verb::Amend(patch) => {
                let before = user.profile.fields();
                let after = profile::merged(&before, patch);
                self.update(user, &before, &after, || schema.admit(&after))
            }
            Verb::Replace(profile) => {
                self.update(user, &user.profile.fields(), &profile.fields(), || Ok(profile.clone()))
            }
        }
    }

    fn create(&self, profile: &Profile) -> Plan {
        let user =
            User { id: self.id, version: 1, created_at: UNSTAMPED, updated_at: UNSTAMPED, profile: profile.clone() };
        self.write(0, Record::Living(user), Event::Created)
    }

    fn update(
        &self,
        user: &User,
        before: &Fields,
        after: &Fields,
        admit: impl FnOnce() -> Result<Profile, Vec<Fault>>,
    ) -> Result<Plan, Refusal> {
        let changed_fields = profile::changed_fields(before, after);
        if changed_fields.is_empty() {
            return Ok(Plan::Nothing(Record::Living(user.clone())));
        }
        let profile = admit().map_err(Refusal::Invalid)?;
        let after = User { version: user.version + 1, updated_at: UNSTAMPED, profile, ..*user };
        Ok(self.write(user.version, Record::Living(after), Event::Updated { changed_fields }))
    }

    fn delete(&self, user: &User) -> Plan {
        let tombstone = Tombstone { id: self.id, version: user.version + 1, deleted_at: UNSTAMPED };
        self.write(user.version, Record::Deleted(tombstone), Event::Deleted)
    }

    fn write(&self, seen: Version, after: Record, event: Event) -> Plan {
        Plan::Write(Step { seen, after, event, trace: self.trace })
    }
}

/// The database's clock tells when a change happened: [`Record::stamped`] fills it in once the change is kept.
const UNSTAMPED: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn stamp(time: &mut OffsetDateTime, now: OffsetDateTime) {
    if *time == UNSTAMPED {
        *time = now;
    }
}

impl Record {
    /// This record with the time at which it was written, wherever it still lacks one.
    #[must_use]
    pub fn stamped(self, now: OffsetDateTime) -> Self {
        match self {
            Self::Living(mut user) => {
                stamp(&mut user.created_at, now);
                stamp(&mut user.updated_at, now);
                Self::Living(user)
            }
            Self::Deleted(tombstone) => Self::Deleted(tombstone.stamped(now)),
        }
    }
}

impl Tombstone {
    #[must_use]
    pub fn stamped(mut self, now: OffsetDateTime) -> Self {
        stamp(&mut self.deleted_at, now);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn fields(value: Value) -> Fields {
        value.as_object().unwrap().clone()
    }

    fn change(verb: Verb, condition: Precondition) -> Change {
        Change { id: UserId::new(), verb, condition, trace: Traceparent::new_root() }
    }

    fn admitted(schema: &Schema, value: Value) -> Profile {
        schema.admit(&fields(value)).unwrap()
    }

    /// Plans in a row, each on what the one before made of it.
    fn walk(schema: &Schema, changes: impl IntoIterator<Item = Change>) -> Vec<String> {
        let mut before: Option<Record> = None;
        let mut told = vec![];
        for change in changes {
            match change.plan(before.as_ref(), schema) {
                Ok(Plan::Write(step)) => {
                    assert_eq!(step.seen, before.as_ref().map_or(0, Record::version));
                    assert_eq!(step.after.version(), step.seen + 1);
                    told.push(format!("{} {}", step.after.version(), step.event.name()));
                    before = Some(step.after);
                }
                Ok(Plan::Nothing(_)) => told.push("nothing".into()),
                Err(Refusal::Missing) => told.push("missing".into()),
                Err(Refusal::Gone(tombstone)) => told.push(format!("gone at {}", tombstone.version)),
                Err(Refusal::Stale(version)) => told.push(format!("stale {version:?}")),
                Err(Refusal::Invalid(faults)) => told.push(format!("invalid {}", faults[0].pointer)),
            }
        }
        told
    }

    #[test]
    fn a_life() {
        let schema = Schema::load(None).unwrap();
        let ana = admitted(&schema, json!({ "first_name": "Ana" }));
        let amend = |patch| change(Verb::Amend(fields(patch)), Precondition::None);
        assert_eq!(
            walk(
                &schema,
                [
                    amend(json!({ "first_name": "Ana" })),
                    change(Verb::Delete, Precondition::None),
                    change(Verb::Create(ana.clone()), Precondition::None),
                    amend(json!({ "first_name": "Ana" })),
                    amend(json!({ "job_title": "Editor" })),
                    amend(json!({ "job_title": 7 })),
                    change(Verb::Replace(ana.clone()), Precondition::None),
                    change(Verb::Replace(ana.clone()), Precondition::None),
                    change(Verb::Delete, Precondition::None),
                    change(Verb::Delete, Precondition::None),
                    amend(json!({})),
                    change(Verb::Replace(ana), Precondition::None),
                ]
            ),
            [
                "missing",
                "missing",
                "1 user.created",
                "nothing",
                "2 profile.updated",
                "invalid /profile/job_title",
                "3 profile.updated",
                "nothing",
                "4 user.deleted",
                "nothing",
                "gone at 4",
                "gone at 4"
            ]
        );
    }

    #[test]
    fn a_condition_is_checked_against_the_state_met() {
        let schema = Schema::load(None).unwrap();
        let ana = admitted(&schema, json!({ "first_name": "Ana" }));
        let replace = |condition| change(Verb::Replace(ana.clone()), condition);
        assert_eq!(
            walk(
                &schema,
                [
                    replace(Precondition::Exists),
                    replace(Precondition::VersionIn(vec![1])),
                    replace(Precondition::Absent),
                    replace(Precondition::Absent),
                    change(Verb::Delete, Precondition::VersionIn(vec![2, 3])),
                    change(Verb::Delete, Precondition::VersionIn(vec![1])),
                ]
            ),
            ["stale None", "stale None", "1 user.created", "stale Some(1)", "stale Some(1)", "2 user.deleted"]
        );
    }
}
