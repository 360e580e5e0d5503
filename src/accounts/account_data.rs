//! Account data: objects that a user's clients keep here, one of each type, global or for a room.
//!
//! Specification: client-server API, "Client Config". Push rules have a table of their own (`push::rules`).

use std::ops::Bound;

use bytes::Bytes;
use ruma::{DeviceId, RoomId};

use crate::{
    error::{Refusal, Result},
    ids::{Position, UserNum},
    schema::{
        self,
        accounts::{AccountDataKey, DataSize, WrittenRow},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// A type has at most this many bytes.
pub const TYPE_BYTES_MAX: usize = 255;
/// The content of one type has at most this many bytes, for one change is one batch.
pub const CONTENT_BYTES_MAX: usize = 512 << 10;
/// A user has at most this much account data, over all rooms and types: a client that begins is sent most of it.
const BOUNDS: DataSize = DataSize { rows: 20_000, bytes: 16 << 20 };

/// Global types are kept under this instead of a room id, which is never empty.
const GLOBAL: &str = "";

fn place(room: Option<&RoomId>) -> &str {
    room.map_or(GLOBAL, RoomId::as_str)
}

/// The account data of this type.
pub fn find(
    read: &(impl Read + ?Sized),
    user: UserNum,
    room: Option<&RoomId>,
    event_type: &str,
) -> Result<Option<WrittenRow>, Fault> {
    let row = schema::ACCOUNT_DATA.get(read, (user, place(room), event_type))?;
    Ok(row.filter(|row| !is_deleted(&row.content)))
}

/// Whether account data of this content is as good as deleted (MSC3391): an empty object is what clients learn a deletion by.
pub fn is_deleted(content: &[u8]) -> bool {
    let inner = content.trim_ascii().strip_prefix(b"{").and_then(|rest| rest.strip_suffix(b"}"));
    inner.is_some_and(|inner| inner.trim_ascii().is_empty())
}

/// All types with their account data, of a room or global, without those that were deleted.
pub fn list(
    read: &(impl Read + ?Sized),
    user: UserNum,
    room: Option<&RoomId>,
) -> Result<Vec<(String, WrittenRow)>, Fault> {
    schema::ACCOUNT_DATA
        .prefix::<(UserNum, String)>(read, (user, place(room)), Direction::Up)?
        .map(|row| row.map(|((_, _, event_type), row)| (event_type, row)))
        .filter(|row| row.as_ref().map_or(true, |(_, row)| !is_deleted(&row.content)))
        .collect()
}

/// Lists the account data that was written in (after, upto] and not again since: room id ("" is global), type and row, oldest
/// first. What was deleted has an empty object.
pub fn list_changes(
    read: &(impl Read + ?Sized),
    user: UserNum,
    after: Position,
    upto: Position,
) -> Result<Vec<(AccountDataKey, WrittenRow)>, Fault> {
    let mut found = Vec::new();
    if after >= upto {
        return Ok(found);
    }
    let (low, high) = (Bound::Excluded((user, after)), Bound::Included((user, upto)));
    for entry in schema::ACCOUNT_DATA_LOG.range::<(UserNum, Position)>(read, low, high, Direction::Up)? {
        let ((_, position), Json(key)) = entry?;
        let row = schema::ACCOUNT_DATA.get(read, (user, key.room.as_str(), key.kind.as_str()))?;
        // A log entry counts only while the row still has its position; a later write has an entry of its own.
        if let Some(row) = row.filter(|row| row.position == position) {
            found.push((key, row));
        }
    }
    Ok(found)
}

/// How much account data a user has.
pub fn size(read: &(impl Read + ?Sized), user: UserNum) -> Result<DataSize, Fault> {
    match schema::ACCOUNT_DATA_SIZE.get(read, user)? {
        Some(size) => Ok(size),
        None => count(read, user),
    }
}

/// Counts how much account data a user has.
pub(crate) fn count(read: &(impl Read + ?Sized), user: UserNum) -> Result<DataSize, Fault> {
    let mut size = DataSize::default();
    for row in schema::ACCOUNT_DATA.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let ((_, room, event_type), row) = row?;
        size.rows += 1;
        size.bytes += (room.len() + event_type.len() + row.content.len()) as u64;
    }
    Ok(size)
}

/// Writes account data; the caller holds the user's lock. Errors: 400 for a type that is empty or longer than
/// [`TYPE_BYTES_MAX`], 413 for content or account data beyond its bounds.
pub fn put(
    batch: &mut Batch,
    user: UserNum,
    room: Option<&RoomId>,
    event_type: &str,
    content: Bytes,
) -> Result<Position> {
    put_within(batch, user, room, event_type, content, BOUNDS)
}

fn put_within(
    batch: &mut Batch,
    user: UserNum,
    room: Option<&RoomId>,
    event_type: &str,
    content: Bytes,
    bounds: DataSize,
) -> Result<Position> {
    if event_type.is_empty() || event_type.len() > TYPE_BYTES_MAX {
        return Err(Refusal::invalid_param("A type has 1 to 255 bytes.").into());
    }
    if content.len() > CONTENT_BYTES_MAX {
        return Err(Refusal::too_large("Account data of one type has at most 512 KiB.").into());
    }
    let before = schema::ACCOUNT_DATA.get(batch, (user, place(room), event_type))?;
    let mut counted = size(batch, user)?;
    if before.is_none() && counted.rows >= bounds.rows {
        counted = forget_deleted(batch, user, counted)?;
    }
    let row_bytes = |content: &Bytes| (place(room).len() + event_type.len() + content.len()) as u64;
    let gone = before
        .as_ref()
        .map_or_else(DataSize::default, |row| DataSize { rows: 1, bytes: row_bytes(&row.content) });
    debug_assert!(
        gone.rows <= counted.rows && gone.bytes <= counted.bytes,
        "a row is not counted: {counted:?}"
    );
    let left = DataSize {
        rows: counted.rows.saturating_sub(gone.rows) + 1,
        bytes: counted.bytes.saturating_sub(gone.bytes) + row_bytes(&content),
    };
    // A user who is over the bound already may still write less than before.
    if (left.rows > bounds.rows && left.rows > counted.rows)
        || (left.bytes > bounds.bytes && left.bytes > counted.bytes)
    {
        tracing::debug!(%user, rows = left.rows, bytes = left.bytes, reason = "quota", "account data is refused");
        let why =
            format!("Account data has at most {} entries and {} bytes in all.", bounds.rows, bounds.bytes);
        return Err(Refusal::too_large(why).into());
    }
    if let Some(before) = before {
        schema::ACCOUNT_DATA_LOG.delete(batch, (user, before.position));
    }
    schema::ACCOUNT_DATA_SIZE.put(batch, user, &left);
    let position = batch.position(&LogEntry::AccountData { user });
    let key = AccountDataKey { room: place(room).to_owned(), kind: event_type.to_owned() };
    schema::ACCOUNT_DATA.put(batch, (user, place(room), event_type), &WrittenRow { position, content });
    schema::ACCOUNT_DATA_LOG.put(batch, (user, position), &Json(key));
    Ok(position)
}

/// Deletes what is left of deleted account data, by which clients that were away learn of the deletion, because its user has no room for
/// more. Gives how much is left.
fn forget_deleted(batch: &mut Batch, user: UserNum, counted: DataSize) -> Result<DataSize, Fault> {
    let mut deleted = Vec::new();
    for row in schema::ACCOUNT_DATA.prefix::<(UserNum,)>(batch, (user,), Direction::Up)? {
        let ((_, room, event_type), row) = row?;
        if is_deleted(&row.content) {
            deleted.push((room, event_type, row));
        }
    }
    let mut left = counted;
    for (room, event_type, row) in deleted {
        left.rows = left.rows.saturating_sub(1);
        let bytes = (room.len() + event_type.len() + row.content.len()) as u64;
        left.bytes = left.bytes.saturating_sub(bytes);
        schema::ACCOUNT_DATA.delete(batch, (user, room.as_str(), event_type.as_str()));
        schema::ACCOUNT_DATA_LOG.delete(batch, (user, row.position));
    }
    Ok(left)
}

/// Deletes global account data of one type, if there is any; the caller holds the user's lock. No client is told.
pub fn delete(batch: &mut Batch, user: UserNum, event_type: &str) -> Result<(), Fault> {
    if let Some(row) = schema::ACCOUNT_DATA.get(batch, (user, GLOBAL, event_type))? {
        let counted = size(batch, user)?;
        let left = DataSize {
            rows: counted.rows.saturating_sub(1),
            bytes: counted.bytes.saturating_sub((event_type.len() + row.content.len()) as u64),
        };
        schema::ACCOUNT_DATA_SIZE.put(batch, user, &left);
        schema::ACCOUNT_DATA.delete(batch, (user, GLOBAL, event_type));
        schema::ACCOUNT_DATA_LOG.delete(batch, (user, row.position));
        batch.position(&LogEntry::AccountData { user });
    }
    Ok(())
}

/// The type under which clients keep whether a device is silent (MSC3890). Nobody reads it once the device is gone.
pub fn settings_of_device(device: &DeviceId) -> String {
    format!("org.matrix.msc3890.local_notification_settings.{device}")
}

/// Deletes all account data of a user, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::ACCOUNT_DATA.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::ACCOUNT_DATA_LOG.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::ACCOUNT_DATA_SIZE.delete(batch, user);
}

