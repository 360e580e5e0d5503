//! Holds what other servers tell of a room that a user of ours is coming into, until the room is here: whoever lets the user in may tell the
//! room's events from then on, before their answer to the join has come, and tells each only once. The events are held in memory, because
//! the join itself ends with this run of the server; the batch with which the join counts stores them (`staged.rs`). So is held what such
//! a server says of the presence of its users, who share no room with any of ours until then.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};

use crate::{accounts::presence::Presence, ids::UserNum, rooms::change::invited::Source};

/// The share of one host in a room that was asked to let the user in. Ten are asked at most.
const OF_ASKED: Share = Share { events_max: 64, bytes_max: 256 << 10 };
/// The share of all other names of one owner, so that none keeps another's out: what they say is not checked yet, and names cost nothing.
const OF_OTHER: Share = Share { events_max: 8, bytes_max: 64 << 10 };
/// The share of all those others in a room. Whoever has most there gives way to who has less.
const OF_OTHERS: Share = Share { events_max: 128, bytes_max: 1 << 20 };
/// The presence of at most this many users is held for a room.
const PRESENT_MAX: usize = 50;
/// The presence of a user takes this many bytes beside the name and the message.
const PRESENT_OVERHEAD: usize = 64;
/// The events of all rooms that are held because of one user have at most this many bytes.
const OF_USER_BYTES_MAX: usize = 4 << 20;
/// The events of all rooms that are held have at most this many bytes.
const OF_ALL_BYTES_MAX: usize = 32 << 20;

/// A bound on what is held.
#[derive(Clone, Copy, Debug)]
struct Share {
    events_max: usize,
    bytes_max: usize,
}

impl Share {
    /// The part of this share that so many events are, as a number by which those who have it are compared.
    fn weight(self, events: usize, bytes: usize) -> usize {
        (events * self.bytes_max).max(bytes * self.events_max)
    }

    /// Whether there is room for one event of so many bytes beside these.
    fn has_room_for<'h>(self, bytes: usize, held: impl Iterator<Item = &'h HeldEvent>) -> bool {
        let (count, sum) = held.fold((1, bytes), |(count, sum), held| (count + 1, sum + held.json.len()));
        // One event may be as large as events are.
        count <= self.events_max && (count == 1 || sum <= self.bytes_max)
    }
}

/// An event as it came, and the server that sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeldEvent {
    pub(super) origin: OwnedServerName,
    /// The owner of the server's name.
    source: Source,
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
    /// The users whose joins are under way, once for each.
    joins: Vec<UserNum>,
    /// The servers that were asked to let somebody in.
    asked: BTreeSet<OwnedServerName>,
    events: Vec<HeldEvent>,
    present: BTreeMap<OwnedUserId, Presence>,
}

impl OfRoom {
    fn bytes(&self) -> usize {
        let present = self.present.iter().map(|(user_id, said)| bytes_of(user_id, said));
        self.events.iter().map(|held| held.json.len()).chain(present).sum()
    }

    /// Whether the share of a server has room for an event of so many bytes. Of servers that were asked those of one host share, because ports
    /// cost nothing, and of others all names of one owner.
    fn is_within_share(&self, origin: &ServerName, bytes: usize) -> bool {
        if is_asked(&self.asked, origin) {
            let of_host = self.events.iter().filter(|held| held.origin.host() == origin.host());
            return OF_ASKED.has_room_for(bytes, of_host);
        }
        let own = Source::of(origin.as_str());
        OF_OTHER.has_room_for(bytes, self.of_others().filter(|held| held.source == own))
    }

    /// The events of servers that were not asked.
    fn of_others(&self) -> impl Iterator<Item = &HeldEvent> {
        self.events.iter().filter(|held| !is_asked(&self.asked, &held.origin))
    }

    /// Makes room for an event of so many bytes of a server that was not asked: the last of whoever has most gives way, as long as that is
    /// more than this one has then. Gives the bytes that are free by that; `None` where there is no room.
    fn make_room(&mut self, origin: &ServerName, bytes: usize) -> Option<usize> {
        if is_asked(&self.asked, origin) {
            return Some(0);
        }
        let (own, mut freed) = (Source::of(origin.as_str()), 0);
        while !OF_OTHERS.has_room_for(bytes, self.of_others()) {
            let mut held_by = BTreeMap::<&Source, (usize, usize)>::from([(&own, (1, bytes))]);
            for held in self.of_others() {
                let (events, sum) = held_by.entry(&held.source).or_default();
                (*events, *sum) = (*events + 1, *sum + held.json.len());
            }
            let weight = |(events, sum): (usize, usize)| OF_OTHER.weight(events, sum);
            let most = held_by.iter().map(|(source, held)| (weight(*held), *source)).max()?.1;
            if *most == own {
                return None;
            }
            let most = most.clone();
            let last = self.events.iter().rposition(|held| held.source == most)?;
            freed += self.events.remove(last).json.len();
        }
        Some(freed)
    }
}

