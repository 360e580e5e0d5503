//! What a user's clients keep here, global or for a room: an object of each type.
//!
//! Specification: client-server API, "Client Config". Push rules have a table of their own (`push::rules`).

use std::ops::Bound;

use bytes::Bytes;
use ruma::{DeviceId, RoomId, UserId, api::error::ErrorKind};

use crate::{
    accounts::users,
    error::{Refusal, Result},
    ids::{Position, UserNum},
    schema::{
        self,
        accounts::{AccountDataKey, WrittenRow},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// The type is no longer, in bytes.
pub const TYPE_BYTES_MAX: usize = 255;
/// The content is no larger, in bytes: one change is one batch.
pub const CONTENT_BYTES_MAX: usize = 512 << 10;
/// A user has no more types in one room, or globally.
pub const TYPES_MAX: usize = 1_000;

/// Where a global type is kept: under no room.
const GLOBAL: &str = "";

fn place(room: Option<&RoomId>) -> &str {
    room.map_or(GLOBAL, RoomId::as_str)
}

/// The account data of this type.
pub fn find(
    read: &(impl Read + ?Sized),
    user: UserNum,
    room: Option<&RoomId>,
    kind: &str,
) -> Result<Option<WrittenRow>, Fault> {
    schema::ACCOUNT_DATA.get(read, (user, place(room), kind))
}

/// All types with their account data, of a room or global.
pub fn list(
    read: &(impl Read + ?Sized),
    user: UserNum,
    room: Option<&RoomId>,
) -> Result<Vec<(String, WrittenRow)>, Fault> {
    schema::ACCOUNT_DATA
        .prefix::<(UserNum, String)>(read, (user, place(room)), Direction::Up)?
        .map(|row| row.map(|((_, _, kind), row)| (kind, row)))
        .collect()
}

/// What was written in (after, upto] and not again since: room id ("" is global), type and row, oldest first.
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
        // Counts only while the row still says that position.
        if let Some(row) = row.filter(|row| row.position == position) {
            found.push((key, row));
        }
    }
    Ok(found)
}

/// Writes account data. Under the user's lock. Errors: 400 for a type that cannot be, 413 for too much.
pub fn put(
    batch: &mut Batch,
    user: UserNum,
    room: Option<&RoomId>,
    kind: &str,
    content: Bytes,
) -> Result<Position> {
    if kind.is_empty() || kind.len() > TYPE_BYTES_MAX {
        return Err(Refusal::invalid_param("A type has 1 to 255 bytes.").into());
    }
    if content.len() > CONTENT_BYTES_MAX {
        return Err(Refusal::too_large("This is too much account data for one type.").into());
    }
    match find(batch, user, room, kind)? {
        Some(before) => schema::ACCOUNT_DATA_LOG.delete(batch, (user, before.position)),
        None => {
            let types = (user, place(room));
            let types = schema::ACCOUNT_DATA.prefix::<(UserNum, String)>(batch, types, Direction::Up)?;
            if types.take(TYPES_MAX).count() == TYPES_MAX {
                return Err(Refusal::too_large("These are too many types of account data.").into());
            }
        }
    }
    let position = batch.position(&LogEntry::AccountData { user });
    let key = AccountDataKey { room: place(room).to_owned(), kind: kind.to_owned() };
    schema::ACCOUNT_DATA.put(batch, (user, place(room), kind), &WrittenRow { position, content });
    schema::ACCOUNT_DATA_LOG.put(batch, (user, position), &Json(key));
    Ok(position)
}

/// Whether a user wants no invitations at all: `m.invite_permission_config`
/// (<https://spec.matrix.org/v1.19/client-server-api/#invite-permission>).
pub fn blocks_invites(read: &(impl Read + ?Sized), user: UserNum) -> Result<bool, Fault> {
    #[derive(serde::Deserialize)]
    struct Config {
        default_action: String,
    }
    let row = find(read, user, None, "m.invite_permission_config")?;
    let config = row.and_then(|row| serde_json::from_slice::<Config>(&row.content).ok());
    Ok(config.is_some_and(|config| config.default_action == "block"))
}

/// Refuses to invite a user of ours who wants no invitations: 403 `M_INVITE_BLOCKED`.
pub fn check_invite(read: &(impl Read + ?Sized), target: &UserId) -> Result<()> {
    match users::find_num(read, target)? {
        Some(user) if blocks_invites(read, user)? => {
            Err(Refusal::new(ErrorKind::InviteBlocked, "This user takes no invitations.").into())
        }
        _ => Ok(()),
    }
}

/// Deletes global account data of one type, if there is any. Under the user's lock.
pub fn delete(batch: &mut Batch, user: UserNum, kind: &str) -> Result<(), Fault> {
    if let Some(row) = find(batch, user, None, kind)? {
        schema::ACCOUNT_DATA.delete(batch, (user, GLOBAL, kind));
        schema::ACCOUNT_DATA_LOG.delete(batch, (user, row.position));
        batch.position(&LogEntry::AccountData { user });
    }
    Ok(())
}

/// The type under which clients keep whether a device is silent (MSC3890): of no use once the device is gone.
pub fn settings_of_device(device: &DeviceId) -> String {
    format!("org.matrix.msc3890.local_notification_settings.{device}")
}

/// Deletes all account data of a user, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::ACCOUNT_DATA.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::ACCOUNT_DATA_LOG.delete_prefix::<(UserNum,)>(batch, (user,));
}

#[cfg(test)]
mod tests {
    use ruma::room_id;

    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const ALICE: UserNum = UserNum(1);

    fn write(store: &Store, room: Option<&RoomId>, kind: &str, content: &'static str) {
        let mut batch = store.batch(&Guard::alone());
        put(&mut batch, ALICE, room, kind, content.into()).unwrap();
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
        let text = |room: &str, kind: &str, content: &'static str| {
            (room.to_owned(), kind.to_owned(), Bytes::from_static(content.as_bytes()))
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
        let mut write = |kind: &str, content: Bytes| put(&mut batch, ALICE, None, kind, content).map(drop);
        assert!(write("", Bytes::new()).is_err());
        assert!(write(&"a".repeat(256), Bytes::new()).is_err());
        assert!(write("a", Bytes::from(vec![b' '; CONTENT_BYTES_MAX + 1])).is_err());
        for number in 0..TYPES_MAX {
            write(&format!("t{number}"), Bytes::new()).unwrap();
        }
        assert!(write("one more", Bytes::new()).is_err());
        assert!(write("t0", Bytes::new()).is_ok(), "one that is there may be changed");
    }
}
