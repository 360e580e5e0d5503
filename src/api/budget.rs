//! The budget of bytes of bodies and answers that are in memory at once, over all requests. Newcomers wait while it is
//! used up.
//!
//! A body reserves bytes in steps, as they arrive, so that a length that is only announced holds nothing. Small bodies and large
//! ones wait in lines of their own, and some of the budget is for small ones alone: a small body never waits behind a large one.
//! Strangers, who have proven nothing yet, hold only a part of the budget together, from however many addresses they send.
//!
//! An answer is charged for when it is made: it cannot be made
//! smaller any more, so that it may overdraw the budget, and newcomers wait until it was read. A payer who holds more than its
//! share is refused before its next answer is made, also if the request was admitted earlier. While an answer is being made, it
//! counts as one of an expected size: so a payer has at most its share in answers, whether they are unread or being made. One that becomes
//! larger counts as it grows; beyond the share, or where the budget is used up, only a few are made at a time, one for each payer. Nobody can wait
//! for that in the middle of an answer. So whoever is refused has a place in a line for when they ask again, before those who had their turn.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{
    env::{
        Env,
        payer::{Payers, Shares},
    },
    error::{Error, Result},
    metrics::Metrics,
};

/// A newcomer waits at most this long, and is then told to try again later.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// The time after which a refused caller is told to try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A body of at most this many bytes is a small one.
const SMALL_BYTES_MAX: usize = 64 << 10;

/// At most this many answers at once grow beyond what there is room for. Each of them may be as large as the state of a room.
const LARGE_AT_ONCE: usize = 2;

/// Those whose large answers are refused have a place in the line for this long, which a client that asks again when it is told to comes back in.
const PLACE_KEPT: Duration = Duration::from_secs(4);
/// At most this many have such a place.
const PLACES_MAX: usize = 64;

/// A line in which those wait who want bytes. Each line has its own bounds, so that none waits for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// Large bodies of callers who have proven nothing: there is no token, or a signature that is not checked yet.
    StrangersLarge,
    /// Small bodies of such callers.
    StrangersSmall,
    /// Large bodies of users, and of servers whose signature was checked.
    KnownLarge,
    /// Small bodies of such callers.
    KnownSmall,
}

impl Line {
    /// The line for a body of a caller.
    pub(crate) fn of(is_known: bool, bytes: usize) -> Self {
        match (is_known, bytes <= SMALL_BYTES_MAX) {
            (false, false) => Self::StrangersLarge,
            (false, true) => Self::StrangersSmall,
            (true, false) => Self::KnownLarge,
            (true, true) => Self::KnownSmall,
        }
    }

    fn is_of_strangers(self) -> bool {
        matches!(self, Self::StrangersLarge | Self::StrangersSmall)
    }

    /// How full the budget may be with the bytes of this line, in eighths. The rest is for those who have a right to more.
    fn eighths(self) -> usize {
        match self {
            Self::StrangersLarge | Self::KnownLarge => 6,
            Self::StrangersSmall => 7,
            Self::KnownSmall => 8,
        }
    }

    /// How many eighths of the budget all strangers may hold together with the bytes of this line.
    fn strangers_eighths(self) -> usize {
        match self {
            Self::StrangersLarge => 3,
            Self::StrangersSmall => 4,
            Self::KnownLarge | Self::KnownSmall => 8,
        }
    }
}

/// The budget of one server. A clone is cheap.
#[derive(Clone)]
pub(crate) struct Budget(Arc<Inner>);

struct Inner {
    env: Env,
    metrics: Metrics,
    bytes_max: usize,
    holdings: Mutex<Holdings>,
    freed: Notify,
    /// The first in each line waits for room; the others wait here for their turn, newcomers too, so that nobody overtakes in
    /// a line.
    lines: [tokio::sync::Mutex<()>; 4],
}

