//! The gateway's memory: notifications that were delivered, so that a homeserver that asks again alerts nobody twice; those who asked to
//! be left alone for a while; and who had which failures. All of it may be lost with the process.
//!
//! A failure counts against what failed and who chose it: a port that does not answer is a port that does not answer, and says nothing about
//! others of its host; and whoever named it is stopped first. For all it counts only where several sites had it, and nobody an answer in between.

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

pub(crate) use crate::kept::Mark;
use crate::{
    kept::Kept,
    notification::{Device, Notification},
    payer::Site,
};

/// Deliveries that are remembered at most, with some 200 bytes for each.
const DELIVERED_MAX: usize = 50_000;
/// A delivery is remembered for this long; homeservers try for a day at most.
const DELIVERED_MS: u64 = 24 * 3_600_000;
/// Pauses, hosts that fail, and accounts of refused devices that are remembered at most, each for itself.
const OTHERS_MAX: usize = 10_000;
/// Nobody is left alone for longer than this, whatever they say.
const PAUSE_MS_MAX: u64 = 3_600_000;
/// A host and port that failed this often without an answer is left alone for a while, so that it takes no places: for one site after as many
/// failures in a row, and for all where as many sites had one.
const FAILURES_MAX: usize = 3;
/// A host and port that does not answer is left alone for this long.
const HOST_PAUSE_MS: u64 = 30_000;
/// At most this many devices of a site that a provider of the operator's does not know may be asked for at once.
const REFUSED_MAX: u64 = 1_000;
/// One more device may be refused after this time. Each that is reached makes up for one that was refused, too.
const REFUSED_MS: u64 = 200;
/// Refusals of deliveries that were under way together count for at most this many beyond the bound.
const REFUSED_BEYOND_MAX: u64 = 1_000;

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
    delivered: Mutex<Kept<u64>>,
    pauses: Mutex<Kept<u64>>,
    hosts: Mutex<Hosts>,
    /// How much each site has used up of the refusals that it may have, as the time in milliseconds at which nothing of it is used up.
    refused: Mutex<Kept<u64>>,
    /// Devices that a provider of the operator's has reached: nobody made their push keys up.
    reached: Mutex<Kept<()>>,
}

/// Hosts and ports that do not answer.
struct Hosts {
    /// The failures in a row of one site with one of them.
    of_site: Kept<Failing<usize>>,
    /// The sites that failed to reach one of them since anybody last did.
    of_all: Kept<Failing<Vec<Site>>>,
}

struct Failing<C> {
    counted: C,
    paused_until_ms: u64,
}

impl Default for Remembered {
    fn default() -> Self {
        Self {
            delivered: Mutex::new(Kept::new(DELIVERED_MAX)),
            pauses: Mutex::new(Kept::new(OTHERS_MAX)),
            hosts: Mutex::new(Hosts { of_site: Kept::new(OTHERS_MAX), of_all: Kept::new(OTHERS_MAX) }),
            refused: Mutex::new(Kept::new(OTHERS_MAX)),
            reached: Mutex::new(Kept::new(DELIVERED_MAX)),
        }
    }
}

/// For how many milliseconds a time is still to come. A clock that went back ends what seems to last too long.
fn left_ms(until_ms: u64, now_ms: u64) -> Option<u64> {
    let left_ms = until_ms.saturating_sub(now_ms);
    (1..=PAUSE_MS_MAX).contains(&left_ms).then_some(left_ms)
}

/// The marks of a host and port: for one site, and for all.
fn marks_of(site: Site, host: &str, port: u16) -> (Mark, Mark) {
    let port = port.to_be_bytes();
    (mark(&[&site.bytes(), host.as_bytes(), &port]), mark(&[host.as_bytes(), &port]))
}

impl Remembered {
    /// Notes that this was delivered.
    pub(crate) fn note_delivered(&self, site: Site, mark: Mark, now_ms: u64) {
        self.delivered.lock().put(site, mark, now_ms);
    }

    /// Whether this was delivered within the last day. Where the clock went back, it was.
    pub(crate) fn was_delivered(&self, mark: &Mark, now_ms: u64) -> bool {
        let at_ms = self.delivered.lock().find(mark).copied();
        at_ms.is_some_and(|at_ms| now_ms.saturating_sub(at_ms) < DELIVERED_MS)
    }

    /// Leaves a device alone for so many milliseconds, an hour at most, as its provider asked of this site.
    pub(crate) fn pause(&self, site: Site, device: Mark, now_ms: u64, for_ms: u64) {
        self.pauses.lock().put(site, device, now_ms.saturating_add(for_ms.min(PAUSE_MS_MAX)));
    }

