//! The class for which the events of each lane of a room count, where a thread counts for those who subscribe to it (MSC4306).

use std::collections::BTreeMap;

use crate::{
    accounts::subscriptions,
    ids::{RoomNum, UserNum},
    push::classes::Class,
    schema::push::Lane,
    store::{Fault, Read},
};

/// The classes of the lanes of one room for one user. Whether the user subscribes to a thread is read once.
#[derive(Debug)]
pub(crate) struct Lanes {
    class: Class,
    by_subscription: bool,
    subscribed: BTreeMap<Lane, bool>,
}

impl Lanes {
    /// All lanes count for this class.
    pub(crate) fn of(class: Class) -> Self {
        Self { class, by_subscription: false, subscribed: BTreeMap::new() }
    }

    /// Threads count for those who subscribe to them, and everything else for this class.
    pub(crate) fn by_subscription(class: Class) -> Self {
        Self { by_subscription: true, ..Self::of(class) }
    }

    /// Whether nothing counts in any lane.
    pub(crate) fn are_muted(&self) -> bool {
        self.class == Class::Muted
    }

    /// The class for which the events of a lane count.
    pub(crate) fn class(
        &mut self,
        read: &(impl Read + ?Sized),
        of: (UserNum, RoomNum),
        lane: Lane,
    ) -> Result<Class, Fault> {
        if !self.by_subscription || self.are_muted() || lane == Lane::MAIN {
            return Ok(self.class);
        }
        Ok(if self.is_subscribed(read, of, lane)? { Class::Subscribed } else { Class::Mentions })
    }

    /// Whether the user subscribes to a thread.
    pub(crate) fn is_subscribed(
        &mut self,
        read: &(impl Read + ?Sized),
        (user, room): (UserNum, RoomNum),
        lane: Lane,
    ) -> Result<bool, Fault> {
        let Some(root) = lane.root() else { return Ok(false) };
        if let Some(known) = self.subscribed.get(&lane) {
            return Ok(*known);
        }
        let found = subscriptions::find(read, user, room, root)?;
        let is_subscribed = found.is_some_and(|found| found.standing.is_subscribed());
        self.subscribed.insert(lane, is_subscribed);
        Ok(is_subscribed)
    }
}
