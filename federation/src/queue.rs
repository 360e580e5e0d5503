//! Decides what another server is told next, and when: a state machine for one destination, without I/O.
//!
//! Each thing that must arrive in the end belongs to a *subject*: a room whose events these are, or a user whose devices changed. A healthy
//! destination costs memory only. When it fails, or when more waits than may, what it misses becomes one mark
//! for each subject ([`Queue::offer`], [`Queue::failed`]): whoever owns the queue keeps the marks durably, and once the
//! destination is back, the newest events of these rooms, and the newest changes of these users, bring it up to date. Ephemeral news (EDUs) is not kept for a
//! destination that cannot be reached; what must not be lost of it (messages to devices) lies in the owner's outbox, of
//! which the queue knows only that there is some.
//!
//! Specification: server-server API, "Transactions".

use std::collections::{BTreeMap, VecDeque};

/// A transaction holds at most this many events (PDUs).
pub const PDUS_MAX: usize = 50;
/// A transaction holds at most this many pieces of ephemeral news (EDUs).
pub const EDUS_MAX: usize = 100;
/// At most this many events wait in memory for one destination. Tests use a small bound to reach it.
pub const WAITING_PDUS_MAX: usize = if cfg!(test) { 150 } else { 500 };
/// At most this many pieces of ephemeral news wait in memory for one destination.
pub const WAITING_EDUS_MAX: usize = 500;
/// At most this many bytes of ephemeral news wait in memory for one destination.
pub const WAITING_EDU_BYTES_MAX: usize = 1 << 20;
/// Subjects are brought up to date this many at a time.
pub const SUBJECTS_AT_ONCE: usize = PDUS_MAX;
/// At most this many subjects are remembered as marked, so that a mark is not asked for again with each event.
const MARKED_MAX: usize = 1_000;

/// An event, or another change that must arrive, by whatever its owner finds it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pdu<R, P> {
    /// The room or the user that it belongs to.
    pub subject: R,
    /// Its place.
    pub place: P,
}

/// A room or a user of which the destination misses something, and the first that it misses.
pub type Mark<R, P> = Pdu<R, P>;

/// A piece of ephemeral news. A newer piece of the same key takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edu<K> {
    /// The key under which a newer piece replaces this one, for example a room and a user who is typing there.
    pub key: K,
    /// The news as JSON.
    pub json: Vec<u8>,
}

/// What to do for the destination now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<R, P, K> {
    /// Nothing waits, or an answer is awaited.
    Nothing,
    /// Nothing may be sent before this time, in milliseconds since the epoch.
    WaitUntil(u64),
    /// Send a transaction with these, and with what the outbox holds if there is room for it; then tell how it went.
    Send {
        /// The events, in their order.
        pdus: Vec<Pdu<R, P>>,
        /// The ephemeral news, oldest first.
        edus: Vec<Edu<K>>,
        /// How many pieces of the outbox may go along.
        outbox_max: usize,
    },
    /// Send what is new of at most [`SUBJECTS_AT_ONCE`] of the subjects that are marked, and take their marks away once
    /// they have arrived; then tell how it went, and whether subjects are left ([`Queue::caught_up`]).
    CatchUp,
}

/// What the queue is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase<R, P> {
    /// Whatever comes may be sent.
    Ready,
    /// A transaction with these events is under way.
    Sending(Vec<Pdu<R, P>>),
    /// The news of marked subjects is under way.
    CatchingUp,
    /// The destination failed, and is tried again at this time: milliseconds since the epoch.
    Failed(u64),
}

/// The queue of one destination. `R` is a subject, `P` the place of an event, `K` the key of ephemeral news.
#[derive(Clone, Debug)]
pub struct Queue<R, P, K> {
    phase: Phase<R, P>,
    pdus: VecDeque<Pdu<R, P>>,
    edus: VecDeque<Edu<K>>,
    edu_bytes: usize,
    /// Whether the outbox holds something for this destination.
    has_outbox: bool,
    /// Whether subjects are marked.
    has_marks: bool,
    /// The marks that are known to be kept, as far as they are remembered, so that none is given twice.
    marked: BTreeMap<R, P>,
    /// Marks for what could not wait in memory while others were caught up with. Their subjects may be those whose marks are just
    /// being taken away, so they are given only afterwards.
    late: BTreeMap<R, P>,
}

