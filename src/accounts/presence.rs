//! Presence: who is online, idle or gone. A user who has not been heard of is offline. All of it is in memory, and a note keeps
//! what others were told last ([`kept`]).
//!
//! Each device says how present its user is, and the most present device wins: a phone in a pocket does not make somebody
//! idle who types at a desk. The state that others see changes at most once in each [`TELL_EVERY_MS`], so that a client that
//! changes it all the time costs others little; a change that was held back is told when that time is over.
//!
//! Specification: client-server API, "Presence".

pub mod elsewhere;
pub mod kept;

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use ruma::{OwnedUserId, presence::PresenceState};
use serde_json::{Map, Value};

use crate::ids::{DeviceNum, RoomNum, UserNum};

/// A device that neither polls nor acts for this many milliseconds is gone.
pub const ONLINE_MS: u64 = 30_000;
/// A user who has done nothing for this many milliseconds is not active.
const ACTIVE_MS: u64 = 60_000;
/// A user who is connected and has done nothing for this many milliseconds is idle: the server says `unavailable` for them.
pub const IDLE_MS: u64 = 5 * 60_000;
/// Others are told of a user's changes at most once in this many milliseconds.
pub const TELL_EVERY_MS: u64 = 3_000;
/// The board holds at most this many users; those who have been offline for longest go first.
const ENTRIES_MAX: usize = 50_000;
/// The board holds at most this many devices of a user; the one that was not heard of for longest goes first.
const DEVICES_MAX: usize = 50;
/// The board remembers at most this many rooms of a user; somebody who shares only other rooms with them is not told.
pub const ROOMS_MAX: usize = 2_000;
/// The number under which the last run of the server stands for the devices of a user until those are heard of; no device
/// has it, because they are numbered from 1.
const LAST_RUN: DeviceNum = DeviceNum(0);
/// A status message has at most this many bytes.
pub const STATUS_BYTES_MAX: usize = 1024;

/// The presence of a user, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    /// The state that others see: online, unavailable or offline.
    pub state: PresenceState,
    /// The status message that the user gave.
    pub status_msg: Option<String>,
    /// When the user last did something, in milliseconds since the epoch; zero if that is not known.
    pub last_active_ms: u64,
}

impl Presence {
    /// The presence of a user who has not been heard of.
    pub fn unknown() -> Self {
        Self { state: PresenceState::Offline, status_msg: None, last_active_ms: 0 }
    }

    /// Whether the user is online and did something lately.
    pub fn is_active(&self, now_ms: u64) -> bool {
        self.state == PresenceState::Online && now_ms.saturating_sub(self.last_active_ms) < ACTIVE_MS
    }

    /// The content of an `m.presence` event, as JSON. It has the fields of `profile` besides, where a new one is told.
    pub fn content(&self, now_ms: u64, profile: Option<&Profile>) -> Value {
        let mut fields = profile.map(|profile| (**profile).clone()).unwrap_or_default();
        fields.insert("presence".to_owned(), self.state.as_str().into());
        if self.last_active_ms > 0 {
            fields.insert("last_active_ago".to_owned(), now_ms.saturating_sub(self.last_active_ms).into());
        }
        if self.state == PresenceState::Online {
            fields.insert("currently_active".to_owned(), self.is_active(now_ms).into());
        }
        if let Some(message) = &self.status_msg {
            fields.insert("status_msg".to_owned(), message.as_str().into());
        }
        Value::Object(fields)
    }
}

/// The fields of a profile that rooms show: the display name and the address of the avatar, as far as the user has them.
pub type Profile = Arc<Map<String, Value>>;

/// The presence of one device: the state that it named, and the times at which it was heard of and used.
#[derive(Debug)]
struct Device {
    /// The state that it named last; to name it again changes nothing.
    said: PresenceState,
    /// The state that counts while it is connected: the one that it named, unless its user acted after that.
    state: PresenceState,
    /// The number of its polls that are open.
    polls: u32,
    /// The time at which it was last heard of, in milliseconds since the epoch.
    heard_ms: u64,
    /// The time at which its user last did something with it, in milliseconds since the epoch.
    active_ms: u64,
}

impl Device {
    fn new(now_ms: u64) -> Self {
        let offline = PresenceState::Offline;
        Self { said: offline.clone(), state: offline, polls: 0, heard_ms: now_ms, active_ms: 0 }
    }

