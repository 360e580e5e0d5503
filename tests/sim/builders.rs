//! Builders that write straight into the store. They test the contract that everything above relies on, with crashes.
//!
//! Each keeps a numbered list under a lock, with transaction ids; a reader follows the log from a durable cursor.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use aqueduct::{
    ids::{Position, RoomNum},
    store::{
        Direction, Domain, Family, Guard, LogEntry, NotAccepted, Read, Store, Table, cursor,
        tail::{self, Tail},
    },
};
use tokio::task::JoinSet;

use crate::world::World;

/// The entries of each list: (list, number) -> transaction.
static LISTS: Table<(u64, u64), u64> = Table::new(240, Family::Events, "LISTS", Domain::Room, "sim");
/// The transactions of each list: (list, transaction) -> number.
static TXNS: Table<(u64, u64), u64> = Table::new(241, Family::Index, "TXNS", Domain::Room, "sim");
/// The positions of each list's entries: (list, position) -> number.
static PLACES: Table<(u64, Position), u64> = Table::new(242, Family::State, "PLACES", Domain::Room, "sim");
/// The number of entries that a list has.
static COUNTS: Table<u64, u64> = Table::new(243, Family::State, "COUNTS", Domain::Room, "sim");
/// The number of entries that the reader has counted in a list; it is written together with the reader's cursor.
static SEEN: Table<u64, u64> = Table::new(244, Family::Notes, "SEEN", Domain::Server, "sim");

const LISTS_MAX: u64 = 3;
const WRITERS: u64 = 4;

/// The entries that were acknowledged: (list, transaction) -> number.
#[derive(Default)]
pub(crate) struct Builders {
    acknowledged: RefCell<BTreeMap<(u64, u64), u64>>,
}

/// Starts the builders and the reader.
pub(crate) fn begin(world: &Rc<World>, people: &mut JoinSet<()>) -> Rc<Builders> {
    let builders = Rc::new(Builders::default());
    // The log waits for a reader from its first note on.
    let (store, _) = world.store().unwrap();
    let mut note = store.note(&Guard::alone());
    cursor::advance(&mut note, "sim", Position::ZERO);
    drop(store.enqueue_note(note).unwrap());
    store.flush().unwrap();
    for writer in 0..WRITERS {
        let (world, builders) = (world.clone(), builders.clone());
        people.spawn_local(async move {
            let mut txn = writer;
            while !world.is_ending() {
                world.pause(400).await;
                txn += WRITERS;
                builders.append(&world, world.below(LISTS_MAX), txn).await;
            }
        });
    }
    let reading = world.clone();
    people.spawn_local(async move {
        while !reading.is_ending() {
            reading.pause(300).await;
            read(&reading);
        }
    });
    builders
}

/// Makes the batch that appends this transaction: everything that follows from it, and all or nothing.
fn build(store: &Store, list: u64, txn: u64) -> Result<(u64, aqueduct::store::Enqueued), NotAccepted> {
    let mut batch = store.batch(&Guard::alone());
    let number = COUNTS.get(&batch, list).unwrap().unwrap_or(0) + 1;
    let position = batch.position(&LogEntry::RoomState { room: RoomNum(1_000_000 + list) });
    TXNS.expect_absent(&mut batch, (list, txn));
    TXNS.put(&mut batch, (list, txn), &number);
    LISTS.put(&mut batch, (list, number), &txn);
    PLACES.put(&mut batch, (list, position), &number);
    COUNTS.put(&mut batch, list, &number);
    Ok((number, store.enqueue(batch)?))
}

impl Builders {
    /// Appends an entry until it is acknowledged; now and then twice at once, now and then once more afterwards.
    async fn append(&self, world: &World, list: u64, txn: u64) {
        let number = loop {
            let Some((store, lost)) = world.store() else {
                world.pause(200).await;
                continue;
            };
            let answer = lost.run_until_cancelled(async {
                match build(&store, list, txn) {
                    Ok((number, enqueued)) => enqueued.flushed.await.ok().map(|()| number),
                    Err(NotAccepted::Conflict(conflict)) => {
                        store.barrier().await;
                        TXNS.conflicting(&conflict)
                    }
                    Err(NotAccepted::Fault(_)) => None,
                    Err(other) => panic!("{other:?}"),
                }
            });
            match answer.await.flatten() {
                Some(number) => break number,
                None => world.pause(200).await,
            }
            if world.happens(20)
                && let Some((store, _)) = world.store()
            {
                // The same append is made a second time, and nobody waits for it.
                drop(build(&store, list, txn));
            }
        };
        world.note(|| format!("list {list} has {txn} as {number}"));
        let before = self.acknowledged.borrow_mut().insert((list, txn), number);
        assert!(before.is_none());
    }

    /// Checks that each acknowledged entry is there exactly once, and that nothing is half there.
    pub(crate) fn check(&self, world: &World) {
        read_all(world);
        let (store, _) = world.store().unwrap();
        let read = &*store.snapshot();
        let acknowledged = self.acknowledged.borrow();
        assert!(acknowledged.len() > 10);
        for ((list, txn), number) in acknowledged.iter() {
            assert_eq!(TXNS.get(read, (*list, *txn)).unwrap(), Some(*number));
        }
        let mut total = 0;
        for list in 0..LISTS_MAX {
            let rows = |list| LISTS.prefix::<(u64,)>(read, (list,), Direction::Up).unwrap();
            let txns: Vec<_> =
                rows(list).map(|row| row.unwrap()).map(|((_, number), txn)| (number, txn)).collect();
            let count = COUNTS.get(read, list).unwrap().unwrap_or(0);
            assert!(txns.iter().map(|(number, _)| *number).eq(1..=count), "list {list} has holes");
            for (number, txn) in &txns {
                assert_eq!(TXNS.get(read, (list, *txn)).unwrap(), Some(*number), "twice in list {list}");
            }
            let places = PLACES.prefix::<(u64,)>(read, (list,), Direction::Up).unwrap();
            assert!(
                places.map(|row| row.unwrap().1).eq(1..=count),
                "positions of list {list} are out of order"
            );
            assert_eq!(
                SEEN.get(read, list).unwrap().unwrap_or(0),
                count,
                "the reader missed or repeated something"
            );
            total += count;
        }
        assert!(total as usize >= acknowledged.len());
    }
}

/// Reads on from the cursor, and notes what was counted together with the new cursor. A crash loses both or none.
fn read(world: &World) -> bool {
    let Some((store, _)) = world.store() else { return false };
    let view = store.view();
    let snapshot = store.snapshot();
    let from = cursor::find(&view, "sim").unwrap().unwrap_or(Position::ZERO);
    let Tail::Entries(entries) = tail::read_after(&*snapshot, from, 7).unwrap() else {
        panic!("the log was trimmed in front of its reader")
    };
    let mut note = store.note(&Guard::alone());
    for (position, entry) in &entries {
        assert!(*position > from && *position <= snapshot.upto());
        if let LogEntry::RoomState { room } = entry
            && room.0 >= 1_000_000
        {
            let list = room.0 - 1_000_000;
            let seen = SEEN.get(&note, list).unwrap().unwrap_or(0);
            SEEN.put(&mut note, list, &(seen + 1));
        }
    }
    if let Some((position, _)) = entries.last() {
        cursor::advance(&mut note, "sim", *position);
        // Nobody waits for this note, so the next crash may lose it.
        return store.enqueue_note(note).is_ok();
    }
    false
}

fn read_all(world: &World) {
    while read(world) {
        world.store().unwrap().0.flush().unwrap();
    }
}
