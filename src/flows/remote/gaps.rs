//! Rooms that lack something, as they are remembered in memory: who is fetching for them now, and what was fetched in vain lately, so that
//! nobody can have us ask for ever. Servers whose names are of one owner take turns (`gaps/neighbours.rs`).

mod neighbours;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use federation::turns::Turns;
use parking_lot::Mutex;
use ruma::{OwnedServerName, ServerName};
use tokio::sync::watch;

use self::neighbours::Neighbours;
use super::kept::Kept;
use crate::{
    env::{
        Env,
        payer::{self, Payer, Payers},
    },
    error::Result,
    flows::{
        App,
        lanes::{Lanes, Pace, SLOW_AFTER},
    },
    ids::{Order, RoomNum},
    rooms::{
        self,
        change::invited::Source,
        members,
        turns::{HistoryClaim, Unswept},
    },
    schema::rooms::{Resident, RoomRow},
    store::{Fault, Read},
};

/// At most this many states are fetched at once, each in another room and for events of another server, until it is known that they
/// come slowly.
const QUICK_STATES: usize = 8;
/// It takes at least this many users, in whose rooms that is, to have as many fetched.
const STATES_PAYERS_MIN: usize = 2;
/// At most this many that come slowly are fetched at once, besides.
const SLOW_STATES: usize = 24;
/// A server for whose events a state came slowly counts as slow for this time.
const SLOW_FOR: Duration = Duration::from_secs(60 * 60);
/// The names of such servers have at most this many bytes.
const SLOW_BYTES_MAX: usize = 256 << 10;
/// A name of such a server takes this many bytes beside its own.
const SLOW_OVERHEAD: usize = 64;
/// At most this many holes are filled at once for readers, each in another room, until it is known that this takes long.
const QUICK_FILLS: usize = 16;
/// It takes at least this many readers to have as many filled, so that nobody's slow rooms hold up those of others.
const READERS_MIN: usize = 8;
/// At most this many that take long are filled at once, besides.
const SLOW_FILLS: usize = 16;
/// At most this much is fetched at once for servers that have nobody in the room, until it is known that they answer slowly.
const QUICK_STRANGERS: usize = 16;
/// It takes at least this many owners of names, and as many addresses, to have as much fetched.
const STRANGERS_MIN: usize = 8;
/// A server that has nobody in the room, and has not answered by then, is slow: a transaction waits for a few seconds only.
const STRANGERS_SLOW_AFTER: Duration = Duration::from_secs(1);
/// At most this much is fetched at once for such servers that are slow, besides.
const SLOW_STRANGERS: usize = 64;
/// Wait at most this long for others who fetch for the room; then fetch beside them, because one of them may wait for a server that
/// does not answer.
const TURN_WAITS_MAX: Duration = Duration::from_secs(3);
/// States that were fetched for events of one server in one room keep this distance at least.
const PAUSE_MIN: Duration = Duration::from_secs(10);
/// They keep this distance at most.
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// Their distance is this many times as long as the last one took.
const PAUSES: u32 = 10;
/// Remember the distances of at most this many pairs of room and server.
const PACED_MAX: usize = 10_000;
/// A hole that nobody could fill is left alone for this long.
const LEFT_ALONE: Duration = Duration::from_secs(120);
/// Remember at most this many holes that nobody could fill.
const LEFT_ALONE_MAX: usize = 10_000;

/// The states of a room may lack events once they have done so for this long. Until then they are fetched again, because servers
/// mostly come back, and what a state lacks is missed for good.
const LACKS_AFTER: Duration = Duration::from_secs(30 * 60);

/// Wait for this long until nobody else changes the room's past.
const CLAIM_WAITS: Duration = Duration::from_secs(30);
/// Look this often whether somebody still changes the room's past.
const CLAIM_LOOKED_AT_EVERY: Duration = Duration::from_millis(500);

/// The rooms for which something is fetched.
#[derive(Debug)]
pub struct Gaps {
    /// The turns of servers in a room, among those whose names are of the same owner.
    neighbours: Neighbours,
    /// Those who fetch for a room do so one after the other, as long as that is quick: what one of them brings the others need not ask for.
    rooms: Turns<RoomNum>,
    /// The uptime from which on the next state may be fetched in a room for a server.
    paced: Mutex<BTreeMap<(RoomNum, OwnedServerName), Duration>>,
    /// The servers for whose events states are fetched now.
    states: Mutex<BTreeSet<OwnedServerName>>,
    /// The places for fetching states.
    state_lanes: Lanes,
    /// The hosts for whose events states came slowly lately.
    slow: Kept<String, ()>,
    /// The rooms whose states lack events, with the uptime at which that began.
    lacking: Mutex<BTreeMap<RoomNum, Duration>>,
    /// The places for filling holes.
    pub(super) fills: Lanes,
    /// The places for fetching what servers lead to that have nobody in the room.
    strangers: Lanes,
    /// The rooms of which a hole is being filled; the channel closes at the end.
    filling: Mutex<HashMap<RoomNum, watch::Receiver<()>>>,
    /// The holes that nobody could fill, with the uptime from which on they are tried again.
    in_vain: Mutex<BTreeMap<(RoomNum, Order), Duration>>,
}

