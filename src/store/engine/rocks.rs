//! The engine on disk. No other file of the server names rocksdb.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB,
    DBCompressionType, DBPinnableSlice, IteratorMode, LogLevel, Options, ReadOptions, SliceTransform,
    WriteBatch, WriteBufferManager, WriteOptions, checkpoint::Checkpoint,
};

use crate::store::{
    Fault,
    engine::{Change, Family, Rows, STATE_PREFIX_BYTES},
    range::{Direction, KeyRange, KeyValue, after_prefix},
};

/// A database of RocksDB in one directory.
pub struct Rocks {
    db: Arc<DB>,
    cache: Cache,
    memtables: WriteBufferManager,
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
        Ok(Self { db: Arc::new(db), cache, memtables })
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
        RocksSnapshot::new(self.db.clone(), |db| Moment::of(db.snapshot()))
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

fn family_handle(db: &DB, family: Family) -> Result<&ColumnFamily, Fault> {
    db.cf_handle(family.name()).ok_or(Fault::Corrupt("a column family is missing"))
}

/// A snapshot, with the options of point reads in it: making those anew costs as much as a read from memory.
pub(crate) struct Moment<'a> {
    options: ReadOptions,
    snapshot: rocksdb::Snapshot<'a>,
}

impl<'a> Moment<'a> {
    fn of(snapshot: rocksdb::Snapshot<'a>) -> Self {
        let mut options = ReadOptions::default();
        options.set_snapshot(&snapshot);
        Self { options, snapshot }
    }
}

self_cell::self_cell! {
    /// A snapshot with the database it belongs to.
    pub(crate) struct RocksSnapshot {
        owner: Arc<DB>,
        #[covariant]
        dependent: Moment,
    }
}

fn own(slice: &DBPinnableSlice<'_>) -> Bytes {
    Bytes::copy_from_slice(slice)
}

impl RocksSnapshot {
    pub(crate) fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let db = self.borrow_owner();
        let row = db.get_pinned_cf_opt(family_handle(db, family)?, key, &self.borrow_dependent().options)?;
        Ok(row.map(|slice| own(&slice)))
    }

    pub(crate) fn get_many(&self, family: Family, keys: &[Vec<u8>]) -> Result<Vec<Option<Bytes>>, Fault> {
        let db = self.borrow_owner();
        let options = &self.borrow_dependent().options;
        let rows = db.batched_multi_get_cf_opt(family_handle(db, family)?, keys, keys.is_sorted(), options);
        rows.into_iter().map(|row| Ok(row?.map(|slice| own(&slice)))).collect()
    }

    /// The first row of each of these ranges, by one iterator: making one costs as much as several seeks.
    pub(crate) fn first_of_many(
        &self,
        family: Family,
        ranges: &[KeyRange],
    ) -> Result<Vec<Option<KeyValue>>, Fault> {
        let mut options = ReadOptions::default();
        if family == Family::State {
            if ranges.iter().all(|(low, high)| stays_in_prefix(low, high)) {
                options.set_prefix_same_as_start(true);
            } else {
                options.set_total_order_seek(true);
            }
        }
        let family = family_handle(self.borrow_owner(), family)?;
        let mut rows = self.borrow_dependent().snapshot.raw_iterator_cf_opt(family, options);
        let mut found = Vec::with_capacity(ranges.len());
        for (low, high) in ranges {
            rows.seek(low);
            let row = rows.item().filter(|(key, _)| *key < &**high);
            found.push(row.map(|(key, value)| (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value))));
            if !rows.valid() {
                rows.status()?;
            }
        }
        Ok(found)
    }

    pub(crate) fn range(
        &self,
        family: Family,
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<Rows<'_>, Fault> {
        let mut options = ReadOptions::default();
        if family == Family::State {
            // A scan that leaves its prefix must not ask the filter of prefixes.
            if direction == Direction::Up && stays_in_prefix(&low, &high) {
                options.set_prefix_same_as_start(true);
            } else {
                options.set_total_order_seek(true);
            }
        }
        options.set_iterate_lower_bound(low);
        options.set_iterate_upper_bound(high);
        let mode = match direction {
            Direction::Up => IteratorMode::Start,
            Direction::Down => IteratorMode::End,
        };
        let family = family_handle(self.borrow_owner(), family)?;
        let rows = self.borrow_dependent().snapshot.iterator_cf_opt(family, options, mode);
        Ok(Box::new(rows.map(|row| {
            let (key, value) = row?;
            Ok((Bytes::from(key), Bytes::from(value)))
        })))
    }
}

/// Whether all keys with `low <= key < high` have the prefix of `low` that the filter of the state family is about.
fn stays_in_prefix(low: &[u8], high: &[u8]) -> bool {
    low.get(..STATE_PREFIX_BYTES).is_some_and(|prefix| high <= after_prefix(prefix).as_slice())
}

impl From<rocksdb::Error> for Fault {
    fn from(error: rocksdb::Error) -> Self {
        Self::Io(error.into_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_range_inside_one_prefix_uses_the_filter() {
        let prefix = [7_u8; STATE_PREFIX_BYTES];
        let longer = [&prefix[..], &[3]].concat();
        assert!(stays_in_prefix(&longer, &after_prefix(&prefix)));
        assert!(stays_in_prefix(&prefix, &longer));
        assert!(!stays_in_prefix(&prefix[..12], &longer));
        assert!(!stays_in_prefix(&longer, &[&after_prefix(&prefix)[..], &[0]].concat()));
    }
}
