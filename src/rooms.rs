//! Rooms: events, their order, the state they add up to, and who may see them.
//!
//! The road of an event: a flow takes the room's [`Seat`] (its lock), begins a [`commit::Change`], adds drafts to it
//! (each is built, judged and written into one batch), and hands the batch to the store. The lock is released there:
//! the next writer reads over what is accepted, and only the answer to the client waits for the disk.

pub mod admit;
pub mod aliases;
pub mod build;
pub mod check;
pub mod commit;
pub mod directory;
pub mod erased;
pub mod event;
pub mod filter;
pub mod graph;
pub mod members;
pub mod power;
pub mod receipts;
pub mod receive;
pub mod redact;
pub mod relations;
pub mod resolve;
pub mod state;
pub mod timeline;
pub mod typing;
pub mod versions;
pub mod visibility;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use ruma::{RoomId, room_version_rules::RoomVersionRules, signatures::Ed25519KeyPair};
use tokio::sync::{OwnedMutexGuard, Semaphore};

use crate::{
    error::{Error, Refusal, Result},
    ids::{RoomNum, UserNum},
    rooms::{build::Signer, directory::Descriptions, event::StateEvent, resolve::Resolver},
    schema,
    schema::{
        push::Totals,
        rooms::{Resident, RoomRow},
    },
    store::{Direction, Fault, Read},
};

/// Seats that are kept though nobody sits there; above this, those are given up.
const SEATS_MAX: usize = 1_024;
/// Changes that may wait for one room; above this, clients are told to come back.
const TURNS_MAX: usize = 4_096;
/// Resolutions that take long and run at once.
const LONG_RESOLUTIONS_MAX: usize = 2;
/// Resolutions that take long, and those that wait for their turn.
const RESOLUTIONS_WAITING_MAX: usize = 64;
/// State events a tip remembers, about a kilobyte each: the rooms' power levels and such, and the members who write.
const TIP_STATE_MAX: usize = 256;

/// What rooms keep in memory. Cheap to clone.
#[derive(Clone)]
pub struct Rooms(Arc<Inner>);

struct Inner {
    signer: Signer,
    last_room: AtomicU64,
    turns: Mutex<HashMap<RoomNum, Arc<Turns>>>,
    descriptions: Descriptions,
    resolver: Resolver,
    /// Resolutions that take long, of all rooms.
    long_resolutions: Semaphore,
    /// Those and the ones that wait for their turn.
    resolutions_waiting: Semaphore,
}

impl Rooms {
    /// Reads what must be known: the last room number.
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
            turns: Mutex::default(),
            descriptions: Descriptions::default(),
            resolver,
            long_resolutions: Semaphore::new(LONG_RESOLUTIONS_MAX),
            resolutions_waiting: Semaphore::new(RESOLUTIONS_WAITING_MAX),
        })))
    }

    /// Signs events in the name of this server.
    pub fn signer(&self) -> &Signer {
        &self.0.signer
    }

    /// What states of rooms resolve to.
    pub fn resolver(&self) -> &Resolver {
        &self.0.resolver
    }

    /// Whoever resolves for long takes a place here: other long work keeps some of the pool.
    pub fn long_resolutions(&self) -> &Semaphore {
        &self.0.long_resolutions
    }

    /// Whoever waits to resolve for long takes a place here; without one, it is tried again later.
    pub fn resolutions_waiting(&self) -> &Semaphore {
        &self.0.resolutions_waiting
    }

    /// A number for a new room, above those of rooms that came to be below us, as when another node led. One that comes to
    /// nothing stays unused.
    pub fn next_num(&self, read: &(impl Read + ?Sized)) -> Result<RoomNum, Fault> {
        self.0.last_room.fetch_max(last_num(read)?, Ordering::Relaxed);
        Ok(RoomNum(self.0.last_room.fetch_add(1, Ordering::Relaxed) + 1))
    }

    /// What the public directory says of rooms.
    pub fn descriptions(&self) -> &Descriptions {
        &self.0.descriptions
    }

    /// The seat of a room: whoever holds it is the only one who changes the room.
    /// Never wait for the network or the disk while holding it.
    pub fn seat(&self, room: RoomNum) -> Arc<tokio::sync::Mutex<Seat>> {
        Arc::clone(&self.turns(room).seat)
    }

    /// Those who wait to change a room.
    pub fn turns(&self, room: RoomNum) -> Arc<Turns> {
        let mut all = self.0.turns.lock();
        if all.len() >= SEATS_MAX && !all.contains_key(&room) {
            // Whoever holds or waits for a seat has a handle of its own.
            all.retain(|_, turns| Arc::strong_count(turns) > 1 || Arc::strong_count(&turns.seat) > 1);
        }
        Arc::clone(all.entry(room).or_default())
    }
}

/// One change to a room, to be made by whoever works off the room's turns.
pub type Turn = Box<dyn FnOnce(OwnedMutexGuard<Seat>) + Send>;

