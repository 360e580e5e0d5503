//! Server-side backups of the keys of rooms. A user has several versions of a backup, of which the newest one is in use; each holds
//! at most one key for a session, which clients have encrypted.
//!
//! Numbers of versions and etags are never given twice, not even after the store was restored from an older copy: each incarnation
//! of the store has a range of its own. So no client takes a new version for one that it knew and that the restored store lacks.
//!
//! Specification: client-server API, "Server-side key backups".

pub mod check;

use std::{cmp::Reverse, collections::BTreeMap, ops::Bound};

use bytes::Bytes;
use ruma::api::error::{ErrorKind, WrongRoomKeysVersionErrorData};

use crate::{
    error::{Refusal, Result},
    ids::UserNum,
    schema::{
        self,
        backup::{BackedUpKey, BackupRow, BackupShare, BackupState},
    },
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// The name of a room, a session or an algorithm has at most this many bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The `auth_data` of a version has at most this many bytes of JSON.
pub const AUTH_DATA_BYTES_MAX: usize = 64 << 10;
/// The `session_data` of a key has at most this many bytes of JSON. Clients need about one thousand.
pub const SESSION_DATA_BYTES_MAX: usize = 64 << 10;
/// A user has at most this many versions at a time.
const VERSIONS_MAX: usize = 100;
/// All versions of a user together hold at most this much.
const BOUNDS: BackupShare = BackupShare { keys: 1_000_000, bytes: 1 << 30 };
/// A batch takes at most this many keys, each with a row of its room, so that it stays within the bounds of a batch.
const KEYS_AT_ONCE: usize = 2_000;
/// A batch takes no further key once its keys have this many bytes; one more, of the largest, still fits.
const BYTES_AT_ONCE: usize = 800 << 10;
/// The numbers of an incarnation of the store begin at its own number, shifted by this many bits. They stay below 2^53.
const INCARNATION_SHIFT: u32 = 40;

/// A version of a backup, as clients are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The number of the version.
    pub version: u64,
    /// The algorithm and its data.
    pub row: BackupRow,
    /// How much the version holds.
    pub state: BackupState,
}

/// A key that a client stores or reads, with the room and the session that it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upload {
    /// The id of the room.
    pub room: String,
    /// The id of the session.
    pub session: String,
    /// The key, with what is said of it.
    pub key: BackedUpKey,
}

impl Upload {
    fn bytes(&self) -> u64 {
        row_bytes(&self.room, &self.session, &self.key)
    }
}

/// The keys of a version that a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// All keys of the version.
    All,
    /// The keys of this room.
    Room(String),
    /// The key of this session in this room.
    Session(String, String),
}

impl BackedUpKey {
    /// Whether this key takes the place of another one for the same session. An equal one does not.
    fn is_better_than(&self, other: &Self) -> bool {
        let rank = |key: &Self| (Reverse(key.is_verified), key.first_message_index, key.forwarded_count);
        rank(self) < rank(other)
    }
}

fn row_bytes(room: &str, session: &str, key: &BackedUpKey) -> u64 {
    (room.len() + session.len() + key.session_data.len()) as u64
}

/// The number after this one, in the range of this incarnation or above.
fn next_number(last: u64, incarnation: u64) -> u64 {
    last.saturating_add(1).max((incarnation << INCARNATION_SHIFT).saturating_add(1))
}

/// Reads the name of a version. There is none that is written otherwise than we write it.
fn parse(version: &str) -> Option<u64> {
    version.parse::<u64>().ok().filter(|number| number.to_string() == version)
}

/// The refusal for a version that is not there: 404 `M_NOT_FOUND`.
fn unknown() -> Refusal {
    Refusal::not_found("You have no such version of a key backup.")
}

/// The refusal for a key that is not there: 404 `M_NOT_FOUND`.
pub fn no_such_key() -> Refusal {
    Refusal::not_found("The key backup has no key for this session.")
}

