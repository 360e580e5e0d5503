//! Turns: those who do something with the same thing do it one after another.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

/// A lock for each of many things. One that nobody holds or waits for takes no memory.
#[derive(Debug)]
pub struct Turns<K: Ord>(Arc<Locks<K>>);

#[derive(Debug)]
struct Locks<K>(Mutex<BTreeMap<K, Arc<tokio::sync::Mutex<()>>>>);

/// Somebody's turn, or their place in the line for it. It ends when this is dropped.
#[derive(Debug)]
pub struct Turn<K: Ord> {
    locks: Arc<Locks<K>>,
    key: K,
    lock: Arc<tokio::sync::Mutex<()>>,
    guard: Option<OwnedMutexGuard<()>>,
}

impl<K: Ord> Default for Turns<K> {
    fn default() -> Self {
        Self(Arc::new(Locks(Mutex::default())))
    }
}

impl<K: Ord> Clone for Turns<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K: Ord + Clone> Turns<K> {
    /// Waits for the turn of this one.
    pub async fn enter(&self, key: K) -> Turn<K> {
        let lock = Arc::clone(self.0.0.lock().entry(key.clone()).or_default());
        // The place in the line is given back also if nobody waits in it any more.
        let mut turn = Turn { locks: Arc::clone(&self.0), key, lock, guard: None };
        turn.guard = Some(Arc::clone(&turn.lock).lock_owned().await);
        turn
    }
}

impl<K: Ord> Drop for Turn<K> {
    fn drop(&mut self) {
        self.guard = None;
        let mut locks = self.locks.0.lock();
        // The map and this hold it, and nobody else.
        if Arc::strong_count(&self.lock) == 2 {
            locks.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn each_thing_has_one_turn_and_leaves_nothing_behind() {
        let turns = Turns::default();
        let first = turns.enter("a").await;
        let mut second = Box::pin(turns.enter("a"));
        let mut third = Box::pin(turns.enter("a"));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        drop(turns.enter("b").await);
        drop(second);
        drop(first);
        drop(third.await);
        assert!(turns.0.0.lock().is_empty());
    }
}
