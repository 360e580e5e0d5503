//! Transaction ids: a request that a client repeats with the same id makes one event.
//!
//! A transaction id belongs to a device and not to the device's name: a user who logs out and in again under the same
//! device id begins anew, for the device has another number. The rows of a room are kept by day and forgotten a day at
//! a time, by a timer that the first of them sets.

use bytes::Bytes;

use super::Change;
use crate::{
    ids::{DeviceNum, EventNum, RoomNum, UserNum},
    schema,
    schema::{jobs::Job, rooms::SentBy},
    store::{
        Batch, Direction, Domain, Family, Fault, Read, Table,
        timer::{self, Timer},
    },
};

/// The endpoint of the transactions by which the server itself takes guests out of a room that closed to them.
pub const GUESTS: &str = "guests";
/// The endpoint of the transactions by which the server sends delayed events; the id of each is that of the delayed event.
pub const DELAYED: &str = "delayed";

const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// A transaction is remembered on its own day and for this many days more, because no client retries for longer.
const DAYS_KEPT: u32 = 1;

/// The transaction that an event is sent with.
#[derive(Clone, Debug)]
pub struct Txn {
    /// The user who sends the event.
    pub user: UserNum,
    /// The device from which the user sends it.
    pub device: DeviceNum,
    /// The endpoint: transaction ids of different endpoints are different transactions.
    pub endpoint: String,
    /// The transaction id, which the client chose.
    pub id: String,
    /// The time of the request, in milliseconds since the epoch.
    pub now_ms: u64,
}

impl Txn {
    fn day(&self) -> u32 {
        u32::try_from(self.now_ms / DAY_MS).unwrap_or(u32::MAX)
    }

    /// Finds the event that this transaction has made already.
    pub fn find(&self, read: &(impl Read + ?Sized), room: RoomNum) -> Result<Option<EventNum>, Fault> {
        let today = self.day();
        for day in (today.saturating_sub(DAYS_KEPT)..=today).rev() {
            let key = (room, day, self.user, self.device, self.endpoint.as_str(), self.id.as_str());
            if let Some(event) = schema::SENT.get(read, key)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Gives what the event's header keeps of the transaction.
    pub(super) fn sent_by(&self) -> SentBy {
        SentBy { device: self.device, txn: self.id.clone(), day: self.day() }
    }

    /// Remembers the event that this transaction made. The batch is refused if the transaction has made one already.
    pub(super) fn put(&self, change: &mut Change, event: EventNum) -> Result<(), Fault> {
        let (day, room) = (self.day(), change.num);
        let Change { batch, sent_day, .. } = change;
        // The tip remembers that the timer is set: to look for the day's other rows would cost more than the row itself.
        if *sent_day != Some(day) {
            let mut rows = schema::SENT.prefix::<(RoomNum, u32)>(batch, (room, day), Direction::Up)?;
            let is_first = rows.next().transpose()?.is_none();
            drop(rows);
            if is_first {
                timer::set(batch, &forget_on(room, day));
            }
            *sent_day = Some(day);
        }
        let key = (room, day, self.user, self.device, self.endpoint.as_str(), self.id.as_str());
        schema::SENT.expect_absent(batch, key);
        schema::SENT.put(batch, key, &event);
        Ok(())
    }
}

/// Transactions as they were kept before rows had a day and a device's number. It is table 17, which no other may become.
static OLD: Table<(), Bytes> = Table::new(17, Family::Index, "TXN", Domain::Server, "rooms::change");

/// A step from an older layout: deletes the old rows of transactions. They cannot become rows of now, which name devices by
/// numbers, and no client retries a request of before this server was replaced for long.
pub(crate) fn delete_old(_: &dyn Read, _: Option<Bytes>, batch: &mut Batch) -> Result<Option<Bytes>, Fault> {
    OLD.delete_prefix::<()>(batch, ());
    Ok(None)
}

/// The timer that forgets the transactions of a room on a day.
pub(in crate::rooms) fn forget_on(room: RoomNum, day: u32) -> Timer {
    Job::ForgetSent { room, day }.timer(u64::from(day.saturating_add(1 + DAYS_KEPT)) * DAY_MS)
}

/// Forgets the transactions of the room on a day, once no client retries them any more.
pub fn forget(change: &mut Change, day: u32) {
    schema::SENT.delete_prefix::<(RoomNum, u32)>(&mut change.batch, (change.num, day));
    // A clock that was put back would come to this day again, and then needs another timer.
    change.sent_day = None;
}
