//! Members: who is in a room, and in which rooms one of our users is.

mod servers;
mod sharing;

use std::{
    collections::BTreeMap,
    ops::{Bound, ControlFlow},
};

use ruma::UserId;

use crate::{
    accounts,
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum, UserNum},
    rooms::{event, state},
    schema,
    schema::{
        event_types::MEMBER,
        marked::{Marked, Staged},
        rooms::{Membership, UserRoomRow},
        state::{StateRef, StateValue},
    },
    store::{Batch, Direction, Fault, Read},
};

pub(crate) use servers::{
    Census, Tally, Touched, are_counted, claim_server, is_derived, joined_value, list_claimed, list_staged,
    release_servers, stage_count, take_back_count,
};
pub use servers::{
    count_joined_at, has_known_members, has_other_servers, is_server_joined, list_servers, list_servers_at,
    list_servers_came_at, list_servers_ever, server_left_at, was_server_joined,
};
pub(crate) use sharing::{
    find_joined, find_joined_in_any, find_sharing, list_joined_of, list_rooms_of_other, share_room,
};

/// The lowest string above the type of member events, where their keys end.
const ABOVE_MEMBER: &str = "m.room.member\u{0}";

/// Writes the rows of a user whose membership in the current state is now this, by this event, since this order. With
/// `staged` they are part of the staged step at that position. Gives the user, if it is one of ours.
pub(crate) fn track(
    batch: &mut Batch,
    room: RoomNum,
    user_id: &str,
    now: Since,
    staged: Option<Position>,
) -> Result<Option<UserNum>, Fault> {
    let Ok(user_id) = <&UserId>::try_from(user_id) else { return Ok(None) };
    let Some(user) = accounts::users::find_num(batch, user_id)? else { return Ok(None) };
    let Since { membership, event, order } = now;
    let known = find(batch, user, room)?;
    let since = known.filter(|row| row.membership == membership).map_or(order.anchor, |row| row.since);
    let left = match known {
        // A user who is invited to a room that they have forgotten is as new to it as anybody else.
        Some(known) if known.forgotten => None,
        _ if membership == Membership::Join => None,
        Some(known) if known.membership == Membership::Join => Some(order),
        known => known.and_then(|known| known.left),
    };
    let forgotten_below = match known {
        // Joining again gives what the history visibility gives a member.
        _ if membership == Membership::Join => None,
        Some(known) if known.forgotten => Some(order),
        known => known.and_then(|known| known.forgotten_below),
    };
    let row = UserRoomRow { membership, since, event, forgotten: false, left, forgotten_below };
    let near = is_near(membership).then_some(membership);
    match staged {
        None => {
            schema::USER_ROOM.put(batch, (user, room), &row.into());
            match near {
                Some(near) => schema::ROOM_USER.put(batch, (room, user), &near.into()),
                None => schema::ROOM_USER.delete(batch, (room, user)),
            }
        }
        Some(anchor) => {
            let near_before = find_near(batch, room, user)?;
            schema::USER_ROOM.put(batch, (user, room), &marked(anchor, Some(row), known));
            schema::ROOM_USER.put(batch, (room, user), &marked(anchor, near, near_before));
        }
    }
    Ok(Some(user))
}

/// Like [`track`], for a membership that a user has from outside the room. It is news even where they had it before, and needs a
/// place of its own, because the room's timeline has none.
pub(crate) fn track_from_outside(
    batch: &mut Batch,
    room: RoomNum,
    user_id: &str,
    now: Since,
) -> Result<(), Fault> {
    if let Some(user) = track(batch, room, user_id, now, None)?
        && let Some(row) = find(batch, user, room)?
    {
        let row = UserRoomRow { since: now.order.anchor, ..row };
        schema::USER_ROOM.put(batch, (user, room), &row.into());
    }
    Ok(())
}

/// A membership, with the event that brought it and its order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since {
    pub(crate) membership: Membership,
    pub(crate) event: EventNum,
    pub(crate) order: Order,
}

fn marked<V>(anchor: Position, now: Option<V>, before: Option<V>) -> Marked<V> {
    Marked { now, staged: Some(Staged { anchor, before }) }
}

/// Whether a user with this membership stands in the list of the room's users.
pub(crate) fn is_near(membership: Membership) -> bool {
    matches!(membership, Membership::Join | Membership::Invite | Membership::Knock)
}

