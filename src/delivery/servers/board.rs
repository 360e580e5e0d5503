//! Whom to send to next: the queues of all servers for which something waits, in memory. A server for which nothing waits, and
//! that answers, has no entry here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use federation::{
    backoff::{self, Failing, Pace},
    queue::{Action, Mark, Pdu, Queue},
};
use ruma::{OwnedServerName, ServerName};

use crate::{
    delivery::servers::{
        edus::{Edu, EduKey},
        marks,
        subject::Subject,
    },
    ids::Position,
    store::{Guard, NotAccepted, Published, Store},
};

/// At most this many servers that were quick last are sent to at once.
const SENDING_MAX: usize = 64;
/// At most this many servers are sent to at once of which this run does not know yet whether they are quick.
const FRESH_MAX: usize = 64;
/// At most this many servers that are slow are sent to at once: the others do not wait for them.
const SLOW_MAX: usize = 192;
/// At most this many servers are known to be quick; others count as those of which nothing is known.
const QUICK_MAX: usize = 20_000;
/// At most this many servers that did not answer last are tried at once.
const RETRYING_MAX: usize = 64;
/// A server that speaks to us, and that we still do not reach, is tried again for that after this time, which doubles each time.
const HEARD_AGAIN_MS: u64 = 2_000;
/// The longest time between two tries for that reason.
const HEARD_AGAIN_MS_MAX: u64 = 300_000;
/// A batch of marks has at most this many rows.
const MARKS_AT_ONCE: usize = 2_000;

/// The kind of place that sending takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// The server was quick last.
    Sending,
    /// Nothing is known of the server yet.
    Fresh,
    /// The server is slow, or was when it was last sent to.
    Slow,
    /// The server did not answer last.
    Retrying,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Nothing is to be done for it now.
    Resting,
    /// It waits for its turn.
    Waiting,
    /// A task sends to it.
    Sending,
}

struct Destination {
    queue: Queue<Subject, Position, EduKey>,
    failing: Option<Failing>,
    standing: Standing,
    /// When it gets a turn by itself: milliseconds since the epoch.
    due_ms: Option<u64>,
    /// When it was last tried in vain: milliseconds since the epoch.
    tried_ms: u64,
    /// How often it was tried in vain because it had spoken to us.
    heard: u32,
    was_heard: bool,
    /// Whether it was slow when it was last sent to.
    is_slow: bool,
    /// The position of the newest message of the outbox that it has taken in this run.
    outbox_upto: Position,
}

impl Destination {
    fn new(failing: Option<Failing>, has_marks: bool, has_outbox: bool) -> Self {
        Self {
            queue: Queue::new(failing.map(|failing| failing.next_try_ms), has_marks, has_outbox),
            failing,
            standing: Standing::Resting,
            due_ms: None,
            tried_ms: 0,
            heard: 0,
            was_heard: false,
            is_slow: false,
            outbox_upto: Position::ZERO,
        }
    }
}

/// The next step for a server.
#[derive(Debug)]
pub(super) enum Step {
    /// Do this, then tell how it went.
    Do(Action<Subject, Position, EduKey>),
    /// There is nothing to do now.
    Rest {
        /// Whether the server counted as failing until now.
        is_back: bool,
    },
}

/// The state of one server, for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) failing: Option<Failing>,
    pub(super) is_sending: bool,
}

/// The queues of all servers for which something waits.
#[derive(Default)]
pub(super) struct Board {
    destinations: BTreeMap<OwnedServerName, Destination>,
    /// Servers that were quick last, and wait for their turn.
    ready: VecDeque<OwnedServerName>,
    /// Servers of which nothing is known yet, and that wait for their turn.
    fresh: VecDeque<OwnedServerName>,
    /// Servers that were slow last, and wait for their turn.
    slow_ready: VecDeque<OwnedServerName>,
    /// Servers that did not answer last, and wait for their turn.
    retries: VecDeque<OwnedServerName>,
    due: BTreeSet<(u64, OwnedServerName)>,
    /// Servers that were quick last, also those for which nothing waits.
    quick: BTreeSet<OwnedServerName>,
    sending: usize,
    trying: usize,
    slow: usize,
    retrying: usize,
    /// Marks that are not in the store yet.
    unwritten: BTreeMap<(OwnedServerName, Subject), Position>,
    /// The position up to which the log was read.
    pub(super) read: Position,
}