    /// For how many milliseconds a device is still left alone.
    pub(crate) fn paused_ms(&self, device: &Mark, now_ms: u64) -> Option<u64> {
        let mut pauses = self.pauses.lock();
        let left_ms = left_ms(*pauses.find(device)?, now_ms);
        if left_ms.is_none() {
            pauses.forget(device);
        }
        left_ms
    }

    /// Notes that a host and port answered this site, or did not.
    pub(crate) fn note_answer(&self, site: Site, host: &str, port: u16, has_answered: bool, now_ms: u64) {
        let (of_site, of_all) = marks_of(site, host, port);
        let mut hosts = self.hosts.lock();
        let own = hosts.of_site.forget(&of_site);
        let all = hosts.of_all.forget(&of_all);
        if has_answered {
            return;
        }
        let until_ms = now_ms.saturating_add(HOST_PAUSE_MS);
        let mut own = own.unwrap_or(Failing { counted: 0, paused_until_ms: 0 });
        own.counted = own.counted.saturating_add(1);
        if own.counted >= FAILURES_MAX {
            own.paused_until_ms = until_ms;
        }
        hosts.of_site.put(site, of_site, own);
        let mut all = all.unwrap_or(Failing { counted: Vec::new(), paused_until_ms: 0 });
        if !all.counted.contains(&site) && all.counted.len() < FAILURES_MAX {
            all.counted.push(site);
        }
        if all.counted.len() >= FAILURES_MAX {
            all.paused_until_ms = until_ms;
        }
        hosts.of_all.put(site, of_all, all);
    }

    /// For how many milliseconds a host and port is still left alone, by this site or by all.
    pub(crate) fn host_paused_ms(&self, site: Site, host: &str, port: u16, now_ms: u64) -> Option<u64> {
        let (of_site, of_all) = marks_of(site, host, port);
        let hosts = self.hosts.lock();
        let own = hosts.of_site.find(&of_site).and_then(|it| left_ms(it.paused_until_ms, now_ms));
        let all = hosts.of_all.find(&of_all).and_then(|it| left_ms(it.paused_until_ms, now_ms));
        own.max(all)
    }

    /// Notes that the operator's provider of an app took a message for a device of this site, or does not know the device.
    pub(crate) fn note_device(&self, site: Site, app: usize, device: Mark, was_reached: bool, now_ms: u64) {
        if was_reached {
            self.reached.lock().put(site, device, ());
        } else {
            self.reached.lock().forget(&device);
        }
        let account = account_of(site, app);
        let mut refused = self.refused.lock();
        let full_ms = refused.find(&account).copied().unwrap_or(0);
        // A clock that went back would have somebody wait for it to come forward again.
        let most_ms = now_ms.saturating_add((REFUSED_MAX + REFUSED_BEYOND_MAX) * REFUSED_MS);
        let full_ms = if full_ms > most_ms { now_ms } else { full_ms.max(now_ms) };
        match was_reached {
            true if full_ms.saturating_sub(REFUSED_MS) <= now_ms => drop(refused.forget(&account)),
            true => refused.put(site, account, full_ms - REFUSED_MS),
            false => refused.put(site, account, full_ms.saturating_add(REFUSED_MS).min(most_ms)),
        }
    }

    /// For how many milliseconds an app is not asked for this device of this site, because its provider did not know too many of the site's
    /// devices. One that was reached before is always asked for, whatever else its homeserver sends.
    pub(crate) fn refused_ms(&self, site: Site, app: usize, device: &Mark, now_ms: u64) -> Option<u64> {
        if self.reached.lock().find(device).is_some() {
            return None;
        }
        let full_ms = self.refused.lock().find(&account_of(site, app)).copied()?;
        left_ms(full_ms.saturating_sub(REFUSED_MAX * REFUSED_MS), now_ms)
    }
}