/// Those who wait to change a room, first come, first served. One thread makes the changes of all who wait, one after
/// the other: a busy room would otherwise pass its lock between threads for each event, which costs more than the event.
#[derive(Default)]
pub struct Turns {
    seat: Arc<tokio::sync::Mutex<Seat>>,
    queue: Mutex<TurnQueue>,
    /// Whoever resolves states of the room for long holds this, and not the seat.
    pub(crate) resolving: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct TurnQueue {
    waiting: VecDeque<Turn>,
    /// Somebody is working them off.
    taken: bool,
}

impl Turns {
    /// Adds a turn at the end. `true` when nobody is working them off: the caller must then have
    /// [`Turns::work_off`] called. Errors: [`Error::Busy`] when too many wait.
    pub fn add(&self, turn: Turn) -> Result<bool> {
        let mut queue = self.queue.lock();
        if queue.waiting.len() >= TURNS_MAX {
            return Err(Error::Busy { retry_after: Duration::from_secs(1) });
        }
        queue.waiting.push_back(turn);
        Ok(!std::mem::replace(&mut queue.taken, true))
    }

    /// Takes all turns, until nobody waits.
    pub fn work_off(&self) {
        while let Some(turn) = self.next() {
            // Only a room that is being created has its seat taken by another, and nobody knows it yet.
            let Ok(seat) = Arc::clone(&self.seat).try_lock_owned() else { continue };
            // A turn that panics is answered as a fault of ours; the panic is logged by the hook. The next ones go on,
            // from what the store says: what the seat remembers may be older than what was accepted.
            let ended = panic::catch_unwind(AssertUnwindSafe(|| turn(seat)));
            if ended.is_err()
                && let Ok(mut seat) = self.seat.try_lock()
            {
                *seat = Seat::default();
            }
        }
    }

    fn next(&self) -> Option<Turn> {
        let mut queue = self.queue.lock();
        let turn = queue.waiting.pop_front();
        queue.taken = turn.is_some();
        turn
    }
}

/// The right to change a room, and what the last one who had it remembered.
#[derive(Debug, Default)]
pub struct Seat {
    tip: Option<Tip>,
}

/// The newest accepted state of a room, as far as writers asked for it. It agrees with the store's view (published
/// rows and those that wait for the flush), so it may be dropped at any time.
#[derive(Debug)]
struct Tip {
    row: RoomRow,
    /// Current state events by type and state key; `None` where there is none.
    state: BTreeMap<(String, String), Option<Arc<StateEvent>>>,
    /// Our users who are joined or invited, rising.
    users: Option<Arc<[UserNum]>>,
    /// See [`commit::Change::unread`].
    unread: Option<Totals>,
}

impl Tip {
    fn of(row: RoomRow) -> Self {
        Self { row, state: BTreeMap::new(), users: None, unread: None }
    }
}

/// The number of the last room, 0 without any.
fn last_num(read: &(impl Read + ?Sized)) -> Result<u64, Fault> {
    let last = schema::ROOM.prefix::<()>(read, (), Direction::Down)?.next().transpose()?;
    Ok(last.map_or(0, |(room, _)| room.0))
}

/// The room of this id.
pub fn find_room(read: &(impl Read + ?Sized), id: &RoomId) -> Result<Option<RoomNum>, Fault> {
    schema::ROOM_ID.get(read, id.as_str())
}

/// The room of this number.
pub fn find_row(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Option<RoomRow>, Fault> {
    schema::ROOM.get(read, room)
}

/// The room of this number. Errors: [`Fault::Corrupt`] when there is none: numbers come from our own rows.
pub fn require_row(read: &(impl Read + ?Sized), room: RoomNum) -> Result<RoomRow, Fault> {
    find_row(read, room)?.ok_or(Fault::Corrupt("a room is missing"))
}

/// The room of this id. Refuses an unknown one: 404 `M_NOT_FOUND`.
pub fn require_room(read: &(impl Read + ?Sized), id: &RoomId) -> Result<(RoomNum, RoomRow)> {
    let unknown = || Error::from(Refusal::not_found("This server knows no such room."));
    let room = find_room(read, id)?.ok_or_else(unknown)?;
    let row = find_row(read, room)?.filter(|row| row.resident == Resident::Yes).ok_or_else(unknown)?;
    Ok((room, row))
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
) -> Result<Option<event::Stored>, Fault> {
    let Some(key) = state::find_key(read, room, event_type, state_key)? else { return Ok(None) };
    state::current(read, room, key)?.map(|event| event::require(read, room, event)).transpose()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn a_turn_that_panics_stops_no_other() {
        let turns = Turns::default();
        let reached = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&reached);
        assert!(turns.add(Box::new(|_seat| panic!("a turn of this test"))).unwrap());
        assert!(!turns.add(Box::new(move |_seat| mark.store(true, Ordering::Relaxed))).unwrap());
        turns.work_off();
        assert!(reached.load(Ordering::Relaxed));
        assert!(turns.add(Box::new(|_seat| ())).unwrap(), "nobody is at work any more");
    }
}
