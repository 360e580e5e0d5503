//! A pool of threads: a bounded number of calls runs at once, and a payer has no more than its share of the places.
//!
//! Calls wait in one line for each payer, and the lines are served in turn. So a call waits behind other calls of its own
//! payer, but only for about one call of each of the others, however many those have waiting.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::env::payer::{Payer, Payers, Shares};

/// Those who have no call in a pool are let in while it has at most this many times as many calls as others may fill it with.
const FIRST_CALLS_TIMES: usize = 4;

/// A pool. A clone is another handle to the same one.
#[derive(Clone)]
pub(crate) struct Pool(Arc<Inner>);

struct Inner {
    places: usize,
    /// At most this many calls run or wait.
    calls_max: usize,
    state: Mutex<State>,
}

struct State {
    /// The number of calls that run.
    running_count: usize,
    /// The places that payers hold.
    running: Shares,
    /// The number of calls that run or wait.
    call_count: usize,
    /// The calls that payers have running or waiting.
    calls: Shares,
    lines: BTreeMap<Payer, VecDeque<Waiter>>,
    /// The payers that have a line, in the order in which their turn comes.
    order: VecDeque<Payer>,
    last_number: u64,
}

struct Waiter {
    number: u64,
    payers: Payers,
    start: oneshot::Sender<Permit>,
}

/// The place of a call in the pool, which is free again when this is dropped.
pub(crate) struct Permit {
    pool: Pool,
    payers: Payers,
}

/// A call that waits. Dropping this takes it out of its line.
struct Waiting<'a> {
    pool: &'a Pool,
    payers: Payers,
    number: u64,
}

/// The reason why a call may not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// As many calls wait as may.
    Pool,
    /// This payer has as many calls waiting as it may.
    Share(Payer),
}

impl Pool {
    /// A pool with this many places, in which at most `calls_max` calls run or wait.
    pub(super) fn new(places: usize, calls_max: usize) -> Self {
        Self::with_shares(places, calls_max, Shares::new(places))
    }

    /// A pool with this many places, of which a payer has at most this many at once. Any number of calls may wait for one.
    pub(crate) fn of_places(places: usize, of_each: usize) -> Self {
        Self::with_shares(places, usize::MAX, Shares::of_each(of_each))
    }

    fn with_shares(places: usize, calls_max: usize, running: Shares) -> Self {
        let state = State {
            running_count: 0,
            running,
            call_count: 0,
            calls: Shares::new(calls_max),
            lines: BTreeMap::new(),
            order: VecDeque::new(),
            last_number: 0,
        };
        Self(Arc::new(Inner { places, calls_max, state: Mutex::new(state) }))
    }

    /// The number of calls that run or wait.
    pub(crate) fn call_count(&self) -> usize {
        self.0.state.lock().call_count
    }

    /// The number of calls that run.
    pub(super) fn running_count(&self) -> usize {
        self.0.state.lock().running_count
    }

    /// Takes a place if there is one for these payers now.
    pub(crate) fn try_take(&self, payers: Payers) -> Option<Permit> {
        let mut state = self.0.state.lock();
        if state.find_full(self.0.calls_max, payers).is_some() || !state.may_start(self.0.places, payers) {
            return None;
        }
        state.enter(payers);
        Some(self.start(&mut state, payers))
    }

    /// Waits for a place. Fails at once where too many calls wait already, of all payers or of these.
    pub(crate) async fn take(&self, payers: Payers) -> Result<Permit, Full> {
        let (waiting, started) = {
            let mut state = self.0.state.lock();
            if let Some(full) = state.find_full(self.0.calls_max, payers) {
                return Err(full);
            }
            state.enter(payers);
            if state.may_start(self.0.places, payers) {
                return Ok(self.start(&mut state, payers));
            }
            let (start, started) = oneshot::channel();
            let number = state.wait(payers, start);
            (Waiting { pool: self, payers, number }, started)
        };
        let started = started.await;
        drop(waiting);
        // The sender is dropped only together with the line that this call is taken out of.
        started.map_err(|_| Full::Pool)
    }

    fn start(&self, state: &mut State, payers: Payers) -> Permit {
        state.running_count += 1;
        state.running.take(payers, 1);
        debug_assert!(state.running_count <= self.0.places, "no more calls run than there are places");
        Permit { pool: self.clone(), payers }
    }

    /// Starts the calls for which there are places now, one of each line in turn.
    fn start_waiting(&self, state: &mut State) -> Vec<(oneshot::Sender<Permit>, Permit)> {
        let mut started = Vec::new();
        while let Some(waiter) = state.next(self.0.places) {
            let permit = self.start(state, waiter.payers);
            started.push((waiter.start, permit));
        }
        started
    }
}