    fn is_connected(&self, now_ms: u64) -> bool {
        self.polls > 0 || now_ms.saturating_sub(self.heard_ms) < ONLINE_MS
    }

    /// How present it makes its user now, and when that changes by itself.
    fn look(&self, now_ms: u64) -> (PresenceState, Option<u64>) {
        if self.state == PresenceState::Offline || !self.is_connected(now_ms) {
            return (PresenceState::Offline, None);
        }
        let gone_ms = if self.polls > 0 { now_ms } else { self.heard_ms }.saturating_add(ONLINE_MS);
        let idle_ms = self.active_ms.saturating_add(IDLE_MS);
        if self.state == PresenceState::Online && idle_ms > now_ms {
            (PresenceState::Online, Some(gone_ms.min(idle_ms)))
        } else {
            (PresenceState::Unavailable, Some(gone_ms))
        }
    }
}

/// Orders states by how present a user is; a higher number is more present.
fn rank(state: &PresenceState) -> u8 {
    match state {
        PresenceState::Online => 2,
        PresenceState::Unavailable => 1,
        _ => 0,
    }
}

/// The state and the status message of a user, as others see them.
type Seen = (PresenceState, Option<String>);

#[derive(Debug)]
struct Entry {
    devices: BTreeMap<DeviceNum, Device>,
    /// The user has one status message, whichever device set it.
    status_msg: Option<String>,
    /// The time at which the user last did something with any device, in milliseconds since the epoch.
    active_ms: u64,
    /// The state and status message that others were told last.
    told: Seen,
    /// The time at which others were told that, in milliseconds since the epoch.
    told_ms: u64,
    /// The number of the change that told it; zero if nothing was told.
    changed: u64,
    /// The user's rooms at the time of that change, at most [`ROOMS_MAX`].
    rooms: Arc<[RoomNum]>,
    /// The last profile that was changed in this run of the server.
    profile: Profile,
    /// Whether others are still to be told of that profile.
    is_renamed: bool,
    /// The number of the change that told it; zero if none did.
    renamed: u64,
    /// The time at which a task looks at this entry again; none where nothing changes unless the user acts.
    watch_ms: Option<u64>,
}

impl Entry {
    fn new() -> Self {
        Self {
            devices: BTreeMap::new(),
            status_msg: None,
            active_ms: 0,
            told: (PresenceState::Offline, None),
            told_ms: 0,
            changed: 0,
            rooms: Arc::default(),
            profile: Profile::default(),
            is_renamed: false,
            renamed: 0,
            watch_ms: None,
        }
    }

    fn device(&mut self, device: DeviceNum, now_ms: u64) -> &mut Device {
        if self.devices.len() >= DEVICES_MAX && !self.devices.contains_key(&device) {
            let silent = |(num, device): (&DeviceNum, &Device)| (device.polls, device.heard_ms, *num);
            if let Some((_, _, oldest)) = self.devices.iter().map(silent).min() {
                self.devices.remove(&oldest);
            }
        }
        self.devices.entry(device).or_insert_with(|| Device::new(now_ms))
    }

    /// A device says how present its user is.
    fn say(&mut self, device: DeviceNum, state: PresenceState, now_ms: u64) {
        let own = self.device(device, now_ms);
        (own.said, own.state, own.heard_ms) = (state.clone(), state, now_ms);
        if own.state == PresenceState::Online {
            own.active_ms = now_ms;
            self.active_ms = now_ms;
        }
    }

    /// The state and message that others should see, by the most present device, and when that changes by itself.
    fn look(&self, now_ms: u64) -> (Seen, Option<u64>) {
        let looks = self.devices.values().map(|device| device.look(now_ms));
        let (state, due) = looks.fold((PresenceState::Offline, None), |(state, due), (other, other_due)| {
            let due = [due, other_due].into_iter().flatten().min();
            (if rank(&other) > rank(&state) { other } else { state }, due)
        });
        ((state, self.status_msg.clone()), due)
    }

    /// The time from which others may be told of a difference, in milliseconds since the epoch.
    fn may_tell_ms(&self) -> u64 {
        if self.changed == 0 { 0 } else { self.told_ms.saturating_add(TELL_EVERY_MS) }
    }
}

