//! The user directory: it finds users by a part of their name or id, as far as the searcher may know of them
//! (<https://spec.matrix.org/v1.19/client-server-api/#user-directory>). Users of other servers are found where they share a room with the
//! searcher, by the names that they have there.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Bound, ControlFlow},
};

use ruma::{OwnedUserId, ServerName};
use serde::Deserialize;

use crate::{
    accounts::users,
    ids::{RoomNum, UserNum},
    rooms::{
        self, members,
        visibility::{self, HistoryVisibility},
    },
    schema,
    schema::{accounts::UserRow, event_types::JOIN_RULES},
    search::words,
    store::{Fault, Read},
};

/// A search reads at most this many accounts, the oldest first, so that its cost is bounded on a large server. The accounts
/// of those who share a room with the searcher come before these.
const ACCOUNTS_MAX: usize = if cfg!(test) { 20 } else { 100_000 };
/// A search reads at most this many memberships of the searcher's own rooms.
const ROOM_MATES_MAX: usize = 100_000;
/// A search reads at most this many memberships in those rooms of users of other servers.
const OTHERS_MAX: usize = if cfg!(test) { 20 } else { 20_000 };
/// Display names are read in groups of this many, which costs less than reading each alone.
const PROFILES_AT_ONCE: usize = 500;
/// At most this many users whose name fits, and who are not in the part of the searcher's rooms that was read, are checked for
/// whether the searcher may know of them, because that reads rooms.
const FITTING_MAX: usize = 2_000;
/// At most this many rooms of a found user are checked for whether everybody may join or read them.
const ROOMS_MAX: usize = 1_000;

/// A user whom a search found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// The full user id.
    pub user_id: OwnedUserId,
    /// The name in their profile.
    pub display_name: Option<String>,
    /// The picture in their profile.
    pub avatar_url: Option<String>,
}

/// How well a user fits the search; a better fit is less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// The name or id equals the term.
    Whole,
    /// The name or id begins with the term.
    Begins,
    /// A word of the name begins with the term.
    Word,
    /// All words of the term are somewhere in the name or id.
    Within,
}

/// Lists at most `limit` users who fit `term`, the best fit first, and answers whether there are more. Only users are found
/// who share a room with the searcher, or are in a room that everybody may join or read. Those who share a room are found
/// however many others there are. Searchers find themselves where every stranger would.
pub fn find(
    read: &(impl Read + ?Sized),
    asks: UserNum,
    term: &str,
    limit: usize,
) -> Result<(Vec<Person>, bool), Fault> {
    let term = words::folded(term.trim());
    if term.is_empty() {
        return Ok((Vec::new(), false));
    }
    let own: BTreeSet<RoomNum> = members::list_joined_rooms(read, asks)?.into_iter().collect();
    let mut mates = list_room_mates(read, &own)?;
    let mut fitting = list_fitting(read, &term, &mates)?;
    if let Some(asker) = users::find(read, asks)? {
        fitting.extend(list_fitting_elsewhere(read, &term, &own, asker.user_id.server_name())?);
    }
    mates.remove(&asks);
    fitting.sort_by(|one, other| one.rank(&mates).cmp(&other.rank(&mates)));
    let mut sight = Sight { asks, own, open: BTreeMap::new() };
    let mut found = Vec::new();
    let mut checked = 0;
    for one in fitting {
        if let Some(user) = one.user.filter(|user| !mates.contains(user)) {
            checked += 1;
            if checked > FITTING_MAX || !sight.reaches(read, user)? {
                continue;
            }
        }
        if found.len() == limit {
            return Ok((found, true));
        }
        let avatar_url = match one.user {
            Some(user) => schema::PROFILES.get(read, (user, "avatar_url"))?.and_then(|json| text(&json)),
            None => one.avatar_url,
        };
        found.push(Person { user_id: one.user_id, display_name: one.name, avatar_url });
    }
    if checked > FITTING_MAX {
        tracing::debug!(user = %asks, count = checked, reason = "too many strangers fit", "a search leaves users out");
    }
    Ok((found, false))
}

/// Lists users of ours who are in one of these rooms.
fn list_room_mates(
    read: &(impl Read + ?Sized),
    rooms: &BTreeSet<RoomNum>,
) -> Result<BTreeSet<UserNum>, Fault> {
    let mut mates = BTreeSet::new();
    let mut left = ROOM_MATES_MAX;
    for room in rooms {
        for user in members::joined_local_users(read, *room)?.take(left) {
            mates.insert(user?);
            left -= 1;
        }
    }
    Ok(mates)
}

struct Fitting {
    /// The number of a user of ours; users of other servers, all of whom share a room with the searcher, have none.
    user: Option<UserNum>,
    user_id: OwnedUserId,
    name: Option<String>,
    /// The picture of a user of another server.
    avatar_url: Option<String>,
    fit: Fit,
}