impl State {
    fn find_full(&self, calls_max: usize, payers: Payers) -> Option<Full> {
        // A few payers can fill the pool. The lines are served in turn, so that the first call of another one is hardly held up by theirs.
        let is_first = self.calls.held_by(payers.first()) == 0;
        let calls_max = if is_first { calls_max.saturating_mul(FIRST_CALLS_TIMES) } else { calls_max };
        if self.call_count >= calls_max {
            return Some(Full::Pool);
        }
        self.calls.find_without_room(payers, 1).map(Full::Share)
    }

    fn may_start(&self, places: usize, payers: Payers) -> bool {
        self.running_count < places && self.running.find_without_room(payers, 1).is_none()
    }

    fn enter(&mut self, payers: Payers) {
        self.call_count += 1;
        self.calls.take(payers, 1);
    }

    fn leave(&mut self, payers: Payers) {
        self.call_count = self.call_count.saturating_sub(1);
        self.calls.give_back(payers, 1);
    }

    /// Puts a call at the end of its payer's line, and answers its number.
    fn wait(&mut self, payers: Payers, start: oneshot::Sender<Permit>) -> u64 {
        self.last_number += 1;
        let number = self.last_number;
        let line = self.lines.entry(payers.first()).or_default();
        if line.is_empty() {
            self.order.push_back(payers.first());
        }
        line.push_back(Waiter { number, payers, start });
        number
    }

    /// Finds the first call in a payer's line that may start, where a place is free. An account may wait from several
    /// addresses, so calls whose address has no room are passed over.
    fn find_startable(&self, payer: Payer) -> Option<usize> {
        let line = self.lines.get(&payer)?;
        let mut blocked = None;
        for (at, waiter) in line.iter().enumerate() {
            // Many calls may wait from one address, which is asked about once.
            if blocked == Some(waiter.payers) {
                continue;
            }
            match self.running.find_without_room(waiter.payers, 1) {
                None => return Some(at),
                Some(full) if full == payer => return None,
                Some(_) => blocked = Some(waiter.payers),
            }
        }
        None
    }

    /// Takes the next call that may start out of its line. Its payer's turn comes again after all the others.
    fn next(&mut self, places: usize) -> Option<Waiter> {
        if self.running_count >= places {
            return None;
        }
        let mut turns = self.order.iter().enumerate();
        let (turn, at) = turns.find_map(|(turn, payer)| self.find_startable(*payer).map(|at| (turn, at)))?;
        let payer = self.order.remove(turn)?;
        let line = self.lines.get_mut(&payer)?;
        let waiter = line.remove(at);
        if line.is_empty() {
            self.lines.remove(&payer);
        } else {
            self.order.push_back(payer);
        }
        waiter
    }