impl<R: Copy + Ord, P: Copy + Ord, K: PartialEq> Queue<R, P, K> {
    /// The queue of a destination of which this is known: until when it is not tried (milliseconds since the epoch), whether
    /// subjects are marked, and whether its outbox holds something.
    pub fn new(failed_until_ms: Option<u64>, has_marks: bool, has_outbox: bool) -> Self {
        Self {
            phase: failed_until_ms.map_or(Phase::Ready, Phase::Failed),
            pdus: VecDeque::new(),
            edus: VecDeque::new(),
            edu_bytes: 0,
            has_outbox,
            has_marks,
            marked: BTreeMap::new(),
            late: BTreeMap::new(),
        }
    }

    /// Takes an event that the destination is to be told. Gives a mark to keep where the event cannot wait in memory: of
    /// two marks of a subject, the older one is kept. One that comes late goes before those that stand behind it.
    #[must_use]
    pub fn offer(&mut self, pdu: Pdu<R, P>) -> Option<Mark<R, P>> {
        let is_full = self.pdus.len() >= WAITING_PDUS_MAX;
        match self.phase {
            Phase::Failed(_) => return self.mark(pdu),
            Phase::CatchingUp if is_full => keep_oldest(&mut self.late, pdu),
            Phase::Ready | Phase::Sending(_) if is_full => return self.mark(pdu),
            Phase::Ready | Phase::Sending(_) | Phase::CatchingUp => {
                let at = self.pdus.partition_point(|waiting| waiting.place <= pdu.place);
                self.pdus.insert(at, pdu);
            }
        }
        None
    }

    /// Takes ephemeral news. It is dropped while the destination cannot be reached, and the oldest goes when too much waits.
    pub fn offer_edu(&mut self, edu: Edu<K>) {
        if matches!(self.phase, Phase::Failed(_)) || edu.json.len() > WAITING_EDU_BYTES_MAX {
            return;
        }
        self.edu_bytes += edu.json.len();
        if let Some(older) = self.edus.iter_mut().find(|older| older.key == edu.key) {
            self.edu_bytes -= older.json.len();
            *older = edu;
        } else {
            self.edus.push_back(edu);
        }
        while self.edus.len() > WAITING_EDUS_MAX || self.edu_bytes > WAITING_EDU_BYTES_MAX {
            let Some(oldest) = self.edus.pop_front() else { break };
            self.edu_bytes -= oldest.json.len();
        }
    }

    /// Notes that the outbox holds something.
    pub fn offer_outbox(&mut self) {
        self.has_outbox = true;
    }

    /// Gives the next step. Whatever is given to send is under way until [`Queue::succeeded`] or [`Queue::failed`] is told.
    #[must_use]
    pub fn next(&mut self, now_ms: u64) -> Action<R, P, K> {
        match self.phase {
            Phase::Sending(_) | Phase::CatchingUp => return Action::Nothing,
            Phase::Failed(until_ms) if now_ms < until_ms => {
                // A destination for which nothing waits need not be tried.
                let waits = self.has_marks || self.has_outbox;
                return if waits { Action::WaitUntil(until_ms) } else { Action::Nothing };
            }
            Phase::Failed(_) | Phase::Ready => {}
        }
        if self.has_marks {
            self.marked.clear();
            self.phase = Phase::CatchingUp;
            return Action::CatchUp;
        }
        if self.pdus.is_empty() && self.edus.is_empty() && !self.has_outbox {
            self.phase = Phase::Ready;
            return Action::Nothing;
        }
        let pdus: Vec<_> = self.pdus.drain(..self.pdus.len().min(PDUS_MAX)).collect();
        let edus: Vec<_> = self.edus.drain(..self.edus.len().min(EDUS_MAX)).collect();
        self.edu_bytes -= edus.iter().map(|edu| edu.json.len()).sum::<usize>();
        let outbox_max = if self.has_outbox { EDUS_MAX - edus.len() } else { 0 };
        self.phase = Phase::Sending(pdus.clone());
        Action::Send { pdus, edus, outbox_max }
    }

    /// The destination has taken what was under way. `outbox_left` says whether its outbox still holds something.
    pub fn succeeded(&mut self, outbox_left: bool) {
        self.has_outbox = outbox_left;
        self.phase = Phase::Ready;
    }

    /// The news of marked subjects has arrived. `marks_left` says whether other subjects are still marked. The owner takes
    /// away the marks of those subjects and writes the ones that are given here, in one batch and before anything else is offered.
    #[must_use]
    pub fn caught_up(&mut self, marks_left: bool) -> Vec<Mark<R, P>> {
        self.has_marks = marks_left;
        self.phase = Phase::Ready;
        let late = std::mem::take(&mut self.late);
        late.into_iter().filter_map(|(subject, place)| self.mark(Pdu { subject, place })).collect()
    }

