//! Redactions: who may redact which event, and how a redaction is carried out.
//!
//! The check here is not one of the authorization rules: a redaction that fails it is accepted, so that other events
//! may cite it, but clients do not see it (server-server API, "Redactions"). In room versions 1 and 2 it is: a redaction that comes so far
//! redacts its event.
//!
//! Whether a redaction applies is judged by the state before the redaction, and not by the state when the event or the
//! redaction happens to come in. A redaction that comes first waits for its event, and clients see neither until then.

use std::sync::Arc;

use ruma::{EventId, UserId};

use super::Change;
use crate::{
    error::{Error, Refusal, Result},
    ids::{EventNum, RoomNum},
    rooms::{
        event::{self, Event, StateEvent, StoredEvent},
        members,
        power::{Action, Power},
        redact, relations,
    },
    schema,
    schema::event_types::{CREATE, SERVER_ACL},
    schema::{
        rooms::{EventKey, Place, RedactionWaitingRow},
        state::StateRef,
    },
    store::{Direction, Fault},
};

/// Clients of this server cannot redact events of these types, because the room is broken without their content.
const KEPT: [&str; 2] = [CREATE, SERVER_ACL];
/// Look at no more than this many redactions that wait for one event, so that a flood of them costs little; one
/// suffices.
const WAITING_MAX: usize = 1_000;

/// The effect that a received event has as a redaction.
#[derive(Debug)]
pub(super) enum Redaction {
    /// It is no redaction, or names no event.
    None,
    /// It redacts this event now.
    Applies(EventNum),
    /// Its event is not here yet. Until that comes, clients do not see the redaction.
    Waits {
        /// The key by which the redacted event will be found.
        name: EventKey,
        /// Whether its sender may redact the event, whosever it is.
        by_power: bool,
    },
    /// Its sender may not redact the event, for this reason: clients never see the redaction.
    Withheld(&'static str),
}

impl Redaction {
    /// Whether clients see the redaction.
    pub(super) fn is_shown(&self) -> bool {
        matches!(self, Self::None | Self::Applies(_))
    }
}

impl Change {
    /// Refuses to let one of our users redact somebody else's event without the power to (403 `M_FORBIDDEN`).
    pub fn require_may_redact(&mut self, user: &UserId, target: &StoredEvent) -> Result<()> {
        if is_kept(target) {
            return Err(Refusal::forbidden("Events of this type cannot be redacted.").into());
        }
        if target.row.sender() == user.as_str() || self.power()?.may(user, Action::Redact)? {
            return Ok(());
        }
        Err(Refusal::forbidden("You can only redact your own events in this room.").into())
    }

    /// Refuses to let one of our users redact an event that they do not see: 404 `M_NOT_FOUND`, unless others may have it and the user
    /// has the power to redact everybody's events. The redaction is then for those who have the event, and waits for it here.
    /// An event that is here and that the user may not see is answered alike, so that no answer tells whether it is.
    pub fn require_may_redact_unseen(&mut self, user: &UserId, target: &EventId) -> Result<()> {
        let there = event::find_by_id(&self.batch, self.num, target)?;
        let may = self.power()?.may(user, Action::Redact)? && !there.is_some_and(|there| is_kept(&there));
        if may && members::has_other_servers(&self.batch, self.num, user.server_name().as_str())? {
            return Ok(());
        }
        Err(Refusal::not_found("The room has no such event.").into())
    }

    /// The effect of a redaction by one of our users, who may redact the event that it names.
    pub(super) fn own_redaction(&self, target: Option<&EventId>) -> Result<Redaction, Fault> {
        let Some(target) = target else { return Ok(Redaction::None) };
        let Some(name) = event::parse_event_id(target, self.num, self.row.version) else {
            return Ok(Redaction::Withheld("it names no event of this room version"));
        };
        Ok(match event::find_key(&self.batch, self.num, &name)? {
            Some(num) => Redaction::Applies(num),
            None => Redaction::Waits { name, by_power: true },
        })
    }

    /// Judges the effect of a received event as a redaction, by the state before it.
    pub(super) fn judge_redaction(&self, event: &Event, before: StateRef) -> Result<Redaction> {
        let Some(target) = event.redaction_target(&self.rules().redaction) else {
            return Ok(Redaction::None);
        };
        let by_power = if self.rules().authorization.special_case_room_redaction {
            // Here the authorization rules say who may redact what, and they have let this redaction in.
            true
        } else {
            // Power levels that cannot be read give nobody the power to redact.
            Power::at(self.view(), before)
                .and_then(|power| power.may(&event.sender, Action::Redact))
                .or_else(|error| if matches!(error, Error::Refused(_)) { Ok(false) } else { Err(error) })?
        };
        let Some(name) = event::parse_event_id(&target, self.num, self.row.version) else {
            return Ok(Redaction::Withheld("it names no event of this room version"));
        };
        let Some(num) = event::find_key(&self.batch, self.num, &name)? else {
            return Ok(Redaction::Waits { name, by_power });
        };
        let redacted = event::require(&self.batch, self.num, num)?;
        let may = by_power || is_same_server(&redacted.row.sender(), event.sender.as_str());
        Ok(if may {
            Redaction::Applies(num)
        } else {
            Redaction::Withheld("its sender may not redact the event")
        })
    }

