//! The presence of users of other servers, as those servers tell it. All of it is in memory.
//!
//! Our users see a change at most once in each [`TELL_EVERY_MS`], whatever the other server says, and a user of whom nothing is
//! heard for a while is offline: their server may be gone.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use ruma::{OwnedUserId, UserId, presence::PresenceState};

use super::{Change, Presence, ROOMS_MAX, Seen, TELL_EVERY_MS, Whose};
use crate::ids::RoomNum;

/// A user is offline after this many milliseconds without a word; servers say again within half an hour who is online.
pub const SILENT_MS: u64 = 40 * 60_000;
/// The rooms of a user are looked for again after this many milliseconds.
const ROOMS_KEPT_MS: u64 = 10 * 60_000;
/// The board holds at most this many users; those who were not heard of for longest go first.
const ENTRIES_MAX: usize = 50_000;

#[derive(Debug)]
struct Entry {
    /// Their server said this last.
    said: Presence,
    /// When it did, in milliseconds since the epoch.
    heard_ms: u64,
    /// The state and status message that our users were told last.
    told: Seen,
    /// When they were told that, in milliseconds since the epoch.
    told_ms: u64,
    /// The number of the change that told it; zero if nothing was told.
    changed: u64,
    /// Whether a task will tell what was said in the meantime.
    is_due: bool,
    /// The rooms of the user in which we are, rising, and when they were looked for.
    rooms: Arc<[RoomNum]>,
    rooms_ms: u64,
}

/// A word about a user has this consequence.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// Our users see no difference.
    Nothing,
    /// Those in these rooms see one now.
    Now(Arc<[RoomNum]>),
    /// They may see one at this time, in milliseconds since the epoch: then [`Elsewhere::tell_later`] must be called.
    Later(u64),
}

/// The board of the presence of users of other servers.
#[derive(Debug, Default)]
pub struct Elsewhere {
    users: BTreeMap<OwnedUserId, Entry>,
    /// The users by the number of their last change that was told.
    changed: BTreeMap<u64, OwnedUserId>,
    /// Whether a task looks for users of whom nothing is heard any more.
    is_watched: bool,
}

impl Elsewhere {
    /// Whether the rooms of this user must be looked for before anything is said of them.
    pub fn needs_rooms(&self, user_id: &UserId, now_ms: u64) -> bool {
        self.users.get(user_id).is_none_or(|entry| {
            now_ms.saturating_sub(entry.rooms_ms) > ROOMS_KEPT_MS || entry.rooms.is_empty()
        })
    }

    /// A user came into a room of ours, or we came into one in which the user is: those who are there see what is said from now on.
    pub fn came_into(&mut self, user_id: &UserId, room: RoomNum) {
        let Some(entry) = self.users.get_mut(user_id) else { return };
        if let Err(place) = entry.rooms.binary_search(&room)
            && entry.rooms.len() < ROOMS_MAX
        {
            let (before, after) = entry.rooms.split_at(place);
            entry.rooms = before.iter().chain([&room]).chain(after).copied().collect();
        }
    }

    /// The server of a user says this of them. `rooms` are the user's, rising, if they were looked for; a user who is in none is
    /// not remembered. `number` is the number of this change.
    pub fn say(
        &mut self,
        user_id: &UserId,
        said: Presence,
        rooms: Option<Arc<[RoomNum]>>,
        now_ms: u64,
        number: u64,
    ) -> Told {
        if rooms.as_ref().is_some_and(|rooms| rooms.is_empty()) {
            self.forget(user_id);
            return Told::Nothing;
        }
        if !self.users.contains_key(user_id) {
            let Some(rooms) = rooms.clone() else { return Told::Nothing };
            if self.users.len() >= ENTRIES_MAX {
                self.sweep();
            }
            let entry = Entry {
                said: Presence::unknown(),
                heard_ms: now_ms,
                told: (PresenceState::Offline, None),
                told_ms: 0,
                changed: 0,
                is_due: false,
                rooms,
                rooms_ms: now_ms,
            };
            self.users.insert(user_id.to_owned(), entry);
        }
        let Some(entry) = self.users.get_mut(user_id) else { return Told::Nothing };
        (entry.said, entry.heard_ms) = (said, now_ms);
        if let Some(rooms) = rooms {
            (entry.rooms, entry.rooms_ms) = (rooms, now_ms);
        }
        self.settle(user_id, now_ms, number)
    }

