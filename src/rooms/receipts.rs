//! Receipts say how far users have read. The newest one of each (room, user, kind, thread) is kept.
//!
//! Specification: client-server API, "Receipts".

use std::{collections::BTreeMap, ops::Bound};

use ruma::OwnedEventId;

use crate::{
    ids::{Order, Position, RoomNum},
    schema,
    schema::receipts::{ReceiptKey, ReceiptKind, ReceiptRow},
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// The thread of a receipt that counts for everything, in threads or not.
pub const NO_THREAD: &str = "";
/// The thread of a receipt that counts only for events in no thread.
pub const MAIN_THREAD: &str = "main";

/// Look at up to this many times as many receipts as are wanted, because most may be private ones of other users.
const LOOKED_AT: usize = 8;

/// A receipt that somebody sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The room in which the event stands.
    pub room: RoomNum,
    /// The receipt's user, its kind, which says who sees it, and its thread.
    pub key: ReceiptKey,
    /// The id of the event up to which the user has read.
    pub event_id: OwnedEventId,
    /// The order of that event.
    pub order: Order,
    /// The time of sending, in milliseconds since the epoch.
    pub sent_ms: u64,
}

/// Writes a receipt, at a position of its own, if it is ahead of the one that is there. Receipts never go back, so
/// nothing happens otherwise and the answer is `false`.
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

/// Receipts of a room, and where their list goes on.
#[derive(Debug, Default)]
pub struct Page {
    /// Receipts with what they say.
    pub receipts: Vec<(ReceiptKey, ReceiptRow)>,
    /// The position up to which receipts were looked at, if more may follow.
    pub told_upto: Option<Position>,
}

/// Lists the receipts of a room that were stored after `after` and at or before `upto` and that this user may see
/// (everybody's public ones and the user's own private ones), oldest first, at most `count`.
pub fn list_new(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    (after, upto): (Position, Position),
    user_id: &str,
    count: usize,
) -> Result<Page, Fault> {
    let (mut page, mut last) = (Page::default(), after);
    if after >= upto {
        return Ok(page);
    }
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, upto)));
    let rows = schema::RECEIPT_LOG.range::<(RoomNum, Position)>(read, low, high, Direction::Up)?;
    for (looked_at, row) in rows.enumerate() {
        let ((_, position), Json(key)) = row?;
        if page.receipts.len() == count || looked_at == count.saturating_mul(LOOKED_AT) {
            page.told_upto = Some(last);
            break;
        }
        last = position;
        page.receipts.extend(find_seen(read, room, position, key, user_id)?);
    }
    Ok(page)
}

/// Lists the receipts of a room that were stored last, at or before `upto`, and that this user may see, newest first, at
/// most `count`. Older ones are left out, and the search ends after a bounded number of them.
pub fn list_newest(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    upto: Position,
    user_id: &str,
    count: usize,
) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    let (low, high) = (Bound::Included((room, Position::ZERO)), Bound::Included((room, upto)));
    let rows = schema::RECEIPT_LOG.range_mostly_empty::<(RoomNum, Position)>(read, low, high)?;
    let mut receipts = Vec::new();
    for row in rows.take(count.saturating_mul(LOOKED_AT)) {
        let ((_, position), Json(key)) = row?;
        receipts.extend(find_seen(read, room, position, key, user_id)?);
        if receipts.len() == count {
            break;
        }
    }
    Ok(receipts)
}

/// Finds the receipt that was stored at a position, if the user may see it and no newer one has replaced it.
fn find_seen(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    position: Position,
    key: ReceiptKey,
    user_id: &str,
) -> Result<Option<(ReceiptKey, ReceiptRow)>, Fault> {
    if key.kind == ReceiptKind::Private && key.user.as_str() != user_id {
        return Ok(None);
    }
    let row = schema::RECEIPTS.get(read, (room, key.user.as_str(), key.kind, key.thread.as_str()))?;
    Ok(row.filter(|row| row.position == position).map(|row| (key, row)))
}

/// Forgets how far a user has read a room, for a user who asked to be erased.
pub fn delete_all(batch: &mut Batch, room: RoomNum, user_id: &str) {
    schema::RECEIPTS.delete_prefix::<(RoomNum, String)>(batch, (room, user_id));
}

/// Whether a receipt of the room was stored after `after`.
pub fn any_new(read: &(impl Read + ?Sized), room: RoomNum, after: Position) -> Result<bool, Fault> {
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, Position::MAX)));
    let mut rows = schema::RECEIPT_LOG.range::<(RoomNum, Position)>(read, low, high, Direction::Down)?;
    Ok(rows.next().transpose()?.is_some())
}

/// The place up to which a user has read, in one thread or in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadUpTo {
    /// The order up to which everything is read; [`Order::MIN`] if there is no receipt.
    pub order: Order,
    /// The position at which the newest of these receipts was stored; zero if there is none.
    pub stored: Position,
}

