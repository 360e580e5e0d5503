//! Wakes the polls of a user. There is one generation counter for each user who waits, and nothing for each room or
//! poll.
//!
//! A poll subscribes before it looks, so that nothing happens unseen between the two. An entry lives as long as
//! somebody waits, so that there are never more entries than open requests.
//!
//! The users whom a flush concerns are gathered first and woken once, even if a hundred of its events concern them.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering, fence},
    },
};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::ids::UserNum;

/// The waiting users are spread over this many locks, so that waking many of them delays others only briefly.
const SHARDS: usize = 16;

type Waiters = HashMap<UserNum, watch::Sender<u64>>;

/// Wakes the polls of users. A clone is cheap.
#[derive(Clone, Debug, Default)]
pub struct Notifier(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    shards: [Mutex<Waiters>; SHARDS],
    /// The number of users who wait, so that a publisher without listeners does nothing.
    waiting: AtomicUsize,
    /// The lists of users whom the batches of the current flush concern.
    gathered: Mutex<Vec<Arc<[UserNum]>>>,
}

impl Inner {
    fn shard(&self, user: UserNum) -> Option<&Mutex<Waiters>> {
        self.shards.get(user.0 as usize % SHARDS)
    }
}

impl Notifier {
    /// Makes a notifier on which nobody waits yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins a subscription, which resolves ([`Subscription::woken`]) for each wake of this user from here on.
    pub fn subscribe(&self, user: UserNum) -> Subscription {
        let wakes = self.0.shard(user).map(|shard| {
            let mut waiters = shard.lock();
            let waiter = waiters.entry(user).or_insert_with(|| {
                self.0.waiting.fetch_add(1, Ordering::Relaxed);
                watch::Sender::new(0)
            });
            waiter.subscribe()
        });
        // The fence pairs with that of `waiting_count`: either this poll's snapshot holds what is being published, or
        // the publisher counts this poll and wakes it.
        fence(Ordering::SeqCst);
        Subscription { notifier: self.clone(), user, wakes }
    }

    /// Wakes this user, for whom something is new.
    pub fn wake_user(&self, user: UserNum) {
        if let Some(shard) = self.0.shard(user)
            && let Some(waiter) = shard.lock().get(&user)
        {
            waiter.send_modify(|generation| *generation = generation.wrapping_add(1));
        }
    }

    /// Wakes these users, for whom something is new.
    pub fn wake_users(&self, users: impl IntoIterator<Item = UserNum>) {
        for user in users {
            self.wake_user(user);
        }
    }

    /// Notes users (rising) for whom something is published; the next [`Notifier::wake_gathered`] wakes them.
    pub fn gather(&self, users: Arc<[UserNum]>) {
        if self.waiting_count() == 0 {
            return;
        }
        let mut gathered = self.0.gathered.lock();
        // Successive events of one room mostly concern the same list of users, which is kept once.
        if gathered.last().is_none_or(|last| !Arc::ptr_eq(last, &users)) {
            gathered.push(users);
        }
    }

    /// Wakes each user whom the flush concerned, once. The flusher calls it after each flush.
    pub fn wake_gathered(&self) {
        let mut gathered = std::mem::take(&mut *self.0.gathered.lock());
        gathered.sort_unstable_by_key(|users| Arc::as_ptr(users).addr());
        gathered.dedup_by(|a, b| Arc::ptr_eq(a, b));
        // In large rooms hardly anybody waits, so that going through those who wait costs less.
        if gathered.iter().map(|users| users.len()).sum::<usize>() > self.waiting_count() {
            self.wake_waiting(|user| gathered.iter().any(|users| users.binary_search(&user).is_ok()));
        } else {
            let mut users: Vec<UserNum> = gathered.iter().flat_map(|users| users.iter().copied()).collect();
            users.sort_unstable();
            users.dedup();
            self.wake_users(users);
        }
    }

    /// Wakes those who wait now and whom the news concerns. It is for news that concern more users than wait.
    pub fn wake_waiting(&self, concerned: impl Fn(UserNum) -> bool) {
        for shard in &self.0.shards {
            for (user, waiter) in shard.lock().iter() {
                if concerned(*user) {
                    waiter.send_modify(|generation| *generation = generation.wrapping_add(1));
                }
            }
        }
    }