#[cfg(test)]
mod tests {
    use ruma::room_id;

    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const ALICE: UserNum = UserNum(1);

    fn write(store: &Store, room: Option<&RoomId>, event_type: &str, content: &'static str) {
        let mut batch = store.batch(&Guard::alone());
        put(&mut batch, ALICE, room, event_type, content.into()).unwrap();
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
    }

    fn told(store: &Store, after: Position) -> Vec<(String, String, Bytes)> {
        let snapshot = store.snapshot();
        let changes = list_changes(&*snapshot, ALICE, after, snapshot.upto()).unwrap();
        changes.into_iter().map(|(key, row)| (key.room, key.kind, row.content)).collect()
    }

    #[test]
    fn a_change_is_told_once_at_its_last_position() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let room = room_id!("!r:s");
        write(&store, None, "a", "1");
        let first = store.snapshot().upto();
        write(&store, Some(room), "a", "2");
        write(&store, None, "b", "3");
        write(&store, None, "a", "4");
        let text = |room: &str, event_type: &str, content: &'static str| {
            (room.to_owned(), event_type.to_owned(), Bytes::from_static(content.as_bytes()))
        };
        let later = vec![text("!r:s", "a", "2"), text("", "b", "3"), text("", "a", "4")];
        assert_eq!(told(&store, Position::ZERO), later);
        assert_eq!(told(&store, first), later);
        assert!(told(&store, store.snapshot().upto()).is_empty());
        let global = list(&*store.snapshot(), ALICE, None).unwrap();
        assert_eq!(global.len(), 2);
        let mut batch = store.batch(&Guard::alone());
        delete_all(&mut batch, ALICE);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        assert!(told(&store, Position::ZERO).is_empty());
    }

    #[test]
    fn types_and_contents_are_bounded() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::alone());
        let mut write =
            |event_type: &str, content: Bytes| put(&mut batch, ALICE, None, event_type, content).map(drop);
        assert!(write("", Bytes::new()).is_err());
        assert!(write(&"a".repeat(256), Bytes::new()).is_err());
        assert!(write("a", Bytes::from(vec![b' '; CONTENT_BYTES_MAX + 1])).is_err());
        assert!(write("a", Bytes::new()).is_ok());
    }

    #[test]
    fn a_user_has_a_bounded_number_of_entries_and_bytes_and_may_always_make_it_less() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::alone());
        let rooms = [room_id!("!a:s"), room_id!("!b:s"), room_id!("!c:s")];
        let mut write = |bounds: DataSize, room: Option<&RoomId>, event_type: &str, bytes: usize| {
            put_within(&mut batch, ALICE, room, event_type, Bytes::from(vec![b' '; bytes]), bounds).is_ok()
        };
        let few = DataSize { rows: 3, bytes: 100 };
        assert!(write(few, Some(rooms[0]), "t", 10) && write(few, Some(rooms[1]), "t", 10));
        assert!(write(few, None, "t", 10));
        assert!(!write(few, Some(rooms[2]), "t", 0), "a fourth entry is one too many");
        assert!(write(few, None, "t", 69) && !write(few, None, "t", 70));
        let fewer = DataSize { rows: 1, bytes: 10 };
        assert!(write(fewer, None, "t", 68) && !write(fewer, None, "t", 69));
        assert_eq!(size(&batch, ALICE).unwrap(), count(&batch, ALICE).unwrap());
        delete(&mut batch, ALICE, "t").unwrap();
        assert_eq!(size(&batch, ALICE).unwrap(), count(&batch, ALICE).unwrap());
        assert_eq!(size(&batch, ALICE).unwrap().rows, 2);
        delete_all(&mut batch, ALICE);
        assert_eq!(size(&batch, ALICE).unwrap(), DataSize::default());
    }
}
