//! Turns: a flow that wants to change a room waits for its turn in it, first come, first served.
//!
//! One thread makes the changes of all who wait for a room, one after the other: a busy room would otherwise pass its
//! lock between threads for each event, which costs more than the event. While a turn is taken it has the room's
//! [`Seat`], which is the proof that nobody else changes the room; a seat is given out nowhere else.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::{
    env::payer::{self, Payers, Shares},
    error::Error,
    ids::{EventNum, RoomNum, StateKeyNum},
    rooms::tip::Tip,
    store::Guard,
};

/// Keep the turns and tips of at most this many rooms that nobody changes.
const ROOMS_MAX: usize = 1_024;
/// Keep tips of at most this many bytes in all, beside those of rooms that are being changed.
const TIPS_BYTES_MAX: usize = 64 << 20;
/// Let at most this many changes wait for one room; later ones are told to come back.
const TURNS_MAX: usize = 4_096;
/// At most this many threads are asked for one room, each for other payers, and no more than a share of them for one user or one
/// address. One of them works the turns off; the others are there so that a room whose first turn is that of somebody with much to
/// wait for is served by whoever has a place. Without shares, many accounts at one address that waits would keep all others out.
const ASKED_MAX: usize = 8;

/// Let at most this many events of a room be signed by its policy server at once. Each stands beside the others, so that they become
/// as many heads of the room (`graph::HEADS_MAX`), which the next event joins.
const SIGNED_AT_ONCE: usize = 8;

/// One change to a room, to be made by the thread that works off the room's turns.
pub type Turn = Box<dyn FnOnce(Seat) + Send>;

/// The turns of all rooms that are being changed, and of those that were changed lately.
#[derive(Debug, Default)]
pub struct AllTurns {
    rooms: Mutex<Kept>,
    /// About how many bytes all tips take that are kept.
    tips_bytes: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Kept {
    rooms: HashMap<RoomNum, (Arc<Turns>, u64)>,
    /// Counts look-ups, so that a room that was asked for long ago has a small number.
    uses: u64,
}

impl AllTurns {
    /// Gives the turns of a room, which are made where there are none.
    pub fn of(&self, room: RoomNum) -> Arc<Turns> {
        let mut kept = self.rooms.lock();
        let is_full = kept.rooms.len() >= ROOMS_MAX && !kept.rooms.contains_key(&room);
        if is_full || self.tips_bytes.load(Ordering::Relaxed) > TIPS_BYTES_MAX {
            self.make_space(&mut kept);
        }
        kept.uses += 1;
        let use_number = kept.uses;
        let new = || Turns::new(room, Arc::clone(&self.tips_bytes));
        let (turns, used) = kept.rooms.entry(room).or_insert_with(|| (Arc::new(new()), 0));
        *used = use_number;
        Arc::clone(turns)
    }

    /// Drops the turns of those rooms that were asked for longest ago, until a sixteenth of the bounds is free. A room
    /// that somebody changes, or waits to change, is kept: its turns have a handle elsewhere.
    fn make_space(&self, kept: &mut Kept) {
        let is_idle = |turns: &Arc<Turns>| Arc::strong_count(turns) == 1;
        let mut idle: Vec<(u64, RoomNum)> = kept
            .rooms
            .iter()
            .filter(|(_, (turns, _))| is_idle(turns))
            .map(|(room, (_, used))| (*used, *room))
            .collect();
        idle.sort_unstable();
        for (_, room) in idle {
            let has_space = kept.rooms.len() < ROOMS_MAX - ROOMS_MAX / 16
                && self.tips_bytes.load(Ordering::Relaxed) <= TIPS_BYTES_MAX - TIPS_BYTES_MAX / 16;
            if has_space {
                break;
            }
            kept.rooms.remove(&room);
        }
    }

