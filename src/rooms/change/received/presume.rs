//! Members of whom nothing is known, because the room was joined without them: an event that names a member event as allowing it
//! is taken at its word, as state resolution does where the state before an event has nothing to say
//! (`docs/decisions/partial-state-joins.md`). Where the state says otherwise of a member than the event does, it may rest on what is taken
//! at its word, and both are resolved (MSC3902).

use std::{collections::BTreeMap, sync::Arc};

use ruma::OwnedEventId;

use super::{super::Change, Question, Resolving};
use crate::{
    error::Result,
    ids::{EventNum, StateKeyNum},
    rooms::{
        admit::{AuthState, Known},
        event::{self, Event, StateEvent},
        state::{self, Sketch, StateRef, StateValue},
    },
    schema,
    schema::{event_types::MEMBER, rooms::Place},
};

/// A member who is presumed to be as an event says: the key, and the member event.
pub(in crate::rooms::change) type Presumed = Vec<(StateKeyNum, EventNum)>;

impl Change {
    /// Gives the state by which an event is judged where not all members are known: what the state before it and the members whom it names
    /// resolve to.
    pub(super) fn resolve_named(
        &mut self,
        auth: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
        before: &Sketch,
        resolving: Resolving<'_>,
    ) -> Result<Result<Sketch, Question>> {
        let mut named = before.clone();
        let Some(partial) = self.row.partial.as_ref().filter(|_| self.presumes()) else {
            return Ok(Ok(named));
        };
        for allowing in auth.values() {
            let Known::Found(allowing) = allowing else { continue };
            let is_member = allowing.parsed.event_type.to_string() == MEMBER && !allowing.parsed.rejected;
            let Some(user) = allowing.parsed.state_key.as_deref().filter(|_| is_member) else { continue };
            if event::server_of(user) == Some(&partial.us) {
                continue;
            }
            let Some(key) = state::find_key(&self.batch, self.num, MEMBER, user)? else { continue };
            let known = before.at(&self.batch, self.num, key)?;
            if known.event().is_some_and(|known| known != allowing.event) {
                named = named.with(Some((key, StateValue::Event(allowing.event))));
            }
        }
        if named == *before {
            return Ok(Ok(named));
        }
        let question = Question::new(&self.batch, self.num, [before.clone(), named], None)?.of_cited();
        Ok(self.answer(resolving, &question)?.ok_or(question))
    }

    /// Adds to the state before an event those members of whom nothing is known, as the events say that allow this one. Gives
    /// them. Of this server all members are known, but for the invitation or the like on which the sender themselves stands: what
    /// lets a user of ours join is among what the join names, and in no state that has no members.
    pub(in crate::rooms::change) fn presume(
        &self,
        event: &Event,
        auth: &BTreeMap<OwnedEventId, Known<Arc<StateEvent>>>,
        at: &Sketch,
        before: &mut AuthState,
    ) -> Result<Presumed> {
        let mut presumed = Presumed::new();
        let Some(partial) = self.row.partial.as_ref().filter(|_| self.presumes()) else {
            return Ok(presumed);
        };
        for allowing in auth.values() {
            let Known::Found(allowing) = allowing else { continue };
            let is_member = allowing.parsed.event_type.to_string() == MEMBER && !allowing.parsed.rejected;
            let Some(user) = allowing.parsed.state_key.as_deref().filter(|_| is_member) else { continue };
            if event::server_of(user) == Some(&partial.us) && *user != *event.sender {
                continue;
            }
            let Some(key) = state::find_key(&self.batch, self.num, MEMBER, user)? else { continue };
            if at.at(&self.batch, self.num, key)? == StateValue::Absent {
                tracing::debug!(room = %self.num, event = %event.id, member = %allowing.parsed.id, "a member is presumed to be as an event says");
                before.insert(Arc::clone(allowing));
                presumed.push((key, allowing.event));
            }
        }
        Ok(presumed)
    }

    /// Takes what an accepted event said of members for what was before our join, where nothing else is known of them. An event
    /// that has its place after the join says nothing of that.
    pub(in crate::rooms::change) fn learn_presumed(&mut self, presumed: &Presumed) -> Result<()> {
        let Some(base) = self.row.partial.as_ref().map(|partial| partial.base) else { return Ok(()) };
        let mut learned = Vec::new();
        for (key, event) in presumed {
            let place = schema::PLACE.get(&self.batch, (self.num, *event))?;
            let known = state::at(&self.batch, self.num, StateRef::Main(base), *key)?;
            if place == Some(Place::Outlier) && known == StateValue::Absent {
                learned.push((*key, StateValue::Event(*event)));
            }
        }
        self.learn(&learned)
    }
}
