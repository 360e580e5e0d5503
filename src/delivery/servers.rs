//! Other servers are told what happens here: the events of our users and those that they let in, receipts, who types, who is
//! online, which devices they have, and messages to devices (server-server API, "Transactions").
//!
//! One reader follows the log ([`reader`]), works out who is told of an event ([`fan_out`]), and puts its place into the queue of
//! each such server ([`board`]). A server whose turn it is ([`send`]) gets what waits for it as a [`transaction`]. All of
//! that is memory: a healthy server has no row. A server that does not answer is marked as behind, once a room and once a user whose
//! devices changed ([`marks`]), is
//! tried again ever later, or at once when it speaks to us, and is then brought up to date ([`catch_up`]).
//! Messages to devices are nobody's to lose, and wait in the store ([`outbox`]).

mod board;
mod catch_up;
mod edus;
mod fan_out;
mod marks;
mod news;
pub mod outbox;
mod outboxes;
mod reader;
mod send;
mod shared;
mod subject;
mod transaction;

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use federation::{backoff::Failing, client::Client};
use ruma::{OwnedServerName, OwnedUserId, ServerName, UserId};
use tokio::sync::watch;

use crate::{
    delivery::servers::{
        outboxes::{Outboxes, Sender},
        shared::{READER, Shared},
    },
    env::Env,
    error::Result,
    ids::{Position, RoomNum, UserNum},
    metrics::Metrics,
    store::{Fault, Read, Store, cursor},
};

pub use edus::Told;
pub use shared::People;

/// At most this many changes of who types wait to be given to queues.
const TYPING_ASKED_MAX: usize = 10_000;
/// A user who goes on typing is told again after this time.
const TYPING_TOLD_AGAIN_MS: u64 = 25_000;
/// At most this many users wait whose presence is told.
const PRESENCE_ASKED_MAX: usize = 20_000;
/// When the server starts, servers that are behind are tried one after the other, this far apart.
const START_APART_MS: u64 = 20;
/// The first of them waits this long, and each a little longer by chance.
const START_JITTER_MS: u64 = 1_000;

/// Tells other servers what happens here. Cheap to clone.
#[derive(Clone)]
pub struct Servers(Arc<Shared>);

/// The state of another server, as the operator is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its failures in a row, if it does not answer.
    pub failing: Option<Failing>,
    /// The last of them in words.
    pub why: Option<String>,
    /// Whether something is being sent to it.
    pub is_sending: bool,
    /// The number of rooms in which it misses events; more than that are not counted.
    pub rooms_behind: usize,
    /// The number of messages to its devices that wait.
    pub messages: usize,
}

/// Whether a server did not answer, and is not tried again before its time.
pub fn is_left_alone(read: &(impl Read + ?Sized), server: &ServerName, now_ms: u64) -> Result<bool, Fault> {
    let failing = marks::find_failing(read, server.as_str())?;
    Ok(failing.is_some_and(|row| row.failing.next_try_ms > now_ms))
}

impl Servers {
    /// A handle that does nothing yet: [`Servers::start`] begins.
    pub fn new(env: Env, store: Store, metrics: Metrics, client: Client, us: OwnedServerName) -> Self {
        Self(Arc::new(Shared::new(env, store, metrics, client, us)))
    }

    /// Begins to tell others, from where the last run ended. `written` says that the log has grown. Only the node that leads
    /// calls this, and only where rooms are shared with others.
    pub fn start(&self, written: watch::Receiver<()>, people: Arc<dyn People>) -> Result<()> {
        self.restore()?;
        self.0.has_started.store(true, Ordering::Release);
        let env = &self.0.env;
        env.spawn(send::give_turns(Arc::clone(&self.0)));
        env.spawn(reader::follow(Arc::clone(&self.0), people, written));
        env.spawn(news::tell(Arc::clone(&self.0)));
        Ok(())
    }

    /// Takes up what the last run left: where the log was read up to, who does not answer, who is behind, and the outboxes.
    fn restore(&self) -> Result<()> {
        let shared = &self.0;
        let snapshot = shared.store.snapshot();
        let mut failing = marks::list_failing(&*snapshot)?;
        // The servers that were spoken to most recently come first.
        failing.sort_by_key(|(_, row)| std::cmp::Reverse(row.failing.since_ms));
        let behind = marks::list_behind(&*snapshot)?;
        let (mut outboxes, mut waited_for) = (Outboxes::default(), BTreeSet::new());
        for waiting in outbox::list_all(&*snapshot)? {
            let (server, sender, bytes) = waiting?;
            outboxes.add(&server, sender, bytes);
            waited_for.insert(server);
        }
        let names = failing.iter().map(|(name, _)| name).chain(&behind);
        let names: Vec<String> = names.chain(&waited_for).cloned().collect();
        let now_ms = shared.env.now_ms();
        let mut board = shared.board.lock();
        board.read = cursor::find(&*snapshot, READER)?.unwrap_or(Position::ZERO);
        for (place, name) in names.iter().enumerate() {
            let Ok(server) = OwnedServerName::try_from(name.as_str()) else { continue };
            let row = failing.iter().find(|(of, _)| of == name).map(|(_, row)| row.failing);
            let has_marks = behind.binary_search(name).is_ok();
            let has_outbox = waited_for.contains(name);
            let apart_ms = START_APART_MS.saturating_mul(place as u64);
            let due_ms = now_ms + apart_ms + shared.env.random_below(START_JITTER_MS);
            let due_ms = row.map_or(due_ms, |row| row.next_try_ms.max(due_ms));
            board.restore(&server, row, (has_marks, has_outbox), due_ms);
            if row.is_some() {
                shared.away.write().insert(server);
            }
        }
        *shared.outboxes.lock() = outboxes;
        Ok(())
    }