/// Marks the row of a user as one of the staged step at this position, which makes the room, so that the user finds
/// nothing of the room before. `base` is the position on which the batch's positions settle.
pub(super) fn hold_back(
    batch: &mut Batch,
    user: UserNum,
    room: RoomNum,
    anchor: Position,
    base: Position,
) -> Result<(), Fault> {
    let Some(Marked { now: Some(row), staged: None }) = schema::USER_ROOM.get(&*batch, (user, room))? else {
        return Ok(());
    };
    let settle = |order: Option<Order>| order.map(|order| order.settle(base));
    let (left, forgotten_below) = (settle(row.left), settle(row.forgotten_below));
    let row = UserRoomRow { since: row.since.settle(base), left, forgotten_below, ..row };
    schema::USER_ROOM.put(batch, (user, room), &marked(anchor, Some(row), None));
    // Users who are not near have a row, too, by which they are found if the step is taken back.
    let near = is_near(row.membership).then_some(row.membership);
    schema::ROOM_USER.put(batch, (room, user), &marked(anchor, near, None));
    Ok(())
}

/// Takes back what the unfinished step at this position wrote of a user, if it is one of ours.
pub(super) fn take_back(
    batch: &mut Batch,
    room: RoomNum,
    user_id: &str,
    anchor: Position,
) -> Result<(), Fault> {
    let Ok(user_id) = <&UserId>::try_from(user_id) else { return Ok(()) };
    let Some(user) = accounts::users::find_num(batch, user_id)? else { return Ok(()) };
    state::stage::restore(batch, &schema::USER_ROOM, (user, room), anchor)?;
    state::stage::restore(batch, &schema::ROOM_USER, (room, user), anchor)
}

/// Deletes the rows of some of our users for a room that was never finished. Gives `true` when none are left.
pub(super) fn clear_users(batch: &mut Batch, room: RoomNum, users_max: usize) -> Result<bool, Fault> {
    let rows = schema::ROOM_USER.prefix::<(RoomNum,)>(&*batch, (room,), Direction::Up)?;
    let users: Vec<UserNum> =
        rows.take(users_max).map(|row| row.map(|((_, user), _)| user)).collect::<Result<_, _>>()?;
    for user in &users {
        schema::USER_ROOM.delete(batch, (*user, room));
        schema::ROOM_USER.delete(batch, (room, *user));
    }
    Ok(users.len() < users_max)
}

/// Deletes the counts of members of a room that was never finished.
pub(super) fn clear_counts(batch: &mut Batch, room: RoomNum) {
    servers::clear(batch, room);
}

/// Notes that the user wants to hear no more of a room that they left.
pub(crate) fn forget(batch: &mut Batch, user: UserNum, room: RoomNum, row: &UserRoomRow) {
    schema::USER_ROOM.put(batch, (user, room), &UserRoomRow { forgotten: true, ..*row }.into());
}

/// Deletes the row of a user who is nothing to a room any more that they were something to from outside alone.
pub(crate) fn delete_outside(batch: &mut Batch, user: UserNum, room: RoomNum) {
    schema::USER_ROOM.delete(batch, (user, room));
}

/// Finds the row that says what one of our users is to a room.
pub fn find(read: &(impl Read + ?Sized), user: UserNum, room: RoomNum) -> Result<Option<UserRoomRow>, Fault> {
    let row = schema::USER_ROOM.get(read, (user, room))?;
    state::stage::row_that_counts(read, room, row)
}

/// Finds the rows that say what one of our users is to these rooms, in their order.
pub fn find_many(
    read: &(impl Read + ?Sized),
    user: UserNum,
    rooms: impl IntoIterator<Item = RoomNum>,
) -> Result<Vec<Option<UserRoomRow>>, Fault> {
    let rooms: Vec<RoomNum> = rooms.into_iter().collect();
    let rows = schema::USER_ROOM.get_many(read, rooms.iter().map(|room| (user, *room)))?;
    rooms.iter().zip(rows).map(|(room, row)| state::stage::row_that_counts(read, *room, row)).collect()
}

