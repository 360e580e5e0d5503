//! The rows about servers that do not answer: one mark for each room in which a server misses events, one for each user of ours of
//! whose devices it misses changes, and a note of when it is tried again. A healthy server has no row.

use std::{collections::BTreeSet, ops::Bound};

use federation::queue::Mark;

use crate::{
    delivery::servers::subject::Subject,
    ids::{Position, RoomNum, UserNum},
    schema::{self, remote::DestinationRow},
    store::{Batch, Direction, Fault, Guard, NotAccepted, Read, Store, Write, key::Json},
};

/// Marks a room or a user for a server. Of two marks the older one is kept, because it says from where on something is missed.
pub(super) fn keep(batch: &mut Batch, server: &str, mark: Mark<Subject, Position>) -> Result<(), Fault> {
    let is_older = |known: Option<Position>| known.is_none_or(|known| known > mark.place);
    match mark.subject {
        Subject::Room(room) => {
            if is_older(schema::BEHIND.get(batch, (server, room))?) {
                schema::BEHIND.put(batch, (server, room), &mark.place);
            }
        }
        Subject::Devices(user) => {
            if is_older(schema::DEVICES_BEHIND.get(batch, (server, user))?) {
                schema::DEVICES_BEHIND.put(batch, (server, user), &mark.place);
            }
        }
    }
    Ok(())
}

/// Takes marks away. If that is lost with a crash, the server is told once more.
pub(super) fn forget(store: &Store, server: &str, subjects: &[Subject]) -> Result<(), NotAccepted> {
    let mut note = store.note(&Guard::own_tables());
    for subject in subjects {
        match subject {
            Subject::Room(room) => schema::BEHIND.delete(&mut note, (server, *room)),
            Subject::Devices(user) => schema::DEVICES_BEHIND.delete(&mut note, (server, *user)),
        }
    }
    store.enqueue_note(note).map(drop)
}

/// Lists at most `count` marks of a server, each with the first that it misses: users by number, then rooms by number.
pub(super) fn list(
    read: &(impl Read + ?Sized),
    server: &str,
    count: usize,
) -> Result<Vec<Mark<Subject, Position>>, Fault> {
    let users = schema::DEVICES_BEHIND.prefix::<(String,)>(read, (server,), Direction::Up)?;
    let users =
        users.map(|row| row.map(|((_, user), place)| Mark { subject: Subject::Devices(user), place }));
    let mut marks = users.take(count).collect::<Result<Vec<_>, _>>()?;
    let rooms = list_rooms(read, server, count - marks.len())?;
    marks.extend(rooms.into_iter().map(|(room, place)| Mark { subject: Subject::Room(room), place }));
    Ok(marks)
}

/// Lists the rooms in which a server misses events, by number, each with the first that it misses; at most `rooms_max`.
pub(super) fn list_rooms(
    read: &(impl Read + ?Sized),
    server: &str,
    rooms_max: usize,
) -> Result<Vec<(RoomNum, Position)>, Fault> {
    let rows = schema::BEHIND.prefix::<(String,)>(read, (server,), Direction::Up)?;
    rows.take(rooms_max).map(|row| row.map(|((_, room), place)| (room, place))).collect()
}

/// Lists the servers that miss something, which costs as much as there are servers and not as there are marks.
pub(super) fn list_behind(read: &(impl Read + ?Sized)) -> Result<Vec<String>, Fault> {
    let mut servers = BTreeSet::<String>::new();
    let mut last: Option<String> = None;
    loop {
        let low = last.as_ref().map_or(Bound::Unbounded, |last| Bound::Excluded((last.as_str(),)));
        let mut rows = schema::BEHIND.range::<(String,)>(read, low, Bound::Unbounded, Direction::Up)?;
        let Some(row) = rows.next() else { break };
        let ((server, _), _): ((String, RoomNum), Position) = row?;
        servers.insert(server.clone());
        last = Some(server);
    }
    last = None;
    loop {
        let low = last.as_ref().map_or(Bound::Unbounded, |last| Bound::Excluded((last.as_str(),)));
        let mut rows =
            schema::DEVICES_BEHIND.range::<(String,)>(read, low, Bound::Unbounded, Direction::Up)?;
        let Some(row) = rows.next() else { break };
        let ((server, _), _): ((String, UserNum), Position) = row?;
        servers.insert(server.clone());
        last = Some(server);
    }
    Ok(servers.into_iter().collect())
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
    fn the_oldest_mark_of_a_room_or_a_user_is_kept_and_servers_are_listed_once() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::own_tables());
        let room = |number| Subject::Room(RoomNum(number));
        let user = |number| Subject::Devices(UserNum(number));
        for (server, subject, place) in [
            ("b.example", room(1), 7),
            ("b.example", room(1), 5),
            ("b.example", user(1), 6),
            ("b.example", room(1), 9),
            ("b.example", room(2), 3),
            ("b.example", user(1), 4),
            ("c", user(1), 1),
            ("a", room(1), 1),
        ] {
            let mark = Mark { subject, place: Position::new(place).unwrap() };
            keep(&mut batch, server, mark).unwrap();
        }
        drop(store.enqueue(batch).unwrap());
        let marks = |max| -> Vec<_> {
            let marks = list(&store.view(), "b.example", max).unwrap();
            marks.iter().map(|mark| (mark.subject, mark.place.number())).collect()
        };
        assert_eq!(marks(9), [(user(1), 4), (room(1), 5), (room(2), 3)]);
        assert_eq!(marks(2), [(user(1), 4), (room(1), 5)]);
        assert_eq!(marks(1), [(user(1), 4)]);
        assert_eq!(list_rooms(&store.view(), "b.example", 9).unwrap().len(), 2);
        assert_eq!(list_behind(&store.view()).unwrap(), ["a", "b.example", "c"]);
        forget(&store, "b.example", &[room(1), user(1)]).unwrap();
        assert_eq!(marks(9), [(room(2), 3)]);
    }
}