impl Board {
    /// Takes up a server of which an earlier run has left something. It gets its turn at `due_ms`.
    pub(super) fn restore(
        &mut self,
        server: &OwnedServerName,
        failing: Option<Failing>,
        (has_marks, has_outbox): (bool, bool),
        due_ms: u64,
    ) {
        let known = self.destinations.get(server);
        if known.is_some() {
            return;
        }
        self.destinations.insert(server.clone(), Destination::new(failing, has_marks, has_outbox));
        if has_marks || has_outbox {
            self.schedule(server, due_ms);
        }
    }

    fn entry(&mut self, server: &OwnedServerName) -> &mut Destination {
        if !self.destinations.contains_key(server) {
            self.destinations.insert(server.clone(), Destination::new(None, false, false));
        }
        #[expect(clippy::expect_used, reason = "it was put there above, where it was missing")]
        self.destinations.get_mut(server).expect("it is there")
    }

    /// Has a server told of an event, or of a change of somebody's devices. A mark that this takes is written with
    /// [`Board::write_marks`].
    pub(super) fn offer(&mut self, server: &OwnedServerName, subject: Subject, place: Position) {
        let destination = self.entry(server);
        let mark = destination.queue.offer(Pdu { subject, place });
        self.keep(server, mark);
        self.wake(server);
    }

    /// Has a server told of ephemeral news, at once or with what comes until `at_ms`.
    pub(super) fn offer_edu(&mut self, server: &OwnedServerName, edu: Edu, at_ms: Option<u64>) {
        let destination = self.entry(server);
        if destination.failing.is_some() && !destination.was_heard {
            return;
        }
        destination.queue.offer_edu(edu);
        match at_ms {
            Some(at_ms) => self.schedule(server, at_ms),
            None => self.wake(server),
        }
    }

    /// Notes that messages wait for a server in the outbox.
    pub(super) fn offer_outbox(&mut self, server: &OwnedServerName) {
        self.entry(server).queue.offer_outbox();
        self.wake(server);
    }

    /// A server has spoken to us, so that it is tried again at once, or soon where that was in vain a moment ago. Tells whether it
    /// is tried for that.
    pub(super) fn heard_from(&mut self, server: &ServerName, now_ms: u64) -> bool {
        let Some(destination) = self.destinations.get_mut(server) else { return false };
        if destination.failing.is_none() || destination.was_heard {
            return false;
        }
        let pause_ms = HEARD_AGAIN_MS.saturating_mul(1 << destination.heard.min(20)).min(HEARD_AGAIN_MS_MAX);
        let due_ms = match destination.heard {
            0 => now_ms,
            _ => now_ms.max(destination.tried_ms.saturating_add(pause_ms)),
        };
        if due_ms > now_ms && destination.due_ms.is_some_and(|known| known <= due_ms) {
            return false;
        }
        destination.was_heard = true;
        destination.heard = destination.heard.saturating_add(1);
        destination.queue.heard_from();
        let server = server.to_owned();
        self.schedule(&server, due_ms);
        true
    }

    /// Has a server tried now, whatever it did before.
    pub(super) fn retry(&mut self, server: &ServerName, now_ms: u64) -> bool {
        let Some(destination) = self.destinations.get_mut(server) else { return false };
        destination.was_heard = true;
        destination.queue.heard_from();
        let server = server.to_owned();
        self.schedule(&server, now_ms);
        true
    }

    /// Lets a server wait for its turn: at once, or where it does not answer when it is tried again.
    fn wake(&mut self, server: &OwnedServerName) {
        let Some(destination) = self.destinations.get_mut(server) else { return };
        if let Some(failing) = destination.failing
            && !destination.was_heard
        {
            self.schedule(server, failing.next_try_ms);
        } else if destination.standing == Standing::Resting {
            self.line_up(server.clone());
        }
    }