    /// Lists the users who wait now. If it is asked for after publishing, it names everybody who has not seen what was
    /// published.
    pub fn list_waiting(&self) -> BTreeSet<UserNum> {
        fence(Ordering::SeqCst);
        self.0.shards.iter().flat_map(|shard| shard.lock().keys().copied().collect::<Vec<_>>()).collect()
    }

    /// The number of users who wait. If it is asked for after publishing, it counts everybody who has not seen what was
    /// published.
    pub fn waiting_count(&self) -> usize {
        fence(Ordering::SeqCst);
        self.0.waiting.load(Ordering::Relaxed)
    }
}

/// The subscription of one poll to the wakes of its user.
#[derive(Debug)]
pub struct Subscription {
    notifier: Notifier,
    user: UserNum,
    wakes: Option<watch::Receiver<u64>>,
}

impl Subscription {
    /// Resolves once the user has been woken since the subscription began, or since this last resolved.
    pub async fn woken(&mut self) {
        let Some(wakes) = &mut self.wakes else { return std::future::pending().await };
        if wakes.changed().await.is_err() {
            // The sender stays in the map while this subscription lives, so this branch is never taken.
            std::future::pending().await
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let Some(shard) = self.notifier.0.shard(self.user) else { return };
        let mut waiters = shard.lock();
        // The receiver is dropped under the lock, so that nobody subscribes between the count and the removal.
        self.wakes = None;
        if waiters.get(&self.user).is_some_and(|waiter| waiter.receiver_count() == 0) {
            waiters.remove(&self.user);
            self.notifier.0.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ALICE: UserNum = UserNum(1);
    const BOB: UserNum = UserNum(17);

    #[tokio::test(start_paused = true)]
    async fn a_wake_between_subscribing_and_waiting_is_not_lost() {
        let notifier = Notifier::new();
        let mut waiting = notifier.subscribe(ALICE);
        notifier.wake_user(ALICE);
        tokio::time::timeout(Duration::from_secs(1), waiting.woken()).await.unwrap();
        // One wake must resolve the subscription once only.
        assert!(tokio::time::timeout(Duration::from_secs(1), waiting.woken()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn only_those_concerned_are_woken() {
        let notifier = Notifier::new();
        let (mut alice, mut bob) = (notifier.subscribe(ALICE), notifier.subscribe(BOB));
        notifier.wake_waiting(|user| user == BOB);
        tokio::time::timeout(Duration::from_secs(1), bob.woken()).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(1), alice.woken()).await.is_err());
        notifier.wake_users([ALICE, UserNum(5)]);
        tokio::time::timeout(Duration::from_secs(1), alice.woken()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_flush_publishes_wakes_each_user_once() {
        let notifier = Notifier::new();
        let room: Arc<[UserNum]> = [ALICE, UserNum(3), BOB].into();
        // Nobody waits yet, so that nothing is kept.
        notifier.gather(Arc::clone(&room));
        let (mut alice, mut bob) = (notifier.subscribe(ALICE), notifier.subscribe(BOB));
        notifier.wake_gathered();
        assert!(tokio::time::timeout(Duration::from_secs(1), alice.woken()).await.is_err());
        for _ in 0..3 {
            notifier.gather(Arc::clone(&room));
            notifier.gather([ALICE].into());
        }
        assert!(tokio::time::timeout(Duration::from_secs(1), alice.woken()).await.is_err());
        notifier.wake_gathered();
        tokio::time::timeout(Duration::from_secs(1), alice.woken()).await.unwrap();
        tokio::time::timeout(Duration::from_secs(1), bob.woken()).await.unwrap();
        notifier.wake_gathered();
        assert!(tokio::time::timeout(Duration::from_secs(1), alice.woken()).await.is_err());
    }

    #[tokio::test]
    async fn entries_vanish_when_nobody_waits() {
        let notifier = Notifier::new();
        let (first, second) = (notifier.subscribe(ALICE), notifier.subscribe(ALICE));
        assert_eq!(notifier.waiting_count(), 1);
        drop(first);
        assert_eq!(notifier.waiting_count(), 1);
        drop(second);
        assert_eq!(notifier.waiting_count(), 0);
        notifier.wake_user(ALICE);
        assert_eq!(notifier.waiting_count(), 0);
    }
}
