//! The pushers of this server with what waits for each: what the reader of the log puts here, and turns take from here.
//!
//! It is memory alone, of which a restart finds everything again: the log from the reader's cursor on, which stands before all that waits,
//! and the places of pushers that are behind.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use federation::backoff::{self, Failing, Pace};
use ruma::OwnedUserId;

use crate::{
    delivery::gateways::lines::{Id, Lane, Lines},
    ids::{Position, UserNum},
    push::{
        catch_up::CatchUp,
        plan::{Item, Wanted},
    },
    schema::push::PusherPlace,
};

/// For one pusher at most this much waits. One with more counts as behind, and is told the newest of each room.
const ITEMS_MAX: usize = 200;
/// For all pushers of one user together at most this much waits.
const ITEMS_OF_USER_MAX: usize = 2_000;
/// For all pushers together at most this much waits.
const ITEMS_IN_ALL_MAX: usize = 500_000;
/// At most this many requests for the pushers of one user run at once.
const OF_USER_MAX: usize = 8;
/// A gateway that did not take something is tried again after a second, then after twice as long each time, up to an hour.
const PACE: Pace = Pace { first_ms: 1_000, most_ms: 3_600_000 };

/// The users who have pushers that are on, with their ids.
pub(super) type Watchers = Arc<BTreeMap<UserNum, OwnedUserId>>;

/// A pusher as the store has it.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) app_id: String,
    pub(super) pushkey: String,
    /// The host of its gateway.
    pub(super) host: String,
    /// When it was set, in milliseconds since the epoch.
    pub(super) set_ms: u64,
    pub(super) place: PusherPlace,
}

#[derive(Debug)]
struct Pusher {
    user: UserNum,
    stored: Stored,
    /// Everything up to here is dealt with.
    upto: Position,
    items: VecDeque<Item>,
    /// How many of the items the turn that runs has seen.
    taken: usize,
    /// Its news are looked for in the user's rooms, and nothing waits here.
    is_behind: bool,
    /// While it is behind: the search, as far as it has come.
    search: Option<CatchUp>,
    /// While it is behind: the position of the newest item that was offered.
    offered: Position,
    /// While its place is written by which it is behind no more: the position up to which it is not.
    settling: Option<Position>,
    failing: Option<Failing>,
    /// The line in which it waits, and from when on.
    waits: Option<(Lane, u64)>,
    is_busy: bool,
    /// Its entry among those that hold the reader's cursor back.
    holds: Option<Position>,
}

impl Pusher {
    fn has_work(&self) -> bool {
        self.is_behind || !self.items.is_empty()
    }

    /// The position before which nothing waits in memory alone.
    fn held(&self) -> Option<Position> {
        if self.is_behind {
            if self.settling.is_some() {
                return self.settling;
            }
            return (!self.stored.place.is_behind).then_some(self.upto);
        }
        self.items.front().map(|item| item.at().before())
    }
}

/// The work of a turn.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) wanted: Wanted,
    /// The place as it is stored.
    pub(super) place: PusherPlace,
    /// It is behind, and its place does not say so yet.
    pub(super) must_mark: bool,
}

/// All pushers that are on.
#[derive(Debug, Default)]
pub(super) struct Board {
    pushers: BTreeMap<Id, Pusher>,
    of_user: BTreeMap<UserNum, Vec<Id>>,
    watchers: Watchers,
    lines: Lines,
    running: BTreeMap<UserNum, usize>,
    /// Pushers that had a place and whose user has enough requests running.
    parked: BTreeMap<UserNum, Vec<Id>>,
    holding: BTreeSet<(Position, Id)>,
    items: usize,
    next_id: Id,
    /// The position up to which the log was read.
    pub(super) read: Position,
}

impl Board {
    /// A board without pushers, for a log that was read up to this position.
    pub(super) fn of_log(read: Position) -> Self {
        Self { read, ..Self::default() }
    }

    /// The users who have pushers.
    pub(super) fn watchers(&self) -> Watchers {
        Arc::clone(&self.watchers)
    }