/// The calls that must follow after a user said, did or ceased to do something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Whether others are to be told: list the user's rooms and call [`PresenceBoard::tell`].
    pub is_due: bool,
    /// The time at which [`PresenceBoard::look_again`] must be called, in milliseconds since the epoch.
    pub watch_ms: Option<u64>,
}

/// The user whose presence it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whose {
    /// One of our users.
    Ours(UserNum),
    /// A user of another server.
    Other(OwnedUserId),
}

/// A change of a user's presence that others may be told of.
#[derive(Clone, Debug)]
pub struct Change {
    /// The number of the change.
    pub number: u64,
    /// The user whose presence changed.
    pub user: Whose,
    /// The presence that others see.
    pub presence: Presence,
    /// The profile, if it is new to one who knows the changes that were asked about.
    pub profile: Option<Profile>,
    /// The user's rooms at that time.
    pub rooms: Arc<[RoomNum]>,
}

/// The board of everybody's presence, in memory.
#[derive(Debug, Default)]
pub struct PresenceBoard {
    users: BTreeMap<UserNum, Entry>,
    /// The users by the number of their last change that was told, so that changes since a number are found in order.
    changed: BTreeMap<u64, UserNum>,
}

impl PresenceBoard {
    /// A user says with a device how present they are.
    pub fn set(
        &mut self,
        user: UserNum,
        device: DeviceNum,
        state: PresenceState,
        status_msg: Option<String>,
        now_ms: u64,
    ) -> Outcome {
        let entry = self.entry(user);
        entry.status_msg = status_msg;
        entry.say(device, state, now_ms);
        self.settle(user, now_ms)
    }

    /// A poll of a device begins, and says how present its user is. It ends with [`PresenceBoard::poll_ends`].
    pub fn poll_begins(
        &mut self,
        user: UserNum,
        device: DeviceNum,
        state: PresenceState,
        now_ms: u64,
    ) -> Outcome {
        let entry = self.entry(user);
        let last_run = entry.devices.get(&LAST_RUN).filter(|last_run| last_run.is_connected(now_ms));
        if let Some(active_ms) = last_run.map(|last_run| last_run.active_ms)
            && !entry.devices.contains_key(&device)
        {
            // The device said this before the server stopped, so that its user did nothing now.
            let own = entry.device(device, now_ms);
            (own.said, own.state, own.active_ms) = (state.clone(), state.clone(), active_ms);
        }
        let own = entry.device(device, now_ms);
        // A client repeats its state with each poll, so the same state again is no act of its user.
        if own.said != state || !own.is_connected(now_ms) {
            entry.say(device, state, now_ms);
        }
        let own = entry.device(device, now_ms);
        own.polls += 1;
        own.heard_ms = now_ms;
        self.settle(user, now_ms)
    }

    /// A poll of a device ends.
    pub fn poll_ends(&mut self, user: UserNum, device: DeviceNum, now_ms: u64) {
        let devices = self.users.get_mut(&user).map(|entry| &mut entry.devices);
        if let Some(own) = devices.and_then(|devices| devices.get_mut(&device)) {
            own.polls = own.polls.saturating_sub(1);
            own.heard_ms = now_ms;
        }
    }

    /// A user did something with a device, and is online by that if the device is connected. A device that said its user is
    /// offline, or never said anything, stays as it is.
    pub fn acts(&mut self, user: UserNum, device: DeviceNum, now_ms: u64) -> Outcome {
        let Some(entry) = self.users.get_mut(&user) else { return Outcome::default() };
        let Some(own) = entry.devices.get_mut(&device) else { return Outcome::default() };
        if own.said == PresenceState::Offline || !own.is_connected(now_ms) {
            return Outcome::default();
        }
        own.state = PresenceState::Online;
        (own.heard_ms, own.active_ms) = (now_ms, now_ms);
        entry.active_ms = now_ms;
        self.settle(user, now_ms)
    }

    /// A user has a new display name or avatar, of which others are told with the user's presence.
    pub fn rename(&mut self, user: UserNum, profile: Profile, now_ms: u64) -> Outcome {
        let entry = self.entry(user);
        (entry.profile, entry.is_renamed) = (profile, true);
        self.settle(user, now_ms)
    }

