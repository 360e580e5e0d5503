//! The connections of sliding sync: what each has been told of each room.
//!
//! A connection goes on in *steps*. An answer that tells a room differently than before begins a step, and the position that it
//! gives to the client names the step. Until the client comes back with it, nobody knows whether the answer arrived, so that what
//! was told by the step before is kept beside it: a client may come back from either. An answer from the older one abandons the
//! other. A room that is told up to the connection's own position needs no row of its own written when it has news, so that most
//! answers write nothing: how far the log is told stands in the position that the client brings.
//!
//! Everything is written by notes and may be lost in a crash; the client then begins anew (`M_UNKNOWN_POS`).

pub(crate) mod check;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    ids::{DeviceNum, RoomNum, UserNum},
    schema::{
        self,
        sync::{ConnectionRow, RoomSent, RoomSteps, StateWish},
    },
    store::{Direction, Fault, Note, Read, Write, key::Json},
};

/// A device has at most this many connections, because each is kept in the store. A further one ends the one that was not used
/// for longest.
pub const CONNECTIONS_MAX: usize = 20;
/// A connection ends when it was not used for this long: 30 days.
pub const KEPT_MS: u64 = 30 * 24 * 60 * 60 * 1_000;
/// That a connection is used is written at most this often: once a day.
const TOUCHED_MS: u64 = 24 * 60 * 60 * 1_000;
/// A step that is larger than this cannot be written at once, and the connection ends.
pub(crate) const STEP_BYTES_MAX: usize = 800 << 10;
/// The rooms of a connection stand in this many rows, so that it is read and deleted at once, however many rooms there are.
const PARTS: u64 = 64;
/// A connection remembers at most this many different wishes for state. A room that was told with one that is forgotten is told
/// its state anew.
const CONFIGS_MAX: usize = 64;
/// The wishes that a connection remembers have at most this many bytes, because they are read at each poll.
const CONFIGS_BYTES_MAX: usize = 128 << 10;

/// A user and their device, who own a connection.
pub(crate) type Owner = (UserNum, DeviceNum);

fn part_of(room: RoomNum) -> u8 {
    u8::try_from(room.0 % PARTS).unwrap_or_default()
}

/// A connection as its client knows it.
#[derive(Debug, Default)]
pub(crate) struct Connection {
    /// The rooms that the client was told of.
    pub(crate) rooms: BTreeMap<RoomNum, RoomSent>,
    /// The wishes for state with which rooms were told, by number.
    pub(crate) configs: BTreeMap<u32, Vec<StateWish>>,
    /// The row as it was read. None for a connection that begins.
    row: Option<ConnectionRow>,
    number: u64,
    /// The step at which the client stands; zero for one that begins.
    step: u64,
    /// The rooms of a step that the client never heard of.
    abandoned: BTreeSet<RoomNum>,
    /// About how many bytes each part takes.
    weights: BTreeMap<u8, usize>,
}

/// About how many bytes a room takes of its part for each step, without its members.
const ROOM_BYTES: usize = 24;
/// About how many bytes a member takes that was told lazily.
const MEMBER_BYTES: usize = 3;

/// About how many bytes a room takes of its part for each step, with this many members.
pub(crate) fn bytes_of_room(members: usize) -> usize {
    ROOM_BYTES + MEMBER_BYTES * members
}

impl Connection {
    /// Begins a connection with this random number.
    pub(crate) fn begin(number: u64) -> Self {
        Self { number, ..Self::default() }
    }

    /// Reads the connection of which a client has this number and step. None if it has ended, or never gave out that position.
    pub(crate) fn find(
        read: &(impl Read + ?Sized),
        (user, device): Owner,
        id: &str,
        (number, step): (u64, u64),
        now_ms: u64,
    ) -> Result<Option<Self>, Fault> {
        let Some(Json(row)) = schema::SYNC_CONNECTION.get(read, (user, device, id))? else { return Ok(None) };
        let is_step = row.base == step || row.next == Some(step);
        if row.number != number || !is_step || is_over(&row, now_ms) {
            return Ok(None);
        }
        let (mut rooms, mut abandoned, mut weights) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        let prefix = (user, device, number);
        let rows =
            schema::SYNC_CONNECTION_ROOMS.prefix::<(UserNum, DeviceNum, u64)>(read, prefix, Direction::Up)?;
        for part in rows {
            for (room, steps) in part?.1.rooms {
                if steps.iter().any(|(at, _)| *at > step) {
                    abandoned.insert(room);
                }
                let members = |sent: &Option<RoomSent>| sent.as_ref().map_or(0, |sent| sent.members.len());
                let bytes: usize = steps.iter().map(|(_, sent)| bytes_of_room(members(sent))).sum();
                *weights.entry(part_of(room)).or_default() += bytes;
                let known = steps.into_iter().rev().find(|(at, _)| *at <= step);
                if let Some((_, Some(sent))) = known {
                    rooms.insert(room, sent);
                }
            }
        }
        let configs = row.configs.iter().cloned().collect();
        Ok(Some(Self { rooms, configs, row: Some(row), number, step, abandoned, weights }))
    }