    /// Carries out a redaction, once its own rows are written.
    pub(super) fn carry_out(&mut self, redaction: Redaction, stored: &StoredEvent) -> Result<()> {
        match redaction {
            Redaction::None => {}
            Redaction::Withheld(why) => {
                tracing::debug!(room = %self.num, event = %stored.event(), why, "a redaction is withheld");
            }
            Redaction::Waits { name, by_power } => {
                let key = (self.num, &name, stored.event());
                schema::REDACTION_WAITING.put(&mut self.batch, key, &RedactionWaitingRow { by_power });
                let why = "the event that it redacts has not come in yet";
                tracing::debug!(room = %self.num, event = %stored.event(), why, "a redaction is withheld");
            }
            Redaction::Applies(target) => self.redact_by(target, stored)?,
        }
        Ok(())
    }

    /// Redacts an event by a redaction of the timeline, and keeps where it did so if it is a state event.
    pub(super) fn redact_by(&mut self, target: EventNum, redaction: &StoredEvent) -> Result<()> {
        let target = event::require(&self.batch, self.num, target)?;
        if target.row.header.state_key.is_some() && !target.row.is_redacted() {
            redact::keep_place(&mut self.batch, self.num, target.event(), redaction.order);
        }
        self.apply_redaction(&target, redaction.event())
    }

    /// Redacts an event, wherever it is kept.
    pub(super) fn redact(&mut self, target: EventNum, redaction: EventNum) -> Result<()> {
        let target = event::require(&self.batch, self.num, target)?;
        self.apply_redaction(&target, redaction)
    }

    /// Applies the redactions that waited for an event which has come in, as they were judged, and shows them from now
    /// on. Those whose sender may not redact the event stay withheld.
    pub(super) fn apply_waiting(&mut self, stored: &StoredEvent) -> Result<()> {
        let waiting = schema::REDACTION_WAITING
            .prefix::<(RoomNum, EventKey)>(&self.batch, (self.num, &stored.row.header.key), Direction::Up)?
            .take(WAITING_MAX)
            .collect::<Result<Vec<_>, _>>()?;
        let mut applied = false;
        for ((room, key, redaction), row) in waiting {
            schema::REDACTION_WAITING.delete(&mut self.batch, (room, &key, redaction));
            let mut redaction = event::require(&self.batch, room, redaction)?;
            if !(row.by_power || is_same_server(&stored.row.sender(), &redaction.row.sender())) {
                let why = "its sender may not redact the event";
                tracing::debug!(%room, event = %redaction.event(), why, "a redaction is withheld");
                continue;
            }
            if !applied {
                self.apply_redaction(stored, redaction.event())?;
                applied = true;
            }
            // One that had redacted the event before that was forgotten is shown already.
            if !redaction.row.header.expired && std::mem::take(&mut redaction.row.header.unseen) {
                self.replace_event(&redaction);
                relations::index(&mut self.batch, room, &redaction)?;
            }
        }
        Ok(())
    }

    /// Writes the redacted form in place of an event, wherever it is kept.
    fn apply_redaction(&mut self, target: &StoredEvent, redaction: EventNum) -> Result<()> {
        if target.row.is_redacted() {
            return Ok(());
        }
        let left = redact::redacted(&target.row.json, self.rules());
        let left = left.ok_or(Fault::Corrupt("an event is not the JSON of an event"))?;
        let mut redacted = redact::with_json(target, &left)?;
        redacted.row.header.redacted_by = Some(redaction);
        let place = schema::PLACE.get(&self.batch, (self.num, target.event()))?;
        if matches!(place, Some(Place::Aside | Place::Outlier)) {
            self.replace_aside(&redacted)?;
        } else {
            relations::unlink(&mut self.batch, self.num, target)?;
            self.redacted.push(target.clone());
            self.replace_event(&redacted);
        }
        self.follow_other_form(&redacted)
    }

    /// Follows an event that is kept in another form from now on, if it is part of the room's state: the next events are judged
    /// by that form.
    pub(super) fn follow_other_form(&mut self, stored: &StoredEvent) -> Result<()> {
        if let Some(state_key) = stored.row.state_key() {
            let (event_type, state_key) = (stored.row.event_type(), state_key.as_ref());
            let current = self.state(&event_type, state_key)?;
            if current.is_some_and(|event| event.event == stored.event()) {
                let event: Arc<StateEvent> = StateEvent::read(&self.row, stored)?;
                self.replace_state(&event_type, state_key, event);
            }
        }
        Ok(())
    }
}

/// Whether the room is broken without the content of the event.
fn is_kept(event: &StoredEvent) -> bool {
    event.row.header.state_key.is_some() && KEPT.contains(&event.row.event_type().as_ref())
}

fn is_same_server(one: &str, other: &str) -> bool {
    event::server_of(one).is_some_and(|server| event::server_of(other) == Some(server))
}
