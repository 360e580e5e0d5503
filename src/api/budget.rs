//! The budget of bytes of bodies and answers that are in memory at once, over all requests. Newcomers wait while it is
//! used up.
//!
//! A body reserves its bytes before they are received. An answer is charged for when it is made: it cannot be made
//! smaller any more, so that it may overdraw the budget, and newcomers wait until it was read.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{
    env::Env,
    error::{Error, Result},
    flows::limits::network,
    metrics::Metrics,
};

/// One address may hold one part in this many of the budget, so that a single client cannot use it up.
const ADDRESS_SHARE: usize = 4;

/// A newcomer waits at most this long, and is then told to try again later.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// The budget of one server. A clone is cheap.
#[derive(Clone)]
pub(crate) struct Budget(Arc<Inner>);

struct Inner {
    env: Env,
    metrics: Metrics,
    bytes_max: usize,
    /// The bytes in memory, of each address at most its share, so that one address with answers that it does not read cannot
    /// keep others waiting. They change under the lock of `held` and are read without it.
    bytes: AtomicUsize,
    /// The bytes that each address holds, by network.
    held: Mutex<BTreeMap<u128, usize>>,
    freed: Notify,
    /// The first in line waits for room; the others wait here for their turn, so that nobody overtakes.
    line: tokio::sync::Mutex<()>,
}

/// A number of bytes that the budget counts until this is dropped.
pub(crate) struct Held {
    budget: Budget,
    address: Option<u128>,
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
            held: Mutex::default(),
            freed: Notify::new(),
            line: tokio::sync::Mutex::new(()),
        }))
    }

    /// Waits while the budget is overdrawn. Fails with [`Error::Busy`] if that takes longer than `WAIT_MAX`, and at once for an
    /// address that holds more than its share.
    pub(crate) async fn admit(&self, address: IpAddr) -> Result<()> {
        if let Some(address) = shared(address)
            && self.0.held.lock().get(&address).is_some_and(|held| *held > self.share())
        {
            tracing::debug!(reason = "the address does not read its answers", "refused");
            return Err(Error::Busy { retry_after: Duration::from_secs(1) });
        }
        if self.0.bytes.load(Ordering::Relaxed) > self.0.bytes_max {
            drop(self.reserve(address, 0).await?);
        }
        Ok(())
    }

    /// Waits until there is room for these bytes, and counts them. Fails with [`Error::Busy`] if that takes longer than
    /// `WAIT_MAX`, or if the address would hold more than its share.
    pub(crate) async fn reserve(&self, address: IpAddr, bytes: usize) -> Result<Held> {
        let busy = || Error::Busy { retry_after: Duration::from_secs(1) };
        if let Some(address) = shared(address)
            && bytes > 0
            && self.0.held.lock().get(&address).copied().unwrap_or_default() + bytes > self.share()
        {
            tracing::debug!(bytes, reason = "the address holds its share of the budget", "refused");
            return Err(busy());
        }
        if let Some(held) = self.try_hold(address, bytes) {
            return Ok(held);
        }
        let wait = async {
            let _first = self.0.line.lock().await;
            loop {
                let freed = self.0.freed.notified();
                if let Some(held) = self.try_hold(address, bytes) {
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
                Err(busy())
            }
        }
    }

    /// Counts bytes that are in memory already, even if that overdraws the budget.
    pub(crate) fn charge(&self, address: IpAddr, bytes: usize) -> Held {
        self.hold(address, bytes, &mut self.0.held.lock())
    }

    /// The bytes that one address may hold.
    fn share(&self) -> usize {
        self.0.bytes_max / ADDRESS_SHARE
    }

    fn try_hold(&self, address: IpAddr, bytes: usize) -> Option<Held> {
        let mut held = self.0.held.lock();
        let has_room = self.0.bytes.load(Ordering::Relaxed) + bytes <= self.0.bytes_max;
        has_room.then(|| self.hold(address, bytes, &mut held))
    }

    fn hold(&self, address: IpAddr, bytes: usize, held: &mut BTreeMap<u128, usize>) -> Held {
        let address = shared(address).filter(|_| bytes > 0);
        let counted = address.map_or(bytes, |address| {
            let of_address = held.entry(address).or_default();
            let before = (*of_address).min(self.share());
            *of_address += bytes;
            (*of_address).min(self.share()) - before
        });
        self.0.bytes.fetch_add(counted, Ordering::Relaxed);
        self.0.metrics.bytes_in_flight(bytes as i64);
        Held { budget: self.clone(), address, bytes }
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
        let (inner, share) = (&self.budget.0, self.budget.share());
        let mut held = inner.held.lock();
        let mut counted = self.bytes;
        if let Some(address) = self.address
            && let Some(bytes) = held.get_mut(&address)
        {
            debug_assert!(*bytes >= self.bytes, "more is given back than was taken");
            let before = (*bytes).min(share);
            *bytes = bytes.saturating_sub(self.bytes);
            counted = before - (*bytes).min(share);
            if *bytes == 0 {
                held.remove(&address);
            }
        }
        let before = inner.bytes.fetch_sub(counted, Ordering::Relaxed);
        debug_assert!(before >= counted, "more is given back than was taken");
        drop(held);
        inner.metrics.bytes_in_flight(-(self.bytes as i64));
        inner.freed.notify_waiters();
    }
}

/// The network that an address counts for. A reverse proxy on this machine and a peer without an address have no share,
/// because they stand for many clients.
fn shared(address: IpAddr) -> Option<u128> {
    (!address.is_loopback() && !address.is_unspecified()).then(|| network(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(bytes_max: usize) -> (Env, Budget) {
        let env = Env::simulated(1, 0);
        (env.clone(), Budget::new(env, Metrics::new(), bytes_max))
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    /// A proxy on this machine, whose bytes count whole because it brings requests of many clients.
    fn proxy() -> IpAddr {
        IpAddr::from([127, 0, 0, 1])
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
        assert_eq!(budget.0.bytes.load(Ordering::Relaxed), 0);
        assert!(budget.0.held.lock().is_empty());
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
        assert_eq!(budget.0.bytes.load(Ordering::Relaxed), 0);
        assert!(budget.0.held.lock().is_empty());
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
}
