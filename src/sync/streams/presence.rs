//! The presence of users who share a room with the user.
//!
//! The board of presence remembers with each change in which rooms its user was, so that the changes that concern this
//! user are found in memory. Only for those is it read whether they are still in the room.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ruma::{OwnedUserId, UserId};

use crate::{
    accounts::{
        self,
        presence::{Change, Presence, Profile, Whose},
    },
    ids::{RoomNum, UserNum},
    rooms::members,
    schema::event_types::PRESENCE,
    schema::rooms::{Membership, UserRoomRow},
    store::Fault,
    sync::{changes::Changes, window::Window},
};

/// One answer tells of at most this many users, because an answer is held in memory; the next one goes on from there.
const USERS_MAX: usize = 500;
/// Up to this many rooms of others are looked for one by one; beyond that, the user's own rooms are listed once.
const LOOKUPS_MAX: usize = 64;
/// Look for this many rooms together, so that a room shared early saves the rest of the lookups.
const LOOKUPS_AT_ONCE: usize = 16;

/// The news of presence for one answer.
#[derive(Debug, Default)]
pub(crate) struct PresenceNews {
    /// The users who are told of.
    pub(crate) told: Vec<Told>,
    /// The answer tells of somebody else than the user. A poll does not end because of the user's own presence.
    pub(crate) is_news: bool,
    /// The number of the last change that was told, if further changes are left for the next answer.
    pub(crate) told_upto: Option<u64>,
}

/// A user who is told of.
#[derive(Debug)]
pub(crate) struct Told {
    /// The id of the user.
    pub(crate) user_id: OwnedUserId,
    /// The presence that others see.
    pub(crate) presence: Presence,
    /// The profile, if it is new to the client.
    pub(crate) profile: Option<Profile>,
}

/// Collects the presence of users for whom it changed, and of those who came to share a room with the user.
pub(crate) fn collect(window: &Window<'_>, changes: &Changes) -> Result<PresenceNews, Fault> {
    let mut news = PresenceNews::default();
    let came = &changes.shares.came;
    let filter = &window.ask.filter.presence;
    let is_quiet = window.moment.presence.is_empty() && came.is_empty();
    if is_quiet || !window.ephemeral.shows_presence() || !filter.wants_type(PRESENCE) {
        return Ok(news);
    }
    let (told, is_whole) = match window.since {
        Some(_) => list_came(window, came)?,
        // The changes of a client that begins are everything on the board, so that nobody need be listed besides.
        None => (BTreeMap::new(), true),
    };
    for change in told.values() {
        put(window, change, &mut news)?;
    }
    let mut rooms = OwnRooms::default();
    for change in &window.moment.presence {
        if news.told.len() >= USERS_MAX {
            break;
        }
        news.told_upto = Some(change.number);
        if !told.contains_key(&change.user) && rooms.is_shared(window, change)? {
            put(window, change, &mut news)?;
        }
    }
    let is_last = |number| window.moment.presence.last().is_none_or(|last| last.number == number);
    news.told_upto = news.told_upto.filter(|number| !is_last(*number));
    if !is_whole {
        // The users who did not fit are told of when the next answer goes through all changes again.
        tracing::debug!(
            user = %window.ask.caller.user, reason = "many users came to share a room",
            "presence is told from the beginning"
        );
        news.told_upto = Some(0);
    }
    Ok(news)
}

/// Collects the changes of presence of those who are in a room, for somebody who hears of this room alone.
pub(crate) fn of_room(window: &Window<'_>, room: RoomNum) -> Result<PresenceNews, Fault> {
    let mut news = PresenceNews::default();
    if !window.ephemeral.shows_presence() {
        return Ok(news);
    }
    for change in &window.moment.presence {
        if news.told.len() >= USERS_MAX {
            return Ok(news);
        }
        news.told_upto = Some(change.number);
        if is_in_any(window, &change.user, &[room])? {
            put(window, change, &mut news)?;
        }
    }
    news.told_upto = None;
    Ok(news)
}

/// Collects the presence of these users as it is now.
pub(crate) fn of_members(window: &Window<'_>, users: BTreeSet<String>) -> Result<Vec<Told>, Fault> {
    let mut news = PresenceNews::default();
    if window.ephemeral.shows_presence() {
        let (told, _) = list_came(window, &users)?;
        for change in told.values() {
            put(window, change, &mut news)?;
        }
    }
    Ok(news.told)
}

