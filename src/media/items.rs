//! Items: their rows, what refers to their blobs, and how much each user has.

use std::{ops::Bound, time::Duration};

use ruma::api::error::ErrorKind;

use crate::{
    error::{Refusal, Result, limit_exceeded},
    ids::UserNum,
    media::{
        Name,
        objects::{self, ObjectName, Reference},
    },
    schema::{
        self,
        jobs::Job,
        media::{ContentRow, ItemRow, ThumbnailRow, UsedRow},
    },
    store::{Batch, Direction, Fault, Note, Read, Write, key::Json, timer},
};

/// Each item counts as at least this many bytes.
const CHARGED_BYTES_MIN: u64 = 4 << 10;
/// When an item was last given to somebody is noted this many milliseconds apart, because each note is a write.
const SEEN_APART_MS: u64 = 60 * 60 * 1000;
/// A user with too many URIs without an upload is told to try again after this time.
const CREATED_RETRY: Duration = Duration::from_secs(60);
/// Thumbnails are kept of an item while all of it are at most this many times as large as the item, and half of that for unusual ones.
const THUMBNAILS_TIMES_MAX: u64 = 8;
/// The thumbnails of an item may have so many bytes besides, and half of that where one is unusual.
const THUMBNAILS_BYTES_BESIDES: u64 = 1 << 20;

/// The kind under which the file of an item refers to its blob that was uploaded, where the item has a smaller one. No thumbnail is
/// called so.
pub const ORIGINAL: &str = "original";

/// Finds an item, whatever its state is.
pub fn find(read: &(impl Read + ?Sized), name: &Name) -> Result<Option<ItemRow>, Fault> {
    Ok(schema::MEDIA_ITEM.get(read, name.key())?.map(|Json(row)| row))
}

/// The bytes that an item counts for: a file takes room on the disk, and rows, however small it is.
pub(super) fn charged(bytes: u64) -> u64 {
    bytes.max(CHARGED_BYTES_MIN)
}

/// How much media a user has.
pub fn used(read: &(impl Read + ?Sized), user: UserNum) -> Result<UsedRow, Fault> {
    Ok(schema::MEDIA_USED.get(read, user)?.map(|Json(row)| row).unwrap_or_default())
}

/// Finds the file as it was uploaded, of an item that has a smaller one.
pub fn find_original(read: &(impl Read + ?Sized), name: &Name) -> Result<Option<ContentRow>, Fault> {
    Ok(schema::MEDIA_ORIGINAL.get(read, name.key())?.map(|Json(row)| row))
}

/// When an item was last given to somebody, in milliseconds since the epoch, give or take an hour.
pub fn find_seen(read: &(impl Read + ?Sized), name: &Name) -> Result<Option<u64>, Fault> {
    schema::MEDIA_SEEN.get(read, name.key())
}

/// Whether it is time to note that an item was given to somebody.
pub fn is_seen_due(read: &(impl Read + ?Sized), name: &Name, now_ms: u64) -> Result<bool, Fault> {
    let seen = find_seen(read, name)?;
    Ok(seen.is_none_or(|seen| seen > now_ms || now_ms.saturating_sub(seen) >= SEEN_APART_MS))
}

/// Notes that an item was given to somebody.
pub fn note_seen(note: &mut Note, name: &Name, now_ms: u64) {
    schema::MEDIA_SEEN.put(note, name.key(), &now_ms);
}

/// The bounds of one user's media. What is 0 is not bounded.
#[derive(Clone, Copy, Debug)]
pub struct UserBounds {
    /// The number of bytes of all items of the user.
    pub bytes_max: u64,
    /// The number of URIs to which nobody has uploaded anything yet.
    pub created_max: u64,
}