/// The bytes that payers hold.
struct Holdings {
    /// The bytes in memory, of each payer in `counted` at most its share, so that an address with answers that it does not read
    /// cannot keep others waiting.
    bytes: usize,
    /// The bytes that each user and each address holds. An answer is in here for its user and for its address.
    held: Shares,
    /// The same bytes, each for its narrowest payer alone. This is apart from `held`, where the bytes of a user who asks
    /// from an address of its own and through a proxy on this machine would be counted for both and given back for one.
    counted: Shares,
    /// The bytes of bodies whose senders have proven nothing yet.
    strangers: usize,
    /// The payers of answers that are being made though there is no room for them.
    large: Vec<Payers>,
    /// Those to whom such an answer was refused, in the order in which they came, with the uptime at which each asked last.
    refused: VecDeque<(Payers, Duration)>,
}

impl Holdings {
    /// Counts these bytes for the payers.
    fn take(&mut self, payers: Payers, bytes: usize) {
        self.held.take(payers, bytes);
        let narrowest = payers.narrowest();
        let before = self.counted.held_within_share(narrowest);
        self.counted.take(Payers::one(narrowest), bytes);
        self.bytes += self.counted.held_within_share(narrowest).saturating_sub(before);
    }

    /// Has the payers make an answer though there is no room for it, if it is their turn.
    fn begin_large(&mut self, payers: Payers, now: Duration) -> bool {
        if self.large.iter().any(|other| other.overlap(payers)) {
            return false;
        }
        self.refused.retain(|(_, asked)| now.saturating_sub(*asked) <= PLACE_KEPT);
        let own = self.refused.iter().position(|(other, _)| other.overlap(payers));
        let ahead = self.refused.iter().take(own.unwrap_or(usize::MAX));
        let ahead = ahead.filter(|(other, _)| !self.large.iter().any(|large| large.overlap(*other))).count();
        let is_free = self.large.len() + ahead < LARGE_AT_ONCE;
        match own {
            Some(_) if is_free => self.refused.retain(|(other, _)| !other.overlap(payers)),
            Some(own) => self.refused.get_mut(own).into_iter().for_each(|(_, asked)| *asked = now),
            None if !is_free && self.refused.len() < PLACES_MAX => self.refused.push_back((payers, now)),
            None => {}
        }
        if is_free {
            self.large.push(payers);
        }
        is_free
    }

    /// Gives back what `take` has counted for the same payers.
    fn give_back(&mut self, payers: Payers, bytes: usize) {
        self.held.give_back(payers, bytes);
        let narrowest = payers.narrowest();
        let before = self.counted.held_within_share(narrowest);
        self.counted.give_back(Payers::one(narrowest), bytes);
        let fewer = before.saturating_sub(self.counted.held_within_share(narrowest));
        debug_assert!(self.bytes >= fewer, "more is given back than was taken");
        self.bytes = self.bytes.saturating_sub(fewer);
    }
}

/// A number of bytes that the budget counts until this is dropped.
pub(crate) struct Held {
    budget: Budget,
    payers: Payers,
    bytes: usize,
    /// The bytes count in the part of all strangers.
    is_strangers: bool,
}

impl Budget {
    /// Makes a budget in which nothing is counted yet.
    pub(crate) fn new(env: Env, metrics: Metrics, bytes_max: usize) -> Self {
        let shares = || Shares::new(bytes_max);
        let (held, counted, large) = (shares(), shares(), Vec::with_capacity(LARGE_AT_ONCE));
        let refused = VecDeque::new();
        let holdings = Mutex::new(Holdings { bytes: 0, held, counted, strangers: 0, large, refused });
        let (freed, lines) = (Notify::new(), Default::default());
        Self(Arc::new(Inner { env, metrics, bytes_max, holdings, freed, lines }))
    }

    /// Waits while the budget is overdrawn. Fails with [`Error::Busy`] if that takes longer than `WAIT_MAX`, and at once for a
    /// user or an address that holds more than its share.
    pub(crate) async fn admit(&self, payers: Payers) -> Result<()> {
        self.require_within_share(payers)?;
        if self.0.holdings.lock().bytes > self.0.bytes_max {
            drop(self.reserve(payers, Line::KnownSmall, 0).await?);
        }
        Ok(())
    }

    /// Fails with [`Error::Busy`] if the user or the address holds more than its share.
    pub(crate) fn require_within_share(&self, payers: Payers) -> Result<()> {
        self.require_share(&self.0.holdings.lock(), payers, 0)
    }

