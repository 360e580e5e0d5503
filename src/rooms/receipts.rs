//! Receipts: how far users have read. The newest of each (room, user, kind, thread) is kept.
//!
//! Specification: client-server API, "Receipts".

use std::{collections::BTreeMap, ops::Bound};

use crate::{
    ids::{Order, Position, RoomNum},
    schema,
    schema::receipts::{ReceiptKey, ReceiptKind, ReceiptRow},
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// The thread of receipts for what stands in no thread.
pub const MAIN_THREAD: &str = "main";

/// A receipt that somebody sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// In which room.
    pub room: RoomNum,
    /// Whose, who sees it, and for which thread.
    pub key: ReceiptKey,
    /// The event it names.
    pub event_id: String,
    /// The order of that event.
    pub order: Order,
    /// When it was sent, in milliseconds since the epoch.
    pub sent_ms: u64,
}

/// Writes a receipt, at a position of its own. Nothing happens, and the answer is no, unless it is ahead of the one
/// that is there: receipts never go back.
pub fn keep(batch: &mut Batch, receipt: &Receipt) -> Result<bool, Fault> {
    let Receipt { room, key, .. } = receipt;
    let row_key = (*room, key.user.as_str(), key.kind, key.thread.as_str());
    let old = schema::RECEIPTS.get(batch, row_key)?;
    if let Some(old) = old {
        if old.order >= receipt.order {
            return Ok(false);
        }
        schema::RECEIPT_LOG.delete(batch, (*room, old.position));
    }
    let position = batch.position(&LogEntry::Receipts { room: *room });
    let row = ReceiptRow {
        position,
        order: receipt.order,
        sent_ms: receipt.sent_ms,
        event_id: receipt.event_id.clone(),
    };
    schema::RECEIPTS.put(batch, row_key, &row);
    schema::RECEIPT_LOG.put(batch, (*room, position), &Json(key.clone()));
    Ok(true)
}

/// The receipts of a room that were stored after `after` and at or before `upto`, the newest first, at most `count`.
pub fn list_new(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    after: Position,
    upto: Position,
    count: usize,
) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    if after >= upto {
        return Ok(Vec::new());
    }
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, upto)));
    let rows = schema::RECEIPT_LOG.range::<(RoomNum, Position)>(read, low, high, Direction::Down)?;
    let mut receipts = Vec::new();
    for row in rows.take(count) {
        let ((_, position), Json(key)) = row?;
        let row = schema::RECEIPTS.get(read, (room, key.user.as_str(), key.kind, key.thread.as_str()))?;
        if let Some(row) = row.filter(|row| row.position == position) {
            receipts.push((key, row));
        }
    }
    Ok(receipts)
}

/// Forgets how far a user has read a room, for one who asked to be erased.
pub fn delete_all(batch: &mut Batch, room: RoomNum, user_id: &str) {
    schema::RECEIPTS.delete_prefix::<(RoomNum, String)>(batch, (room, user_id));
}

/// Whether a receipt of the room was stored after `after`.
pub fn any_new(read: &(impl Read + ?Sized), room: RoomNum, after: Position) -> Result<bool, Fault> {
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, Position::MAX)));
    let mut rows = schema::RECEIPT_LOG.range::<(RoomNum, Position)>(read, low, high, Direction::Down)?;
    Ok(rows.next().transpose()?.is_some())
}

/// How far a user has read a room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadUpTo {
    /// Everything, in threads or not.
    pub all: Option<Order>,
    /// What stands in no thread.
    pub main: Option<Order>,
    /// By the id of the thread's root.
    pub threads: BTreeMap<String, Order>,
}

/// How far a user has read a room, by any kind of receipt.
pub fn read_up_to(read: &(impl Read + ?Sized), room: RoomNum, user_id: &str) -> Result<ReadUpTo, Fault> {
    let mut upto = ReadUpTo::default();
    for row in schema::RECEIPTS.prefix::<(RoomNum, String)>(read, (room, user_id), Direction::Up)? {
        let ((.., thread), row) = row?;
        let further = |known: Option<Order>| known.max(Some(row.order));
        match thread.as_str() {
            "" => upto.all = further(upto.all),
            MAIN_THREAD => upto.main = further(upto.main),
            _ => {
                let known = upto.threads.entry(thread).or_default();
                *known = row.order.max(*known);
            }
        }
    }
    Ok(upto)
}

