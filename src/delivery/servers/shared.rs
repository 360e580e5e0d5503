//! The part that the tasks share which tell other servers.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use federation::client::Client;
use parking_lot::{Mutex, RwLock};
use ruma::{OwnedServerName, OwnedUserId, ServerName, UserId};
use tokio::sync::Notify;

use crate::{
    delivery::servers::{
        board::Board,
        edus::Told,
        fan_out::Planner,
        marks,
        outboxes::{Outboxes, Sender},
    },
    env::Env,
    error::Result,
    ids::{Position, RoomNum, UserNum},
    metrics::Metrics,
    schema::remote::DestinationRow,
    store::{Guard, Store},
};

/// Characters of the part of transaction ids that each run of the server has for itself.
const RUN_CHARACTERS: usize = 10;

/// The name of the reader that tells other servers.
pub(super) const READER: &str = "servers";

/// Ephemeral news that is still to be given to the queues of servers.
#[derive(Default)]
pub(super) struct Asked {
    /// Who types in a room, or has stopped; in the order in which it was said.
    pub(super) typing: VecDeque<(RoomNum, OwnedUserId, bool)>,
    /// Users whose presence changed, with how present they are now.
    pub(super) presence: BTreeMap<UserNum, (OwnedUserId, Told)>,
}

/// The presence of users, as those know it who keep it in memory. It is told to a server when the server comes to share a room with a
/// user of ours, and else when it changes.
pub trait People: Send + Sync {
    /// How present a user of ours is, where others are told of that.
    fn presence(&self, user: UserNum) -> Option<Told>;

    /// Our users came to share this room with a user of another server, or do again.
    fn met(&self, other: &UserId, room: RoomNum);
}

/// The part that all tasks share.
pub(super) struct Shared {
    pub(super) env: Env,
    pub(super) store: Store,
    pub(super) metrics: Metrics,
    pub(super) client: Client,
    pub(super) us: OwnedServerName,
    pub(super) board: Mutex<Board>,
    pub(super) planner: Mutex<Planner>,
    pub(super) asked: Mutex<Asked>,
    /// How much waits in outboxes, and whose it is.
    pub(super) outboxes: Mutex<Outboxes>,
    /// When a room was last told that a user goes on typing: milliseconds since the epoch.
    pub(super) typing_told: Mutex<BTreeMap<(RoomNum, OwnedUserId), u64>>,
    /// The servers that do not answer: whatever speaks to us is looked for here.
    pub(super) away: RwLock<BTreeSet<OwnedServerName>>,
    /// The rooms that became whole after they were joined without their members, and to whose servers the devices of our users are still
    /// to be announced: by the uptime at which that is done, each with the place in the log at which it became whole.
    pub(super) announcing: Mutex<BTreeMap<(Duration, RoomNum), Position>>,
    /// Marks that are written and not durable yet: a number for each batch, and its oldest mark.
    settling: Arc<Mutex<BTreeMap<u64, Position>>>,
    run: String,
    numbers: AtomicU64,
    pub(super) has_started: AtomicBool,
    /// Tells that a server has a turn, or that a place is free.
    pub(super) turns: Notify,
    /// Tells that ephemeral news was asked for.
    pub(super) news: Notify,
}

impl Shared {
    pub(super) fn new(env: Env, store: Store, metrics: Metrics, client: Client, us: OwnedServerName) -> Self {
        Self {
            board: Mutex::default(),
            planner: Mutex::new(Planner::new(us.clone(), client.clone())),
            asked: Mutex::default(),
            outboxes: Mutex::default(),
            typing_told: Mutex::default(),
            away: RwLock::default(),
            announcing: Mutex::default(),
            settling: Arc::default(),
            run: env.random_string(RUN_CHARACTERS),
            numbers: AtomicU64::new(0),
            has_started: AtomicBool::new(false),
            turns: Notify::new(),
            news: Notify::new(),
            env,
            store,
            metrics,
            client,
            us,
        }
    }

    /// A number that this run gives once.
    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// The id of a new transaction. No other has it, in this run or another, because the other server takes two of one id for
    /// the same.
    pub(super) fn transaction_id(&self) -> String {
        format!("{}-{}", self.run, self.number())
    }

    /// Writes the marks that the board has taken, and remembers them until they are durable.
    pub(super) fn write_marks(&self, board: &mut Board) {
        for (oldest, flushed) in board.write_marks(&self.store) {
            let number = self.number();
            self.settling.lock().insert(number, oldest);
            let settling = Arc::clone(&self.settling);
            flushed.then(move |kept| {
                // A batch that was lost ends the process: its marks hold the cursor back until then.
                if kept.is_ok() {
                    settling.lock().remove(&number);
                }
            });
        }
    }

    /// The position from which the log is read again after a crash.
    pub(super) fn told_upto(&self) -> Position {
        // Announcements go to the board later, so that they are looked at first. The settling marks are looked at last: a mark may come
        // there from the board meanwhile, and not the other way.
        let announced = self.announcing.lock().values().min().copied();
        let told = self.board.lock().told_upto();
        let told = announced.map_or(told, |oldest| oldest.before().min(told));
        let settling = self.settling.lock().values().min().copied();
        settling.map_or(told, |oldest| oldest.before().min(told))
    }

    /// Notes that a server does not answer, for this run and the next.
    pub(super) fn note_failing(&self, server: &OwnedServerName, row: DestinationRow) -> Result<()> {
        self.away.write().insert(server.clone());
        let mut note = self.store.note(&Guard::own_tables());
        marks::note_failing(&mut note, server.as_str(), row);
        drop(self.store.enqueue_note(note)?);
        Ok(())
    }

    /// Notes that a server answers again.
    pub(super) fn note_back(&self, server: &ServerName) -> Result<()> {
        self.away.write().remove(server);
        let mut note = self.store.note(&Guard::own_tables());
        marks::note_back(&mut note, server.as_str());
        drop(self.store.enqueue_note(note)?);
        Ok(())
    }

    /// Counts messages that left the outbox of a server: whose they were, and their bytes.
    pub(super) fn count_outbox(&self, server: &str, gone: Vec<(Sender, usize)>) {
        let mut outboxes = self.outboxes.lock();
        gone.into_iter().for_each(|(sender, bytes)| outboxes.remove(server, sender, bytes));
    }
}
