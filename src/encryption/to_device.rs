//! Messages from device to device: an inbox for each device, read from the position that it has confirmed.
//!
//! Specification: client-server API, "Send-to-Device messaging".

use std::ops::Bound;

use bytes::Bytes;
use ruma::UserId;
use serde_json::value::RawValue;

use crate::{
    error::{Refusal, Result},
    ids::{DeviceNum, Position, UserNum},
    json::Object,
    schema::{self, encryption::InboxState},
    store::{Batch, Direction, Fault, LogEntry, Read, Write},
};

/// The content of a message is no larger, in bytes.
pub const CONTENT_BYTES_MAX: usize = 64 << 10;
/// As many messages wait for a device at most.
pub const INBOX_MESSAGES_MAX: u64 = 20_000;
/// As many bytes wait for a device at most.
pub const INBOX_BYTES_MAX: u64 = 64 << 20;
/// In a full inbox, a request for a room key gives way if it is among the oldest of so many messages.
const GIVE_WAY_WITHIN: usize = 1_000;
/// The transaction id of a request is remembered at least so long, in milliseconds: no client retries for longer.
pub const TXN_KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// As many old transaction ids are forgotten with each new one: more than come, so that they do not gather.
const FORGOTTEN_AT_ONCE: usize = 3;
/// How a waiting request for a room key can be told without parsing: messages are written with their type last.
const KEY_REQUEST_TAIL: &[u8] = br#""type":"m.room_key_request"}"#;

/// A message as its device will get it: an object with content, sender and type.
pub fn message(sender: &UserId, kind: &str, content: &RawValue) -> Result<Bytes> {
    if content.get().len() > CONTENT_BYTES_MAX {
        return Err(Refusal::too_large("A message to a device has at most 65,536 bytes.").into());
    }
    if !content.get().starts_with('{') {
        return Err(Refusal::bad_json("The content of a message to a device is an object.").into());
    }
    let mut message = Object::with_capacity(content.get().len() + 128);
    message.json("content", content);
    message.text("sender", sender.as_str());
    message.text("type", kind);
    Ok(message.finish().into())
}

/// Puts a message into a device's inbox. Under the user's lock. Errors: 413 when the inbox is full.
pub fn put(batch: &mut Batch, user: UserNum, device: DeviceNum, message: &Bytes) -> Result<Position> {
    let size = message.len() as u64;
    let mut state = state(batch, user, device)?;
    let is_full = |state: &InboxState| {
        state.messages >= INBOX_MESSAGES_MAX || state.bytes.saturating_add(size) > INBOX_BYTES_MAX
    };
    if is_full(&state) {
        make_room(batch, user, device, &mut state)?;
        if is_full(&state) {
            return Err(Refusal::too_large("Too many messages wait for one of these devices.").into());
        }
    }
    let position = batch.position(&LogEntry::ToDevice { user });
    schema::INBOX.put(batch, (user, device, position), message);
    state.messages += 1;
    state.bytes += size;
    schema::INBOX_STATE.put(batch, (user, device), &state);
    Ok(position)
}

/// The oldest request for a room key goes: by now it is of the least use.
fn make_room(
    batch: &mut Batch,
    user: UserNum,
    device: DeviceNum,
    state: &mut InboxState,
) -> Result<(), Fault> {
    let oldest = list(batch, user, device, state.acknowledged, Position::MAX, GIVE_WAY_WITHIN)?;
    if let Some((position, message)) = oldest.iter().find(|(_, message)| message.ends_with(KEY_REQUEST_TAIL))
    {
        schema::INBOX.delete(batch, (user, device, *position));
        state.messages = state.messages.saturating_sub(1);
        state.bytes = state.bytes.saturating_sub(message.len() as u64);
    }
    Ok(())
}

fn state(read: &(impl Read + ?Sized), user: UserNum, device: DeviceNum) -> Result<InboxState, Fault> {
    Ok(schema::INBOX_STATE.get(read, (user, device))?.unwrap_or_default())
}

/// Up to `max` messages for a device in (after, upto], oldest first. What the device has confirmed is not read over.
pub fn list(
    read: &(impl Read + ?Sized),
    user: UserNum,
    device: DeviceNum,
    after: Position,
    upto: Position,
    max: usize,
) -> Result<Vec<(Position, Bytes)>, Fault> {
    let after = after.max(state(read, user, device)?.acknowledged);
    if after >= upto {
        return Ok(Vec::new());
    }
    let (low, high) = (Bound::Excluded((user, device, after)), Bound::Included((user, device, upto)));
    schema::INBOX
        .range::<(UserNum, DeviceNum, Position)>(read, low, high, Direction::Up)?
        .take(max)
        .map(|row| row.map(|((_, _, position), message)| (position, message)))
        .collect()
}

