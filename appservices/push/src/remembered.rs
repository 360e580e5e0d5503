//! The gateway's memory: notifications that were delivered, so that a homeserver that asks again alerts nobody twice, and those who asked to
//! be left alone for a while. All of it may be lost with the process.

use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::notification::{Device, Notification};

/// Deliveries that are remembered at most: 32 bytes each, and some more for the list.
const DELIVERED_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(49_999);
/// A delivery is remembered for this long; homeservers try for a day at most.
const DELIVERED_MS: u64 = 24 * 3_600_000;
/// Pauses that are remembered at most.
const PAUSES_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9_999);
/// Nobody is left alone for longer than this, whatever they say.
const PAUSE_MS_MAX: u64 = 3_600_000;
/// Hosts whose failures are counted at most.
const HOSTS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(9_999);
/// A host that failed this often without an answer is left alone for a while, so that it takes no places.
const FAILURES_MAX: u32 = 3;
/// A host that does not answer is left alone for this long.
pub(crate) const HOST_PAUSE_MS: u64 = 30_000;

/// Stands for something by its hash, so that no push key is kept in memory longer than its request.
pub(crate) type Mark = [u8; 32];

/// The mark of these parts.
pub(crate) fn mark(parts: &[&[u8]]) -> Mark {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// The mark of an event for a device; none for a notification that is not about an event, which may be sent twice.
pub(crate) fn mark_of(notification: &Notification, device: &Device) -> Option<Mark> {
    let event_id = notification.event_id.as_deref()?;
    let room_id = notification.room_id.as_deref().unwrap_or_default();
    // Two accounts on one device have the same push key, and different data.
    let data = serde_json::to_vec(&device.data).unwrap_or_default();
    let parts = [event_id, room_id, &device.app_id, &device.pushkey].map(str::as_bytes);
    let [event_id, room_id, app_id, pushkey] = parts;
    Some(mark(&[event_id, room_id, app_id, pushkey, &data]))
}

/// The memory of one gateway.
pub(crate) struct Remembered {
    delivered: Mutex<LruCache<Mark, u64>>,
    pauses: Mutex<LruCache<Mark, u64>>,
    hosts: Mutex<LruCache<String, u32>>,
}

impl Default for Remembered {
    fn default() -> Self {
        Self {
            delivered: Mutex::new(LruCache::new(DELIVERED_MAX)),
            pauses: Mutex::new(LruCache::new(PAUSES_MAX)),
            hosts: Mutex::new(LruCache::new(HOSTS_MAX)),
        }
    }
}

impl Remembered {
    /// Notes that this was delivered.
    pub(crate) fn note_delivered(&self, mark: Mark, now_ms: u64) {
        self.delivered.lock().put(mark, now_ms);
    }

    /// Whether this was delivered within the last day. Where the clock went back, it was.
    pub(crate) fn was_delivered(&self, mark: &Mark, now_ms: u64) -> bool {
        let at_ms = self.delivered.lock().peek(mark).copied();
        at_ms.is_some_and(|at_ms| now_ms.saturating_sub(at_ms) < DELIVERED_MS)
    }

    /// Leaves these alone for so many milliseconds, an hour at most.
    pub(crate) fn pause(&self, mark: Mark, now_ms: u64, for_ms: u64) {
        self.pauses.lock().put(mark, now_ms.saturating_add(for_ms.min(PAUSE_MS_MAX)));
    }

    /// For how many milliseconds these are still left alone. A clock that went back ends what seems to last too long.
    pub(crate) fn paused_ms(&self, mark: &Mark, now_ms: u64) -> Option<u64> {
        let mut pauses = self.pauses.lock();
        let left_ms = pauses.peek(mark)?.saturating_sub(now_ms);
        if (1..=PAUSE_MS_MAX).contains(&left_ms) {
            return Some(left_ms);
        }
        pauses.pop(mark);
        None
    }

    /// Notes whether a host answered. True where it failed so often that it is to be left alone.
    pub(crate) fn note_answer(&self, host: &str, has_answered: bool) -> bool {
        let mut hosts = self.hosts.lock();
        if has_answered {
            hosts.pop(host);
            return false;
        }
        let failures = hosts.get(host).copied().unwrap_or(0).saturating_add(1);
        hosts.put(host.to_owned(), failures);
        failures >= FAILURES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_end_and_are_bounded() {
        let it = Remembered::default();
        let who = mark(&[b"a"]);
        assert_eq!(it.paused_ms(&who, 1_000), None);
        it.pause(who, 1_000, 500);
        assert_eq!(it.paused_ms(&who, 1_200), Some(300));
        assert_eq!(it.paused_ms(&mark(&[b"b"]), 1_200), None);
        assert_eq!(it.paused_ms(&who, 1_500), None);
        it.pause(who, 0, u64::MAX);
        assert_eq!(it.paused_ms(&who, 0), Some(PAUSE_MS_MAX));
        it.pause(who, 10 * PAUSE_MS_MAX, 500);
        assert_eq!(it.paused_ms(&who, 0), None, "the clock went back");
    }

    #[test]
    fn deliveries_are_forgotten_after_a_day() {
        let it = Remembered::default();
        let what = mark(&[b"a", b"b"]);
        assert_ne!(what, mark(&[b"ab", b""]));
        it.note_delivered(what, 5);
        assert!(it.was_delivered(&what, 4) && it.was_delivered(&what, DELIVERED_MS));
        assert!(!it.was_delivered(&what, DELIVERED_MS + 5));
    }

    #[test]
    fn a_host_is_left_alone_after_failures_in_a_row() {
        let it = Remembered::default();
        assert!(!it.note_answer("h", false) && !it.note_answer("h", false));
        assert!(!it.note_answer("h", true));
        assert!(!it.note_answer("h", false) && !it.note_answer("h", false));
        assert!(it.note_answer("h", false));
    }
}