impl Fitting {
    /// The place among all who fit: a better fit, then a name before none, then those who share a room, comes first.
    fn rank(&self, mates: &BTreeSet<UserNum>) -> impl Ord {
        let name = self.name.as_deref();
        let is_stranger = self.user.is_some_and(|user| !mates.contains(&user));
        (self.fit, name.is_none(), name, is_stranger, self.user.is_none(), self.user, &self.user_id)
    }
}

/// Lists the users whose name or id fits. Each account is read once: the oldest of all, and then those who share a room with
/// the searcher and are younger.
fn list_fitting(
    read: &(impl Read + ?Sized),
    term: &str,
    mates: &BTreeSet<UserNum>,
) -> Result<Vec<Fitting>, Fault> {
    let (mut fitting, mut read_upto) = (Vec::new(), Bound::Unbounded);
    let mut accounts = users::list(read)?.take(ACCOUNTS_MAX);
    loop {
        let some = accounts.by_ref().take(PROFILES_AT_ONCE).collect::<Result<Vec<_>, _>>()?;
        let Some((last, _)) = some.last() else { break };
        read_upto = Bound::Excluded(*last);
        add_fitting(read, term, some, &mut fitting)?;
    }
    let younger: Vec<UserNum> = mates.range((read_upto, Bound::Unbounded)).copied().collect();
    for some in younger.chunks(PROFILES_AT_ONCE) {
        let rows = schema::USERS.get_many(read, some.iter().copied())?;
        let some = some.iter().zip(rows).filter_map(|(user, row)| Some((*user, row?)));
        add_fitting(read, term, some.collect(), &mut fitting)?;
    }
    Ok(fitting)
}

/// Adds those of some accounts whose name or id fits.
fn add_fitting(
    read: &(impl Read + ?Sized),
    term: &str,
    accounts: Vec<(UserNum, UserRow)>,
    fitting: &mut Vec<Fitting>,
) -> Result<(), Fault> {
    let names = schema::PROFILES.get_many(read, accounts.iter().map(|(user, _)| (*user, "displayname")))?;
    for ((user, row), name) in accounts.into_iter().zip(names) {
        if row.is_deactivated {
            continue;
        }
        let name = name.and_then(|json| text(&json));
        if let Some(fit) = fit(term, row.user_id.as_str(), name.as_deref()) {
            let user = Some(user);
            fitting.push(Fitting { user, user_id: row.user_id, name, avatar_url: None, fit });
        }
    }
    Ok(())
}

