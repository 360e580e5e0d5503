//! The engine on disk. No other file of the server names rocksdb, except those below this one.

mod snapshot;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB,
    DBCompressionType, LogLevel, Options, SliceTransform, WriteBatch, WriteBufferManager, WriteOptions,
    checkpoint::Checkpoint,
};

pub(crate) use snapshot::RocksSnapshot;

use snapshot::family_handle;

use crate::store::{
    Fault,
    engine::{Change, Family, STATE_PREFIX_BYTES},
};

/// A database of RocksDB in one directory.
pub struct Rocks {
    db: Arc<DB>,
    cache: Cache,
    memtables: WriteBufferManager,
    /// The number of iterators that were made since it was opened. Making one is dear, so tests count them.
    iterators: Arc<AtomicU64>,
}

impl std::fmt::Debug for Rocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rocks({})", self.db.path().display())
    }
}

/// The memory that the engine holds, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineBytes {
    /// The bytes of blocks, indexes and filters that were read from disk.
    pub cache: usize,
    /// The bytes of rows that are written and not yet in sorted files.
    pub memtables: usize,
}

/// All memtables together have at most this many bytes, because eight families at RocksDB's defaults would take gigabytes.
const MEMTABLES_BYTES_MAX: usize = 32 << 20;
/// The memtable of one family has at most this many bytes.
const MEMTABLE_BYTES_MAX: usize = 12 << 20;
/// The write-ahead log has at most this many bytes, which bounds how long a start after a crash takes. Without a bound idle
/// families would keep it for ever.
const WAL_BYTES_MAX: u64 = 64 << 20;

impl Rocks {
    /// Opens or creates the database; `cache_bytes_max` bounds the cache of blocks read, indexes and filters.
    /// Errors: another process has it open, or the disk.
    pub fn open(path: &Path, cache_bytes_max: usize) -> Result<Self, Fault> {
        let cache = Cache::new_lru_cache(cache_bytes_max);
        // Memtables above the bound are flushed while writers go on, so writes do not stall.
        let memtables = WriteBufferManager::new_write_buffer_manager(MEMTABLES_BYTES_MAX, false);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(WAL_BYTES_MAX);
        options.set_write_buffer_manager(&memtables);
        options.set_max_open_files(512);
        // There is one writer, the flusher, so writes need no locks against each other.
        options.set_allow_concurrent_memtable_write(false);
        options.set_avoid_unnecessary_blocking_io(true);
        options.set_bytes_per_sync(1 << 20);
        // Its own log says little we need, and its statistics would wake an idle server.
        options.set_log_level(LogLevel::Warn);
        options.set_keep_log_file_num(2);
        options.set_max_log_file_size(1 << 20);
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        let families = Family::ALL
            .map(|family| ColumnFamilyDescriptor::new(family.name(), Self::family_options(family, &cache)));
        let db = DB::open_cf_descriptors(&options, path, families)?;
        Ok(Self { db: Arc::new(db), cache, memtables, iterators: Arc::default() })
    }

    fn family_options(family: Family, cache: &Cache) -> Options {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(cache);
        blocks.set_bloom_filter(10.0, false);
        blocks.set_cache_index_and_filter_blocks(true);
        blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
        // Filters are read in parts, because the whole filter of a large file is larger than a shard of the cache and would be
        // read from disk anew at every lookup.
        blocks.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
        blocks.set_partition_filters(true);
        blocks.set_metadata_block_size(8 << 10);
        blocks.set_pin_top_level_index_and_filter(true);
        blocks.set_format_version(5);
        blocks.set_block_size(if family == Family::Events { 16 << 10 } else { 4 << 10 });
        let mut options = Options::default();
        options.set_block_based_table_factory(&blocks);
        options.set_write_buffer_size(MEMTABLE_BYTES_MAX);
        // Memtables grow in blocks of this size: eight families hold little while they are empty.
        options.set_arena_block_size(256 << 10);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_bottommost_compression_type(DBCompressionType::Zstd);
        options.set_level_compaction_dynamic_level_bytes(true);
        match family {
            // Reading a value at a version is a seek that mostly finds nothing, which the filter answers without a read.
            Family::State => {
                options.set_prefix_extractor(SliceTransform::create_fixed_prefix(STATE_PREFIX_BYTES));
                options.set_memtable_prefix_bloom_ratio(0.05);
            }
            // Most of what is asked by key here is not there (relations, receipts), which the memtable's filter answers without
            // a search.
            Family::Index => {
                options.set_memtable_prefix_bloom_ratio(0.02);
                options.set_memtable_whole_key_filtering(true);
            }
            // Rows that come and go leave tombstones, which every scan would step over unless compaction removes them soon.
            Family::Queues | Family::Notes | Family::Log => {
                options.add_compact_on_deletion_collector_factory(4096, 2048, 0.5);
            }
            _ => {}
        }
        options
    }

