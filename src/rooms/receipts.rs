//! Receipts say how far users have read. The newest one of each (room, user, kind, thread) is kept.
//!
//! Specification: client-server API, "Receipts".

use std::{cmp::Reverse, collections::BTreeMap, ops::Bound};

use bytes::Bytes;
use ruma::{OwnedEventId, UserId};

use crate::{
    ids::{Order, Position, RoomNum},
    schema,
    schema::receipts::{ReceiptKey, ReceiptKind, ReceiptRow},
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json, migrate},
};

/// The thread of a receipt that counts for everything, in threads or not.
pub const NO_THREAD: &str = "";
/// The thread of a receipt that counts only for events in no thread.
pub const MAIN_THREAD: &str = "main";

/// At most this many receipts of a user are deleted in one batch, because each takes two rows of it.
const DELETED_AT_ONCE: usize = 1_000;
/// At most this many rows of the log are moved in one part of [`part_logs`].
const MOVED_AT_ONCE: usize = if cfg!(test) { 1 } else { 1_000 };

/// The key of a row in the log of private receipts.
type OwnKey = (RoomNum, String, Position);

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
        unlog(batch, *room, key, old.position);
    }
    let position = batch.position(&LogEntry::Receipts { room: *room });
    let row = ReceiptRow {
        position,
        order: receipt.order,
        sent_ms: receipt.sent_ms,
        event_id: receipt.event_id.clone(),
    };
    schema::RECEIPTS.put(batch, row_key, &row);
    log(batch, *room, key, position);
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

fn log(batch: &mut Batch, room: RoomNum, key: &ReceiptKey, position: Position) {
    let row = Json(key.clone());
    match key.kind {
        ReceiptKind::Public => schema::RECEIPT_LOG.put(batch, (room, position), &row),
        ReceiptKind::Private => {
            schema::PRIVATE_RECEIPT_LOG.put(batch, (room, key.user.as_str(), position), &row);
        }
    }
}

fn unlog(batch: &mut Batch, room: RoomNum, key: &ReceiptKey, position: Position) {
    match key.kind {
        ReceiptKind::Public => schema::RECEIPT_LOG.delete(batch, (room, position)),
        ReceiptKind::Private => {
            schema::PRIVATE_RECEIPT_LOG.delete(batch, (room, key.user.as_str(), position));
        }
    }
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
    if after >= upto {
        return Ok(Page::default());
    }
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, upto)));
    let public = schema::RECEIPT_LOG.range::<(RoomNum, Position)>(read, low, high, Direction::Up)?;
    let public = public.map(|row| row.map(|((_, position), Json(key))| (position, key)));
    let low = Bound::Excluded((room, user_id, after));
    let high = Bound::Included((room, user_id, upto));
    let own = schema::PRIVATE_RECEIPT_LOG.range::<OwnKey>(read, low, high, Direction::Up)?;
    let own = own.map(|row| row.map(|((.., position), Json(key))| (position, key)));
    let one_more = count.saturating_add(1);
    let mut logged = own.take(one_more).chain(public.take(one_more)).collect::<Result<Vec<_>, Fault>>()?;
    logged.sort_unstable_by_key(|(position, _)| *position);
    let has_more = logged.len() > count;
    logged.truncate(count);
    let told_upto = logged.last().map(|(position, _)| *position).filter(|_| has_more);
    Ok(Page { receipts: load(read, room, logged)?, told_upto })
}

/// Lists the receipts of a room that were stored last, at or before `upto`, and that this user may see, newest first, at
/// most `count`. Older ones are left out.
pub fn list_newest(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    upto: Position,
    user_id: &str,
    count: usize,
) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    let (low, high) = (Bound::Included((room, Position::ZERO)), Bound::Included((room, upto)));
    let public = schema::RECEIPT_LOG.range_mostly_empty::<(RoomNum, Position)>(read, low, high)?;
    let public = public.map(|row| row.map(|((_, position), Json(key))| (position, key)));
    let low = Bound::Included((room, user_id, Position::ZERO));
    let high = Bound::Included((room, user_id, upto));
    let own = schema::PRIVATE_RECEIPT_LOG.range_mostly_empty::<OwnKey>(read, low, high)?;
    let own = own.map(|row| row.map(|((.., position), Json(key))| (position, key)));
    let mut logged = own.take(count).chain(public.take(count)).collect::<Result<Vec<_>, Fault>>()?;
    logged.sort_unstable_by_key(|(position, _)| Reverse(*position));
    logged.truncate(count);
    load(read, room, logged)
}