    /// The part in which a room stands, and about how many bytes it takes now.
    pub(crate) fn part(&self, room: RoomNum) -> (u8, usize) {
        let part = part_of(room);
        (part, self.weights.get(&part).copied().unwrap_or_default())
    }

    /// About how many bytes a step writes that changes these rooms: the parts in which they stand.
    pub(crate) fn bytes_of<'r>(&'r self, rooms: impl Iterator<Item = &'r RoomNum>) -> usize {
        let parts: BTreeSet<u8> = rooms.chain(&self.abandoned).map(|room| part_of(*room)).collect();
        let weight = |part: &u8| self.weights.get(part).copied().unwrap_or_default();
        parts.iter().map(weight).sum()
    }

    /// The number of the connection.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The step that an answer begins which tells rooms differently.
    fn next_step(&self) -> u64 {
        self.row.as_ref().map_or(1, |row| row.base.max(row.next.unwrap_or_default()).saturating_add(1))
    }

    /// Makes the update that an answer is given with: rooms as they are told by it; none where the client hears no more of one.
    /// Gives also the step that the answer's position names. Without an update, nothing need be written.
    pub(crate) fn update(
        &self,
        (user, device): Owner,
        id: &str,
        rooms: BTreeMap<RoomNum, Option<RoomSent>>,
        configs: BTreeMap<u32, Vec<StateWish>>,
        now_ms: u64,
    ) -> (u64, Option<Update>) {
        let is_touched = self.row.as_ref().is_none_or(|row| row.used_ms.saturating_add(TOUCHED_MS) < now_ms);
        if rooms.is_empty() && self.row.is_some() {
            let touch = is_touched.then(|| Update {
                user,
                device,
                id: id.to_owned(),
                read: self.row.clone(),
                row: ConnectionRow { used_ms: now_ms, ..self.row.clone().unwrap_or_default() },
                step: self.step,
                from: self.step,
                rooms,
                abandoned: BTreeSet::new(),
            });
            return (self.step, touch);
        }
        let step = self.next_step();
        // The client may come back from the step before, which rests on the wishes of then.
        let mut named: BTreeSet<u32> = self.rooms.values().map(|sent| sent.config).collect();
        named.extend(rooms.values().flatten().map(|sent| sent.config));
        let configs = bounded(configs.into_iter().filter(|(config, _)| named.contains(config)).collect());
        let (base, next) = match &self.row {
            Some(_) => (self.step, Some(step)),
            None => (step, None),
        };
        let update = Update {
            user,
            device,
            id: id.to_owned(),
            read: self.row.clone(),
            row: ConnectionRow { number: self.number, base, next, used_ms: now_ms, configs },
            step,
            from: self.step,
            rooms,
            abandoned: self.abandoned.clone(),
        };
        (step, Some(update))
    }
}

/// Drops the oldest wishes, as long as there are too many.
fn bounded(mut configs: Vec<(u32, Vec<StateWish>)>) -> Vec<(u32, Vec<StateWish>)> {
    let size = |wishes: &[StateWish]| -> usize {
        let patterns = wishes.iter().flat_map(|wish| wish.include.iter().chain(&wish.exclude));
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        patterns.map(|pattern| 40 + text(&pattern.event_type) + text(&pattern.state_key)).sum()
    };
    let mut bytes: usize = configs.iter().map(|(_, wishes)| size(wishes)).sum();
    let mut dropped = 0;
    for (_, wishes) in &configs {
        if configs.len() - dropped <= CONFIGS_MAX && bytes <= CONFIGS_BYTES_MAX {
            break;
        }
        bytes = bytes.saturating_sub(size(wishes));
        dropped += 1;
    }
    configs.drain(..dropped);
    configs
}