/// The device has received everything at or before this position, which is at most the newest that it was ever answered.
/// Under the user's lock; nothing is written if that is nothing new.
pub fn acknowledge(
    to: &mut impl Write,
    user: UserNum,
    device: DeviceNum,
    upto: Position,
) -> Result<(), Fault> {
    let mut state = state(to, user, device)?;
    // A device without messages needs no row.
    if upto <= state.acknowledged || state.messages == 0 {
        return Ok(());
    }
    let low = Bound::Excluded((user, device, state.acknowledged));
    let high = Bound::Included((user, device, upto));
    let rows = schema::INBOX.range::<(UserNum, DeviceNum, Position)>(to, low, high, Direction::Up)?;
    let (mut messages, mut bytes) = (0, 0);
    for row in rows {
        messages += 1;
        bytes += row?.1.len() as u64;
    }
    if messages == 0 {
        return Ok(());
    }
    let prefix = (user, device);
    schema::INBOX.delete_below::<(UserNum, DeviceNum), (UserNum, DeviceNum, Position)>(
        to,
        prefix,
        (user, device, upto.plus(1)),
    );
    state.acknowledged = upto;
    state.messages = state.messages.saturating_sub(messages);
    state.bytes = state.bytes.saturating_sub(bytes);
    schema::INBOX_STATE.put(to, (user, device), &state);
    Ok(())
}

/// Deletes a device's inbox and what is known of its requests, for a device that goes.
pub fn delete_all(batch: &mut Batch, user: UserNum, device: DeviceNum) {
    schema::INBOX.delete_prefix::<(UserNum, DeviceNum)>(batch, (user, device));
    schema::INBOX_STATE.delete(batch, (user, device));
    schema::TO_DEVICE_TXNS.delete_prefix::<(UserNum, DeviceNum)>(batch, (user, device));
    schema::TO_DEVICE_TXN_LOG.delete_prefix::<(UserNum, DeviceNum)>(batch, (user, device));
}

/// How far a request to send to devices has got: how many of its targets were served.
pub fn served(
    read: &(impl Read + ?Sized),
    sender: (UserNum, DeviceNum),
    kind: &str,
    txn_id: &str,
) -> Result<u64, Fault> {
    Ok(schema::TO_DEVICE_TXNS.get(read, (sender.0, sender.1, kind, txn_id))?.unwrap_or(0))
}

