//! The floor of a lane is the place up to which a user has read it. It follows from receipts, from events that the user sent,
//! and from the moment at which the user joined.
//!
//! Specification: client-server API, "Receiving notifications: marking notifications as read".

use std::collections::BTreeMap;

use ruma::UserId;

use crate::{
    ids::{Order, Position, RoomNum, UserNum},
    rooms::{event, receipts, visibility::Sight},
    schema,
    schema::{push::Lane, rooms::RoomRow},
    store::{Fault, Read},
};

/// The places up to which a user has read the lanes of a room. A lane is looked up when it is first asked for.
pub(crate) struct Floors<'a> {
    room: RoomNum,
    row: &'a RoomRow,
    user: UserNum,
    user_id: &'a UserId,
    /// The user's sight, once a thread was met.
    sight: Option<Sight>,
    /// The lanes in which the user finds the events of a thread, for threads that were looked up.
    shown: BTreeMap<Lane, Lane>,
    /// Every lane is read at least up to here.
    base: Order,
    lanes: BTreeMap<Lane, Order>,
    /// The place up to which the user has read outside threads, if they sent nothing there.
    main_receipt: Order,
    /// The position at which the newest of the receipts that were looked up was stored.
    receipt_stored: Position,
    /// The newest of the user's own events outside threads.
    sent: Order,
    /// The newest of the user's own events in threads that were looked up.
    sent_in_threads: Order,
}

