//! Finds who came to share a room with the user since the client asked last, and who ceased to. Device lists and
//! presence follow from it.

mod changed;

use std::{collections::BTreeSet, ops::ControlFlow};

use ruma::UserId;

use crate::{
    accounts,
    ids::{Order, RoomNum, StateKeyNum},
    rooms::{members, state},
    schema,
    schema::event_types::MEMBER,
    schema::rooms::Membership,
    store::{Fault, Read},
    sync::window::Window,
};

pub(crate) use changed::list_changed;

/// Members of a room are read this many at a time, which costs less than one by one.
const MEMBERS_AT_ONCE: usize = if cfg!(test) { 3 } else { 500 };
/// Up to this many users are looked for one by one, because that costs little for users of this server.
const FEW: usize = if cfg!(test) { 1 } else { 16 };

/// The users who came to share a room with the user since the client asked last, and those who ceased to.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    /// Users who share a room with the user that was not shared before.
    pub(crate) came: BTreeSet<String>,
    /// Users who share one room less with the user, and perhaps none any more.
    pub(crate) went: BTreeSet<String>,
}

impl Shares {
    /// Notes everybody in a room that the user joined: the user now shares it with them.
    ///
    /// Everybody is named, however many they are, as the whole state of a room is told whatever its size. A client that missed
    /// one would go on with the keys that it knew of them from an earlier room.
    pub(crate) fn joined_room(&mut self, window: &Window<'_>, num: RoomNum) -> Result<(), Fault> {
        let read = window.read;
        walk_members(read, num, |members| note_joined(read, num, members, None, &mut self.came))
    }

    /// Notes everybody who was in a room at one of these orders, at which the user was in it: the user no longer shares it
    /// with them.
    pub(crate) fn left_room(
        &mut self,
        window: &Window<'_>,
        num: RoomNum,
        orders: &[Order],
    ) -> Result<(), Fault> {
        let read = window.read;
        if orders.is_empty() {
            return Ok(());
        }
        walk_members(read, num, |members| {
            orders.iter().try_for_each(|at| note_joined(read, num, members, Some(*at), &mut self.went))
        })
    }

    /// Whether nobody came and nobody went.
    pub(crate) fn is_empty(&self) -> bool {
        self.came.is_empty() && self.went.is_empty()
    }
}

/// A user who is or was in a room, with the number of their state key there.
type Member = (String, StateKeyNum);

/// Visits all who are or were in a room, in pages.
fn walk_members(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    mut visit: impl FnMut(&[Member]) -> Result<(), Fault>,
) -> Result<(), Fault> {
    members::walk(read, num, (MEMBERS_AT_ONCE, MEMBERS_AT_ONCE), |members| {
        visit(members).map(ControlFlow::Continue)
    })
}

/// Notes those of some members who are joined at an order; without one, those who are joined now.
fn note_joined(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    members: &[Member],
    at: Option<Order>,
    noted: &mut BTreeSet<String>,
) -> Result<(), Fault> {
    let keys = members.iter().map(|(_, key)| *key).collect();
    let memberships = members::list_memberships(read, num, keys, at)?;
    let is_joined = |key| memberships.get(key).is_some_and(|(_, membership)| *membership == Membership::Join);
    noted.extend(members.iter().filter(|(_, key)| is_joined(key)).map(|(user_id, _)| user_id.clone()));
    Ok(())
}

/// Lists those of some users who are joined to any of these rooms. Of each room, either all members are read or those who are
/// looked for, whichever are fewer.
pub(crate) fn list_in_any(
    read: &(impl Read + ?Sized),
    rooms: &[RoomNum],
    mut users: BTreeSet<String>,
) -> Result<BTreeSet<String>, Fault> {
    let mut found = BTreeSet::new();
    if users.len() <= FEW {
        for user_id in users {
            if is_in_any(read, rooms, &user_id)? {
                found.insert(user_id);
            }
        }
        return Ok(found);
    }
    let rows = schema::ROOM.get_many(read, rooms.iter().copied())?;
    for (num, row) in rooms.iter().zip(rows) {
        let mut here = BTreeSet::new();
        // The room has at most this many state keys, and so at most as many members.
        if row.is_some_and(|row| (row.next_key as usize) < users.len()) {
            walk_members(read, *num, |members| {
                let wanted: Vec<_> =
                    members.iter().filter(|(user, _)| users.contains(user)).cloned().collect();
                note_joined(read, *num, &wanted, None, &mut here)
            })?;
        } else {
            let users: Vec<&str> = users.iter().map(String::as_str).collect();
            for users in users.chunks(MEMBERS_AT_ONCE) {
                let keys = state::find_keys(read, *num, MEMBER, users.iter().copied())?;
                let members =
                    users.iter().zip(keys).filter_map(|(user, key)| Some(((*user).to_owned(), key?)));
                note_joined(read, *num, &members.collect::<Vec<_>>(), None, &mut here)?;
            }
        }
        users.retain(|user_id| !here.contains(user_id));
        found.append(&mut here);
    }
    Ok(found)
}

