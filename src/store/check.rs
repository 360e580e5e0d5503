//! `db check`: reads every row, and asks the owner of its table whether what it refers to is there.
//!
//! One walk goes over all rows in the order of their keys and holds none of them. Each row is judged with what it refers to
//! in one and the same snapshot; between rows the walk takes a newer one, so that it can go on for hours beside a running
//! server. A row that takes longer to judge than a snapshot may be held is judged once more, and then counted as not judged.
//! The owner of a table says what must hold of its rows ([`RowCheck`]); the store speaks for its own tables.

mod own;

use std::{fmt::Debug, sync::Arc};

use bytes::Bytes;

use crate::{
    ids::Position,
    store::{
        Direction, Family, Fault, LogEntry, Read, Snapshot, Store, Table,
        backup::Progress,
        key::{Key, Value},
        tables::{self, TableInfo},
        tail,
    },
};

pub use own::checks;

/// This many findings are kept; those beyond are only counted.
const FINDINGS_MAX: usize = 100;
/// At most this many rows are judged in one snapshot.
const ROWS_A_SNAPSHOT: usize = 10_000;
/// The name of a row in a finding has at most this many characters.
const NAME_CHARS_MAX: usize = 160;

/// The outcome of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The number of rows that were read, by table.
    pub rows: Vec<(&'static str, u64)>,
    /// The first hundred faults, a line each.
    pub findings: Vec<String>,
    /// The number of all faults, also of those that are not kept.
    pub faults: u64,
    /// Rows that could not be judged while the server went on beside: a copy of the store can be asked for them.
    pub unjudged: u64,
}

impl Report {
    fn add(&mut self, finding: impl FnOnce() -> String) {
        self.faults += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding());
        }
    }
}

/// The faults of one row.
#[derive(Debug, Default)]
pub struct Doubts(Vec<String>);

impl Doubts {
    /// Says what is wrong unless this holds.
    pub fn unless(&mut self, holds: bool, wrong: impl Into<String>) {
        if !holds {
            self.0.push(wrong.into());
        }
    }

    /// A position that is in a row must have been given out.
    pub fn position(&mut self, snapshot: &Snapshot, position: Position) {
        self.unless(position <= snapshot.upto(), format!("its position {position} was never given out"));
    }

    /// The log says at a position that this happened, unless it was trimmed up to there.
    pub fn logged(&mut self, snapshot: &Snapshot, position: Position, entry: LogEntry) -> Result<(), Fault> {
        self.position(snapshot, position);
        let found = tables::LOG.get(snapshot, position)?;
        let is_trimmed = found.is_none() && position <= tail::trimmed(snapshot)?;
        self.unless(
            found == Some(entry) || is_trimmed,
            format!("the log has no matching entry at position {position}"),
        );
        Ok(())
    }
}

type JudgeRow = Box<dyn FnMut(&Snapshot, &[u8], Bytes, &mut Doubts) -> Result<String, Fault>>;

/// A check of one table by its owner, beyond that its rows decode.
pub struct RowCheck {
    table: u8,
    judge: JudgeRow,
}

impl RowCheck {
    /// Judges each row of a table, with what it refers to in the same snapshot. Memory must not grow with the rows.
    pub fn of<K: Key + Debug, V: Value>(
        table: &'static Table<K, V>,
        mut judge: impl FnMut(&Snapshot, &K, &V, &mut Doubts) -> Result<(), Fault> + 'static,
    ) -> Self {
        let judge = move |snapshot: &Snapshot, key: &[u8], value: Bytes, doubts: &mut Doubts| {
            let (key, value) = table.decode(key, value)?;
            judge(snapshot, &key, &value, doubts)?;
            // Names are made for those rows only of which something is said.
            Ok(if doubts.0.is_empty() { String::new() } else { format!("{key:?}") })
        };
        Self { table: table.id, judge: Box::new(judge) }
    }
}

