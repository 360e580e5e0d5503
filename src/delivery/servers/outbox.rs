//! Messages of our users for devices of other servers. Each waits in the store, in the batch of the request that sent it, until
//! the other server has taken it: it may be the key of a conversation, which nobody sends again.

use std::ops::Bound;

use bytes::Bytes;
use ruma::{UserId, events::AnyToDeviceEventContent, serde::Raw};

use super::outboxes::Sender;
use crate::{
    ids::{Position, UserNum},
    json::{JsonRef, Object},
    schema::{self, event_types::ROOM_KEY_REQUEST, remote::OutboxRow},
    store::{Batch, Direction, Fault, LogEntry, Read, Write},
};

/// A message that its server does not take is kept for at most this long.
pub const KEPT_MS: u64 = 30 * 24 * 60 * 60 * 1000;
/// Delete at most this many messages at once that are too old.
const FORGOTTEN_AT_ONCE: usize = 1_000;
/// The name of these messages between servers.
const DIRECT_TO_DEVICE: &str = "m.direct_to_device";

/// The content of a message for one device.
#[derive(Clone, Copy)]
pub struct Content<'a> {
    /// The user who gets it.
    pub to: &'a UserId,
    /// The id of the device, or `*` for all devices of the user.
    pub device: &'a str,
    /// The content, which the caller has checked.
    pub content: &'a Raw<AnyToDeviceEventContent>,
}

/// Messages of one request to devices of users of one other server, which go there as one.
pub struct Message<'a> {
    /// The user who sends them.
    pub sender: &'a UserId,
    /// The type of the events.
    pub event_type: &'a str,
    /// The id by which the other server knows the messages again when they come a second time.
    pub message_id: &'a str,
    /// The contents: those of one user stand together, and no device comes twice.
    pub contents: &'a [Content<'a>],
}

impl Message<'_> {
    /// The messages as they go to the other server.
    pub fn json(&self) -> Bytes {
        let mut edu = Object::new();
        edu.object("content", |content| {
            content.text("message_id", self.message_id);
            content.object("messages", |users| {
                for of_user in self.contents.chunk_by(|one, next| one.to == next.to) {
                    let Some(Content { to, .. }) = of_user.first() else { continue };
                    users.object(to.as_str(), |devices| {
                        of_user.iter().for_each(|it| devices.json(it.device, it.content.json()));
                    });
                }
            });
            content.text("sender", self.sender.as_str());
            content.text("type", self.event_type);
        });
        edu.text("edu_type", DIRECT_TO_DEVICE);
        edu.finish().into()
    }
}

/// Puts messages that stand in this JSON into the outbox of its server.
pub fn put(batch: &mut Batch, server: &str, sender: UserNum, json: Bytes, now_ms: u64) {
    let position = batch.position(&LogEntry::ToDevice { user: sender });
    schema::OUTBOX.put(batch, (server, position), &OutboxRow { sent_ms: now_ms, json });
}

/// Whether a message asks for the key of a room: such requests give way to all others.
pub(super) fn is_key_request(event_type: &str) -> bool {
    event_type == ROOM_KEY_REQUEST
}

/// A message that waits, and its place.
pub(super) struct Waiting {
    pub(super) position: Position,
    pub(super) json: JsonOfEdu,
}

/// A piece of ephemeral news as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JsonOfEdu(pub(super) Bytes);

impl<'a> From<&'a JsonOfEdu> for JsonRef<'a> {
    fn from(edu: &'a JsonOfEdu) -> Self {
        Self::stored(&edu.0)
    }
}

/// Lists the oldest messages for a server after a position, at most `count` and about `bytes_max` bytes.
pub(super) fn list(
    read: &(impl Read + ?Sized),
    server: &str,
    after: Position,
    count: usize,
    bytes_max: usize,
) -> Result<Vec<Waiting>, Fault> {
    let (low, high) = (Bound::Excluded((server, after)), Bound::Included((server, Position::MAX)));
    let (mut waiting, mut bytes) = (Vec::new(), 0);
    for row in schema::OUTBOX.range::<(String, Position)>(read, low, high, Direction::Up)? {
        let ((_, position), row) = row?;
        if waiting.len() >= count || bytes > bytes_max {
            break;
        }
        bytes += row.json.len();
        waiting.push(Waiting { position, json: JsonOfEdu(row.json) });
    }
    Ok(waiting)
}

/// Deletes messages that their server has taken.
pub(super) fn delete(to: &mut impl Write, server: &str, positions: &[Position]) {
    for position in positions {
        schema::OUTBOX.delete(to, (server, *position));
    }
}

/// Deletes the messages for a server that have waited for too long, and tells whose they were, with their bytes.
pub(super) fn forget_old(
    to: &mut impl Write,
    read: &(impl Read + ?Sized),
    server: &str,
    now_ms: u64,
) -> Result<Vec<(Sender, usize)>, Fault> {
    let mut gone = Vec::new();
    let rows = schema::OUTBOX.prefix::<(String,)>(read, (server,), Direction::Up)?;
    for row in rows.take(FORGOTTEN_AT_ONCE) {
        let ((_, position), row) = row?;
        if now_ms.saturating_sub(row.sent_ms) < KEPT_MS {
            break;
        }
        schema::OUTBOX.delete(to, (server, position));
        gone.push((Sender::of_message(&row.json), row.json.len()));
    }
    Ok(gone)
}

/// Lists all messages that wait, each with its server, its sender and its bytes.
pub(super) fn list_all(
    read: &(impl Read + ?Sized),
) -> Result<impl Iterator<Item = Result<(String, Sender, usize), Fault>>, Fault> {
    let rows = schema::OUTBOX.prefix::<()>(read, (), Direction::Up)?;
    Ok(rows.map(|row| row.map(|((server, _), row)| (server, Sender::of_message(&row.json), row.json.len()))))
}