impl<'a> Floors<'a> {
    /// Looks up the place up to which all lanes are read. Events before `joined`, where the user joined, count as read.
    pub(crate) fn new(
        read: &(impl Read + ?Sized),
        (room, row): (RoomNum, &'a RoomRow),
        (user, user_id): (UserNum, &'a UserId),
        joined: Order,
    ) -> Result<Self, Fault> {
        let everything = receipts::read_up_to(read, room, user_id.as_str(), receipts::NO_THREAD)?;
        Ok(Self {
            room,
            row,
            user,
            user_id,
            sight: None,
            shown: BTreeMap::new(),
            base: everything.order.max(joined),
            lanes: BTreeMap::new(),
            main_receipt: everything.order.max(joined),
            receipt_stored: everything.stored,
            sent: Order::MIN,
            sent_in_threads: Order::MIN,
        })
    }

    /// The number of the room that is read.
    pub(crate) fn room(&self) -> RoomNum {
        self.room
    }

    /// The number of the user who reads.
    pub(crate) fn user(&self) -> UserNum {
        self.user
    }

    /// The place up to which every lane is read.
    pub(crate) fn base(&self) -> Order {
        self.base
    }

    /// The lane in which the user finds the events of this lane; see [`shown_lane`].
    pub(crate) fn shown(&mut self, read: &(impl Read + ?Sized), lane: Lane) -> Result<Lane, Fault> {
        if lane == Lane::MAIN {
            return Ok(lane);
        }
        if let Some(known) = self.shown.get(&lane) {
            return Ok(*known);
        }
        let mut sight = match self.sight.take() {
            Some(sight) => sight,
            None => Sight::of(read, self.room, self.user, self.user_id)?,
        };
        let shown = shown_lane(read, self.room, &mut sight, lane)?;
        self.sight = Some(sight);
        self.shown.insert(lane, shown);
        Ok(shown)
    }

    /// The place up to which this lane is read.
    pub(crate) fn of_lane(&mut self, read: &(impl Read + ?Sized), lane: Lane) -> Result<Order, Fault> {
        if let Some(known) = self.lanes.get(&lane) {
            return Ok(*known);
        }
        let thread = match lane.root() {
            None => Some(receipts::MAIN_THREAD.to_owned()),
            Some(root) => event::find(read, self.room, root)?.map(|root| root.id(self.row).to_string()),
        };
        let mut floor = self.base;
        if let Some(thread) = thread {
            let receipt = receipts::read_up_to(read, self.room, self.user_id.as_str(), &thread)?;
            self.receipt_stored = self.receipt_stored.max(receipt.stored);
            floor = floor.max(receipt.order);
        }
        if lane == Lane::MAIN {
            self.main_receipt = floor;
        }
        if let Some(sent) = schema::UNREAD_SENT.get(read, (self.room, self.user, lane))? {
            let newest = if lane == Lane::MAIN { &mut self.sent } else { &mut self.sent_in_threads };
            *newest = sent.max(*newest);
            floor = floor.max(sent);
        }
        debug_assert!(floor >= self.base, "a lane is read at least as far as everything is");
        self.lanes.insert(lane, floor);
        Ok(floor)
    }

    /// Whether one of the floors that were looked up moved after this position, but for that outside threads where the user only
    /// sent something there.
    pub(crate) fn moved_after(&self, position: Position) -> bool {
        self.receipt_stored > position || self.sent_in_threads > Order::upto(position)
    }

    /// Whether the user sent something outside threads after this position.
    pub(crate) fn sent_after(&self, position: Position) -> bool {
        self.sent > Order::upto(position)
    }

    /// These floors with that outside threads as it would be if the user had sent nothing there above this order.
    pub(crate) fn before_sending(mut self, sent: Order) -> Self {
        self.lanes.insert(Lane::MAIN, self.main_receipt.max(sent));
        self
    }
}

/// The lane in which a user finds the events of a lane. A thread whose root the user may not see counts outside threads, as one
/// does whose root is not there, so that no count says whether an event is there.
pub(crate) fn shown_lane(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    sight: &mut Sight,
    lane: Lane,
) -> Result<Lane, Fault> {
    let Some(root) = lane.root() else { return Ok(lane) };
    let sees = match event::find(read, room, root)? {
        Some(root) => !root.row.header.unseen && sight.can_see(read, &root)?,
        None => false,
    };
    Ok(if sees { lane } else { Lane::MAIN })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::push::unread::tests::{BOB, ROOM, at, bob, put_receipt, room, store_with};

    #[test]
    fn a_floor_is_the_furthest_of_all_that_shows_how_far_a_user_has_read() {
        let (row, bob) = (room(), bob());
        for (everything, main, sent, joined) in
            [(20, 10, 10, 10), (10, 20, 10, 10), (10, 10, 20, 10), (10, 10, 10, 20), (20, 20, 20, 20)]
        {
            let store = store_with(|batch| {
                put_receipt(batch, receipts::NO_THREAD, everything, 50);
                put_receipt(batch, receipts::MAIN_THREAD, main, 60);
                schema::UNREAD_SENT.put(batch, (ROOM, BOB, Lane::MAIN), &at(sent));
            });
            let read = &*store.snapshot();
            let mut floors = Floors::new(read, (ROOM, &row), (BOB, &bob), at(joined)).unwrap();
            assert_eq!(floors.base(), at(everything.max(joined)));
            assert_eq!(floors.of_lane(read, Lane::MAIN).unwrap(), at(20));
            assert_eq!(floors.of_lane(read, Lane::MAIN).unwrap(), at(20), "what was looked up is remembered");
        }
    }

    #[test]
    fn floors_move_with_the_receipt_that_was_stored_last_and_with_what_was_sent_last() {
        let (row, bob) = (room(), bob());
        let moved = |everything: u64, main: u64, sent: u64, position: u64| {
            let store = store_with(|batch| {
                put_receipt(batch, receipts::NO_THREAD, 10, everything);
                put_receipt(batch, receipts::MAIN_THREAD, 10, main);
                schema::UNREAD_SENT.put(batch, (ROOM, BOB, Lane::MAIN), &at(sent));
            });
            let read = &*store.snapshot();
            let mut floors = Floors::new(read, (ROOM, &row), (BOB, &bob), at(1)).unwrap();
            floors.of_lane(read, Lane::MAIN).unwrap();
            let position = Position::new(position).unwrap();
            floors.moved_after(position) || floors.sent_after(position)
        };
        for (everything, main, sent) in [(50, 10, 10), (10, 50, 10), (10, 10, 50)] {
            assert!(moved(everything, main, sent, 49) && !moved(everything, main, sent, 50));
            assert!(!moved(everything, main, sent, 51));
        }
    }
}
