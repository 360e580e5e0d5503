//! The order in which previews are forgotten, so that only so many are kept: those whose time is over first, then those of whoever has
//! had the most made, and then the oldest.
//!
//! It is in memory and not in the rows, because nobody needs to know tomorrow who asked for a preview.

use std::collections::{BTreeMap, BTreeSet};

use super::rows::Key;
use crate::ids::UserNum;

/// Bounds of the previews that are kept.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The number of all previews.
    pub all: usize,
    /// The number of those that one user had made since the server started.
    pub of_user: usize,
}

/// The previews that are kept.
#[derive(Debug, Default)]
pub struct Kept {
    rows: BTreeMap<Key, Row>,
    by_end: BTreeSet<(u64, Key)>,
    of_user: BTreeMap<UserNum, BTreeSet<(u64, Key)>>,
}

#[derive(Debug)]
struct Row {
    until_ms: u64,
    by: Option<UserNum>,
}

impl Kept {
    /// Counts a preview that is kept until then, and that this user had made.
    pub fn add(&mut self, key: Key, until_ms: u64, by: Option<UserNum>) {
        self.remove(&key);
        self.rows.insert(key, Row { until_ms, by });
        self.by_end.insert((until_ms, key));
        if let Some(user) = by {
            self.of_user.entry(user).or_default().insert((key.1, key));
        }
    }

    /// Counts a preview no more.
    pub fn remove(&mut self, key: &Key) {
        let Some(row) = self.rows.remove(key) else { return };
        self.by_end.remove(&(row.until_ms, *key));
        if let Some(user) = row.by
            && let Some(own) = self.of_user.get_mut(&user)
        {
            own.remove(&(key.1, *key));
            if own.is_empty() {
                self.of_user.remove(&user);
            }
        }
    }

    /// The number of previews that are kept.
    pub fn count(&self) -> usize {
        self.rows.len()
    }

    /// Lists previews that go, at most so many, if this user has one more made: those whose time is over, and those that are too many.
    pub fn list_over(&self, by: Option<UserNum>, now_ms: u64, bounds: Bounds, count_max: usize) -> Vec<Key> {
        let over = self.by_end.iter().take_while(|(until_ms, _)| *until_ms <= now_ms);
        let mut gone: Vec<Key> = over.map(|(_, key)| *key).take(count_max).collect();
        if let Some(own) = by.and_then(|user| self.of_user.get(&user)) {
            let excess = (own.len() + 1).saturating_sub(bounds.of_user);
            gone.extend(own.iter().map(|(_, key)| *key).take(excess));
        }
        let left = self.rows.len().saturating_sub(gone.len());
        let excess = (left + usize::from(by.is_some())).saturating_sub(bounds.all);
        let oldest = self.by_end.iter().map(|(_, key)| *key).filter(|key| !gone.contains(key));
        let oldest: Vec<Key> = oldest.take(excess.min(count_max)).collect();
        gone.extend(oldest);
        gone.truncate(count_max);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { all: 10, of_user: 4 };

    fn key(number: u8) -> Key {
        ([number; 32], u64::from(number))
    }

    fn list(kept: &Kept, user: u64, now_ms: u64) -> Vec<u8> {
        let over = kept.list_over(Some(UserNum(user)), now_ms, BOUNDS, 50);
        over.into_iter().map(|(digest, _)| digest[0]).collect()
    }

    #[test]
    fn what_is_over_goes_first() {
        let mut kept = Kept::default();
        for number in 0..6 {
            kept.add(key(number), 100 + u64::from(number), None);
        }
        assert_eq!(list(&kept, 1, 99), [] as [u8; 0]);
        assert_eq!(list(&kept, 1, 102), [0, 1, 2]);
        assert_eq!(kept.list_over(None, u64::MAX, BOUNDS, 4).len(), 4, "no more than so many at once");
        kept.remove(&key(1));
        kept.add(key(0), 500, None);
        assert_eq!((list(&kept, 1, 102), kept.count()), (vec![2], 5));
    }

    #[test]
    fn whoever_has_many_made_has_their_own_forgotten_and_not_those_of_others() {
        let mut kept = Kept::default();
        for number in 0..5 {
            kept.add(key(number), 1_000, Some(UserNum(1)));
        }
        for number in 10..14 {
            kept.add(key(number), 900, Some(UserNum(2)));
        }
        assert_eq!(list(&kept, 2, 0), [10], "the fourth would be the fifth");
        assert_eq!(list(&kept, 1, 0), [0, 1]);
        assert_eq!(list(&kept, 3, 0), [] as [u8; 0]);
        kept.add(key(20), 2_000, None);
        assert_eq!(list(&kept, 3, 0), [10], "all are ten, and the one that would end first goes");
        assert_eq!(list(&kept, 2, 0), [10], "it makes room for both bounds");
    }

    #[test]
    fn nothing_is_left_of_what_is_removed() {
        let mut kept = Kept::default();
        for number in 0..100 {
            kept.add(key(number), 1_000, Some(UserNum(u64::from(number) % 3)));
        }
        for number in 0..100 {
            kept.remove(&key(number));
        }
        assert!(kept.rows.is_empty() && kept.by_end.is_empty() && kept.of_user.is_empty());
    }
}