/// Finds the rows that say what these users of ours are to a room, in their order.
pub fn find_all(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    users: &[UserNum],
) -> Result<Vec<Option<UserRoomRow>>, Fault> {
    let rows = schema::USER_ROOM.get_many(read, users.iter().map(|user| (*user, room)))?;
    rows.into_iter().map(|row| state::stage::row_that_counts(read, room, row)).collect()
}

/// Finds the membership of one of our users who is joined or invited to a room, or knocks; `None` for everybody else.
pub fn find_near(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user: UserNum,
) -> Result<Option<Membership>, Fault> {
    let row = schema::ROOM_USER.get(read, (room, user))?;
    state::stage::row_that_counts(read, room, row)
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
    let counted = move |row: Result<((UserNum, RoomNum), Marked<UserRoomRow>), Fault>| {
        let ((_, room), row) = row?;
        Ok(state::stage::row_that_counts(read, room, Some(row))?.map(|row| (room, row)))
    };
    Ok(rows.map(counted).filter_map(Result::transpose))
}

/// Lists the rooms that a user is joined to.
pub fn list_joined_rooms(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<RoomNum>, Fault> {
    let joined = list_user_rooms(read, user)?
        .filter(|row| row.as_ref().map_or(true, |(_, row)| row.membership == Membership::Join));
    joined.map(|row| row.map(|(room, _)| room)).collect()
}

/// Reads our users who are joined, invited or knocking one by one, rising, with their memberships.
fn near_users<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<(UserNum, Membership), Fault>> + 'r, Fault> {
    let rows = schema::ROOM_USER.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let counted = move |row: Result<((RoomNum, UserNum), Marked<Membership>), Fault>| {
        let ((_, user), row) = row?;
        Ok(state::stage::row_that_counts(read, room, Some(row))?.map(|membership| (user, membership)))
    };
    Ok(rows.map(counted).filter_map(Result::transpose))
}

/// Lists our users who are joined, invited or knocking, rising.
pub fn list_local_users(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Vec<UserNum>, Fault> {
    near_users(read, room)?.map(|row| row.map(|(user, _)| user)).collect()
}

/// Reads our users who are joined to a room one by one, rising, for a caller that needs only the first few.
pub fn joined_local_users<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<UserNum, Fault>> + 'r, Fault> {
    Ok(near_users(read, room)?.filter_map(|row| match row {
        Ok((user, Membership::Join)) => Some(Ok(user)),
        Ok(_) => None,
        Err(fault) => Some(Err(fault)),
    }))
}

/// Lists our users who are joined to a room and have a number above `after`, rising, at most `count`.
pub fn list_joined_local_users_after(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    after: Option<UserNum>,
    count: usize,
) -> Result<Vec<UserNum>, Fault> {
    let low = after.map_or(Bound::Included((room, UserNum(0))), |user| Bound::Excluded((room, user)));
    let high = Bound::Included((room, UserNum(u64::MAX)));
    let rows = schema::ROOM_USER.range::<(RoomNum, UserNum)>(read, low, high, Direction::Up)?;
    let mut joined = Vec::new();
    for row in rows {
        let ((_, user), row) = row?;
        if joined.len() == count {
            break;
        }
        let membership = state::stage::row_that_counts(read, room, Some(row))?;
        joined.extend((membership == Some(Membership::Join)).then_some(user));
    }
    Ok(joined)
}

/// Lists some of our users who are joined or invited to a room: the first by their numbers.
pub fn list_present_local_users(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    count: usize,
) -> Result<Vec<UserNum>, Fault> {
    let present = near_users(read, room)?
        .filter(|row| row.as_ref().map_or(true, |(_, membership)| *membership != Membership::Knock));
    present.take(count).map(|row| row.map(|(user, _)| user)).collect()
}

/// Lists the numbers of all member keys of a room, with the user ids, rising by user id.
pub(crate) fn list_keys<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<(String, StateKeyNum), Fault>> + 'r, Fault> {
    keys_from(read, room, Bound::Included(""))
}

/// Lists some member keys of a room with their user ids, rising by user id, from the first one after `after` on; at most
/// `count`.
pub(crate) fn list_keys_after(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    after: Option<&str>,
    count: usize,
) -> Result<Vec<(String, StateKeyNum)>, Fault> {
    let low = after.map_or(Bound::Included(""), Bound::Excluded);
    keys_from(read, room, low)?.take(count).collect()
}