    /// The number of pushers, and how many of these are behind.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.pushers.len(), self.pushers.values().filter(|pusher| pusher.is_behind).count())
    }

    /// The position up to which the log need not be read again after a crash.
    pub(super) fn told_upto(&self) -> Position {
        self.holding.first().map_or(self.read, |(position, _)| (*position).min(self.read))
    }

    /// Takes over the pushers of a user as the store has them. One that was set anew is tried at once.
    pub(super) fn reload(
        &mut self,
        user: UserNum,
        user_id: Option<OwnedUserId>,
        all: Vec<Stored>,
        now_ms: u64,
    ) {
        let known = self.of_user.remove(&user).unwrap_or_default();
        let mut kept = Vec::new();
        for stored in all {
            let is_it = |id: &&Id| {
                self.pushers.get(id).is_some_and(|pusher| {
                    (&pusher.stored.app_id, &pusher.stored.pushkey) == (&stored.app_id, &stored.pushkey)
                })
            };
            let id = match known.iter().find(is_it) {
                Some(id) => {
                    let id = *id;
                    self.leave_line(id);
                    self.replace(id, stored);
                    id
                }
                None => self.add(user, stored),
            };
            kept.push(id);
            self.refresh(id, now_ms);
        }
        for id in known.iter().filter(|id| !kept.contains(id)) {
            self.forget(*id);
        }
        let watchers = Arc::make_mut(&mut self.watchers);
        match user_id.filter(|_| !kept.is_empty()) {
            Some(user_id) => {
                watchers.insert(user, user_id);
                self.of_user.insert(user, kept);
            }
            None => {
                watchers.remove(&user);
                kept.into_iter().for_each(|id| self.forget(id));
            }
        }
    }

    fn add(&mut self, user: UserNum, stored: Stored) -> Id {
        let id = self.next_id;
        self.next_id += 1;
        let (upto, is_behind) = (stored.place.upto, stored.place.is_behind);
        let pusher = Pusher {
            user,
            stored,
            upto,
            items: VecDeque::new(),
            taken: 0,
            is_behind,
            search: None,
            offered: Position::ZERO,
            settling: None,
            failing: None,
            waits: None,
            is_busy: false,
            holds: None,
        };
        self.pushers.insert(id, pusher);
        id
    }

    fn replace(&mut self, id: Id, stored: Stored) {
        let Some(pusher) = self.pushers.get_mut(&id) else { return };
        if stored.set_ms != pusher.stored.set_ms {
            // A client that sets it anew says that its gateway is there.
            pusher.failing = None;
        }
        if stored.place.upto <= pusher.stored.place.upto {
            // It was read before a turn moved the place on.
            pusher.stored = Stored { place: pusher.stored.place, ..stored };
            return;
        }
        pusher.upto = stored.place.upto.max(pusher.upto);
        (pusher.is_behind, pusher.settling, pusher.search) = (stored.place.is_behind, None, None);
        let before = pusher.items.len();
        pusher.items.retain(|item| item.at() > stored.place.upto);
        pusher.taken = 0;
        self.items -= before - pusher.items.len();
        pusher.stored = stored;
    }

    /// Forgets a pusher that is gone, wherever it waits.
    pub(super) fn forget(&mut self, id: Id) {
        self.leave_line(id);
        let Some(pusher) = self.pushers.remove(&id) else { return };
        self.items -= pusher.items.len();
        if let Some(position) = pusher.holds {
            self.holding.remove(&(position, id));
        }
        if let Some(ids) = self.of_user.get_mut(&pusher.user) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.of_user.remove(&pusher.user);
                Arc::make_mut(&mut self.watchers).remove(&pusher.user);
            }
        }
    }

    fn leave_line(&mut self, id: Id) {
        if let Some(pusher) = self.pushers.get_mut(&id)
            && let Some((lane, due_ms)) = pusher.waits.take()
        {
            self.lines.withdraw(lane, &pusher.stored.host, due_ms, id);
        }
    }

    /// Has a pusher stand where it belongs among those that hold the cursor.
    fn refresh_hold(&mut self, id: Id) {
        let Some(pusher) = self.pushers.get_mut(&id) else { return };
        let held = pusher.held();
        if held != pusher.holds {
            if let Some(before) = pusher.holds {
                self.holding.remove(&(before, id));
            }
            if let Some(position) = held {
                self.holding.insert((position, id));
            }
            pusher.holds = held;
        }
    }

    /// Has a pusher stand where it belongs: in a line if it has something to do and nobody does it, and among those that hold the cursor.
    fn refresh(&mut self, id: Id, now_ms: u64) {
        self.refresh_hold(id);
        let Some(pusher) = self.pushers.get_mut(&id) else { return };
        let is_parked = self.parked.get(&pusher.user).is_some_and(|ids| ids.contains(&id));
        if pusher.is_busy || is_parked || pusher.waits.is_some() || !pusher.has_work() {
            return;
        }
        let lane = if pusher.failing.is_some() { Lane::Slow } else { Lane::Quick };
        let due_ms = pusher.failing.map_or(now_ms, |failing| failing.next_try_ms.max(now_ms));
        pusher.waits = Some((lane, due_ms));
        self.lines.wait(lane, &pusher.stored.host, due_ms, id);
    }

    /// Offers news to the pushers of a user.
    pub(super) fn offer(&mut self, user: UserNum, item: Item, now_ms: u64) {
        let Some(ids) = self.of_user.get(&user).cloned() else { return };
        let items_of = |id: &Id| self.pushers.get(id).map_or(0, |pusher| pusher.items.len());
        let mut of_user: usize = ids.iter().map(items_of).sum();
        for id in ids {
            let is_full = self.items >= ITEMS_IN_ALL_MAX || of_user >= ITEMS_OF_USER_MAX;
            let Some(pusher) = self.pushers.get_mut(&id) else { continue };
            if item.at() <= pusher.upto {
                continue;
            }
            if pusher.is_behind {
                pusher.offered = pusher.offered.max(item.at());
                continue;
            }
            let is_counts = |item: &Item| matches!(item, Item::Counts { .. });
            let is_said = pusher.items.len() > pusher.taken && pusher.items.back().is_some_and(is_counts);
            if is_counts(&item) && is_said {
                continue;
            }
            if pusher.items.back().is_some_and(|last| last.at() > item.at()) {
                debug_assert!(false, "news come out of order");
                continue;
            }
            pusher.items.push_back(item);
            self.items += 1;
            let waiting = pusher.items.len();
            if waiting > ITEMS_MAX || is_full {
                // The others have room again.
                of_user = of_user.saturating_sub(waiting);
                self.fall_behind(id);
            }
            self.refresh(id, now_ms);
        }
    }

    fn fall_behind(&mut self, id: Id) {
        let Some(pusher) = self.pushers.get_mut(&id) else { return };
        if let (Some(first), Some(last)) = (pusher.items.front(), pusher.items.back()) {
            pusher.upto = pusher.upto.max(first.at().before());
            pusher.offered = pusher.offered.max(last.at());
        }
        self.items -= pusher.items.len();
        pusher.items.clear();
        pusher.taken = 0;
        (pusher.is_behind, pusher.search) = (true, None);
    }

    /// Gives a place to a pusher that is due.
    pub(super) fn take_turn(&mut self, now_ms: u64) -> Option<(Id, Lane, String)> {
        loop {
            let (id, lane) = self.lines.take(now_ms)?;
            let Some(pusher) = self.pushers.get_mut(&id) else {
                debug_assert!(false, "a pusher that is gone waits");
                return None;
            };
            pusher.waits = None;
            let running = self.running.entry(pusher.user).or_default();
            if *running >= OF_USER_MAX {
                self.lines.leave(lane, &pusher.stored.host);
                self.parked.entry(pusher.user).or_default().push(id);
                continue;
            }
            *running += 1;
            pusher.is_busy = true;
            return Some((id, lane, pusher.stored.host.clone()));
        }
    }

    /// Moves a request that takes long to a place among the slow, or beside them: `None` where there is none.
    pub(super) fn slow_down(&mut self, host: &str) -> Option<Lane> {
        self.lines.slow_down(host)
    }

    /// A turn has ended. Its place is given back, if it has one, and the pusher waits for the next if there is more.
    pub(super) fn rest(&mut self, id: Id, user: UserNum, place: Option<(Lane, &str)>, now_ms: u64) {
        if let Some((lane, host)) = place {
            self.lines.leave(lane, host);
        }
        if let Some(running) = self.running.get_mut(&user) {
            *running = running.saturating_sub(1);
            if *running == 0 {
                self.running.remove(&user);
            }
        }
        let parked = self.parked.remove(&user).unwrap_or_default();
        if let Some(pusher) = self.pushers.get_mut(&id) {
            pusher.is_busy = false;
            pusher.taken = 0;
        }
        for id in parked.into_iter().chain([id]) {
            self.refresh(id, now_ms);
        }
    }

    /// The user of a pusher that has a turn.
    pub(super) fn user_of(&self, id: Id) -> Option<UserNum> {
        self.pushers.get(&id).map(|pusher| pusher.user)
    }

    /// The user, app id and pushkey of a pusher that has a turn.
    pub(super) fn key_of(&self, id: Id) -> Option<(UserNum, String, String)> {
        let pusher = self.pushers.get(&id)?;
        Some((pusher.user, pusher.stored.app_id.clone(), pusher.stored.pushkey.clone()))
    }

    /// Whether a pusher is still taken to have this place.
    pub(super) fn has_place(&self, id: Id, place: PusherPlace) -> bool {
        self.pushers.get(&id).is_some_and(|pusher| pusher.stored.place == place)
    }

    /// The work of a pusher that has a turn; `None` where there is none, or not yet.
    pub(super) fn begin(&mut self, id: Id, now_ms: u64) -> Option<Work> {
        let pusher = self.pushers.get_mut(&id)?;
        let is_due = pusher.failing.is_none_or(|failing| backoff::may_try(Some(failing), PACE, now_ms));
        if !pusher.has_work() || !is_due {
            return None;
        }
        pusher.taken = pusher.items.len();
        let items = (!pusher.is_behind).then(|| pusher.items.iter().copied().collect());
        Some(Work {
            wanted: Wanted {
                user: pusher.user,
                app_id: pusher.stored.app_id.clone(),
                pushkey: pusher.stored.pushkey.clone(),
                upto: pusher.upto,
                badge: pusher.stored.place.badge,
                items,
                search: pusher.search.clone().filter(|_| pusher.is_behind),
            },
            place: pusher.stored.place,
            must_mark: pusher.is_behind && !pusher.stored.place.is_behind,
        })
    }

    /// The place that a pusher has once everything up to a position is dealt with. One that is behind stays so while there may be more, which
    /// is so until nothing was found (`is_all`), and nothing was offered since.
    pub(super) fn next_place(
        &mut self,
        id: Id,
        upto: Position,
        badge: Option<u64>,
        is_all: bool,
    ) -> Option<PusherPlace> {
        let pusher = self.pushers.get_mut(&id)?;
        let is_behind = pusher.is_behind && !(is_all && pusher.offered <= upto);
        let place = PusherPlace { upto: upto.max(pusher.upto), is_behind, badge };
        if pusher.is_behind && !is_behind {
            // From here on the cursor waits for whatever is offered, because the place does not say any more that it is looked for.
            pusher.settling = Some(place.upto);
            self.refresh_hold(id);
        }
        Some(place)
    }

    /// The search of a pusher that is behind has come so far. The next one begins anew where there is none.
    pub(super) fn search_on(&mut self, id: Id, search: Option<CatchUp>) {
        if let Some(pusher) = self.pushers.get_mut(&id) {
            pusher.search = search;
        }
    }

    /// Everything up to a position is dealt with. `stored` is the place as it is stored now.
    pub(super) fn dealt(&mut self, id: Id, upto: Position, stored: PusherPlace, now_ms: u64) {
        let Some(pusher) = self.pushers.get_mut(&id) else { return };
        pusher.upto = pusher.upto.max(upto);
        pusher.settling = None;
        if pusher.is_behind && pusher.stored.place.is_behind {
            // News that was offered while the place was written keeps it behind, in memory and, with the next place, in the store.
            pusher.is_behind = stored.is_behind || pusher.offered > pusher.upto;
        }
        if stored.upto >= pusher.stored.place.upto {
            pusher.stored.place = stored;
        }
        while pusher.items.front().is_some_and(|item| item.at() <= upto) {
            pusher.items.pop_front();
            pusher.taken = pusher.taken.saturating_sub(1);
            self.items -= 1;
        }
        self.refresh(id, now_ms);
    }

    /// The gateway has answered, so that it is there.
    pub(super) fn is_back(&mut self, id: Id) -> bool {
        self.pushers.get_mut(&id).is_some_and(|pusher| pusher.failing.take().is_some())
    }

    /// The gateway did not take something. The pusher is behind from now on, and is tried again later.
    pub(super) fn failed(
        &mut self,
        id: Id,
        now_ms: u64,
        (random, at_least_ms): (u64, u64),
    ) -> Option<Failing> {
        let pusher = self.pushers.get_mut(&id)?;
        let mut failing = backoff::failed(pusher.failing, PACE, now_ms, random);
        failing.next_try_ms = failing.next_try_ms.max(now_ms.saturating_add(at_least_ms.min(PACE.most_ms)));
        pusher.failing = Some(failing);
        // By the time when it is tried again, other events may be the newest of their rooms.
        pusher.search = None;
        if !pusher.is_behind {
            self.fall_behind(id);
        }
        self.refresh(id, now_ms);
        Some(failing)
    }

    /// The position up to which a pusher that is behind was told, and its place as it is stored, if that does not say so.
    pub(super) fn unmarked(&self, id: Id) -> Option<(PusherPlace, PusherPlace)> {
        let pusher = self.pushers.get(&id)?;
        let known = pusher.stored.place;
        let marked = PusherPlace { upto: pusher.upto, is_behind: true, badge: known.badge };
        (pusher.is_behind && !known.is_behind).then_some((known, marked))
    }

    /// The place of a pusher was marked as behind.
    pub(super) fn marked(&mut self, id: Id, stored: PusherPlace, now_ms: u64) {
        if let Some(pusher) = self.pushers.get_mut(&id) {
            pusher.stored.place = stored;
            self.refresh(id, now_ms);
        }
    }

    /// When the next pusher is due for which there is a place, in milliseconds since the epoch.
    pub(super) fn next_due_ms(&self) -> Option<u64> {
        self.lines.next_due_ms()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RoomNum;

    const ALICE: UserNum = UserNum(1);

    fn at(number: u64) -> Position {
        Position::new(number).unwrap()
    }

    fn event(number: u64) -> Item {
        Item::Event { room: RoomNum(1), at: at(number) }
    }

    fn counts(number: u64) -> Item {
        Item::Counts { at: at(number) }
    }

    fn stored(key: &str, upto: u64, is_behind: bool) -> Stored {
        let place = PusherPlace { upto: at(upto), is_behind, badge: None };
        let (app_id, host) = ("app".to_owned(), "push.example".to_owned());
        Stored { app_id, pushkey: key.to_owned(), host, set_ms: 5, place }
    }

    fn board(pushers: Vec<Stored>) -> Board {
        let mut board = Board::of_log(at(10));
        board.reload(ALICE, Some("@alice:x".try_into().unwrap()), pushers, 0);
        board
    }

    fn items(board: &mut Board, id: Id) -> Option<Vec<u64>> {
        let work = board.begin(id, 0).unwrap();
        work.wanted.items.map(|items| items.into_iter().map(|item| item.at().number()).collect())
    }

    #[test]
    fn a_pusher_is_given_what_came_after_its_place_and_holds_the_cursor_until_it_is_dealt_with() {
        let mut board = board(vec![stored("key", 10, false)]);
        for item in [event(9), event(10), event(11), counts(12), counts(13), event(14)] {
            board.offer(ALICE, item, 0);
        }
        board.read = at(20);
        assert_eq!(board.told_upto(), at(10));
        let (id, lane, host) = board.take_turn(0).unwrap();
        assert_eq!((lane, host.as_str()), (Lane::Quick, "push.example"));
        assert!(board.take_turn(0).is_none(), "one request at a time");
        assert_eq!(items(&mut board, id), Some(vec![11, 12, 14]), "counts are told once");
        // A change of counts while a request is under way is told after it.
        board.offer(ALICE, counts(15), 0);
        board.offer(ALICE, counts(16), 0);
        let next = board.next_place(id, at(11), Some(3), false).unwrap();
        assert_eq!(next, PusherPlace { upto: at(11), is_behind: false, badge: Some(3) });
        board.dealt(id, at(11), next, 0);
        assert_eq!((board.told_upto(), items(&mut board, id)), (at(11), Some(vec![12, 14, 15])));
        board.dealt(id, at(15), next, 0);
        assert_eq!(board.told_upto(), at(20));
        assert!(board.begin(id, 0).is_none());
        board.rest(id, ALICE, Some((lane, &host)), 0);
        assert!(board.take_turn(0).is_none() && board.items == 0 && board.running.is_empty());
    }

    #[test]
    fn whatever_waits_for_one_user_is_bounded_whatever_pushers_they_have() {
        let pushers = (0..50).map(|number| stored(&format!("key {number}"), 10, false)).collect();
        let mut board = board(pushers);
        for number in 11..160 {
            board.offer(ALICE, event(number), 0);
        }
        assert!((1..=ITEMS_OF_USER_MAX + 50).contains(&board.items), "{}", board.items);
        assert_eq!(board.pushers.values().map(|pusher| pusher.items.len()).sum::<usize>(), board.items);
    }

    #[test]
    fn a_pusher_that_fails_falls_behind_and_holds_the_cursor_until_that_is_written() {
        let mut board = board(vec![stored("key", 10, false)]);
        board.read = at(30);
        board.offer(ALICE, event(21), 0);
        let (id, lane, host) = board.take_turn(0).unwrap();
        board.begin(id, 0).unwrap();
        let failing = board.failed(id, 0, (0, 0)).unwrap();
        assert_eq!(board.told_upto(), at(20));
        let (known, marked) = board.unmarked(id).unwrap();
        assert_eq!((known.upto, marked.upto, marked.is_behind), (at(10), at(20), true));
        board.marked(id, marked, 0);
        assert_eq!((board.told_upto(), board.count()), (at(30), (1, 1)));
        board.rest(id, ALICE, Some((lane, &host)), 0);
        board.offer(ALICE, event(31), 0);
        assert!(board.take_turn(failing.next_try_ms - 1).is_none(), "not before its time");
        let (id, lane, _) = board.take_turn(failing.next_try_ms).unwrap();
        assert_eq!(lane, Lane::Slow);
        let work = board.begin(id, failing.next_try_ms).unwrap();
        assert!(work.wanted.items.is_none() && !work.must_mark && work.wanted.upto == at(20));
        // It has come to 31 and found nothing more; then something is offered while that is written.
        let next = board.next_place(id, at(31), None, true).unwrap();
        assert!(!next.is_behind);
        board.offer(ALICE, event(33), 0);
        board.read = at(40);
        assert_eq!(board.told_upto(), at(31), "nothing is lost if the server crashes now");
        board.dealt(id, at(31), next, 0);
        assert_eq!(board.told_upto(), at(31));
        assert!(
            board.begin(id, failing.next_try_ms).unwrap().must_mark,
            "it is behind, and must say so again"
        );
        let (_, marked) = board.unmarked(id).unwrap();
        board.marked(id, marked, 0);
        let next = board.next_place(id, at(40), None, true).unwrap();
        board.dealt(id, at(40), next, 0);
        assert_eq!((board.told_upto(), board.count()), (at(40), (1, 0)));
    }

    #[test]
    fn more_than_a_pusher_may_have_waiting_is_looked_for_in_the_rooms() {
        let mut board = board(vec![stored("key", 10, false)]);
        let count = u64::try_from(ITEMS_MAX).unwrap() + 10;
        (0..count).for_each(|number| board.offer(ALICE, event(20 + number), 0));
        board.read = at(1_000);
        assert_eq!((board.items, board.told_upto()), (0, at(19)));
        let (id, ..) = board.take_turn(0).unwrap();
        let work = board.begin(id, 0).unwrap();
        assert!(work.must_mark && work.wanted.items.is_none() && work.wanted.upto == at(19));
    }

    #[test]
    fn a_pusher_that_is_set_anew_goes_on_and_one_that_is_gone_is_forgotten() {
        let mut board = board(vec![stored("one", 10, false), stored("two", 10, true)]);
        board.offer(ALICE, event(11), 0);
        let anew = Stored { set_ms: 6, ..stored("one", 10, false) };
        board.reload(ALICE, Some("@alice:x".try_into().unwrap()), vec![anew], 0);
        assert_eq!((board.count(), board.items), ((1, 0), 1));
        let (id, ..) = board.take_turn(0).unwrap();
        assert_eq!(items(&mut board, id), Some(vec![11]));
        // It was put off and on again at 20.
        board.reload(ALICE, Some("@alice:x".try_into().unwrap()), vec![stored("one", 20, false)], 0);
        assert_eq!(board.items, 0);
        board.reload(ALICE, None, Vec::new(), 0);
        assert_eq!((board.count(), board.watchers().len(), board.told_upto()), ((0, 0), 0, at(10)));
        assert!(board.begin(id, 0).is_none());
        board.rest(id, ALICE, None, 0);
        assert!(board.of_user.is_empty() && board.holding.is_empty() && board.parked.is_empty());
    }

    #[test]
    fn one_user_has_a_bounded_number_of_requests() {
        let pushers: Vec<_> = (0..OF_USER_MAX + 3).map(|key| stored(&key.to_string(), 10, true)).collect();
        let mut board = board(pushers);
        let turns: Vec<_> = std::iter::from_fn(|| board.take_turn(0)).collect();
        assert_eq!(turns.len(), OF_USER_MAX);
        let (id, lane, host) = &turns[0];
        board.failed(*id, 0, (0, 0)).unwrap();
        board.rest(*id, ALICE, Some((*lane, host)), 0);
        assert_eq!(std::iter::from_fn(|| board.take_turn(0)).count(), 1, "the next one takes its place");
    }
}
