//! Holds what other servers tell of a room that a user of ours is coming into, until the room is here: whoever lets the user in may tell the
//! room's events from then on, before their answer to the join has come, and tells each only once. The events are held in memory, because
//! the join itself ends with this run of the server; the batch with which the join counts stores them (`staged.rs`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};

/// At most this many events of a room are held that came from one server that was asked to let the user in.
const OF_ASKED_MAX: usize = 64;
/// At most this many that came from any other server, so that one alone keeps no other's out: what they say is not checked yet.
const OF_OTHER_MAX: usize = 8;
/// At most this many from all those others.
const OF_OTHERS_MAX: usize = 128;
/// The events of a room that are held have at most this many bytes from servers that were asked, and as many from others.
const OF_ROOM_BYTES_MAX: usize = 1 << 20;
/// The events of all rooms that are held have at most this many bytes.
const OF_ALL_BYTES_MAX: usize = 16 << 20;

/// An event as it came, and the server that sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeldEvent {
    pub(super) origin: OwnedServerName,
    pub(super) json: Bytes,
}

/// The events that are held, by room. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Held(Arc<Mutex<Rooms>>);

#[derive(Default)]
struct Rooms {
    by_id: BTreeMap<OwnedRoomId, OfRoom>,
    bytes: usize,
}

#[derive(Default)]
struct OfRoom {
    /// The number of joins that are under way.
    joins: usize,
    /// The servers that were asked to let somebody in.
    asked: BTreeSet<OwnedServerName>,
    events: Vec<HeldEvent>,
}

impl OfRoom {
    fn bytes(&self) -> usize {
        self.events.iter().map(|held| held.json.len()).sum()
    }

    /// Whether there is a place for an event of so many bytes that this server sent.
    fn has_room_for(&self, origin: &ServerName, bytes: usize) -> bool {
        let is_asked = self.asked.contains(origin);
        let alike = self.events.iter().filter(|held| self.asked.contains(&held.origin) == is_asked);
        let (count, held) =
            alike.fold((0, bytes), |(count, bytes), held| (count + 1, bytes + held.json.len()));
        let of_origin = self.events.iter().filter(|held| held.origin == origin).count();
        let is_full = if is_asked {
            of_origin >= OF_ASKED_MAX
        } else {
            of_origin >= OF_OTHER_MAX || count >= OF_OTHERS_MAX
        };
        !is_full && held <= OF_ROOM_BYTES_MAX
    }
}

/// A join during which the events of its room are held. What nobody has taken is dropped with the last of a room.
pub(super) struct Holding {
    held: Held,
    room: OwnedRoomId,
}

impl Held {
    /// Has the events of this room held.
    pub(super) fn begin(&self, room: &RoomId) -> Holding {
        self.0.lock().by_id.entry(room.to_owned()).or_default().joins += 1;
        Holding { held: self.clone(), room: room.to_owned() }
    }

    /// Holds an event of a room that somebody is coming into. Gives `false` where nobody is, and where there is no place for it.
    pub(super) fn hold(&self, room: &RoomId, origin: &ServerName, json: &Bytes) -> bool {
        let mut rooms = self.0.lock();
        let bytes = rooms.bytes.saturating_add(json.len());
        let Some(of_room) = rooms.by_id.get_mut(room) else { return false };
        if of_room.events.iter().any(|held| held.json == *json) {
            return true;
        }
        if bytes > OF_ALL_BYTES_MAX || !of_room.has_room_for(origin, json.len()) {
            return false;
        }
        // The request that brought the event would be kept whole for a part of it.
        let json = Bytes::copy_from_slice(json);
        of_room.events.push(HeldEvent { origin: origin.to_owned(), json });
        rooms.bytes = bytes;
        true
    }
}

impl Holding {
    /// Notes that a server is asked to let the user in, which tells the room's events from then on.
    pub(super) fn note_asked(&self, server: &ServerName) {
        if let Some(of_room) = self.held.0.lock().by_id.get_mut(&self.room) {
            of_room.asked.insert(server.to_owned());
        }
    }

