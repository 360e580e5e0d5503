//! Finds what changed for one user between two positions: in one pass over the log, or, when much happened in between,
//! by asking each of the user's rooms when it changed last. Rooms of others are never read.

use std::{collections::BTreeSet, ops::Bound};

use crate::{
    ids::{Position, RoomNum, UserNum},
    rooms::{members, receipts},
    schema,
    schema::rooms::{Membership, Place, UserRoomRow},
    store::{Direction, Fault, LogEntry, Read, tables, tail},
    sync::shares::Shares,
};

/// Walk at most this many positions of the log; beyond that, asking each of the user's rooms costs less.
const WALK_MAX: u64 = 2_000;

/// The places in which something changed for one user, so that nothing else need be read.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// The rooms in which something changed, of those that the user is or was in, was invited to or knocked at.
    pub(crate) rooms: Vec<(RoomNum, UserRoomRow)>,
    /// The user's account data changed, or their push rules.
    pub(crate) account_data: bool,
    /// Messages were sent to devices of the user.
    pub(crate) to_device: bool,
    /// The keys of some user changed, of this server or another.
    pub(crate) device_lists: bool,
    /// Something of the user's own devices and keys changed, of which others may not be told.
    pub(crate) own_keys: bool,
    /// The users who came to share a room with the user, and those who ceased to; filled while rooms are collected.
    pub(crate) shares: Shares,
}

impl Changes {
    /// Names everything there is, for a client that begins.
    pub(crate) fn everything(read: &(impl Read + ?Sized), user: UserNum) -> Result<Self, Fault> {
        let rooms = members::list_user_rooms(read, user)?.collect::<Result<_, _>>()?;
        Ok(Self::all_of(rooms))
    }

    /// All kinds of news may be there, beside the changes in these rooms.
    fn all_of(rooms: Vec<(RoomNum, UserRoomRow)>) -> Self {
        let shares = Shares::default();
        Self { rooms, account_data: true, to_device: true, device_lists: true, own_keys: true, shares }
    }

    /// Finds the changes after `from` and at or before `upto`. `also` are rooms with news that the log does not hold.
    pub(crate) fn find(
        read: &(impl Read + ?Sized),
        (user, user_id): (UserNum, &str),
        from: Position,
        upto: Position,
        also: &BTreeSet<RoomNum>,
    ) -> Result<Self, Fault> {
        let is_short = upto.number().saturating_sub(from.number()) <= WALK_MAX;
        // Below this position the log has gaps: entries that nobody else needs were deleted.
        if is_short && from >= tail::trimmed(read)? {
            Self::walk_log(read, user, from, upto, also)
        } else {
            Self::ask_rooms(read, (user, user_id), from, also)
        }
    }

    fn walk_log(
        read: &(impl Read + ?Sized),
        user: UserNum,
        from: Position,
        upto: Position,
        also: &BTreeSet<RoomNum>,
    ) -> Result<Self, Fault> {
        let mut found = Self::default();
        let mut changed = also.clone();
        if from < upto {
            let (low, high) = (Bound::Excluded(from), Bound::Included(upto));
            for row in tables::LOG.range::<Position>(read, low, high, Direction::Up)? {
                match row?.1 {
                    LogEntry::Event { room, .. }
                    | LogEntry::RoomState { room }
                    | LogEntry::Receipts { room } => {
                        changed.insert(room);
                    }
                    LogEntry::AccountData { user: of } => found.account_data |= of == user,
                    LogEntry::ToDevice { user: of } => found.to_device |= of == user,
                    LogEntry::DeviceList { .. } | LogEntry::OtherDeviceList => found.device_lists = true,
                    LogEntry::Device { user: of } => found.own_keys |= of == user,
                    // `/sync` tells nothing of these entries.
                    LogEntry::Account { .. }
                    | LogEntry::Server
                    | LogEntry::Filled { .. }
                    | LogEntry::Expired { .. } => {}
                }
            }
        }
        if !changed.is_empty() {
            let rows = members::find_many(read, user, changed.iter().copied())?;
            let rooms = changed.into_iter().zip(rows).filter_map(|(room, row)| Some((room, row?)));
            found.rooms = rooms.collect();
        }
        Ok(found)
    }

    fn ask_rooms(
        read: &(impl Read + ?Sized),
        (user, user_id): (UserNum, &str),
        from: Position,
        also: &BTreeSet<RoomNum>,
    ) -> Result<Self, Fault> {
        let mut rooms = Vec::new();
        for room in members::list_user_rooms(read, user)? {
            let (room, row) = room?;
            let is_news = row.since > from
                || also.contains(&room)
                || match row.membership {
                    Membership::Join => changed_since(read, room, user_id, from)?,
                    // A second invitation is news, though the membership stays the same.
                    _ => matches!(
                        schema::PLACE.get(read, (room, row.event))?,
                        Some(Place::Timeline(order)) if order.anchor > from
                    ),
                };
            if is_news {
                rooms.push((room, row));
            }
        }
        Ok(Self::all_of(rooms))
    }
}

fn changed_since(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user_id: &str,
    from: Position,
) -> Result<bool, Fault> {
    let Some(row) = schema::ROOM.get(read, room)? else { return Ok(false) };
    let is_filled = row.filled_at.is_some_and(|position| position > from);
    if row.tip.anchor > from || row.state_tip.anchor > from || is_filled {
        return Ok(true);
    }
    receipts::any_new(read, room, user_id, from)
}
