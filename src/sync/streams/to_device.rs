//! Messages to the device, and how many of its keys are left.

use std::ops::Bound;

use crate::{
    encryption::keys,
    ids::{DeviceNum, Position, UserNum},
    schema,
    store::{Direction, Fault},
    sync::{answer::Object, streams::Window},
};

/// Messages in one answer.
const MESSAGES_MAX: usize = 100;
/// Their bytes; one more may go beyond.
const BYTES_MAX: usize = 4 << 20;

/// Messages that wait for the device.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    /// As they are told, the oldest first.
    pub(crate) messages: Vec<String>,
    /// The position of the last of them, if there are more.
    pub(crate) told_upto: Option<Position>,
}

/// The messages that the device has not said it has.
pub(crate) fn collect(window: &Window<'_>) -> Result<Inbox, Fault> {
    let (user, device) = (window.ask.caller.user, window.ask.caller.device);
    let state = schema::INBOX_STATE.get(window.read, (user, device))?.unwrap_or_default();
    let told = window.since.map(|token| token.inbox_position(user, device)).unwrap_or_default();
    let known = told.max(state.acknowledged);
    let mut inbox = Inbox::default();
    if known >= window.upto {
        return Ok(inbox);
    }
    let (low, high) = (Bound::Excluded((user, device, known)), Bound::Included((user, device, window.upto)));
    let rows =
        schema::INBOX.range::<(UserNum, DeviceNum, Position)>(window.read, low, high, Direction::Up)?;
    let (mut bytes, mut last) = (0, known);
    for row in rows {
        let ((.., position), message) = row?;
        if inbox.messages.len() == MESSAGES_MAX || bytes > BYTES_MAX {
            inbox.told_upto = Some(last);
            break;
        }
        bytes += message.len();
        last = position;
        inbox.messages.push(String::from_utf8_lossy(&message).into_owned());
    }
    Ok(inbox)
}

/// `device_one_time_keys_count` and `device_unused_fallback_key_types`: in every answer, for what is missing would be
/// taken for "as before".
pub(crate) fn put_key_counts(window: &Window<'_>, body: &mut Object) -> Result<(), Fault> {
    let caller = &window.ask.caller;
    let counts = keys::counts(window.read, (caller.user, caller.device))?;
    let mut one_time = Object::new();
    // Clients look for this algorithm even when they have none of it.
    if !counts.one_time.contains_key("signed_curve25519") {
        one_time.number("signed_curve25519", 0);
    }
    for (algorithm, left) in &counts.one_time {
        one_time.number(algorithm, *left);
    }
    body.raw("device_one_time_keys_count", &one_time.finish());
    body.texts("device_unused_fallback_key_types", counts.unused_fallback);
    Ok(())
}