fn account_of(site: Site, app: usize) -> Mark {
    mark(&[b"refused", &site.bytes(), &app.to_be_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payer::Payer;

    fn site(number: u8) -> Site {
        Payer::of([192, 0, 2, number].into()).site()
    }

    #[test]
    fn pauses_end_and_are_bounded() {
        let it = Remembered::default();
        let who = mark(&[b"a"]);
        assert_eq!(it.paused_ms(&who, 1_000), None);
        it.pause(site(1), who, 1_000, 500);
        assert_eq!(it.paused_ms(&who, 1_200), Some(300));
        assert_eq!(it.paused_ms(&mark(&[b"b"]), 1_200), None);
        assert_eq!(it.paused_ms(&who, 1_500), None);
        it.pause(site(1), who, 0, u64::MAX);
        assert_eq!(it.paused_ms(&who, 0), Some(PAUSE_MS_MAX));
        it.pause(site(1), who, 10 * PAUSE_MS_MAX, 500);
        assert_eq!(it.paused_ms(&who, 0), None, "the clock went back");
    }

    #[test]
    fn deliveries_are_forgotten_after_a_day() {
        let it = Remembered::default();
        let what = mark(&[b"a", b"b"]);
        assert_ne!(what, mark(&[b"ab", b""]));
        it.note_delivered(site(1), what, 5);
        assert!(it.was_delivered(&what, 4) && it.was_delivered(&what, DELIVERED_MS));
        assert!(!it.was_delivered(&what, DELIVERED_MS + 5));
    }

    #[test]
    fn nobody_makes_the_gateway_forget_what_others_had_delivered() {
        let it = Remembered::default();
        let what = mark(&[b"a"]);
        it.note_delivered(site(1), what, 5);
        for number in 0..DELIVERED_MAX + 5 {
            it.note_delivered(site(2), mark(&[&number.to_be_bytes()]), 6);
        }
        assert!(it.was_delivered(&what, 7));
    }

    #[test]
    fn a_port_is_left_alone_by_the_site_that_had_failures_there_and_by_nobody_else() {
        let it = Remembered::default();
        let paused = |who: u8, port: u16| it.host_paused_ms(site(who), "h", port, 1_000);
        let fail = |who: u8, port: u16| it.note_answer(site(who), "h", port, false, 1_000);
        fail(1, 444);
        fail(1, 444);
        it.note_answer(site(1), "h", 444, true, 1_000);
        fail(1, 444);
        fail(1, 444);
        assert_eq!(paused(1, 444), None, "an answer in between makes up for all before");
        (0..100).for_each(|_| fail(1, 444));
        assert_eq!(paused(1, 444), Some(HOST_PAUSE_MS));
        assert_eq!((paused(1, 443), paused(2, 444)), (None, None));
        assert_eq!(it.host_paused_ms(site(1), "h", 444, 1_000 + HOST_PAUSE_MS), None);
    }

    #[test]
    fn a_port_that_fails_for_several_sites_is_left_alone_by_all_until_it_answers_one() {
        let it = Remembered::default();
        let paused = |who: u8| it.host_paused_ms(site(who), "h", 443, 1_000).is_some();
        let note = |who: u8, has_answered| it.note_answer(site(who), "h", 443, has_answered, 1_000);
        note(1, false);
        note(2, false);
        note(4, true);
        note(3, false);
        note(1, false);
        assert!(!paused(4));
        note(2, false);
        assert!(paused(4) && paused(1));
        note(4, true);
        assert!(!paused(4) && !paused(3));
    }

    #[test]
    fn whoever_has_few_devices_but_refused_ones_is_slowed_down() {
        let it = Remembered::default();
        let (made_up, well) = (mark(&[b"made up"]), mark(&[b"well"]));
        for _ in 0..REFUSED_MAX {
            assert_eq!(it.refused_ms(site(1), 0, &made_up, 5_000), None);
            it.note_device(site(1), 0, made_up, false, 5_000);
        }
        it.note_device(site(1), 0, made_up, false, 5_000);
        assert_eq!(it.refused_ms(site(1), 0, &made_up, 5_000), Some(REFUSED_MS));
        assert_eq!(
            (it.refused_ms(site(1), 1, &made_up, 5_000), it.refused_ms(site(2), 0, &made_up, 5_000)),
            (None, None)
        );
        assert_eq!(it.refused_ms(site(1), 0, &made_up, 5_000 + REFUSED_MS), None);
        it.note_device(site(1), 0, well, true, 5_000);
        assert_eq!(it.refused_ms(site(1), 0, &made_up, 5_000), None);
        // Those that were under way at the same time are paid for, too, and a device that was reached before is reached all the same.
        (0..500).for_each(|_| it.note_device(site(1), 0, made_up, false, 5_000));
        assert_eq!(it.refused_ms(site(1), 0, &made_up, 5_000), Some(500 * REFUSED_MS));
        assert_eq!(it.refused_ms(site(1), 0, &well, 5_000), None);
        // A large homeserver has many that are gone, and more that are not.
        for _ in 0..10 * REFUSED_MAX {
            it.note_device(site(2), 0, made_up, false, 5_000);
            it.note_device(site(2), 0, well, true, 5_000);
        }
        assert_eq!(it.refused_ms(site(2), 0, &made_up, 5_000), None);
        it.note_device(site(3), 0, made_up, false, 1_000_000_000);
        it.note_device(site(3), 0, made_up, false, 5_000);
        assert_eq!(it.refused_ms(site(3), 0, &made_up, 5_000), None, "the clock went back");
    }
}
