//! Finds those whose device lists changed and who share a room with the user. After a week away the lists of hundreds of thousands may
//! have changed, of whom the user knows few, or those of few, where the user knows thousands. So either those are looked for
//! whose lists changed, or the people in the user's rooms are looked over, whichever are fewer.

use std::collections::BTreeSet;

use ruma::UserId;

use super::{FEW, Member, list_in_any, note_joined, walk_members};
use crate::{
    accounts::users,
    encryption::device_lists,
    ids::{Position, RoomNum},
    rooms::members,
    schema::{self, rooms::Membership},
    store::{Fault, Read},
};

/// Remember at most this many people whose lists did not change; beyond that, they are looked up once for each room that they are in.
const UNCHANGED_MAX: usize = 100_000;

/// Lists the users whose device lists changed after the first and up to the second of two positions, and who are joined to any of
/// these rooms of a user of ours, or are that user.
pub(crate) fn list_changed(
    read: &(impl Read + ?Sized),
    own: &UserId,
    rooms: &[RoomNum],
    span: (Position, Position),
) -> Result<BTreeSet<String>, Fault> {
    let mut found = match list_few(read, rooms, span)? {
        Some(changed) => list_in_any(read, rooms, changed)?,
        None => list_of_people(read, own, rooms, span)?,
    };
    if is_within(device_lists::find_changed(read, own)?, span) {
        found.insert(own.to_string());
    }
    Ok(found)
}

fn is_within(at: Option<Position>, (from, upto): (Position, Position)) -> bool {
    at.is_some_and(|at| from < at && at <= upto)
}

/// Lists all users whose device lists changed, unless they are more than the people in the largest of the rooms: then each room would be
/// walked for them anyway.
fn list_few(
    read: &(impl Read + ?Sized),
    rooms: &[RoomNum],
    (from, upto): (Position, Position),
) -> Result<Option<BTreeSet<String>>, Fault> {
    let mut changes = device_lists::list_changes(read, from, upto)?;
    // How large the rooms are need not be known for few changes, which are all that a client finds that is never away.
    let mut changed = changes.by_ref().take(FEW + 1).collect::<Result<Vec<_>, _>>()?;
    if changed.len() > FEW {
        let rows = schema::ROOM.get_many(read, rooms.iter().copied())?;
        // A room has at most as many members as state keys.
        let largest = rows.into_iter().flatten().map(|row| row.next_key as usize).max().unwrap_or(0);
        let count = (largest + 1).saturating_sub(changed.len());
        for user_id in changes.take(count) {
            changed.push(user_id?);
        }
        if changed.len() > largest {
            return Ok(None);
        }
    }
    Ok(Some(changed.into_iter().collect()))
}

/// Looks up when the list of each member of the rooms changed last.
fn list_of_people(
    read: &(impl Read + ?Sized),
    own: &UserId,
    rooms: &[RoomNum],
    span: (Position, Position),
) -> Result<BTreeSet<String>, Fault> {
    let (mut found, mut unchanged) = (BTreeSet::new(), BTreeSet::new());
    for room in rooms {
        walk_members(read, *room, |members| {
            let is_known = |user_id: &String| found.contains(user_id) || unchanged.contains(user_id);
            let members: Vec<&Member> = members.iter().filter(|(user_id, _)| !is_known(user_id)).collect();
            let user_ids = members.iter().map(|(user_id, _)| user_id.as_str());
            let positions = device_lists::find_changed_of_many(read, user_ids)?;
            let mut changed = Vec::new();
            for (member, at) in members.into_iter().zip(positions) {
                if is_within(at, span) {
                    changed.push(member.clone());
                } else if unchanged.len() < UNCHANGED_MAX {
                    unchanged.insert(member.0.clone());
                }
            }
            note_present(read, own, *room, changed, &mut found)
        })?;
    }
    Ok(found)
}