/// Whether a user is joined to any of these rooms.
fn is_in_any(read: &(impl Read + ?Sized), rooms: &[RoomNum], user_id: &str) -> Result<bool, Fault> {
    let Ok(parsed) = <&UserId>::try_from(user_id) else { return Ok(false) };
    if let Some(user) = accounts::users::find_num(read, parsed)? {
        let theirs = members::find_many(read, user, rooms.iter().copied())?;
        return Ok(theirs.iter().flatten().any(|row| row.membership == Membership::Join));
    }
    for room in rooms {
        if let Some(key) = state::find_key(read, *room, MEMBER, user_id)?
            && let Some(event) = state::current(read, *room, key)?
            && members::membership_of_event(read, *room, event)? == Membership::Join
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{EventNum, Position},
        rooms::event,
        schema::{
            rooms::{EventHeader, EventKey, EventRow, Place, Resident, RoomRow},
            state::{StateKeyRow, StateValue},
        },
        store::{Batch, Durability, Engine, Guard, Store, engine::Memory},
    };

    const USERS: u32 = 12;

    pub(super) fn user(number: u32) -> String {
        format!("@u{number:02}:elsewhere.example")
    }

    /// Puts the row of a room that has this many state keys.
    pub(super) fn put_room(batch: &mut Batch, room: RoomNum, next_key: u32) {
        let id = ruma::RoomId::parse("!room:a.example").unwrap();
        let row = RoomRow { next_key, ..RoomRow::new(id, 11, Resident::Yes) };
        schema::ROOM.put(batch, room, &row);
    }

    /// Puts a member into a room, with rows as far as they are read here. The number is that of the member's state key and event.
    pub(super) fn put_member(
        batch: &mut Batch,
        room: RoomNum,
        (number, user_id): (u32, &str),
        membership: &str,
    ) {
        let (key, event) = (StateKeyNum(number), EventNum(number.into()));
        let json = serde_json::json!({
            "content": { "membership": membership }, "sender": user_id, "state_key": user_id, "type": MEMBER,
        });
        let json = bytes::Bytes::from(json.to_string());
        let header = EventHeader {
            event,
            key: EventKey::Hash([1; 32]),
            sent_ms: 1,
            depth: 1,
            auth_depth: 1,
            state_key: Some(key),
            replaces: None,
            redacted_by: None,
            unseen: false,
            before: None,
            after: None,
            prev: Vec::new(),
            auth: Vec::new(),
            sent_by: None,
            let_in: false,
            rejected: false,
            expired: false,
            spans: event::locate(&json).unwrap(),
        };
        let order = Order { anchor: Position::ZERO, minor: i32::try_from(number).unwrap() };
        schema::TIMELINE.put(batch, (room, order), &EventRow { header, json });
        schema::PLACE.put(batch, (room, event), &Place::Timeline(order));
        schema::STATE_KEY_NUM.put(batch, (room, MEMBER, user_id), &key);
        let name = StateKeyRow { event_type: MEMBER.to_owned(), state_key: user_id.to_owned() };
        schema::STATE_KEY.put(batch, (room, key), &name);
        schema::STATE_NOW.put(batch, (room, key), &StateValue::Event(event).into());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn who_is_in_any_room_is_found_whichever_are_fewer(
            rooms in prop::collection::vec(prop::collection::btree_map(0..USERS, any::<bool>(), 0..10), 0..4),
            asked in prop::collection::btree_set(0..USERS + 2, 0..14),
        ) {
            let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
            let mut batch = store.batch(&Guard::alone());
            let mut naive = BTreeMap::new();
            for (num, members) in (0..).map(RoomNum).zip(&rooms) {
                for (number, is_joined) in members {
                    put_member(&mut batch, num, (*number, &user(*number)), if *is_joined { "join" } else { "leave" });
                    *naive.entry(user(*number)).or_insert(false) |= *is_joined;
                }
                // A room with few keys is walked, and one with more keys than are asked for is not.
                put_room(&mut batch, num, members.len() as u32);
            }
            drop(store.enqueue(batch).unwrap());
            store.flush().unwrap();
            let snapshot = store.snapshot();
            let nums: Vec<_> = (0..rooms.len() as u64).map(RoomNum).collect();
            let asked: BTreeSet<String> = asked.into_iter().map(user).collect();
            let expected: BTreeSet<String> =
                asked.iter().filter(|user| naive.get(*user).copied().unwrap_or_default()).cloned().collect();
            prop_assert_eq!(list_in_any(&*snapshot, &nums, asked).unwrap(), expected);
            for (num, members) in nums.iter().zip(&rooms) {
                let mut noted = BTreeSet::new();
                walk_members(&*snapshot, *num, |some| note_joined(&*snapshot, *num, some, None, &mut noted)).unwrap();
                let joined = members.iter().filter(|(_, is_joined)| **is_joined);
                prop_assert_eq!(noted, joined.map(|(number, _)| user(*number)).collect());
            }
        }
    }
}