/// Reads every row; each must decode, belong to a table, and be what its owner's check demands. Errors: only what stops it
/// from reading on.
pub fn check(
    store: &Store,
    tables: &[&'static TableInfo],
    owners: &dyn Fn() -> Vec<RowCheck>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, Fault> {
    let mut walk = Walk {
        report: Report::default(),
        tables,
        rows: vec![0; tables.len()],
        done: 0,
        of: store.engine().estimate_rows(),
        progress,
    };
    for family in Family::ALL {
        walk.family(store, owners, family)?;
    }
    let Walk { mut report, rows, done, .. } = walk;
    report.rows = tables.iter().zip(rows).map(|(table, rows)| (table.name, rows)).collect();
    progress(Progress { doing: "done", done, of: done });
    Ok(report)
}

struct Walk<'a> {
    report: Report,
    tables: &'a [&'static TableInfo],
    /// How many rows were read, by the place of their table in `tables`.
    rows: Vec<u64>,
    done: u64,
    /// About the number of rows that there are, for the progress.
    of: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl Walk<'_> {
    fn family(
        &mut self,
        store: &Store,
        owners: &dyn Fn() -> Vec<RowCheck>,
        family: Family,
    ) -> Result<(), Fault> {
        let mut from = vec![0];
        loop {
            let snapshot: Arc<Snapshot> = store.snapshot();
            let mut checks = owners();
            let rows = snapshot.range_raw(family, from.clone(), vec![0xff, 0xff], Direction::Up)?;
            let mut last = None;
            for row in rows.take(ROWS_A_SNAPSHOT) {
                let (key, value) = match row {
                    // The rows before took long, so the walk goes on with a newer snapshot.
                    Err(Fault::Outdated) if last.is_some() => break,
                    row => row?,
                };
                match self.row(&snapshot, &mut checks, family, &key, value) {
                    // The walk goes on with a newer snapshot, of which this row has the whole time.
                    Err(Fault::Outdated) if last.is_some() => break,
                    Err(Fault::Outdated) => {
                        tracing::debug!(
                            row = hex(&key),
                            "a row takes too long to judge beside a running server"
                        );
                        self.report.unjudged += 1;
                    }
                    judged => judged?,
                }
                last = Some(key);
                self.done += 1;
            }
            let Some(last) = last else { return Ok(()) };
            from = [&last[..], &[0]].concat();
            let of = self.of.max(self.done);
            (self.progress)(Progress { doing: "reading rows", done: self.done, of });
        }
    }

    fn row(
        &mut self,
        snapshot: &Snapshot,
        checks: &mut [RowCheck],
        family: Family,
        key: &Bytes,
        value: Bytes,
    ) -> Result<(), Fault> {
        let id = key.first().copied().unwrap_or_default();
        let table =
            self.tables.iter().enumerate().find(|(_, table)| (table.id, table.family) == (id, family));
        let Some((index, TableInfo { name, check_row, .. })) = table else {
            self.report.add(|| format!("family {} has a row of no table: {}", family.name(), hex(key)));
            return Ok(());
        };
        if let Err(fault) = check_row(key, value.clone()) {
            self.report.add(|| format!("{fault}, in the row {}", hex(key)));
            self.count(index);
            return Ok(());
        }
        let mut doubts = Doubts::default();
        let mut wrong = Vec::new();
        for check in checks.iter_mut().filter(|check| check.table == id) {
            let named = match (check.judge)(snapshot, key, value.clone(), &mut doubts) {
                Ok(named) => named,
                // A row that this one refers to does not decode. The walk finds and names that row by itself.
                Err(Fault::CorruptRow { .. }) => continue,
                Err(Fault::Corrupt(why)) => {
                    doubts.unless(false, why);
                    String::new()
                }
                Err(other) => return Err(other),
            };
            wrong.extend(doubts.0.drain(..).map(|wrong| format!("{name} {}: {wrong}", short(&named, key))));
        }
        // A row that is judged again is counted once.
        wrong.into_iter().for_each(|wrong| self.report.add(|| wrong));
        self.count(index);
        Ok(())
    }

    fn count(&mut self, index: usize) {
        self.rows.iter_mut().skip(index).take(1).for_each(|rows| *rows += 1);
    }
}

/// The name of a row: its key as people read it, or its bytes where that is too long.
fn short(named: &str, key: &[u8]) -> String {
    if named.is_empty() || named.chars().count() > NAME_CHARS_MAX { hex(key) } else { named.to_owned() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(64).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