    /// Puts a server that does not count as failing into the line of those that are as quick as it is.
    fn line_up(&mut self, server: OwnedServerName) {
        let Some(destination) = self.destinations.get_mut(&server) else { return };
        destination.standing = Standing::Waiting;
        if destination.is_slow {
            self.slow_ready.push_back(server);
        } else if self.quick.contains(&server) {
            self.ready.push_back(server);
        } else {
            self.fresh.push_back(server);
        }
    }

    fn schedule(&mut self, server: &OwnedServerName, at_ms: u64) {
        let Some(destination) = self.destinations.get_mut(server) else { return };
        if destination.due_ms.is_some_and(|known| known <= at_ms) {
            return;
        }
        if let Some(before) = destination.due_ms.replace(at_ms) {
            self.due.remove(&(before, server.clone()));
        }
        self.due.insert((at_ms, server.clone()));
    }

    /// The time at which the next server gets a turn by itself.
    pub(super) fn next_due_ms(&self) -> Option<u64> {
        self.due.first().map(|(due_ms, _)| *due_ms)
    }

    /// Gives the next server that has a turn, while there are places.
    pub(super) fn take_turn(&mut self, now_ms: u64) -> Option<(OwnedServerName, Lane)> {
        while let Some((due_ms, server)) = self.due.pop_first() {
            if due_ms > now_ms {
                self.due.insert((due_ms, server));
                break;
            }
            let Some(destination) = self.destinations.get_mut(&server) else { continue };
            destination.due_ms = None;
            if destination.standing == Standing::Resting {
                match destination.failing {
                    Some(_) if !destination.was_heard => {
                        destination.standing = Standing::Waiting;
                        self.retries.push_back(server);
                    }
                    _ => self.line_up(server),
                }
            }
        }
        let (server, lane) = if self.sending < SENDING_MAX && !self.ready.is_empty() {
            self.sending += 1;
            (self.ready.pop_front()?, Lane::Sending)
        } else if self.trying < FRESH_MAX && !self.fresh.is_empty() {
            self.trying += 1;
            (self.fresh.pop_front()?, Lane::Fresh)
        } else if self.slow < SLOW_MAX && !self.slow_ready.is_empty() {
            self.slow += 1;
            (self.slow_ready.pop_front()?, Lane::Slow)
        } else if self.retrying < RETRYING_MAX && !self.retries.is_empty() {
            self.retrying += 1;
            (self.retries.pop_front()?, Lane::Retrying)
        } else {
            return None;
        };
        if let Some(destination) = self.destinations.get_mut(&server) {
            destination.standing = Standing::Sending;
        }
        Some((server, lane))
    }

    /// Gives the place of a server that turns out to be slow to another one. `None` where there is no room among the slow, so that
    /// it has to be tried again later; its place is given back then.
    pub(super) fn slow_down(&mut self, server: &ServerName, lane: Lane) -> Option<Lane> {
        if lane == Lane::Retrying || lane == Lane::Slow {
            return Some(lane);
        }
        self.quick.remove(server);
        if let Some(destination) = self.destinations.get_mut(server) {
            destination.is_slow = true;
        }
        self.leave(lane);
        if self.slow >= SLOW_MAX {
            return None;
        }
        self.slow += 1;
        Some(Lane::Slow)
    }

    /// Notes that a server was quick.
    pub(super) fn was_quick(&mut self, server: &OwnedServerName) {
        if let Some(destination) = self.destinations.get_mut(server) {
            destination.is_slow = false;
        }
        if !self.quick.contains(server) {
            if self.quick.len() >= QUICK_MAX {
                self.quick.pop_first();
            }
            self.quick.insert(server.clone());
        }
    }

    /// Takes a place back.
    pub(super) fn leave(&mut self, lane: Lane) {
        let places = match lane {
            Lane::Sending => &mut self.sending,
            Lane::Fresh => &mut self.trying,
            Lane::Slow => &mut self.slow,
            Lane::Retrying => &mut self.retrying,
        };
        *places = places.saturating_sub(1);
    }

