//! Invariants of the rows of key backups, which `db check` verifies.

use serde_json::value::RawValue;

use crate::{
    accounts::users,
    encryption::backup::row_bytes,
    ids::UserNum,
    schema::{
        self,
        backup::{BackupShare, BackupState},
    },
    store::{Direction, Fault, check::RowCheck, key::Json},
};

/// The checks of versions of backups and their keys.
pub fn checks() -> [RowCheck; 5] {
    [
        RowCheck::of(&schema::BACKUP_LAST, |read, user, last, doubts| {
            let live = users::find(read, *user)?.filter(|account| !account.is_deactivated);
            doubts.unless(live.is_some(), "the account of the backup is gone");
            let newest = super::find_current(read, *user)?;
            doubts.unless(newest.is_none_or(|newest| newest <= *last), "a version has a higher number");
            Ok(())
        }),
        RowCheck::of(&schema::BACKUP, |read, (user, version), Json(row), doubts| {
            let is_json = serde_json::from_str::<&RawValue>(&row.auth_data).is_ok();
            doubts.unless(is_json, "the data of the version is not JSON");
            let last = schema::BACKUP_LAST.get(read, *user)?;
            doubts.unless(last.is_some_and(|last| last >= *version), "the version was never made");
            let is_counted = schema::BACKUP_STATE.contains(read, (*user, *version))?;
            doubts.unless(is_counted, "it is not said how much the version holds");
            Ok(())
        }),
        RowCheck::of(&schema::BACKUP_STATE, |read, (user, version), state, doubts| {
            doubts.unless(schema::BACKUP.contains(read, (*user, *version))?, "there is no such version");
            let mut found = BackupState { etag: state.etag, ..BackupState::default() };
            for row in schema::BACKUP_ROOM.prefix::<(UserNum, u64)>(read, (*user, *version), Direction::Up)? {
                let (_, share) = row?;
                found.keys += share.keys;
                found.bytes += share.bytes;
            }
            doubts.unless(found == *state, format!("{state:?} is said, and its rooms have {found:?}"));
            Ok(())
        }),
        RowCheck::of(&schema::BACKUP_ROOM, |read, (user, version, room), share, doubts| {
            doubts.unless(share.keys > 0, "a room without keys has no such row");
            let is_counted = schema::BACKUP_STATE.contains(read, (*user, *version))?;
            doubts.unless(is_counted, "the room is of no version");
            let mut found = BackupShare::default();
            let keys = schema::BACKUP_KEY.prefix::<(UserNum, u64, String)>(
                read,
                (*user, *version, room.as_str()),
                Direction::Up,
            )?;
            for row in keys {
                let ((_, _, room, session), key) = row?;
                found.keys += 1;
                found.bytes += row_bytes(&room, &session, &key);
            }
            doubts.unless(found == *share, format!("{share:?} is said of the room, and it has {found:?}"));
            Ok(())
        }),
        RowCheck::of(&schema::BACKUP_KEY, |read, (user, version, room, _), key, doubts| {
            let is_json = serde_json::from_slice::<&RawValue>(&key.session_data).is_ok();
            doubts.unless(is_json, "the key is not JSON");
            let is_counted = schema::BACKUP_ROOM.contains(read, (*user, *version, room.as_str()))?;
            doubts.unless(is_counted, "the key is not counted for its room");
            Ok::<(), Fault>(())
        }),
    ]
}
