//! The steps that bring a store which an older version of the server wrote to the layout of this one, before anything else
//! reads it (`src/store/migrate.rs`). Each is written by the module that owns the rows.

use crate::{
    encryption::inbox,
    rooms::{change, receipts},
    store::{Fault, Store, migrate::Step},
};

/// Layout 1 is the first one.
static STEPS: &[Step] = &[
    Step { to: 2, part: inbox::recount },
    Step { to: 3, part: change::recount_aside },
    Step { to: 4, part: receipts::part_logs },
    Step { to: 5, part: change::txn::delete_old },
];

/// Brings the store to the newest layout. Nobody else uses it yet.
pub(super) fn take(store: &Store) -> Result<(), Fault> {
    store.bring_up(STEPS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, engine::Memory};

    #[test]
    fn the_steps_lead_to_the_newest_layout() {
        let next = |layout, step: &Step| if step.to == layout + 1 { step.to } else { layout };
        let reached = STEPS.iter().fold(1, next);
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        assert_eq!(
            store.layout().unwrap(),
            reached,
            "a new store is of the layout that the last step leads to"
        );
    }
}