/// Lists the public receipts of a room for events at or above an order, newest first, at most `count`, and this user's own for
/// whatever events, at most `count` of these too. What is at or before `upto` counts.
pub fn list_for_events(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    (start, upto): (Order, Position),
    user_id: &str,
    count: usize,
) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    // A receipt is stored after the event that it is for.
    let (low, high) = (Bound::Included((room, start.anchor)), Bound::Included((room, upto)));
    let public = schema::RECEIPT_LOG.range_mostly_empty::<(RoomNum, Position)>(read, low, high)?;
    let public = public.take(count).map(|row| row.map(|((_, position), Json(key))| (position, key)));
    let mut receipts = load(read, room, public.collect::<Result<Vec<_>, Fault>>()?)?;
    receipts.retain(|(key, row)| row.order >= start && key.user != user_id);
    let own = schema::RECEIPTS.prefix::<(RoomNum, String)>(read, (room, user_id), Direction::Up)?;
    for row in own.take(count) {
        let ((_, user, kind, thread), row) = row?;
        let Ok(user) = user.try_into() else { continue };
        if row.position <= upto {
            receipts.push((ReceiptKey { user, kind, thread }, row));
        }
    }
    Ok(receipts)
}

/// Loads the receipts that the log names at these positions.
fn load(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    logged: Vec<(Position, ReceiptKey)>,
) -> Result<Vec<(ReceiptKey, ReceiptRow)>, Fault> {
    let mut receipts = Vec::with_capacity(logged.len());
    for (position, key) in logged {
        let row = schema::RECEIPTS.get(read, (room, key.user.as_str(), key.kind, key.thread.as_str()))?;
        debug_assert!(row.as_ref().is_some_and(|row| row.position == position), "the log names a receipt");
        receipts.extend(row.filter(|row| row.position == position).map(|row| (key, row)));
    }
    Ok(receipts)
}

/// Forgets how far a user has read a room, for a user who asked to be erased. Answers whether receipts are left, because a
/// batch holds no more; then it must be called again.
pub fn delete_some(batch: &mut Batch, room: RoomNum, user_id: &UserId) -> Result<bool, Fault> {
    let rows = schema::RECEIPTS
        .prefix::<(RoomNum, String)>(batch, (room, user_id.as_str()), Direction::Up)?
        .take(DELETED_AT_ONCE)
        .collect::<Result<Vec<_>, _>>()?;
    let are_left = rows.len() == DELETED_AT_ONCE;
    for ((_, _, kind, thread), row) in rows {
        schema::RECEIPTS.delete(batch, (room, user_id.as_str(), kind, thread.as_str()));
        unlog(batch, room, &ReceiptKey { user: user_id.to_owned(), kind, thread }, row.position);
    }
    Ok(are_left)
}

/// Whether a receipt of the room that this user may see was stored after `after`.
pub fn any_new(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user_id: &str,
    after: Position,
) -> Result<bool, Fault> {
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, Position::MAX)));
    let mut rows = schema::RECEIPT_LOG.range::<(RoomNum, Position)>(read, low, high, Direction::Down)?;
    if rows.next().transpose()?.is_some() {
        return Ok(true);
    }
    let low = Bound::Excluded((room, user_id, after));
    let high = Bound::Included((room, user_id, Position::MAX));
    let mut rows = schema::PRIVATE_RECEIPT_LOG.range::<OwnKey>(read, low, high, Direction::Down)?;
    Ok(rows.next().transpose()?.is_some())
}

