//! What a client asks to happen to one user, and what that makes of the state it meets. Pure: decides, and writes nothing.

use tidings_sdk::{
    envelope::{Event, FieldName},
    trace::Traceparent,
};
use time::OffsetDateTime;

use super::{
    model::{ExternalId, Record, Tombstone, User, UserId, Version},
    repeat::Claim,
};
use crate::{
    json::Fault,
    profile::{self, EXTERNAL_ID, FieldSet, Fields, Profile, Schema},
    web::Precondition,
};

/// A change that a client asked for.
#[derive(Debug, Clone)]
pub struct Change {
    pub id: UserId,
    pub verb: Verb,
    pub external_id: Naming,
    pub condition: Precondition,
    pub trace: Traceparent,
    /// Whether a living user may only be changed by who says which version he saw.
    pub must_be_conditional: bool,
    /// That it is one request, however often it is sent.
    pub claim: Option<Claim>,
}

#[derive(Clone)]
pub enum Verb {
    /// A new user under an id of ours.
    Create(Fields),
    /// Merge this patch (RFC 7396) into the profile.
    Amend(Fields),
    /// Put these in place of all that are within those of which the client has the whole; the others stay as they are. Or create the
    /// user under the client's own id.
    Replace {
        fields: Fields,
        within: FieldSet,
    },
    Delete,
}

/// Says which verb and nothing else: a patch holds values.
impl std::fmt::Debug for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Create(_) => "Create",
            Self::Amend(_) => "Amend",
            Self::Replace { .. } => "Replace",
            Self::Delete => "Delete",
        })
    }
}

/// What a change does to the external id.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Naming {
    #[default]
    Stays,
    Is(ExternalId),
    Goes,
}

impl Naming {
    fn after(&self, before: Option<&ExternalId>) -> Option<ExternalId> {
        match self {
            Self::Stays => before.cloned(),
            Self::Is(external_id) => Some(external_id.clone()),
            Self::Goes => None,
        }
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
    /// Whether the external id is another one than before; a deletion frees it.
    pub renames: bool,
    pub trace: Traceparent,
    pub claim: Option<Claim>,
}

/// What a change has led to.
#[derive(Debug, Clone)]
pub struct Changed {
    pub record: Record,
    /// Whether this change brought the user into being.
    pub created: bool,
    /// Whether it is written, rather than found to be so already.
    pub is_written: bool,
}

impl Changed {
    /// The record was so already.
    pub fn nothing(record: Record) -> Self {
        Self { record, created: false, is_written: false }
    }
}

impl From<&Step> for Changed {
    fn from(step: &Step) -> Self {
        Self { record: step.after.clone(), created: step.event == Event::Created, is_written: true }
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
    /// Another user has the external id.
    Taken,
    /// The deployment takes no change of a living user without a condition.
    Unconditional,
}

impl Change {
    /// A change without conditions.
    pub fn new(id: UserId, verb: Verb, trace: Traceparent) -> Self {
        let (external_id, condition) = (Naming::Stays, Precondition::None);
        Self { id, verb, external_id, condition, trace, must_be_conditional: false, claim: None }
    }

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
            (None, Verb::Create(fields) | Verb::Replace { fields, .. }) => {
                self.check(None)?;
                Ok(self.create(schema.admit(fields.clone()).map_err(Refusal::Invalid)?))
            }
            (None, Verb::Amend(_) | Verb::Delete) => Err(Refusal::Missing),
        }
    }

    fn check(&self, user: Option<&User>) -> Result<(), Refusal> {
        let version = user.map(|user| user.version);
        if self.must_be_conditional && user.is_some() && self.condition == Precondition::None {
            return Err(Refusal::Unconditional);
        }
        if self.condition.allows(version) { Ok(()) } else { Err(Refusal::Stale(version)) }
    }

    fn plan_on(&self, user: &User, verb: &Verb, schema: &Schema) -> Result<Plan, Refusal> {
        match verb {
            Verb::Create(_) => Err(Refusal::Stale(Some(user.version))),
            Verb::Delete => Ok(self.delete(user)),
            Verb::Amend(patch) => {
                let mut after = user.profile.fields();
                let changed = profile::amend(&mut after, patch);
                self.update(user, changed, after, schema)
            }
            Verb::Replace { fields, within } => {
                let (before, mut after) = (user.profile.fields(), fields.clone());
                let stay = before.iter().filter(|(name, _)| !within.has(name) && !fields.contains_key(*name));
                after.extend(stay.map(|(name, value)| (name.clone(), value.clone())));
                self.update(user, profile::changed_fields(&before, &after), after, schema)
            }
        }
    }

    fn create(&self, profile: Profile) -> Plan {
        let (version, external_id) = (1, self.external_id.after(None));
        let renames = external_id.is_some();
        let user = User { id: self.id, version, created_at: UNSTAMPED, updated_at: UNSTAMPED, external_id, profile };
        self.write(0, Record::Living(user), Event::Created, renames)
    }

