//! Duties toward encryption after a restore, which begins a new incarnation of the store.
//!
//! The store has gone back in time, so it has one-time keys that were given to somebody already. A key that is given twice
//! cannot be used by one of the two, and weakens both, so none of them is given again. Others hold device lists that are newer
//! than ours, so all are announced again.

use crate::{
    encryption::{device_lists, keys},
    ids::UserNum,
    schema,
    store::{Batch, Fault, Guard, NotAccepted, Store},
};

/// A batch deals with at most this many devices or users.
const AT_ONCE: usize = 500;

/// Deletes every one-time key, marks every fallback key as used, and announces the devices of every local user. Devices upload
/// new keys when they are told that none is left.
pub fn begin(store: &Store) -> Result<(), Fault> {
    let snapshot = store.snapshot();
    let owners = keys::list_owners(&*snapshot)?;
    for some in owners.chunks(AT_ONCE) {
        commit(store, |batch| some.iter().try_for_each(|owner| keys::treat_all_as_given(batch, *owner)))?;
    }
    let users: Vec<(UserNum, ruma::OwnedUserId)> = schema::USERS
        .prefix::<()>(&*snapshot, (), crate::store::Direction::Up)?
        .map(|row| {
            let (user, row) = row?;
            Ok((user, row.user_id))
        })
        .collect::<Result<_, Fault>>()?;
    for some in users.chunks(AT_ONCE) {
        commit(store, |batch| {
            some.iter()
                .try_for_each(|(user, user_id)| device_lists::changed(batch, *user, user_id, &[]).map(drop))
        })?;
    }
    Ok(())
}

fn commit(store: &Store, build: impl FnOnce(&mut Batch) -> Result<(), Fault>) -> Result<(), Fault> {
    // No lock is needed, because nobody else uses a store that is being restored.
    let mut batch = store.batch(&Guard::alone());
    build(&mut batch)?;
    match store.enqueue(batch) {
        Ok(_) => store.flush().map(drop),
        Err(NotAccepted::Fault(fault)) => Err(fault),
        Err(other) => Err(Fault::Io(format!("the restored store did not accept a batch: {other:?}"))),
    }
}