    /// Gives the next step for a server that has a turn. With [`Step::Rest`] the turn is over.
    pub(super) fn next(&mut self, server: &OwnedServerName, now_ms: u64) -> Step {
        let Some(destination) = self.destinations.get_mut(server) else {
            return Step::Rest { is_back: false };
        };
        match destination.queue.next(now_ms) {
            Action::Nothing => {
                destination.standing = Standing::Resting;
                // A server that was tried since, or that spoke to us, is not held to have failed any more.
                let is_back = destination.failing.is_some() && destination.was_heard;
                if is_back {
                    destination.failing = None;
                    destination.was_heard = false;
                }
                if destination.failing.is_none()
                    && destination.queue.is_idle()
                    && destination.due_ms.is_none()
                {
                    self.destinations.remove(server);
                }
                Step::Rest { is_back }
            }
            Action::WaitUntil(until_ms) => {
                destination.standing = Standing::Resting;
                self.schedule(server, until_ms);
                Step::Rest { is_back: false }
            }
            action @ (Action::Send { .. } | Action::CatchUp) => Step::Do(action),
        }
    }

    /// Ends the turn of a server that has more to be told, so that others come first.
    pub(super) fn step_back(&mut self, server: &OwnedServerName) {
        self.line_up(server.clone());
    }

    /// A server has taken what was under way. Tells whether it counted as failing until now.
    pub(super) fn succeeded(&mut self, server: &OwnedServerName, outbox_left: bool) -> bool {
        let Some(destination) = self.destinations.get_mut(server) else { return false };
        destination.queue.succeeded(outbox_left);
        came_back(destination)
    }

    /// A server has the newest news of some subjects, whose marks were taken away. Tells whether it counted as failing.
    pub(super) fn caught_up(&mut self, server: &OwnedServerName, marks_left: bool) -> bool {
        let Some(destination) = self.destinations.get_mut(server) else { return false };
        let late = destination.queue.caught_up(marks_left);
        let is_back = came_back(destination);
        for mark in late {
            self.keep(server, Some(mark));
        }
        is_back
    }

    /// A server did not take what was under way. The marks that this takes are written with [`Board::write_marks`].
    pub(super) fn failed(
        &mut self,
        server: &OwnedServerName,
        now_ms: u64,
        (random, at_least_ms): (u64, u64),
    ) -> Failing {
        let destination = self.entry(server);
        let mut failing = backoff::failed(destination.failing, Pace::DESTINATION, now_ms, random);
        failing.next_try_ms = failing.next_try_ms.max(now_ms.saturating_add(at_least_ms));
        destination.failing = Some(failing);
        destination.was_heard = false;
        destination.tried_ms = now_ms;
        for mark in destination.queue.failed(failing.next_try_ms) {
            self.keep(server, Some(mark));
        }
        failing
    }

    fn keep(&mut self, server: &OwnedServerName, mark: Option<Mark<Subject, Position>>) {
        let Some(mark) = mark else { return };
        let place = self.unwritten.entry((server.clone(), mark.subject)).or_insert(mark.place);
        *place = mark.place.min(*place);
    }

    /// Writes the marks that are not in the store yet. Gives for each batch the oldest of its marks, with what says that it is
    /// durable. What the store does not take now waits for the next call.
    pub(super) fn write_marks(&mut self, store: &Store) -> Vec<(Position, Published)> {
        let mut written = Vec::new();
        while !self.unwritten.is_empty() {
            match self.write_some_marks(store) {
                Ok(batch) => written.push(batch),
                Err(why) => {
                    tracing::warn!(?why, "what other servers miss could not be noted; it is tried again");
                    break;
                }
            }
        }
        written
    }

    fn write_some_marks(&mut self, store: &Store) -> Result<(Position, Published), NotAccepted> {
        let mut batch = store.batch(&Guard::own_tables());
        let mut oldest = Position::MAX;
        for ((server, subject), place) in self.unwritten.iter().take(MARKS_AT_ONCE) {
            let mark = Mark { subject: *subject, place: *place };
            marks::keep(&mut batch, server.as_str(), mark).map_err(NotAccepted::Fault)?;
            oldest = oldest.min(*place);
        }
        let flushed = store.enqueue(batch)?.flushed;
        let left = self.unwritten.keys().nth(MARKS_AT_ONCE).cloned();
        self.unwritten = left.map(|left| self.unwritten.split_off(&left)).unwrap_or_default();
        Ok((oldest, flushed))
    }