/// Whether a server of the same host is among those that were asked.
fn is_asked(asked: &BTreeSet<OwnedServerName>, server: &ServerName) -> bool {
    asked.iter().any(|asked| asked.host() == server.host())
}

fn bytes_of(user_id: &UserId, said: &Presence) -> usize {
    user_id.as_str().len() + said.status_msg.as_ref().map_or(0, String::len) + PRESENT_OVERHEAD
}

impl Rooms {
    /// Whether somebody joins this room for whom not too much is held yet in all the rooms that they join: one who joins many keeps out
    /// nothing of others.
    fn is_within_share(&self, room: &RoomId, bytes: usize) -> bool {
        let of_user = |user: &UserNum| {
            let joined = self.by_id.values().filter(|of_room| of_room.joins.contains(user));
            joined.map(OfRoom::bytes).sum::<usize>().saturating_add(bytes) <= OF_USER_BYTES_MAX
        };
        self.by_id.get(room).is_some_and(|of_room| of_room.joins.iter().any(of_user))
    }
}

impl Rooms {
    /// Makes room for so many bytes of a room among those of all rooms: whoever has most held gives way, as long as that is more than
    /// those have by then who join this room.
    fn make_room(&mut self, room: &RoomId, bytes: usize) -> bool {
        while self.bytes.saturating_add(bytes) > OF_ALL_BYTES_MAX {
            let mut by_user = BTreeMap::<UserNum, usize>::new();
            for of_room in self.by_id.values() {
                let users: BTreeSet<UserNum> = of_room.joins.iter().copied().collect();
                users.into_iter().for_each(|user| *by_user.entry(user).or_default() += of_room.bytes());
            }
            let own = self.by_id.get(room).into_iter().flat_map(|of_room| &of_room.joins);
            let own = own.filter_map(|user| by_user.get(user)).min().copied().unwrap_or_default();
            let Some((most, held)) = by_user.into_iter().max_by_key(|(_, held)| *held) else { return false };
            if held <= own.saturating_add(bytes) {
                return false;
            }
            let of_most = self.by_id.iter_mut().filter(|(id, of_room)| {
                id.as_str() != room.as_str() && of_room.joins.contains(&most) && !of_room.events.is_empty()
            });
            let Some((_, largest)) = of_most.max_by_key(|(_, of_room)| of_room.bytes()) else { return false };
            let mut freed = 0;
            while freed < bytes
                && let Some(gone) = largest.events.pop()
            {
                freed += gone.json.len();
            }
            self.bytes = self.bytes.saturating_sub(freed);
        }
        true
    }
}

/// A join during which the events of its room are held. What nobody has taken is dropped with the last of a room.
pub(super) struct Holding {
    held: Held,
    room: OwnedRoomId,
    user: UserNum,
}

impl Held {
    /// Has the events of this room held, which this user joins.
    pub(super) fn begin(&self, room: &RoomId, user: UserNum) -> Holding {
        self.0.lock().by_id.entry(room.to_owned()).or_default().joins.push(user);
        Holding { held: self.clone(), room: room.to_owned(), user }
    }

    /// Holds an event of a room that somebody is coming into. Gives `false` where nobody is, and where there is no place for it.
    pub(super) fn hold(&self, room: &RoomId, origin: &ServerName, json: &Bytes) -> bool {
        let mut rooms = self.0.lock();
        let Some(of_room) = rooms.by_id.get(room) else { return false };
        if of_room.events.iter().any(|held| held.json == *json) {
            return true;
        }
        let is_within =
            of_room.is_within_share(origin, json.len()) && rooms.is_within_share(room, json.len());
        if !is_within || !rooms.make_room(room, json.len()) {
            return false;
        }
        let Some(freed) = rooms.by_id.get_mut(room).and_then(|of_room| of_room.make_room(origin, json.len()))
        else {
            return false;
        };
        let bytes = rooms.bytes.saturating_sub(freed).saturating_add(json.len());
        let Some(of_room) = rooms.by_id.get_mut(room) else { return false };
        // The request that brought the event would be kept whole for a part of it.
        let json = Bytes::copy_from_slice(json);
        of_room.events.push(HeldEvent {
            origin: origin.to_owned(),
            source: Source::of(origin.as_str()),
            json,
        });
        rooms.bytes = bytes;
        true
    }