/// Makes the URI of an item to which its user will upload something, until it expires. The caller holds the user's lock and the
/// server's. Errors: 429 `M_LIMIT_EXCEEDED` for a user with too many such URIs.
pub fn create(
    batch: &mut Batch,
    user: UserNum,
    name: &Name,
    (now_ms, expires_ms): (u64, u64),
    bounds: UserBounds,
) -> Result<()> {
    let used = used(batch, user)?;
    if used.created >= bounds.created_max {
        tracing::debug!(%user, reason = "too many uploads are pending", "a URI of media is refused");
        let why = "You have as many URIs without an upload as you may have; upload something to them first.";
        return Err(Refusal::new(limit_exceeded(CREATED_RETRY), why).into());
    }
    schema::MEDIA_ITEM.expect_absent(batch, name.key());
    let row = ItemRow {
        at_ms: now_ms,
        by: Some(user),
        content: None,
        expires_ms: Some(expires_ms),
        is_preview: false,
        is_open: false,
        is_quarantined: false,
        is_protected: false,
    };
    put_own(batch, user, name, &row);
    let job = Job::EndUnused { user, id: name.id.clone() };
    timer::set(batch, &job.timer(expires_ms));
    schema::MEDIA_USED.put(batch, user, &Json(UsedRow { created: used.created.saturating_add(1), ..used }));
    Ok(())
}

/// Requires that a user may upload to a URI of an item. Errors: 404 `M_NOT_FOUND` for a URI that nobody made or that has expired, 403
/// `M_FORBIDDEN` for another user's, 409 `M_CANNOT_OVERWRITE_MEDIA` for one that has bytes.
pub fn require_created(
    read: &(impl Read + ?Sized),
    user: UserNum,
    name: &Name,
    now_ms: u64,
) -> Result<ItemRow> {
    let Some(row) = find(read, name)? else { return Err(no_such_item().into()) };
    if row.by != Some(user) {
        return Err(Refusal::forbidden("You have not made this URI, so that you cannot upload to it.").into());
    }
    if row.content.is_some() {
        let why = "Something was uploaded to this URI already.";
        return Err(Refusal::new(ErrorKind::CannotOverwriteMedia, why).into());
    }
    if row.expires_ms.is_some_and(|expires_ms| expires_ms <= now_ms) {
        return Err(no_such_item().into());
    }
    Ok(row)
}

/// Refuses what nobody has uploaded, or nobody is given: 404 `M_NOT_FOUND`.
pub fn no_such_item() -> Refusal {
    Refusal::not_found("There is no such media.")
}

/// Refuses a URI to which nothing was uploaded: 504 `M_NOT_YET_UPLOADED`.
pub fn not_yet_uploaded() -> Refusal {
    Refusal::new(ErrorKind::NotYetUploaded, "Nothing was uploaded to this URI yet.")
}

/// Requires that a user has room for so many bytes more. Errors: 403 `M_FORBIDDEN`.
pub fn require_room(used_bytes: u64, bytes: u64, bounds: UserBounds) -> Result<()> {
    if bounds.bytes_max > 0 && used_bytes.saturating_add(bytes) > bounds.bytes_max {
        tracing::debug!(bytes, reason = "quota of the user", "an upload is refused");
        let why = format!(
            "You have {used_bytes} bytes of media, and may have {} on this server; {bytes} more are too much.",
            bounds.bytes_max
        );
        return Err(Refusal::forbidden(why).into());
    }
    Ok(())
}

/// Keeps what a user of ours has uploaded, whose object is where it belongs. `created` is the row of the URI, if it was made before.
/// Answers `false`, and writes nothing, where the object is being removed meanwhile. The caller holds the user's lock and the server's.
/// Errors: 403 `M_FORBIDDEN` where the user has too much.
pub fn keep_own(
    batch: &mut Batch,
    user: UserNum,
    (name, created): (&Name, Option<ItemRow>),
    (content, object): (ContentRow, ObjectName),
    (now_ms, is_open): (u64, bool),
    bounds: UserBounds,
) -> Result<bool> {
    let used = used(batch, user)?;
    let charged = charged(content.bytes);
    require_room(used.bytes, charged, bounds)?;
    if !objects::refer(batch, object, Reference { name, thumbnail: "" })? {
        return Ok(false);
    }
    let mut after =
        UsedRow { items: used.items.saturating_add(1), bytes: used.bytes.saturating_add(charged), ..used };
    let mut at_ms = now_ms;
    match created {
        Some(created) => {
            after.created = after.created.saturating_sub(1);
            at_ms = created.at_ms;
            if let Some(expires_ms) = created.expires_ms {
                let job = Job::EndUnused { user, id: name.id.clone() };
                timer::cancel(batch, &job.timer(expires_ms));
            }
        }
        None => schema::MEDIA_ITEM.expect_absent(batch, name.key()),
    }
    let is_quarantined = objects::is_quarantined(batch, &content.digest)?;
    let row = ItemRow {
        at_ms,
        by: Some(user),
        content: Some(content),
        expires_ms: None,
        is_preview: false,
        is_open,
        is_quarantined,
        is_protected: false,
    };
    put_own(batch, user, name, &row);
    schema::MEDIA_USED.put(batch, user, &Json(after));
    Ok(true)
}

