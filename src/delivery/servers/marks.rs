//! The rows about servers that do not answer: one mark for each room in which a server misses events, and a note of when it is
//! tried again. A healthy server has no row.

use std::ops::Bound;

use federation::queue::Mark;

use crate::{
    ids::{Position, RoomNum},
    schema::{self, remote::DestinationRow},
    store::{Batch, Direction, Fault, Guard, NotAccepted, Read, Store, Write, key::Json},
};

/// Marks a room for a server. Of two marks of a room the older one is kept, because it says from where on events are missed.
pub(super) fn keep(batch: &mut Batch, server: &str, mark: Mark<RoomNum, Position>) -> Result<(), Fault> {
    let key = (server, mark.room);
    let known = schema::BEHIND.get(batch, key)?;
    if known.is_none_or(|known| known > mark.place) {
        schema::BEHIND.put(batch, key, &mark.place);
    }
    Ok(())
}

/// Takes the marks of rooms away. If that is lost with a crash, the server is told of the rooms once more.
pub(super) fn forget(store: &Store, server: &str, rooms: &[RoomNum]) -> Result<(), NotAccepted> {
    let mut note = store.note(&Guard::own_tables());
    for room in rooms {
        schema::BEHIND.delete(&mut note, (server, *room));
    }
    store.enqueue_note(note).map(drop)
}

/// Lists the rooms in which a server misses events, by number, each with the first that it misses; at most `rooms_max`.
pub(super) fn list(
    read: &(impl Read + ?Sized),
    server: &str,
    rooms_max: usize,
) -> Result<Vec<Mark<RoomNum, Position>>, Fault> {
    let rows = schema::BEHIND.prefix::<(String,)>(read, (server,), Direction::Up)?;
    let marks = rows.map(|row| row.map(|((_, room), place)| Mark { room, place }));
    marks.take(rooms_max).collect()
}

/// Lists the servers that miss events, which costs as much as there are servers and not as there are rooms.
pub(super) fn list_behind(read: &(impl Read + ?Sized)) -> Result<Vec<String>, Fault> {
    let mut servers: Vec<String> = Vec::new();
    loop {
        let low = servers.last().map_or(Bound::Unbounded, |last| Bound::Excluded((last.as_str(),)));
        let mut rows = schema::BEHIND.range::<(String,)>(read, low, Bound::Unbounded, Direction::Up)?;
        let Some(row) = rows.next() else { return Ok(servers) };
        let ((server, _), _) = row?;
        drop(rows);
        servers.push(server);
    }
}

/// Notes that a server does not answer.
pub(super) fn note_failing(to: &mut impl Write, server: &str, row: DestinationRow) {
    schema::DESTINATION.put(to, server, &Json(row));
}

/// Notes that a server answers again.
pub(super) fn note_back(to: &mut impl Write, server: &str) {
    schema::DESTINATION.delete(to, server);
}

/// Gives what is known of a server that does not answer.
pub(super) fn find_failing(
    read: &(impl Read + ?Sized),
    server: &str,
) -> Result<Option<DestinationRow>, Fault> {
    Ok(schema::DESTINATION.get(read, server)?.map(|Json(row)| row))
}

/// Lists all servers that do not answer.
pub(super) fn list_failing(read: &(impl Read + ?Sized)) -> Result<Vec<(String, DestinationRow)>, Fault> {
    let rows = schema::DESTINATION.prefix::<()>(read, (), Direction::Up)?;
    rows.map(|row| row.map(|(server, Json(row))| (server, row))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, engine::Memory};

    #[test]
    fn the_oldest_mark_of_a_room_is_kept_and_servers_are_listed_once() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::own_tables());
        for (server, room, place) in
            [("b.example", 1, 7), ("b.example", 1, 5), ("b.example", 1, 9), ("b.example", 2, 3), ("c", 1, 1)]
        {
            let mark = Mark { room: RoomNum(room), place: Position::new(place).unwrap() };
            keep(&mut batch, server, mark).unwrap();
        }
        drop(store.enqueue(batch).unwrap());
        let numbers = |max| -> Vec<_> {
            let marks = list(&store.view(), "b.example", max).unwrap();
            marks.iter().map(|mark| (mark.room.0, mark.place.number())).collect()
        };
        assert_eq!(numbers(9), [(1, 5), (2, 3)]);
        assert_eq!(numbers(1), [(1, 5)]);
        assert_eq!(list_behind(&store.view()).unwrap(), ["b.example", "c"]);
        forget(&store, "b.example", &[RoomNum(1)]).unwrap();
        assert_eq!(numbers(9), [(2, 3)]);
    }
}
