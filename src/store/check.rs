//! `db check`: reads every row and says what is wrong.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    ids::{Order, Position, RoomNum},
    store::{
        Direction, Family, Fault, Read, Snapshot,
        backup::Progress,
        engine::EngineSnapshot,
        key::{Decoder, Key},
        log::LogEntry,
        schema,
        table::after_prefix,
    },
};

/// Findings beyond this many are counted and not kept.
const FINDINGS_MAX: usize = 100;

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows read, by table.
    pub rows: Vec<(&'static str, u64)>,
    /// What is wrong, in sentences: the first hundred.
    pub findings: Vec<String>,
    /// How much is wrong.
    pub faults: u64,
}

impl Report {
    fn add(&mut self, finding: impl FnOnce() -> String) {
        self.faults += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding());
        }
    }
}

/// Reads every row of one moment, which must decode, and compares what can be compared cheaply: the head with the newest
/// log entry, log entries with their events. Errors: only what stops it from reading on.
pub fn check(snapshot: &Snapshot, progress: &mut dyn FnMut(Progress)) -> Result<Report, Fault> {
    let mut report = Report::default();
    let mut done = 0;
    for family in Family::ALL {
        check_family(&snapshot.engine, family, &mut report, &mut done, progress)?;
    }
    check_log(snapshot, &mut report)?;
    progress(Progress { doing: "done", done, of: done });
    Ok(report)
}

fn check_family(
    engine: &EngineSnapshot,
    family: Family,
    report: &mut Report,
    done: &mut u64,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Fault> {
    let mut rows_of: Vec<u64> = vec![0; schema::ROWS.len()];
    for row in engine.range(family, vec![0], vec![0xff, 0xff], Direction::Up)? {
        let (key, value) = row?;
        *done += 1;
        if done.is_multiple_of(10_000) {
            progress(Progress { doing: "reading rows", done: *done, of: 0 });
        }
        match check_row(family, &key, value) {
            Ok(index) => rows_of.iter_mut().skip(index).take(1).for_each(|rows| *rows += 1),
            Err(why) => report.add(|| why),
        }
    }
    let counted = schema::ROWS.iter().zip(rows_of).filter(|((_, of, ..), _)| *of == family);
    report.rows.extend(counted.map(|((_, _, name, _), rows)| (*name, rows)));
    Ok(())
}

/// Which table a row is of, if it is what it should be.
fn check_row(family: Family, key: &Bytes, value: Bytes) -> Result<usize, String> {
    let id = key.first().copied().unwrap_or_default();
    let table = schema::ROWS.iter().enumerate().find(|(_, (of_id, of, ..))| (*of_id, *of) == (id, family));
    let Some((index, (_, _, _, decode))) = table else {
        return Err(format!("family {} has a row of no table: id {id}", family.name()));
    };
    decode(key, value).map(|()| index).map_err(|fault| format!("{fault}, in the row {}", hex(key)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(64).map(|byte| format!("{byte:02x}")).collect()
}

fn check_log(snapshot: &Snapshot, report: &mut Report) -> Result<(), Fault> {
    let mut newest = Position::ZERO;
    let mut oldest_of = BTreeMap::new();
    for row in schema::LOG.prefix::<()>(snapshot, (), Direction::Up)? {
        // What does not decode was found before.
        let Ok((position, entry)) = row else { continue };
        newest = position;
        let LogEntry::Event { room, event } = entry else { continue };
        if schema::PLACE.get(snapshot, (room, event)).ok().flatten().is_some() {
            continue;
        }
        // Nor is it there when the room was deleted, or purged up to it.
        let oldest = *oldest_of.entry(room).or_insert_with(|| oldest_event(snapshot, room));
        if oldest.is_some_and(|oldest| oldest < position) {
            report
                .add(|| format!("the log has event {event} of room {room} at {position}, which is nowhere"));
        }
    }
    if newest > snapshot.upto() {
        report.add(|| format!("the log goes to {newest}, but the head says {}", snapshot.upto()));
    }
    Ok(())
}

/// Where the first event that a room still has stands.
fn oldest_event(snapshot: &Snapshot, room: RoomNum) -> Option<Position> {
    let low = schema::TIMELINE.key_bytes::<(RoomNum,)>((room,)).bytes;
    let high = after_prefix(&low);
    let (key, _) =
        snapshot.engine.range(schema::TIMELINE.family, low, high, Direction::Up).ok()?.next()?.ok()?;
    let (_, order) = <(RoomNum, Order)>::decode_key(&mut Decoder(key.get(1..)?)).ok()?;
    Some(order.anchor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{EventNum, RoomNum},
        store::{
            Durability, Engine, Store,
            engine::{Change, Memory},
        },
    };

    #[test]
    fn rows_that_do_not_decode_rows_of_no_table_and_lost_events_are_found() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch();
        batch.position(&LogEntry::Server);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        let report = check(&store.snapshot(), &mut |_| ()).unwrap();
        assert_eq!(report.faults, 0);
        assert!(report.rows.contains(&("LOG", 1)));

        let mut batch = store.batch();
        batch.position(&LogEntry::Event { room: RoomNum(1), event: EventNum(2) });
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        let first_event = schema::TIMELINE.key_bytes::<(RoomNum, Order)>((RoomNum(1), Order::MIN));
        let rows = [
            Change::Row(Family::Log, Bytes::from_static(&[1, 0, 0]), Some(Bytes::new())),
            Change::Row(Family::Index, Bytes::from_static(&[249, 0]), Some(Bytes::new())),
            Change::Row(Family::Events, first_event.bytes.into(), Some(Bytes::new())),
        ];
        store.engine().write(rows.iter(), false).unwrap();
        drop(store.enqueue(store.batch()).unwrap());
        store.flush().unwrap();
        let report = check(&store.snapshot(), &mut |_| ()).unwrap();
        assert_eq!(report.faults, 4, "{:?}", report.findings);
    }
}