    /// Others were told this of a user when the last run of the server ended, and go on showing it. It stands until the user is
    /// not heard of for a while, so that a restart does not show everybody as offline.
    pub fn restore(&mut self, user: UserNum, told: Presence, now_ms: u64) -> Outcome {
        let entry = self.entry(user);
        if entry.changed != 0 || !entry.devices.is_empty() {
            return Outcome::default();
        }
        (entry.status_msg, entry.active_ms) = (told.status_msg, told.last_active_ms);
        if told.state != PresenceState::Offline {
            // It is not known how long somebody who was online had been idle; they become idle like one who acted just now.
            let is_online = told.state == PresenceState::Online;
            let active_ms = if is_online { now_ms } else { told.last_active_ms };
            let (said, state) = (told.state.clone(), told.state);
            entry.devices.insert(LAST_RUN, Device { said, state, polls: 0, heard_ms: now_ms, active_ms });
        }
        self.settle(user, now_ms)
    }

    /// The time that [`Outcome::watch_ms`] named has come. `due_ms` is that time: of two tasks that watch one user, only the
    /// one whose time still stands goes on.
    pub fn look_again(&mut self, user: UserNum, due_ms: u64, now_ms: u64) -> Outcome {
        let Some(entry) = self.users.get_mut(&user) else { return Outcome::default() };
        if entry.watch_ms != Some(due_ms) {
            return Outcome::default();
        }
        entry.watch_ms = None;
        self.settle(user, now_ms)
    }

    /// Compares the state that others were told with the present one, and answers the calls that follow.
    fn settle(&mut self, user: UserNum, now_ms: u64) -> Outcome {
        let Some(entry) = self.users.get_mut(&user) else { return Outcome::default() };
        entry
            .devices
            .retain(|_, device| device.is_connected(now_ms) && device.said != PresenceState::Offline);
        let (seen, mut due) = entry.look(now_ms);
        let is_due = if seen == entry.told && !entry.is_renamed {
            false
        } else {
            let may_tell_ms = entry.may_tell_ms();
            if may_tell_ms > now_ms {
                due = Some(due.map_or(may_tell_ms, |due| due.min(may_tell_ms)));
            }
            may_tell_ms <= now_ms
        };
        let is_sooner = due.is_some_and(|due| entry.watch_ms.is_none_or(|watch| due < watch));
        if is_sooner {
            entry.watch_ms = due;
        }
        Outcome { is_due, watch_ms: due.filter(|_| is_sooner) }
    }

    /// Shows others the present state of a user. `rooms` are the user's in rising order: members of one of them may be told.
    /// `number` is the number of this change. Answers whether there was a difference, for another task may have told it.
    pub fn tell(&mut self, user: UserNum, rooms: Arc<[RoomNum]>, now_ms: u64, number: u64) -> bool {
        debug_assert!(rooms.is_sorted(), "rooms are looked for by their order");
        debug_assert!(rooms.len() <= ROOMS_MAX, "the board remembers a bounded number of rooms");
        let Some(entry) = self.users.get_mut(&user) else { return false };
        let (seen, _) = entry.look(now_ms);
        if (seen == entry.told && !entry.is_renamed) || entry.may_tell_ms() > now_ms {
            return false;
        }
        (entry.told, entry.told_ms, entry.rooms) = (seen, now_ms, rooms);
        if std::mem::take(&mut entry.is_renamed) {
            entry.renamed = number;
        }
        let before = std::mem::replace(&mut entry.changed, number);
        self.changed.remove(&before);
        let other = self.changed.insert(number, user);
        debug_assert!(other.is_none(), "each change has a number of its own");
        true
    }

    /// The user came into a room after the last change was told: its members may be shown that change, too. Those who are there
    /// hear of it as of every new member; this is for clients that begin later.
    pub fn came_into(&mut self, user: UserNum, room: RoomNum) {
        let Some(entry) = self.users.get_mut(&user) else { return };
        if let Err(place) = entry.rooms.binary_search(&room)
            && entry.rooms.len() < ROOMS_MAX
        {
            let (before, after) = entry.rooms.split_at(place);
            entry.rooms = before.iter().chain([&room]).chain(after).copied().collect();
        }
    }

