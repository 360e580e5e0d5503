//! The public directory: rooms that anybody may find.
//!
//! Anybody may ask for the directory, without an account, and each answer looks at every room in it. So the entry of a
//! room is kept in memory until something happens in that room.

use std::sync::Arc;

use quick_cache::{Weighter, sync::Cache};
use ruma::{
    OwnedMxcUri, UInt,
    directory::{PublicRoomsChunk, PublicRoomsChunkInit},
    room::{JoinRuleKind, RoomType},
};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    ids::{Order, RoomNum},
    rooms::{
        self, aliases,
        visibility::{self, HistoryVisibility},
    },
    schema,
    schema::rooms::RoomRow,
    store::{Batch, Direction, Fault, Read},
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
}

/// Lists the rooms in the directory.
pub fn list<'r>(
    read: &'r (impl Read + ?Sized),
) -> Result<impl Iterator<Item = Result<RoomNum, Fault>> + 'r, Fault> {
    let rows = schema::PUBLISHED.prefix::<()>(read, (), Direction::Up)?;
    Ok(rows.map(|row| row.map(|(room, ())| room)))
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

/// The entries of rooms in the directory, each as of the room's newest event.
pub struct Descriptions(Cache<RoomNum, (Order, Arc<PublicRoomsChunk>), Weigh>);

#[derive(Clone)]
struct Weigh;

impl Weighter<RoomNum, (Order, Arc<PublicRoomsChunk>)> for Weigh {
    fn weight(&self, _: &RoomNum, (_, chunk): &(Order, Arc<PublicRoomsChunk>)) -> u64 {
        let texts = [&chunk.name, &chunk.topic].into_iter().flatten();
        DESCRIPTION_BYTES + texts.map(|text| text.len() as u64).sum::<u64>()
    }
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
        if let Some((tip, chunk)) = self.0.get(&num)
            && tip == room.tip
        {
            return Ok(chunk);
        }
        let chunk = Arc::new(describe(read, num, room)?);
        self.0.insert(num, (room.tip, Arc::clone(&chunk)));
        Ok(chunk)
    }
}

/// Reads a room's entry from its current state.
fn describe(read: &(impl Read + ?Sized), num: RoomNum, room: &RoomRow) -> Result<PublicRoomsChunk, Fault> {
    let guests = find_content::<Guests>(read, num, "m.room.guest_access")?;
    let mut chunk = PublicRoomsChunk::from(PublicRoomsChunkInit {
        num_joined_members: UInt::from(room.joined),
        room_id: room.id.clone(),
        world_readable: visibility::current(read, num)? == HistoryVisibility::WorldReadable,
        guest_can_join: guests.is_some_and(|guests| guests.guest_access == "can_join"),
    });
    let text = |text: String| (!text.is_empty()).then_some(text);
    chunk.name = find_content::<Name>(read, num, "m.room.name")?.and_then(|content| text(content.name));
    chunk.topic = find_content::<Topic>(read, num, "m.room.topic")?.and_then(|content| text(content.topic));
    chunk.avatar_url = find_content::<Avatar>(read, num, "m.room.avatar")?.map(|content| content.url);
    chunk.canonical_alias = match find_content::<Canonical>(read, num, "m.room.canonical_alias")? {
        // An alias of ours may have been given to another room meanwhile; of another server's alias we know only what
        // the room says.
        Some(Canonical { alias }) if aliases::find(read, &alias)?.is_some_and(|row| row.room != num) => None,
        canonical => canonical.map(|content| content.alias),
    };
    chunk.join_rule = find_content::<Rule>(read, num, "m.room.join_rules")?
        .map_or(JoinRuleKind::Invite, |content| content.join_rule);
    chunk.room_type =
        find_content::<Create>(read, num, "m.room.create")?.and_then(|content| content.room_type);
    Ok(chunk)
}