/// The content of `m.receipt` events that say all this. More than one only where a user has receipts for several
/// threads at one event, which one content cannot say.
pub fn contents(receipts: &[(ReceiptKey, ReceiptRow)]) -> Vec<serde_json::Value> {
    type ByUser<'a> = BTreeMap<&'a str, serde_json::Value>;
    type ByEvent<'a> = BTreeMap<&'a str, BTreeMap<&'static str, ByUser<'a>>>;
    let mut contents: Vec<ByEvent<'_>> = Vec::new();
    for (key, row) in receipts {
        let (event, kind, user) = (row.event_id.as_str(), key.kind.as_str(), key.user.as_str());
        let mut value = serde_json::json!({ "ts": row.sent_ms });
        if let (false, Some(fields)) = (key.thread.is_empty(), value.as_object_mut()) {
            fields.insert("thread_id".to_owned(), key.thread.as_str().into());
        }
        let is_taken = |content: &ByEvent<'_>| {
            content.get(event).and_then(|kinds| kinds.get(kind)).is_some_and(|users| users.contains_key(user))
        };
        let at = contents.iter().position(|content| !is_taken(content)).unwrap_or(contents.len());
        if at == contents.len() {
            contents.push(BTreeMap::new());
        }
        if let Some(content) = contents.get_mut(at) {
            content.entry(event).or_default().entry(kind).or_default().insert(user, value);
        }
    }
    contents.iter().filter_map(|content| serde_json::to_value(content).ok()).collect()
}

/// The receipts among these that this user may see: everybody's public ones, and the user's own private ones.
pub fn visible_to(receipts: &mut Vec<(ReceiptKey, ReceiptRow)>, user_id: &str) {
    receipts.retain(|(key, _)| key.kind == ReceiptKind::Public || key.user == user_id);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const ROOM: RoomNum = RoomNum(5);

    fn receipt(user: &str, kind: ReceiptKind, thread: &str, at: u64) -> Receipt {
        Receipt {
            room: ROOM,
            key: ReceiptKey { user: user.into(), kind, thread: thread.into() },
            event_id: format!("$e{at}"),
            order: Order::live(Position::new(at).unwrap()),
            sent_ms: 7,
        }
    }

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
    }

    fn write(store: &Store, receipts: &[Receipt]) -> Vec<bool> {
        let mut batch = store.batch(&Guard::alone());
        let kept = receipts.iter().map(|receipt| keep(&mut batch, receipt).unwrap()).collect();
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        kept
    }

    #[test]
    fn receipts_never_go_back() {
        let store = store();
        let kept = write(
            &store,
            &[
                receipt("@a:x", ReceiptKind::Public, "", 10),
                receipt("@a:x", ReceiptKind::Public, "", 9),
                receipt("@a:x", ReceiptKind::Public, "", 10),
                receipt("@a:x", ReceiptKind::Public, "main", 9),
                receipt("@a:x", ReceiptKind::Private, "", 12),
                receipt("@a:x", ReceiptKind::Public, "$root", 3),
            ],
        );
        assert_eq!(kept, [true, false, false, true, true, true]);
        let upto = read_up_to(&*store.snapshot(), ROOM, "@a:x").unwrap();
        let order = |at| Order::live(Position::new(at).unwrap());
        let threads = BTreeMap::from([("$root".to_owned(), order(3))]);
        assert_eq!(upto, ReadUpTo { all: Some(order(12)), main: Some(order(9)), threads });
        assert_eq!(read_up_to(&*store.snapshot(), ROOM, "@a").unwrap(), ReadUpTo::default());
    }

    #[test]
    fn only_the_newest_of_each_is_news() {
        let store = store();
        write(&store, &[receipt("@a:x", ReceiptKind::Public, "", 10)]);
        let seen = store.snapshot().upto();
        write(
            &store,
            &[receipt("@a:x", ReceiptKind::Public, "", 11), receipt("@b:x", ReceiptKind::Private, "", 4)],
        );
        let snapshot = store.snapshot();
        let mut all = list_new(&*snapshot, ROOM, Position::ZERO, snapshot.upto(), 9).unwrap();
        assert_eq!(all.iter().map(|(_, row)| row.event_id.as_str()).collect::<Vec<_>>(), ["$e4", "$e11"]);
        assert_eq!(list_new(&*snapshot, ROOM, seen, snapshot.upto(), 9).unwrap(), all);
        assert!(any_new(&*snapshot, ROOM, seen).unwrap());
        assert!(!any_new(&*snapshot, ROOM, snapshot.upto()).unwrap());
        visible_to(&mut all, "@a:x");
        assert_eq!(all.len(), 1);
        assert_eq!(contents(&all), [serde_json::json!({ "$e11": { "m.read": { "@a:x": { "ts": 7 } } } })]);
    }

    #[test]
    fn receipts_for_two_threads_at_one_event_are_both_told() {
        let store = store();
        write(
            &store,
            &[receipt("@a:x", ReceiptKind::Public, "", 10), receipt("@a:x", ReceiptKind::Public, "main", 10)],
        );
        let snapshot = store.snapshot();
        let all = list_new(&*snapshot, ROOM, Position::ZERO, snapshot.upto(), 9).unwrap();
        assert_eq!(contents(&all).len(), 2);
    }
}
