//! Who is there. In memory only; a user who has not been heard of is offline.
//!
//! Specification: client-server API, "Presence".

use std::collections::BTreeMap;

use ruma::presence::PresenceState;

use crate::ids::UserNum;

/// Whoever neither polls nor acts for this long is offline.
pub const ONLINE_MS: u64 = 30_000;
/// Whoever was last heard of within this is active.
const ACTIVE_MS: u64 = 60_000;
/// Entries; offline ones without a message go first.
const ENTRIES_MAX: usize = 50_000;
/// A status message, in bytes.
pub const STATUS_BYTES_MAX: usize = 1024;

/// What is known of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    /// There, away or gone.
    pub state: PresenceState,
    /// What the user says about it.
    pub status_msg: Option<String>,
    /// When the user last did something, in milliseconds since the epoch.
    pub last_active_ms: u64,
}

impl Presence {
    /// Whether the user is there and did something lately.
    pub fn is_active(&self, now_ms: u64) -> bool {
        self.state == PresenceState::Online && now_ms.saturating_sub(self.last_active_ms) < ACTIVE_MS
    }

    /// The content of an `m.presence` event, as JSON.
    pub fn content(&self, now_ms: u64) -> serde_json::Value {
        let mut content = serde_json::json!({
            "presence": self.state.as_str(),
            "last_active_ago": now_ms.saturating_sub(self.last_active_ms),
            "currently_active": self.is_active(now_ms),
        });
        if let (Some(message), Some(fields)) = (&self.status_msg, content.as_object_mut()) {
            fields.insert("status_msg".to_owned(), message.as_str().into());
        }
        content
    }
}

#[derive(Debug)]
struct Entry {
    presence: Presence,
    changed: u64,
    polls: u32,
    heard_ms: u64,
    /// Somebody asks [`PresenceBoard::expire`] when it is time.
    watched: bool,
}

/// Everybody's presence.
#[derive(Debug, Default)]
pub struct PresenceBoard {
    users: BTreeMap<UserNum, Entry>,
    /// By the number of its last change, for "what is new since".
    changed: BTreeMap<u64, UserNum>,
}

impl PresenceBoard {
    /// A user says how present they are. `number` is the number of this change. Whether others see a difference.
    pub fn set(
        &mut self,
        user: UserNum,
        state: PresenceState,
        status_msg: Option<String>,
        now_ms: u64,
        number: u64,
    ) -> bool {
        let entry = self.entry(user);
        entry.heard_ms = now_ms;
        let seen = entry.presence.state != state || entry.presence.status_msg != status_msg;
        entry.presence = Presence { state, status_msg, last_active_ms: now_ms };
        if seen {
            self.mark(user, number);
        }
        seen
    }

    /// A poll begins, and says how present its user is. Whether others see a difference.
    pub fn poll_begins(&mut self, user: UserNum, state: PresenceState, now_ms: u64, number: u64) -> bool {
        let entry = self.entry(user);
        entry.polls += 1;
        entry.heard_ms = now_ms;
        if state == PresenceState::Online {
            entry.presence.last_active_ms = now_ms;
        }
        let seen = entry.presence.state != state;
        entry.presence.state = state;
        if seen {
            self.mark(user, number);
        }
        seen
    }

    /// A poll ends.
    pub fn poll_ends(&mut self, user: UserNum, now_ms: u64) {
        if let Some(entry) = self.users.get_mut(&user) {
            entry.polls = entry.polls.saturating_sub(1);
            entry.heard_ms = now_ms;
        }
    }

    /// Whether somebody must ask [`PresenceBoard::expire`] from now on: the user is there, and nobody does yet.
    pub fn begin_watch(&mut self, user: UserNum) -> bool {
        let Some(entry) = self.users.get_mut(&user) else { return false };
        entry.presence.state != PresenceState::Offline && !std::mem::replace(&mut entry.watched, true)
    }