    /// The destination could not be reached, and is tried again at this time (milliseconds since the epoch). Gives the marks
    /// that are to be kept: for each subject of which something waited or were under way, the oldest.
    #[must_use]
    pub fn failed(&mut self, until_ms: u64) -> Vec<Mark<R, P>> {
        let under_way = match std::mem::replace(&mut self.phase, Phase::Failed(until_ms)) {
            Phase::Sending(pdus) => pdus,
            Phase::Ready | Phase::CatchingUp | Phase::Failed(_) => Vec::new(),
        };
        let waiting = std::mem::take(&mut self.pdus);
        self.edus.clear();
        self.edu_bytes = 0;
        let mut oldest = std::mem::take(&mut self.late);
        for pdu in under_way.into_iter().chain(waiting) {
            keep_oldest(&mut oldest, pdu);
        }
        oldest.into_iter().filter_map(|(subject, place)| self.mark(Pdu { subject, place })).collect()
    }

    /// The destination has spoken to this server, so that it is tried again at once.
    pub fn heard_from(&mut self) {
        if matches!(self.phase, Phase::Failed(_)) {
            self.phase = Phase::Ready;
        }
    }

    /// Whether the queue holds nothing that would be lost with it: its owner may drop it.
    pub fn is_idle(&self) -> bool {
        let is_resting = matches!(self.phase, Phase::Ready | Phase::Failed(_));
        is_resting && self.pdus.is_empty() && self.edus.is_empty()
    }

    /// The oldest place that would be lost with the queue: of an event that waits or is under way, or of a mark that is not
    /// given yet. Places are offered in rising order.
    pub fn oldest(&self) -> Option<P> {
        let under_way = match &self.phase {
            Phase::Sending(pdus) => pdus.first().map(|pdu| pdu.place),
            Phase::Ready | Phase::CatchingUp | Phase::Failed(_) => None,
        };
        let waiting = self.pdus.front().map(|pdu| pdu.place);
        let late = self.late.values().min().copied();
        under_way.into_iter().chain(waiting).chain(late).min()
    }

    /// Marks a subject. Gives the mark unless one is known to be kept that is as old.
    fn mark(&mut self, mark: Mark<R, P>) -> Option<Mark<R, P>> {
        self.has_marks = true;
        let known = self.marked.get(&mark.subject);
        if known.is_some_and(|known| *known <= mark.place) {
            return None;
        }
        if known.is_some() || self.marked.len() < MARKED_MAX {
            self.marked.insert(mark.subject, mark.place);
        }
        Some(mark)
    }
}