/// Keeps the file that a user of ours has uploaded beside the smaller one that the item has. It counts for the user's quota. Answers
/// `false`, and writes nothing, where the user has no room for both, or the object is being removed meanwhile. The caller holds the
/// user's lock and the server's.
pub fn keep_original(
    batch: &mut Batch,
    user: UserNum,
    name: &Name,
    (content, object): (ContentRow, ObjectName),
    bounds: UserBounds,
) -> Result<bool, Fault> {
    let used = used(batch, user)?;
    let bytes = used.bytes.saturating_add(content.bytes);
    if (bounds.bytes_max > 0 && bytes > bounds.bytes_max)
        || !objects::refer(batch, object, Reference { name, thumbnail: ORIGINAL })?
    {
        return Ok(false);
    }
    schema::MEDIA_ORIGINAL.put(batch, name.key(), &Json(content));
    schema::MEDIA_USED.put(batch, user, &Json(UsedRow { bytes, ..used }));
    Ok(true)
}

/// The outcome of keeping an item that no user of ours has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It refers to the object.
    New,
    /// An item of this name was kept meanwhile, and nothing is written.
    Before,
    /// The object is being removed, and nothing is written.
    Overtaken,
}

/// Keeps an item of another server, whose object is where it belongs, unless it was kept meanwhile. The caller holds the server's lock.
pub fn keep_other(
    batch: &mut Batch,
    name: &Name,
    content: (ContentRow, ObjectName),
    at: (u64, bool),
) -> Result<Kept> {
    keep_of_nobody(batch, name, content, at, false)
}

/// Keeps the image of a preview, as [`keep_other`] keeps an item of another server.
pub fn keep_preview(
    batch: &mut Batch,
    name: &Name,
    content: (ContentRow, ObjectName),
    at: (u64, bool),
) -> Result<Kept> {
    keep_of_nobody(batch, name, content, at, true)
}

fn keep_of_nobody(
    batch: &mut Batch,
    name: &Name,
    (content, object): (ContentRow, ObjectName),
    (now_ms, is_open): (u64, bool),
    is_preview: bool,
) -> Result<Kept> {
    if find(batch, name)?.is_some() {
        return Ok(Kept::Before);
    }
    if !objects::refer(batch, object, Reference { name, thumbnail: "" })? {
        return Ok(Kept::Overtaken);
    }
    let is_quarantined = objects::is_quarantined(batch, &content.digest)?;
    let row = ItemRow {
        at_ms: now_ms,
        by: None,
        content: Some(content),
        expires_ms: None,
        is_preview,
        is_open,
        is_quarantined,
        is_protected: false,
    };
    schema::MEDIA_ITEM.put(batch, name.key(), &Json(row));
    Ok(Kept::New)
}

fn put_own(batch: &mut Batch, user: UserNum, name: &Name, row: &ItemRow) {
    schema::MEDIA_ITEM.put(batch, name.key(), &Json(row.clone()));
    schema::MEDIA_OF_USER.put(batch, (user, row.at_ms, &name.id), &());
}

/// The outcome of deleting an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// It is deleted, with so many bytes.
    Gone(u64),
    /// There is no such item, or it is another user's.
    NoItem,
    /// It is protected, so that it stays.
    Protected,
}