    /// Tells about how many bytes all tips take that are kept.
    pub fn tips_bytes(&self) -> usize {
        self.tips_bytes.load(Ordering::Relaxed)
    }
}

/// The changes that wait for a room, and the tip that the last one left.
#[derive(Debug)]
pub struct Turns {
    room: RoomNum,
    queue: Mutex<Queue>,
    tips_bytes: Arc<AtomicUsize>,
    /// A flow holds this lock while it resolves states of the room for long; the room's turns go on meanwhile.
    pub(crate) resolving: Arc<tokio::sync::Mutex<()>>,
    /// A request that replaces the room by another one holds this lock until it is replaced, so that those who want the same meanwhile find
    /// what was made; the room's turns go on.
    pub(crate) replacing: tokio::sync::Mutex<()>,
    /// The places of events of ours that the room's policy server is asked to sign; the room's turns go on meanwhile.
    pub(crate) signing: Semaphore,
    /// Paces the reunions of the room's branches, because each reads as much as the room has keys.
    pub(crate) reunions: Pace,
    /// Paces the answers for events that cite states which are far apart, for the same reason.
    pub(crate) far_answers: Pace,
    /// Paces the sweeps of the room, because each reads all its events.
    pub(crate) sweeps: Pace,
    /// The events that were cited, and the state keys that were used, since the sweep of the room began that is under way.
    cited: Mutex<Option<Cited>>,
    /// Until this uptime, changes of the room's state are refused.
    still_until: Mutex<Duration>,
    /// Whether the room is being joined, by a step that takes several turns.
    is_being_joined: AtomicBool,
    /// Whether somebody has the right to change the room's past.
    is_past_changing: AtomicBool,
    /// How many fetch what is to be written later, so that the room is not swept.
    unswept_for: AtomicUsize,
}

/// The right to change the past of a room over several turns: to fill a hole, or to forget what is old. One has it at a
/// time, and the room is not swept meanwhile, because what is being written may need what nothing needs yet.
#[derive(Debug)]
pub struct HistoryClaim(Arc<Turns>);

impl Drop for HistoryClaim {
    fn drop(&mut self) {
        self.0.is_past_changing.store(false, Ordering::Release);
    }
}

/// Keeps a room from being swept while something is fetched for it that nothing stored needs yet. Any number may fetch at once, so that
/// whoever waits for another server keeps nobody from the room's past.
#[derive(Debug)]
pub struct Unswept(Arc<Turns>);

impl Drop for Unswept {
    fn drop(&mut self) {
        self.0.unswept_for.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The right to join a room by a step that takes several turns. While it lives, other changes of the room are told to come
/// back, because they would take back what the step has written. Dropping it without an end of the step leaves that to the next
/// change.
#[derive(Debug)]
pub struct JoinClaim(Arc<Turns>);

impl JoinClaim {
    /// The room that is being joined.
    pub(crate) fn room(&self) -> RoomNum {
        self.0.room
    }
}

impl Drop for JoinClaim {
    fn drop(&mut self) {
        self.0.is_being_joined.store(false, Ordering::Release);
    }
}

/// Note at most this many events that are cited while a sweep goes on, and as many state keys that are used.
const CITED_MAX: usize = 100_000;

/// The numbers of the events that were cited, and of the state keys that were used, since a sweep began.
#[derive(Debug, Default)]
pub(in crate::rooms) struct Cited {
    pub(in crate::rooms) events: BTreeSet<EventNum>,
    pub(in crate::rooms) keys: BTreeSet<StateKeyNum>,
    /// Whether there were more than can be noted, so that the sweep must not go on.
    is_lost: bool,
}

/// Large resolutions in a room keep this distance at least.
const PAUSE_MIN: Duration = Duration::from_secs(10);
/// Large resolutions in a room keep this distance at most.
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// The distance of two large resolutions is this many times as long as the last one took.
const PAUSES: u32 = 20;

/// Paces large resolutions of one kind in a room, and its sweeps: one comes at once, and the next at a distance.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<Paced>);

#[derive(Debug, Default)]
struct Paced {
    /// The uptime of the server from which on the next one may begin.
    from: Duration,
    /// Whether somebody is going to begin one.
    is_claimed: bool,
    is_running: bool,
}

impl Paced {
    fn pause(&self, now: Duration) -> Duration {
        if self.is_running { PAUSE_MIN } else { self.from.saturating_sub(now) }
    }
}

impl Pace {
    /// Asks for a large resolution. Where the answer is `true`, the caller must begin one ([`Self::begin`]); otherwise somebody
    /// else is going to. `now` is the uptime of the server, here and below.
    pub(crate) fn claim(&self) -> bool {
        !std::mem::replace(&mut self.0.lock().is_claimed, true)
    }

    /// Begins one, and takes the claim for it back, or tells how long to wait before the next try to begin it. What comes in
    /// after it has begun has to claim another one.
    pub(crate) fn begin(&self, now: Duration) -> Result<(), Duration> {
        let mut paced = self.0.lock();
        let pause = paced.pause(now);
        if !pause.is_zero() {
            return Err(pause);
        }
        (paced.is_claimed, paced.is_running) = (false, true);
        Ok(())
    }

    /// Notes that it has ended, and how long it took.
    pub(crate) fn end(&self, now: Duration, took: Duration) {
        let mut paced = self.0.lock();
        debug_assert!(paced.is_running, "what ends has begun");
        let pause = took.saturating_mul(PAUSES).clamp(PAUSE_MIN, PAUSE_MAX);
        (paced.from, paced.is_running) = (now.saturating_add(pause), false);
    }
}

struct Queue {
    waiting: VecDeque<(Payers, Turn)>,
    /// Whether a thread works the turns off.
    is_worked_off: bool,
    /// The payers for whom a thread was asked to work the turns off, and has not begun.
    asked: Vec<Payers>,
    /// The threads that were asked for each of them.
    asked_shares: Shares,
    /// Whether somebody has the room's seat.
    is_seated: bool,
    tip: Option<Tip>,
    /// The bytes of the tip that are counted in the sum over all rooms.
    tip_bytes: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            is_worked_off: false,
            asked: Vec::new(),
            asked_shares: Shares::new(ASKED_MAX),
            is_seated: false,
            tip: None,
            tip_bytes: 0,
        }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queue({} wait)", self.waiting.len())
    }
}

impl Turns {
    /// Notes no more which events are cited, because the sweep has ended.
    pub(crate) fn end_sweep(&self) {
        *self.cited.lock() = None;
    }