/// Keeps how far a request has got, in the batch with the messages: a retry goes on from there. What is older than
/// [`TXN_KEPT_MS`] is forgotten, a few with each new one.
pub fn note_served(
    batch: &mut Batch,
    sender: (UserNum, DeviceNum),
    kind: &str,
    txn_id: &str,
    served: u64,
    now_ms: u64,
) -> Result<(), Fault> {
    let (user, device) = sender;
    if self::served(batch, sender, kind, txn_id)? == 0 {
        let end = Bound::Excluded((user, device, now_ms.saturating_sub(TXN_KEPT_MS)));
        let begin = Bound::Included((user, device, 0));
        let old = schema::TO_DEVICE_TXN_LOG
            .range::<(UserNum, DeviceNum, u64)>(batch, begin, end, Direction::Up)?
            .take(FORGOTTEN_AT_ONCE)
            .collect::<Result<Vec<_>, _>>()?;
        for ((_, _, ms, kind, txn_id), ()) in old {
            schema::TO_DEVICE_TXN_LOG.delete(batch, (user, device, ms, &kind, &txn_id));
            schema::TO_DEVICE_TXNS.delete(batch, (user, device, &kind, &txn_id));
        }
        schema::TO_DEVICE_TXN_LOG.put(batch, (user, device, now_ms, kind, txn_id), &());
    }
    schema::TO_DEVICE_TXNS.put(batch, (user, device, kind, txn_id), &served);
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::user_id;

    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const ALICE: UserNum = UserNum(1);
    const PHONE: DeviceNum = DeviceNum(1);

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
    }

    fn text(kind: &str, content: &str) -> Bytes {
        let content = RawValue::from_string(content.to_owned()).unwrap();
        message(user_id!("@bob:s"), kind, &content).unwrap()
    }

    fn write(store: &Store, build: impl FnOnce(&mut Batch)) {
        let mut batch = store.batch(&Guard::alone());
        build(&mut batch);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
    }

    fn inbox(store: &Store, after: Position, max: usize) -> Vec<(Position, Bytes)> {
        let snapshot = store.snapshot();
        list(&*snapshot, ALICE, PHONE, after, snapshot.upto(), max).unwrap()
    }

    #[test]
    fn messages_wait_until_they_are_confirmed() {
        let store = store();
        for number in 0..3 {
            let message = text("m.test", &format!(r#"{{"n":{number}}}"#));
            write(&store, |batch| {
                let _ = put(batch, ALICE, PHONE, &message).unwrap();
            });
        }
        let all = inbox(&store, Position::ZERO, 10);
        assert_eq!(all.len(), 3);
        assert_eq!(&all[0].1[..], br#"{"content":{"n":0},"sender":"@bob:s","type":"m.test"}"#);
        assert_eq!(inbox(&store, Position::ZERO, 2), all[..2]);
        assert_eq!(inbox(&store, all[0].0, 10), all[1..]);
        write(&store, |batch| acknowledge(batch, ALICE, PHONE, all[1].0).unwrap());
        assert_eq!(inbox(&store, Position::ZERO, 10), all[2..]);
        assert_eq!(state(&*store.snapshot(), ALICE, PHONE).unwrap().messages, 1);
        let mut batch = store.batch(&Guard::alone());
        acknowledge(&mut batch, ALICE, PHONE, all[1].0).unwrap();
        assert_eq!(batch.row_count(), 0, "nothing new is nothing to write");
        write(&store, |batch| acknowledge(batch, ALICE, PHONE, all[2].0).unwrap());
        let state = state(&*store.snapshot(), ALICE, PHONE).unwrap();
        assert_eq!((state.messages, state.bytes), (0, 0));
    }

    #[test]
    fn in_a_full_inbox_requests_for_keys_give_way_and_other_messages_are_refused() {
        let store = store();
        let big = format!(r#"{{"b":"{}"}}"#, "b".repeat(CONTENT_BYTES_MAX - 100));
        let (request, other) = (text("m.room_key_request", &big), text("m.other", &big));
        let fits = INBOX_BYTES_MAX / request.len() as u64;
        write(&store, |batch| {
            let _ = put(batch, ALICE, PHONE, &request).unwrap();
        });
        for _ in 0..fits {
            write(&store, |batch| {
                let _ = put(batch, ALICE, PHONE, &other).unwrap();
            });
        }
        assert!(inbox(&store, Position::ZERO, 1)[0].1.ends_with(br#""type":"m.other"}"#));
        let mut batch = store.batch(&Guard::alone());
        assert!(put(&mut batch, ALICE, PHONE, &other).unwrap_err().refusal().is_some());
        assert!(put(&mut batch, ALICE, DeviceNum(2), &other).is_ok());
    }

    #[test]
    fn transaction_ids_are_remembered_for_a_day() {
        let store = store();
        let note = |txn_id: &str, now_ms| {
            write(&store, |batch| note_served(batch, (ALICE, PHONE), "a", txn_id, 1, now_ms).unwrap());
        };
        let known = |txn_id: &str| served(&*store.snapshot(), (ALICE, PHONE), "a", txn_id).unwrap();
        note("1", 1);
        note("2", 2);
        note("3", TXN_KEPT_MS + 1);
        assert_eq!((known("1"), known("2"), known("3")), (1, 1, 1));
        note("4", TXN_KEPT_MS + 2);
        assert_eq!((known("1"), known("2"), known("3")), (0, 1, 1));
        note("5", 3 * TXN_KEPT_MS);
        assert_eq!((known("2"), known("3"), known("4"), known("5")), (0, 0, 0, 1));
        write(&store, |batch| delete_all(batch, ALICE, PHONE));
        assert_eq!(known("5"), 0);
    }

    #[test]
    fn contents_are_bounded_objects() {
        let raw = |text: String| RawValue::from_string(text).unwrap();
        let bob = user_id!("@bob:s");
        assert!(message(bob, "a", &raw("[]".to_owned())).is_err());
        assert!(message(bob, "a", &raw(format!(r#"{{"a":"{}"}}"#, "a".repeat(CONTENT_BYTES_MAX)))).is_err());
        assert!(message(bob, "a\"b", &raw("{}".to_owned())).is_ok());
    }
}
