//! Tests of the walk itself, over rows of the store's own tables.

use std::{cell::RefCell, rc::Rc};

use super::*;
use crate::{
    ids::{EventNum, RoomNum},
    store::{
        Durability, Engine, Guard, LogEntry, Store, cursor,
        engine::{Change, Memory},
    },
};

fn commit(store: &Store, entry: &LogEntry) {
    let mut batch = store.batch(&Guard::alone());
    batch.position(entry);
    drop(store.enqueue(batch).unwrap());
    store.flush().unwrap();
}

/// Writes a row past the store, which checks nothing of it, and publishes it.
fn damage(store: &Store, rows: &[Change]) {
    store.engine().write(rows.iter(), false).unwrap();
    commit(store, &LogEntry::Server);
}

fn own_tables() -> Vec<&'static TableInfo> {
    tables::TABLES.iter().collect()
}

fn check_own(store: &Store) -> Report {
    check(store, &own_tables(), &checks, &mut |_| ()).unwrap()
}

#[test]
fn rows_that_do_not_decode_rows_of_no_table_and_lost_events_are_found() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    commit(&store, &LogEntry::Server);
    let report = check_own(&store);
    assert_eq!(report.findings, [""; 0]);
    assert!(report.rows.contains(&("LOG", 1)));
    commit(&store, &LogEntry::Event { room: RoomNum(1), event: EventNum(2) });
    let cursor = tables::CURSOR.key_bytes::<String>("reader");
    let rows = [
        Change::Row(Family::Log, Bytes::from_static(&[1, 0, 0]), Some(Bytes::new())),
        Change::Row(Family::Index, Bytes::from_static(&[249, 0]), Some(Bytes::new())),
        Change::Row(Family::Notes, cursor.bytes.into(), Some(Bytes::new())),
    ];
    damage(&store, &rows);
    assert_eq!(check_own(&store).faults, 3, "{:?}", check_own(&store).findings);
}

#[test]
fn a_hundred_findings_are_told_and_all_are_counted() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let rows: Vec<_> = (0..150_u8)
        .map(|row| Change::Row(Family::Index, Bytes::from(vec![249, row]), Some(Bytes::new())))
        .collect();
    damage(&store, &rows);
    let report = check_own(&store);
    assert_eq!((report.findings.len(), report.faults), (FINDINGS_MAX, 150));
}

#[test]
fn the_walk_goes_on_over_newer_snapshots_and_says_how_far_it_is() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    for _ in 0..6 {
        let mut batch = store.batch(&Guard::alone());
        for _ in 0..4_000 {
            batch.position(&LogEntry::Server);
        }
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
    }
    let mut told = Vec::new();
    // Somebody writes at every pause, and each row that is older is still read once.
    let report = check(&store, &own_tables(), &checks, &mut |progress| {
        commit(&store, &LogEntry::Server);
        told.push(progress);
    });
    let report = report.unwrap();
    assert_eq!(report.findings, [""; 0]);
    let log = report.rows.iter().find(|(name, _)| *name == "LOG").unwrap().1;
    assert!((24_000..24_010).contains(&log), "{log} rows");
    assert!(told.len() >= 3 && told.iter().all(|told| told.done <= told.of), "{told:?}");
}

#[test]
fn a_row_that_takes_longer_than_a_snapshot_is_held_stops_nothing() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let mut batch = store.batch(&Guard::alone());
    for reader in ["a", "slow", "slow once", "z"] {
        cursor::advance(&mut batch, reader, Position::ZERO);
    }
    drop(store.enqueue(batch).unwrap());
    store.flush().unwrap();
    let judged = Rc::new(RefCell::new(Vec::new()));
    let (writer, seen) = (store.clone(), judged.clone());
    let owners = move || {
        let (writer, seen) = (writer.clone(), seen.clone());
        let judge = move |read: &Snapshot, reader: &String, _: &Position, doubts: &mut Doubts| {
            let tries = seen.borrow().iter().filter(|seen| *seen == reader).count();
            seen.borrow_mut().push(reader.clone());
            if reader == "slow" || (reader == "slow once" && tries == 0) {
                // Somebody writes meanwhile, and more than a minute goes by.
                let now_ms = 1 + seen.borrow().len() as u64 * 100_000;
                writer.tell_time(now_ms);
                commit(&writer, &LogEntry::Server);
                writer.tell_time(now_ms + 61_000);
            }
            doubts.position(read, tables::CURSOR.get(read, reader)?.unwrap());
            doubts.unless(reader != "z", "it is the last");
            Ok(())
        };
        vec![RowCheck::of(&tables::CURSOR, judge)]
    };
    let report = check(&store, &own_tables(), &owners, &mut |_| ()).unwrap();
    assert_eq!((report.unjudged, report.faults), (1, 1), "{report:?}");
    assert_eq!(*judged.borrow(), ["a", "slow", "slow", "slow once", "slow once", "z"]);
}
