//! Members: who is in a room, and in which rooms one of our users is.

mod servers;
mod sharing;

use std::ops::Bound;

use ruma::{OwnedUserId, UserId};

use crate::{
    accounts,
    ids::{EventNum, Order, RoomNum, StateKeyNum, UserNum},
    rooms::{
        event::{self, StoredEvent},
        state,
    },
    schema,
    schema::{
        event_types::MEMBER,
        rooms::{Membership, UserRoomRow},
    },
    store::{Batch, Direction, Fault, Read},
};

pub(crate) use servers::{Tally, Touched, are_counted, is_derived};
pub use servers::{count_joined_at, list_servers_at, was_server_joined};
pub(crate) use sharing::{find_joined, find_sharing};

/// The lowest string above the type of member events, where their keys end.
const ABOVE_MEMBER: &str = "m.room.member\u{0}";

/// Writes the rows of a user whose membership in the current state is now this, by this event, since this order. Gives
/// the user, if it is one of ours.
pub(crate) fn track(
    batch: &mut Batch,
    room: RoomNum,
    user_id: &str,
    membership: Membership,
    event: EventNum,
    order: Order,
) -> Result<Option<UserNum>, Fault> {
    let Ok(user_id) = <&UserId>::try_from(user_id) else { return Ok(None) };
    let Some(user) = accounts::users::find_num(batch, user_id)? else { return Ok(None) };
    let known = schema::USER_ROOM.get(batch, (user, room))?;
    let since = known.filter(|row| row.membership == membership).map_or(order.anchor, |row| row.since);
    let left = match known {
        // A user who is invited to a room that they have forgotten is as new to it as anybody else.
        Some(known) if known.forgotten => None,
        _ if membership == Membership::Join => None,
        Some(known) if known.membership == Membership::Join => Some(order),
        known => known.and_then(|known| known.left),
    };
    let row = UserRoomRow { membership, since, event, forgotten: false, left };
    schema::USER_ROOM.put(batch, (user, room), &row);
    match membership {
        Membership::Join | Membership::Invite | Membership::Knock => {
            schema::ROOM_USER.put(batch, (room, user), &membership);
        }
        Membership::Leave | Membership::Ban => schema::ROOM_USER.delete(batch, (room, user)),
    }
    Ok(Some(user))
}

/// Takes the row of a user back out of a batch, for a room that the user had nothing to do with before.
pub(super) fn take_back(
    batch: &mut Batch,
    user: UserNum,
    room: RoomNum,
) -> Result<Option<UserRoomRow>, Fault> {
    let row = schema::USER_ROOM.get(&*batch, (user, room))?;
    if row.is_some() {
        schema::USER_ROOM.delete(batch, (user, room));
    }
    Ok(row)
}

/// Puts back the row that [`take_back`] took, unless the batch has a newer one.
pub(super) fn put_back(batch: &mut Batch, user: UserNum, room: RoomNum, row: &UserRoomRow) {
    if matches!(schema::USER_ROOM.get(&*batch, (user, room)), Ok(None)) {
        schema::USER_ROOM.put(batch, (user, room), row);
    }
}

/// Deletes the rows of members that are kept by room, for a room that was never finished.
pub(super) fn clear(batch: &mut Batch, room: RoomNum) {
    schema::ROOM_USER.delete_prefix::<(RoomNum,)>(batch, (room,));
    servers::clear(batch, room);
}

/// Notes that the user wants to hear no more of a room that they left.
pub(crate) fn forget(batch: &mut Batch, user: UserNum, room: RoomNum, row: &UserRoomRow) {
    schema::USER_ROOM.put(batch, (user, room), &UserRoomRow { forgotten: true, ..*row });
}

/// Finds the row that says what one of our users is to a room.
pub fn find(read: &(impl Read + ?Sized), user: UserNum, room: RoomNum) -> Result<Option<UserRoomRow>, Fault> {
    schema::USER_ROOM.get(read, (user, room))
}

/// Whether one of our users is in a room.
pub fn is_joined(read: &(impl Read + ?Sized), user: UserNum, room: RoomNum) -> Result<bool, Fault> {
    Ok(find(read, user, room)?.is_some_and(|row| row.membership == Membership::Join))
}

/// Lists the rooms that a user has a membership of, with the membership and since when; rooms that they have forgotten
/// are among them.
pub fn list_user_rooms<'r>(
    read: &'r (impl Read + ?Sized),
    user: UserNum,
) -> Result<impl Iterator<Item = Result<(RoomNum, UserRoomRow), Fault>> + 'r, Fault> {
    let rows = schema::USER_ROOM.prefix::<(UserNum,)>(read, (user,), Direction::Up)?;
    Ok(rows.map(|row| row.map(|((_, room), row)| (room, row))))
}

