//! Holds what other servers tell of a room that a user of ours is coming into, until the room is here: whoever lets the user in may tell the
//! room's events from then on, before their answer to the join has come, and tells each only once. The events are held in memory, because
//! the join itself ends with this run of the server; the batch with which the join counts stores them (`staged.rs`).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};

/// At most this many events of a room are held.
const OF_ROOM_MAX: usize = 64;
/// The events of a room that are held have at most this many bytes.
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
    events: Vec<HeldEvent>,
    bytes: usize,
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
        let of_room_bytes = of_room.bytes.saturating_add(json.len());
        if bytes > OF_ALL_BYTES_MAX
            || of_room_bytes > OF_ROOM_BYTES_MAX
            || of_room.events.len() >= OF_ROOM_MAX
        {
            return false;
        }
        of_room.bytes = of_room_bytes;
        // The request that brought the event would be kept whole for a part of it.
        let json = Bytes::copy_from_slice(json);
        of_room.events.push(HeldEvent { origin: origin.to_owned(), json });
        rooms.bytes = bytes;
        true
    }
}

impl Holding {
    /// Takes the events that came so far, in the order in which they came.
    pub(super) fn take(&self) -> Vec<HeldEvent> {
        let mut rooms = self.held.0.lock();
        let Some(of_room) = rooms.by_id.get_mut(&self.room) else { return Vec::new() };
        let bytes = std::mem::take(&mut of_room.bytes);
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
            let bytes = of_room.bytes;
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
    fn there_is_an_end_to_what_is_held() {
        let (held, origin) = (Held::default(), server_name!("x.example"));
        let large = |number: usize| Bytes::from(vec![u8::try_from(number).unwrap(); 60_000]);
        let rooms: Vec<_> = (0..20).map(|it| RoomId::parse(format!("!{it}:x.example")).unwrap()).collect();
        let holding: Vec<_> = rooms.iter().map(|room| held.begin(room)).collect();
        for room in &rooms {
            let kept = (0..200).filter(|number| held.hold(room, origin, &large(*number))).count();
            assert!(kept < 20, "{kept}");
        }
        assert!(held.0.lock().bytes <= OF_ALL_BYTES_MAX);
        assert!(!holding[0].take().is_empty());
        let small = (0..200).filter(|number| held.hold(&rooms[0], origin, &Bytes::from(vec![0; *number])));
        assert_eq!(small.count(), OF_ROOM_MAX);
        drop(holding);
        assert_eq!(held.0.lock().bytes, 0);
    }
}
