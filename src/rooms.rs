//! Rooms: their events, the order and the state of these, and who may see them.
//!
//! A flow that adds an event waits for a turn in the room ([`turns`]), which gives it the room's seat (its lock). With
//! the seat it begins a [`change::Change`], adds drafts to it (each is built, judged and written into one batch), and
//! hands the batch to the store. The seat is free from then on: the next writer reads the rows of the accepted batch,
//! and only the answer to the client waits for the disk.

pub mod acl;
pub mod admit;
pub mod aliases;
pub mod around;
pub mod authorize;
pub mod build;
pub mod change;
pub mod check;
pub mod delayed;
pub mod directory;
pub mod erased;
pub mod event;
pub mod filter;
pub mod graph;
pub mod members;
pub mod membership;
pub mod plan;
pub mod policy;
pub mod policy_server;
pub mod power;
pub mod property_path;
pub mod receipts;
pub mod redact;
pub mod reference;
pub mod relations;
pub mod resolve;
pub mod retention;
pub mod show;
pub mod spaces;
pub mod state;
pub mod sticky;
pub(crate) mod stripped;
pub mod timeline;
mod tip;
pub mod turns;
pub mod typing;
pub mod versions;
pub mod view;
pub mod visibility;
pub mod vouch;

use std::{
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ruma::{RoomId, room_version_rules::RoomVersionRules, signatures::Ed25519KeyPair};
use tokio::sync::Semaphore;

use crate::{
    error::{Error, Refusal, Result},
    ids::RoomNum,
    rooms::{
        build::Signer,
        directory::{Descriptions, Listing},
        resolve::Resolver,
        turns::{AllTurns, Turns},
    },
    schema,
    schema::rooms::{Resident, RoomRow},
    store::{Direction, Fault, Read},
};

/// Run at most this many long resolutions at once, so that other long work keeps some of the pool.
const LONG_RESOLUTIONS_MAX: usize = 2;
/// Let at most this many long resolutions run or wait; each holds its event in memory meanwhile.
const RESOLUTIONS_WAITING_MAX: usize = 64;

/// Everything that rooms keep in memory. A clone is cheap: it shares the same memory.
#[derive(Clone)]
pub struct Rooms(Arc<Inner>);

struct Inner {
    signer: Signer,
    last_room: AtomicU64,
    turns: AllTurns,
    descriptions: Descriptions,
    listing: Listing,
    resolver: Arc<Resolver>,
    /// A resolution of any room that takes long holds a permit while it runs; there are [`LONG_RESOLUTIONS_MAX`].
    long_resolutions: Semaphore,
    /// A resolution of which the events do not fit in memory holds this permit, too.
    large_resolutions: Semaphore,
    /// A long resolution holds a permit from when it begins to wait until it ends; there are
    /// [`RESOLUTIONS_WAITING_MAX`].
    resolutions_waiting: Semaphore,
}

impl Rooms {
    /// Begins with nothing in memory but the number of the last room, which is read from the store.
    pub fn open(
        read: &(impl Read + ?Sized),
        server: ruma::OwnedServerName,
        key: Arc<Ed25519KeyPair>,
        resolver: Resolver,
    ) -> Result<Self, Fault> {
        let last = last_num(read)?;
        Ok(Self(Arc::new(Inner {
            signer: Signer::new(server, key),
            last_room: AtomicU64::new(last),
            turns: AllTurns::default(),
            descriptions: Descriptions::default(),
            listing: Listing::default(),
            resolver: Arc::new(resolver),
            long_resolutions: Semaphore::new(LONG_RESOLUTIONS_MAX),
            large_resolutions: Semaphore::new(1),
            resolutions_waiting: Semaphore::new(RESOLUTIONS_WAITING_MAX),
        })))
    }

    /// Signs events in the name of this server.
    pub fn signer(&self) -> &Signer {
        &self.0.signer
    }

    /// Resolves the states of rooms that fork, and remembers recent results.
    pub fn resolver(&self) -> &Resolver {
        &self.0.resolver
    }

    /// The same, for a change that may have to place an event of ours beside newer heads.
    pub(crate) fn shared_resolver(&self) -> Arc<Resolver> {
        Arc::clone(&self.0.resolver)
    }

    /// A long resolution takes a permit here while it runs, so that other long work keeps some of the pool.
    pub fn long_resolutions(&self) -> &Semaphore {
        &self.0.long_resolutions
    }

    /// A resolution of which the events do not fit in memory takes the permit here before one of the long resolutions,
    /// so that smaller ones always have a place beside it.
    pub fn large_resolutions(&self) -> &Semaphore {
        &self.0.large_resolutions
    }

    /// A long resolution takes a permit here before it waits to run; where none is left, its event is tried again
    /// later.
    pub fn resolutions_waiting(&self) -> &Semaphore {
        &self.0.resolutions_waiting
    }

    /// Gives a number for a new room, above all numbers in the store: another node may have led and made rooms
    /// meanwhile. The number of a room that comes to nothing stays unused.
    pub fn next_num(&self, read: &(impl Read + ?Sized)) -> Result<RoomNum, Fault> {
        self.0.last_room.fetch_max(last_num(read)?, Ordering::Relaxed);
        Ok(RoomNum(self.0.last_room.fetch_add(1, Ordering::Relaxed) + 1))
    }

    /// Keeps the entries of rooms in the public directory, which are costly to work out.
    pub fn descriptions(&self) -> &Descriptions {
        &self.0.descriptions
    }

    /// Keeps the rooms of the public directory in the order in which it shows them.
    pub fn listing(&self) -> &Listing {
        &self.0.listing
    }

    /// Gives the turns of a room, to which a flow that wants to change the room adds one. A turn must never wait for
    /// the network or the disk, because all other turns of the room wait for it.
    pub fn turns(&self, room: RoomNum) -> Arc<Turns> {
        self.0.turns.of(room)
    }

    /// Takes the seat of a room that nobody else changes.
    #[cfg(test)]
    pub(crate) fn sit(&self, room: RoomNum) -> turns::Seat {
        self.turns(room).sit().unwrap()
    }
}

/// Whether no room has a higher number.
pub(crate) fn is_last(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    Ok(room.0 >= last_num(read)?)
}

/// The number of the last room, 0 without any.
fn last_num(read: &(impl Read + ?Sized)) -> Result<u64, Fault> {
    let last = schema::ROOM.prefix::<()>(read, (), Direction::Down)?.next().transpose()?;
    Ok(last.map_or(0, |(room, _)| room.0))
}

/// Lists the numbers of at most this many rooms above one, rising.
pub fn list_after(
    read: &(impl Read + ?Sized),
    after: RoomNum,
    rooms_max: usize,
) -> Result<Vec<RoomNum>, Fault> {
    let rooms =
        schema::ROOM.range::<RoomNum>(read, Bound::Excluded(after), Bound::Unbounded, Direction::Up)?;
    rooms.take(rooms_max).map(|row| row.map(|(room, _)| room)).collect()
}

/// The room of this id.
pub fn find_room(read: &(impl Read + ?Sized), id: &RoomId) -> Result<Option<RoomNum>, Fault> {
    schema::ROOM_ID.get(read, id.as_str())
}

/// The room of this number.
pub fn find_row(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Option<RoomRow>, Fault> {
    schema::ROOM.get(read, room)
}

/// Whether this server is or was in the room of this id, and knows that it has another version than this one. What others say of a room
/// from outside is not knowledge.
pub fn is_known_otherwise(read: &(impl Read + ?Sized), room_id: &RoomId, version: u8) -> Result<bool, Fault> {
    let Some(num) = find_room(read, room_id)? else { return Ok(false) };
    let row = find_row(read, num)?;
    Ok(row.is_some_and(|row| row.resident.has_history() && row.version != version))
}

/// The room of this number. Errors: [`Fault::Corrupt`] when there is none: numbers come from our own rows.
pub fn require_row(read: &(impl Read + ?Sized), room: RoomNum) -> Result<RoomRow, Fault> {
    find_row(read, room)?.ok_or(Fault::Corrupt("a room is missing"))
}

/// Refuses to write events to a room that this server is not in: 404 `M_NOT_FOUND` for one that it does not know, 403
/// `M_FORBIDDEN` for one that nobody of ours is in, as for any other room. Errors: [`Error::Busy`] for a room that it will
/// be wholly in before long.
pub fn require_in(resident: Resident) -> Result<()> {
    match resident {
        Resident::Yes | Resident::Partial => Ok(()),
        Resident::Joining => Err(Error::Busy { retry_after: Duration::from_secs(1) }),
        Resident::No => Err(unknown()),
        Resident::Invited | Resident::Knocked | Resident::Left => {
            Err(Refusal::forbidden("You are not in this room.").into())
        }
    }
}

fn unknown() -> Error {
    Refusal::not_found("This server knows no such room.").into()
}

/// The room of this id, in which this server is. Refuses any other one: 404 `M_NOT_FOUND`.
pub fn require_room(read: &(impl Read + ?Sized), id: &RoomId) -> Result<(RoomNum, RoomRow)> {
    let room = find_room(read, id)?.ok_or_else(unknown)?;
    let row = find_row(read, room)?.filter(|row| row.resident.is_in()).ok_or_else(unknown)?;
    Ok((room, row))
}

/// Lists the rooms that this server is in, rising.
pub fn list<'r>(
    read: &'r (impl Read + ?Sized),
) -> Result<impl Iterator<Item = Result<RoomNum, Fault>> + 'r, Fault> {
    let rows = schema::ROOM.prefix::<()>(read, (), Direction::Up)?;
    Ok(rows.filter_map(|row| match row {
        Ok((room, row)) => row.resident.is_in().then_some(Ok(room)),
        Err(error) => Some(Err(error)),
    }))
}