fn is_over(row: &ConnectionRow, now_ms: u64) -> bool {
    row.used_ms.saturating_add(KEPT_MS) < now_ms
}

/// The changes of a connection that an answer makes. They are kept before the answer is given ([`keep`]).
#[derive(Debug)]
pub struct Update {
    user: UserNum,
    device: DeviceNum,
    id: String,
    /// The row as it was when the answer was made.
    read: Option<ConnectionRow>,
    row: ConnectionRow,
    step: u64,
    from: u64,
    rooms: BTreeMap<RoomNum, Option<RoomSent>>,
    abandoned: BTreeSet<RoomNum>,
}

/// Keeps an update under the lock of its user. Says whether it was kept: another request of the connection may have come first,
/// and then the answer is to be made anew.
pub fn keep(note: &mut Note, update: Update) -> Result<bool, Fault> {
    let (user, device, id) = (update.user, update.device, update.id.as_str());
    let found = schema::SYNC_CONNECTION.get(note, (user, device, id))?.map(|Json(row)| row);
    if update.read.is_none() {
        if let Some(old) = &found {
            end(note, (user, device), id, old);
        }
        make_room(note, (user, device), id, update.row.used_ms)?;
    } else if found != update.read {
        return Ok(false);
    }
    let mut parts: BTreeMap<u8, BTreeSet<RoomNum>> = BTreeMap::new();
    for room in update.rooms.keys().chain(&update.abandoned) {
        parts.entry(part_of(*room)).or_default().insert(*room);
    }
    let mut rooms = update.rooms;
    for (part, touched) in parts {
        let key = (user, device, update.row.number, part);
        let mut row = schema::SYNC_CONNECTION_ROOMS.get(note, key)?.unwrap_or_default();
        let mut by_room: BTreeMap<RoomNum, RoomSteps> = std::mem::take(&mut row.rooms).into_iter().collect();
        for room in touched {
            let steps = by_room.entry(room).or_default();
            // A step that the client never heard of does not count.
            steps.retain(|(at, _)| *at <= update.from);
            if let Some(sent) = rooms.remove(&room) {
                steps.drain(..steps.len().saturating_sub(1));
                steps.push((update.step, sent));
            }
        }
        by_room.retain(|_, steps| match steps.as_slice() {
            [] => false,
            [(at, None)] => *at > update.from,
            _ => true,
        });
        row.rooms = by_room.into_iter().collect();
        if row.rooms.is_empty() {
            schema::SYNC_CONNECTION_ROOMS.delete(note, key);
        } else {
            schema::SYNC_CONNECTION_ROOMS.put(note, key, &row);
        }
    }
    schema::SYNC_CONNECTION.put(note, (user, device, id), &Json(update.row));
    Ok(true)
}

/// Ends connections of a device that are over, and those that were not used for longest, so that one more may begin.
fn make_room(note: &mut Note, owner: Owner, id: &str, now_ms: u64) -> Result<(), Fault> {
    let rows = schema::SYNC_CONNECTION.prefix::<Owner>(note, owner, Direction::Up)?;
    let mut others = Vec::new();
    for row in rows {
        let ((.., other), Json(row)) = row?;
        if other != id {
            others.push((row.used_ms, other, row));
        }
    }
    others.sort_unstable_by(|(a, a_id, _), (b, b_id, _)| (a, a_id).cmp(&(b, b_id)));
    let too_many = (others.len() + 1).saturating_sub(CONNECTIONS_MAX);
    for (at, (_, other, row)) in others.iter().enumerate() {
        if at < too_many || is_over(row, now_ms) {
            end(note, owner, other, row);
        }
    }
    Ok(())
}

fn end(note: &mut impl Write, (user, device): Owner, id: &str, row: &ConnectionRow) {
    let prefix = (user, device, row.number);
    schema::SYNC_CONNECTION_ROOMS.delete_prefix::<(UserNum, DeviceNum, u64)>(note, prefix);
    schema::SYNC_CONNECTION.delete(note, (user, device, id));
}

/// Deletes the connections of ended devices, from the first to the last number.
pub fn sweep(to: &mut impl Write, user: UserNum, (first, last): (DeviceNum, DeviceNum)) {
    let (low, high) = ((user, first), (user, DeviceNum(last.0.saturating_add(1))));
    schema::SYNC_CONNECTION.delete_below::<Owner, Owner>(to, low, high);
    schema::SYNC_CONNECTION_ROOMS.delete_below::<Owner, Owner>(to, low, high);
}