/// The newest version of a user's backup.
pub fn find_current(read: &(impl Read + ?Sized), user: UserNum) -> Result<Option<u64>, Fault> {
    let newest = schema::BACKUP.prefix::<(UserNum,)>(read, (user,), Direction::Down)?.next().transpose()?;
    Ok(newest.map(|((_, version), _)| version))
}

/// How much a version holds.
pub fn state(read: &(impl Read + ?Sized), user: UserNum, version: u64) -> Result<BackupState, Fault> {
    Ok(schema::BACKUP_STATE.get(read, (user, version))?.unwrap_or_default())
}

/// The number of the version that a client names. Errors: 404 if there is none.
pub fn require(read: &(impl Read + ?Sized), user: UserNum, version: &str) -> Result<u64> {
    let number = parse(version).ok_or_else(unknown)?;
    if !schema::BACKUP.contains(read, (user, number))? {
        return Err(unknown().into());
    }
    Ok(number)
}

/// The number of the version that a client names, which must be the newest one. Errors: 404 if there is none, 403
/// `M_WRONG_ROOM_KEYS_VERSION` if there is a newer one.
pub fn require_current(read: &(impl Read + ?Sized), user: UserNum, version: &str) -> Result<u64> {
    let number = require(read, user, version)?;
    match find_current(read, user)? {
        Some(current) if current != number => {
            let data = WrongRoomKeysVersionErrorData::new(current.to_string());
            let why = format!("Keys go to the newest version of the backup, which is {current}.");
            Err(Refusal::new(ErrorKind::WrongRoomKeysVersion(data), why).into())
        }
        _ => Ok(number),
    }
}

/// A version with all that clients are told of it, or the newest one if none is named. Errors: 404 if there is none.
pub fn require_info(read: &(impl Read + ?Sized), user: UserNum, version: Option<&str>) -> Result<Info> {
    let version = match version {
        Some(version) => parse(version),
        None => find_current(read, user)?,
    };
    let version = version.ok_or_else(unknown)?;
    let Json(row) = schema::BACKUP.get(read, (user, version))?.ok_or_else(unknown)?;
    Ok(Info { version, row, state: state(read, user, version)? })
}

fn check_row(row: &BackupRow) -> Result<()> {
    if row.algorithm.is_empty() || row.algorithm.len() > NAME_BYTES_MAX {
        return Err(Refusal::invalid_param("`algorithm` has 1 to 255 bytes.").into());
    }
    if row.auth_data.len() > AUTH_DATA_BYTES_MAX {
        return Err(Refusal::too_large("`auth_data` has at most 64 KiB.").into());
    }
    // The specification says that it is an object; older clients send text.
    if !row.auth_data.starts_with(['{', '"']) {
        return Err(Refusal::bad_json("`auth_data` must be an object.").into());
    }
    Ok(())
}

/// Makes a version, which becomes the newest one, and answers its number. The caller holds the user's lock. Errors: 400 for an
/// algorithm or data that cannot be, 413 for data that is too large, 403 for too many versions.
pub fn create(batch: &mut Batch, user: UserNum, row: BackupRow, incarnation: u64) -> Result<u64> {
    check_row(&row)?;
    let count =
        schema::BACKUP.prefix::<(UserNum,)>(batch, (user,), Direction::Up)?.take(VERSIONS_MAX).count();
    if count >= VERSIONS_MAX {
        tracing::debug!(%user, count, reason = "too many versions", "a key backup is refused");
        let why = format!("You have {count} versions of your key backup; delete some of them first.");
        return Err(Refusal::forbidden(why).into());
    }
    let last = schema::BACKUP_LAST.get(batch, user)?.unwrap_or_default();
    let version = next_number(last, incarnation);
    schema::BACKUP_LAST.put(batch, user, &version);
    schema::BACKUP.put(batch, (user, version), &Json(row));
    schema::BACKUP_STATE.put(batch, (user, version), &BackupState::default());
    Ok(version)
}