/// Lists the rooms that a user is joined to.
pub fn list_joined_rooms(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<RoomNum>, Fault> {
    let joined = list_user_rooms(read, user)?
        .filter(|row| row.as_ref().map_or(true, |(_, row)| row.membership == Membership::Join));
    joined.map(|row| row.map(|(room, _)| room)).collect()
}

/// Lists our users who are joined, invited or knocking, rising.
pub fn list_local_users(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Vec<UserNum>, Fault> {
    let rows = schema::ROOM_USER.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    rows.map(|row| row.map(|((_, user), _)| user)).collect()
}

/// Lists our users who are joined to a room, rising.
pub fn list_joined_local_users(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Vec<UserNum>, Fault> {
    let rows = schema::ROOM_USER.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    rows.filter(|row| row.as_ref().map_or(true, |(_, membership)| *membership == Membership::Join))
        .map(|row| row.map(|((_, user), _)| user))
        .collect()
}

/// Reads our users who are joined to a room one by one, rising, for a caller that needs only the first few.
pub fn joined_local_users<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<UserNum, Fault>> + 'r, Fault> {
    let rows = schema::ROOM_USER.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    Ok(rows.filter_map(|row| match row {
        Ok(((_, user), Membership::Join)) => Some(Ok(user)),
        Ok(_) => None,
        Err(fault) => Some(Err(fault)),
    }))
}

/// Lists some of our users who are joined or invited to a room: the first by their numbers.
pub fn list_present_local_users(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    count: usize,
) -> Result<Vec<UserNum>, Fault> {
    let rows = schema::ROOM_USER.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let present =
        rows.filter(|row| row.as_ref().map_or(true, |(_, membership)| *membership != Membership::Knock));
    present.take(count).map(|row| row.map(|((_, user), _)| user)).collect()
}

/// Lists the numbers of all member keys of a room, with the user ids, rising by user id.
pub fn list_keys<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<(OwnedUserId, StateKeyNum), Fault>> + 'r, Fault> {
    let bound = Bound::Included((room, "m.room.member"));
    let rows = schema::STATE_KEY_NUM.range::<(RoomNum, String)>(read, bound, bound, Direction::Up)?;
    Ok(rows.filter_map(|row| match row {
        // In old rooms a member event may have any state key; one that is no user id concerns nobody.
        Ok(((_, _, user), key)) => OwnedUserId::try_from(user).ok().map(|user| Ok((user, key))),
        Err(fault) => Some(Err(fault)),
    }))
}

/// Lists some member keys of a room with their user ids, rising by user id, from the first one after `after` on; at most
/// `count`.
pub(crate) fn list_keys_after(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    after: Option<&str>,
    count: usize,
) -> Result<Vec<(String, StateKeyNum)>, Fault> {
    let low = after.map_or(Bound::Included((room, MEMBER, "")), |user| Bound::Excluded((room, MEMBER, user)));
    let high = Bound::Excluded((room, ABOVE_MEMBER, ""));
    let rows = schema::STATE_KEY_NUM.range::<(RoomNum, String, String)>(read, low, high, Direction::Up)?;
    // In old rooms a member event may have any state key; one that is no user id concerns nobody.
    let is_user = |user: &str| <&UserId>::try_from(user).is_ok();
    let rows = rows.filter(|row| row.as_ref().map_or(true, |((.., user), _)| is_user(user)));
    rows.take(count).map(|row| row.map(|((.., user), key)| (user, key))).collect()
}

/// Lists the current member events of a room.
pub fn list_current(
    read: &(impl Read + ?Sized),
    room: RoomNum,
) -> Result<Vec<(OwnedUserId, StoredEvent)>, Fault> {
    let mut members = Vec::new();
    for key in list_keys(read, room)? {
        let (user, key) = key?;
        if let Some(event) = state::current(read, room, key)? {
            members.push((user, event::require(read, room, event)?));
        }
    }
    Ok(members)
}

/// Reads the membership from the member event of this number; `Leave` where there is none.
pub fn membership_of_event(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event: EventNum,
) -> Result<Membership, Fault> {
    Ok(event::find_anywhere(read, room, event)?
        .and_then(|stored| stored.membership())
        .unwrap_or(Membership::Leave))
}