    fn new(room: RoomNum, tips_bytes: Arc<AtomicUsize>) -> Self {
        Self {
            room,
            queue: Mutex::default(),
            tips_bytes,
            resolving: Arc::default(),
            replacing: tokio::sync::Mutex::default(),
            signing: Semaphore::new(SIGNED_AT_ONCE),
            reunions: Pace::default(),
            far_answers: Pace::default(),
            sweeps: Pace::default(),
            cited: Mutex::default(),
            still_until: Mutex::default(),
            is_being_joined: AtomicBool::new(false),
            is_past_changing: AtomicBool::new(false),
            unswept_for: AtomicUsize::new(0),
        }
    }

    /// Claims the right to change the room's past; `None` while somebody else has it, and while the room is swept.
    pub fn claim_history(self: &Arc<Self>) -> Option<HistoryClaim> {
        let swept = self.cited.lock();
        if swept.is_some() || self.is_past_changing.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(HistoryClaim(Arc::clone(self)))
    }

    /// Keeps the room from being swept; `None` while it is.
    pub fn keep_unswept(self: &Arc<Self>) -> Option<Unswept> {
        let swept = self.cited.lock();
        if swept.is_some() {
            return None;
        }
        self.unswept_for.fetch_add(1, Ordering::AcqRel);
        Some(Unswept(Arc::clone(self)))
    }

