//! Where the bytes are kept: RocksDB, or memory for tests and the simulation. One contract, one conformance suite
//! (`store/conformance.rs`) for both.

mod memory;
mod rocks;

use bytes::Bytes;

pub use memory::Memory;
pub use rocks::{EngineBytes, Rocks};

use crate::store::{Fault, range::Direction};

/// Column families, by access pattern: at most eight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// Events in room order: large, written once, read sequentially.
    Events,
    /// Room state: small rows, many versions. Keys of at least [`STATE_PREFIX_BYTES`] bytes have a bloom filter on
    /// their first ones: table, room and state key.
    State,
    /// From ids to numbers and the like: point reads.
    Index,
    /// Rows that are written, read once in order, and deleted: inboxes, stages, timers.
    Queues,
    /// Users, devices, tokens, profiles, account data.
    Accounts,
    /// Keys of end-to-end encryption.
    Crypto,
    /// Rows that take no position: cursors, last-seen, caches.
    Notes,
    /// The log, and the store's own head.
    Log,
}

/// Table (1 byte), room (8), state key (4): what a seek in a versioned state table knows.
pub const STATE_PREFIX_BYTES: usize = 13;

impl Family {
    /// Each of the families once.
    pub const ALL: [Self; 8] = [
        Self::Events,
        Self::State,
        Self::Index,
        Self::Queues,
        Self::Accounts,
        Self::Crypto,
        Self::Notes,
        Self::Log,
    ];

    /// The name that it has on disk and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::State => "state",
            Self::Index => "index",
            Self::Queues => "queues",
            Self::Accounts => "accounts",
            Self::Crypto => "crypto",
            Self::Notes => "notes",
            Self::Log => "log",
        }
    }
}

/// Holds one value for each family.
#[derive(Debug, Clone, Default)]
pub(crate) struct PerFamily<T>([T; 8]);

#[expect(clippy::indexing_slicing, reason = "a family is below eight")]
impl<T> PerFamily<T> {
    pub(crate) fn of(&self, family: Family) -> &T {
        &self.0[family as usize]
    }

    pub(crate) fn of_mut(&mut self, family: Family) -> &mut T {
        &mut self.0[family as usize]
    }

    pub(crate) fn into_iter(self) -> impl Iterator<Item = (Family, T)> {
        Family::ALL.into_iter().zip(self.0)
    }
}

/// One change of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// The row becomes this; `None` deletes it.
    Row(Family, Bytes, Option<Bytes>),
    /// All rows with `low <= key < high` are deleted.
    Range(Family, Bytes, Bytes),
}

/// Rows with their keys, read one after the other.
pub(crate) type Rows<'a> = Box<dyn Iterator<Item = Result<(Bytes, Bytes), Fault>> + 'a>;

/// The engine that keeps the bytes.
#[derive(Debug)]
pub enum Engine {
    /// RocksDB, which keeps them on disk.
    Rocks(Rocks),
    /// A map, which keeps them in memory.
    Memory(Memory),
}

impl Engine {
    /// Writes all changes or none. With `sync` they, and all before them, survive a power cut once this returns.
    pub(crate) fn write<'c>(
        &self,
        changes: impl Iterator<Item = &'c Change> + Clone,
        sync: bool,
    ) -> Result<(), Fault> {
        match self {
            Self::Rocks(rocks) => rocks.write(changes, sync),
            Self::Memory(memory) => memory.write(changes, sync),
        }
    }

    /// A snapshot of what is written now, which later writes do not change.
    pub(crate) fn snapshot(&self) -> EngineSnapshot {
        match self {
            Self::Rocks(rocks) => EngineSnapshot::Rocks(rocks.snapshot()),
            Self::Memory(memory) => EngineSnapshot::Memory(memory.snapshot()),
        }
    }
}

impl Engine {
    /// About how many rows there are: for a progress bar.
    pub(crate) fn estimate_rows(&self) -> u64 {
        match self {
            Self::Rocks(rocks) => rocks.estimate_rows(),
            Self::Memory(memory) => memory.count_rows(),
        }
    }
}

/// A snapshot of an engine: its rows at one moment.
pub(crate) enum EngineSnapshot {
    Rocks(rocks::RocksSnapshot),
    Memory(memory::MemorySnapshot),
}

impl EngineSnapshot {
    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        match self {
            Self::Rocks(snapshot) => snapshot.get(family, key),
            Self::Memory(snapshot) => Ok(snapshot.get(family, key)),
        }
    }

    pub(crate) fn get_many(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        match self {
            Self::Rocks(snapshot) => snapshot.get_many(family, keys),
            Self::Memory(_) => keys.iter().map(|key| self.get(family, key)).collect(),
        }
    }

    /// Rows with `low <= key < high`.
    pub(crate) fn range(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        if low >= high {
            return Ok(Box::new(std::iter::empty()));
        }
        match self {
            Self::Rocks(snapshot) => snapshot.range(family, low, high, direction),
            Self::Memory(snapshot) => Ok(snapshot.range(family, &low, &high, direction)),
        }
    }
}
