//! Counts the invitations from outside that wait for users of ours. Anybody can invite somebody, so that a user has a bounded number
//! of them, and no server has more than a part. Each has a row of its own by which it is counted, so that a count reads
//! nothing of what the invitations tell.

use std::collections::BTreeSet;

use crate::{
    ids::{RoomNum, UserNum},
    rooms::{event, members},
    schema::{self, remote::OutsideRow, rooms::Membership},
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// A user has at most this many invitations from outside at a time.
const OF_USER_MAX: usize = 1_000;
/// At most this many of them are by users of one server.
const OF_SERVER_MAX: usize = 200;

/// Whether one invitation more to a room, by a user of this server, may wait for the user. One that takes the place of
/// another of the same server may. The count is right while the user's lock is held.
pub fn may_wait(
    read: &(impl Read + ?Sized),
    (user, server): (UserNum, &str),
    room: Option<RoomNum>,
) -> Result<bool, Fault> {
    if let Some(room) = room
        && schema::INVITED.contains(read, (user, server, room))?
    {
        return Ok(true);
    }
    let of_server =
        schema::INVITED.prefix::<(UserNum, String)>(read, (user, server), Direction::Up)?.take(OF_SERVER_MAX);
    if is_full(read, user, of_server.map(|row| row.map(|((.., room), ())| room)), OF_SERVER_MAX)? {
        return Ok(false);
    }
    let all = schema::INVITED.prefix::<(UserNum,)>(read, (user,), Direction::Up)?.take(OF_USER_MAX);
    Ok(!is_full(read, user, all.map(|row| row.map(|((.., room), ())| room)), OF_USER_MAX)?)
}

/// Whether this many of the invitations to these rooms still wait. Where there are fewer, no other row is read.
fn is_full(
    read: &(impl Read + ?Sized),
    user: UserNum,
    rooms: impl Iterator<Item = Result<RoomNum, Fault>>,
    max: usize,
) -> Result<bool, Fault> {
    let rooms = rooms.collect::<Result<Vec<_>, _>>()?;
    if rooms.len() < max {
        return Ok(false);
    }
    let rows = members::find_many(read, user, rooms)?;
    let waits = |membership| matches!(membership, Membership::Invite | Membership::Knock);
    Ok(rows.into_iter().flatten().filter(|row| waits(row.membership)).count() >= max)
}

/// Writes what was told of a room to a user, and the rows by which the invitations in it are counted.
pub(super) fn put(
    batch: &mut Batch,
    (room, user, user_id): (RoomNum, UserNum, &str),
    membership: Membership,
    row: OutsideRow,
) -> Result<(), Fault> {
    uncount(batch, room, user)?;
    if matches!(membership, Membership::Invite | Membership::Knock) {
        for server in inviters(&row).filter(|sender| *sender != user_id).filter_map(event::server_of) {
            schema::INVITED.put(batch, (user, server, room), &());
        }
    }
    schema::OUTSIDE.put(batch, (room, user), &Json(row));
    Ok(())
}

/// Deletes what was told of a room to a user, and no longer counts it.
pub(super) fn delete(batch: &mut Batch, room: RoomNum, user: UserNum) -> Result<(), Fault> {
    uncount(batch, room, user)?;
    schema::OUTSIDE.delete(batch, (room, user));
    Ok(())
}

fn uncount(batch: &mut Batch, room: RoomNum, user: UserNum) -> Result<(), Fault> {
    let Some(Json(row)) = schema::OUTSIDE.get(batch, (room, user))? else { return Ok(()) };
    let servers: BTreeSet<&str> = inviters(&row).filter_map(event::server_of).collect();
    for server in servers {
        if schema::INVITED.contains(batch, (user, server, room))? {
            schema::INVITED.delete(batch, (user, server, room));
        }
    }
    Ok(())
}

/// The users by whose word a row stands.
pub(crate) fn inviters(row: &OutsideRow) -> impl Iterator<Item = &str> {
    std::iter::once(row.sender.as_str()).chain(row.others.iter().map(|other| other.sender.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{EventNum, Position},
        schema::rooms::UserRoomRow,
        store::{Durability, Engine, Guard, Store, engine::Memory},
    };

    const BOB: UserNum = UserNum(1);

    fn write(store: &Store, build: impl FnOnce(&mut Batch)) {
        let mut batch = store.batch(&Guard::alone());
        build(&mut batch);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
    }

    fn invite(batch: &mut Batch, room: u64, server: &str) {
        let room = RoomNum(room);
        let row = UserRoomRow {
            membership: Membership::Invite,
            since: Position::ZERO,
            event: EventNum(0),
            forgotten: false,
            left: None,
            forgotten_below: None,
        };
        schema::USER_ROOM.put(batch, (BOB, room), &row.into());
        let told = OutsideRow {
            number: 0,
            sender: format!("@m:{server}"),
            event: "e".repeat(60_000),
            state: vec!["s".repeat(60_000)],
            ..OutsideRow::default()
        };
        put(batch, (room, BOB, "@bob:s"), Membership::Invite, told).unwrap();
    }

    #[test]
    fn a_count_reads_no_invitation_and_a_server_has_a_part() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        for room in 0..OF_SERVER_MAX as u64 {
            write(&store, |batch| invite(batch, room, "a.example"));
        }
        let Engine::Memory(memory) = store.engine() else { unreachable!() };
        let ask = |server: &str, room: Option<u64>| {
            let (snapshot, before) = (store.snapshot(), memory.reads());
            let may = may_wait(&*snapshot, (BOB, server), room.map(RoomNum)).unwrap();
            (may, memory.reads() - before)
        };
        let (may, reads) = ask("b.example", None);
        assert!(may && reads <= OF_SERVER_MAX as u64 + 2, "{reads}");
        let (may, reads) = ask("a.example", None);
        assert!(!may && reads <= 2 * OF_SERVER_MAX as u64 + 2, "{reads}");
        assert!(ask("a.example", Some(7)).0, "it takes the place of another");
        // One that was answered makes room, and what is told no more is not counted either.
        write(&store, |batch| delete(batch, RoomNum(7), BOB).unwrap());
        assert!(ask("a.example", None).0);
        write(&store, |batch| invite(batch, 7, "a.example"));
        assert!(!ask("a.example", None).0);
        write(&store, |batch| schema::USER_ROOM.delete(batch, (BOB, RoomNum(8))));
        assert!(ask("a.example", None).0);
        for room in 1_000..1_800 {
            write(&store, |batch| invite(batch, room, &format!("s{room}.example")));
        }
        assert!(ask("b.example", None).0, "one of the thousand is not waiting any more");
        write(&store, |batch| invite(batch, 8, "z.example"));
        assert!(!ask("b.example", None).0);
        // Another server's word for a room takes the place of the first, which is not counted any more.
        let snapshot = store.snapshot();
        assert!(!schema::INVITED.contains(&*snapshot, (BOB, "a.example", RoomNum(8))).unwrap());
    }
}
