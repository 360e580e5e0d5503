//! Places for what users have this server ask of others. Whoever pays for it holds no more than a share of them.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::env::payer::{self, Payers, Shares};

/// Places. A clone is another handle to the same ones.
#[derive(Clone, Debug)]
pub(crate) struct Places(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    all: Arc<Semaphore>,
    shares: Mutex<Shares>,
    freed: Notify,
}

/// A place, which is free again when this is dropped.
pub(crate) struct Place {
    of: Places,
    payers: Payers,
    // It is taken when the place is given back, before those who wait for one are woken.
    permit: Option<OwnedSemaphorePermit>,
}

impl Places {
    /// Makes so many places, of which a payer holds at most one in `payers_min`.
    pub(crate) fn new(count: usize, payers_min: usize) -> Self {
        let (all, each) = (Arc::new(Semaphore::new(count)), (count / payers_min).max(1));
        Self(Arc::new(Inner { all, shares: Mutex::new(Shares::of_each(each)), freed: Notify::new() }))
    }

    /// Takes a place for whom the current task works; `None` where there is none, or where they hold their share.
    pub(crate) fn enter(&self) -> Option<Place> {
        let payers = payer::current();
        let permit = Arc::clone(&self.0.all).try_acquire_owned().ok()?;
        let mut shares = self.0.shares.lock();
        if shares.find_without_room(payers, 1).is_some() {
            return None;
        }
        shares.take(payers, 1);
        Some(Place { of: self.clone(), payers, permit: Some(permit) })
    }

    /// Takes a place for whom the current task works, as soon as there is one and they hold less than their share. The caller
    /// bounds how many of it wait, and for how long.
    pub(crate) async fn wait(&self) -> Place {
        loop {
            let freed = self.0.freed.notified();
            tokio::pin!(freed);
            // From here on nothing that is given back is missed.
            freed.as_mut().enable();
            if let Some(place) = self.enter() {
                return place;
            }
            freed.await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.0.shares.lock().give_back(self.payers, 1);
        drop(self.permit.take());
        self.of.0.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn nobody_holds_more_than_a_share() {
        let places = Places::new(8, 4);
        let of = |last: u8| Payers::of_request(None, [192, 0, 2, last].into());
        let enter = |last| of(last).for_now(|| places.enter());
        let held: Vec<_> = (0..2).map(|_| enter(1).unwrap()).collect();
        assert!(enter(1).is_none());
        let others: Vec<_> = (2..5).flat_map(|last| [enter(last).unwrap(), enter(last).unwrap()]).collect();
        assert!(enter(9).is_none(), "all are taken");
        drop(held);
        assert!(enter(9).is_some() && enter(1).is_some());
        drop(others);
        assert!(places.0.shares.lock().is_empty());
    }

    #[tokio::test]
    async fn whoever_waits_gets_what_is_given_back() {
        let places = Places::new(2, 2);
        let of = |last: u8| Payers::of_request(None, [192, 0, 2, last].into());
        let first = of(1).for_now(|| places.enter()).unwrap();
        let mut second = Box::pin(of(1).during(places.wait()));
        assert!((&mut second).now_or_never().is_none(), "the share is held");
        let other = of(2).during(places.wait()).await;
        drop(other);
        assert!((&mut second).now_or_never().is_none(), "what another gives back is no share of theirs");
        drop(first);
        drop(second.await);
        assert!(places.0.shares.lock().is_empty());
    }
}
