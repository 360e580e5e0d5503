//! A bounded memory that all share: where it is full, the site with most in it loses its oldest entry, so that nobody makes it forget others.

use std::collections::{BTreeMap, BTreeSet};

use crate::payer::Site;

/// Stands for something by its hash, so that no push key is kept in memory longer than its request.
pub(crate) type Mark = [u8; 32];

struct Entry<V> {
    site: Site,
    number: u64,
    value: V,
}

/// Values by their marks, each for the site that had it noted last.
pub(crate) struct Kept<V> {
    max: usize,
    last: u64,
    entries: BTreeMap<Mark, Entry<V>>,
    /// The marks of each site, the oldest first.
    sites: BTreeMap<Site, BTreeMap<u64, Mark>>,
    /// The sites by how much each has.
    sizes: BTreeSet<(usize, Site)>,
}

impl<V> Kept<V> {
    /// A memory of at most this many entries.
    pub(crate) const fn new(max: usize) -> Self {
        Self { max, last: 0, entries: BTreeMap::new(), sites: BTreeMap::new(), sizes: BTreeSet::new() }
    }

    /// The value of a mark.
    pub(crate) fn find(&self, mark: &Mark) -> Option<&V> {
        self.entries.get(mark).map(|it| &it.value)
    }

    /// Keeps a value in place of the one that the mark had.
    pub(crate) fn put(&mut self, site: Site, mark: Mark, value: V) {
        self.forget(&mark);
        self.last += 1;
        let number = self.last;
        self.entries.insert(mark, Entry { site, number, value });
        self.change(site, |marks| {
            marks.insert(number, mark);
        });
        if self.entries.len() > self.max
            && let Some((_, most)) = self.sizes.last()
            && let Some(oldest) = self.sites.get(most).and_then(|marks| marks.values().next()).copied()
        {
            self.forget(&oldest);
        }
    }

    /// Forgets the value of a mark, and gives it back.
    pub(crate) fn forget(&mut self, mark: &Mark) -> Option<V> {
        let Entry { site, number, value } = self.entries.remove(mark)?;
        self.change(site, |marks| {
            marks.remove(&number);
        });
        Some(value)
    }

    fn change(&mut self, site: Site, change: impl FnOnce(&mut BTreeMap<u64, Mark>)) {
        let marks = self.sites.entry(site).or_default();
        self.sizes.remove(&(marks.len(), site));
        change(marks);
        if marks.is_empty() {
            self.sites.remove(&site);
        } else {
            self.sizes.insert((marks.len(), site));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payer::Payer;

    fn site(number: u8) -> Site {
        Payer::of([192, 0, 2, number].into()).site()
    }

    #[test]
    fn who_has_most_is_forgotten_first_and_the_oldest_of_theirs() {
        let mut kept = Kept::new(10);
        kept.put(site(1), [1; 32], "first");
        for number in 0..200 {
            kept.put(site(2), [100 + number % 100; 32], "flood");
        }
        assert_eq!(kept.find(&[1; 32]), Some(&"first"));
        assert_eq!(
            (kept.entries.len(), kept.find(&[199; 32]), kept.find(&[100; 32])),
            (10, Some(&"flood"), None)
        );
        kept.put(site(1), [199; 32], "changed");
        assert_eq!((kept.entries.len(), kept.forget(&[199; 32])), (10, Some("changed")));
        assert_eq!(kept.sizes.len(), 2);
        kept.forget(&[1; 32]);
        assert_eq!((kept.sites.len(), kept.sizes.len()), (1, 1));
    }
}