/// Changes the `auth_data` of a version. The caller holds the user's lock. Errors: 404 if there is none, 400 for another
/// algorithm or data that cannot be, 413 for data that is too large.
pub fn update(batch: &mut Batch, user: UserNum, version: &str, row: BackupRow) -> Result<()> {
    let number = require(batch, user, version)?;
    check_row(&row)?;
    let before = schema::BACKUP.get(batch, (user, number))?.map(|Json(row)| row);
    if before.as_ref().is_some_and(|before| before.algorithm != row.algorithm) {
        let why = "`algorithm` must be the one that this version of the backup was made with.";
        return Err(Refusal::invalid_param(why).into());
    }
    if before.as_ref() != Some(&row) {
        schema::BACKUP.put(batch, (user, number), &Json(row));
    }
    Ok(())
}

/// Deletes a version with its keys, or does nothing if that was done before. The caller holds the user's lock. Errors: 404 for a
/// version that there never was.
pub fn delete(batch: &mut Batch, user: UserNum, version: &str) -> Result<()> {
    let last = schema::BACKUP_LAST.get(batch, user)?.unwrap_or_default();
    let version = parse(version).filter(|number| (1..=last).contains(number)).ok_or_else(unknown)?;
    if schema::BACKUP.contains(batch, (user, version))? {
        schema::BACKUP.delete(batch, (user, version));
        schema::BACKUP_STATE.delete(batch, (user, version));
        schema::BACKUP_ROOM.delete_prefix::<(UserNum, u64)>(batch, (user, version));
        schema::BACKUP_KEY.delete_prefix::<(UserNum, u64)>(batch, (user, version));
    }
    Ok(())
}

/// Deletes all that a user has backed up, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::BACKUP.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::BACKUP_STATE.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::BACKUP_ROOM.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::BACKUP_KEY.delete_prefix::<(UserNum,)>(batch, (user,));
    schema::BACKUP_LAST.delete(batch, user);
}

/// Stores the first of these keys, as many as one batch takes, and answers how many that were. A key stays away where a better one
/// is stored already. The caller holds the user's lock, and gives each session once. Errors: 413 if the user's backups would hold
/// too much.
pub fn put_some(
    batch: &mut Batch,
    user: UserNum,
    version: u64,
    uploads: &[Upload],
    incarnation: u64,
) -> Result<usize> {
    put_some_within(batch, user, version, uploads, incarnation, BOUNDS)
}

fn put_some_within(
    batch: &mut Batch,
    user: UserNum,
    version: u64,
    uploads: &[Upload],
    incarnation: u64,
    bounds: BackupShare,
) -> Result<usize> {
    let uploads = first_of(uploads);
    let before = state(batch, user, version)?;
    let known = find_known(batch, user, version, uploads, &before)?;
    let mut rooms = shares_of(batch, user, version, uploads, &before)?;
    let (mut after, mut is_changed) = (before, false);
    for (upload, known) in uploads.iter().zip(known) {
        let Upload { room, session, key } = upload;
        if known.as_ref().is_some_and(|known| !key.is_better_than(known)) {
            continue;
        }
        let share = rooms.entry(room).or_default();
        if let Some(known) = &known {
            let gone = row_bytes(room, session, known);
            share.bytes = share.bytes.saturating_sub(gone);
            after.bytes = after.bytes.saturating_sub(gone);
        } else {
            share.keys += 1;
            after.keys += 1;
        }
        share.bytes += upload.bytes();
        after.bytes += upload.bytes();
        schema::BACKUP_KEY.put(batch, (user, version, room.as_str(), session.as_str()), key);
        is_changed = true;
    }
    if !is_changed {
        return Ok(uploads.len());
    }
    let total = total(batch, user)?;
    let is_more = after.keys > before.keys || after.bytes > before.bytes;
    let keys = (total.keys + after.keys).saturating_sub(before.keys);
    let bytes = (total.bytes + after.bytes).saturating_sub(before.bytes);
    if is_more && (keys > bounds.keys || bytes > bounds.bytes) {
        tracing::debug!(%user, keys, bytes, reason = "quota", "keys are not backed up");
        let why = format!(
            "Your key backups hold at most {} keys and {} bytes in all; delete old versions.",
            bounds.keys, bounds.bytes
        );
        return Err(Refusal::too_large(why).into());
    }
    for (room, share) in rooms {
        schema::BACKUP_ROOM.put(batch, (user, version, room), &share);
    }
    after.etag = next_number(before.etag, incarnation);
    schema::BACKUP_STATE.put(batch, (user, version), &after);
    Ok(uploads.len())
}

