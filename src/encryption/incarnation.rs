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

/// A batch deals with at most this many users.
const USERS_AT_ONCE: usize = 500;
/// A batch takes no further device once it writes this many rows of keys; a device has at most 1,000.
const ROWS_AT_ONCE: usize = 500;

/// Treats every one-time key as given, marks every fallback key as used, and announces the devices of every local user. Devices upload
/// new keys when they are told that none is left.
pub fn begin(store: &Store) -> Result<(), Fault> {
    let snapshot = store.snapshot();
    let mut owners = keys::list_owners(&*snapshot)?.into_iter().peekable();
    while owners.peek().is_some() {
        commit(store, |batch| {
            let mut rows = 0;
            while let Some((owner, one_time)) = owners.next_if(|_| rows < ROWS_AT_ONCE) {
                keys::treat_all_as_given(batch, owner)?;
                rows += one_time + 2;
            }
            Ok(())
        })?;
    }
    let users: Vec<(UserNum, ruma::OwnedUserId)> = schema::USERS
        .prefix::<()>(&*snapshot, (), crate::store::Direction::Up)?
        .map(|row| {
            let (user, row) = row?;
            Ok((user, row.user_id))
        })
        .collect::<Result<_, Fault>>()?;
    for some in users.chunks(USERS_AT_ONCE) {
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