impl Default for Gaps {
    fn default() -> Self {
        Self {
            neighbours: Neighbours::default(),
            rooms: Turns::default(),
            paced: Mutex::default(),
            states: Mutex::default(),
            state_lanes: Lanes::new((QUICK_STATES, STATES_PAYERS_MIN), SLOW_STATES),
            slow: Kept::new(SLOW_BYTES_MAX),
            lacking: Mutex::default(),
            fills: Lanes::new((QUICK_FILLS, READERS_MIN), SLOW_FILLS),
            strangers: Lanes::new((QUICK_STRANGERS, STRANGERS_MIN), SLOW_STRANGERS)
                .slow_after(STRANGERS_SLOW_AFTER),
            filling: Mutex::default(),
            in_vain: Mutex::default(),
        }
    }
}

/// A state that is being fetched for events of a server.
struct StateFetch<'a> {
    gaps: &'a Gaps,
    server: OwnedServerName,
}

impl Drop for StateFetch<'_> {
    fn drop(&mut self) {
        self.gaps.states.lock().remove(&self.server);
    }
}

/// A hole that is being filled. Dropping this tells those who wait for it.
pub(super) struct Filling<'a> {
    gaps: &'a Gaps,
    room: RoomNum,
    _ends: watch::Sender<()>,
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.gaps.filling.lock().remove(&self.room);
    }
}

impl Gaps {
    /// Fetches what events of a server lack in a room, when it is its turn among its neighbours, and for a moment when nobody fetches for
    /// others of the room. `None` where it took long and a neighbour came: it is to be tried again later.
    pub(super) async fn fetch_in_turn<T>(
        &self,
        env: &Env,
        (room, origin): (RoomNum, &ServerName),
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let turn = self.neighbours.enter(env, room, origin).await;
        let of_room = tokio::select! {
            biased;
            turn = self.rooms.enter(room) => Some(turn),
            () = env.sleep(TURN_WAITS_MAX) => None,
        };
        turn.run(env, of_room, work).await
    }

    /// Fetches what events lack of a server that has nobody in the room, in a place that the owner of its name and the address of the
    /// request pay for; `None` where there is none for long, or where it came slowly and others need the place.
    pub(super) async fn fetch_for_stranger<T>(
        &self,
        env: &Env,
        origin: &ServerName,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let owner = Payer::peer(Source::of(origin.as_str()).as_str());
        let payers = payer::current().led_by(owner);
        let ran = self.strangers.run(env, (payers, Pace::Unknown), work).await;
        ran.inspect_err(|why| tracing::debug!(%origin, ?why, "nothing is fetched for a stranger for now"))
            .ok()
    }

    /// Whether a state may be fetched in a room for events that a server gave; `now` is the uptime here and below.
    pub(super) fn may_fetch_state(&self, room: RoomNum, server: &OwnedServerName, now: Duration) -> bool {
        self.paced.lock().get(&(room, server.clone())).is_none_or(|from| *from <= now)
    }

