//! The public directory: rooms that anybody may find.
//!
//! Anybody may ask for the directory, without an account. So the order of its rooms is kept in memory and renewed by what
//! has changed, and the entry of a room is kept until something happens in that room. A page begins after a place in the
//! order and not after a number of rooms: whatever comes, goes or moves meanwhile, a room that does not change is told
//! once.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    ops::Bound,
    sync::Arc,
};

use parking_lot::Mutex;
use quick_cache::{Weighter, sync::Cache};
use ruma::{
    OwnedMxcUri, OwnedRoomId, UInt,
    directory::{PublicRoomsChunk, PublicRoomsChunkInit},
    room::{JoinRuleKind, RoomType},
};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    ids::{self, RoomNum},
    rooms::{
        self, aliases,
        visibility::{self, HistoryVisibility},
    },
    schema,
    schema::event_types::{AVATAR, CANONICAL_ALIAS, CREATE, GUEST_ACCESS, JOIN_RULES, NAME, TOPIC},
    schema::rooms::RoomRow,
    store::{Batch, Direction, Fault, Read, Snapshot, Store, Wake},
};

/// Whether a room is in the directory.
pub fn is_published(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    schema::PUBLISHED.contains(read, room)
}

/// Puts a room into the directory, or takes it out.
pub(crate) fn publish(batch: &mut Batch, room: RoomNum, published: bool) {
    if published {
        schema::PUBLISHED.put(batch, room, &());
    } else {
        schema::PUBLISHED.delete(batch, room);
    }
    batch.wake(Wake::Listed { room });
}

/// Whether users of other servers than the creator's may be in a room.
pub fn is_shared(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    #[derive(Deserialize)]
    struct Shared {
        #[serde(rename = "m.federate")]
        federate: Option<bool>,
    }
    let create = find_content::<Shared>(read, room, CREATE)?;
    Ok(create.and_then(|create| create.federate).unwrap_or(true))
}

/// Lists the rooms in the directory, by number.
fn list<'r>(
    read: &'r (impl Read + ?Sized),
) -> Result<impl Iterator<Item = Result<RoomNum, Fault>> + 'r, Fault> {
    let rows = schema::PUBLISHED.prefix::<()>(read, (), Direction::Up)?;
    Ok(rows.map(|row| row.map(|(room, ())| room)))
}

/// When this many rooms have changed since the order was renewed, all of it is read again, which costs less memory than to
/// remember more of them.
const CHANGED_MAX: usize = 10_000;

/// The place of a room in the directory: rooms with more members come first, and equal ones by their ids.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    joined: Reverse<u32>,
    room_id: OwnedRoomId,
}

impl Place {
    /// The place of a room with this many members.
    pub fn new(joined: u32, room_id: OwnedRoomId) -> Self {
        Self { joined: Reverse(joined), room_id }
    }

    /// The number of members with which the room has this place.
    pub fn joined(&self) -> u32 {
        self.joined.0
    }

    /// The id of the room.
    pub fn room_id(&self) -> &OwnedRoomId {
        &self.room_id
    }
}

/// The rooms in the directory, in the order in which it shows them.
#[derive(Default)]
pub struct Listing {
    order: Mutex<Order>,
    /// The rooms whose place may have changed. It has a lock of its own, because the flusher must not wait for those who
    /// read the directory.
    changed: Mutex<Changed>,
}

#[derive(Default)]
struct Order {
    rooms: BTreeMap<Place, RoomNum>,
    places: HashMap<RoomNum, Place>,
}

#[derive(Default)]
enum Changed {
    /// Nothing is known of the order.
    #[default]
    Everything,
    Rooms(BTreeSet<RoomNum>),
}

impl Listing {
    /// Notes, once that is visible, that a room came into the directory, left it, or has another number of members.
    pub fn touch(&self, room: RoomNum) {
        let mut changed = self.changed.lock();
        if let Changed::Rooms(rooms) = &mut *changed {
            rooms.insert(room);
            if rooms.len() > CHANGED_MAX {
                *changed = Changed::Everything;
            }
        }
    }