    /// Takes a call out of its line, unless it was started.
    fn give_up(&mut self, payers: Payers, number: u64) {
        let payer = payers.first();
        let Some(line) = self.lines.get_mut(&payer) else { return };
        let Some(at) = line.iter().position(|waiter| waiter.number == number) else { return };
        line.remove(at);
        if line.is_empty() {
            self.lines.remove(&payer);
            self.order.retain(|it| *it != payer);
        }
        self.leave(payers);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let started = {
            let mut state = self.pool.0.state.lock();
            state.running_count = state.running_count.saturating_sub(1);
            state.running.give_back(self.payers, 1);
            state.leave(self.payers);
            self.pool.start_waiting(&mut state)
        };
        for (start, permit) in started {
            // A caller who hung up meanwhile does not take the permit, and its place goes to the next.
            drop(start.send(permit));
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.pool.0.state.lock().give_up(self.payers, self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, future::BoxFuture};

    use super::*;
    use crate::ids::UserNum;

    type Call = BoxFuture<'static, Result<Permit, Full>>;

    fn user(number: u64) -> Payers {
        Payers::of_request(Some(UserNum(number)), [127, 0, 0, 1].into())
    }

    /// A call that has asked for a place.
    fn ask(pool: &Pool, payers: Payers) -> Call {
        let pool = pool.clone();
        let mut call = async move { pool.take(payers).await }.boxed();
        match call.as_mut().now_or_never() {
            Some(done) => std::future::ready(done).boxed(),
            None => call,
        }
    }

    /// The place of a call that was started.
    fn place(call: &mut Call) -> Option<Permit> {
        call.now_or_never().map(Result::unwrap)
    }

    /// Checks that no call is left in the pool, in a line or in a share.
    fn assert_is_empty(pool: &Pool) {
        let state = pool.0.state.lock();
        assert_eq!((state.running_count, state.call_count), (0, 0));
        assert!(state.running.is_empty() && state.calls.is_empty(), "nobody holds a share");
        assert!(state.lines.is_empty() && state.order.is_empty(), "nobody waits");
    }

    #[test]
    fn a_user_with_many_calls_takes_a_quarter_of_the_places_and_others_do_not_wait() {
        let pool = Pool::new(16, usize::MAX);
        let mut greedy: Vec<_> = (0..24).map(|_| ask(&pool, user(1))).collect();
        let mut running: Vec<_> = greedy.iter_mut().take(4).map(|call| place(call).unwrap()).collect();
        assert!(greedy.iter_mut().skip(4).all(|call| place(call).is_none()));
        let other = pool.try_take(user(2)).unwrap();
        assert!(pool.try_take(user(1)).is_none());
        running.pop();
        assert!(place(&mut greedy[4]).is_some());
        drop((greedy, running, other));
        assert_is_empty(&pool);
    }

    #[test]
    fn lines_are_served_in_turn() {
        let pool = Pool::new(1, usize::MAX);
        let mut permit = pool.try_take(user(9)).unwrap();
        let mut calls: Vec<_> = [1, 1, 1, 2, 3].map(|number| (number, ask(&pool, user(number)))).into();
        let mut order = Vec::new();
        while !calls.is_empty() {
            drop(permit);
            let next = calls.iter_mut().enumerate().find_map(|(at, (_, call))| Some((at, place(call)?)));
            let (at, next) = next.unwrap();
            permit = next;
            order.push(calls.remove(at).0);
        }
        assert_eq!(order, [1, 2, 3, 1, 1]);
    }

    #[test]
    fn a_queue_has_room_for_others_when_one_payer_has_filled_its_share() {
        let pool = Pool::new(2, 64);
        let mut calls: Vec<_> = (0..16).map(|_| ask(&pool, user(1))).collect();
        let refused = ask(&pool, user(1)).now_or_never().unwrap().map(drop);
        assert_eq!(refused, Err(Full::Share(Payer::User(UserNum(1)))));
        // The second place is free, for a user has one of two.
        assert!(pool.try_take(user(2)).is_some());
        calls.extend((2..5).flat_map(|number| (0..16).map(move |_| number)).map(|it| ask(&pool, user(it))));
        let mut first = ask(&pool, user(5));
        assert!((&mut first).now_or_never().is_none(), "who has nothing waiting waits");
        assert_eq!(ask(&pool, user(5)).now_or_never().unwrap().map(drop), Err(Full::Pool));
        let mut others: Vec<_> = (6..64 * 4).map(|number| ask(&pool, user(number))).collect();
        assert!(others.iter_mut().any(|call| call.now_or_never().is_some()), "there is a bound for all");
        drop((calls, first, others));
        assert_is_empty(&pool);
    }

    #[test]
    fn many_accounts_at_one_address_have_one_share_together() {
        let pool = Pool::new(16, usize::MAX);
        let at_address = |number| Payers::of_request(Some(UserNum(number)), [192, 0, 2, 1].into());
        let mut calls: Vec<_> = (1..=8).map(|number| ask(&pool, at_address(number))).collect();
        let running = calls.iter_mut().filter_map(place).collect::<Vec<_>>();
        assert_eq!(running.len(), 4);
    }

    #[test]
    fn a_call_whose_address_is_full_does_not_hold_up_its_account_at_other_addresses() {
        let pool = Pool::new(8, usize::MAX);
        let at = |number, host| Payers::of_request(Some(UserNum(number)), [192, 0, 2, host].into());
        // Two accounts fill an address, and others fill the pool.
        let crowd = [at(1, 1), at(2, 1)].map(|payers| pool.try_take(payers).unwrap());
        let mut others: Vec<_> = (3..9).map(|number| pool.try_take(user(number)).unwrap()).collect();
        let mut blocked = ask(&pool, at(9, 1));
        let mut elsewhere = ask(&pool, at(9, 2));
        assert!(place(&mut blocked).is_none() && place(&mut elsewhere).is_none());
        others.pop();
        assert!(place(&mut elsewhere).is_some(), "a place is free, and this address has room");
        assert!(place(&mut blocked).is_none());
        drop(crowd);
        assert!(place(&mut blocked).is_some());
        drop((blocked, elsewhere, others));
        assert_is_empty(&pool);
    }

    #[test]
    fn whoever_hangs_up_leaves_the_line() {
        let pool = Pool::new(1, usize::MAX);
        let permit = pool.try_take(user(9)).unwrap();
        let gone = ask(&pool, user(1));
        let mut stays = ask(&pool, user(1));
        drop(gone);
        assert_eq!(pool.call_count(), 2);
        drop(permit);
        assert!(place(&mut stays).is_some());
        // A place that was given to a call which nobody asks about any more is free again.
        let given = ask(&pool, user(1));
        drop((given, stays));
        assert_is_empty(&pool);
    }
}