    /// Waits until there is room for these bytes, and counts them. Those in one line are served in the order in which they came.
    /// Fails with [`Error::Busy`] if that takes longer than `WAIT_MAX`, or if the user or the address would hold more than its
    /// share, now or when its turn has come.
    pub(crate) async fn reserve(&self, payers: Payers, line: Line, bytes: usize) -> Result<Held> {
        let in_line = self.0.line(line);
        // The lock is free only while nobody waits.
        if let Ok(_first) = in_line.try_lock()
            && let Some(held) = self.try_hold(payers, line, bytes)?
        {
            return Ok(held);
        }
        self.require_share(&self.0.holdings.lock(), payers, bytes)?;
        let wait = async {
            let _first = in_line.lock().await;
            loop {
                let freed = self.0.freed.notified();
                if let Some(held) = self.try_hold(payers, line, bytes)? {
                    return Ok(held);
                }
                freed.await;
            }
        };
        tokio::select! {
            biased;
            held = wait => held,
            () = self.0.env.sleep(WAIT_MAX) => {
                tracing::debug!(bytes, reason = "no room for bytes in flight", "refused");
                Err(Error::Busy { retry_after: RETRY_AFTER })
            }
        }
    }

    /// Counts an answer that is about to be made as one of so many bytes. Fails with [`Error::Busy`] if the user or the address
    /// would hold more than its share with it.
    pub(crate) fn begin_answer(&self, payers: Payers, bytes: usize) -> Result<Held> {
        let mut holdings = self.0.holdings.lock();
        self.require_share(&holdings, payers, bytes)?;
        Ok(self.hold(payers, bytes, false, &mut holdings))
    }

    /// Counts so many bytes more of an answer that is being made. Where there is no room for them, it becomes one of the few that
    /// are made nevertheless, which `large` says from then on. Fails with [`Error::Busy`] where it cannot.
    pub(crate) fn grow_answer(&self, held: &mut Held, large: &mut Option<Large>, bytes: usize) -> Result<()> {
        let mut holdings = self.0.holdings.lock();
        let payers = held.payers;
        let has_room = holdings.held.find_without_room(payers, bytes).is_none()
            && holdings.bytes.saturating_add(bytes) <= self.0.bytes_max;
        if !has_room && large.is_none() {
            if !holdings.begin_large(payers, self.0.env.uptime()) {
                tracing::debug!(bytes, reason = "other answers as large are being made", "refused");
                return Err(Error::Busy { retry_after: RETRY_AFTER });
            }
            *large = Some(Large { budget: self.clone(), payers });
        }
        let mut more = self.hold(payers, bytes, false, &mut holdings);
        // The other count is empty when it is dropped.
        held.bytes = held.bytes.saturating_add(std::mem::take(&mut more.bytes));
        Ok(())
    }

    /// Counts bytes that are in memory already, even if that overdraws the budget.
    pub(crate) fn charge(&self, payers: Payers, bytes: usize) -> Held {
        self.hold(payers, bytes, false, &mut self.0.holdings.lock())
    }

    /// The bytes that the first of these payers holds.
    #[cfg(test)]
    pub(crate) fn held_by(&self, payers: Payers) -> usize {
        self.0.holdings.lock().held.held_by(payers.first())
    }

    /// Refuses payers who would hold more than their share with these bytes.
    fn require_share(&self, holdings: &Holdings, payers: Payers, bytes: usize) -> Result<()> {
        match holdings.held.find_without_room(payers, bytes) {
            None => Ok(()),
            Some(payer) => {
                tracing::debug!(bytes, ?payer, reason = "the payer holds its share of the budget", "refused");
                Err(Error::Busy { retry_after: RETRY_AFTER })
            }
        }
    }

