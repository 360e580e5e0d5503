//! Places for what users have this server ask of others. Whoever pays for it holds no more than a share of them.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::env::payer::{self, Payers, Shares};

/// Places. A clone is another handle to the same ones.
#[derive(Clone)]
pub(super) struct Places(Arc<Inner>);

struct Inner {
    all: Arc<Semaphore>,
    shares: Mutex<Shares>,
}

/// A place, which is free again when this is dropped.
pub(super) struct Place {
    of: Places,
    payers: Payers,
    _permit: OwnedSemaphorePermit,
}

impl Places {
    /// Makes so many places, of which a payer holds at most one in `payers_min`.
    pub(super) fn new(count: usize, payers_min: usize) -> Self {
        let (all, each) = (Arc::new(Semaphore::new(count)), (count / payers_min).max(1));
        Self(Arc::new(Inner { all, shares: Mutex::new(Shares::of_each(each)) }))
    }

    /// Takes a place for whom the current task works; `None` where there is none, or where they hold their share.
    pub(super) fn enter(&self) -> Option<Place> {
        let payers = payer::current();
        let permit = Arc::clone(&self.0.all).try_acquire_owned().ok()?;
        let mut shares = self.0.shares.lock();
        if shares.find_without_room(payers, 1).is_some() {
            return None;
        }
        shares.take(payers, 1);
        Some(Place { of: self.clone(), payers, _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.0.shares.lock().give_back(self.payers, 1);
    }
}

#[cfg(test)]
mod tests {
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
}
