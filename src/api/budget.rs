//! The budget of bytes of bodies and answers that are in memory at once, over all requests. Newcomers wait while it is
//! used up.
//!
//! A body reserves its bytes before they are received. An answer is charged for when it is made: it cannot be made
//! smaller any more, so that it may overdraw the budget, and newcomers wait until it was read. A payer who holds more than its
//! share is refused before its next answer is made, also if the request was admitted earlier: so a payer has at most its share in
//! unread answers, and the few answers besides that are made at the same time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

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

/// The budget of one server. A clone is cheap.
#[derive(Clone)]
pub(crate) struct Budget(Arc<Inner>);

struct Inner {
    env: Env,
    metrics: Metrics,
    bytes_max: usize,
    /// The bytes in memory, of each payer in `Holdings::counted` at most its share, so that an address with answers that it
    /// does not read cannot keep others waiting. They change under the lock of `holdings` and are read without it.
    bytes: AtomicUsize,
    holdings: Mutex<Holdings>,
    freed: Notify,
    /// The first in line waits for room; the others wait here for their turn, so that nobody overtakes.
    line: tokio::sync::Mutex<()>,
}

/// The bytes that payers hold.
struct Holdings {
    /// The bytes that each user and each address holds. An answer is in here for its user and for its address.
    held: Shares,
    /// The same bytes, each for its narrowest payer alone. This is apart from `held`, where the bytes of a user who asks
    /// from an address of its own and through a proxy on this machine would be counted for both and given back for one.
    counted: Shares,
}

impl Holdings {
    /// Counts the bytes, and returns by how many the bytes in memory become more.
    fn take(&mut self, payers: Payers, bytes: usize) -> usize {
        self.held.take(payers, bytes);
        let narrowest = payers.narrowest();
        let before = self.counted.held_within_share(narrowest);
        self.counted.take(Payers::one(narrowest), bytes);
        self.counted.held_within_share(narrowest).saturating_sub(before)
    }

    /// Gives back what `take` has counted for the same payers, and returns by how many the bytes in memory become fewer.
    fn give_back(&mut self, payers: Payers, bytes: usize) -> usize {
        self.held.give_back(payers, bytes);
        let narrowest = payers.narrowest();
        let before = self.counted.held_within_share(narrowest);
        self.counted.give_back(Payers::one(narrowest), bytes);
        before.saturating_sub(self.counted.held_within_share(narrowest))
    }
}

/// A number of bytes that the budget counts until this is dropped.
pub(crate) struct Held {
    budget: Budget,
    payers: Payers,
    bytes: usize,
}

impl Budget {
    /// Makes a budget in which nothing is counted yet.
    pub(crate) fn new(env: Env, metrics: Metrics, bytes_max: usize) -> Self {
        Self(Arc::new(Inner {
            env,
            metrics,
            bytes_max,
            bytes: AtomicUsize::new(0),
            holdings: Mutex::new(Holdings { held: Shares::new(bytes_max), counted: Shares::new(bytes_max) }),
            freed: Notify::new(),
            line: tokio::sync::Mutex::new(()),
        }))
    }

    /// Waits while the budget is overdrawn. Fails with [`Error::Busy`] if that takes longer than `WAIT_MAX`, and at once for a
    /// user or an address that holds more than its share.
    pub(crate) async fn admit(&self, payers: Payers) -> Result<()> {
        self.require_within_share(payers)?;
        if self.0.bytes.load(Ordering::Relaxed) > self.0.bytes_max {
            drop(self.reserve(payers, 0).await?);
        }
        Ok(())
    }

    /// Fails with [`Error::Busy`] if the user or the address holds more than its share.
    pub(crate) fn require_within_share(&self, payers: Payers) -> Result<()> {
        self.require_share(payers, 0)
    }

    /// Waits until there is room for these bytes, and counts them. Fails with [`Error::Busy`] if that takes longer than
    /// `WAIT_MAX`, or if the user or the address would hold more than its share.
    pub(crate) async fn reserve(&self, payers: Payers, bytes: usize) -> Result<Held> {
        if bytes > 0 {
            self.require_share(payers, bytes)?;
        }
        if let Some(held) = self.try_hold(payers, bytes) {
            return Ok(held);
        }
        let wait = async {
            let _first = self.0.line.lock().await;
            loop {
                let freed = self.0.freed.notified();
                if let Some(held) = self.try_hold(payers, bytes) {
                    return held;
                }
                freed.await;
            }
        };
        tokio::select! {
            biased;
            held = wait => Ok(held),
            () = self.0.env.sleep(WAIT_MAX) => {
                tracing::debug!(bytes, reason = "no room for bytes in flight", "refused");
                Err(Error::Busy { retry_after: RETRY_AFTER })
            }
        }
    }

    /// Counts bytes that are in memory already, even if that overdraws the budget.
    pub(crate) fn charge(&self, payers: Payers, bytes: usize) -> Held {
        self.hold(payers, bytes, &mut self.0.holdings.lock())
    }

    /// The bytes that the first of these payers holds.
    #[cfg(test)]
    pub(crate) fn held_by(&self, payers: Payers) -> usize {
        self.0.holdings.lock().held.held_by(payers.first())
    }