    /// Whoever has not been heard of for [`ONLINE_MS`] is offline. Answers whether that is a difference, and when to
    /// ask again (milliseconds since the epoch): never, once the user is offline.
    pub fn expire(&mut self, user: UserNum, now_ms: u64, number: u64) -> (bool, Option<u64>) {
        let Some(entry) = self.users.get_mut(&user) else { return (false, None) };
        if entry.presence.state == PresenceState::Offline {
            entry.watched = false;
            return (false, None);
        }
        let due_ms = entry.heard_ms.saturating_add(ONLINE_MS);
        if entry.polls > 0 {
            return (false, Some(now_ms.saturating_add(ONLINE_MS)));
        }
        if due_ms > now_ms {
            return (false, Some(due_ms));
        }
        entry.presence.state = PresenceState::Offline;
        entry.watched = false;
        self.mark(user, number);
        (true, None)
    }

    fn entry(&mut self, user: UserNum) -> &mut Entry {
        if self.users.len() >= ENTRIES_MAX && !self.users.contains_key(&user) {
            self.sweep();
        }
        self.users.entry(user).or_insert_with(|| Entry {
            presence: Presence { state: PresenceState::Offline, status_msg: None, last_active_ms: 0 },
            changed: 0,
            polls: 0,
            heard_ms: 0,
            watched: false,
        })
    }

    /// Makes room: the longest unchanged tenth goes, those without polls first.
    fn sweep(&mut self) {
        let idle =
            self.changed.values().filter(|user| self.users.get(user).is_some_and(|entry| entry.polls == 0));
        let gone: Vec<_> = idle.take(ENTRIES_MAX / 10).copied().collect();
        for user in gone {
            if let Some(entry) = self.users.remove(&user) {
                self.changed.remove(&entry.changed);
            }
        }
    }

    fn mark(&mut self, user: UserNum, number: u64) {
        if let Some(entry) = self.users.get_mut(&user) {
            self.changed.remove(&entry.changed);
            entry.changed = number;
            self.changed.insert(number, user);
        }
    }

    /// What is known of a user.
    pub fn find(&self, user: UserNum) -> Option<Presence> {
        self.users.get(&user).map(|entry| entry.presence.clone())
    }

    /// Whose presence changed after this number, the oldest change first.
    pub fn changed_since(&self, number: u64) -> impl Iterator<Item = (UserNum, &Presence)> {
        let changed = self.changed.range((std::ops::Bound::Excluded(number), std::ops::Bound::Unbounded));
        changed.filter_map(|(_, user)| Some((*user, &self.users.get(user)?.presence)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: UserNum = UserNum(1);

    #[test]
    fn a_poll_makes_a_user_online_until_it_is_over_for_a_while() {
        let mut board = PresenceBoard::default();
        assert!(board.poll_begins(ALICE, PresenceState::Online, 1_000, 1));
        assert!(board.begin_watch(ALICE) && !board.begin_watch(ALICE));
        assert_eq!(board.expire(ALICE, 500_000, 2), (false, Some(530_000)));
        board.poll_ends(ALICE, 500_000);
        assert!(!board.poll_begins(ALICE, PresenceState::Online, 501_000, 2));
        board.poll_ends(ALICE, 502_000);
        assert_eq!(board.expire(ALICE, 510_000, 3), (false, Some(532_000)));
        assert_eq!(board.expire(ALICE, 532_000, 3), (true, None));
        let changes: Vec<_> =
            board.changed_since(1).map(|(user, presence)| (user, presence.state.clone())).collect();
        assert_eq!(changes, [(ALICE, PresenceState::Offline)]);
        assert!(!board.begin_watch(ALICE));
        board.poll_begins(ALICE, PresenceState::Online, 600_000, 4);
        assert!(board.begin_watch(ALICE));
    }

    #[test]
    fn the_content_says_how_long_ago() {
        let mut board = PresenceBoard::default();
        assert!(board.set(ALICE, PresenceState::Online, Some("here".into()), 1_000, 1));
        assert!(!board.set(ALICE, PresenceState::Online, Some("here".into()), 2_000, 2));
        let content = board.find(ALICE).unwrap().content(2_500);
        let expected = serde_json::json!({
            "presence": "online", "status_msg": "here", "last_active_ago": 500, "currently_active": true,
        });
        assert_eq!(content, expected);
    }

    #[test]
    fn entries_are_bounded() {
        let mut board = PresenceBoard::default();
        for number in 0..ENTRIES_MAX as u64 + 10 {
            board.set(UserNum(number), PresenceState::Online, None, 1, number + 1);
        }
        assert!(board.users.len() <= ENTRIES_MAX);
        assert_eq!(board.users.len(), board.changed.len());
    }
}