    /// Counts these bytes if there is room for them now.
    fn try_hold(&self, payers: Payers, line: Line, bytes: usize) -> Result<Option<Held>> {
        let mut holdings = self.0.holdings.lock();
        self.require_share(&holdings, payers, bytes)?;
        // A request for no bytes waits only while the budget is overdrawn.
        let all = self.0.bytes_max;
        let of_all = |eighths| if bytes == 0 { all } else { all - all / 8 * (8 - eighths) };
        let is_strangers = line.is_of_strangers();
        let has_part =
            !is_strangers || holdings.strangers.saturating_add(bytes) <= of_all(line.strangers_eighths());
        let has_room = has_part && holdings.bytes.saturating_add(bytes) <= of_all(line.eighths());
        Ok(has_room.then(|| self.hold(payers, bytes, is_strangers, &mut holdings)))
    }

    fn hold(&self, payers: Payers, bytes: usize, is_strangers: bool, holdings: &mut Holdings) -> Held {
        holdings.take(payers, bytes);
        if is_strangers {
            holdings.strangers = holdings.strangers.saturating_add(bytes);
        }
        self.0.metrics.bytes_in_flight(bytes as i64);
        Held { budget: self.clone(), payers, bytes, is_strangers }
    }
}

impl Inner {
    fn line(&self, line: Line) -> &tokio::sync::Mutex<()> {
        let [strangers_large, strangers_small, known_large, known_small] = &self.lines;
        match line {
            Line::StrangersLarge => strangers_large,
            Line::StrangersSmall => strangers_small,
            Line::KnownLarge => known_large,
            Line::KnownSmall => known_small,
        }
    }
}

impl Held {
    /// The number of bytes that are counted.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counts so many bytes more for the same payers, once there is room for them. Errors as [`Budget::reserve`] does.
    pub(crate) async fn grow(&mut self, line: Line, bytes: usize) -> Result<()> {
        let mut more = self.budget.reserve(self.payers, line, bytes).await?;
        debug_assert!(more.is_strangers == self.is_strangers, "a body changes its sender");
        // The other count is empty when it is dropped.
        self.bytes = self.bytes.saturating_add(std::mem::take(&mut more.bytes));
        Ok(())
    }

    /// Takes the bytes out of the part of strangers, because the sender has proven who it is.
    pub(crate) fn become_known(&mut self) {
        if std::mem::take(&mut self.is_strangers) {
            let inner = &self.budget.0;
            let mut holdings = inner.holdings.lock();
            debug_assert!(holdings.strangers >= self.bytes, "strangers give back more than they took");
            holdings.strangers = holdings.strangers.saturating_sub(self.bytes);
            drop(holdings);
            inner.freed.notify_waiters();
        }
    }
}

/// The right of an answer to be made though there is no room for it. It ends when this is dropped.
pub(crate) struct Large {
    budget: Budget,
    payers: Payers,
}