    /// Claims the right to join the room; `None` while somebody else has it.
    pub fn claim_join(self: &Arc<Self>) -> Option<JoinClaim> {
        let was_claimed = self.is_being_joined.swap(true, Ordering::AcqRel);
        (!was_claimed).then(|| JoinClaim(Arc::clone(self)))
    }

    /// Has changes of the room's state refused until this uptime. It is set and ended within turns, so that no state
    /// moves between a question and the moment from which on it stands still.
    pub(crate) fn hold_still(&self, until: Duration) {
        *self.still_until.lock() = until;
    }

    /// Tells for how long the room's state may not be changed; `None` where it may.
    pub(crate) fn still_for(&self, now: Duration) -> Option<Duration> {
        let left = self.still_until.lock().saturating_sub(now);
        (!left.is_zero()).then_some(left)
    }

    /// Adds a turn at the end, for the payers of the current task. If a thread must be asked for, gives the payers for
    /// whom: the caller must then have [`Turns::work_off`] called for them. Errors: [`Error::Busy`] when too many wait.
    pub fn add(&self, turn: Turn) -> Result<Option<Payers>, Error> {
        let payers = payer::current();
        let mut queue = self.queue.lock();
        if queue.waiting.len() >= TURNS_MAX {
            tracing::debug!(
                waiting = queue.waiting.len(),
                "a change to a room is refused, because too many wait for the room"
            );
            return Err(Error::Busy { retry_after: Duration::from_secs(1) });
        }
        queue.waiting.push_back((payers, turn));
        Ok((!queue.is_worked_off && queue.ask(payers)).then_some(payers))
    }

    /// Takes turns until none waits, or until `is_over` says that the thread has had enough time. Nothing happens if
    /// another thread works them off already. Gives the payers of turns that are left: the caller must then have this
    /// called again for each, so that other rooms get the thread first.
    pub fn work_off(self: &Arc<Self>, payers: Payers, is_over: impl Fn() -> bool) -> Vec<Payers> {
        if !self.queue.lock().begin(payers) {
            return Vec::new();
        }
        while let Some(turn) = self.next() {
            let Some(seat) = self.sit() else {
                tracing::error!(
                    "a change to a room is dropped: an earlier one never gave back the room's seat"
                );
                continue;
            };
            // A turn that panics is answered as a fault of ours; the panic is logged by the hook. The next ones go on
            // from what the store says, because the seat leaves no tip behind when it is dropped by a panic.
            drop(panic::catch_unwind(AssertUnwindSafe(|| turn(seat))));
            if is_over() {
                return self.queue.lock().end();
            }
        }
        Vec::new()
    }

    fn next(&self) -> Option<Turn> {
        let mut queue = self.queue.lock();
        let next = queue.waiting.pop_front();
        queue.is_worked_off = next.is_some();
        next.map(|(_, turn)| turn)
    }

    /// Gives the seat of the room, unless somebody has it. Only the thread that works the turns off, and tests, take
    /// it.
    pub(crate) fn sit(self: &Arc<Self>) -> Option<Seat> {
        let mut queue = self.queue.lock();
        if std::mem::replace(&mut queue.is_seated, true) {
            return None;
        }
        let tip = queue.tip.take();
        Some(Seat { turns: Arc::clone(self), tip })
    }