/// Tells up to where a user has read in a thread, by public and private receipts alike. The thread is [`NO_THREAD`],
/// [`MAIN_THREAD`] or the id of a thread's root.
pub fn read_up_to(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user_id: &str,
    thread: &str,
) -> Result<ReadUpTo, Fault> {
    let kinds = [ReceiptKind::Public, ReceiptKind::Private];
    let rows = schema::RECEIPTS.get_many(read, kinds.map(|kind| (room, user_id, kind, thread)))?;
    let nothing = ReadUpTo { order: Order::MIN, stored: Position::ZERO };
    Ok(rows.into_iter().flatten().fold(nothing, |upto, row| ReadUpTo {
        order: upto.order.max(row.order),
        stored: upto.stored.max(row.position),
    }))
}

/// Gives the content of `m.receipt` events that say all this. There is more than one only where a user has receipts for
/// several threads at one event, which one content cannot say.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const ROOM: RoomNum = RoomNum(5);

    fn receipt(user: &str, kind: ReceiptKind, thread: &str, at: u64) -> Receipt {
        Receipt {
            room: ROOM,
            key: ReceiptKey { user: user.try_into().unwrap(), kind, thread: thread.into() },
            event_id: format!("$e{at}").try_into().unwrap(),
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
        let upto =
            |user: &str, thread: &str| read_up_to(&*store.snapshot(), ROOM, user, thread).unwrap().order;
        let order = |at| Order::live(Position::new(at).unwrap());
        assert_eq!(upto("@a:x", NO_THREAD), order(12));
        assert_eq!(upto("@a:x", MAIN_THREAD), order(9));
        assert_eq!(upto("@a:x", "$root"), order(3));
        assert_eq!(upto("@a", NO_THREAD), Order::MIN);
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
        let all = list_newest(&*snapshot, ROOM, snapshot.upto(), "@b:x", 9).unwrap();
        let ids = |receipts: &[(ReceiptKey, ReceiptRow)]| -> Vec<String> {
            receipts.iter().map(|(_, row)| row.event_id.to_string()).collect()
        };
        assert_eq!(ids(&all), ["$e4", "$e11"]);
        let page = list_new(&*snapshot, ROOM, (seen, snapshot.upto()), "@b:x", 9).unwrap();
        assert_eq!((ids(&page.receipts), page.told_upto), (vec!["$e11".to_owned(), "$e4".to_owned()], None));
        assert!(any_new(&*snapshot, ROOM, seen).unwrap());
        assert!(!any_new(&*snapshot, ROOM, snapshot.upto()).unwrap());
        let all = list_newest(&*snapshot, ROOM, snapshot.upto(), "@a:x", 9).unwrap();
        assert_eq!(all.len(), 1, "nobody sees the private receipts of others");
        assert_eq!(contents(&all), [serde_json::json!({ "$e11": { "m.read": { "@a:x": { "ts": 7 } } } })]);
    }

    #[test]
    fn a_list_of_new_receipts_goes_on_where_it_ended_whatever_is_hidden() {
        let store = store();
        let thread = |number: u64| format!("$root{number}");
        let public: Vec<_> =
            (0..5).map(|number| receipt("@a:x", ReceiptKind::Public, &thread(number), 9)).collect();
        let hidden: Vec<_> =
            (0..40).map(|number| receipt("@b:x", ReceiptKind::Private, &thread(number), 9)).collect();
        write(&store, &[&public[..3], &hidden[..], &public[3..]].concat());
        let snapshot = store.snapshot();
        let (mut after, mut told, mut pages) = (Position::ZERO, Vec::new(), 0);
        loop {
            let page = list_new(&*snapshot, ROOM, (after, snapshot.upto()), "@c:x", 2).unwrap();
            assert!(page.receipts.len() <= 2, "a page is bounded");
            told.extend(page.receipts.into_iter().map(|(key, _)| key.thread));
            pages += 1;
            match page.told_upto {
                Some(upto) => assert!(upto > std::mem::replace(&mut after, upto), "each page goes on"),
                None => break,
            }
        }
        assert_eq!(told, (0..5).map(thread).collect::<Vec<_>>());
        assert!(pages > 3, "{pages}");
    }

    #[test]
    fn receipts_for_two_threads_at_one_event_are_both_told() {
        let store = store();
        write(
            &store,
            &[receipt("@a:x", ReceiptKind::Public, "", 10), receipt("@a:x", ReceiptKind::Public, "main", 10)],
        );
        let snapshot = store.snapshot();
        let all = list_newest(&*snapshot, ROOM, snapshot.upto(), "@a:x", 9).unwrap();
        assert_eq!(contents(&all).len(), 2);
    }
}
