//! The messages to the device, and how many of its keys are left.

use std::ops::Bound;

use bytes::Bytes;

use crate::{
    encryption::keys,
    ids::{DeviceNum, Position, UserNum},
    schema,
    schema::encryption::KeyCounts,
    store::{Direction, Fault},
    sync::{changes::Changes, window::Window},
};

/// One answer has at most this many messages to the device; the next one goes on from there.
const MESSAGES_MAX: usize = 100;
/// No further message is added to an answer once its messages have more bytes than this.
const BYTES_MAX: usize = 4 << 20;

/// The messages that wait for the device, as far as one answer tells them.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    /// The messages as the client is told them, the oldest first.
    pub(crate) messages: Vec<Bytes>,
    /// The position of the last of them, if more are left for the next answer.
    pub(crate) told_upto: Option<Position>,
}

/// Collects the messages that the device has not confirmed.
pub(crate) fn collect(window: &Window<'_>, changes: &Changes) -> Result<Inbox, Fault> {
    let (user, device) = (window.ask.caller.user, window.ask.caller.device);
    let is_behind = window.since.is_some_and(|token| token.inbox_position(user, device) < token.position);
    if !changes.to_device && !is_behind {
        return Ok(Inbox::default());
    }
    collect_some(window, MESSAGES_MAX)
}

/// Collects at most this many of the messages that the device has not confirmed.
pub(crate) fn collect_some(window: &Window<'_>, max: usize) -> Result<Inbox, Fault> {
    let (user, device) = (window.ask.caller.user, window.ask.caller.device);
    let mut inbox = Inbox::default();
    let state = schema::INBOX_STATE.get(window.read, (user, device))?.unwrap_or_default();
    let told = window.since.map(|token| token.inbox_position(user, device)).unwrap_or_default();
    let known = told.max(state.acknowledged);
    if known >= window.upto {
        return Ok(inbox);
    }
    let (low, high) = (Bound::Excluded((user, device, known)), Bound::Included((user, device, window.upto)));
    let rows =
        schema::INBOX.range::<(UserNum, DeviceNum, Position)>(window.read, low, high, Direction::Up)?;
    let (mut bytes, mut last) = (0, known);
    for row in rows {
        let ((.., position), message) = row?;
        if inbox.messages.len() == max.min(MESSAGES_MAX) || bytes > BYTES_MAX {
            inbox.told_upto = Some(last);
            break;
        }
        bytes += message.len();
        last = position;
        inbox.messages.push(message);
    }
    Ok(inbox)
}

/// Counts the keys of the device that are left. The counts stand in every answer, because clients take a missing count
/// for zero or for "as before".
pub(crate) fn key_counts(window: &Window<'_>) -> Result<KeyCounts, Fault> {
    let caller = &window.ask.caller;
    keys::counts(window.read, (caller.user, caller.device))
}
