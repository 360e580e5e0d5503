//! Every table on one page: key, value, meaning, owner, domain, whether replicas get it.
//!
//! Ids are for ever: a table that goes leaves its id unused. Each value begins with the version of its layout.

pub mod state;

use std::marker::PhantomData;

use crate::{
    ids::Position,
    store::{
        engine::Family,
        log::LogEntry,
        table::{Domain, Table},
    },
};

macro_rules! tables {
    ($($(#[$doc:meta])* $id:literal $name:ident($key:ty => $value:ty) in $family:ident, $domain:ident of $owner:literal $(, $local:ident)?;)*) => {
        $(
            $(#[$doc])*
            pub static $name: Table<$key, $value> = Table {
                id: $id,
                family: Family::$family,
                name: stringify!($name),
                domain: Domain::$domain,
                owner: $owner,
                shipped: tables!(@shipped $($local)?),
                types: PhantomData,
            };
        )*

        /// (id, name, family, owner) of each table, for checks and metrics.
        pub static ALL: &[(u8, &str, Family, &str)] = &[$(($id, stringify!($name), Family::$family, $owner)),*];
    };
    (@shipped) => { true };
    (@shipped local) => { false };
}

// id NAME(key => value) in Family, Domain of "owner" [, local];
tables! {
    /// What happened at a position.
    1 LOG(Position => LogEntry) in Log, Server of "store::batch";
    /// The store's own facts by name: layout, incarnation, head position and batch number.
    2 HEAD(String => u64) in Log, Server of "store", local;

    // --- rooms: 10-29 ---

    // --- room state: 30-49 ---

    // --- accounts: 50-79 ---

    // --- encryption: 80-99 ---

    // --- push: 100-109 ---

    // --- sync and notes: 110-129 ---

    // --- delivery and timers: 130-149 ---
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_ids_are_unique() {
        let mut ids: Vec<_> = ALL.iter().map(|(id, ..)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), ALL.len());
    }
}
