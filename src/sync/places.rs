//! The places in which polls of a device wait. A device has few of them, so that a client that forgets its polls does not make
//! each event cost as many answers as it has forgotten; the newest polls have the places.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;

use crate::{
    env::hold::{Hold, Kept, hold},
    ids::{DeviceNum, UserNum},
};

/// At most this many polls of one device wait at once. A client needs one, and a second while it gives up the first.
const PLACES: usize = 4;

type Key = (UserNum, DeviceNum);

/// The places of all devices. A device without polls is not in here.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    /// The polls of each device, the oldest first, each by its number.
    polls: HashMap<Key, VecDeque<(u64, Kept)>>,
    next_number: u64,
}

/// The place of one poll, which is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    key: Key,
    number: u64,
    hold: Hold,
}

impl Places {
    /// Takes a place for a poll of this device. If the device has no free one, the oldest poll loses its own.
    pub(super) fn take(&self, user: UserNum, device: DeviceNum) -> Place {
        let key = (user, device);
        let (kept, hold) = hold();
        let mut taken = self.0.lock();
        taken.next_number += 1;
        let number = taken.next_number;
        let polls = taken.polls.entry(key).or_default();
        polls.push_back((number, kept));
        if polls.len() > PLACES {
            // The poll learns it, because the other half of its hold is dropped.
            polls.pop_front();
        }
        debug_assert!(polls.len() <= PLACES, "a device has few places");
        Place { places: self.clone(), key, number, hold }
    }
}

impl Place {
    /// Resolves when the place was given to a newer poll.
    pub(super) async fn lost(&mut self) {
        self.hold.lost().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock();
        let Some(polls) = taken.polls.get_mut(&self.key) else { return };
        polls.retain(|(number, _)| *number != self.number);
        if polls.is_empty() {
            taken.polls.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn the_newest_polls_of_a_device_have_the_places() {
        let places = Places::default();
        let take = |device: u32| places.take(UserNum(1), DeviceNum(device));
        let mut other = take(2);
        let mut polls: Vec<Place> = (0..10).map(|_| take(1)).collect();
        let lost: Vec<bool> = polls.iter_mut().map(|poll| poll.lost().now_or_never().is_some()).collect();
        assert_eq!(lost, [true, true, true, true, true, true, false, false, false, false]);
        assert!(other.lost().now_or_never().is_none(), "each device has places of its own");
        drop(polls.split_off(8));
        polls.extend([take(1), take(1)]);
        assert!(polls[6].lost().now_or_never().is_none(), "places that polls left are free");
        drop((polls, other));
        assert!(places.0.lock().polls.is_empty());
    }
}
