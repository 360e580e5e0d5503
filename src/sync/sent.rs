//! Remembers which members a device has been told of, so that lazy loading does not tell them each time. The memory is
//! bounded; a member that was forgotten is told once more.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use quick_cache::sync::Cache;

use crate::ids::{EventNum, Position, RoomNum, UserNum};

/// Remember at most this many pairs of device and room, because each costs memory until it is displaced.
const ENTRIES_MAX: usize = 10_000;
/// Remember at most this many members for one pair of device and room; beyond that, begin anew.
const MEMBERS_MAX: usize = 300;

type Key = (UserNum, String, RoomNum);

/// By user id: the member event, and the position up to which the answer that told it reached.
type Members = HashMap<String, (EventNum, Position)>;

/// The members that devices have been told of, by device and room.
pub(crate) struct SentMembers(Cache<Key, Arc<Mutex<Members>>>);

impl Default for SentMembers {
    fn default() -> Self {
        Self(Cache::new(ENTRIES_MAX))
    }
}

impl SentMembers {
    /// Whether the device knows this member event. It does only after it has come back with a token of that answer or
    /// of a later one, because an answer may be lost on its way.
    pub(crate) fn knows(&self, key: &Key, user_id: &str, event: EventNum, since: Position) -> bool {
        let Some(members) = self.0.get(key) else { return false };
        let members = members.lock();
        members.get(user_id).is_some_and(|(known, upto)| *known == event && *upto <= since)
    }

    /// Remembers that an answer from `since` on, which reaches up to `upto`, tells the device of these members. Members of answers beyond
    /// `since` are forgotten: the device did not get those, or is about to be told what they told in this one.
    pub(crate) fn tell<'a>(
        &self,
        key: &Key,
        told: impl IntoIterator<Item = (&'a str, EventNum)>,
        since: Position,
        upto: Position,
    ) {
        let mut told = told.into_iter().peekable();
        let members = match self.0.get(key) {
            Some(members) => members,
            None if told.peek().is_none() => return,
            None => {
                let members = Arc::default();
                self.0.insert(key.clone(), Arc::clone(&members));
                members
            }
        };
        let mut members = members.lock();
        members.retain(|_, (_, at)| *at <= since);
        for (user_id, event) in told {
            if members.len() >= MEMBERS_MAX && !members.contains_key(user_id) {
                members.clear();
            }
            if members.get(user_id).is_none_or(|(known, _)| *known != event) {
                members.insert(user_id.to_owned(), (event, upto));
            }
        }
    }

    /// Forgets what the device was told of in this room, because it begins anew or has left.
    pub(crate) fn forget(&self, key: &Key) {
        self.0.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_known_once_the_answer_has_arrived() {
        let sent = SentMembers::default();
        let key = (UserNum(1), "D".to_owned(), RoomNum(1));
        let at = |number| Position::new(number).unwrap();
        assert!(!sent.knows(&key, "@a:x", EventNum(1), at(10)));
        sent.tell(&key, [("@a:x", EventNum(1))], at(5), at(10));
        // A repeated request means that the first answer was lost.
        assert!(!sent.knows(&key, "@a:x", EventNum(1), at(5)));
        assert!(sent.knows(&key, "@a:x", EventNum(1), at(10)));
        assert!(!sent.knows(&key, "@a:x", EventNum(2), at(10)));
        // A member that is told again must stay known.
        sent.tell(&key, [("@a:x", EventNum(1))], at(10), at(20));
        assert!(sent.knows(&key, "@a:x", EventNum(1), at(10)));
        // The next answer does not arrive, and the one to the repeated request tells of nobody, or of another one.
        for told in [Vec::new(), vec![("@c:x", EventNum(3))]] {
            sent.tell(&key, [("@b:x", EventNum(2))], at(20), at(30));
            sent.tell(&key, told, at(20), at(40));
            assert!(!sent.knows(&key, "@b:x", EventNum(2), at(40)));
            assert!(sent.knows(&key, "@a:x", EventNum(1), at(40)));
        }
        sent.forget(&key);
        assert!(!sent.knows(&key, "@a:x", EventNum(1), at(10)));
    }

    #[test]
    fn devices_and_their_members_are_bounded_and_what_was_forgotten_is_told_again() {
        let sent = SentMembers::default();
        let (key, at) = (|user| (UserNum(user), "D".to_owned(), RoomNum(1)), Position::new(10).unwrap());
        for user in 0..2 * ENTRIES_MAX as u64 {
            sent.tell(&key(user), [("@a:x", EventNum(1))], Position::ZERO, at);
        }
        assert!(sent.0.len() <= ENTRIES_MAX + ENTRIES_MAX / 100);
        let known =
            (0..2 * ENTRIES_MAX as u64).filter(|user| sent.knows(&key(*user), "@a:x", EventNum(1), at));
        assert!(known.count() <= sent.0.len());
        let users: Vec<_> = (0..=MEMBERS_MAX).map(|number| format!("@{number}:x")).collect();
        let key = key(u64::MAX);
        for user in &users {
            sent.tell(&key, [(&**user, EventNum(1))], Position::ZERO, at);
            assert!(sent.knows(&key, user, EventNum(1), at), "what was told last is known");
        }
        assert!(sent.0.get(&key).unwrap().lock().len() <= MEMBERS_MAX);
        assert!(!sent.knows(&key, &users[0], EventNum(1), at));
    }
}
