//! The store's own tables, and the macro with which `src/schema.rs` declares those of Matrix.
//!
//! Ids are unique over both pages and are for ever: a table that goes leaves its id unused.

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{Domain, Family, Fault, LogEntry, timer_row::TimerRow},
};

/// Says whether the bytes of a row are what they should be.
pub type CheckRow = fn(&[u8], Bytes) -> Result<(), Fault>;

/// The facts of a table for a check or a metric, which do not know its types.
#[derive(Debug, Clone, Copy)]
pub struct TableInfo {
    /// The first byte of each key.
    pub id: u8,
    /// The column family of its rows.
    pub family: Family,
    /// The name that errors and metrics call it by.
    pub name: &'static str,
    /// The domain whose lock guards it.
    pub domain: Domain,
    /// The module that writes its rows; no other does.
    pub owner: &'static str,
    /// Checks whether a row decodes.
    pub check_row: CheckRow,
}

/// Declares tables, a line each: `id NAME(key => value) in Family, Domain of "owner" [, local];`.
macro_rules! tables {
    ($($(#[$doc:meta])* $id:literal $name:ident($key:ty => $value:ty) in $family:ident, $domain:ident of $owner:literal $(, $local:ident)?;)*) => {
        $(
            $(#[$doc])*
            pub static $name: $crate::store::Table<$key, $value> = $crate::store::Table {
                id: $id,
                family: $crate::store::Family::$family,
                name: stringify!($name),
                domain: $crate::store::Domain::$domain,
                owner: $owner,
                shipped: $crate::store::tables::tables!(@shipped $($local)?),
                types: std::marker::PhantomData,
            };
        )*

        /// Each table of this page, for checks and metrics.
        pub static TABLES: &[$crate::store::tables::TableInfo] = &[$($crate::store::tables::TableInfo {
            id: $id,
            family: $crate::store::Family::$family,
            name: stringify!($name),
            domain: $crate::store::Domain::$domain,
            owner: $owner,
            check_row: |key, value| $name.check_row(key, value),
        }),*];
    };
    (@shipped) => { true };
    (@shipped local) => { false };
}
pub(crate) use tables;

tables! {
    /// The entry of the log at each position.
    1 LOG(Position => LogEntry) in Log, Store of "store";
    /// The store's own facts by name: layout, incarnation, head position and batch number.
    2 HEAD(String => u64) in Log, Store of "store::head", local;
    /// Each life of the store that a restore began, and the position at which the history it continues ended.
    3 INCARNATION(u16 => Position) in Log, Store of "store::head", local;
    /// The point up to which a migration to this layout has come.
    4 MIGRATION(u64 => Bytes) in Log, Store of "store::migrate", local;
    /// How far a reader of the log has come, by its name.
    5 CURSOR(String => Position) in Notes, Store of "store::cursor", local;
    /// Log entries at or before this position, except those of events, may be gone.
    6 LOG_TRIMMED(() => Position) in Log, Store of "store::tail";
    /// The newest position when an hour was first seen; the key counts hours since the epoch.
    7 LOG_TIME(u64 => Position) in Log, Store of "store::tail", local;
    /// A timer: when it is due (ms since the epoch), its kind, what it is about; and what the worker needs.
    130 TIMER((u64, u8, Vec<u8>) => TimerRow) in Queues, Store of "store::timer";
}