    /// Whether marks of a server are not in the store yet.
    pub(super) fn has_unwritten(&self, server: &OwnedServerName) -> bool {
        let begin = (server.clone(), Subject::FIRST);
        self.unwritten.range(begin..).next().is_some_and(|((of, _), _)| of == server)
    }

    /// The position from which the log is read again after a crash: everything before it was told, or is marked.
    pub(super) fn told_upto(&self) -> Position {
        let held = self.destinations.values().filter_map(|destination| destination.queue.oldest());
        let oldest = held.chain(self.unwritten.values().copied()).min();
        oldest.map_or(self.read, |oldest| oldest.before().min(self.read))
    }

    /// The newest message of the outbox that a server has taken in this run.
    pub(super) fn outbox_upto(&self, server: &ServerName) -> Position {
        self.destinations.get(server).map_or(Position::ZERO, |destination| destination.outbox_upto)
    }

    /// Notes that a server has taken the messages of its outbox up to this one.
    pub(super) fn took_outbox(&mut self, server: &ServerName, upto: Position) {
        if let Some(destination) = self.destinations.get_mut(server) {
            destination.outbox_upto = destination.outbox_upto.max(upto);
        }
    }

    /// The state of a server, if something waits for it or it does not answer.
    pub(super) fn seen(&self, server: &ServerName) -> Option<Seen> {
        let destination = self.destinations.get(server)?;
        let is_sending = destination.standing == Standing::Sending;
        Some(Seen { failing: destination.failing, is_sending })
    }

    /// The number of servers that are here, and how many of them do not answer.
    pub(super) fn count(&self) -> (usize, usize) {
        let failing = self.destinations.values().filter(|destination| destination.failing.is_some());
        (self.destinations.len(), failing.count())
    }

    /// The servers that are here, by name.
    pub(super) fn names(&self) -> impl Iterator<Item = &OwnedServerName> {
        self.destinations.keys()
    }
}