    /// The profile comes to `after`; `changed_fields` are those that can be told.
    fn update(
        &self,
        user: &User,
        mut changed_fields: Vec<FieldName>,
        after: Fields,
        schema: &Schema,
    ) -> Result<Plan, Refusal> {
        // A name that cannot travel is in no schema either: who brings one hears so, though there is nobody to be told of it.
        let is_same = changed_fields.is_empty() && after == user.profile.fields();
        let profile = if is_same { user.profile.clone() } else { schema.admit(after).map_err(Refusal::Invalid)? };
        let external_id = self.external_id.after(user.external_id.as_ref());
        let renames = external_id != user.external_id;
        if changed_fields.is_empty() && !renames {
            return Ok(Plan::Nothing(Record::Living(user.clone())));
        }
        if renames {
            changed_fields.push(EXTERNAL_ID.parse().expect("it is a field's name"));
            changed_fields.sort();
        }
        let version = user.version + 1;
        let after =
            User { id: user.id, version, created_at: user.created_at, updated_at: UNSTAMPED, external_id, profile };
        Ok(self.write(user.version, Record::Living(after), Event::Updated { changed_fields }, renames))
    }

    fn delete(&self, user: &User) -> Plan {
        let tombstone = Tombstone { id: self.id, version: user.version + 1, deleted_at: UNSTAMPED };
        self.write(user.version, Record::Deleted(tombstone), Event::Deleted, user.external_id.is_some())
    }

    fn write(&self, seen: Version, after: Record, event: Event, renames: bool) -> Plan {
        Plan::Write(Step { seen, after, event, renames, trace: self.trace, claim: self.claim.clone() })
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
        Change { condition, ..Change::new(UserId::new(), verb, Traceparent::new_root()) }
    }

    fn replacement(value: Value) -> Verb {
        Verb::Replace { fields: fields(value), within: FieldSet::All }
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
                Err(Refusal::Taken) => unreachable!("a plan knows no other users"),
                Err(Refusal::Unconditional) => told.push("unconditional".into()),
            }
        }
        told
    }

    #[test]
    fn a_life() {
        let schema = Schema::load(None).unwrap();
        let replace = |profile| change(replacement(profile), Precondition::None);
        let amend = |patch| change(Verb::Amend(fields(patch)), Precondition::None);
        assert_eq!(
            walk(
                &schema,
                [
                    amend(json!({ "first_name": "Ana" })),
                    change(Verb::Delete, Precondition::None),
                    change(Verb::Create(fields(json!({ "first_name": "Ana" }))), Precondition::None),
                    amend(json!({ "first_name": "Ana" })),
                    amend(json!({ "job_title": "Editor" })),
                    amend(json!({ "job_title": 7 })),
                    amend(json!({ "two words": "x" })),
                    replace(json!({ "first_name": "Ana" })),
                    replace(json!({ "first_name": "Ana" })),
                    replace(json!({ "first_name": "Ana", "two words": "x" })),
                    change(Verb::Delete, Precondition::None),
                    change(Verb::Delete, Precondition::None),
                    amend(json!({})),
                    replace(json!({ "first_name": "Ana" })),
                ]
            ),
            [
                "missing",
                "missing",
                "1 user.created",
                "nothing",
                "2 profile.updated",
                "invalid /profile/job_title",
                "invalid /profile/two words",
                "3 profile.updated",
                "nothing",
                "invalid /profile/two words",
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
        let replace = |condition| change(replacement(json!({ "first_name": "Ana" })), condition);
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
    #[test]
    fn an_external_id_is_kept_until_something_else_is_said_of_it() {
        let schema = Schema::load(None).unwrap();
        let named =
            |verb: &Verb, external_id: Naming| Change { external_id, ..change(verb.clone(), Precondition::None) };
        let is = |text: &str| Naming::Is(text.parse().unwrap());
        let (amend, replace) = (Verb::Amend(Fields::new()), replacement(json!({ "first_name": "Ana" })));
        let mut before: Option<Record> = None;
        let mut seen = vec![];
        for change in [
            named(&replace, is("E-1")),
            named(&replace, Naming::Stays),
            named(&amend, is("E-1")),
            named(&amend, is("E-2")),
            named(&Verb::Amend(fields(json!({ "city": "Riga", "nickname": "A" }))), is("E-3")),
            named(&amend, Naming::Goes),
            named(&amend, Naming::Goes),
            named(&replace, is("E-4")),
            named(&Verb::Delete, Naming::Stays),
        ] {
            let Plan::Write(step) = change.plan(before.as_ref(), &schema).unwrap() else {
                seen.push("nothing".to_owned());
                continue;
            };
            let fields = step.event.changed_fields().iter().map(FieldName::as_str).collect::<Vec<_>>().join(",");
            let external_id = step.after.external_id().map_or("-", ExternalId::as_str);
            seen.push(format!("{external_id} [{fields}] {}", step.renames));
            before = Some(step.after);
        }
        assert_eq!(
            seen,
            [
                "E-1 [] true",
                "nothing",
                "nothing",
                "E-2 [external_id] true",
                "E-3 [city,external_id,nickname] true",
                "- [external_id] true",
                "nothing",
                "E-4 [city,external_id,nickname] true",
                "- [] true",
            ]
        );
    }
}
