//! Requests to send messages to devices are each carried out once: the progress of a request is stored in the batch of its
//! messages.
//!
//! Specification: client-server API, "Send-to-Device messaging".

use std::ops::Bound;

use crate::{
    encryption::keys::Owner,
    ids::{DeviceNum, UserNum},
    schema::{self, encryption::SendProgress},
    store::{Batch, Direction, Fault, Read},
};

/// The transaction id of a request is remembered for at least this many milliseconds; no client retries for longer.
pub const TXN_KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// Each new transaction id deletes at most this many old ones. More may go than come, so that they do not pile up.
const FORGOTTEN_AT_ONCE: usize = 3;

/// The progress of a request of this device; nothing is done of a request that is not known.
pub fn progress(
    read: &(impl Read + ?Sized),
    (user, device): Owner,
    event_type: &str,
    txn_id: &str,
) -> Result<SendProgress, Fault> {
    Ok(schema::TO_DEVICE_TXNS.get(read, (user, device, event_type, txn_id))?.unwrap_or_default())
}

/// Stores the progress of a request in the batch with its messages, so that a retry goes on from there. Deletes a few
/// transaction ids that are older than [`TXN_KEPT_MS`].
pub fn note_progress(
    batch: &mut Batch,
    (user, device): Owner,
    event_type: &str,
    txn_id: &str,
    progress: &SendProgress,
    now_ms: u64,
) -> Result<(), Fault> {
    let key = (user, device, event_type, txn_id);
    if !schema::TO_DEVICE_TXNS.contains(batch, key)? {
        let end = Bound::Excluded((user, device, now_ms.saturating_sub(TXN_KEPT_MS)));
        let begin = Bound::Included((user, device, 0));
        let old = schema::TO_DEVICE_TXN_LOG
            .range::<(UserNum, DeviceNum, u64)>(batch, begin, end, Direction::Up)?
            .take(FORGOTTEN_AT_ONCE)
            .collect::<Result<Vec<_>, _>>()?;
        for ((_, _, ms, event_type, txn_id), ()) in old {
            schema::TO_DEVICE_TXN_LOG.delete(batch, (user, device, ms, &event_type, &txn_id));
            schema::TO_DEVICE_TXNS.delete(batch, (user, device, &event_type, &txn_id));
        }
        schema::TO_DEVICE_TXN_LOG.put(batch, (user, device, now_ms, event_type, txn_id), &());
    }
    schema::TO_DEVICE_TXNS.put(batch, key, progress);
    Ok(())
}

/// Deletes the progress of all requests of ended devices, from the first to the last number.
pub fn sweep(batch: &mut Batch, user: UserNum, (first, last): (DeviceNum, DeviceNum)) {
    let (low, high) = ((user, first), (user, DeviceNum(last.0.saturating_add(1))));
    schema::TO_DEVICE_TXNS.delete_below::<Owner, Owner>(batch, low, high);
    schema::TO_DEVICE_TXN_LOG.delete_below::<Owner, Owner>(batch, low, high);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const PHONE: Owner = (UserNum(1), DeviceNum(1));

    fn write(store: &Store, build: impl FnOnce(&mut Batch)) {
        let mut batch = store.batch(&Guard::alone());
        build(&mut batch);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
    }

    #[test]
    fn transaction_ids_are_remembered_for_a_day() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let done = SendProgress { targets: 1, is_done: true, ..SendProgress::default() };
        let note = |txn_id: &str, now_ms| {
            write(&store, |batch| note_progress(batch, PHONE, "a", txn_id, &done, now_ms).unwrap());
        };
        let is_known = |txn_id: &str| progress(&*store.snapshot(), PHONE, "a", txn_id).unwrap().is_done;
        note("1", 1);
        note("2", 2);
        note("3", TXN_KEPT_MS + 1);
        assert_eq!(["1", "2", "3"].map(is_known), [true, true, true]);
        note("4", TXN_KEPT_MS + 2);
        assert_eq!(["1", "2", "3"].map(is_known), [false, true, true]);
        note("5", 3 * TXN_KEPT_MS);
        assert_eq!(["2", "3", "4", "5"].map(is_known), [false, false, false, true]);
        write(&store, |batch| sweep(batch, PHONE.0, (PHONE.1, PHONE.1)));
        assert!(!is_known("5"));
    }
}