/// Visits all who are or were in a room, rising by user id, in pages with the numbers of their member keys, until `visit` breaks
/// off. The first page has so many, because a few may be enough, and each further one twice as many, up to a most.
pub(crate) fn walk(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    (first, most): (usize, usize),
    mut visit: impl FnMut(&[(String, StateKeyNum)]) -> Result<ControlFlow<()>, Fault>,
) -> Result<(), Fault> {
    let (mut after, mut count) = (None::<String>, first);
    loop {
        let members = list_keys_after(read, room, after.as_deref(), count)?;
        let Some((last, _)) = members.last() else { return Ok(()) };
        if visit(&members)?.is_break() {
            return Ok(());
        }
        after = Some(last.clone());
        count = most.min(2 * count);
    }
}

fn keys_from<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    low: Bound<&str>,
) -> Result<impl Iterator<Item = Result<(String, StateKeyNum), Fault>> + 'r, Fault> {
    let low = low.map(|user| (room, MEMBER, user));
    let high = Bound::Excluded((room, ABOVE_MEMBER, ""));
    let rows = schema::STATE_KEY_NUM.range::<(RoomNum, String, String)>(read, low, high, Direction::Up)?;
    // In old rooms a member event may have any state key; one that is no user id concerns nobody.
    let is_user = |user: &str| <&UserId>::try_from(user).is_ok();
    let rows = rows.filter(move |row| row.as_ref().map_or(true, |((.., user), _)| is_user(user)));
    Ok(rows.map(|row| row.map(|((.., user), key)| (user, key))))
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

/// Whether a user of any server is joined to a room now.
pub fn is_user_joined(read: &(impl Read + ?Sized), room: RoomNum, user_id: &str) -> Result<bool, Fault> {
    let Some(key) = state::find_key(read, room, MEMBER, user_id)? else { return Ok(false) };
    let Some(event) = state::current(read, room, key)? else { return Ok(false) };
    Ok(membership_of_event(read, room, event)? == Membership::Join)
}

/// Whether a user of another server is joined to a room now, or may be: nothing is known of them yet, and their server has somebody
/// there.
pub(crate) fn may_be_joined(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user_id: &UserId,
) -> Result<bool, Fault> {
    let key = state::find_key(read, room, MEMBER, user_id.as_str())?;
    let member = key.map(|key| state::current(read, room, key)).transpose()?.flatten();
    match member {
        Some(event) => Ok(membership_of_event(read, room, event)? == Membership::Join),
        None => {
            let is_partial = schema::ROOM.get(read, room)?.is_some_and(|row| row.partial.is_some());
            Ok(is_partial && is_server_joined(read, room, user_id.server_name().as_str())?)
        }
    }
}

/// Reads the member events of those of some member keys by which somebody is joined now.
pub(crate) fn list_joined_events(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    mut keys: Vec<StateKeyNum>,
) -> Result<BTreeMap<StateKeyNum, event::StoredEvent>, Fault> {
    keys.sort_unstable();
    let events = list_events(read, room, state::list_now(read, room, keys)?)?.into_iter();
    let joined = events.filter(|stored| stored.membership() == Some(Membership::Join));
    Ok(joined.filter_map(|stored| Some((stored.row.header.state_key?, stored))).collect())
}

fn list_events(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    values: Vec<StateValue>,
) -> Result<Vec<event::StoredEvent>, Fault> {
    event::list_anywhere(read, room, values.into_iter().filter_map(StateValue::event).collect())
}

/// Reads the memberships that some member keys have, in the state at an order or, without one, in the current state, each with
/// the event that says so. Keys without an event are left out. Reading many together costs a small part of reading each.
pub(crate) fn list_memberships(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    mut keys: Vec<StateKeyNum>,
    at: Option<Order>,
) -> Result<BTreeMap<StateKeyNum, (EventNum, Membership)>, Fault> {
    keys.sort_unstable();
    let values = match at {
        Some(order) => state::list_at(read, room, StateRef::Main(order), &keys)?,
        None => state::list_now(read, room, keys)?,
    };
    let events = list_events(read, room, values)?.into_iter();
    let memberships = events.filter_map(|stored| {
        let membership = stored.membership().unwrap_or(Membership::Leave);
        Some((stored.row.header.state_key?, (stored.event(), membership)))
    });
    Ok(memberships.collect())
}