    /// Whether a server was asked to let somebody into this room, and may tell its events by now.
    pub(super) fn is_asked(&self, room: &RoomId, server: &ServerName) -> bool {
        let rooms = self.0.lock();
        rooms.by_id.get(room).is_some_and(|of_room| is_asked(&of_room.asked, server))
    }

    /// Holds what the server of a user says of the user's presence, for the rooms into which that server was asked to let somebody.
    pub(super) fn hold_presence(&self, user_id: &UserId, said: &Presence) {
        let mut rooms = self.0.lock();
        let Rooms { by_id, bytes } = &mut *rooms;
        for of_room in by_id.values_mut().filter(|of_room| of_room.asked.contains(user_id.server_name())) {
            let before = of_room.present.get(user_id).map_or(0, |before| bytes_of(user_id, before));
            let after = (*bytes - before).saturating_add(bytes_of(user_id, said));
            if after <= OF_ALL_BYTES_MAX && (before > 0 || of_room.present.len() < PRESENT_MAX) {
                *bytes = after;
                of_room.present.insert(user_id.to_owned(), said.clone());
            }
        }
    }
}

impl Holding {
    /// Notes that a server is asked to let the user in, which tells the room's events from then on.
    pub(super) fn note_asked(&self, server: &ServerName) {
        if let Some(of_room) = self.held.0.lock().by_id.get_mut(&self.room) {
            of_room.asked.insert(server.to_owned());
        }
    }

    /// Whether no event waits to be taken.
    pub(super) fn is_empty(&self) -> bool {
        self.held.0.lock().by_id.get(&self.room).is_none_or(|of_room| of_room.events.is_empty())
    }

    /// Takes some of the events that came so far, in the order in which they came: those of servers that were asked come first, and all
    /// that are taken have at most this many bytes.
    pub(super) fn take(&self, bytes_max: usize) -> Vec<HeldEvent> {
        self.take_part(|of_room| {
            let mut taken = std::mem::take(&mut of_room.events);
            taken.sort_by_key(|held| !is_asked(&of_room.asked, &held.origin));
            let mut bytes = 0_usize;
            let fits = |held: &&HeldEvent| {
                bytes = bytes.saturating_add(held.json.len());
                bytes <= bytes_max
            };
            let count = taken.iter().take_while(fits).count();
            of_room.events = taken.split_off(count);
            taken
        })
    }

    /// Takes what was said of the presence of users.
    pub(super) fn take_presence(&self) -> BTreeMap<OwnedUserId, Presence> {
        self.take_part(|of_room| std::mem::take(&mut of_room.present))
    }