    /// Notes that a state is fetched for events of a server; `None` if one is fetched for it already. Servers that differ in their
    /// ports alone are one: whoever has one of them has all.
    fn begin_state(&self, server: &OwnedServerName) -> Option<StateFetch<'_>> {
        let mut states = self.states.lock();
        if states.iter().any(|other| other.host() == server.host()) {
            return None;
        }
        states.insert(server.clone());
        Some(StateFetch { gaps: self, server: server.clone() })
    }

    /// Fetches a state for events of a server in a room that these pay for, in turn and in a place for that; `None` if one is fetched
    /// for it already, if too many wait, or if it came too slowly while others waited. One server that is slow holds up no other.
    pub(super) async fn fetch_state<T>(
        &self,
        app: &App,
        (payers, server): (Payers, &OwnedServerName),
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let _one_of_server = self.begin_state(server)?;
        let is_slow = self.slow.find(&server.host().to_owned(), app.env.uptime()).is_some();
        let pace = if is_slow { Pace::Slow } else { Pace::Unknown };
        let ran = self.state_lanes.run(&app.env, (payers, pace), work).await;
        ran.inspect_err(|why| tracing::debug!(%server, ?why, "no state is fetched for now")).ok()
    }

    /// Notes that a state was fetched, or not given, and how long that took from when the server was asked.
    pub(super) fn fetched_state(
        &self,
        room: RoomNum,
        server: OwnedServerName,
        now: Duration,
        took: Duration,
    ) {
        if took >= SLOW_AFTER {
            let host = server.host().to_owned();
            let bytes = host.len() + SLOW_OVERHEAD;
            self.slow.keep(host, (), bytes, now.saturating_add(SLOW_FOR));
        }
        let mut paced = self.paced.lock();
        if paced.len() >= PACED_MAX {
            paced.retain(|_, from| *from > now);
        }
        if paced.len() >= PACED_MAX {
            paced.pop_first();
        }
        let pause = took.saturating_mul(PAUSES).clamp(PAUSE_MIN, PAUSE_MAX);
        paced.insert((room, server), now.saturating_add(pause));
    }

    /// Whether a state of a room that was fetched may lack events. `false` for a while after that was asked first.
    pub(super) fn may_lack(&self, room: RoomNum, now: Duration) -> bool {
        let mut lacking = self.lacking.lock();
        if lacking.len() >= PACED_MAX && !lacking.contains_key(&room) {
            // Those that began first have waited for the longest time.
            let oldest = lacking.iter().min_by_key(|(_, began)| **began).map(|(room, _)| *room);
            lacking.retain(|room, _| Some(*room) != oldest);
        }
        let began = *lacking.entry(room).or_insert(now);
        now.saturating_sub(began) >= LACKS_AFTER
    }

    /// Notes that a whole state of a room was fetched.
    pub(super) fn lacks_nothing(&self, room: RoomNum) {
        self.lacking.lock().remove(&room);
    }

    /// Gives what tells when somebody has ended to fill a hole of a room, if somebody does.
    pub(super) fn find_filling(&self, room: RoomNum) -> Option<watch::Receiver<()>> {
        self.filling.lock().get(&room).cloned()
    }

    /// Begins to fill a hole of a room; or gives what tells when somebody else has ended to.
    pub(super) fn begin_filling(&self, room: RoomNum) -> Result<Filling<'_>, watch::Receiver<()>> {
        let mut filling = self.filling.lock();
        if let Some(ends) = filling.get(&room) {
            return Err(ends.clone());
        }
        let (sender, receiver) = watch::channel(());
        filling.insert(room, receiver);
        Ok(Filling { gaps: self, room, _ends: sender })
    }

    /// Whether a hole is left alone for now, because nobody could fill it a short while ago.
    pub(super) fn is_left_alone(&self, room: RoomNum, hole: Order, now: Duration) -> bool {
        self.in_vain.lock().get(&(room, hole)).is_some_and(|from| *from > now)
    }

    /// Notes that nobody could fill a hole.
    pub(super) fn leave_alone(&self, room: RoomNum, hole: Order, now: Duration) {
        let mut in_vain = self.in_vain.lock();
        if in_vain.len() >= LEFT_ALONE_MAX {
            in_vain.retain(|_, from| *from > now);
        }
        if in_vain.len() >= LEFT_ALONE_MAX {
            in_vain.pop_first();
        }
        in_vain.insert((room, hole), now.saturating_add(LEFT_ALONE));
    }
}

/// Waits for the right to change a room's past. Nobody waits for another server while they have it.
pub(super) async fn claim_history(app: &App, room: RoomNum) -> Option<HistoryClaim> {
    wait_for(app, || app.rooms.turns(room).claim_history()).await
}

/// Waits until a room is not swept, and keeps it so.
pub(super) async fn keep_unswept(app: &App, room: RoomNum) -> Option<Unswept> {
    wait_for(app, || app.rooms.turns(room).keep_unswept()).await
}

async fn wait_for<T>(app: &App, find: impl Fn() -> Option<T>) -> Option<T> {
    let until = app.env.uptime().saturating_add(CLAIM_WAITS);
    loop {
        if let Some(found) = find() {
            return Some(found);
        }
        if app.env.uptime() >= until {
            return None;
        }
        app.env.sleep(CLAIM_LOOKED_AT_EVERY).await;
    }
}

/// Whether a server has nobody in a room, as far as this server follows it. In a room of which not all members are known, one that is said to
/// be there has somebody.
pub(super) fn has_nobody_in(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    server: &ServerName,
) -> Result<bool, Fault> {
    // A room that was being joined is gone where the join came to nothing.
    let row = rooms::find_row(read, room)?;
    let follows = |row: &RoomRow| matches!(row.resident, Resident::Yes | Resident::Partial);
    Ok(row.as_ref().is_some_and(follows) && !members::is_server_joined(read, room, server.as_str())?)
}

/// Like [`has_nobody_in`], beside the async threads.
pub(super) async fn is_stranger(app: &App, room: RoomNum, server: &ServerName) -> Result<bool> {
    let (owned, server) = (app.clone(), server.to_owned());
    app.env.blocking(move || Ok(has_nobody_in(&*owned.store.snapshot(), room, &server)?)).await
}