/// The rules of a room's version. Errors: [`Fault::Corrupt`]; rooms of unknown versions are never stored.
pub fn rules(room: &RoomRow) -> Result<&'static RoomVersionRules, Fault> {
    versions::find_rules(room.version).ok_or(Fault::Corrupt("a room has an unknown version"))
}

/// The current state event of a key.
pub fn find_state(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event_type: &str,
    state_key: &str,
) -> Result<Option<event::StoredEvent>, Fault> {
    let Some(key) = state::find_key(read, room, event_type, state_key)? else { return Ok(None) };
    state::current(read, room, key)?.map(|event| event::require(read, room, event)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        env::Env,
        metrics::Metrics,
        rooms::change::Change,
        store::{Durability, Engine, Store, engine::Memory},
    };

    fn rooms(store: &Store) -> Rooms {
        let resolver = Resolver::new(Env::simulated(1, 0), Metrics::new());
        Rooms::open(&*store.snapshot(), "s".try_into().unwrap(), build::tests::a_key(), resolver).unwrap()
    }

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
    }

    fn begin(store: &Store, rooms: &Rooms, seat: u64, num: u64) -> Change {
        let id = RoomId::parse(format!("!room{num}:s")).unwrap();
        Change::begin_room(store, rooms.sit(RoomNum(seat)), RoomNum(num), id, 11).unwrap()
    }

    #[test]
    fn a_new_room_has_a_number_above_those_that_came_to_be_below_us() {
        let store = store();
        let rooms_here = rooms(&store);
        let next = || rooms_here.next_num(&store.view()).unwrap();
        assert_eq!((next(), next()), (RoomNum(1), RoomNum(2)));
        // Another node led meanwhile, and made a room.
        let rooms_there = rooms(&store);
        let mut change = begin(&store, &rooms_there, 7, 7);
        schema::ROOM.put(&mut change.batch, RoomNum(7), &change.row);
        drop(store.enqueue(change.batch).unwrap());
        assert_eq!((next(), next()), (RoomNum(8), RoomNum(9)));
    }

    #[test]
    #[should_panic(expected = "the seat is that of another room")]
    fn the_seat_of_a_room_changes_no_other_room() {
        let store = store();
        drop(begin(&store, &rooms(&store), 1, 2));
    }
}