    fn has_started(&self) -> bool {
        self.0.has_started.load(Ordering::Acquire)
    }

    /// Another server has proved that it speaks to us. If it counts as not answering, it is tried again at once.
    pub fn heard_from(&self, server: &ServerName) {
        if !self.0.away.read().contains(server) {
            return;
        }
        let is_tried = self.0.board.lock().heard_from(server, self.0.env.now_ms());
        if is_tried {
            // It may have been nowhere when it was last looked for, as servers that start together are.
            self.0.client.caller().discovery().heard_from(server);
        }
        self.0.turns.notify_one();
    }

    /// Has a server tried now that does not answer or is behind. Tells whether there was something to try.
    pub fn retry(&self, server: &ServerName) -> bool {
        let is_tried = self.0.board.lock().retry(server, self.0.env.now_ms());
        self.0.turns.notify_one();
        is_tried
    }

    /// Tells the servers in a room that one of our users types there, or has stopped. A user who goes on typing (`is_new` is
    /// false) is told now and then, because others forget it.
    pub fn typing(&self, room: RoomNum, user_id: &UserId, types: bool, is_new: bool) {
        if !self.has_started() || user_id.server_name() != self.0.us {
            return;
        }
        let (now_ms, key) = (self.0.env.now_ms(), (room, user_id.to_owned()));
        let mut told = self.0.typing_told.lock();
        let last_ms = told.get(&key).copied().unwrap_or(0);
        if !is_new && now_ms.saturating_sub(last_ms) < TYPING_TOLD_AGAIN_MS {
            return;
        }
        if told.len() >= TYPING_ASKED_MAX {
            told.clear();
        }
        if types {
            told.insert(key, now_ms);
        } else {
            told.remove(&key);
        }
        drop(told);
        let mut asked = self.0.asked.lock();
        asked.typing.retain(|(of, user, _)| *of != room || user != user_id);
        if asked.typing.len() < TYPING_ASKED_MAX {
            asked.typing.push_back((room, user_id.to_owned(), types));
        }
        drop(asked);
        self.0.news.notify_one();
    }

    /// Tells the servers that share a room with one of our users how present the user is.
    pub fn presence(&self, user: UserNum, user_id: OwnedUserId, told: Told) {
        if !self.has_started() {
            return;
        }
        let mut asked = self.0.asked.lock();
        if asked.presence.len() < PRESENCE_ASKED_MAX || asked.presence.contains_key(&user) {
            asked.presence.insert(user, (user_id, told));
        }
        drop(asked);
        self.0.news.notify_one();
    }

    /// Keeps room for a message in the outbox of a server. It is refused where its sender has as much there as is free, or where nothing is
    /// told to other servers. Requests for keys are refused earlier.
    pub fn reserve_outbox(
        &self,
        server: &ServerName,
        sender: &UserId,
        event_type: &str,
        bytes: usize,
    ) -> bool {
        if !self.has_started() || !self.0.client.caller().servers().allows(server) {
            return false;
        }
        let (sender, is_key_request) = (Sender::of(sender.as_str()), outbox::is_key_request(event_type));
        self.0.outboxes.lock().reserve(server.as_str(), sender, bytes, is_key_request)
    }

    /// Messages for a server have come into its outbox, and are durable.
    pub fn outbox_filled(&self, server: &ServerName) {
        if self.has_started() {
            self.0.board.lock().offer_outbox(&server.to_owned());
            self.0.turns.notify_one();
        }
    }

    /// The state of a server.
    pub fn state_of(&self, server: &ServerName) -> Result<Status> {
        let view = self.0.store.view();
        let seen = self.0.board.lock().seen(server);
        let row = marks::find_failing(&view, server.as_str())?;
        let waiting = self.0.outboxes.lock().size(server.as_str());
        Ok(Status {
            failing: seen.map_or_else(|| row.as_ref().map(|row| row.failing), |seen| seen.failing),
            why: row.map(|row| row.why),
            is_sending: seen.is_some_and(|seen| seen.is_sending),
            rooms_behind: marks::list_rooms(&view, server.as_str(), ROOMS_COUNTED_MAX)?.len(),
            messages: waiting.messages,
        })
    }

    /// The servers for which something waits or that do not answer, by name.
    pub fn list(&self) -> Vec<OwnedServerName> {
        self.0.board.lock().names().cloned().collect()
    }

    /// The number of servers for which something waits or that do not answer, and how many of these do not answer.
    pub fn count(&self) -> (usize, usize) {
        self.0.board.lock().count()
    }

    /// How many positions of the log are still to be told.
    pub fn lag(&self) -> u64 {
        if !self.has_started() {
            return 0;
        }
        let upto = self.0.store.snapshot().upto();
        upto.number().saturating_sub(self.0.board.lock().read.number())
    }
}

/// Count at most this many rooms in which a server is behind.
const ROOMS_COUNTED_MAX: usize = 10_000;