    fn stand_up(&self, tip: Option<Tip>) {
        let bytes = tip.as_ref().map_or(0, Tip::byte_count);
        let mut queue = self.queue.lock();
        debug_assert!(queue.is_seated, "a seat is given back once");
        debug_assert!(queue.tip.is_none(), "the tip of a room is in its seat while somebody has that");
        self.tips_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.tips_bytes.fetch_sub(queue.tip_bytes, Ordering::Relaxed);
        queue.tip_bytes = bytes;
        queue.tip = tip;
        queue.is_seated = false;
    }
}

impl Queue {
    /// Notes that a thread is asked for these payers. Gives `false` if one was asked for before, or enough were, for all or for
    /// one of these.
    fn ask(&mut self, payers: Payers) -> bool {
        let is_new = self.asked.len() < ASKED_MAX
            && !self.asked.contains(&payers)
            && self.asked_shares.find_without_room(payers, 1).is_none();
        if is_new {
            self.asked.push(payers);
            self.asked_shares.take(payers, 1);
        }
        is_new
    }

    /// Notes that the thread which was asked for these payers has come. Gives `false` if another is at work.
    fn begin(&mut self, payers: Payers) -> bool {
        if let Some(at) = self.asked.iter().position(|asked| *asked == payers) {
            self.asked.swap_remove(at);
            self.asked_shares.give_back(payers, 1);
        }
        !std::mem::replace(&mut self.is_worked_off, true)
    }

    /// Notes that the thread goes. Gives the payers for whom another must be asked to work off the turns that are left.
    fn end(&mut self) -> Vec<Payers> {
        self.is_worked_off = false;
        let waiting: Vec<_> = self.waiting.iter().map(|(payers, _)| *payers).collect();
        waiting.into_iter().filter(|payers| self.ask(*payers)).collect()
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        self.tips_bytes.fetch_sub(self.queue.get_mut().tip_bytes, Ordering::Relaxed);
    }
}

/// The right to change a room, with the room's tip, if that is remembered. There is one at a time; dropping it gives it
/// back.
#[derive(Debug)]
pub struct Seat {
    turns: Arc<Turns>,
    pub(in crate::rooms) tip: Option<Tip>,
}

impl Seat {
    /// Begins to note the events that changes of this room cite. Gives `false` while somebody has the right to change its past.
    pub(in crate::rooms) fn note_cited(&self) -> bool {
        let mut cited = self.turns.cited.lock();
        let is_free = !self.turns.is_past_changing.load(Ordering::Acquire)
            && self.turns.unswept_for.load(Ordering::Acquire) == 0;
        if is_free {
            *cited = Some(Cited::default());
        }
        is_free
    }

    /// Notes that an event is cited by one that comes in, if a sweep wants to know.
    pub(in crate::rooms) fn cite(&self, event: EventNum) {
        self.note(|cited| cited.events.insert(event));
    }

    /// Notes that a state key is used by an event that comes in, if a sweep wants to know.
    pub(in crate::rooms) fn use_key(&self, key: StateKeyNum) {
        self.note(|cited| cited.keys.insert(key));
    }

    fn note(&self, add: impl FnOnce(&mut Cited) -> bool) {
        if let Some(cited) = &mut *self.turns.cited.lock() {
            cited.is_lost |= cited.events.len().max(cited.keys.len()) >= CITED_MAX;
            if !cited.is_lost {
                add(cited);
            }
        }
    }

    /// Takes what was cited and used since this was last asked; `None` if not all was noted.
    pub(in crate::rooms) fn take_cited(&self) -> Option<Cited> {
        let mut cited = self.turns.cited.lock();
        let cited = cited.as_mut().filter(|cited| !cited.is_lost)?;
        Some(std::mem::take(cited))
    }

    /// Whether the room is being joined by a step that takes several turns.
    pub(in crate::rooms) fn is_being_joined(&self) -> bool {
        self.turns.is_being_joined.load(Ordering::Acquire)
    }

    /// The room that may be changed.
    pub(crate) fn room(&self) -> RoomNum {
        self.turns.room
    }

