//! A snapshot that counts the rows it gives, for tests of what reading costs.

use std::cell::Cell;

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{
        Direction, Fault, Read, Snapshot,
        engine::{Family, Rows},
        range::{KeyRange, KeyValue},
    },
};

/// A snapshot that counts the rows it gives and the keys it was asked for, and how often it was asked at all.
pub(crate) struct Counting<'s> {
    snapshot: &'s Snapshot,
    rows: Cell<usize>,
    questions: Cell<usize>,
}

impl<'s> Counting<'s> {
    pub(crate) fn new(snapshot: &'s Snapshot) -> Self {
        Self { snapshot, rows: Cell::new(0), questions: Cell::new(0) }
    }

    /// The number of rows that it gave, and of keys that it was asked for, so far.
    pub(crate) fn rows(&self) -> usize {
        self.rows.get()
    }

    /// The number of questions so far: each asks for a key or many, for a range, or for the first rows of many ranges.
    pub(crate) fn questions(&self) -> usize {
        self.questions.get()
    }

    fn asked(&self, rows: usize) -> &Snapshot {
        self.questions.set(self.questions.get() + 1);
        self.rows.set(self.rows.get() + rows);
        self.snapshot
    }
}

impl Read for Counting<'_> {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        self.asked(1).get_raw(family, key)
    }

    fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        self.asked(keys.len()).get_many_raw(family, keys)
    }

    fn first_of_many_raw(&self, family: Family, ranges: &[KeyRange]) -> Result<Vec<Option<KeyValue>>, Fault> {
        self.asked(ranges.len()).first_of_many_raw(family, ranges)
    }

    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        let rows = self.asked(0).range_raw(family, low, high, direction)?;
        Ok(Box::new(rows.inspect(|_| self.rows.set(self.rows.get() + 1))))
    }

    fn upto(&self) -> Position {
        self.snapshot.upto()
    }
}
