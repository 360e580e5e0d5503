//! The pending writes of one commit or note: rows, preconditions, claimed positions, whom to wake.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{
        Fault, Read, View,
        engine::{Family, Rows},
        key::Encoder,
        log::LogEntry,
        overlay::merge,
        schema,
        table::Direction,
    },
};

/// What a row of a batch becomes; `None` deletes it.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) value: Option<Bytes>,
    pub(crate) pending_in_key: Vec<u32>,
    pub(crate) pending_in_value: Vec<u32>,
}

/// What must hold when the batch is accepted.
#[derive(Debug)]
pub(crate) struct Expectation {
    pub(crate) family: Family,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Option<Bytes>,
    pub(crate) table: &'static str,
}

/// The writes of one commit or note. It reads its own rows over the batches that are accepted but not published
/// over the newest snapshot, so a builder that holds the lock of its domain sees everything that precedes it.
pub struct Batch {
    pub(crate) view: View,
    pub(crate) rows: BTreeMap<(Family, Vec<u8>), Pending>,
    pub(crate) expectations: Vec<Expectation>,
    pub(crate) positions: u32,
    pub(crate) bytes: usize,
    pub(crate) on_publish: Vec<Box<dyn FnOnce(Position) + Send>>,
}

impl Batch {
    pub(crate) fn new(view: View) -> Self {
        Self {
            view,
            rows: BTreeMap::new(),
            expectations: Vec::new(),
            positions: 0,
            bytes: 0,
            on_publish: Vec::new(),
        }
    }

    /// Claims the next position for this entry and writes it to the log. A batch that claims a position is a
    /// *commit*; one that claims none is a *note*.
    pub fn position(&mut self, entry: &LogEntry) -> Position {
        let position = Position::pending(self.positions);
        self.positions += 1;
        schema::LOG.put(self, position, entry);
        position
    }

    /// Whether a position was claimed.
    pub fn is_commit(&self) -> bool {
        self.positions > 0
    }

    /// Called once, by the flusher, when the batch is published, with its first position: waking readers. It must be short.
    pub fn on_publish(&mut self, call: impl FnOnce(Position) + Send + 'static) {
        self.on_publish.push(Box::new(call));
    }

    /// How many rows it writes.
    pub fn row_count(&self) -> usize {
        self.rows.len()
    }

    /// How many bytes its rows take: keys and values.
    pub fn byte_count(&self) -> usize {
        self.bytes
    }

    pub(crate) fn put_raw(&mut self, family: Family, key: Encoder, value: Encoder) {
        self.bytes += key.bytes.len() + value.bytes.len();
        self.rows.insert(
            (family, key.bytes),
            Pending {
                value: Some(value.bytes.into()),
                pending_in_key: key.pending,
                pending_in_value: value.pending,
            },
        );
    }

    pub(crate) fn delete_raw(&mut self, family: Family, key: Encoder) {
        self.bytes += key.bytes.len();
        let row = Pending { value: None, pending_in_key: key.pending, pending_in_value: Vec::new() };
        self.rows.insert((family, key.bytes), row);
    }

    pub(crate) fn expect_raw(
        &mut self,
        family: Family,
        key: Encoder,
        value: Option<Bytes>,
        table: &'static str,
    ) {
        self.expectations.push(Expectation { family, key: key.bytes, value, table });
    }
}

impl Read for Batch {
    fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        // The lookup needs an owned key only while the batch has rows at all.
        if !self.rows.is_empty()
            && let Some(row) = self.rows.get(&(family, key.to_vec()))
        {
            return Ok(row.value.clone());
        }
        self.view.get_raw(family, key)
    }

    fn range_raw(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        if low >= high {
            return Ok(Box::new(std::iter::empty()));
        }
        let own = self.rows.range((family, low.clone())..(family, high.clone()));
        let own = own.map(|((_, key), row)| (Bytes::copy_from_slice(key), row.value.clone()));
        let own: Box<dyn Iterator<Item = (Bytes, Option<Bytes>)>> = match direction {
            Direction::Up => Box::new(own),
            Direction::Down => Box::new(own.rev()),
        };
        Ok(merge(self.view.range_raw(family, low, high, direction)?, own, direction))
    }

    /// Above everything published and everything claimed here.
    fn upto(&self) -> Position {
        Position::MAX
    }
}