fn keep_oldest<R: Ord, P: Copy + Ord>(oldest: &mut BTreeMap<R, P>, pdu: Pdu<R, P>) {
    let place = oldest.entry(pdu.subject).or_insert(pdu.place);
    *place = pdu.place.min(*place);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    type Q = Queue<u8, u64, u8>;

    fn pdu(room: u8, place: u64) -> Pdu<u8, u64> {
        Pdu { subject: room, place }
    }

    fn fresh() -> Q {
        Q::new(None, false, false)
    }

    fn places(action: &Action<u8, u64, u8>) -> Vec<u64> {
        match action {
            Action::Send { pdus, .. } => pdus.iter().map(|pdu| pdu.place).collect(),
            other => panic!("nothing is sent: {other:?}"),
        }
    }

    #[test]
    fn events_go_in_their_order_one_transaction_at_a_time() {
        let mut queue = fresh();
        assert_eq!(queue.next(0), Action::Nothing);
        for place in 0..120 {
            assert_eq!(queue.offer(pdu(1, place)), None);
        }
        assert_eq!(places(&queue.next(0)), (0..50).collect::<Vec<_>>());
        assert_eq!(queue.next(0), Action::Nothing, "one transaction is under way");
        queue.succeeded(false);
        assert_eq!(places(&queue.next(0)), (50..100).collect::<Vec<_>>());
        queue.succeeded(false);
        assert_eq!(places(&queue.next(0)), (100..120).collect::<Vec<_>>());
        assert!(!queue.is_idle());
        queue.succeeded(false);
        assert_eq!(queue.next(0), Action::Nothing);
        assert!(queue.is_idle());
    }

    #[test]
    fn what_is_offered_late_goes_before_what_stands_behind_it() {
        let mut queue = fresh();
        for place in [10, 20, 5, 20] {
            assert_eq!(queue.offer(pdu(1, place)), None);
        }
        assert_eq!(queue.oldest(), Some(5));
        assert_eq!(places(&queue.next(0)), [5, 10, 20, 20]);
    }

    #[test]
    fn a_failure_leaves_one_mark_a_room_and_catching_up_takes_them_away() {
        let mut queue = fresh();
        for place in 0..60 {
            assert_eq!(queue.offer(pdu((place % 3) as u8, place)), None);
        }
        let _under_way = queue.next(0);
        assert_eq!(queue.failed(1_000), [pdu(0, 0), pdu(1, 1), pdu(2, 2)]);
        assert_eq!(queue.offer(pdu(1, 70)), None, "the room is marked already");
        assert_eq!(queue.offer(pdu(4, 71)), Some(pdu(4, 71)));
        assert!(queue.is_idle(), "what it missed is marked");
        assert_eq!(queue.next(999), Action::WaitUntil(1_000));
        assert_eq!(queue.next(1_000), Action::CatchUp);
        assert_eq!(queue.next(1_000), Action::Nothing);
        assert_eq!(queue.offer(pdu(9, 80)), None);
        assert_eq!(queue.offer(pdu(1, 81)), None);
        assert_eq!(queue.caught_up(true), []);
        assert_eq!(queue.next(1_001), Action::CatchUp, "new events wait until all rooms are caught up with");
        assert_eq!(queue.caught_up(false), []);
        assert_eq!(places(&queue.next(1_001)), [80, 81]);
        queue.succeeded(false);
        assert_eq!(queue.offer(pdu(1, 90)), None);
        assert_eq!(places(&queue.next(1_002)), [90]);
    }

    #[test]
    fn a_destination_that_speaks_is_tried_at_once() {
        let mut queue = fresh();
        assert_eq!(queue.offer(pdu(1, 1)), None);
        let _under_way = queue.next(0);
        assert_eq!(queue.failed(86_400_000).len(), 1);
        queue.heard_from();
        assert_eq!(queue.next(1), Action::CatchUp);
        // What it says while something is under way changes nothing.
        queue.heard_from();
        assert_eq!(queue.next(1), Action::Nothing);
    }

    #[test]
    fn too_many_events_become_marks() {
        let mut queue = fresh();
        for place in 0..WAITING_PDUS_MAX as u64 {
            assert_eq!(queue.offer(pdu(1, place)), None);
        }
        assert_eq!(queue.offer(pdu(1, 1_000)), Some(pdu(1, 1_000)));
        assert_eq!(queue.offer(pdu(1, 1_001)), None);
        assert_eq!(queue.next(0), Action::CatchUp);
        // The mark of room 1 is being taken away, so that another one must come after it.
        assert_eq!(queue.offer(pdu(1, 1_002)), None);
        assert_eq!(queue.offer(pdu(1, 1_003)), None);
        assert_eq!(queue.caught_up(false), [pdu(1, 1_002)]);
        assert_eq!(queue.next(0), Action::CatchUp);
        assert_eq!(queue.offer(pdu(2, 1_004)), None);
        assert_eq!(queue.failed(5).first(), Some(&pdu(1, 0)), "what waits is marked, too");
        assert_eq!(queue.offer(pdu(2, 1_005)), None);
        assert_eq!(queue.offer(pdu(3, 1_006)), Some(pdu(3, 1_006)));
    }

    #[test]
    fn ephemeral_news_is_replaced_bounded_and_dropped_for_who_is_away() {
        let mut queue = fresh();
        let edu = |key: u8, text: &str| Edu { key, json: text.as_bytes().to_vec() };
        queue.offer_edu(edu(1, "old"));
        queue.offer_edu(edu(2, "other"));
        queue.offer_edu(edu(1, "new"));
        queue.offer_edu(Edu { key: 3, json: vec![0; WAITING_EDU_BYTES_MAX + 1] });
        let Action::Send { edus, outbox_max, .. } = queue.next(0) else { panic!("news waits") };
        assert_eq!(edus, [edu(1, "new"), edu(2, "other")]);
        assert_eq!(outbox_max, 0);
        queue.succeeded(false);
        for _ in 0..3 {
            for key in 0..=255 {
                queue.offer_edu(Edu { key, json: vec![0; 8 << 10] });
            }
        }
        assert!(queue.edu_bytes <= WAITING_EDU_BYTES_MAX && queue.edus.len() <= WAITING_EDUS_MAX);
        assert_eq!(queue.failed(10), []);
        queue.offer_edu(edu(1, "lost"));
        assert_eq!((queue.edu_bytes, queue.edus.len()), (0, 0));
        assert_eq!(queue.next(5), Action::Nothing, "nobody waits for it");
        queue.offer_outbox();
        assert_eq!(queue.next(5), Action::WaitUntil(10));
        let Action::Send { outbox_max, .. } = queue.next(10) else { panic!("the outbox waits") };
        assert_eq!(outbox_max, EDUS_MAX);
        queue.succeeded(true);
        assert!(matches!(queue.next(10), Action::Send { .. }));
    }

    #[test]
    fn the_oldest_of_what_would_be_lost_is_known() {
        let mut queue = fresh();
        assert_eq!(queue.oldest(), None);
        for place in 5..5 + WAITING_PDUS_MAX as u64 {
            assert_eq!(queue.offer(pdu(1, place)), None);
        }
        assert_eq!(queue.oldest(), Some(5));
        let _under_way = queue.next(0);
        assert_eq!(queue.oldest(), Some(5), "what is under way may still fail");
        queue.succeeded(false);
        assert_eq!(queue.oldest(), Some(55));
        assert!(!queue.failed(1).is_empty());
        assert_eq!(queue.oldest(), None, "all of it is marked");
        assert_eq!(queue.next(1), Action::CatchUp);
        for place in 1_000..1_001 + WAITING_PDUS_MAX as u64 {
            assert_eq!(queue.offer(pdu(1, place)), None);
        }
        while let Some(oldest) = queue.pdus.pop_front() {
            assert!(oldest.place >= 1_000);
        }
        assert_eq!(queue.oldest(), Some(1_000 + WAITING_PDUS_MAX as u64), "a mark is still to be given");
    }

    /// Drives a queue with a random owner, and checks that whatever was offered arrives, or a mark stands for its room until
    /// the room is caught up with.
    #[test]
    fn nothing_offered_is_forgotten() {
        for seed in 1..60_u64 {
            let mut random = seed;
            let mut next = |below: u64| {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) % below
            };
            let mut queue = fresh();
            let (mut marks, mut owed) = (BTreeMap::<u8, u64>::new(), BTreeSet::<(u8, u64)>::new());
            let (mut now, mut place, mut under_way, mut read_at) = (0, 0, None, 0);
            for step in 0..400 {
                now += next(5);
                let calm = step > 350;
                match next(if calm { 2 } else { 6 }) + if calm { 4 } else { 0 } {
                    0..4 => {
                        for _ in 0..next(60) {
                            place += 1;
                            let new = pdu(next(4) as u8, place);
                            owed.insert((new.subject, place));
                            if let Some(mark) = queue.offer(new) {
                                keep_oldest(&mut marks, mark);
                            }
                        }
                    }
                    4 => {
                        if under_way.is_none() {
                            match queue.next(now) {
                                Action::Nothing | Action::WaitUntil(_) => {}
                                action => (under_way, read_at) = (Some(action), place),
                            }
                        }
                    }
                    _ => match under_way.take() {
                        None => queue.heard_from(),
                        Some(_) if !calm && next(3) == 0 => {
                            for mark in queue.failed(now + next(20)) {
                                keep_oldest(&mut marks, mark);
                            }
                        }
                        Some(Action::CatchUp) => {
                            // What was newest when the marks were read brings all that came before it.
                            if let Some(room) = marks.keys().next().copied() {
                                let from = marks.remove(&room).unwrap();
                                owed.retain(|(of, at)| *of != room || *at < from || *at > read_at);
                            }
                            for mark in queue.caught_up(!marks.is_empty()) {
                                keep_oldest(&mut marks, mark);
                            }
                        }
                        Some(Action::Send { pdus, .. }) => {
                            for pdu in pdus {
                                owed.remove(&(pdu.subject, pdu.place));
                            }
                            queue.succeeded(false);
                        }
                        Some(_) => unreachable!(),
                    },
                }
            }
            if under_way.is_some() {
                for mark in queue.failed(0) {
                    keep_oldest(&mut marks, mark);
                }
            }
            while let action @ (Action::Send { .. } | Action::CatchUp) = queue.next(u64::MAX) {
                match action {
                    Action::Send { pdus, .. } => {
                        for pdu in pdus {
                            owed.remove(&(pdu.subject, pdu.place));
                        }
                        queue.succeeded(false);
                    }
                    _ => {
                        for (room, from) in std::mem::take(&mut marks) {
                            owed.retain(|(of, at)| *of != room || *at < from);
                        }
                        assert_eq!(queue.caught_up(false), []);
                    }
                }
            }
            assert_eq!(owed, BTreeSet::new(), "seed {seed}");
        }
    }
}
