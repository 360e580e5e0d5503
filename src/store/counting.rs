//! A snapshot that counts the rows it gives, for tests of what reading costs.

use std::cell::Cell;

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{
        Direction, Fault, Read, Snapshot,
        engine::{Family, Rows},
    },
};

/// A snapshot that counts the rows it gives, and the keys it was asked for.
pub(crate) struct Counting<'s> {
    snapshot: &'s Snapshot,
    rows: Cell<usize>,
}

impl<'s> Counting<'s> {
    pub(crate) fn new(snapshot: &'s Snapshot) -> Self {
        Self { snapshot, rows: Cell::new(0) }
    }

    /// How many so far.
    pub(crate) fn rows(&self) -> usize {
        self.rows.get()
    }
}

impl Read for Counting<'_> {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        self.rows.set(self.rows.get() + 1);
        self.snapshot.get_raw(family, key)
    }

    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        let rows = self.snapshot.range_raw(family, low, high, direction)?;
        Ok(Box::new(rows.inspect(|_| self.rows.set(self.rows.get() + 1))))
    }

    fn upto(&self) -> Position {
        self.snapshot.upto()
    }
}
