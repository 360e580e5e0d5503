//! Redactions: who may redact what, and what becomes of it.
//!
//! A redacted event keeps its place; its bytes are replaced by the redacted form, which its id and signatures still
//! fit. The check here is not one of the authorization rules: a redaction that fails it is an event like any other.
//!
//! Whether a redaction applies is judged by the state before the redaction, not by that in which the event or the
//! redaction happens to come in. A redaction that comes first waits for its event.

use std::sync::Arc;

use bytes::Bytes;
use ruma::{OwnedEventId, UserId, events::TimelineEventType};

use crate::{
    error::{Error, Refusal, Result},
    ids::{EventNum, RoomNum},
    rooms::{
        build,
        commit::Change,
        event::{self, Event, StateEvent, Stored},
        power::{Action, Power},
        relations, state,
    },
    schema,
    schema::{
        jobs::Job,
        rooms::{EventHash, Place, RedactionWaitingRow},
    },
    store::{Batch, Direction, Fault, Read, timer},
};

/// Types of events that cannot be redacted by clients of this server: without their content the room is broken.
const KEPT: [&str; 2] = ["m.room.create", "m.room.server_acl"];
/// Redactions of one event that wait for it and are looked at; one is enough.
const WAITING_MAX: usize = 1_000;

/// Refuses to let one of our users redact an event of somebody else without the power to (403 `M_FORBIDDEN`).
pub fn require_may(change: &mut Change, user: &UserId, target: &Stored) -> Result<()> {
    if target.row.header.state_key.is_some() && KEPT.contains(&target.row.event_type().as_ref()) {
        return Err(Refusal::forbidden("Events of this type cannot be redacted.").into());
    }
    if target.row.sender() == user.as_str() || Power::in_change(change)?.may(user, Action::Redact)? {
        return Ok(());
    }
    Err(Refusal::forbidden("You may redact your own events only.").into())
}

/// The event that a received redaction redacts now; none if it may not, or has to wait for it.
pub(crate) fn judge(change: &mut Change, stored: &Stored, event: &Event) -> Result<Option<OwnedEventId>> {
    if event.kind != TimelineEventType::RoomRedaction || stored.row.header.state_key.is_some() {
        return Ok(None);
    }
    let target = match change.rules().redaction.content_field_redacts {
        true => event::redacts_in_content(&stored.row),
        false => event.redacts.clone(),
    };
    let Some(target) = target else { return Ok(None) };
    let before = match stored.row.header.before {
        Some(before) => before,
        None => state::just_below(&change.batch, change.num, stored.order)?,
    };
    let power = Power::at(&change.batch, change.num, &change.row, before)?;
    // Levels that cannot be read allow nobody anything.
    let by_power = power.may(&event.sender, Action::Redact).unwrap_or(false);
    let Some(num) = event::find_num(&change.batch, change.num, &target)? else {
        if let Some(hash) = event::parse_event_id(&target) {
            let key = (change.num, &hash, stored.event());
            schema::REDACTION_WAITING.put(&mut change.batch, key, &RedactionWaitingRow { by_power });
        }
        return Ok(None);
    };
    let redacted = event::require(&change.batch, change.num, num)?;
    Ok((by_power || is_same_server(&redacted.row.sender(), event.sender.as_str())).then_some(target))
}

fn is_same_server(one: &str, other: &str) -> bool {
    let server = |user: &str| user.split_once(':').map(|(_, server)| server.to_owned());
    server(one).is_some_and(|one| Some(one) == server(other))
}

/// An event has come in: the redactions that waited for it apply, as they were judged.
pub(crate) fn apply_waiting(change: &mut Change, stored: &Stored) -> Result<()> {
    let hash: EventHash = stored.row.header.hash;
    let waiting = schema::REDACTION_WAITING
        .prefix::<(RoomNum, EventHash)>(&change.batch, (change.num, &hash), Direction::Up)?
        .take(WAITING_MAX)
        .collect::<Result<Vec<_>, _>>()?;
    let mut applied = false;
    for ((room, hash, redaction), row) in waiting {
        schema::REDACTION_WAITING.delete(&mut change.batch, (room, &hash, redaction));
        let sender = event::require(&change.batch, room, redaction)?.row.sender().into_owned();
        if !applied && (row.by_power || is_same_server(&stored.row.sender(), &sender)) {
            apply(change, stored, redaction)?;
            applied = true;
        }
    }
    Ok(())
}

/// Puts the redacted form in the place of an event, wherever it is kept.
pub(crate) fn apply(change: &mut Change, target: &Stored, redaction: EventNum) -> Result<()> {
    if target.row.is_redacted() {
        return Ok(());
    }
    let mut redacted =
        with_json(target, &build::redacted(&target.row.json, change.rules()).ok_or_else(broken)?)?;
    redacted.row.header.redacted_by = Some(redaction);
    if schema::PLACE.get(&change.batch, (change.num, target.event()))? == Some(Place::Aside) {
        change.replace_aside(&redacted)?;
    } else {
        relations::unlink(&mut change.batch, change.num, target)?;
        change.redacted.push(target.clone());
        change.replace_event(&redacted);
    }
    if let Some(state_key) = redacted.row.state_key() {
        let (kind, state_key) = (redacted.row.event_type(), state_key.as_ref());
        let current = change.state(&kind, state_key)?;
        if current.is_some_and(|event| event.event == redacted.event()) {
            let event: Arc<StateEvent> = StateEvent::read(&change.row, &redacted)?;
            change.replace_state(&kind, state_key, event);
        }
    }
    Ok(())
}

fn broken() -> Error {
    Error::broken("a stored event cannot be redacted")
}

/// The event with other bytes of the same event.
pub(crate) fn with_json(stored: &Stored, json: &Bytes) -> Result<Stored, Fault> {
    let mut other = stored.clone();
    other.row.header.spans = event::locate(json).ok_or(Fault::Corrupt("an event has no fields"))?;
    other.row.json = json.clone();
    Ok(other)
}

/// Keeps what an event said before it was redacted, for moderators, until this time: milliseconds since the epoch.
pub fn keep_original(batch: &mut Batch, room: RoomNum, original: &Stored, until_ms: u64) {
    let event = original.event();
    schema::REDACTED_ORIGINAL.put(batch, (room, event), &original.row.json);
    timer::set(batch, &Job::ForgetOriginal { room, event }.timer(until_ms));
}

/// Forgets what an event said before it was redacted: its time is over.
pub fn forget_original(batch: &mut Batch, room: RoomNum, event: EventNum) {
    schema::REDACTED_ORIGINAL.delete(batch, (room, event));
}

/// What a redacted event said; none where that was not kept, or no longer is.
pub fn find_original(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    redacted: &Stored,
) -> Result<Option<Stored>, Fault> {
    let json = schema::REDACTED_ORIGINAL.get(read, (room, redacted.event()))?;
    json.map(|json| with_json(redacted, &json)).transpose()
}
