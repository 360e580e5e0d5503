//! Typing notifications are kept in memory only: a restart forgets them, and clients are then told that nobody types.
//!
//! Specification: client-server API, "Typing Notifications".

use std::collections::BTreeMap;

use crate::ids::{DeviceNum, RoomNum};

/// Typing is forgotten after this many milliseconds, even if a client asks for longer.
pub const TYPING_MS_MAX: u64 = 120_000;
/// At most this many typists of a room are shown, because each change of one is sent to everybody in the room.
const TYPISTS_MAX: usize = 100;
/// At most this many rooms are remembered; the one that changed longest ago is forgotten first.
const ROOMS_MAX: usize = 10_000;

/// All users who type, by room.
#[derive(Debug, Default)]
pub struct Typing {
    rooms: BTreeMap<RoomNum, Typists>,
    /// The rooms by the number of their last change, to answer what is new since.
    changed: BTreeMap<u64, RoomNum>,
}

#[derive(Debug, Default)]
struct Typists {
    changed: u64,
    /// The users who type, by user id.
    users: BTreeMap<String, Typist>,
}

/// The word of a device that its user types, and until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// The device on which the user types.
    pub device: DeviceNum,
    /// The end of typing, in milliseconds since the epoch.
    pub until_ms: u64,
}

#[derive(Debug)]
struct Typist {
    /// The last word of a device that the user types.
    word: Word,
    /// The number of the change by which typing began.
    began: u64,
}

impl Typing {
    /// Notes that a user types until a time, or (`None`) no longer types on any device. `number` is the number of this change. Tells
    /// whether others see a difference: a user who goes on typing makes none.
    pub fn set(&mut self, room: RoomNum, user_id: &str, word: Option<Word>, number: u64) -> bool {
        let seen = match word {
            Some(word) => {
                let typists = self.rooms.entry(room).or_default();
                if let Some(typist) = typists.users.get_mut(user_id) {
                    typist.word = word;
                    return false;
                }
                if typists.users.len() >= TYPISTS_MAX {
                    tracing::debug!(%room, reason = "too many typists", "a typing notification is ignored");
                    return false;
                }
                typists.users.insert(user_id.to_owned(), Typist { word, began: number });
                true
            }
            None => self.rooms.get_mut(&room).is_some_and(|typists| typists.users.remove(user_id).is_some()),
        };
        if seen {
            self.mark(room, number);
        }
        seen
    }

    /// Notes that a user no longer types on a device, as far as its word is still their last one. Tells whether others see a
    /// difference.
    pub fn stop_on(&mut self, room: RoomNum, user_id: &str, device: DeviceNum, number: u64) -> bool {
        let typist = self.rooms.get(&room).and_then(|typists| typists.users.get(user_id));
        typist.is_some_and(|typist| typist.word.device == device) && self.set(room, user_id, None, number)
    }

    /// Forgets the users whose typing has ended. Tells whether there were any.
    pub fn expire(&mut self, room: RoomNum, now_ms: u64, number: u64) -> bool {
        let Some(typists) = self.rooms.get_mut(&room) else { return false };
        let before = typists.users.len();
        typists.users.retain(|_, typist| typist.word.until_ms > now_ms);
        let seen = typists.users.len() != before;
        if seen {
            self.mark(room, number);
        }
        seen
    }

    fn mark(&mut self, room: RoomNum, number: u64) {
        let Some(typists) = self.rooms.get_mut(&room) else { return };
        self.changed.remove(&typists.changed);
        typists.changed = number;
        self.changed.insert(number, room);
        if self.rooms.len() > ROOMS_MAX
            && let Some((_, oldest)) = self.changed.pop_first()
        {
            self.rooms.remove(&oldest);
        }
    }

    /// Lists the rooms in which typists changed after this number.
    pub fn changed_since(&self, number: u64) -> impl Iterator<Item = RoomNum> {
        self.changed
            .range((std::ops::Bound::Excluded(number), std::ops::Bound::Unbounded))
            .map(|(_, room)| *room)
    }

    /// Finds the time until which a user types who began with the change of this number, in milliseconds since the
    /// epoch; `None` if that has ended.
    pub fn until_ms(&self, room: RoomNum, user_id: &str, began: u64) -> Option<u64> {
        let typist = self.rooms.get(&room)?.users.get(user_id)?;
        (typist.began == began).then_some(typist.word.until_ms)
    }

    /// Lists the rooms in which a user types, each with the device on which they do.
    pub fn rooms_of(&self, user_id: &str) -> Vec<(RoomNum, DeviceNum)> {
        let typed =
            |(room, typists): (&RoomNum, &Typists)| Some((*room, typists.users.get(user_id)?.word.device));
        self.rooms.iter().filter_map(typed).collect()
    }

    /// Lists the users who type in a room.
    pub fn list(&self, room: RoomNum) -> Vec<String> {
        self.rooms.get(&room).map(|typists| typists.users.keys().cloned().collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: RoomNum = RoomNum(3);

    fn until(until_ms: u64) -> Option<Word> {
        Some(Word { device: DeviceNum(1), until_ms })
    }

    #[test]
    fn going_on_typing_is_no_news_and_stopping_is() {
        let mut typing = Typing::default();
        assert!(typing.set(ROOM, "@a:x", until(10), 1));
        assert!(!typing.set(ROOM, "@a:x", until(20), 2));
        assert_eq!(typing.changed_since(0).collect::<Vec<_>>(), [ROOM]);
        assert_eq!(typing.changed_since(1).count(), 0);
        assert_eq!((typing.until_ms(ROOM, "@a:x", 1), typing.until_ms(ROOM, "@a:x", 2)), (Some(20), None));
        assert!(!typing.expire(ROOM, 15, 3));
        assert_eq!(typing.list(ROOM), ["@a:x"]);
        assert!(typing.expire(ROOM, 20, 4));
        assert_eq!(typing.changed_since(1).collect::<Vec<_>>(), [ROOM]);
        assert!(typing.list(ROOM).is_empty());
        assert!(!typing.set(ROOM, "@a:x", None, 5));
    }

    #[test]
    fn rooms_and_typists_are_bounded() {
        let mut typing = Typing::default();
        for number in 0..ROOMS_MAX as u64 + 50 {
            typing.set(RoomNum(number), "@a:x", until(10), number + 1);
        }
        assert_eq!(typing.rooms.len(), ROOMS_MAX);
        assert_eq!(typing.changed.len(), ROOMS_MAX);
        for number in 0..TYPISTS_MAX as u64 + 50 {
            typing.set(RoomNum(9_999), &format!("@{number}:x"), until(10), 100_000 + number);
        }
        assert_eq!(typing.list(RoomNum(9_999)).len(), TYPISTS_MAX);
    }
}
