//! Finds who shares a room with a user, among some users of ours.

use std::{cmp::Reverse, collections::BTreeSet};

use super::{find_many, is_user_joined, joined_local_users, list_joined_rooms, list_user_rooms};
use crate::{
    ids::{RoomNum, UserNum},
    rooms::state::stage,
    schema,
    schema::event_types::MEMBER,
    schema::rooms::Membership,
    store::{Direction, Fault, Read},
};

/// Read about this many rows at most, however many rooms and people there are.
const ROWS_MAX: usize = 20_000;
/// Ask about this many rooms of a user at once: most who share a room share one of the first.
const ASKED_AT_ONCE: usize = 256;
/// Look for a user of another server in at most this many rooms.
const LOOKED_AT_MAX: usize = 20_000;

/// Whether two users of ours are in one room. Costs a row or two for each room of the first of them.
pub(crate) fn share_room(read: &(impl Read + ?Sized), user: UserNum, other: UserNum) -> Result<bool, Fault> {
    for some in list_joined_rooms(read, user)?.chunks(ASKED_AT_ONCE) {
        let theirs = find_many(read, other, some.iter().copied())?;
        if theirs.into_iter().flatten().any(|row| row.membership == Membership::Join) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Finds those of `among` who are in a room with the user; the largest rooms come first, because most are found there. The
/// search ends after a bounded number of rows, so that it may miss some.
pub(crate) fn find_sharing(
    read: &(impl Read + ?Sized),
    user: UserNum,
    mut among: BTreeSet<UserNum>,
) -> Result<Vec<UserNum>, Fault> {
    let (mut found, mut rows) = (Vec::new(), 0);
    among.remove(&user);
    if among.is_empty() {
        return Ok(found);
    }
    for (room, member_count) in list_rooms(read, user, &mut rows)? {
        if among.is_empty() {
            break;
        }
        if rows >= ROWS_MAX {
            tracing::debug!(%user, reason = "too many rows", "some who share a room are not looked for");
            break;
        }
        found.extend(take_joined(read, (room, member_count), &mut among, &mut rows)?);
    }
    Ok(found)
}

/// Finds those of `among` who are joined to a room. The search ends after a bounded number of rows.
pub(crate) fn find_joined(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    mut among: BTreeSet<UserNum>,
) -> Result<Vec<UserNum>, Fault> {
    let member_count = schema::ROOM.get(read, room)?.map_or(0, |row| row.joined as usize);
    take_joined(read, (room, member_count), &mut among, &mut 0)
}

/// Finds those of `among` who are joined to any of these rooms. The search ends after a bounded number of rows, so that it may
/// miss some.
pub(crate) fn find_joined_in_any(
    read: &(impl Read + ?Sized),
    rooms: &[RoomNum],
    mut among: BTreeSet<UserNum>,
) -> Result<Vec<UserNum>, Fault> {
    let (mut found, mut rows) = (Vec::new(), 0);
    for room in rooms {
        if among.is_empty() || rows >= ROWS_MAX {
            break;
        }
        rows += 1;
        let member_count = schema::ROOM.get(read, *room)?.map_or(0, |row| row.joined as usize);
        found.extend(take_joined(read, (*room, member_count), &mut among, &mut rows)?);
    }
    Ok(found)
}

/// Lists the rooms that a user of another server is joined to, rising, of the first [`LOOKED_AT_MAX`] rooms that this server
/// knows. There is no index for it, so that one key is looked for in each room; hardly any of these look-ups reads a row.
pub(crate) fn list_rooms_of_other(read: &(impl Read + ?Sized), user_id: &str) -> Result<Vec<RoomNum>, Fault> {
    let rooms = schema::ROOM_ID.prefix::<()>(read, (), Direction::Up)?.take(LOOKED_AT_MAX);
    let rooms = rooms.map(|row| row.map(|(_, room)| room)).collect::<Result<Vec<_>, _>>()?;
    let mut joined = list_joined_of(read, &rooms, user_id)?;
    joined.sort_unstable();
    Ok(joined)
}

/// Lists those of these rooms that a user of any server is joined to, as far as their members are known.
pub(crate) fn list_joined_of(
    read: &(impl Read + ?Sized),
    rooms: &[RoomNum],
    user_id: &str,
) -> Result<Vec<RoomNum>, Fault> {
    let mut joined = Vec::new();
    for some in rooms.chunks(ASKED_AT_ONCE) {
        let keys = some.iter().map(|room| (*room, MEMBER, user_id));
        let keys = schema::STATE_KEY_NUM.get_many(read, keys)?;
        for (room, _) in some.iter().zip(keys).filter(|(_, key)| key.is_some()) {
            if is_user_joined(read, *room, user_id)? {
                joined.push(*room);
            }
        }
    }
    Ok(joined)
}

/// Takes those who are joined to the room out of `among`. Either the members are read or those who are looked for, whichever
/// are fewer.
fn take_joined(
    read: &(impl Read + ?Sized),
    (room, member_count): (RoomNum, usize),
    among: &mut BTreeSet<UserNum>,
    rows: &mut usize,
) -> Result<Vec<UserNum>, Fault> {
    let (mut found, left) = (Vec::new(), ROWS_MAX.saturating_sub(*rows));
    if among.len() <= member_count {
        let asked: Vec<UserNum> = among.iter().copied().take(left).collect();
        *rows += asked.len();
        let theirs = schema::USER_ROOM.get_many(read, asked.iter().map(|user| (*user, room)))?;
        for (user, row) in asked.into_iter().zip(theirs) {
            if stage::row_that_counts(read, room, row)?.is_some_and(|row| row.membership == Membership::Join)
            {
                among.remove(&user);
                found.push(user);
            }
        }
    } else {
        for member in joined_local_users(read, room)?.take(left) {
            let member = member?;
            *rows += 1;
            if among.remove(&member) {
                found.push(member);
            }
        }
    }
    Ok(found)
}

/// Lists the rooms that the user is in, with the number of their members, the largest first.
fn list_rooms(
    read: &(impl Read + ?Sized),
    user: UserNum,
    rows: &mut usize,
) -> Result<Vec<(RoomNum, usize)>, Fault> {
    let mut rooms = Vec::new();
    // Rooms that the user is not in do not count: others invite to as many as they like.
    let joined = list_user_rooms(read, user)?
        .filter(|row| row.as_ref().map_or(true, |(_, row)| row.membership == Membership::Join));
    for row in joined.take(ROWS_MAX / 2) {
        *rows += 1;
        rooms.push(row?.0);
    }
    *rows += rooms.len();
    let counts = schema::ROOM.get_many(read, rooms.iter().copied())?;
    let count = |row: Option<schema::rooms::RoomRow>| row.map_or(0, |row| row.joined as usize);
    let mut sized: Vec<_> = rooms.into_iter().zip(counts.into_iter().map(count)).collect();
    sized.sort_by_key(|(room, count)| (Reverse(*count), *room));
    Ok(sized)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{EventNum, Order, Position},
        rooms::tip::tests::row,
        schema::rooms::UserRoomRow,
        store::{Durability, Engine, Guard, Store, engine::Memory},
    };

    const ROOMS: u64 = 40;
    const MEMBERS: u64 = 200;

    /// A store with rooms that all have the same members, numbered from 0.
    fn house() -> Store {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
        let joined = UserRoomRow {
            membership: Membership::Join,
            since: Position::ZERO,
            event: EventNum(0),
            forgotten: false,
            left: None,
            forgotten_below: None,
        };
        for room in (0..ROOMS).map(RoomNum) {
            let mut batch = store.batch(&Guard::alone());
            let mut row = row(Order::MIN);
            row.joined = u32::try_from(MEMBERS).unwrap();
            schema::ROOM.put(&mut batch, room, &row);
            for user in (0..MEMBERS).map(UserNum) {
                schema::USER_ROOM.put(&mut batch, (user, room), &joined.into());
                schema::ROOM_USER.put(&mut batch, (room, user), &Membership::Join.into());
            }
            drop(store.enqueue(batch).unwrap());
            store.flush().unwrap();
        }
        store
    }

    /// Who is found among these, and how many rows are read.
    fn find(store: &Store, among: impl IntoIterator<Item = u64>) -> (usize, u64) {
        let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
        let snapshot = store.snapshot();
        let before = memory.reads();
        let found = find_sharing(&*snapshot, UserNum(0), among.into_iter().map(UserNum).collect()).unwrap();
        (found.len(), memory.reads() - before)
    }

    #[test]
    fn finding_who_shares_a_room_costs_as_much_as_there_are_who_wait() {
        let store = house();
        // The rooms of the user are listed, and their numbers of members looked up.
        let rooms = 2 * ROOMS + 1;
        assert_eq!(find(&store, [0]), (0, 0), "nobody else waits");
        assert_eq!(find(&store, [0, 1, 2, 3]), (3, rooms + 3));
        assert_eq!(
            find(&store, [1, 1_000]),
            (1, rooms + 1 + ROOMS),
            "who shares no room is asked for in each"
        );
        assert_eq!(find(&store, 0..MEMBERS), (199, rooms + 199));
        let (found, rows) = find(&store, 0..1_000);
        assert_eq!(found, 199);
        assert!(rows <= rooms + ROOMS * (MEMBERS + 1), "the members of each room are fewer: {rows}");
    }

    #[test]
    fn two_users_share_a_room_while_both_are_in_it() {
        let store = house();
        let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
        let shares = |user: u64, other: u64| {
            let (snapshot, before) = (store.snapshot(), memory.reads());
            let shares = share_room(&*snapshot, UserNum(user), UserNum(other)).unwrap();
            (shares, memory.reads() - before)
        };
        assert_eq!(shares(0, 1), (true, 2 * ROOMS + 1));
        assert_eq!(shares(0, 1_000), (false, 2 * ROOMS + 1), "the other is in no room");
        assert_eq!(shares(1_000, 0), (false, 1));
        let mut batch = store.batch(&Guard::alone());
        for room in (1..ROOMS).map(RoomNum) {
            let row = schema::USER_ROOM.get(&batch, (UserNum(1), room)).unwrap().unwrap().now.unwrap();
            let left = UserRoomRow { membership: Membership::Leave, ..row };
            schema::USER_ROOM.put(&mut batch, (UserNum(1), room), &left.into());
        }
        schema::USER_ROOM.delete(&mut batch, (UserNum(2), RoomNum(0)));
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        assert!(shares(0, 1).0 && shares(1, 0).0, "they are both in the first room still");
        assert!(
            !shares(1, 2).0 && !shares(2, 1).0,
            "one is in the first room, and the other in all but that"
        );
    }

    #[test]
    fn rooms_that_the_user_is_not_in_keep_none_out_that_they_are_in() {
        let store = house();
        let mut batch = store.batch(&Guard::alone());
        let row = schema::USER_ROOM.get(&batch, (UserNum(1), RoomNum(0))).unwrap().unwrap().now.unwrap();
        let left = UserRoomRow { membership: Membership::Leave, ..row };
        let user = UserNum(1_000);
        let invited = u64::try_from(ROWS_MAX).unwrap();
        for room in (1_000..1_000 + invited).map(RoomNum) {
            schema::USER_ROOM.put(&mut batch, (user, room), &left.into());
            if batch.row_count() >= 4_000 {
                let full = std::mem::replace(&mut batch, store.batch(&Guard::alone()));
                drop(store.enqueue(full).unwrap());
                store.flush().unwrap();
            }
        }
        let last = RoomNum(2_000 + invited);
        schema::USER_ROOM.put(&mut batch, (user, last), &row.into());
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        let rooms = list_rooms(&*store.snapshot(), user, &mut 0).unwrap();
        assert_eq!(rooms, [(last, 0)]);
    }

    #[test]
    fn the_search_ends_after_a_bounded_number_of_rows() {
        let store = house();
        let (found, rows) = find(&store, (0..MEMBERS / 2).chain(10_000..10_100));
        assert_eq!((found, rows), (99, 2 * ROOMS + 1 + 199 + 100 * (ROOMS - 1)));
        let (_, rows) = find(&store, 10_000..100_000);
        assert!(rows < 20_200, "{rows}");
    }
}