    /// Proves to the store that nobody else changes the room. The guard is given back before the seat is.
    pub(in crate::rooms) fn guard(&self) -> Guard {
        Guard::of_room(self.room())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // A change that a panic interrupted may have left half a tip, so the tip is dropped.
        let tip = if std::thread::panicking() { None } else { self.tip.take() };
        self.turns.stand_up(tip);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::{
        env::payer::Payer,
        ids::{Order, UserNum},
        rooms::tip::tests::{row, some_state},
    };

    #[test]
    fn reunions_of_a_room_keep_their_distance() {
        let (reunions, at) = (Pace::default(), Duration::from_secs);
        assert!(reunions.claim());
        assert!(!reunions.claim(), "one is enough for all that came before it");
        assert_eq!(reunions.begin(at(5)), Ok(()));
        assert!(reunions.claim(), "what comes in meanwhile needs another one");
        assert!(reunions.begin(at(6)).is_err(), "one at a time");
        reunions.end(at(7), at(2));
        assert_eq!(reunions.begin(at(8)), Err(at(39)), "it waits twenty times as long as the last one took");
        assert_eq!(reunions.begin(at(47)), Ok(()));
        reunions.end(at(47), at(1_000));
        assert!(reunions.claim());
        assert_eq!(reunions.begin(at(48)), Err(PAUSE_MAX - at(1)));
    }

    #[test]
    fn a_turn_that_panics_stops_no_other() {
        let turns = AllTurns::default().of(RoomNum(1));
        let reached = Arc::new(AtomicBool::new(false));
        let mark = Arc::clone(&reached);
        assert!(turns.add(Box::new(|_seat| panic!("a turn of this test"))).unwrap().is_some());
        let later = turns.add(Box::new(move |_seat| mark.store(true, Ordering::Relaxed))).unwrap();
        assert_eq!(later, None);
        assert!(turns.work_off(Payers::SERVER, || false).is_empty());
        assert!(reached.load(Ordering::Relaxed));
        assert!(turns.add(Box::new(|_seat| ())).unwrap().is_some(), "nobody is at work any more");
    }

    #[test]
    fn a_seat_is_had_by_one_and_leaves_no_tip_after_a_panic() {
        let turns = AllTurns::default().of(RoomNum(1));
        let mut seat = turns.sit().unwrap();
        assert!(turns.sit().is_none());
        seat.tip = Some(Tip::of(row(Order::MIN), 0));
        drop(seat);
        assert!(turns.sit().unwrap().tip.is_some());
        turns.add(Box::new(|_seat| panic!("a turn of this test"))).unwrap();
        turns.work_off(Payers::SERVER, || false);
        assert!(turns.sit().unwrap().tip.is_none());
    }

    #[test]
    fn a_worker_that_had_its_time_leaves_the_rest_to_the_next() {
        let turns = AllTurns::default().of(RoomNum(1));
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..3 {
            let done = Arc::clone(&done);
            let turn = move |_seat| {
                done.fetch_add(1, Ordering::Relaxed);
            };
            turns.add(Box::new(turn)).unwrap();
        }
        assert_eq!(turns.work_off(Payers::SERVER, || true), [Payers::SERVER]);
        assert_eq!(done.load(Ordering::Relaxed), 1);
        assert_eq!(turns.add(Box::new(|_seat| ())).unwrap(), None, "the rest is still to be worked off");
        assert!(turns.work_off(Payers::SERVER, || false).is_empty());
        assert_eq!(done.load(Ordering::Relaxed), 3);
        assert!(turns.add(Box::new(|_seat| ())).unwrap().is_some());
        assert!(
            turns.work_off(Payers::SERVER, || true).is_empty(),
            "after the last turn there is nothing to leave"
        );
        assert!(turns.add(Box::new(|_seat| ())).unwrap().is_some());
    }

    #[tokio::test]
    async fn a_room_is_worked_off_for_whoever_has_a_place() {
        let turns = AllTurns::default().of(RoomNum(1));
        let (greedy, other) = (Payers::one(Payer::User(UserNum(1))), Payers::one(Payer::User(UserNum(2))));
        let done = Arc::new(AtomicUsize::new(0));
        let turn = || -> Turn {
            let done = Arc::clone(&done);
            Box::new(move |_seat| {
                done.fetch_add(1, Ordering::Relaxed);
            })
        };
        assert_eq!(greedy.during(async { turns.add(turn()) }).await.unwrap(), Some(greedy));
        assert_eq!(greedy.during(async { turns.add(turn()) }).await.unwrap(), None);
        // The thread of the first payer may not come for long, because that payer waits for places.
        assert_eq!(other.during(async { turns.add(turn()) }).await.unwrap(), Some(other));
        assert!(turns.work_off(other, || false).is_empty());
        assert_eq!(done.load(Ordering::Relaxed), 3);
        assert!(turns.work_off(greedy, || false).is_empty());
        // A thread that has had its time leaves the rest to one for each payer who waits.
        for payers in [greedy, greedy, other] {
            let _ = payers.during(async { turns.add(turn()) }).await.unwrap();
        }
        assert!(turns.work_off(greedy, || true) == [greedy], "a thread was asked for the other one before");
        assert!(turns.work_off(other, || false).is_empty());
        assert_eq!(done.load(Ordering::Relaxed), 6);
    }

    #[tokio::test]
    async fn many_accounts_at_one_address_leave_places_to_be_asked_for_to_others() {
        let turns = AllTurns::default().of(RoomNum(1));
        let at = |user, host| Payers::of_request(Some(UserNum(user)), [192, 0, 2, host].into());
        let add =
            async |payers: Payers| payers.during(async { turns.add(Box::new(|_seat| ())) }).await.unwrap();
        // The threads for this address do not come, because the address has all the places that it may have.
        let mut asked = Vec::new();
        for user in 1..=ASKED_MAX as u64 {
            asked.extend(add(at(user, 1)).await);
        }
        assert_eq!(asked, [at(1, 1), at(2, 1)], "an address has a share of those who are asked");
        let other = at(100, 2);
        assert_eq!(add(other).await, Some(other));
        assert!(turns.work_off(other, || false).is_empty());
        assert!(turns.queue.lock().waiting.is_empty(), "all turns were taken by the thread of the other");
        for payers in asked {
            assert!(turns.work_off(payers, || false).is_empty());
        }
        let queue = turns.queue.lock();
        assert!(queue.asked.is_empty() && queue.asked_shares.is_empty());
    }

    #[test]
    fn the_tips_that_were_asked_for_longest_ago_go_first_and_one_by_one() {
        let all = AllTurns::default();
        let remember = |room: usize, bytes: usize| {
            let turns = all.of(RoomNum(room as u64));
            let mut seat = turns.sit().unwrap();
            let mut tip = Tip::of(row(Order::MIN), 0);
            some_state(&mut tip, bytes);
            seat.tip = Some(tip);
        };
        let is_known = |room: usize| {
            let kept = all.rooms.lock();
            kept.rooms.get(&RoomNum(room as u64)).is_some_and(|(turns, _)| turns.queue.lock().tip.is_some())
        };
        let held = all.of(RoomNum(0));
        for room in 1..=ROOMS_MAX + 10 {
            remember(room, 1_000);
        }
        assert!(is_known(ROOMS_MAX + 10) && is_known(ROOMS_MAX / 2), "those asked for lately are kept");
        assert!(!is_known(1), "the oldest went");
        assert!(Arc::ptr_eq(&held, &all.of(RoomNum(0))), "a room that somebody holds stays");
        // A few tips are large enough to reach the bound of bytes.
        for room in 0..20 {
            remember(10_000 + room, 8 << 20);
        }
        all.of(RoomNum(0));
        assert!(all.tips_bytes() <= TIPS_BYTES_MAX, "{}", all.tips_bytes());
        assert!(is_known(10_019) && !is_known(10_000));
        all.rooms.lock().rooms.clear();
        assert_eq!(all.tips_bytes(), 0);
    }
}