/// The first of these keys, as many as one batch takes.
fn first_of(uploads: &[Upload]) -> &[Upload] {
    let (mut count, mut bytes) = (0, 0);
    for upload in uploads.iter().take(KEYS_AT_ONCE) {
        if bytes >= BYTES_AT_ONCE {
            break;
        }
        // The names stand in the key of the row and once more in that of the room.
        bytes += upload.key.session_data.len() + 2 * upload.room.len() + upload.session.len() + 64;
        count += 1;
    }
    uploads.get(..count).unwrap_or_default()
}

/// The keys that are stored for the sessions of these. Nothing is read for a version that is empty.
fn find_known(
    batch: &Batch,
    user: UserNum,
    version: u64,
    uploads: &[Upload],
    state: &BackupState,
) -> Result<Vec<Option<BackedUpKey>>, Fault> {
    if state.keys == 0 {
        return Ok(vec![None; uploads.len()]);
    }
    let keys = uploads.iter().map(|upload| (user, version, upload.room.as_str(), upload.session.as_str()));
    schema::BACKUP_KEY.get_many(batch, keys)
}

/// How much is stored of the rooms of these keys; rooms of which nothing is are left out.
fn shares_of<'u>(
    batch: &Batch,
    user: UserNum,
    version: u64,
    uploads: &'u [Upload],
    state: &BackupState,
) -> Result<BTreeMap<&'u str, BackupShare>, Fault> {
    if state.keys == 0 {
        return Ok(BTreeMap::new());
    }
    let mut rooms: Vec<&str> = uploads.iter().map(|upload| upload.room.as_str()).collect();
    rooms.sort_unstable();
    rooms.dedup();
    let shares = schema::BACKUP_ROOM.get_many(batch, rooms.iter().map(|room| (user, version, *room)))?;
    Ok(rooms.into_iter().zip(shares).filter_map(|(room, share)| Some((room, share?))).collect())
}

/// How much all versions of a user hold together.
fn total(read: &(impl Read + ?Sized), user: UserNum) -> Result<BackupShare, Fault> {
    let mut total = BackupShare::default();
    for row in schema::BACKUP_STATE.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let (_, state) = row?;
        total.keys += state.keys;
        total.bytes += state.bytes;
    }
    Ok(total)
}

/// Deletes keys of a version, and answers how much it holds then. The caller holds the user's lock. No key is read: how many
/// there are is stored beside them.
pub fn delete_keys(
    batch: &mut Batch,
    user: UserNum,
    version: u64,
    which: &Which,
    incarnation: u64,
) -> Result<BackupState, Fault> {
    let mut state = state(batch, user, version)?;
    let gone = match which {
        Which::All => {
            schema::BACKUP_ROOM.delete_prefix::<(UserNum, u64)>(batch, (user, version));
            schema::BACKUP_KEY.delete_prefix::<(UserNum, u64)>(batch, (user, version));
            BackupShare { keys: state.keys, bytes: state.bytes }
        }
        Which::Room(room) => {
            let at = (user, version, room.as_str());
            let share = schema::BACKUP_ROOM.get(batch, at)?.unwrap_or_default();
            schema::BACKUP_ROOM.delete(batch, at);
            schema::BACKUP_KEY.delete_prefix::<(UserNum, u64, String)>(batch, at);
            share
        }
        Which::Session(room, session) => delete_key(batch, user, version, (room.as_str(), session.as_str()))?,
    };
    if gone.keys > 0 {
        state.keys = state.keys.saturating_sub(gone.keys);
        state.bytes = state.bytes.saturating_sub(gone.bytes);
        state.etag = next_number(state.etag, incarnation);
        schema::BACKUP_STATE.put(batch, (user, version), &state);
    }
    Ok(state)
}

