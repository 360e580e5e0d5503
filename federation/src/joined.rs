//! One look-up for all who wait for the same thing at the same time.
//!
//! The first caller begins it, later ones join. Whoever of them is polled drives it, so it needs no task of its own: it goes on
//! while anybody waits, also when the first one hangs up, and ends when nobody does.

use std::{borrow::Borrow, collections::BTreeMap};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use parking_lot::Mutex;

/// From this many entries on, those that nobody waits for any more are cleared away.
const CLEARED_FROM: usize = 256;

/// Look-ups that run, by what is looked up.
pub struct Joined<K, V: Clone> {
    running: Mutex<BTreeMap<K, WeakShared<BoxFuture<'static, V>>>>,
}

impl<K, V: Clone> Default for Joined<K, V> {
    fn default() -> Self {
        Self { running: Mutex::new(BTreeMap::new()) }
    }
}

impl<K: Ord + Clone, V: Clone + Send + Sync + 'static> Joined<K, V> {
    /// Waits for the look-up of this key that runs, or for a new one.
    pub async fn run(&self, key: K, begin: impl FnOnce() -> BoxFuture<'static, V>) -> V {
        let shared = self.join(&key, begin);
        let value = shared.clone().await;
        let mut running = self.running.lock();
        // Another look-up of this key may have begun since.
        let is_this = running.get(&key).and_then(WeakShared::upgrade).is_some_and(|it| it.ptr_eq(&shared));
        if is_this {
            running.remove(&key);
        }
        value
    }

    /// The look-up of this key that runs, if there is one.
    pub(crate) fn running<Q: Ord + ?Sized>(&self, key: &Q) -> Option<impl Future<Output = V> + use<K, V, Q>>
    where
        K: Borrow<Q>,
    {
        self.running.lock().get(key).and_then(WeakShared::upgrade)
    }

    fn join(&self, key: &K, begin: impl FnOnce() -> BoxFuture<'static, V>) -> Shared<BoxFuture<'static, V>> {
        let mut running = self.running.lock();
        if let Some(shared) = running.get(key).and_then(WeakShared::upgrade) {
            return shared;
        }
        if running.len() >= CLEARED_FROM {
            running.retain(|_, weak| weak.upgrade().is_some());
        }
        let shared = begin().shared();
        if let Some(weak) = shared.downgrade() {
            running.insert(key.clone(), weak);
        }
        shared
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use super::*;

    fn slow(begun: &Arc<AtomicUsize>) -> BoxFuture<'static, usize> {
        let begun = Arc::clone(begun);
        async move {
            let number = begun.fetch_add(1, Ordering::Relaxed);
            tokio::time::timeout(Duration::from_secs(5), futures_util::future::pending::<()>())
                .await
                .unwrap_err();
            number
        }
        .boxed()
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_together_share_one_look_up_even_if_the_first_hangs_up() {
        let joined = Arc::new(Joined::<&str, usize>::default());
        let begun = Arc::new(AtomicUsize::new(0));
        let first = tokio::time::timeout(Duration::from_secs(1), joined.run("a", || slow(&begun)));
        let later = async {
            tokio::task::yield_now().await;
            joined.run("a", || slow(&begun)).await
        };
        let other = joined.run("b", || slow(&begun));
        let (first, later, other) = tokio::join!(first, later, other);
        assert!(first.is_err());
        assert_eq!((later, other), (0, 1));
        assert_eq!(begun.load(Ordering::Relaxed), 2);
        assert!(joined.running.lock().is_empty());
        assert_eq!(joined.run("a", || slow(&begun)).await, 2, "a look-up that ended is not joined");
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_cleared_away() {
        let joined = Joined::<usize, ()>::default();
        for key in 0..3 * CLEARED_FROM {
            let run = joined.run(key, || futures_util::future::pending().boxed());
            assert!(run.now_or_never().is_none());
        }
        assert!(joined.running.lock().len() <= CLEARED_FROM);
    }
}