    pub(crate) fn write<'c>(
        &self,
        changes: impl Iterator<Item = &'c Change> + Clone,
        sync: bool,
    ) -> Result<(), Fault> {
        let mut batch = WriteBatch::default();
        for change in changes {
            match change {
                Change::Row(family, key, Some(value)) => batch.put_cf(self.family(*family)?, key, value),
                Change::Row(family, key, None) => batch.delete_cf(self.family(*family)?, key),
                Change::Range(family, low, high) => batch.delete_range_cf(self.family(*family)?, low, high),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        Ok(self.db.write_opt(batch, &options)?)
    }

    fn family(&self, family: Family) -> Result<&ColumnFamily, Fault> {
        family_handle(&self.db, family)
    }

    pub(crate) fn snapshot(&self) -> RocksSnapshot {
        RocksSnapshot::of(&self.db, &self.iterators)
    }

    /// The number of iterators that were made since the database was opened.
    pub fn iterators_made(&self) -> u64 {
        self.iterators.load(Ordering::Relaxed)
    }

    /// Copies the database as it is now into a directory that must not exist; on one file system by links, at no
    /// cost. Writing goes on meanwhile.
    pub(crate) fn checkpoint(&self, to: &Path) -> Result<(), Fault> {
        Ok(Checkpoint::new(&self.db)?.create_checkpoint(to)?)
    }

    /// The memory that the engine holds now.
    pub fn memory(&self) -> EngineBytes {
        EngineBytes { cache: self.cache.get_usage(), memtables: self.memtables.get_usage() }
    }

    /// About how many rows there are. A row that was overwritten and not compacted yet counts twice.
    pub(crate) fn estimate_rows(&self) -> u64 {
        let of = |family| {
            let family = self.family(family).ok()?;
            self.db.property_int_value_cf(family, rocksdb::properties::ESTIMATE_NUM_KEYS).ok()?
        };
        Family::ALL.into_iter().filter_map(of).sum()
    }

    /// About how many bytes the rows with `low <= key < high` take on disk, by the engine's own index of its files.
    pub fn disk_bytes(&self, family: Family, low: &[u8], high: &[u8]) -> Result<u64, Fault> {
        let ranges = [rocksdb::Range::new(low, high)];
        Ok(self.db.get_approximate_sizes_cf(self.family(family)?, &ranges).iter().sum())
    }

    /// Compacts everything, so that measurements see how much disk the rows take when nothing waits for compaction.
    pub fn compact(&self) -> Result<(), Fault> {
        for family in Family::ALL {
            let family = self.family(family)?;
            self.db.flush_cf(family)?;
            self.db.compact_range_cf(family, None::<&[u8]>, None::<&[u8]>);
        }
        Ok(())
    }
}

impl From<rocksdb::Error> for Fault {
    fn from(error: rocksdb::Error) -> Self {
        Self::Io(error.into_string())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn blocks_that_were_read_take_no_more_than_the_cache_may_and_show_no_overwritten_row() {
        const CACHE_BYTES: usize = 4 << 20;
        let dir = tempfile::tempdir().unwrap();
        let rocks = Rocks::open(dir.path(), CACHE_BYTES).unwrap();
        let key = |number: u32| Bytes::copy_from_slice(&number.to_be_bytes());
        let put = |number, byte| Change::Row(Family::Events, key(number), Some(vec![byte; 1 << 10].into()));
        for first in (0..16_000).step_by(1_000) {
            rocks
                .write((first..first + 1_000).map(|it| put(it, 1)).collect::<Vec<_>>().iter(), false)
                .unwrap();
        }
        rocks.compact().unwrap();
        let read = |number: u32| rocks.snapshot().get(Family::Events, &key(number)).unwrap().unwrap()[0];
        assert!((0..16_000).all(|number| read(number) == 1));
        let held = rocks.memory().cache;
        assert!((CACHE_BYTES / 2..=CACHE_BYTES + CACHE_BYTES / 8).contains(&held), "{held}");
        rocks.write([put(15_999, 2)].iter(), false).unwrap();
        assert_eq!((read(15_999), read(15_998)), (2, 1));
    }
}