    /// The time that [`Told::Later`] named has come.
    pub fn tell_later(&mut self, user_id: &UserId, now_ms: u64, number: u64) -> Told {
        let Some(entry) = self.users.get_mut(user_id) else { return Told::Nothing };
        entry.is_due = false;
        self.settle(user_id, now_ms, number)
    }

    fn settle(&mut self, user_id: &UserId, now_ms: u64, number: u64) -> Told {
        let Some(entry) = self.users.get_mut(user_id) else { return Told::Nothing };
        let seen = (entry.said.state.clone(), entry.said.status_msg.clone());
        if seen == entry.told {
            return Told::Nothing;
        }
        let may_tell_ms = if entry.changed == 0 { 0 } else { entry.told_ms.saturating_add(TELL_EVERY_MS) };
        if may_tell_ms > now_ms {
            let is_new = !std::mem::replace(&mut entry.is_due, true);
            return if is_new { Told::Later(may_tell_ms) } else { Told::Nothing };
        }
        (entry.told, entry.told_ms) = (seen, now_ms);
        let before = std::mem::replace(&mut entry.changed, number);
        self.changed.remove(&before);
        self.changed.insert(number, user_id.to_owned());
        Told::Now(Arc::clone(&entry.rooms))
    }

    /// Whether a task must be started that looks for users of whom nothing is heard any more.
    pub fn begin_watch(&mut self) -> bool {
        !self.users.is_empty() && !std::mem::replace(&mut self.is_watched, true)
    }

    /// Lists the users of whom nothing was heard for [`SILENT_MS`] and who are not offline. If nobody is left who could be, the
    /// watch ends, and the answer is none.
    pub fn list_silent(&mut self, now_ms: u64) -> Option<Vec<OwnedUserId>> {
        let present = self.users.iter().filter(|(_, entry)| entry.said.state != PresenceState::Offline);
        let (mut silent, mut is_any) = (Vec::new(), false);
        for (user_id, entry) in present {
            is_any = true;
            if now_ms.saturating_sub(entry.heard_ms) >= SILENT_MS {
                silent.push(user_id.clone());
            }
        }
        self.is_watched = is_any;
        is_any.then_some(silent)
    }

    /// The presence of a user as our users were told it; none for one who has not been heard of.
    pub fn find(&self, user_id: &UserId) -> Option<Presence> {
        self.users.get(user_id).map(Self::seen)
    }

    fn seen(entry: &Entry) -> Presence {
        let (state, status_msg) = entry.told.clone();
        Presence { state, status_msg, last_active_ms: entry.said.last_active_ms }
    }

    /// Lists the users whose presence changed after this number, the oldest change first.
    pub fn changed_since(&self, known: u64) -> impl Iterator<Item = Change> {
        let changed = self.changed.range((Bound::Excluded(known), Bound::Unbounded));
        changed.filter_map(|(number, user_id)| {
            let entry = self.users.get(user_id)?;
            let (user, rooms) = (Whose::Other(user_id.clone()), Arc::clone(&entry.rooms));
            Some(Change { number: *number, user, presence: Self::seen(entry), profile: None, rooms })
        })
    }

    fn forget(&mut self, user_id: &UserId) {
        if let Some(entry) = self.users.remove(user_id) {
            self.changed.remove(&entry.changed);
        }
    }