/// A step from an older layout: gives private receipts a log of their own, and deletes what the log says of receipts that are
/// gone.
pub(crate) fn part_logs(
    read: &dyn Read,
    after: Option<Bytes>,
    batch: &mut Batch,
) -> Result<Option<Bytes>, Fault> {
    type At = (RoomNum, Position);
    let low = migrate::after_place::<At>(after)?;
    let mut last = None;
    for row in
        schema::RECEIPT_LOG.range::<At>(read, low, Bound::Unbounded, Direction::Up)?.take(MOVED_AT_ONCE)
    {
        let ((room, position), Json(key)) = row?;
        let row = schema::RECEIPTS.get(read, (room, key.user.as_str(), key.kind, key.thread.as_str()))?;
        let is_there = row.is_some_and(|row| row.position == position);
        if !is_there || key.kind == ReceiptKind::Private {
            schema::RECEIPT_LOG.delete(batch, (room, position));
        }
        if is_there && key.kind == ReceiptKind::Private {
            log(batch, room, &key, position);
        }
        last = Some(migrate::place_of::<At>((room, position)));
    }
    Ok(last)
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
        assert!(any_new(&*snapshot, ROOM, "@b:x", seen).unwrap());
        assert!(!any_new(&*snapshot, ROOM, "@b:x", snapshot.upto()).unwrap());
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
        assert_eq!(pages, 3, "private receipts of others take no place");
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

    #[test]
    fn private_receipts_of_others_hide_no_older_receipt() {
        let store = store();
        write(
            &store,
            &[receipt("@a:x", ReceiptKind::Public, "", 1), receipt("@b:x", ReceiptKind::Private, "", 2)],
        );
        let seen = store.snapshot().upto();
        let threads: Vec<_> = (0..100)
            .map(|number| receipt("@c:x", ReceiptKind::Private, &format!("$thread{number}"), 3 + number))
            .collect();
        write(&store, &threads);
        let snapshot = store.snapshot();
        let users = |count| {
            let all = list_newest(&*snapshot, ROOM, snapshot.upto(), "@b:x", count).unwrap();
            all.iter().map(|(key, _)| key.user.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(users(2), ["@b:x", "@a:x"]);
        assert_eq!(users(1), ["@b:x"], "the newest come first");
        let page = |after| list_new(&*snapshot, ROOM, (after, snapshot.upto()), "@b:x", 1).unwrap();
        let first = page(Position::ZERO);
        assert_eq!((first.receipts.len(), first.receipts[0].0.user.as_str()), (1, "@a:x"));
        let second = page(first.told_upto.unwrap());
        assert_eq!((second.receipts[0].0.user.as_str(), second.told_upto), ("@b:x", None));
        assert!(!any_new(&*snapshot, ROOM, "@b:x", seen).unwrap());
        assert!(any_new(&*snapshot, ROOM, "@c:x", seen).unwrap());
    }

    #[test]
    fn nothing_is_left_of_the_receipts_of_an_erased_user() {
        let store = store();
        let user = <&UserId>::try_from("@a:x").unwrap();
        let thread = |number: usize| format!("$thread{number}");
        let mut all: Vec<_> = (0..DELETED_AT_ONCE + 5)
            .map(|number| receipt("@a:x", ReceiptKind::Public, &thread(number), 5))
            .collect();
        all.extend((0..10).map(|number| receipt("@a:x", ReceiptKind::Private, &thread(number), 5)));
        all.push(receipt("@ab:x", ReceiptKind::Public, "", 5));
        for some in all.chunks(500) {
            write(&store, some);
        }
        for are_left in [true, false] {
            let mut batch = store.batch(&Guard::alone());
            assert_eq!(delete_some(&mut batch, ROOM, user).unwrap(), are_left);
            drop(store.enqueue(batch).unwrap());
            store.flush().unwrap();
        }
        let read = &*store.snapshot();
        assert_eq!(schema::RECEIPTS.prefix::<()>(read, (), Direction::Up).unwrap().count(), 1);
        assert_eq!(schema::RECEIPT_LOG.prefix::<()>(read, (), Direction::Up).unwrap().count(), 1);
        assert_eq!(schema::PRIVATE_RECEIPT_LOG.prefix::<()>(read, (), Direction::Up).unwrap().count(), 0);
    }
}