    /// Takes a part of what is held for the room, whose bytes are free then.
    fn take_part<T: Default>(&self, take: impl FnOnce(&mut OfRoom) -> T) -> T {
        let mut rooms = self.held.0.lock();
        let Some(of_room) = rooms.by_id.get_mut(&self.room) else { return T::default() };
        let before = of_room.bytes();
        let part = take(of_room);
        let bytes = before - of_room.bytes();
        rooms.bytes = rooms.bytes.saturating_sub(bytes);
        part
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut rooms = self.held.0.lock();
        let Some(of_room) = rooms.by_id.get_mut(&self.room) else { return };
        if let Some(at) = of_room.joins.iter().position(|user| *user == self.user) {
            of_room.joins.swap_remove(at);
        }
        if of_room.joins.is_empty() {
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
        let (first, second) = (held.begin(room, UserNum(1)), held.begin(room, UserNum(1)));
        assert!(!held.hold(room_id!("!other:x.example"), origin, &one));
        assert!(held.hold(room, origin, &one) && held.hold(room, origin, &other));
        assert!(held.hold(room, origin, &one), "it is held already");
        let taken: Vec<_> = first.take(usize::MAX).into_iter().map(|event| event.json).collect();
        assert_eq!(taken, [one.clone(), other]);
        assert!(second.take(usize::MAX).is_empty());
        assert!(held.hold(room, origin, &one));
        drop(first);
        assert_eq!(held.0.lock().bytes, 2);
        drop(second);
        assert_eq!(held.0.lock().bytes, 0);
        assert!(!held.hold(room, origin, &one));
    }

    #[test]
    fn presence_is_held_of_users_of_servers_that_were_asked() {
        let (held, room) = (Held::default(), room_id!("!room:x.example"));
        let user = |number: usize, server: &str| UserId::parse(format!("@u{number}:{server}")).unwrap();
        let said = |message: &str| Presence { status_msg: Some(message.to_owned()), ..Presence::unknown() };
        held.hold_presence(&user(0, "x.example"), &said("nobody comes"));
        let holding = held.begin(room, UserNum(1));
        held.hold_presence(&user(0, "x.example"), &said("nobody was asked"));
        holding.note_asked(&ServerName::parse("x.example").unwrap());
        for number in 0..100 {
            held.hold_presence(&user(number, "y.example"), &said("not asked"));
            held.hold_presence(&user(number, "x.example"), &said("first"));
            held.hold_presence(&user(number, "x.example"), &said("second"));
        }
        held.hold(room, server_name!("x.example"), &Bytes::from_static(b"{}"));
        assert_eq!(holding.take(usize::MAX).len(), 1);
        let taken = holding.take_presence();
        assert_eq!(taken.len(), PRESENT_MAX);
        assert!(taken.values().all(|it| *it == said("second")));
        assert!(holding.take_presence().is_empty());
        assert_eq!(held.0.lock().bytes, 0);
    }

    #[test]
    fn a_server_that_was_not_asked_keeps_no_other_out() {
        let (held, room) = (Held::default(), room_id!("!room:x.example"));
        let [host, evil, other] =
            ["x.example", "evil.example", "y.example"].map(|it| ServerName::parse(it).unwrap());
        let holding = held.begin(room, UserNum(1));
        holding.note_asked(&host);
        let event = |number: usize| Bytes::from(number.to_string());
        let count = |origin: &ServerName, from: usize| {
            (from..from + 500).filter(|number| held.hold(room, origin, &event(*number))).count()
        };
        assert_eq!(count(&evil, 0), OF_OTHER.events_max);
        assert_eq!(count(&host, 1_000), OF_ASKED.events_max);
        assert_eq!(count(&other, 2_000), OF_OTHER.events_max);
        for number in 0..100 {
            count(&ServerName::parse(format!("{number}.example")).unwrap(), 3_000 + 500 * number);
        }
        assert!(
            held.hold(room, &ServerName::parse("late.other").unwrap(), &event(9_000_000)),
            "whoever has most gives way"
        );
        assert_eq!(holding.take(usize::MAX).len(), OF_ASKED.events_max + OF_OTHERS.events_max);
    }

    #[test]
    fn neither_ports_nor_large_events_of_one_keep_another_out() {
        let (held, room) = (Held::default(), room_id!("!room:x.example"));
        let holding = held.begin(room, UserNum(1));
        let asked = ["first.example", "x.example"].map(|it| ServerName::parse(it).unwrap());
        asked.iter().for_each(|server| holding.note_asked(server));
        let large = |number: u8| Bytes::from(vec![number; 60_000]);
        let hold =
            |server: &str, number: u8| held.hold(room, &ServerName::parse(server).unwrap(), &large(number));
        let taken =
            (0..100).filter(|number| hold(&format!("1.2.3.4:{}", 1_000 + u16::from(*number)), *number));
        assert_eq!(taken.count(), 1, "five ports are one host");
        assert!(hold("third.example", 101));
        assert!((102..150).filter(|number| hold("first.example", *number)).count() < 10);
        assert!(hold("x.example", 151), "another that was asked has a share of its own");
        assert_eq!(holding.take(usize::MAX).len(), 2 + OF_ASKED.bytes_max / 60_000 + 1);
    }

    #[test]
    fn events_are_taken_in_parts_and_first_those_of_servers_that_were_asked() {
        let (held, room) = (Held::default(), room_id!("!room:x.example"));
        let holding = held.begin(room, UserNum(1));
        holding.note_asked(server_name!("x.example"));
        let large = |number: u8| Bytes::from(vec![number; 60_000]);
        for number in 0..10 {
            let origin = ServerName::parse(format!("{number}.example")).unwrap();
            assert!(held.hold(room, &origin, &large(number)));
        }
        assert!(held.hold(room, server_name!("x.example:1"), &large(10)));
        let take = |bytes_max| holding.take(bytes_max).iter().map(|held| held.json[0]).collect::<Vec<_>>();
        assert!(take(59_999).is_empty());
        assert_eq!(take(200_000), [10, 0, 1]);
        assert_eq!(held.0.lock().bytes, 8 * 60_000);
        assert_eq!(take(60_000), [2]);
        assert_eq!(take(usize::MAX), [3, 4, 5, 6, 7, 8, 9]);
        assert!(holding.is_empty());
        assert_eq!(held.0.lock().bytes, 0);
    }

    #[test]
    fn one_who_joins_many_rooms_keeps_nothing_of_others_out() {
        let held = Held::default();
        let rooms: Vec<_> = (0..40).map(|it| RoomId::parse(format!("!{it}:x.example")).unwrap()).collect();
        let fill = |room: &RoomId| {
            for number in 0..20_u8 {
                let origin = ServerName::parse(format!("{number}.example")).unwrap();
                held.hold(room, &origin, &Bytes::from(vec![number; 60_000]));
            }
        };
        let _many: Vec<_> = rooms.iter().map(|room| held.begin(room, UserNum(1))).collect();
        rooms.iter().for_each(|room| fill(room));
        assert!(held.0.lock().bytes <= OF_USER_BYTES_MAX);
        let other = room_id!("!other:x.example");
        let holding = held.begin(other, UserNum(2));
        let shared = held.begin(&rooms[39], UserNum(2));
        assert!(held.hold(other, server_name!("x.example"), &Bytes::from_static(b"{}")));
        assert!(held.hold(&rooms[39], server_name!("x.example"), &Bytes::from_static(b"{}")));
        assert_eq!((holding.take(usize::MAX).len(), shared.take(usize::MAX).len()), (1, 1));
    }

    #[test]
    fn whoever_has_most_held_gives_way() {
        let held = Held::default();
        let rooms: Vec<_> = (0..36).map(|it| RoomId::parse(format!("!{it}:x.example")).unwrap()).collect();
        let users = (0..).map(|number| UserNum(number / 4));
        let _holding: Vec<_> = rooms.iter().zip(users).map(|(room, user)| held.begin(room, user)).collect();
        for room in &rooms {
            for number in 0..17_u8 {
                let origin = ServerName::parse(format!("{number}.example")).unwrap();
                held.hold(room, &origin, &Bytes::from(vec![number; 60_000]));
            }
        }
        assert!(held.0.lock().bytes > OF_ALL_BYTES_MAX - 60_000, "all places are taken");
        let other = room_id!("!other:x.example");
        let holding = held.begin(other, UserNum(1_000));
        for number in 0..17_u8 {
            let origin = ServerName::parse(format!("{number}.example")).unwrap();
            assert!(held.hold(other, &origin, &Bytes::from(vec![number; 60_000])), "{number}");
        }
        assert!(held.0.lock().bytes <= OF_ALL_BYTES_MAX);
        assert_eq!(holding.take(usize::MAX).len(), 17);
        let rooms = held.0.lock();
        assert_eq!(rooms.bytes, rooms.by_id.values().map(OfRoom::bytes).sum::<usize>());
    }

    #[test]
    fn there_is_an_end_to_what_is_held() {
        let held = Held::default();
        let rooms: Vec<_> = (0..20).map(|it| RoomId::parse(format!("!{it}:x.example")).unwrap()).collect();
        let users = (0..).map(|number| UserNum(number / 2));
        let holding: Vec<_> = rooms.iter().zip(users).map(|(room, user)| held.begin(room, user)).collect();
        for room in &rooms {
            for number in 0..50_u8 {
                let origin = ServerName::parse(format!("{number}.example")).unwrap();
                for of_origin in 0..2 {
                    held.hold(room, &origin, &Bytes::from(vec![2 * number + of_origin; 60_000]));
                }
            }
        }
        assert!(held.0.lock().bytes <= OF_ALL_BYTES_MAX);
        assert_eq!(holding[0].take(usize::MAX).len(), OF_OTHERS.bytes_max / 60_000);
        drop(holding);
        assert_eq!(held.0.lock().bytes, 0);
    }
}