/// Deletes an item with its thumbnails, unless it is protected. The caller holds the lock of `by`, if it is an item of a user of ours, and
/// the server's.
pub fn delete(batch: &mut Batch, name: &Name, by: Option<UserNum>, now_ms: u64) -> Result<Deleted, Fault> {
    let Some(row) = find(batch, name)?.filter(|row| row.by == by) else { return Ok(Deleted::NoItem) };
    if row.is_protected {
        return Ok(Deleted::Protected);
    }
    for (kind, thumbnail) in list_thumbnails(batch, name)? {
        schema::MEDIA_THUMBNAIL.delete(batch, (&name.server, &name.id, &kind));
        objects::release(batch, &thumbnail.digest, Reference { name, thumbnail: &kind }, now_ms)?;
    }
    let mut bytes = row.content.as_ref().map(|content| content.bytes);
    let mut taken = bytes.map_or(0, charged);
    if let Some(content) = &row.content {
        objects::release(batch, &content.digest, Reference { name, thumbnail: "" }, now_ms)?;
    }
    if let Some(original) = find_original(batch, name)? {
        schema::MEDIA_ORIGINAL.delete(batch, name.key());
        objects::release(batch, &original.digest, Reference { name, thumbnail: ORIGINAL }, now_ms)?;
        bytes = bytes.map(|bytes| bytes.saturating_add(original.bytes));
        taken = taken.saturating_add(original.bytes);
    }
    schema::MEDIA_ITEM.delete(batch, name.key());
    schema::MEDIA_SEEN.delete(batch, name.key());
    if let Some(user) = by {
        schema::MEDIA_OF_USER.delete(batch, (user, row.at_ms, &name.id));
        let mut used = used(batch, user)?;
        match bytes {
            Some(_) => {
                used.items = used.items.saturating_sub(1);
                used.bytes = used.bytes.saturating_sub(taken);
            }
            None => used.created = used.created.saturating_sub(1),
        }
        if let Some(expires_ms) = row.expires_ms {
            timer::cancel(batch, &Job::EndUnused { user, id: name.id.clone() }.timer(expires_ms));
        }
        schema::MEDIA_USED.put(batch, user, &Json(used));
    }
    Ok(Deleted::Gone(bytes.unwrap_or_default()))
}

/// The content of an item, if it has some that is given to anybody. All who give files, send somebody to them or make links to them ask here.
pub fn given(row: &ItemRow) -> Option<&ContentRow> {
    row.content.as_ref().filter(|_| !row.is_quarantined)
}

/// The outcome of a mark that an operator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marked {
    /// It is set as was asked.
    Set,
    /// There is no such item, or nobody has uploaded anything to it.
    NoItem,
    /// The item is protected, so that it cannot be quarantined.
    Protected,
}

/// A mark that an operator sets on an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Says whether an item is given to nobody, and with it whatever comes with the same bytes later.
    Quarantined {
        /// Whether it is given to nobody from now on.
        is: bool,
        /// Whether the bytes are meant, too.
        with_bytes: bool,
    },
    /// Whether it outlives what would delete it otherwise.
    Protected(bool),
}

/// Sets a mark on an item. The caller holds the server's lock.
pub fn mark(batch: &mut Batch, name: &Name, mark: Mark) -> Result<Marked, Fault> {
    let Some(mut row) = find(batch, name)?.filter(|row| row.content.is_some()) else {
        return Ok(Marked::NoItem);
    };
    match mark {
        Mark::Quarantined { is: true, .. } if row.is_protected => return Ok(Marked::Protected),
        Mark::Quarantined { is, with_bytes } => {
            row.is_quarantined = is;
            // The same bytes that come again under another name get around nothing.
            if let Some(content) = row.content.as_ref().filter(|_| with_bytes) {
                objects::quarantine(batch, &content.digest, is)?;
                if let Some(original) = find_original(batch, name)? {
                    objects::quarantine(batch, &original.digest, is)?;
                }
            }
        }
        Mark::Protected(is) => row.is_protected = is,
    }
    schema::MEDIA_ITEM.put(batch, name.key(), &Json(row));
    Ok(Marked::Set)
}

/// Finds a thumbnail that was made of an item.
pub fn find_thumbnail(
    read: &(impl Read + ?Sized),
    name: &Name,
    kind: &str,
) -> Result<Option<ThumbnailRow>, Fault> {
    Ok(schema::MEDIA_THUMBNAIL.get(read, (&name.server, &name.id, kind))?.map(|Json(row)| row))
}