fn put(window: &Window<'_>, change: &Change, news: &mut PresenceNews) -> Result<(), Fault> {
    let user_id = match &change.user {
        Whose::Ours(user) => match accounts::users::find(window.read, *user)? {
            Some(account) => account.user_id,
            None => return Ok(()),
        },
        Whose::Other(user_id) => user_id.clone(),
    };
    if !window.ask.filter.presence.wants_sender(user_id.as_str())
        || window.ignored()?.contains(user_id.as_str())
    {
        return Ok(());
    }
    let profile = change.profile.clone();
    // Others are told seldom; users find at once what they themselves said.
    let own = match change.user {
        Whose::Ours(user) if user == window.ask.caller.user => {
            window.ephemeral.read(|board| board.presence.find_own(user, window.now_ms))
        }
        Whose::Ours(_) | Whose::Other(_) => None,
    };
    let presence = own.unwrap_or_else(|| change.presence.clone());
    news.told.push(Told { user_id, presence, profile });
    news.is_news |= change.user != Whose::Ours(window.ask.caller.user);
    Ok(())
}

/// Finds the presence of those who came to share a room, and says whether these are all of whom something is known. Users who
/// have not been heard of are offline; a client may know another presence of them, from another room or another run of the
/// server. They are told last, as far as there is place. Of users of other servers only those are told who have been heard of.
fn list_came(window: &Window<'_>, came: &BTreeSet<String>) -> Result<(BTreeMap<Whose, Change>, bool), Fault> {
    let (mut told, mut silent) = (BTreeMap::new(), Vec::new());
    let change = |user, presence| Change { number: 0, user, presence, profile: None, rooms: Arc::default() };
    for user_id in came {
        let Ok(user_id) = <&UserId>::try_from(user_id.as_str()) else { continue };
        let user = accounts::users::find_num(window.read, user_id)?;
        let presence = window.ephemeral.read(|board| match user {
            Some(user) => board.presence.find(user),
            None => board.elsewhere.find(user_id),
        });
        let whose = user.map_or_else(|| Whose::Other(user_id.to_owned()), Whose::Ours);
        match presence {
            Some(_) if told.len() == USERS_MAX => return Ok((told, false)),
            Some(presence) => drop(told.insert(whose.clone(), change(whose, presence))),
            None if user.is_none() || user == Some(window.ask.caller.user) => {}
            None if silent.len() < USERS_MAX => silent.push(whose),
            None => {}
        }
    }
    silent.truncate(USERS_MAX - told.len());
    told.extend(silent.into_iter().map(|user| (user.clone(), change(user, Presence::unknown()))));
    Ok((told, true))
}

/// Finds which rooms of others the user is in. A few rooms are looked for one by one, because users who share many
/// rooms are found by the first of them; beyond that, the user's rooms are listed once.
#[derive(Default)]
struct OwnRooms {
    looked_for: usize,
    listed: Option<BTreeSet<RoomNum>>,
}

impl OwnRooms {
    /// Whether the user shares a room with the one whose presence changed, and so may be told of it.
    fn is_shared(&mut self, window: &Window<'_>, change: &Change) -> Result<bool, Fault> {
        if change.user == Whose::Ours(window.ask.caller.user) {
            return Ok(true);
        }
        for rooms in change.rooms.chunks(LOOKUPS_AT_ONCE) {
            let shared = self.find(window, rooms)?;
            // The one whose presence changed may have left the rooms since then.
            if is_in_any(window, &change.user, &shared)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Finds the rooms among these that the user is in.
    fn find(&mut self, window: &Window<'_>, rooms: &[RoomNum]) -> Result<Vec<RoomNum>, Fault> {
        let own = window.ask.caller.user;
        if self.listed.is_none() {
            if self.looked_for + rooms.len() <= LOOKUPS_MAX {
                self.looked_for += rooms.len();
                return joined(window, own, rooms);
            }
            self.listed = Some(members::list_joined_rooms(window.read, own)?.into_iter().collect());
        }
        let is_own = |room: &&RoomNum| self.listed.as_ref().is_some_and(|own| own.contains(room));
        Ok(rooms.iter().filter(is_own).copied().collect())
    }
}

/// Whether a user is in any of these rooms.
fn is_in_any(window: &Window<'_>, user: &Whose, rooms: &[RoomNum]) -> Result<bool, Fault> {
    match user {
        Whose::Ours(user) => Ok(!rooms.is_empty() && !joined(window, *user, rooms)?.is_empty()),
        Whose::Other(user_id) => {
            for room in rooms {
                if members::is_user_joined(window.read, *room, user_id.as_str())? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// Finds the rooms among these that a user of ours is in, by one lookup of each.
fn joined(window: &Window<'_>, user: UserNum, rooms: &[RoomNum]) -> Result<Vec<RoomNum>, Fault> {
    let rows = members::find_many(window.read, user, rooms.iter().copied())?;
    let is_in = |row: Option<UserRoomRow>| row.is_some_and(|row| row.membership == Membership::Join);
    Ok(rooms.iter().zip(rows).filter_map(|(room, row)| is_in(row).then_some(*room)).collect())
}
