//! From one layout of the store to the next.
//!
//! Most changes need nothing here: each value begins with the version of its layout, old ones are read, new ones are
//! written. A new *key* layout is a new table. A small one is filled here, when the store is opened, in parts that go on
//! where a crash stopped them; a large one is filled by a reader while the server runs, and its step only flips the
//! number. A store of a layout that this code does not know is refused: there is no way back.

use bytes::Bytes;

use crate::store::{
    Engine, Fault, Snapshot,
    engine::Change,
    head::{self, LAYOUT_NOW},
    key::{Encoder, Value},
    tables,
};

/// One step: from the layout before to this one.
pub(crate) struct Step {
    /// The layout that it makes.
    pub(crate) to: u64,
    /// Makes the changes of one part, at most some thousand rows, that begins after `after` (none: at the beginning);
    /// answers where the next part begins, or none at the end.
    pub(crate) part: Part,
}

/// Makes the changes of one part of a step.
type Part = fn(&Snapshot, Option<Bytes>, &mut Vec<Change>) -> Result<Option<Bytes>, Fault>;

/// Layout 1 is the first one.
pub(crate) static STEPS: &[Step] = &[];

/// Brings the store to the newest layout. Errors: it is of a later one.
pub(crate) fn run(engine: &Engine, steps: &[Step], newest: u64) -> Result<(), Fault> {
    let Some(mut layout) = head::find_layout(&head::bare(engine))? else {
        return engine.write(head::rows_of_new_store(newest).iter(), true);
    };
    if layout > newest {
        return Err(Fault::Closed("it was written by a newer version, and going back is not possible"));
    }
    for step in steps.iter().filter(|step| step.to <= newest) {
        if step.to == layout + 1 {
            take(engine, step)?;
            layout = step.to;
        }
    }
    if layout == newest {
        Ok(())
    } else {
        Err(Fault::Closed("it is of a layout that this version cannot read"))
    }
}

/// Brings the store to the layout of this code.
pub(crate) fn run_all(engine: &Engine) -> Result<(), Fault> {
    run(engine, STEPS, LAYOUT_NOW)
}

fn take(engine: &Engine, step: &Step) -> Result<(), Fault> {
    loop {
        let snapshot = head::bare(engine);
        let mut changes = Vec::new();
        let after = tables::MIGRATION.get(&snapshot, step.to)?;
        match (step.part)(&snapshot, after, &mut changes)? {
            Some(after) => {
                changes.push(progress(step.to, Some(&after)));
                engine.write(changes.iter(), false)?;
            }
            None => {
                changes.push(progress(step.to, None));
                changes.push(head::layout_row(step.to));
                return engine.write(changes.iter(), true);
            }
        }
    }
}

fn progress(to: u64, after: Option<&Bytes>) -> Change {
    let value = after.map(|after| {
        let mut value = Encoder::default();
        after.encode(&mut value);
        Bytes::from(value.bytes)
    });
    Change::Row(tables::MIGRATION.family, tables::MIGRATION.key_bytes::<u64>(to).bytes.into(), value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        Direction, Durability, Read, Store,
        engine::{Family, Memory},
    };

    fn rows(read: &Snapshot) -> Vec<(Bytes, Bytes)> {
        read.range_raw(Family::Index, vec![0xf0], vec![0xff], Direction::Up)
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    /// From keys `f0 n` to keys `f1 n`, three a part.
    fn move_three(
        read: &Snapshot,
        after: Option<Bytes>,
        changes: &mut Vec<Change>,
    ) -> Result<Option<Bytes>, Fault> {
        let low = after.map_or(vec![0xf0], |after| [&after[..], &[0]].concat());
        let mut last = None;
        for row in read.range_raw(Family::Index, low, vec![0xf1], Direction::Up)?.take(3) {
            let (key, value) = row?;
            changes.push(Change::Row(Family::Index, key.clone(), None));
            changes.push(Change::Row(Family::Index, vec![0xf1, key[1]].into(), Some(value)));
            last = Some(key);
        }
        Ok(last)
    }

    fn only_flip(_: &Snapshot, _: Option<Bytes>, _: &mut Vec<Change>) -> Result<Option<Bytes>, Fault> {
        Ok(None)
    }

    #[test]
    fn a_migration_that_a_crash_stops_anywhere_goes_on_and_ends_the_same() {
        let steps = [Step { to: 2, part: move_three }, Step { to: 3, part: only_flip }];
        let old: Vec<Change> = (0..10_u8)
            .map(|n| Change::Row(Family::Index, vec![0xf0, n].into(), Some(Bytes::copy_from_slice(&[n]))))
            .collect();
        let expected: Vec<(Bytes, Bytes)> =
            (0..10_u8).map(|n| (vec![0xf1, n].into(), Bytes::copy_from_slice(&[n]))).collect();
        for writes in 0..8 {
            for leaves_rows in [false, true] {
                let memory = Memory::default();
                let engine = Engine::Memory(memory);
                run(&engine, &[], 1).unwrap();
                engine.write(old.iter(), true).unwrap();
                let Engine::Memory(memory) = &engine else { unreachable!() };
                memory.fail_after(writes, leaves_rows);
                let stopped = run(&engine, &steps, 3);
                let kept = memory.unsynced_writes() / 2;
                let engine = Engine::Memory(memory.after_crash(kept));
                assert_eq!(stopped.is_err(), writes < 6);
                run(&engine, &steps, 3).unwrap();
                let read = head::read(&engine).unwrap();
                assert_eq!(rows(&read), expected);
                assert_eq!(head::find_layout(&read).unwrap(), Some(3));
                assert_eq!(tables::MIGRATION.prefix::<()>(&read, (), Direction::Up).unwrap().count(), 0);
            }
        }
    }

    #[test]
    fn a_store_of_a_later_version_is_refused() {
        let engine = Engine::Memory(Memory::default());
        run(&engine, &[], LAYOUT_NOW + 1).unwrap();
        assert!(matches!(Store::open(engine, Durability::Fsync), Err(Fault::Closed(_))));
    }

    #[test]
    fn the_steps_lead_to_the_newest_layout() {
        let reached =
            STEPS.iter().fold(1, |layout, step| if step.to == layout + 1 { step.to } else { layout });
        assert_eq!(reached, LAYOUT_NOW);
    }
}
