//! Remembers what other servers have sent, so that each message between devices is delivered once however often it comes.
//!
//! A server repeats a transaction until it is answered, and sends the next one only then, so that only its last messages need be
//! remembered. Anybody can invent servers, so that those that share no room with the users to whom they write are remembered
//! together: each line has a bounded length, and whatever is new pushes out what came first. What is left of it is forgotten after
//! a week.

use std::{
    ops::Bound,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use super::old_rows;
use crate::{
    error::Result,
    flows::App,
    schema::{
        self,
        remote::{InboundLineRow, InboundMessageRow},
    },
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// This many messages of a server are remembered: as many as some tens of transactions have.
const OF_SERVER_MAX: u64 = if cfg!(test) { 4 } else { 2_000 };
/// This many messages are remembered of all servers together that share no room with those to whom they write.
const OF_STRANGERS_MAX: u64 = if cfg!(test) { 8 } else { 20_000 };
/// Transactions of this many servers are remembered: more are not in contact with one server at a time.
const SERVERS_MAX: u64 = if cfg!(test) { 8 } else { 20_000 };
/// It is remembered for this many milliseconds that a message came.
const REMEMBERED_MS: u64 = 7 * 24 * 60 * 60 * 1000;

/// The line of the messages of strangers. No server has such a name.
const STRANGERS: &str = "";
/// The line of servers whose transactions are remembered. No server has such a name.
const TRANSACTIONS: &str = "*";

/// The last numbers of the lines that several servers share, which are counted on in memory: servers have their turns at the same
/// time, and none may get a number twice. Clones of this share them.
#[derive(Clone, Default)]
pub(super) struct Lines(Arc<Shared>);

#[derive(Default)]
struct Shared {
    strangers: OnceLock<AtomicU64>,
    transactions: OnceLock<AtomicU64>,
}

impl Lines {
    fn next(&self, read: &(impl Read + ?Sized), line: &str) -> Result<u64, Fault> {
        let cell = if line == TRANSACTIONS { &self.0.transactions } else { &self.0.strangers };
        let counter = match cell.get() {
            Some(counter) => counter,
            None => {
                let last = last_of(read, line)?;
                cell.get_or_init(|| AtomicU64::new(last))
            }
        };
        Ok(counter.fetch_add(1, Ordering::Relaxed).saturating_add(1))
    }
}

/// The last number in a line; 0 in an empty one.
fn last_of(read: &(impl Read + ?Sized), line: &str) -> Result<u64, Fault> {
    let mut rows = schema::INBOUND_LINE.prefix::<(String,)>(read, (line,), Direction::Down)?;
    Ok(rows.next().transpose()?.map_or(0, |((_, number), _)| number))
}

/// Notes how far a message of a server was delivered. A new one pushes out the one that came first in its line. The turn of
/// the server guards this.
pub(super) fn note_message(
    app: &App,
    batch: &mut Batch,
    (origin, id): (&str, &str),
    is_stranger: bool,
    row: &InboundMessageRow,
) -> Result<(), Fault> {
    if !schema::INBOUND_MESSAGE.contains(batch, (origin, id))? {
        let (line, number, length) = if is_stranger {
            (STRANGERS, app.lanes.lines().next(batch, STRANGERS)?, OF_STRANGERS_MAX)
        } else {
            (origin, last_of(batch, origin)?.saturating_add(1), OF_SERVER_MAX)
        };
        let out = push(
            batch,
            (line, number),
            length,
            InboundLineRow { origin: origin.to_owned(), id: id.to_owned() },
        )?;
        if let Some(InboundLineRow { origin, id }) = out {
            schema::INBOUND_MESSAGE.delete(batch, (origin.as_str(), id.as_str()));
        }
    }
    schema::INBOUND_MESSAGE.put(batch, (origin, id), row);
    Ok(())
}

/// Notes that transactions of a server are remembered from now on. This pushes out those of the server that came first.
pub(super) fn note_server(app: &App, batch: &mut Batch, origin: &str) -> Result<(), Fault> {
    let number = app.lanes.lines().next(batch, TRANSACTIONS)?;
    let row = InboundLineRow { origin: origin.to_owned(), id: String::new() };
    let out = push(batch, (TRANSACTIONS, number), SERVERS_MAX, row)?;
    if let Some(out) = out.filter(|out| out.origin != origin) {
        let rows = schema::INBOUND_TRANSACTION.prefix::<(String,)>(batch, (&out.origin,), Direction::Up)?;
        let slots = rows.map(|row| row.map(|((_, slot), _)| slot)).collect::<Result<Vec<_>, _>>()?;
        for slot in slots {
            schema::INBOUND_TRANSACTION.delete(batch, (out.origin.as_str(), slot));
        }
    }
    Ok(())
}

/// Adds to the end of a line, and gives what that pushes out at its beginning.
fn push(
    batch: &mut Batch,
    (line, number): (&str, u64),
    length: u64,
    row: InboundLineRow,
) -> Result<Option<InboundLineRow>, Fault> {
    schema::INBOUND_LINE.put(batch, (line, number), &Json(row));
    let Some(first) = number.checked_sub(length) else { return Ok(None) };
    let out = schema::INBOUND_LINE.get(batch, (line, first))?;
    if out.is_some() {
        schema::INBOUND_LINE.delete(batch, (line, first));
    }
    Ok(out.map(|Json(row)| row))
}

/// Forgets messages that came too long ago, some at once; answers where to go on, if there may be more.
pub(super) fn forget_old(
    app: &App,
    after: Option<(String, String)>,
    count: usize,
) -> Result<Option<(String, String)>> {
    let snapshot = app.store.snapshot();
    let old_ms = app.env.now_ms().saturating_sub(REMEMBERED_MS);
    let low = after.as_ref().map_or(Bound::Unbounded, |(origin, id)| Bound::Excluded((&**origin, &**id)));
    let rows = schema::INBOUND_MESSAGE.range::<(String, String)>(
        &*snapshot,
        low,
        Bound::Unbounded,
        Direction::Up,
    )?;
    old_rows::look_over(app, rows, count, |note, (origin, id), row| {
        if row.at_ms <= old_ms {
            schema::INBOUND_MESSAGE.delete(note, (origin.as_str(), id.as_str()));
        }
        Ok(())
    })
}

/// Forgets the places in lines of what is forgotten itself, some at once; answers where to go on, if there may be more.
pub(super) fn forget_places(
    app: &App,
    after: Option<(String, u64)>,
    count: usize,
) -> Result<Option<(String, u64)>> {
    let snapshot = app.store.snapshot();
    let low = after.as_ref().map_or(Bound::Unbounded, |(line, number)| Bound::Excluded((&**line, *number)));
    let rows =
        schema::INBOUND_LINE.range::<(String, u64)>(&*snapshot, low, Bound::Unbounded, Direction::Up)?;
    old_rows::look_over(app, rows, count, |note, (line, number), Json(InboundLineRow { origin, id })| {
        let is_kept = if line == TRANSACTIONS {
            let mut rows =
                schema::INBOUND_TRANSACTION.prefix::<(String,)>(&*snapshot, (&origin,), Direction::Up)?;
            rows.next().transpose()?.is_some()
        } else {
            schema::INBOUND_MESSAGE.contains(&*snapshot, (origin.as_str(), id.as_str()))?
        };
        if !is_kept {
            schema::INBOUND_LINE.delete(note, (line.as_str(), *number));
        }
        Ok(())
    })
}

/// Whether a place may stand in this line: messages of a server stand in its own or in that of strangers.
pub(super) fn is_line_of(line: &str, row: &InboundLineRow) -> bool {
    match line {
        TRANSACTIONS => row.id.is_empty(),
        STRANGERS => true,
        origin => origin == row.origin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{env::Env, schema::remote::InboundTransactionRow, server::Server, store::Guard};

    fn write(app: &App, build: impl FnOnce(&mut Batch)) {
        let mut batch = app.store.batch(&Guard::own_tables());
        build(&mut batch);
        drop(app.store.enqueue(batch).unwrap());
        app.store.flush().unwrap();
    }

    fn come(app: &App, origin: &str, id: &str, is_stranger: bool) {
        let row = InboundMessageRow { at_ms: app.env.now_ms(), ..InboundMessageRow::default() };
        write(app, |batch| note_message(app, batch, (origin, id), is_stranger, &row).unwrap());
    }

    fn known(app: &App) -> Vec<(String, String)> {
        let snapshot = app.store.snapshot();
        let rows = schema::INBOUND_MESSAGE.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        rows.map(|row| row.unwrap().0).collect()
    }

    fn places(app: &App) -> usize {
        let snapshot = app.store.snapshot();
        schema::INBOUND_LINE.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    }

    #[tokio::test(start_paused = true)]
    async fn messages_are_remembered_up_to_a_number_for_each_server_and_for_all_strangers_together() {
        let server = Server::in_memory(Env::simulated(1, 10 * REMEMBERED_MS));
        let app = server.app();
        for number in 0..50 {
            come(app, "near.example", &format!("{number:02}"), false);
            come(app, &format!("far{number:02}.example"), "x", true);
            // A message that comes again keeps its place.
            come(app, "near.example", &format!("{number:02}"), false);
        }
        let near = (46..50).map(|number| ("near.example".to_owned(), format!("{number:02}")));
        let far = (42..50).map(|number| (format!("far{number:02}.example"), "x".to_owned()));
        assert_eq!(known(app), far.chain(near).collect::<Vec<_>>());
        assert_eq!(places(app), 12);
        // Another run goes on with the number after the last one.
        assert_eq!(Lines::default().next(&*app.store.snapshot(), STRANGERS).unwrap(), 51);
        let forget = || {
            assert_eq!(forget_old(app, None, 1_000).unwrap(), None);
            app.store.flush().unwrap();
            assert_eq!(forget_places(app, None, 1_000).unwrap(), None);
            app.store.flush().unwrap();
        };
        forget();
        assert_eq!((known(app).len(), places(app)), (12, 12));
        app.env.sleep(std::time::Duration::from_millis(REMEMBERED_MS)).await;
        forget();
        assert_eq!((known(app).len(), places(app)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn transactions_are_remembered_of_so_many_servers() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        for number in 0..50 {
            let origin = format!("far{number:02}.example");
            write(app, |batch| {
                note_server(app, batch, &origin).unwrap();
                for slot in 0..3 {
                    let row = InboundTransactionRow {
                        number: u64::from(slot),
                        id: "x".to_owned(),
                        at_ms: 1,
                        answer: "{}".to_owned(),
                    };
                    schema::INBOUND_TRANSACTION.put(batch, (origin.as_str(), slot), &Json(row));
                }
            });
        }
        let snapshot = app.store.snapshot();
        let rows = schema::INBOUND_TRANSACTION.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        assert_eq!(rows.count(), 3 * 8);
        assert_eq!(places(app), 8);
    }
}