    /// Brings the order up to date, and gives a snapshot that is no older.
    pub fn renew(&self, store: &Store) -> Result<Arc<Snapshot>, Fault> {
        let mut order = self.order.lock();
        let changed = mem::replace(&mut *self.changed.lock(), Changed::Rooms(BTreeSet::new()));
        // A change is noted after it is visible, so that this snapshot has all changes that were noted.
        let snapshot = store.snapshot();
        let renewed = order.renew(&*snapshot, &changed);
        if renewed.is_err() {
            *self.changed.lock() = Changed::Everything;
        }
        renewed.map(|()| snapshot)
    }

    /// The number of rooms in the directory.
    pub fn len(&self) -> usize {
        self.order.lock().rooms.len()
    }

    /// Whether no room is in the directory.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lists at most `max` rooms after a place, or before it with the nearest one first. Without a place, it lists from the
    /// beginning or from the end.
    pub fn list(&self, from: Option<&Place>, direction: Direction, max: usize) -> Vec<(Place, RoomNum)> {
        let order = self.order.lock();
        let from = from.map_or(Bound::Unbounded, Bound::Excluded);
        let own = |(place, room): (&Place, &RoomNum)| (place.clone(), *room);
        match direction {
            Direction::Up => order.rooms.range((from, Bound::Unbounded)).take(max).map(own).collect(),
            Direction::Down => order.rooms.range((Bound::Unbounded, from)).rev().take(max).map(own).collect(),
        }
    }
}

impl Order {
    fn renew(&mut self, read: &(impl Read + ?Sized), changed: &Changed) -> Result<(), Fault> {
        match changed {
            Changed::Everything => {
                *self = Self::default();
                for room in list(read)? {
                    self.renew_room(read, room?)?;
                }
            }
            Changed::Rooms(rooms) => {
                for room in rooms {
                    self.renew_room(read, *room)?;
                }
            }
        }
        debug_assert_eq!(self.rooms.len(), self.places.len(), "each room has one place");
        Ok(())
    }

    fn renew_room(&mut self, read: &(impl Read + ?Sized), room: RoomNum) -> Result<(), Fault> {
        if let Some(place) = self.places.remove(&room) {
            self.rooms.remove(&place);
        }
        if is_published(read, room)?
            // Nobody is found in a room that everybody has left, or whose creator left while it was made. Of a room that
            // everybody here has left, we do not know who is in it now.
            && let Some(row) = rooms::find_row(read, room)?.filter(|row| row.resident.is_in())
            && row.joined > 0
        {
            let place = Place::new(row.joined, row.id);
            self.places.insert(room, place.clone());
            self.rooms.insert(place, room);
        }
        Ok(())
    }
}

/// Finds the content of a current state event; `None` where it is not what its type demands.
pub fn find_content<T: DeserializeOwned>(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event_type: &str,
) -> Result<Option<T>, Fault> {
    let event = rooms::find_state(read, room, event_type, "")?;
    Ok(event.and_then(|event| serde_json::from_str(event.row.content()).ok()))
}

#[derive(Deserialize)]
struct Name {
    name: String,
}
#[derive(Deserialize)]
struct Topic {
    topic: String,
}
#[derive(Deserialize)]
struct Avatar {
    url: OwnedMxcUri,
}
#[derive(Deserialize)]
struct Canonical {
    alias: ruma::OwnedRoomAliasId,
}
#[derive(Deserialize)]
struct Guests {
    guest_access: String,
}
#[derive(Deserialize)]
struct Rule {
    join_rule: JoinRuleKind,
}
#[derive(Deserialize)]
struct Create {
    #[serde(rename = "type")]
    room_type: Option<RoomType>,
}

/// Keep entries of at most this many bytes in all: those of a hundred thousand rooms. An answer looks at every room in
/// the directory, so a memory that holds fewer would hold nothing that the next answer needs.
const KEPT_BYTES_MAX: u64 = 64 << 20;
/// An entry takes about this many bytes beside its texts.
const DESCRIPTION_BYTES: u64 = 512;

/// A room's newest event, the newest change of its state and the number of its members, with which its entry is kept. A resolution
/// changes the state without an event, a redaction changes what an event says without changing the state, and members who are learnt
/// after a join without them were there all the time.
type Version = (ids::Order, ids::Order, u32);

/// The entries of rooms in the directory, each as of a version of the room.
pub struct Descriptions(Cache<RoomNum, (Version, Arc<PublicRoomsChunk>), Weigh>);