    /// Removes a tenth of the users from a full board: those who were not heard of for longest.
    fn sweep(&mut self) {
        let mut order: Vec<_> =
            self.users.iter().map(|(user_id, entry)| (entry.heard_ms, user_id.clone())).collect();
        order.sort_unstable();
        for (_, user_id) in order.into_iter().take(ENTRIES_MAX / 10) {
            self.forget(&user_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bob() -> OwnedUserId {
        "@bob:b.example".try_into().unwrap()
    }

    fn is(state: PresenceState) -> Presence {
        Presence { state, status_msg: None, last_active_ms: 1 }
    }

    fn rooms() -> Option<Arc<[RoomNum]>> {
        Some([RoomNum(1)].into())
    }

    #[test]
    fn those_in_a_room_that_a_user_has_just_come_into_are_told() {
        let mut board = Elsewhere::default();
        board.came_into(&bob(), RoomNum(1));
        board.say(&bob(), is(PresenceState::Online), Some([RoomNum(2)].into()), 0, 1);
        for room in [3, 1, 3, 2] {
            board.came_into(&bob(), RoomNum(room));
        }
        let told = board.say(&bob(), is(PresenceState::Unavailable), None, TELL_EVERY_MS, 2);
        assert_eq!(told, Told::Now([1, 2, 3].map(RoomNum).into()));
    }

    #[test]
    fn a_change_is_told_at_once_and_the_next_one_a_little_later() {
        let mut board = Elsewhere::default();
        assert!(board.needs_rooms(&bob(), 0));
        assert_eq!(board.say(&bob(), is(PresenceState::Online), None, 0, 1), Told::Nothing);
        assert_eq!(board.say(&bob(), is(PresenceState::Online), rooms(), 0, 1), Told::Now(rooms().unwrap()));
        assert!(!board.needs_rooms(&bob(), 1));
        assert_eq!(board.say(&bob(), is(PresenceState::Online), None, 1, 2), Told::Nothing);
        assert_eq!(board.say(&bob(), is(PresenceState::Unavailable), None, 1, 2), Told::Later(TELL_EVERY_MS));
        assert_eq!(board.say(&bob(), is(PresenceState::Offline), None, 2, 2), Told::Nothing);
        assert_eq!(board.find(&bob()).unwrap().state, PresenceState::Online);
        assert_eq!(board.tell_later(&bob(), TELL_EVERY_MS, 2), Told::Now(rooms().unwrap()));
        assert_eq!(board.find(&bob()).unwrap().state, PresenceState::Offline);
        assert_eq!(board.changed_since(0).map(|change| change.number).collect::<Vec<_>>(), [2]);
        assert_eq!(board.changed_since(2).count(), 0);
    }

    #[test]
    fn who_is_in_no_room_is_not_remembered_and_who_falls_silent_is_found() {
        let mut board = Elsewhere::default();
        let nowhere = Some(Arc::from([]));
        assert_eq!(board.say(&bob(), is(PresenceState::Online), nowhere.clone(), 0, 1), Told::Nothing);
        assert!(board.find(&bob()).is_none() && !board.begin_watch());
        board.say(&bob(), is(PresenceState::Online), rooms(), 0, 1);
        assert!(board.begin_watch() && !board.begin_watch());
        assert_eq!(board.list_silent(SILENT_MS - 1), Some(Vec::new()));
        assert_eq!(board.list_silent(SILENT_MS), Some(vec![bob()]));
        board.say(&bob(), is(PresenceState::Offline), None, SILENT_MS, 2);
        assert_eq!(board.list_silent(2 * SILENT_MS), None);
        assert!(board.begin_watch(), "a watch that has ended begins anew");
        board.say(&bob(), is(PresenceState::Online), nowhere, SILENT_MS, 3);
        assert!(board.find(&bob()).is_none());
        assert_eq!(board.changed_since(0).count(), 0);
    }

    #[test]
    fn the_board_is_bounded() {
        let mut board = Elsewhere::default();
        for number in 0..ENTRIES_MAX as u64 + 10 {
            let user_id: OwnedUserId = format!("@u{number}:b.example").as_str().try_into().unwrap();
            board.say(&user_id, is(PresenceState::Online), rooms(), number, number + 1);
        }
        assert!(board.users.len() <= ENTRIES_MAX);
        assert_eq!(board.users.len(), board.changed.len());
    }
}