/// Lists the thumbnails of an item, each with its kind.
pub fn list_thumbnails(
    read: &(impl Read + ?Sized),
    name: &Name,
) -> Result<Vec<(String, ThumbnailRow)>, Fault> {
    let rows = schema::MEDIA_THUMBNAIL.prefix::<(String, String)>(read, name.key(), Direction::Up)?;
    rows.map(|row| row.map(|((_, _, kind), Json(row))| (kind, row))).collect()
}

/// Whether an item has room for one more thumbnail of so many bytes. Those who ask for them choose which there are, and nobody has them
/// among their own bytes; so unusual ones leave room for those that most clients ask for.
pub fn has_room_for_thumbnail(
    read: &(impl Read + ?Sized),
    name: &Name,
    (bytes, is_usual): (u64, bool),
) -> Result<bool, Fault> {
    let item = find(read, name)?.and_then(|item| item.content).map_or(0, |content| content.bytes);
    let bytes_max = item.saturating_mul(THUMBNAILS_TIMES_MAX).saturating_add(THUMBNAILS_BYTES_BESIDES);
    let bytes_max = if is_usual { bytes_max } else { bytes_max / 2 };
    let kept = list_thumbnails(read, name)?;
    let kept = kept.iter().fold(bytes, |sum, (_, thumbnail)| sum.saturating_add(thumbnail.bytes));
    Ok(kept <= bytes_max)
}

/// Keeps a thumbnail of an item, whose object is where it belongs. Answers `false`, and writes nothing, where the object is being removed
/// meanwhile, or the item is gone. The caller holds the server's lock.
pub fn keep_thumbnail(
    batch: &mut Batch,
    (name, kind): (&Name, &str),
    (row, object): (&ThumbnailRow, ObjectName),
    now_ms: u64,
) -> Result<bool, Fault> {
    if find(batch, name)?.is_none_or(|item| item.content.is_none())
        || !objects::refer(batch, object, Reference { name, thumbnail: kind })?
    {
        return Ok(false);
    }
    if let Some(before) = find_thumbnail(batch, name, kind)?.filter(|before| before.digest != row.digest) {
        objects::release(batch, &before.digest, Reference { name, thumbnail: kind }, now_ms)?;
    }
    schema::MEDIA_THUMBNAIL.put(batch, (&name.server, &name.id, kind), &Json(row.clone()));
    Ok(true)
}

/// Lists items in the order of their names, after one, at most so many.
pub fn list_after(
    read: &(impl Read + ?Sized),
    after: Option<&Name>,
    items_max: usize,
) -> Result<Vec<(Name, ItemRow)>, Fault> {
    let low = after.map_or(Bound::Unbounded, |name| Bound::Excluded(name.key()));
    let rows = schema::MEDIA_ITEM.range::<(String, String)>(read, low, Bound::Unbounded, Direction::Up)?;
    rows.take(items_max).map(|row| row.map(|((server, id), Json(row))| (Name { server, id }, row))).collect()
}

/// Lists media ids of a user that may be deleted, the oldest first, at most so many.
pub fn list_unprotected_of_user(
    read: &(impl Read + ?Sized),
    server: &str,
    user: UserNum,
    items_max: usize,
) -> Result<Vec<Name>, Fault> {
    let mut found = Vec::new();
    for row in schema::MEDIA_OF_USER.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let ((_, _, id), ()) = row?;
        let name = Name { server: server.to_owned(), id };
        if !find(read, &name)?.is_some_and(|row| row.is_protected) {
            found.push(name);
        }
        if found.len() == items_max {
            break;
        }
    }
    Ok(found)
}

/// Lists the media ids of a user that were made before a time, the oldest first, at most so many.
pub fn list_of_user(
    read: &(impl Read + ?Sized),
    user: UserNum,
    before_ms: u64,
    items_max: usize,
) -> Result<Vec<String>, Fault> {
    let (low, high) = (Bound::Included((user, 0)), Bound::Excluded((user, before_ms)));
    let rows = schema::MEDIA_OF_USER.range::<(UserNum, u64)>(read, low, high, Direction::Up)?;
    rows.take(items_max).map(|row| row.map(|((_, _, id), ())| id)).collect()
}

/// Forgets when an item was last given to somebody.
pub fn forget_seen(to: &mut impl Write, name: &Name) {
    schema::MEDIA_SEEN.delete(to, name.key());
}
