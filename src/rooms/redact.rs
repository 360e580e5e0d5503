//! Redactions: who may redact what, and what becomes of it.
//!
//! A redacted event keeps its place; its bytes are replaced by the redacted form, which its id and signatures still
//! fit. The check here is not one of the authorization rules: a redaction that fails it is an event like any other.

use std::sync::Arc;

use ruma::UserId;

use crate::{
    error::{Error, Refusal, Result},
    ids::EventNum,
    rooms::{
        build,
        commit::Change,
        event::{self, StateEvent, Stored},
        power::{Action, Power},
        relations,
    },
};

/// Types of events that cannot be redacted by clients of this server: without their content the room is broken.
const KEPT: [&str; 2] = ["m.room.create", "m.room.server_acl"];

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

/// Puts the redacted form in the place of an event.
pub(crate) fn apply(change: &mut Change, target: &Stored, redaction: EventNum) -> Result<()> {
    if target.row.is_redacted() {
        return Ok(());
    }
    let broken = || Error::broken("a stored event cannot be redacted");
    relations::unlink(&mut change.batch, change.num, target)?;
    change.redacted.push(target.clone());
    let json = build::redacted(&target.row.json, change.rules()).ok_or_else(broken)?;
    let mut redacted = target.clone();
    redacted.row.header.spans = event::locate(&json).ok_or_else(broken)?;
    redacted.row.header.redacted_by = Some(redaction);
    redacted.row.json = json;
    change.replace_event(&redacted);
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