/// Notes those of some members who are joined now. Users of this server have a row that says so, which costs less than reading
/// the event.
fn note_present(
    read: &(impl Read + ?Sized),
    own: &UserId,
    room: RoomNum,
    members: Vec<Member>,
    noted: &mut BTreeSet<String>,
) -> Result<(), Fault> {
    if members.is_empty() {
        return Ok(());
    }
    let is_ours = |user_id: &str| {
        <&UserId>::try_from(user_id).is_ok_and(|user_id| user_id.server_name() == own.server_name())
    };
    let (ours, mut others): (Vec<_>, Vec<_>) = members.into_iter().partition(|(user_id, _)| is_ours(user_id));
    let user_ids = ours.iter().filter_map(|(user_id, _)| <&UserId>::try_from(user_id.as_str()).ok());
    let nums = users::find_nums(read, user_ids)?;
    let (mut known, mut known_nums) = (Vec::new(), Vec::new());
    for (member, num) in ours.into_iter().zip(nums) {
        match num {
            Some(num) => {
                known.push(member.0);
                known_nums.push(num);
            }
            // An account that is not here any more may still be in a room.
            None => others.push(member),
        }
    }
    let rows = members::find_all(read, room, &known_nums)?;
    let is_joined = |row: &schema::rooms::UserRoomRow| row.membership == Membership::Join;
    let joined = known.into_iter().zip(rows).filter(|(_, row)| row.as_ref().is_some_and(is_joined));
    noted.extend(joined.map(|(user_id, _)| user_id));
    note_joined(read, room, &others, None, noted)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        accounts::users::NewUser,
        ids::{EventNum, UserNum},
        store::{Batch, Counting, Durability, Engine, Guard, Store, engine::Memory},
        sync::shares::tests::{put_member, put_room, user},
    };

    fn own() -> ruma::OwnedUserId {
        "@own:a.example".try_into().unwrap()
    }

    fn local(number: u32) -> ruma::OwnedUserId {
        format!("@l{number:05}:a.example").try_into().unwrap()
    }

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap()
    }

    fn write(store: &Store, build: impl FnOnce(&mut Batch)) {
        let mut batch = store.batch(&Guard::alone());
        build(&mut batch);
        if batch.row_count() > 0 {
            drop(store.enqueue(batch).unwrap());
            store.flush().unwrap();
        }
    }

    fn change(store: &Store, user_id: &str) {
        write(store, |batch| {
            device_lists::changed_elsewhere(batch, user_id.try_into().unwrap()).unwrap();
        });
    }

    fn put_account(batch: &mut Batch, number: u32) {
        let new = NewUser { user_id: local(number), now_ms: 0, is_admin: false, is_guest: false };
        users::create(batch, UserNum(number.into()), &new);
    }

    /// Puts a user of ours into a room, with the row that says what they are to the room.
    fn put_local(batch: &mut Batch, room: RoomNum, number: u32, membership: Membership) {
        let (num, user_id) = (UserNum(number.into()), local(number));
        let text = if membership == Membership::Join { "join" } else { "leave" };
        put_member(batch, room, (1_000 + number, user_id.as_str()), text);
        let row = schema::rooms::UserRoomRow {
            membership,
            since: Position::ZERO,
            event: EventNum((1_000 + number).into()),
            forgotten: false,
            left: None,
            forgotten_below: None,
        };
        schema::USER_ROOM.put(batch, (num, room), &row.into());
    }

    fn members_of(numbers: std::ops::Range<u32>, room: RoomNum, batch: &mut Batch) {
        put_room(batch, room, numbers.end - numbers.start);
        for number in numbers {
            put_member(batch, room, (number, &user(number)), "join");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn those_are_found_whose_lists_changed_within_the_span_whichever_are_fewer(
            rooms in prop::collection::vec(
                (prop::collection::btree_map(0..8_u32, any::<bool>(), 0..8), prop::collection::btree_map(0..5_u32, any::<bool>(), 0..5)),
                0..4,
            ),
            changes in prop::collection::vec((any::<bool>(), 0..10_u32), 0..24),
            (from, upto, is_own) in (0..26_usize, 0..26_usize, any::<bool>()),
        ) {
            let (store, mut naive) = (store(), BTreeSet::new());
            // One of the users has no account any more.
            write(&store, |batch| (0..4).for_each(|number| put_account(batch, number)));
            for (num, (others, locals)) in (0..).map(RoomNum).zip(&rooms) {
                write(&store, |batch| {
                    put_room(batch, num, u32::try_from(others.len() + locals.len()).unwrap());
                    for (number, is_joined) in others {
                        put_member(batch, num, (*number, &user(*number)), if *is_joined { "join" } else { "leave" });
                        naive.extend(is_joined.then(|| user(*number)));
                    }
                    for (number, is_joined) in locals {
                        let membership = if *is_joined { Membership::Join } else { Membership::Leave };
                        put_local(batch, num, *number, membership);
                        naive.extend(is_joined.then(|| local(*number).to_string()));
                    }
                });
            }
            let (mut marks, mut last) = (vec![store.snapshot().upto()], BTreeMap::new());
            for (is_local, number) in changes {
                let user_id = if is_local { local(number).to_string() } else { user(number) };
                change(&store, &user_id);
                marks.push(store.snapshot().upto());
                last.insert(user_id, store.snapshot().upto());
            }
            if is_own {
                change(&store, own().as_str());
                naive.insert(own().to_string());
                last.insert(own().to_string(), store.snapshot().upto());
            }
            marks.push(store.snapshot().upto());
            let span = (marks[from.min(marks.len() - 1)], marks[upto.min(marks.len() - 1)]);
            let within = last.into_iter().filter(|(_, at)| is_within(Some(*at), span)).map(|(user_id, _)| user_id);
            let expected: BTreeSet<String> = within.filter(|user_id| naive.contains(user_id)).collect();
            let (snapshot, own) = (store.snapshot(), own());
            let nums: Vec<_> = (0..rooms.len() as u64).map(RoomNum).collect();
            prop_assert_eq!(&list_changed(&*snapshot, &own, &nums, span).unwrap(), &expected);
            let mut of_people = list_of_people(&*snapshot, &own, &nums, span).unwrap();
            of_people.extend(expected.contains(own.as_str()).then(|| own.to_string()));
            prop_assert_eq!(of_people, expected);
        }
    }

    /// A user is in two rooms of a hundred people each, of whom forty are in both, and lists of strangers changed, too. Answers how many
    /// are told of, and how many rows that took.
    fn rows_read(strangers: u32, changed: std::ops::Range<u32>) -> (usize, usize) {
        let (store, rooms) = (store(), [RoomNum(0), RoomNum(1)]);
        write(&store, |batch| members_of(0..100, rooms[0], batch));
        write(&store, |batch| members_of(60..160, rooms[1], batch));
        let from = store.snapshot().upto();
        for number in changed.chain(1_000..1_000 + strangers) {
            change(&store, &user(number));
        }
        let snapshot = store.snapshot();
        let counting = Counting::new(&snapshot);
        let found = list_changed(&counting, &own(), &rooms, (from, snapshot.upto())).unwrap();
        (found.len(), counting.rows())
    }

    #[test]
    fn after_many_changes_the_people_are_looked_over_and_not_the_changes() {
        let (found, rows) = rows_read(1_000, 50..60);
        assert_eq!(found, 10);
        // The first hundred changes show that there are more of them than people. The rest are never read: the keys of the members
        // are, and for each of the people when they changed, and for those who did, three rows that say what they are to the room.
        assert_eq!(rows, 101 + 2 + 200 + 160 + 3 * 10 + 1);
        assert_eq!(rows_read(5_000, 50..60), (found, rows), "what strangers do costs nothing more");
    }

    #[test]
    fn after_few_changes_those_are_looked_for_whose_lists_changed() {
        assert_eq!(rows_read(0, 0..0), (0, 1));
        let (found, rows) = rows_read(20, 50..60);
        assert_eq!(found, 10);
        assert!(rows < 130, "each change is read, and looked for in two rooms: {rows}");
    }

    #[test]
    fn people_who_are_in_many_rooms_are_looked_up_once() {
        let store = store();
        let rooms: Vec<_> = (0..10).map(RoomNum).collect();
        for room in &rooms {
            write(&store, |batch| members_of(0..30, *room, batch));
        }
        let from = store.snapshot().upto();
        for number in 1_000..1_100 {
            change(&store, &user(number));
        }
        let snapshot = store.snapshot();
        let counting = Counting::new(&snapshot);
        assert!(list_changed(&counting, &own(), &rooms, (from, snapshot.upto())).unwrap().is_empty());
        // 31 changes, 10 rooms, 30 member keys of each, 30 people, and the user's own list.
        assert_eq!(counting.rows(), 31 + 10 + 10 * 30 + 30 + 1);
    }
}