/// Forgets that a server failed. Tells whether it had.
fn came_back(destination: &mut Destination) -> bool {
    destination.was_heard = false;
    destination.heard = 0;
    destination.failing.take().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RoomNum;

    fn name(number: usize) -> OwnedServerName {
        format!("s{number}.example").try_into().unwrap()
    }

    fn at(number: u64) -> Position {
        Position::new(number).unwrap()
    }

    /// Gives turns as long as there are places.
    fn turns(board: &mut Board, now_ms: u64) -> Vec<(OwnedServerName, Lane)> {
        std::iter::from_fn(|| board.take_turn(now_ms)).collect()
    }

    #[test]
    fn servers_wait_for_a_place_in_their_turn_and_slow_ones_make_room() {
        let mut board = Board::default();
        for number in 0..100 {
            board.offer(&name(number), Subject::Room(RoomNum(1)), at(1));
        }
        let first = turns(&mut board, 0);
        assert_eq!(first.len(), FRESH_MAX);
        assert_eq!(first[0], (name(0), Lane::Fresh));
        assert_eq!(board.slow_down(&name(0), Lane::Fresh), Some(Lane::Slow));
        board.leave(Lane::Fresh);
        let next: Vec<_> = turns(&mut board, 0).into_iter().map(|(server, _)| server).collect();
        assert_eq!(next, [name(FRESH_MAX), name(FRESH_MAX + 1)]);
        assert_eq!(board.told_upto(), Position::ZERO, "all of it would be lost");
    }

    #[test]
    fn servers_that_are_quick_wait_neither_for_slow_ones_nor_for_those_that_nobody_knows() {
        let mut board = Board::default();
        let slow = 1..=SLOW_MAX + 100;
        board.offer(&name(0), Subject::Room(RoomNum(1)), at(1));
        assert_eq!(turns(&mut board, 0), [(name(0), Lane::Fresh)]);
        assert!(matches!(board.next(&name(0), 0), Step::Do(_)));
        board.was_quick(&name(0));
        board.succeeded(&name(0), false);
        assert!(matches!(board.next(&name(0), 0), Step::Rest { .. }));
        board.leave(Lane::Fresh);
        for number in slow.clone() {
            board.offer(&name(number), Subject::Room(RoomNum(1)), at(1));
        }
        // All of them turn out to be slow; those for whom there is no room fail, and come back later.
        let mut refused = 0;
        loop {
            let given = turns(&mut board, 0);
            if given.is_empty() {
                break;
            }
            for (server, lane) in given {
                assert!(matches!(board.next(&server, 0), Step::Do(_)));
                if board.slow_down(&server, lane).is_none() {
                    refused += 1;
                    board.failed(&server, 0, (0, 0));
                    assert!(matches!(board.next(&server, 0), Step::Rest { .. }));
                }
            }
        }
        assert_eq!(refused, 100);
        board.offer(&name(0), Subject::Room(RoomNum(1)), at(2));
        assert_eq!(turns(&mut board, 0), [(name(0), Lane::Sending)]);
        board.offer(&name(9_999), Subject::Room(RoomNum(1)), at(2));
        assert_eq!(turns(&mut board, 0), [(name(9_999), Lane::Fresh)], "nor do newcomers wait for slow ones");
        // A slow server that has more to be told waits with its like.
        board.step_back(&name(1));
        assert!(turns(&mut board, 0).is_empty());
        board.leave(Lane::Slow);
        assert_eq!(turns(&mut board, 0), [(name(1), Lane::Slow)]);
    }

    #[test]
    fn a_server_that_took_all_has_no_entry() {
        let mut board = Board::default();
        board.offer(&name(1), Subject::Room(RoomNum(1)), at(7));
        board.read = at(9);
        assert_eq!(board.told_upto(), at(6));
        assert_eq!(turns(&mut board, 0), [(name(1), Lane::Fresh)]);
        assert!(matches!(board.next(&name(1), 0), Step::Do(Action::Send { .. })));
        assert!(!board.succeeded(&name(1), false));
        assert!(matches!(board.next(&name(1), 0), Step::Rest { is_back: false }));
        assert_eq!((board.count(), board.told_upto()), ((0, 0), at(9)));
    }

    #[test]
    fn a_server_that_speaks_and_is_not_reached_is_tried_ever_later() {
        let mut board = Board::default();
        board.offer(&name(1), Subject::Room(RoomNum(1)), at(7));
        let (mut now_ms, mut tries) = (1_000, Vec::new());
        assert_eq!(turns(&mut board, now_ms).len(), 1);
        while tries.len() < 5 {
            let step = board.next(&name(1), now_ms);
            assert!(matches!(step, Step::Do(_)), "{step:?}");
            board.failed(&name(1), now_ms, (0, 3_600_000));
            board.leave(Lane::Fresh);
            assert!(matches!(board.next(&name(1), now_ms), Step::Rest { .. }));
            let began_ms = now_ms;
            // It speaks all the time.
            while turns(&mut board, now_ms).is_empty() {
                now_ms += 100;
                board.heard_from(&name(1), now_ms);
            }
            tries.push((now_ms - began_ms) / 1_000);
        }
        assert_eq!(tries, [0, 4, 8, 16, 32]);
    }

    #[test]
    fn a_server_that_does_not_answer_gets_its_turn_when_its_time_comes_and_apart_from_the_others() {
        let mut board = Board::default();
        board.offer(&name(1), Subject::Room(RoomNum(1)), at(7));
        assert_eq!(turns(&mut board, 0).len(), 1);
        assert!(matches!(board.next(&name(1), 0), Step::Do(_)));
        let failing = board.failed(&name(1), 0, (0, 0));
        board.leave(Lane::Fresh);
        assert!(board.has_unwritten(&name(1)));
        assert!(matches!(board.next(&name(1), 0), Step::Rest { .. }));
        board.offer(&name(1), Subject::Room(RoomNum(1)), at(8));
        board.offer_edu(&name(1), Edu { key: EduKey::Presence("@a:x".to_owned()), json: vec![1] }, None);
        assert!(turns(&mut board, failing.next_try_ms - 1).is_empty());
        assert_eq!(turns(&mut board, failing.next_try_ms), [(name(1), Lane::Retrying)]);
        assert!(matches!(board.next(&name(1), failing.next_try_ms), Step::Do(Action::CatchUp)));
        assert!(board.caught_up(&name(1), false), "it is back");
    }
}