    /// Refuses payers who would hold more than their share with these bytes.
    fn require_share(&self, payers: Payers, bytes: usize) -> Result<()> {
        match self.0.holdings.lock().held.find_without_room(payers, bytes) {
            None => Ok(()),
            Some(payer) => {
                tracing::debug!(bytes, ?payer, reason = "the payer holds its share of the budget", "refused");
                Err(Error::Busy { retry_after: RETRY_AFTER })
            }
        }
    }

    fn try_hold(&self, payers: Payers, bytes: usize) -> Option<Held> {
        let mut holdings = self.0.holdings.lock();
        let has_room = self.0.bytes.load(Ordering::Relaxed) + bytes <= self.0.bytes_max;
        has_room.then(|| self.hold(payers, bytes, &mut holdings))
    }

    fn hold(&self, payers: Payers, bytes: usize, holdings: &mut Holdings) -> Held {
        let counted = holdings.take(payers, bytes);
        self.0.bytes.fetch_add(counted, Ordering::Relaxed);
        self.0.metrics.bytes_in_flight(bytes as i64);
        Held { budget: self.clone(), payers, bytes }
    }
}

impl Held {
    /// The number of bytes that are counted.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let inner = &self.budget.0;
        let mut holdings = inner.holdings.lock();
        let counted = holdings.give_back(self.payers, self.bytes);
        let before = inner.bytes.fetch_sub(counted, Ordering::Relaxed);
        debug_assert!(before >= counted, "more is given back than was taken");
        drop(holdings);
        inner.metrics.bytes_in_flight(-(self.bytes as i64));
        inner.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(budget.0.bytes.load(Ordering::Relaxed), 0);
        let holdings = budget.0.holdings.lock();
        assert!(holdings.held.is_empty() && holdings.counted.is_empty());
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
                assert_eq!(budget.0.bytes.load(Ordering::Relaxed), 20);
                drop(later);
                assert_nothing_is_held(&budget);
                budget.admit(alice([192, 0, 2, 2])).await.unwrap();
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_read_its_answers_keeps_nobody_else_waiting() {
        let (_env, budget) = budget(100);
        let unread: Vec<_> = (0..10).map(|_| budget.charge(address(1), 50)).collect();
        assert!(matches!(budget.admit(address(1)).await, Err(Error::Busy { .. })));
        budget.admit(address(2)).await.unwrap();
        let other = budget.reserve(address(2), 25).await.unwrap();
        drop(unread);
        budget.admit(address(1)).await.unwrap();
        drop(other);
        assert_nothing_is_held(&budget);
    }

    #[tokio::test(start_paused = true)]
    async fn newcomers_wait_until_there_is_room_and_nobody_overtakes() {
        let (env, budget) = budget(100);
        let first = budget.reserve(address(1), 25).await.unwrap();
        let answer = budget.charge(proxy(), 90);
        let order = Arc::new(Mutex::new(Vec::new()));
        for (number, bytes) in [(3, 20), (4, 1)] {
            let (budget, order) = (budget.clone(), order.clone());
            env.spawn(async move {
                let held = budget.reserve(address(number), bytes).await.unwrap();
                order.lock().push(number);
                drop(held);
            });
        }
        env.sleep(Duration::from_secs(1)).await;
        drop(first);
        env.sleep(Duration::from_secs(1)).await;
        assert!(order.lock().is_empty(), "the small one waits behind the large one");
        drop(answer);
        env.sleep(Duration::from_secs(1)).await;
        assert_eq!(*order.lock(), [3, 4]);
        assert_nothing_is_held(&budget);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_too_long_is_told_to_come_back() {
        let (_, budget) = budget(100);
        let _answer = budget.charge(proxy(), 200);
        assert!(matches!(budget.admit(address(2)).await, Err(Error::Busy { .. })));
        assert!(matches!(budget.reserve(address(2), 10).await, Err(Error::Busy { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_holds_no_more_than_its_share() {
        let (_, budget) = budget(100);
        let _held = budget.reserve(address(1), 20).await.unwrap();
        assert!(matches!(budget.reserve(address(1), 10).await, Err(Error::Busy { .. })));
        budget.reserve(address(2), 10).await.unwrap();
        // A proxy on this machine brings requests of many clients, and so has no share.
        budget.reserve(proxy(), 60).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_user_holds_no_more_than_a_share_from_however_many_addresses() {
        let (_, budget) = budget(100);
        let alice = |last| Payers::of_request(Some(UserNum(1)), [192, 0, 2, last].into());
        let _held = budget.reserve(alice(1), 20).await.unwrap();
        assert!(matches!(budget.reserve(alice(2), 10).await, Err(Error::Busy { .. })));
        let _unread = budget.charge(alice(3), 20);
        assert!(matches!(budget.admit(alice(4)).await, Err(Error::Busy { .. })));
        // A neighbour of hers has a share too.
        budget.admit(Payers::of_request(Some(UserNum(2)), [192, 0, 2, 2].into())).await.unwrap();
    }
}
