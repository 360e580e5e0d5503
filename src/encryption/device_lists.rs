//! The log of users whose devices or keys changed, from which `device_lists` of `/sync` and `/keys/changes` answer.

use std::ops::Bound;

use ruma::{OwnedUserId, UserId};

use crate::{
    ids::{Position, UserNum},
    schema,
    store::{Batch, Direction, Fault, LogEntry, Read},
};

/// Notes that the devices or keys of this local user changed. The caller holds the user's lock.
pub fn changed(batch: &mut Batch, user: UserNum, user_id: &UserId) -> Result<Position, Fault> {
    note(batch, user_id, &LogEntry::DeviceList { user })
}

/// Notes that the devices or keys of this user of another server changed. The caller holds the lock that stands for the user.
pub fn changed_elsewhere(batch: &mut Batch, user_id: &UserId) -> Result<Position, Fault> {
    note(batch, user_id, &LogEntry::OtherDeviceList)
}

fn note(batch: &mut Batch, user_id: &UserId, entry: &LogEntry) -> Result<Position, Fault> {
    if let Some(before) = schema::DEVICE_CHANGED.get(batch, user_id.as_str())? {
        schema::DEVICE_LOG.delete(batch, before);
    }
    let position = batch.position(entry);
    schema::DEVICE_CHANGED.put(batch, user_id.as_str(), &position);
    schema::DEVICE_LOG.put(batch, position, &user_id.as_str().to_owned());
    Ok(position)
}

/// The position at which the devices or keys of this user last changed, as far as we know.
pub fn find_changed(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<Option<Position>, Fault> {
    schema::DEVICE_CHANGED.get(read, user_id.as_str())
}

/// Lists the users whose devices or keys changed in (after, upto], on the whole server, the oldest change first. Each user
/// comes once, at the last change. Rows are read only as far as the caller walks.
pub fn list_changes(
    read: &(impl Read + ?Sized),
    after: Position,
    upto: Position,
) -> Result<impl Iterator<Item = Result<(Position, OwnedUserId), Fault>> + '_, Fault> {
    let rows = schema::DEVICE_LOG.range::<Position>(
        read,
        Bound::Excluded(after),
        Bound::Included(upto),
        Direction::Up,
    )?;
    Ok(rows.filter_map(move |row| {
        let (position, user_id) = match row {
            Ok(row) => row,
            Err(fault) => return Some(Err(fault)),
        };
        match schema::DEVICE_CHANGED.get(read, &user_id) {
            // A log entry counts only while the row still has its position; a later change has an entry of its own.
            Ok(now) if now != Some(position) => None,
            Ok(_) => match UserId::parse(user_id) {
                Ok(user_id) => Some(Ok((position, user_id))),
                Err(_) => Some(Err(Fault::Corrupt("a device list belongs to no user id"))),
            },
            Err(fault) => Some(Err(fault)),
        }
    }))
}
