//! Where the bytes are kept: RocksDB, or memory for tests and the simulation. One contract, one conformance suite
//! (`tests` below). The only file that names rocksdb.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::Mutex;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBPinnableSlice,
    IteratorMode, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use crate::store::{Fault, table::Direction};

/// Column families, by access pattern: at most eight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// Events in room order: large, written once, read sequentially.
    Events,
    /// Room state: small rows, many versions.
    State,
    /// From ids to numbers and the like: point reads.
    Index,
    /// Written, read once in order, deleted: inboxes, stages, timers.
    Queues,
    /// Users, devices, tokens, profiles, account data.
    Accounts,
    /// Keys of end-to-end encryption.
    Crypto,
    /// What takes no position: cursors, last-seen, caches.
    Notes,
    /// The log, and the store's own head.
    Log,
}

impl Family {
    /// All of them.
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

    fn name(self) -> &'static str {
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

/// One change of one row: `None` deletes it.
pub(crate) type Change = (Family, Bytes, Option<Bytes>);

/// Rows with their keys.
pub(crate) type Rows<'a> = Box<dyn Iterator<Item = Result<(Bytes, Bytes), Fault>> + 'a>;

/// Where the bytes are kept.
#[derive(Debug)]
pub enum Engine {
    /// On disk.
    Rocks(Rocks),
    /// In memory.
    Memory(Memory),
}

impl Engine {
    /// Writes all changes or none. With `sync` they survive a power cut once this returns.
    pub(crate) fn write(&self, changes: &[Change], sync: bool) -> Result<(), Fault> {
        match self {
            Self::Rocks(rocks) => rocks.write(changes, sync),
            Self::Memory(memory) => {
                memory.write(changes, sync);
                Ok(())
            }
        }
    }

    /// What is written now, unchanged by later writes.
    pub(crate) fn snapshot(&self) -> EngineSnapshot {
        match self {
            Self::Rocks(rocks) => EngineSnapshot::Rocks(rocks.snapshot()),
            Self::Memory(memory) => EngineSnapshot::Memory(memory.state.lock().rows.clone()),
        }
    }
}

/// The rows of one moment.
pub(crate) enum EngineSnapshot {
    Rocks(RocksSnapshot),
    Memory(MemoryRows),
}

impl EngineSnapshot {
    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        match self {
            Self::Rocks(snapshot) => snapshot.get(family, key),
            Self::Memory(rows) => Ok(rows.get(&(family, Bytes::copy_from_slice(key))).cloned()),
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
            Self::Memory(rows) => {
                let range = rows.range((family, Bytes::from(low))..(family, Bytes::from(high)));
                let rows = range.map(|((_, key), value)| Ok((key.clone(), value.clone())));
                Ok(match direction {
                    Direction::Up => Box::new(rows),
                    Direction::Down => Box::new(rows.rev()),
                })
            }
        }
    }
}

/// RocksDB under one directory.
pub struct Rocks {
    db: Arc<DB>,
}

impl std::fmt::Debug for Rocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rocks({})", self.db.path().display())
    }
}

/// All memtables together: eight families at RocksDB's defaults would take gigabytes.
const MEMTABLES_BYTES_MAX: usize = 32 << 20;

impl Rocks {
    /// Opens or creates the database; `cache_bytes_max` bounds the cache of blocks read.
    pub fn open(path: &Path, cache_bytes_max: usize) -> Result<Self, Fault> {
        let cache = Cache::new_lru_cache(cache_bytes_max);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(64 << 20);
        options.set_max_open_files(512);
        options.set_keep_log_file_num(2);
        options.set_write_buffer_manager(&WriteBufferManager::new_write_buffer_manager(
            MEMTABLES_BYTES_MAX,
            false,
        ));
        let families = Family::ALL
            .map(|family| ColumnFamilyDescriptor::new(family.name(), Self::family_options(family, &cache)));
        let db = DB::open_cf_descriptors(&options, path, families)?;
        Ok(Self { db: Arc::new(db) })
    }

    fn family_options(family: Family, cache: &Cache) -> Options {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(cache);
        blocks.set_bloom_filter(10.0, false);
        blocks.set_cache_index_and_filter_blocks(true);
        blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
        blocks.set_format_version(5);
        blocks.set_block_size(if family == Family::Events { 16 << 10 } else { 4 << 10 });
        let mut options = Options::default();
        options.set_block_based_table_factory(&blocks);
        options.set_write_buffer_size(8 << 20);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_bottommost_compression_type(DBCompressionType::Zstd);
        options.set_level_compaction_dynamic_level_bytes(true);
        options
    }

