//! Tries that failed are remembered for a while, so that whoever asks again and again does not have another server called again and
//! again. Each failure after a pause makes the next pause twice as long, and a success ends them.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use parking_lot::Mutex;

/// The bounds of what is remembered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// The pause after the first failure.
    pub(super) first: Duration,
    /// The longest pause, after many failures.
    pub(super) longest: Duration,
    /// At most this many failures are remembered; what would be forgotten next gives way.
    pub(super) count_max: usize,
}

/// Failures by what was tried. Times are those for which the server has run.
#[derive(Debug)]
pub(super) struct Pauses<K, V> {
    bounds: Bounds,
    failures: Mutex<Failures<K, V>>,
}

#[derive(Debug)]
struct Failures<K, V> {
    by_key: BTreeMap<K, Failure<V>>,
    by_end: BTreeSet<(Duration, K)>,
}

#[derive(Debug)]
struct Failure<V> {
    pause: Duration,
    /// The pause lasts until then.
    until: Duration,
    /// It is remembered until then, so that the next pause is longer.
    forgotten: Duration,
    why: V,
}

impl<K: Ord + Clone, V: Clone> Pauses<K, V> {
    /// Nothing has failed yet.
    pub(super) fn new(bounds: Bounds) -> Self {
        let failures = Failures { by_key: BTreeMap::new(), by_end: BTreeSet::new() };
        Self { bounds, failures: Mutex::new(failures) }
    }

    /// The failure that stands for another try now. None where it may be tried.
    pub(super) fn find<Q: Ord + ?Sized>(&self, key: &Q, now: Duration) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let failures = self.failures.lock();
        let failure = failures.by_key.get(key)?;
        (now < failure.until).then(|| failure.why.clone())
    }

    /// Remembers a failure of a try that began at a time and failed now. Of several that were made at the same time the first one to
    /// fail counts, so that many who ask at once make no pause longer.
    pub(super) fn fail(&self, key: K, why: V, (began, now): (Duration, Duration)) {
        let mut failures = self.failures.lock();
        failures.forget(|end| end <= now);
        let Bounds { first, longest, count_max } = self.bounds;
        let before = failures.remove(&key);
        let (pause, until) = match before {
            Some(before) if began < before.until => (before.pause, before.until),
            Some(before) => {
                let pause = before.pause.saturating_mul(2).min(longest);
                (pause, now.saturating_add(pause))
            }
            None => (first, now.saturating_add(first)),
        };
        let forgotten = until.saturating_add(longest);
        failures.by_end.insert((forgotten, key.clone()));
        failures.by_key.insert(key, Failure { pause, until, forgotten, why });
        while failures.by_key.len() > count_max
            && let Some((_, next)) = failures.by_end.first().cloned()
        {
            failures.remove(&next);
        }
    }

    /// Forgets what failed, because it has succeeded.
    pub(super) fn succeed<Q: Ord + ?Sized>(&self, key: &Q)
    where
        K: Borrow<Q>,
    {
        self.failures.lock().remove(key);
    }
}

impl<K: Ord + Clone, V> Failures<K, V> {
    fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<Failure<V>>
    where
        K: Borrow<Q>,
    {
        let (key, failure) = self.by_key.remove_entry(key)?;
        self.by_end.remove(&(failure.forgotten, key));
        Some(failure)
    }

    fn forget(&mut self, is_over: impl Fn(Duration) -> bool) {
        while let Some((_, key)) = self.by_end.first().filter(|(end, _)| is_over(*end)).cloned() {
            self.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds =
        Bounds { first: Duration::from_secs(10), longest: Duration::from_secs(60), count_max: 3 };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn pauses_grow_with_each_failure_up_to_the_longest_and_end_with_a_success() {
        let pauses = Pauses::<&str, u32>::new(BOUNDS);
        assert_eq!(pauses.find("a", at(0)), None);
        pauses.fail("a", 1, (at(0), at(1)));
        assert_eq!((pauses.find("a", at(10)), pauses.find("a", at(11))), (Some(1), None));
        pauses.fail("a", 2, (at(11), at(12)));
        assert_eq!((pauses.find("a", at(31)), pauses.find("a", at(32))), (Some(2), None));
        for (began, failed) in [(32, 32), (72, 72), (132, 132)] {
            pauses.fail("a", 3, (at(began), at(failed)));
        }
        assert_eq!((pauses.find("a", at(191)), pauses.find("a", at(192))), (Some(3), None), "60 s at most");
        pauses.succeed("a");
        assert_eq!(pauses.find("a", at(150)), None);
        pauses.fail("a", 4, (at(200), at(200)));
        assert_eq!((pauses.find("a", at(209)), pauses.find("a", at(210))), (Some(4), None));
    }

    #[test]
    fn those_who_try_at_once_make_no_pause_longer() {
        let pauses = Pauses::<&str, u32>::new(BOUNDS);
        for failed in 1..9 {
            pauses.fail("a", 1, (at(0), at(failed)));
        }
        assert_eq!((pauses.find("a", at(10)), pauses.find("a", at(11))), (Some(1), None));
    }

    #[test]
    fn what_failed_long_ago_is_forgotten_and_there_is_never_too_much() {
        let pauses = Pauses::<String, u32>::new(BOUNDS);
        pauses.fail("a".to_owned(), 1, (at(0), at(0)));
        pauses.fail("b".to_owned(), 1, (at(70), at(70)));
        assert_eq!(pauses.failures.lock().by_key.len(), 1);
        for number in 0..100 {
            pauses.fail(number.to_string(), number, (at(80), at(80)));
        }
        let failures = pauses.failures.lock();
        assert_eq!((failures.by_key.len(), failures.by_end.len()), (3, 3));
    }
}