/// Deletes the key of a session, and answers how much is gone.
fn delete_key(
    batch: &mut Batch,
    user: UserNum,
    version: u64,
    (room, session): (&str, &str),
) -> Result<BackupShare, Fault> {
    let Some(key) = schema::BACKUP_KEY.get(batch, (user, version, room, session))? else {
        return Ok(BackupShare::default());
    };
    let gone = BackupShare { keys: 1, bytes: row_bytes(room, session, &key) };
    schema::BACKUP_KEY.delete(batch, (user, version, room, session));
    let share = schema::BACKUP_ROOM.get(batch, (user, version, room))?.unwrap_or_default();
    if share.keys <= gone.keys {
        schema::BACKUP_ROOM.delete(batch, (user, version, room));
    } else {
        let left =
            BackupShare { keys: share.keys - gone.keys, bytes: share.bytes.saturating_sub(gone.bytes) };
        schema::BACKUP_ROOM.put(batch, (user, version, room), &left);
    }
    Ok(gone)
}

/// The key of a session.
pub fn find_key(
    read: &(impl Read + ?Sized),
    user: UserNum,
    version: u64,
    (room, session): (&str, &str),
) -> Result<Option<BackedUpKey>, Fault> {
    schema::BACKUP_KEY.get(read, (user, version, room, session))
}

/// A part of the keys of a version, in the order of their rooms and sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The keys, each with its room and its session.
    pub keys: Vec<Upload>,
    /// Whether there are more after these.
    pub has_more: bool,
}

/// Lists the keys of a version, or of one of its rooms, until they have this many bytes; only those after a session of a room, if one
/// is given.
pub fn list_keys(
    read: &(impl Read + ?Sized),
    user: UserNum,
    version: u64,
    only: Option<&str>,
    after: Option<(&str, &str)>,
    bytes_max: usize,
) -> Result<Page, Fault> {
    let low = match after {
        Some((room, session)) => Bound::Excluded((user, version, room, session)),
        None => Bound::Included((user, version, only.unwrap_or_default(), "")),
    };
    // The version ends here; the end of the room is seen below.
    let high = Bound::Excluded((user, version.saturating_add(1), "", ""));
    let rows = schema::BACKUP_KEY.range::<(UserNum, u64, String, String)>(read, low, high, Direction::Up)?;
    let (mut page, mut bytes) = (Page { keys: Vec::new(), has_more: false }, 0);
    for row in rows {
        let ((_, _, room, session), key) = row?;
        if only.is_some_and(|only| room != only) {
            break;
        }
        if bytes >= bytes_max {
            page.has_more = true;
            break;
        }
        bytes += room.len() + session.len() + key.session_data.len();
        page.keys.push(Upload { room, session, key });
    }
    Ok(page)
}

/// Refuses the name of a room or a session, or the data of a key, that cannot be: 400; or that is too large: 413.
pub fn check_upload(room: &str, session: &str, session_data: &Bytes) -> Result<()> {
    check_names(room, Some(session))?;
    if session_data.len() > SESSION_DATA_BYTES_MAX {
        return Err(Refusal::too_large("The `session_data` of a key has at most 64 KiB.").into());
    }
    // The specification says that it is an object; older clients send text.
    if !session_data.starts_with(b"{") && !session_data.starts_with(b"\"") {
        return Err(Refusal::bad_json("The `session_data` of a key must be an object.").into());
    }
    Ok(())
}

/// Refuses the name of a room or a session that cannot be: 400 `M_INVALID_PARAM`.
pub fn check_names(room: &str, session: Option<&str>) -> Result<()> {
    if !room.starts_with('!') || room.len() > NAME_BYTES_MAX {
        return Err(
            Refusal::invalid_param("The id of a room begins with `!` and has at most 255 bytes.").into()
        );
    }
    if session.is_some_and(|session| session.is_empty() || session.len() > NAME_BYTES_MAX) {
        return Err(Refusal::invalid_param("The id of a session has 1 to 255 bytes.").into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