    fn write(&self, changes: &[Change], sync: bool) -> Result<(), Fault> {
        let mut batch = WriteBatch::default();
        for (family, key, value) in changes {
            let family = family_handle(&self.db, *family)?;
            match value {
                Some(value) => batch.put_cf(family, key, value),
                None => batch.delete_cf(family, key),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        Ok(self.db.write_opt(batch, &options)?)
    }

    fn snapshot(&self) -> RocksSnapshot {
        RocksSnapshot::new(self.db.clone(), |db| db.snapshot())
    }

    /// The database, for backups and checks.
    pub(crate) fn database(&self) -> &DB {
        &self.db
    }
}

fn family_handle(db: &DB, family: Family) -> Result<&ColumnFamily, Fault> {
    db.cf_handle(family.name()).ok_or(Fault::Corrupt("a column family is missing"))
}

type BorrowedSnapshot<'a> = rocksdb::Snapshot<'a>;

self_cell::self_cell! {
    /// A snapshot with the database it belongs to.
    pub(crate) struct RocksSnapshot {
        owner: Arc<DB>,
        #[covariant]
        dependent: BorrowedSnapshot,
    }
}

fn own(slice: &DBPinnableSlice<'_>) -> Bytes {
    Bytes::copy_from_slice(slice)
}

impl RocksSnapshot {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let family = family_handle(self.borrow_owner(), family)?;
        Ok(self.borrow_dependent().get_pinned_cf(family, key)?.map(|slice| own(&slice)))
    }

    fn get_many(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        let family = family_handle(self.borrow_owner(), family)?;
        let rows = self.borrow_dependent().multi_get_cf(keys.iter().map(|key| (family, key)));
        rows.into_iter().map(|row| Ok(row?.map(Bytes::from))).collect()
    }

    fn range(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        let family = family_handle(self.borrow_owner(), family)?;
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(low);
        options.set_iterate_upper_bound(high);
        let mode = match direction {
            Direction::Up => IteratorMode::Start,
            Direction::Down => IteratorMode::End,
        };
        let rows = self.borrow_dependent().iterator_cf_opt(family, options, mode);
        Ok(Box::new(rows.map(|row| {
            let (key, value) = row?;
            Ok((Bytes::from(key), Bytes::from(value)))
        })))
    }
}

type MemoryRows = OrdMap<(Family, Bytes), Bytes>;

/// An engine in memory that models what a crash loses: any suffix of what was not synced.
#[derive(Debug, Default)]
pub struct Memory {
    state: Mutex<MemoryState>,
    /// How long a synced write takes: tests of group commit.
    sync_takes: Duration,
}

#[derive(Debug, Default)]
struct MemoryState {
    rows: MemoryRows,
    /// What survives any crash.
    synced: MemoryRows,
    /// Writes since the last sync, oldest first.
    unsynced: Vec<Vec<Change>>,
}

fn apply(rows: &mut MemoryRows, changes: &[Change]) {
    for (family, key, value) in changes {
        match value {
            Some(value) => rows.insert((*family, key.clone()), value.clone()),
            None => rows.remove(&(*family, key.clone())),
        };
    }
}

impl Memory {
    /// An empty engine whose synced writes take this long.
    pub fn with_sync_delay(sync_takes: Duration) -> Self {
        Self { state: Mutex::default(), sync_takes }
    }

    #[expect(clippy::disallowed_methods, reason = "stands in for a disk that takes its time")]
    fn write(&self, changes: &[Change], sync: bool) {
        if sync && !self.sync_takes.is_zero() {
            std::thread::sleep(self.sync_takes);
        }
        let mut state = self.state.lock();
        apply(&mut state.rows, changes);
        if sync {
            state.unsynced.clear();
            state.synced = state.rows.clone();
        } else {
            state.unsynced.push(changes.to_vec());
        }
    }

    /// How many writes a crash could lose.
    pub fn unsynced_writes(&self) -> usize {
        self.state.lock().unsynced.len()
    }

    /// What a crash leaves: everything synced, and the first `kept` of the writes since then.
    #[must_use]
    pub fn after_crash(&self, kept: usize) -> Self {
        let state = self.state.lock();
        let mut rows = state.synced.clone();
        for changes in state.unsynced.iter().take(kept) {
            apply(&mut rows, changes);
        }
        let state = MemoryState { synced: rows.clone(), rows, unsynced: Vec::new() };
        Self { state: Mutex::new(state), sync_takes: self.sync_takes }
    }
}

impl From<rocksdb::Error> for Fault {
    fn from(error: rocksdb::Error) -> Self {
        Self::Io(error.into_string())
    }
}