    fn entry(&mut self, user: UserNum) -> &mut Entry {
        if self.users.len() >= ENTRIES_MAX && !self.users.contains_key(&user) {
            self.sweep();
        }
        self.users.entry(user).or_insert_with(Entry::new)
    }

    /// Removes a tenth of the users from a full board: those without a connected device first, and of them those whose last
    /// change is the oldest.
    fn sweep(&mut self) {
        let mut order: Vec<_> = self
            .users
            .iter()
            .map(|(user, entry)| (!entry.devices.is_empty(), entry.changed, *user))
            .collect();
        order.sort_unstable();
        for (_, changed, user) in order.into_iter().take(ENTRIES_MAX / 10) {
            self.users.remove(&user);
            self.changed.remove(&changed);
        }
    }

    /// The presence that others see of a user; none for one who has not been heard of.
    pub fn find(&self, user: UserNum) -> Option<Presence> {
        self.users.get(&user).map(Self::seen)
    }

    /// The presence of a user as it is now, which others are told in a moment; none for one who has not been heard of.
    pub fn find_own(&self, user: UserNum, now_ms: u64) -> Option<Presence> {
        let entry = self.users.get(&user)?;
        let ((state, status_msg), _) = entry.look(now_ms);
        Some(Presence { state, status_msg, last_active_ms: entry.active_ms })
    }

    fn seen(entry: &Entry) -> Presence {
        let (state, status_msg) = entry.told.clone();
        Presence { state, status_msg, last_active_ms: entry.active_ms }
    }