/// Lists the users of other servers who are in one of these rooms and whose name there, or id, fits.
fn list_fitting_elsewhere(
    read: &(impl Read + ?Sized),
    term: &str,
    rooms: &BTreeSet<RoomNum>,
    us: &ServerName,
) -> Result<Vec<Fitting>, Fault> {
    let (mut fitting, mut left) = (BTreeMap::new(), OTHERS_MAX);
    for room in rooms {
        members::walk(read, *room, (PROFILES_AT_ONCE, PROFILES_AT_ONCE), |some| {
            let mut others = Vec::new();
            for (user_id, key) in some {
                let Ok(user_id) = OwnedUserId::try_from(user_id.as_str()) else { continue };
                if left > 0 && user_id.server_name() != us {
                    left -= 1;
                    others.push((user_id, *key));
                }
            }
            let keys = others.iter().map(|(_, key)| *key).collect();
            let joined = members::list_joined_events(read, *room, keys)?;
            for (user_id, key) in others {
                let Some(event) = joined.get(&key) else { continue };
                let profile: Profile = serde_json::from_str(event.row.content()).unwrap_or_default();
                let name = profile.displayname.filter(|name| !name.is_empty());
                if let Some(fit) = fit(term, user_id.as_str(), name.as_deref()) {
                    let avatar_url = profile.avatar_url;
                    let one = Fitting { user: None, user_id: user_id.clone(), name, avatar_url, fit };
                    fitting.entry(user_id).or_insert(one);
                }
            }
            Ok(if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
    }
    Ok(fitting.into_values().collect())
}

/// The profile of a member, as their member event has it.
#[derive(Default, Deserialize)]
struct Profile {
    #[serde(default)]
    displayname: Option<String>,
    #[serde(default)]
    avatar_url: Option<String>,
}

fn text(json: &[u8]) -> Option<String> {
    serde_json::from_slice(json).ok()
}

/// How well a user fits the term, which is folded; `None` if not at all.
fn fit(term: &str, user_id: &str, name: Option<&str>) -> Option<Fit> {
    let user_id = words::folded(user_id);
    let name = words::folded(name.unwrap_or_default());
    let localpart = user_id.trim_start_matches('@').split(':').next().unwrap_or_default();
    let places = [user_id.as_str(), localpart, name.as_str()];
    if places.contains(&term) {
        return Some(Fit::Whole);
    }
    if places.iter().any(|place| place.starts_with(term)) {
        return Some(Fit::Begins);
    }
    let mut words = name.split(|letter: char| !letter.is_alphanumeric());
    if words.any(|word| word.starts_with(term)) {
        return Some(Fit::Word);
    }
    // The words may come in any order, from both name and id, as in "cooper alice".
    let within = term.split_whitespace().all(|word| places.iter().any(|place| place.contains(word)));
    within.then_some(Fit::Within)
}

/// Decides which users the searcher may know of.
struct Sight {
    asks: UserNum,
    own: BTreeSet<RoomNum>,
    /// The rooms that were checked so far, with whether everybody may join or read them.
    open: BTreeMap<RoomNum, bool>,
}

impl Sight {
    fn reaches(&mut self, read: &(impl Read + ?Sized), user: UserNum) -> Result<bool, Fault> {
        let theirs = members::list_joined_rooms(read, user)?;
        if user != self.asks && theirs.iter().any(|room| self.own.contains(room)) {
            return Ok(true);
        }
        for room in theirs.into_iter().take(ROOMS_MAX) {
            let open = match self.open.get(&room) {
                Some(open) => *open,
                None => {
                    let open = is_open(read, room)?;
                    self.open.insert(room, open);
                    open
                }
            };
            if open {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn is_open(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    #[derive(Deserialize)]
    struct Rules {
        join_rule: String,
    }
    let rules = rooms::find_state(read, room, JOIN_RULES, "")?;
    let rules = rules.and_then(|event| serde_json::from_str::<Rules>(event.row.content()).ok());
    Ok(rules.is_some_and(|rules| rules.join_rule == "public")
        || visibility::current(read, room)? == HistoryVisibility::WorldReadable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{EventNum, Position},
        schema::rooms::{Membership, UserRoomRow},
        store::{Durability, Engine, Guard, Store, engine::Memory},
    };

    #[test]
    fn what_fits_better_comes_first() {
        for (term, user_id, name, expected) in [
            ("alice", "@alice:s", None, Some(Fit::Whole)),
            ("@alice:s", "@alice:s", Some("A"), Some(Fit::Whole)),
            ("alice cooper", "@x:s", Some("Alice Cooper"), Some(Fit::Whole)),
            ("ali", "@x:s", Some("Alice Cooper"), Some(Fit::Begins)),
            ("@al", "@alice:s", None, Some(Fit::Begins)),
            ("coop", "@x:s", Some("Alice Cooper"), Some(Fit::Word)),
            ("cooper alice", "@x:s", Some("Alice Cooper"), Some(Fit::Within)),
            ("lic", "@alice:s", None, Some(Fit::Within)),
            ("arg", "@x:s", Some("Ärger"), Some(Fit::Begins)),
            ("cafe", "@x:s", Some("ＣＡＦÉ"), Some(Fit::Whole)),
            ("bob", "@alice:s", Some("Alice"), None),
            ("alice bob", "@alice:s", Some("Alice"), None),
        ] {
            assert_eq!(fit(term, user_id, name), expected, "{term}");
        }
    }

    #[test]
    fn each_account_is_read_once_and_those_who_share_a_room_however_young_they_are() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
        let users = 2 * ACCOUNTS_MAX as u64;
        let (old, young) = (UserNum(3), UserNum(users));
        let mut batch = store.batch(&Guard::alone());
        for user in 1..=users {
            let user_id = OwnedUserId::try_from(format!("@zed{user:03}:s.example")).unwrap();
            let new = users::NewUser { user_id, is_admin: false, is_guest: false, now_ms: 0 };
            users::create(&mut batch, UserNum(user), &new);
        }
        for user in [UserNum(1), old, young] {
            let row = UserRoomRow {
                membership: Membership::Join,
                since: Position::ZERO,
                event: EventNum(0),
                forgotten: false,
                left: None,
                forgotten_below: None,
            };
            schema::USER_ROOM.put(&mut batch, (user, RoomNum(1)), &row.into());
            schema::ROOM_USER.put(&mut batch, (RoomNum(1), user), &Membership::Join.into());
        }
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
        let (snapshot, before) = (store.snapshot(), memory.reads());
        let mates = list_room_mates(&*snapshot, &BTreeSet::from([RoomNum(1)])).unwrap();
        let of_mates = memory.reads() - before;
        let fitting = list_fitting(&*snapshot, "zed", &mates).unwrap();
        let accounts = ACCOUNTS_MAX as u64 + 1;
        assert_eq!(fitting.len() as u64, accounts, "all that are read fit");
        // Each account is a row, and so is each name that is looked for.
        assert!(memory.reads() - before - of_mates <= 2 * accounts + 1, "{} reads", memory.reads() - before);
        let (found, is_more) = find(&*snapshot, UserNum(1), "zed", 10).unwrap();
        let found: Vec<_> = found.iter().map(|person| person.user_id.localpart().to_owned()).collect();
        assert_eq!((found, is_more), (vec!["zed003".to_owned(), format!("zed{users:03}")], false));
    }
}
