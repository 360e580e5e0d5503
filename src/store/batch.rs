//! The two verbs of writing: a [`Batch`] takes positions, wakes readers and is durable when it is published; a [`Note`]
//! does none of these.

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{
        Fault, Guard, NotAccepted, Read, View,
        engine::{Family, Rows},
        key::Encoder,
        range::{Direction, KeyRange, KeyValue},
        wake::Wake,
        writes::Writes,
    },
};

/// Tables write into a [`Batch`] or a [`Note`], and read there what was written.
pub trait Write: Read {
    /// The rows that it will write.
    fn writes(&mut self) -> &mut Writes;
}

/// A precondition: the row that must be there when the batch is accepted.
#[derive(Debug)]
pub(crate) struct Expectation {
    pub(crate) family: Family,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Option<Bytes>,
    pub(crate) table: &'static str,
}

/// Where the positions of a batch begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begins {
    /// They begin after the last one given out.
    Next,
    /// They begin here, because the batch is the last one of a staged step; later batches go on after it.
    At(Position),
    /// They begin here, because the batch is a part of a staged step; readers of the log meet none of it before the last part.
    Staged(Position),
}

/// The writes of one commit, with what must hold for them and whom they wake.
pub struct Batch {
    pub(crate) writes: Writes,
    pub(crate) expectations: Vec<Expectation>,
    pub(crate) positions: u32,
    pub(crate) wakes: Vec<Wake>,
    /// Where positions go on after it: the beginning of an incarnation.
    pub(crate) jump_to: Option<Position>,
    pub(crate) begins: Begins,
}

impl Batch {
    pub(crate) fn new(view: View, guard: &Guard) -> Self {
        Self {
            writes: Writes::new(view, guard),
            expectations: Vec::new(),
            positions: 0,
            wakes: Vec::new(),
            jump_to: None,
            begins: Begins::Next,
        }
    }

    /// Lets the batch write what this guard covers, too: it must live until the batch is enqueued.
    pub fn cover(&mut self, guard: &Guard) {
        self.writes.cover(guard);
    }

    /// An empty batch under the same guards.
    #[must_use]
    pub fn another(&self) -> Self {
        Self {
            writes: self.writes.another(),
            expectations: Vec::new(),
            positions: 0,
            wakes: Vec::new(),
            jump_to: None,
            begins: Begins::Next,
        }
    }

    /// Makes this batch a part of a staged step: its positions begin at `base`, of those that were reserved for the step
    /// ([`Store::ahead`](crate::store::Store::ahead)). No reader of the log meets them before the step's last batch.
    pub fn stage_at(&mut self, base: Position) {
        self.begins = Begins::Staged(base);
    }

    /// Makes this batch the last one of a staged step: its positions begin at `base`, and those of all later batches lie
    /// above them. It is not accepted when `base` is past.
    pub fn begin_at(&mut self, base: Position) {
        self.begins = Begins::At(base);
    }

    /// The number of positions that it claims.
    pub fn position_count(&self) -> u32 {
        self.positions
    }

    /// Whether a position was claimed: only then is there something for readers of the log.
    pub fn has_position(&self) -> bool {
        self.positions > 0
    }

    /// Adds something that is done when the batch is published.
    pub fn wake(&mut self, wake: Wake) {
        self.wakes.push(wake);
    }

    /// The number of rows that it writes.
    pub fn row_count(&self) -> usize {
        self.writes.row_count()
    }

    /// The number of bytes that its rows take, keys and values together.
    pub fn byte_count(&self) -> usize {
        self.writes.byte_count()
    }

    /// Refuses a batch that is already larger than the store accepts, so that building a large one stops early.
    pub fn check_size(&self) -> Result<(), NotAccepted> {
        self.writes.check_size()
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

/// The writes of one note: cursors, last-seen, acknowledgements. It takes no position and wakes nobody, and a power cut may
/// take it back.
pub struct Note {
    pub(crate) writes: Writes,
}

impl Note {
    pub(crate) fn new(view: View, guard: &Guard) -> Self {
        Self { writes: Writes::new(view, guard) }
    }

    /// The number of rows that it writes.
    pub fn row_count(&self) -> usize {
        self.writes.row_count()
    }
}

macro_rules! written_over_what_is_accepted {
    ($($name:ident),*) => {$(
        impl Write for $name {
            fn writes(&mut self) -> &mut Writes {
                &mut self.writes
            }
        }

        impl Read for $name {
            fn get_raw(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
                self.writes.get_raw(family, key)
            }

            fn get_many_raw(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
                self.writes.get_many_raw(family, keys)
            }

            fn range_raw(
                &self,
                family: Family,
                low: Vec<u8>,
                high: Vec<u8>,
                direction: Direction,
            ) -> Result<Rows<'_>, Fault> {
                self.writes.range_raw(family, low, high, direction)
            }

            fn first_of_many_raw(
                &self,
                family: Family,
                ranges: &[KeyRange],
            ) -> Result<Vec<Option<KeyValue>>, Fault> {
                self.writes.first_of_many_raw(family, ranges)
            }

            fn upto(&self) -> Position {
                self.writes.upto()
            }
        }
    )*};
}

written_over_what_is_accepted!(Batch, Note);
