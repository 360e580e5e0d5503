//! Brings a store from one layout to the next.
//!
//! Most changes need nothing here: each value begins with the version of its layout, old ones are read, new ones are
//! written. A new *key* layout is a new table. A small one is filled here, when a server starts over the store
//! (`src/server/steps.rs` lists the steps, because they know tables of all areas), in parts that go on where a crash stopped them; a large one is filled by a reader while the server runs, and its step only flips the
//! number. A store of a layout that this code does not know is refused: there is no way back.

use std::ops::Bound;

use bytes::Bytes;

use crate::store::{
    Batch, Fault, Guard, NotAccepted, Read, Store, head,
    key::{Decoder, Encoder, Key},
    tables,
};

/// One step of a migration: from the layout before to this one.
pub(crate) struct Step {
    /// The layout that the store has after this step.
    pub(crate) to: u64,
    /// Writes one part, at most as much as a batch holds, that begins after `after` (none: at the beginning); answers where
    /// the next part begins, or none at the end.
    pub(crate) part: Part,
}

/// Writes one part of a step. What it reads is published, and nobody else writes meanwhile.
pub(crate) type Part = fn(&dyn Read, Option<Bytes>, &mut Batch) -> Result<Option<Bytes>, Fault>;

/// Writes down the key of the last row that a part came to, for the part after it.
pub(crate) fn place_of<K: Key>(key: K::Ref<'_>) -> Bytes {
    let mut to = Encoder::default();
    K::encode_key(key, &mut to);
    to.bytes.into()
}

/// Gives the lower bound of the keys that a part has still to read: those after the place that [`place_of`] wrote down for the
/// part before it; all of them where there was none.
pub(crate) fn after_place<K: Key>(place: Option<Bytes>) -> Result<Bound<K>, Fault> {
    let Some(place) = place else { return Ok(Bound::Unbounded) };
    K::decode_key(&mut Decoder(&place)).map(Bound::Excluded)
}

/// Refuses a store of a later layout than this code knows.
pub(crate) fn require_known(layout: u64) -> Result<(), Fault> {
    if layout > head::LAYOUT_NOW {
        return Err(Fault::Closed("it was written by a newer version, and going back is not possible"));
    }
    Ok(())
}

/// Brings the store from this layout to the newest one, in batches as any other write. Errors: no steps lead there.
pub(crate) fn run(store: &Store, mut layout: u64, steps: &[Step], newest: u64) -> Result<(), Fault> {
    for step in steps.iter().filter(|step| step.to <= newest) {
        if step.to == layout + 1 {
            take(store, step)?;
            layout = step.to;
        }
    }
    if layout == newest {
        Ok(())
    } else {
        Err(Fault::Closed("it is of a layout that this version cannot read"))
    }
}

fn take(store: &Store, step: &Step) -> Result<(), Fault> {
    loop {
        let snapshot = store.snapshot();
        let mut batch = store.batch(&Guard::alone());
        let after = tables::MIGRATION.get(&*snapshot, step.to)?;
        let next = (step.part)(&*snapshot, after, &mut batch)?;
        match &next {
            Some(after) => tables::MIGRATION.put(&mut batch, step.to, after),
            None => {
                tables::MIGRATION.delete(&mut batch, step.to);
                head::put_layout(&mut batch, step.to);
            }
        }
        write(store, batch)?;
        if next.is_none() {
            return Ok(());
        }
    }
}

/// Writes a batch of a store that nobody else uses yet, and waits for the disk.
pub(crate) fn write(store: &Store, batch: Batch) -> Result<(), Fault> {
    match store.enqueue(batch) {
        Ok(_) => store.flush().map(drop),
        Err(NotAccepted::Fault(fault)) => Err(fault),
        Err(other) => Err(Fault::Io(format!("a store that is being opened takes no batch: {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        Direction, Domain, Durability, Engine, Table,
        engine::{Family, Memory},
        head::LAYOUT_NOW,
    };

    static OLD: Table<u8, u64> = Table::new(250, Family::Index, "OLD", Domain::Server, "tests");
    static NEW: Table<u8, u64> = Table::new(251, Family::Index, "NEW", Domain::Server, "tests");

    /// This step copies OLD to NEW, three rows a part.
    fn move_three(read: &dyn Read, after: Option<Bytes>, batch: &mut Batch) -> Result<Option<Bytes>, Fault> {
        let after = after.and_then(|after| after.first().copied());
        let rows = OLD.prefix::<()>(read, (), Direction::Up)?;
        let rows = rows.filter(|row| !matches!(row, Ok((key, _)) if Some(*key) <= after));
        let mut last = None;
        for row in rows.take(3) {
            let (key, value) = row?;
            OLD.delete(batch, key);
            NEW.put(batch, key, &value);
            last = Some(Bytes::copy_from_slice(&[key]));
        }
        Ok(last)
    }

    fn only_flip(_: &dyn Read, _: Option<Bytes>, _: &mut Batch) -> Result<Option<Bytes>, Fault> {
        Ok(None)
    }

    fn open_raw(engine: Engine) -> Store {
        Store::over(engine, Durability::Fsync).unwrap().0
    }

    #[test]
    fn a_migration_that_a_crash_stops_anywhere_goes_on_and_ends_the_same() {
        let steps = [Step { to: 2, part: move_three }, Step { to: 3, part: only_flip }];
        for writes in 0..8 {
            for leaves_rows in [false, true] {
                let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
                let mut batch = store.batch(&Guard::alone());
                head::put_layout(&mut batch, 1);
                (0..10_u8).for_each(|key| OLD.put(&mut batch, key, &key.into()));
                write(&store, batch).unwrap();
                let began = store.snapshot().batch_number();
                let Engine::Memory(memory) = store.engine() else { unreachable!() };
                memory.fail_after(writes, leaves_rows);
                let stopped = run(&store, 1, &steps, 3);
                assert_eq!(stopped.is_err(), writes < 6);
                let kept = memory.unsynced_writes() / 2;
                let store = open_raw(Engine::Memory(memory.after_crash(kept)));
                let layout = head::open(store.engine()).unwrap().layout.unwrap();
                run(&store, layout, &steps, 3).unwrap();
                let read = &*store.snapshot();
                let moved = NEW.prefix::<()>(read, (), Direction::Up).unwrap().map(Result::unwrap);
                assert!(moved.eq((0..10_u8).map(|key| (key, key.into()))));
                assert_eq!(OLD.prefix::<()>(read, (), Direction::Up).unwrap().count(), 0);
                assert_eq!(head::open(store.engine()).unwrap().layout, Some(3));
                assert_eq!(tables::MIGRATION.prefix::<()>(read, (), Direction::Up).unwrap().count(), 0);
                assert!(read.batch_number() > began, "each part has a number that a replica can follow");
            }
        }
    }

    #[test]
    fn a_store_of_a_later_version_is_refused() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::alone());
        head::put_layout(&mut batch, LAYOUT_NOW + 1);
        write(&store, batch).unwrap();
        let Engine::Memory(memory) = store.engine() else { unreachable!() };
        let later = Engine::Memory(memory.after_crash(usize::MAX));
        assert!(matches!(Store::open(later, Durability::Fsync), Err(Fault::Closed(_))));
    }
}