impl Drop for Large {
    fn drop(&mut self) {
        let mut holdings = self.budget.0.holdings.lock();
        if let Some(at) = holdings.large.iter().position(|payers| *payers == self.payers) {
            holdings.large.swap_remove(at);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        self.become_known();
        let inner = &self.budget.0;
        inner.holdings.lock().give_back(self.payers, self.bytes);
        inner.metrics.bytes_in_flight(-(self.bytes as i64));
        inner.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::ids::UserNum;

    fn budget(bytes_max: usize) -> (Env, Budget) {
        let env = Env::simulated(1, 0);
        (env.clone(), Budget::new(env, Metrics::new(), bytes_max))
    }

    fn address(last: u8) -> Payers {
        Payers::of_request(None, [192, 0, 2, last].into())
    }

    /// A proxy on this machine, whose bytes count whole because it brings requests of many clients.
    fn proxy() -> Payers {
        Payers::of_request(None, [127, 0, 0, 1].into())
    }

    fn assert_nothing_is_held(budget: &Budget) {
        let holdings = budget.0.holdings.lock();
        assert_eq!((holdings.bytes, holdings.strangers), (0, 0));
        assert!(holdings.held.is_empty() && holdings.counted.is_empty() && holdings.large.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn answers_to_one_user_by_two_ways_give_back_what_they_took_in_each_order() {
        let alice = |address: [u8; 4]| Payers::of_request(Some(UserNum(1)), address.into());
        let (direct, by_proxy) = (alice([192, 0, 2, 1]), alice([127, 0, 0, 1]));
        for (first, second) in [(direct, by_proxy), (by_proxy, direct)] {
            for first_is_read_first in [true, false] {
                let (_, budget) = budget(100);
                let (held, other) = (budget.charge(first, 20), budget.charge(second, 20));
                let (earlier, later) = if first_is_read_first { (held, other) } else { (other, held) };
                drop(earlier);
                assert_eq!(budget.0.holdings.lock().bytes, 20);
                drop(later);
                assert_nothing_is_held(&budget);
                budget.admit(alice([192, 0, 2, 2])).await.unwrap();
            }
        }
    }

    /// Tries to make an answer that is larger than the budget.
    fn make_large(budget: &Budget, last: u8) -> Option<(Held, Large)> {
        let (mut held, mut large) = (budget.charge(address(last), 0), None);
        budget.grow_answer(&mut held, &mut large, 1_000).ok()?;
        Some((held, large.unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_ask_for_large_answers_without_end_keep_nobody_else_from_one() {
        let (_env, budget) = budget(100);
        let (mut first, mut second) = (make_large(&budget, 1), make_large(&budget, 2));
        assert!(first.is_some() && second.is_some());
        assert!(make_large(&budget, 3).is_none(), "two are made");
        for _ in 0..2 {
            // They ask again as soon as they have had their answers, and the third does a second later.
            (first, second) = (None, second);
            first = first.or_else(|| make_large(&budget, 1));
            assert!(first.is_none(), "the place is that of the third");
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let third = make_large(&budget, 3);
        assert!(third.is_some());
        assert!(make_large(&budget, 1).is_none() && make_large(&budget, 4).is_none());
        drop((second, third));
        assert!(make_large(&budget, 4).is_some(), "one of the two places is that of the first");
        assert!(make_large(&budget, 5).is_some(), "the other one is free");
        // A place is lost by those who do not come back.
        tokio::time::advance(PLACE_KEPT + Duration::from_secs(1)).await;
        let both = [make_large(&budget, 6), make_large(&budget, 7)];
        assert!(both.iter().all(Option::is_some));
        drop(both);
        assert_nothing_is_held(&budget);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_read_its_answers_keeps_nobody_else_waiting() {
        let (_env, budget) = budget(100);
        let unread: Vec<_> = (0..10).map(|_| budget.charge(address(1), 50)).collect();
        assert!(matches!(budget.admit(address(1)).await, Err(Error::Busy { .. })));
        budget.admit(address(2)).await.unwrap();
        let other = budget.reserve(address(2), Line::KnownSmall, 25).await.unwrap();
        drop(unread);
        budget.admit(address(1)).await.unwrap();
        drop(other);
        assert_nothing_is_held(&budget);
    }

    #[tokio::test(start_paused = true)]
    async fn newcomers_wait_until_there_is_room_and_nobody_overtakes() {
        let (env, budget) = budget(100);
        let first = budget.reserve(address(1), Line::KnownSmall, 25).await.unwrap();
        let answer = budget.charge(proxy(), 90);
        let order = Arc::new(Mutex::new(Vec::new()));
        let ask = |number, bytes| {
            let (budget, order) = (budget.clone(), order.clone());
            env.spawn(async move {
                let held = budget.reserve(address(number), Line::KnownSmall, bytes).await.unwrap();
                order.lock().push(number);
                drop(held);
            });
        };
        ask(3, 20);
        ask(4, 1);
        env.sleep(Duration::from_secs(1)).await;
        drop(first);
        env.sleep(Duration::from_secs(1)).await;
        assert!(order.lock().is_empty(), "the small one waits behind the large one");
        // There is room for a newcomer, who comes after those who wait nevertheless.
        ask(5, 1);
        env.sleep(Duration::from_secs(1)).await;
        assert!(order.lock().is_empty(), "the newcomer waits behind the others");
        drop(answer);
        env.sleep(Duration::from_secs(1)).await;
        assert_eq!(*order.lock(), [3, 4, 5]);
        assert_nothing_is_held(&budget);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waited_with_others_of_its_payer_is_within_the_share_when_its_turn_comes() {
        let (env, budget) = budget(100);
        let answer = budget.charge(proxy(), 100);
        let ask = |payers: Payers, bytes| {
            let (budget, env) = (budget.clone(), env.clone());
            async move {
                let held = budget.reserve(payers, Line::KnownSmall, bytes).await;
                env.sleep(Duration::from_secs(1)).await;
                held.map(drop)
            }
        };
        let free = async {
            env.sleep(Duration::from_secs(1)).await;
            drop(answer);
        };
        let waiting = (ask(address(1), 20), ask(address(1), 20), ask(address(2), 20));
        let (first, second, other, ()) = tokio::join!(waiting.0, waiting.1, waiting.2, free);
        assert!(first.is_ok() && other.is_ok());
        assert!(matches!(second, Err(Error::Busy { .. })), "the address has its share already");
        assert_nothing_is_held(&budget);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_too_long_is_told_to_come_back() {
        let (_, budget) = budget(100);
        let _answer = budget.charge(proxy(), 200);
        assert!(matches!(budget.admit(address(2)).await, Err(Error::Busy { .. })));
        assert!(matches!(budget.reserve(address(2), Line::KnownSmall, 10).await, Err(Error::Busy { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_holds_no_more_than_its_share() {
        let (_, budget) = budget(100);
        let _held = budget.reserve(address(1), Line::KnownSmall, 20).await.unwrap();
        assert!(matches!(budget.reserve(address(1), Line::KnownSmall, 10).await, Err(Error::Busy { .. })));
        budget.reserve(address(2), Line::KnownSmall, 10).await.unwrap();
        // A proxy on this machine brings requests of many clients, and so has no share.
        budget.reserve(proxy(), Line::KnownSmall, 60).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_user_holds_no_more_than_a_share_from_however_many_addresses() {
        let (_, budget) = budget(100);
        let alice = |last| Payers::of_request(Some(UserNum(1)), [192, 0, 2, last].into());
        let _held = budget.reserve(alice(1), Line::KnownSmall, 20).await.unwrap();
        assert!(matches!(budget.reserve(alice(2), Line::KnownSmall, 10).await, Err(Error::Busy { .. })));
        let _unread = budget.charge(alice(3), 20);
        assert!(matches!(budget.admit(alice(4)).await, Err(Error::Busy { .. })));
        // A neighbour of hers has a share too.
        budget.admit(Payers::of_request(Some(UserNum(2)), [192, 0, 2, 2].into())).await.unwrap();
    }

    const MIB: usize = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn a_small_body_never_waits_behind_a_large_one() {
        let (env, budget) = budget(8 * MIB);
        let full = budget.reserve(proxy(), Line::KnownLarge, 6 * MIB).await.unwrap();
        let wait = |is_known| budget.reserve(proxy(), Line::of(is_known, MIB), MIB);
        let others = async {
            env.sleep(Duration::from_secs(1)).await;
            for small in [Line::of(true, 1024), Line::of(false, 1024)] {
                let reserved = budget.reserve(proxy(), small, 1024).now_or_never();
                drop(reserved.expect("it does not wait").unwrap());
            }
            assert!(budget.reserve(proxy(), Line::KnownLarge, 1).now_or_never().is_none(), "large ones wait");
            drop(full);
        };
        let (known, stranger, ()) = tokio::join!(wait(true), wait(false), others);
        assert_eq!((known.unwrap().bytes(), stranger.unwrap().bytes()), (MIB, MIB));
        assert_nothing_is_held(&budget);
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_from_all_addresses_hold_a_part_together_and_leave_some_of_it_to_small_bodies() {
        let (_env, budget) = budget(80 * MIB);
        let mut held = Vec::new();
        for number in 0..40 {
            held.extend(budget.reserve(address(number), Line::of(false, MIB), MIB).await);
        }
        assert_eq!(held.len(), 30, "three eighths in large bodies");
        let small = budget.reserve(address(50), Line::of(false, 1024), 1024).await.unwrap();
        let known = budget.reserve(address(51), Line::of(true, MIB), MIB).await.unwrap();
        // A sender who proves who it is leaves the part to others.
        held[..2].iter_mut().for_each(Held::become_known);
        let other = budget.reserve(address(52), Line::of(false, MIB), MIB).await.unwrap();
        drop((held, small, known, other));
        assert_nothing_is_held(&budget);
    }
}