#[derive(Clone)]
struct Weigh;

impl Weighter<RoomNum, (Version, Arc<PublicRoomsChunk>)> for Weigh {
    fn weight(&self, _: &RoomNum, (_, chunk): &(Version, Arc<PublicRoomsChunk>)) -> u64 {
        DESCRIPTION_BYTES + text_bytes(chunk) as u64
    }
}

/// The bytes of all texts in an entry. Those who write a room's state choose the length of each of them.
pub fn text_bytes(chunk: &PublicRoomsChunk) -> usize {
    let texts = [
        chunk.name.as_deref(),
        chunk.topic.as_deref(),
        chunk.avatar_url.as_ref().map(|url| url.as_str()),
        chunk.canonical_alias.as_ref().map(|alias| alias.as_str()),
        chunk.room_type.as_ref().map(|room_type| room_type.as_str()),
        Some(chunk.join_rule.as_str()),
        Some(chunk.room_id.as_str()),
    ];
    texts.into_iter().flatten().map(str::len).sum()
}

impl Default for Descriptions {
    fn default() -> Self {
        let rooms = (KEPT_BYTES_MAX / DESCRIPTION_BYTES) as usize;
        Self(Cache::with_weighter(rooms, KEPT_BYTES_MAX, Weigh))
    }
}

impl Descriptions {
    /// Gives a room's entry, from memory where nothing has happened in the room since.
    pub fn of(
        &self,
        read: &(impl Read + ?Sized),
        num: RoomNum,
        room: &RoomRow,
    ) -> Result<Arc<PublicRoomsChunk>, Fault> {
        let version = (room.tip, room.state_tip, room.joined);
        let known = self.0.get(&num).filter(|(known, _)| *known == version);
        let chunk = match known {
            Some((_, chunk)) => chunk,
            None => {
                let chunk = Arc::new(describe(read, num, room)?);
                self.0.insert(num, (version, Arc::clone(&chunk)));
                chunk
            }
        };
        // Aliases come and go without an event in the room, so that they are asked for each time.
        if !names_another_room(read, num, &chunk)? {
            return Ok(chunk);
        }
        let mut chunk = (*chunk).clone();
        chunk.canonical_alias = None;
        Ok(Arc::new(chunk))
    }
}

/// Whether the canonical alias of an entry has been given to another room meanwhile. Of an alias of another server we know only
/// what the room says.
fn names_another_room(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    chunk: &PublicRoomsChunk,
) -> Result<bool, Fault> {
    let Some(alias) = &chunk.canonical_alias else { return Ok(false) };
    Ok(aliases::find(read, alias)?.is_some_and(|row| row.room != num))
}

/// Reads a room's entry from its current state.
fn describe(read: &(impl Read + ?Sized), num: RoomNum, room: &RoomRow) -> Result<PublicRoomsChunk, Fault> {
    let guests = find_content::<Guests>(read, num, GUEST_ACCESS)?;
    let mut chunk = PublicRoomsChunk::from(PublicRoomsChunkInit {
        num_joined_members: UInt::from(room.joined),
        room_id: room.id.clone(),
        world_readable: visibility::current(read, num)? == HistoryVisibility::WorldReadable,
        guest_can_join: guests.is_some_and(|guests| guests.guest_access == "can_join"),
    });
    let text = |text: String| (!text.is_empty()).then_some(text);
    chunk.name = find_content::<Name>(read, num, NAME)?.and_then(|content| text(content.name));
    chunk.topic = find_content::<Topic>(read, num, TOPIC)?.and_then(|content| text(content.topic));
    chunk.avatar_url = find_content::<Avatar>(read, num, AVATAR)?.map(|content| content.url);
    chunk.canonical_alias =
        find_content::<Canonical>(read, num, CANONICAL_ALIAS)?.map(|content| content.alias);
    chunk.join_rule = find_content::<Rule>(read, num, JOIN_RULES)?
        .map_or(JoinRuleKind::Invite, |content| content.join_rule);
    chunk.room_type = find_content::<Create>(read, num, CREATE)?.and_then(|content| content.room_type);
    Ok(chunk)
}

#[cfg(test)]
mod tests;