    /// Lists the users whose presence changed after this number, the oldest change first.
    pub fn changed_since(&self, known: u64) -> impl Iterator<Item = Change> {
        let changed = self.changed.range((Bound::Excluded(known), Bound::Unbounded));
        changed.filter_map(move |(number, user)| {
            let entry = self.users.get(user)?;
            let rooms = Arc::clone(&entry.rooms);
            let profile = (entry.renamed > known).then(|| Arc::clone(&entry.profile));
            let user = Whose::Ours(*user);
            Some(Change { number: *number, user, presence: Self::seen(entry), profile, rooms })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: UserNum = UserNum(1);
    const PHONE: DeviceNum = DeviceNum(1);
    const DESK: DeviceNum = DeviceNum(2);
    const ONLINE: PresenceState = PresenceState::Online;
    const AWAY: PresenceState = PresenceState::Unavailable;
    const GONE: PresenceState = PresenceState::Offline;

    /// A board with a clock, which tells every change that is due and keeps the times of its watches.
    #[derive(Default)]
    struct Bench {
        board: PresenceBoard,
        now_ms: u64,
        number: u64,
        watches: Vec<u64>,
        tells: Vec<(u64, PresenceState)>,
    }

    impl Bench {
        fn new() -> Self {
            Self { now_ms: 1_000_000, ..Self::default() }
        }

        fn follow(&mut self, outcome: Outcome) {
            self.watches.extend(outcome.watch_ms);
            if outcome.is_due && self.board.tell(ALICE, Arc::default(), self.now_ms, self.number + 1) {
                self.number += 1;
                self.tells.push((self.now_ms, self.state()));
            }
        }

        fn polls(&mut self, device: DeviceNum, state: PresenceState) {
            let outcome = self.board.poll_begins(ALICE, device, state, self.now_ms);
            self.follow(outcome);
        }

        fn polls_shortly(&mut self, device: DeviceNum, state: PresenceState) {
            self.polls(device, state);
            self.board.poll_ends(ALICE, device, self.now_ms);
        }

        /// Lets this time pass, and carries out each watch when it is due.
        fn pass(&mut self, ms: u64) {
            let end_ms = self.now_ms + ms;
            while let Some(due_ms) = self.watches.iter().copied().filter(|due_ms| *due_ms <= end_ms).min() {
                self.watches.retain(|other| *other != due_ms);
                self.now_ms = self.now_ms.max(due_ms);
                let outcome = self.board.look_again(ALICE, due_ms, self.now_ms);
                self.follow(outcome);
            }
            self.now_ms = end_ms;
        }

        fn state(&self) -> PresenceState {
            self.board.find(ALICE).unwrap().state
        }
    }

    #[test]
    fn a_poll_makes_a_user_online_until_it_is_over_for_a_while() {
        let mut bench = Bench::new();
        bench.polls(PHONE, ONLINE);
        bench.pass(100_000);
        assert_eq!(bench.state(), ONLINE);
        bench.board.poll_ends(ALICE, PHONE, bench.now_ms);
        bench.pass(ONLINE_MS - 1);
        assert_eq!(bench.state(), ONLINE);
        // The watch was set while the poll was open; when it fires it sets the last one, at most this much later.
        bench.pass(ONLINE_MS);
        assert_eq!(bench.state(), GONE);
        assert!(bench.watches.is_empty(), "nobody watches who is gone");
        bench.polls_shortly(PHONE, ONLINE);
        assert_eq!(
            bench.tells.iter().map(|(_, state)| state.clone()).collect::<Vec<_>>(),
            [ONLINE, GONE, ONLINE]
        );
    }

    #[test]
    fn the_most_present_device_wins_and_devices_that_differ_are_no_news() {
        let mut bench = Bench::new();
        bench.polls_shortly(PHONE, AWAY);
        assert_eq!(bench.state(), AWAY);
        bench.pass(TELL_EVERY_MS);
        for _ in 0..10_000 {
            bench.polls_shortly(DESK, ONLINE);
            bench.polls_shortly(PHONE, AWAY);
            bench.pass(1);
        }
        assert_eq!((bench.state(), bench.tells.len()), (ONLINE, 2));
        for _ in 0..10 {
            bench.polls_shortly(PHONE, AWAY);
            bench.pass(10_000);
        }
        assert_eq!((bench.state(), bench.tells.len()), (AWAY, 3), "the desk is gone");
    }

    #[test]
    fn a_change_is_told_at_most_once_in_some_seconds_and_what_was_held_back_later() {
        let mut bench = Bench::new();
        for number in 0..10_001 {
            let state = if number % 2 == 0 { ONLINE } else { AWAY };
            let outcome = bench.board.set(ALICE, PHONE, state, Some(number.to_string()), bench.now_ms);
            bench.follow(outcome);
            bench.pass(1);
        }
        assert!((3..=5).contains(&bench.tells.len()), "{:?}", bench.tells);
        assert!(bench.tells.windows(2).all(|pair| pair[1].0 - pair[0].0 >= TELL_EVERY_MS));
        bench.pass(TELL_EVERY_MS);
        assert_eq!(bench.board.find(ALICE).unwrap().status_msg.unwrap(), "10000");
        assert!(bench.watches.len() <= 12, "few watch: {}", bench.watches.len());
    }

    #[test]
    fn who_does_nothing_becomes_unavailable_and_who_acts_is_online() {
        let mut bench = Bench::new();
        bench.polls(PHONE, ONLINE);
        bench.pass(IDLE_MS - 1);
        bench.polls_shortly(PHONE, ONLINE);
        assert_eq!(bench.state(), ONLINE);
        bench.pass(ONLINE_MS);
        assert_eq!(bench.state(), AWAY, "to poll again is no act");
        let outcome = bench.board.acts(ALICE, PHONE, bench.now_ms);
        bench.follow(outcome);
        assert_eq!(bench.state(), ONLINE);
        assert_eq!(bench.board.find(ALICE).unwrap().last_active_ms, bench.now_ms);
        bench.polls_shortly(DESK, AWAY);
        bench.pass(IDLE_MS + TELL_EVERY_MS);
        assert_eq!(bench.state(), AWAY);
    }

    #[test]
    fn who_acts_with_a_device_that_never_said_anything_is_not_seen() {
        let mut bench = Bench::new();
        assert_eq!(bench.board.acts(ALICE, PHONE, bench.now_ms), Outcome::default());
        assert!(bench.board.find(ALICE).is_none());
    }

    #[test]
    fn what_others_were_told_before_the_server_began_stands_until_nobody_comes_back() {
        let told = |state| Presence { state, status_msg: Some("here".into()), last_active_ms: 5_000 };
        for (state, is_back) in [(ONLINE, true), (ONLINE, false), (AWAY, true), (AWAY, false), (GONE, false)]
        {
            let mut bench = Bench::new();
            let outcome = bench.board.restore(ALICE, told(state.clone()), bench.now_ms);
            bench.follow(outcome);
            assert_eq!(bench.board.find(ALICE).unwrap(), told(state.clone()), "a status message stays, too");
            if is_back {
                bench.polls(DESK, ONLINE);
                bench.pass(2 * ONLINE_MS);
                assert_eq!(bench.state(), state, "a poll that goes on is no act");
                bench.board.poll_ends(ALICE, DESK, bench.now_ms);
            }
            bench.pass(2 * ONLINE_MS);
            assert_eq!(bench.state(), GONE);
            let changes: Vec<_> = bench.board.changed_since(0).map(|change| change.presence).collect();
            assert_eq!(changes, [told(GONE)]);
        }
    }

    #[test]
    fn who_came_before_the_last_run_was_restored_stays_as_they_are() {
        let mut bench = Bench::new();
        bench.polls(PHONE, AWAY);
        let before = Presence { state: ONLINE, status_msg: None, last_active_ms: 1 };
        assert_eq!(bench.board.restore(ALICE, before, bench.now_ms), Outcome::default());
        assert_eq!(bench.state(), AWAY);
    }

    #[test]
    fn one_sees_ones_own_presence_before_others_do() {
        let mut bench = Bench::new();
        bench.polls(PHONE, ONLINE);
        let outcome = bench.board.set(ALICE, PHONE, AWAY, None, bench.now_ms);
        bench.follow(outcome);
        assert_eq!(bench.state(), ONLINE);
        assert_eq!(bench.board.find_own(ALICE, bench.now_ms).unwrap().state, AWAY);
    }

    #[test]
    fn the_content_says_how_long_ago() {
        let presence = Presence { state: ONLINE, status_msg: Some("here".into()), last_active_ms: 2_000 };
        let expected = serde_json::json!({
            "presence": "online", "status_msg": "here", "last_active_ago": 500, "currently_active": true,
        });
        assert_eq!(presence.content(2_500, None), expected);
        assert_eq!(Presence::unknown().content(2_500, None), serde_json::json!({ "presence": "offline" }));
    }

    #[test]
    fn a_new_profile_is_told_once_to_whoever_does_not_know_it_yet() {
        let mut bench = Bench::new();
        bench.polls(PHONE, ONLINE);
        let profile = |name: &str| Arc::new(Map::from_iter([("displayname".to_owned(), name.into())]));
        for name in ["first", "second"] {
            let outcome = bench.board.rename(ALICE, profile(name), bench.now_ms);
            bench.follow(outcome);
        }
        assert_eq!(bench.number, 1, "it is held back like other changes");
        bench.pass(TELL_EVERY_MS);
        assert_eq!(bench.number, 2);
        let told = |bench: &Bench, known| bench.board.changed_since(known).next().unwrap().profile;
        assert_eq!(told(&bench, 1), Some(profile("second")));
        let outcome = bench.board.set(ALICE, PHONE, AWAY, None, bench.now_ms + TELL_EVERY_MS);
        bench.now_ms += TELL_EVERY_MS;
        bench.follow(outcome);
        assert_eq!(bench.number, 3);
        assert_eq!((told(&bench, 1), told(&bench, 2)), (Some(profile("second")), None));
        // Somebody who has not been heard of is told of as well.
        let other = UserNum(2);
        let outcome = bench.board.rename(other, profile("other"), bench.now_ms);
        assert!(outcome.is_due && bench.board.tell(other, Arc::default(), bench.now_ms, 4));
        assert_eq!(bench.board.find(other).unwrap().state, GONE);
        assert_eq!(told(&bench, 3), Some(profile("other")));
    }

    #[test]
    fn users_and_their_devices_are_bounded() {
        let mut board = PresenceBoard::default();
        for number in 0..ENTRIES_MAX as u64 + 10 {
            board.set(UserNum(number), PHONE, ONLINE, None, 1);
            board.tell(UserNum(number), Arc::default(), 1, number + 1);
        }
        assert!(board.users.len() <= ENTRIES_MAX);
        assert_eq!(board.users.len(), board.changed.len());
        for number in 0..2 * DEVICES_MAX as u32 {
            board.set(ALICE, DeviceNum(number), ONLINE, None, 1);
        }
        assert_eq!(board.users[&ALICE].devices.len(), DEVICES_MAX);
    }
}
