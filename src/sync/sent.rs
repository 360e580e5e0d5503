//! Which members a device has been told of already, so that lazy loading does not tell it again each time.
//! In memory and bounded: what is forgotten is told once more.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use quick_cache::sync::Cache;

use crate::ids::{EventNum, Position, RoomNum, UserNum};

/// Devices times rooms.
const ENTRIES_MAX: usize = 10_000;
/// Members of one room that are remembered for one device.
const MEMBERS_MAX: usize = 300;

type Key = (UserNum, String, RoomNum);

/// By user id: the member event, and the position up to which the answer reached that told it.
type Members = HashMap<String, (EventNum, Position)>;

/// Which members devices have been told of.
pub(crate) struct SentMembers(Cache<Key, Arc<Mutex<Members>>>);

impl Default for SentMembers {
    fn default() -> Self {
        Self(Cache::new(ENTRIES_MAX))
    }
}

impl SentMembers {
    /// Whether the device knows this member event. It does only if it has come back with a token from that answer or
    /// a later one: an answer may have been lost on its way.
    pub(crate) fn knows(&self, key: &Key, user_id: &str, event: EventNum, since: Position) -> bool {
        let Some(members) = self.0.get(key) else { return false };
        let members = members.lock();
        members.get(user_id).is_some_and(|(known, upto)| *known == event && *upto <= since)
    }

    /// The device is told of these members in an answer that reaches up to `upto`.
    pub(crate) fn tell<'a>(
        &self,
        key: &Key,
        told: impl IntoIterator<Item = (&'a str, EventNum)>,
        since: Position,
        upto: Position,
    ) {
        let told: Vec<_> = told.into_iter().collect();
        if told.is_empty() {
            return;
        }
        let members = self.0.get(key).unwrap_or_else(|| {
            let members = Arc::default();
            self.0.insert(key.clone(), Arc::clone(&members));
            members
        });
        let mut members = members.lock();
        for (user_id, event) in told {
            if members.len() >= MEMBERS_MAX && !members.contains_key(user_id) {
                members.clear();
            }
            if members.get(user_id).is_none_or(|(known, at)| *known != event || *at > since) {
                members.insert(user_id.to_owned(), (event, upto));
            }
        }
    }

    /// The device begins anew.
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
        // The same request again: the first answer was lost.
        assert!(!sent.knows(&key, "@a:x", EventNum(1), at(5)));
        assert!(sent.knows(&key, "@a:x", EventNum(1), at(10)));
        assert!(!sent.knows(&key, "@a:x", EventNum(2), at(10)));
        // Telling again what is known does not make it unknown.
        sent.tell(&key, [("@a:x", EventNum(1))], at(10), at(20));
        assert!(sent.knows(&key, "@a:x", EventNum(1), at(10)));
        sent.forget(&key);
        assert!(!sent.knows(&key, "@a:x", EventNum(1), at(10)));
    }
}