    /// Takes the events that came so far, in the order in which they came.
    pub(super) fn take(&self) -> Vec<HeldEvent> {
        let mut rooms = self.held.0.lock();
        let Some(of_room) = rooms.by_id.get_mut(&self.room) else { return Vec::new() };
        let bytes = of_room.bytes();
        let events = std::mem::take(&mut of_room.events);
        rooms.bytes = rooms.bytes.saturating_sub(bytes);
        events
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut rooms = self.held.0.lock();
        let Some(of_room) = rooms.by_id.get_mut(&self.room) else { return };
        of_room.joins = of_room.joins.saturating_sub(1);
        if of_room.joins == 0 {
            let bytes = of_room.bytes();
            rooms.by_id.remove(&self.room);
            rooms.bytes = rooms.bytes.saturating_sub(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name};

    use super::*;

    #[test]
    fn events_are_held_only_while_a_join_is_under_way_and_taken_once() {
        let (held, room, origin) = (Held::default(), room_id!("!room:x.example"), server_name!("x.example"));
        let (one, other) = (Bytes::from_static(b"{}"), Bytes::from_static(b"[]"));
        assert!(!held.hold(room, origin, &one));
        let (first, second) = (held.begin(room), held.begin(room));
        assert!(!held.hold(room_id!("!other:x.example"), origin, &one));
        assert!(held.hold(room, origin, &one) && held.hold(room, origin, &other));
        assert!(held.hold(room, origin, &one), "it is held already");
        let taken: Vec<_> = first.take().into_iter().map(|event| event.json).collect();
        assert_eq!(taken, [one.clone(), other]);
        assert!(second.take().is_empty());
        assert!(held.hold(room, origin, &one));
        drop(first);
        assert_eq!(held.0.lock().bytes, 2);
        drop(second);
        assert_eq!(held.0.lock().bytes, 0);
        assert!(!held.hold(room, origin, &one));
    }

    #[test]
    fn a_server_that_was_not_asked_keeps_no_other_out() {
        let (held, room) = (Held::default(), room_id!("!room:x.example"));
        let [host, evil, other] =
            ["x.example", "evil.example", "y.example"].map(|it| ServerName::parse(it).unwrap());
        let holding = held.begin(room);
        holding.note_asked(&host);
        let event = |number: usize| Bytes::from(number.to_string());
        let count = |origin: &ServerName, from: usize| {
            (from..from + 500).filter(|number| held.hold(room, origin, &event(*number))).count()
        };
        assert_eq!(count(&evil, 0), OF_OTHER_MAX);
        assert_eq!(count(&host, 1_000), OF_ASKED_MAX);
        assert_eq!(count(&other, 2_000), OF_OTHER_MAX);
        for number in 0..100 {
            count(&ServerName::parse(format!("{number}.example")).unwrap(), 3_000 + 500 * number);
        }
        assert_eq!(holding.take().len(), OF_ASKED_MAX + OF_OTHERS_MAX);
    }

    #[test]
    fn there_is_an_end_to_what_is_held() {
        let held = Held::default();
        let rooms: Vec<_> = (0..20).map(|it| RoomId::parse(format!("!{it}:x.example")).unwrap()).collect();
        let holding: Vec<_> = rooms.iter().map(|room| held.begin(room)).collect();
        for room in &rooms {
            for number in 0..50_u8 {
                let origin = ServerName::parse(format!("{number}.example")).unwrap();
                for of_origin in 0..2 {
                    held.hold(room, &origin, &Bytes::from(vec![2 * number + of_origin; 60_000]));
                }
            }
        }
        assert!(held.0.lock().bytes <= OF_ALL_BYTES_MAX);
        assert_eq!(holding[0].take().len(), OF_ROOM_BYTES_MAX / 60_000);
        drop(holding);
        assert_eq!(held.0.lock().bytes, 0);
    }
}
