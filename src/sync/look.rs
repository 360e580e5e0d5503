//! One look of `/sync` finds what changed, collects it room by room, and has it written.
//!
//! Rooms are collected and written one after the other, so that only one room's events are in memory at a time.

mod invitations;

use std::collections::BTreeSet;

use bytes::Bytes;

use crate::{
    ids::{Order, Position, RoomNum},
    rooms::{event, members, state, visibility::Reader},
    schema::{
        self,
        event_types::MEMBER,
        rooms::{Membership, Place, Resident, RoomRow, UserRoomRow},
        state::{StateRef, StateValue},
    },
    store::Fault,
    sync::{
        SyncToken,
        changes::Changes,
        collect,
        look::invitations::Invitation,
        shape::v3::Answer,
        shares::Shares,
        streams::{
            account_data::{self, AccountData, Data},
            device_lists, presence, to_device,
        },
        window::{RoomPlace, RoomWindow, Standing, Window},
    },
};

/// The outcome of one look at everything that may be new.
#[derive(Debug)]
pub struct Answered {
    /// The answer as the JSON of `/sync`, whether it has news or not.
    pub answer: Bytes,
    /// The position up to which the answer tells, which the JSON names too.
    pub pos: String,
    /// The answer holds something new to the client, so that the poll need not wait.
    pub has_news: bool,
}

/// Looks at everything that the client has not been told of, and writes the answer.
pub(crate) fn look(window: &Window<'_>) -> Result<Answered, Fault> {
    debug_assert!(window.from <= window.upto, "a settled token does not lie in the future");
    let mut changes = find_changes(window)?;
    let mut data = account_data::collect(window, &changes)?;
    add_rooms_with_data(window, &mut changes.rooms, &data)?;
    invitations::add_left(window, &mut changes.rooms)?;
    let mut answer = Answer::new(window);
    let mut has_news = window.since.is_none() || window.ask.full_state;
    let (has_rooms, invites) = add_rooms(window, &mut changes, &mut data, &mut answer)?;
    has_news |= has_rooms;
    // The client asks again at once for receipts and sticky events that are left, whether or not it wants to hear of those told here.
    has_news |= window.receipts_told_upto().is_some() || window.sticky_told_upto().is_some();
    let filter = &window.ask.filter.account_data;
    has_news |= data.push_rules.is_some()
        || data.by_room.get("").is_some_and(|data| data.iter().any(|(kind, _)| filter.wants_type(kind)));
    answer.account_data(&data);
    let presence = presence::collect(window, &changes)?;
    has_news |= presence.is_news;
    answer.presence(&presence.told);
    let inbox = to_device::collect(window, &changes)?;
    has_news |= !inbox.messages.is_empty();
    answer.messages(&inbox.messages);
    let lists = device_lists::collect(window, &changes)?;
    has_news |= !lists.is_empty();
    answer.device_lists(&lists);
    let caller = &window.ask.caller;
    let next = SyncToken {
        position: window.upto,
        boot: window.ephemeral.boot(),
        ephemeral: presence.told_upto.unwrap_or(window.moment.number),
        inbox: inbox.told_upto,
        receipts: window.receipts_told_upto(),
        invites,
        sticky: window.sticky_told_upto(),
        device: Some(SyncToken::mark(caller.user, caller.device)),
    };
    let answer = answer.finish(&next, &to_device::key_counts(window)?);
    Ok(Answered { answer, pos: next.to_string(), has_news })
}

/// Finds the rooms and kinds of news that changed since the client asked last.
pub(crate) fn find_changes(window: &Window<'_>) -> Result<Changes, Fault> {
    let (read, user) = (window.read, window.ask.caller.user);
    if window.since.is_none() || window.ask.full_state {
        return Changes::everything(read, user);
    }
    let mut also: BTreeSet<RoomNum> = window.moment.typing.iter().map(|(room, _)| *room).collect();
    // A client from another run of the server may believe that somebody types, in any room. Unread counts change in
    // every room when the push rules change, or the users who are ignored.
    if window.is_other_run() || window.counts()?.changed() > window.from {
        also.extend(members::list_joined_rooms(read, user)?);
    }
    // So they do in rooms with threads that the user has subscribed to, or unsubscribed from.
    match window.counts()?.list_resubscribed(read, (window.from, window.upto))? {
        Some(rooms) => also.extend(rooms),
        None => also.extend(members::list_joined_rooms(read, user)?),
    }
    let caller = (user, window.ask.caller.user_id.as_str());
    // Rooms with receipts or sticky events that were left are looked at again.
    let from = window.from.min(window.receipts_from()).min(window.sticky_from());
    Changes::find(read, caller, from, window.upto, &also)
}

/// Adds rooms in which nothing changed but the user's account data.
pub(crate) fn add_rooms_with_data(
    window: &Window<'_>,
    rooms: &mut Vec<(RoomNum, UserRoomRow)>,
    data: &AccountData,
) -> Result<(), Fault> {
    let mut known: BTreeSet<RoomNum> = rooms.iter().map(|(room, _)| *room).collect();
    for id in data.by_room.keys().filter(|id| !id.is_empty()) {
        let Some(room) = schema::ROOM_ID.get(window.read, id)? else { continue };
        if known.insert(room) {
            let row = members::find(window.read, window.ask.caller.user, room)?;
            rooms.extend(row.map(|row| (room, row)));
        }
    }
    Ok(())
}

/// Adds the rooms that changed to the answer. Says whether any of them has news, and up to which position invitations are told
/// if some are left for the next answer.
fn add_rooms(
    window: &Window<'_>,
    changes: &mut Changes,
    data: &mut AccountData,
    answer: &mut Answer<'_, '_>,
) -> Result<(bool, Option<Position>), Fault> {
    let rows = schema::ROOM.get_many(window.read, changes.rooms.iter().map(|(room, _)| *room))?;
    let (mut has_news, mut invitations) = (false, Vec::new());
    for ((num, user_row), row) in changes.rooms.iter().zip(rows) {
        let Some(row) = row else { continue };
        // A user who leaves and forgets a room is still told once that they left it.
        let is_old = window.since.is_none() || user_row.since <= window.from;
        if (user_row.forgotten && is_old) || !window.ask.filter.wants_room(&row.id) {
            // The users whose keys matter to the client do not depend on the rooms that it wants to hear of.
            note_shares(window, (*num, &row, user_row), &mut changes.shares)?;
            continue;
        }
        note_left(window, *num, user_row, &mut changes.shares)?;
        let data = data.by_room.remove(row.id.as_str()).unwrap_or_default();
        if is_withheld(window, &row, user_row) || !is_told(window, *num, user_row, &data)? {
            continue;
        }
        if invitations::is_one(user_row) {
            let came = came_at(window, *num, user_row)?.map_or(user_row.since, |order| order.anchor);
            invitations.push(Invitation { came, num: *num, row, user_row: *user_row, data });
            continue;
        }
        has_news |= add_room(window, (*num, &row, user_row), data, &mut changes.shares, answer)?;
    }
    let (has_invitations, told_upto) = invitations::add(window, invitations, &mut changes.shares, answer)?;
    Ok((has_news || has_invitations, told_upto))
}

/// Notes with whom the user came to share a room since the client asked last, and with whom the user ceased to. This is
/// for rooms of which the answer tells nothing else.
pub(crate) fn note_shares(
    window: &Window<'_>,
    (num, row, user_row): (RoomNum, &RoomRow, &UserRoomRow),
    shares: &mut Shares,
) -> Result<(), Fault> {
    if user_row.membership != Membership::Join {
        return note_left(window, num, user_row, shares);
    }
    let caller = &window.ask.caller;
    let reader = Reader::with_row(num, &caller.user_id, user_row, window.ignored()?.clone());
    let place = place(window, (num, row, user_row), &reader)?;
    collect::shares(&RoomWindow { window, num, row, user_row, place, reader: &reader }, shares)
}

/// Notes that the user left a room since the client asked last, and is not in it now. The user no longer shares it with
/// anybody who was in it when the client asked last, though they may have left before the user did, nor with anybody who
/// was in it at the end.
fn note_left(
    window: &Window<'_>,
    num: RoomNum,
    user_row: &UserRoomRow,
    shares: &mut Shares,
) -> Result<(), Fault> {
    let is_out = user_row.membership != Membership::Join && user_row.since > window.from;
    if window.since.is_none() || !is_out {
        return Ok(());
    }
    let known = window.known_order();
    let was_in = collect::membership_at(window, num, window.from)? == Membership::Join;
    let left = user_row.left.filter(|left| *left > known && *left <= Order::upto(window.upto));
    let orders: Vec<Order> = was_in.then_some(known).into_iter().chain(left).collect();
    shares.left_room(window, num, &orders)
}

/// Adds one room to the answer, and says whether it had news. A room without news is left out.
fn add_room(
    window: &Window<'_>,
    (num, row, user_row): (RoomNum, &RoomRow, &UserRoomRow),
    data: Data,
    shares: &mut Shares,
    answer: &mut Answer<'_, '_>,
) -> Result<bool, Fault> {
    let caller = &window.ask.caller;
    let ignored = window.ignored()?.clone();
    let reader = Reader::with_row(num, &caller.user_id, user_row, ignored);
    let place = place(window, (num, row, user_row), &reader)?;
    let room = RoomWindow { window, num, row, user_row, place, reader: &reader };
    match user_row.membership {
        Membership::Join => match collect::joined(&room, data, shares)? {
            Some(news) => answer.joined(&room, &news)?,
            None => return Ok(false),
        },
        Membership::Invite => match collect::outside(&room)? {
            Some(state) => answer.invited(&room, &state)?,
            None => return add_end_of_stay(&room, data, answer),
        },
        Membership::Knock => match collect::outside(&room)? {
            Some(state) => answer.knocked(&room, &state)?,
            None => return Ok(false),
        },
        Membership::Leave | Membership::Ban => {
            let news = collect::left(&room, data)?;
            answer.left(&room, &news)?;
        }
    }
    Ok(true)
}

/// Whether the client wants to be told of all members of a room.
fn is_eager(window: &Window<'_>) -> bool {
    !window.ask.filter.lazy_members
}

/// Whether a room is withheld for now: the client wants all its members, of whom only some are known. Once they are, it is told of the
/// room to those who are in it. Others are told at once that they left or are invited, because nothing tells them later.
fn is_withheld(window: &Window<'_>, row: &RoomRow, user_row: &UserRoomRow) -> bool {
    is_eager(window) && row.resident == Resident::Partial && user_row.membership == Membership::Join
}

/// Whether a room is told at all. A room that the user is not in is told once: with the event that says so. A client that
/// wants to hear of rooms that the user has left is also told of the account data that is set for them later.
fn is_told(window: &Window<'_>, num: RoomNum, user_row: &UserRoomRow, data: &Data) -> Result<bool, Fault> {
    if user_row.membership == Membership::Join {
        return Ok(true);
    }
    let is_outside = invitations::is_one(user_row);
    // A client that has been told some of the invitations goes on with the others, even where it asks for everything.
    let goes_on = window.since.is_some_and(|token| token.invites.is_some());
    let begins = window.since.is_none() || (window.ask.full_state && is_outside && !goes_on);
    if begins {
        return Ok(is_outside || window.ask.filter.include_leave || was_removed(window, num, user_row)?);
    }
    if !is_outside && window.ask.filter.include_leave && !data.is_empty() {
        return Ok(true);
    }
    let known = if is_outside { Order::upto(window.invites_from()) } else { window.known_order() };
    // Where forks resolve to a state in which the user is not in the room, no event need say so, or none that is told.
    if !is_outside && user_row.left.is_some_and(|left| left > known && left <= Order::upto(window.upto)) {
        return Ok(true);
    }
    Ok(came_at(window, num, user_row)?.is_some_and(|own| own > known))
}

/// Whether somebody else ended the user's last stay in a room. Clients want to hear of that without having asked for rooms that were
/// left, or a user who is banned before the first answer never learns of it. What was done with the membership of a user who was out
/// already, such as an invitation that was withdrawn, is no news of theirs: anybody might bring back rooms that the user left long ago.
pub(crate) fn was_removed(window: &Window<'_>, num: RoomNum, user_row: &UserRoomRow) -> Result<bool, Fault> {
    let Some(left) = user_row.left else { return Ok(false) };
    let key = state::find_key(window.read, num, MEMBER, window.ask.caller.user_id.as_str())?;
    let then = key.map(|key| state::at(window.read, num, StateRef::Main(left), key)).transpose()?;
    // Where no event ended the stay, as when forks resolve to a state without one, the newest says who did.
    let by = then.and_then(StateValue::event).unwrap_or(user_row.event);
    let ended = event::find_anywhere(window.read, num, by)?;
    Ok(ended.is_some_and(|ended| ended.row.state_key().is_some_and(|user_id| user_id != ended.row.sender())))
}

/// The order of the event that made the user what they are to the room. `None` if it is not one that is told.
pub(crate) fn came_at(
    window: &Window<'_>,
    num: RoomNum,
    user_row: &UserRoomRow,
) -> Result<Option<Order>, Fault> {
    Ok(match schema::PLACE.get(window.read, (num, user_row.event))? {
        Some(Place::Timeline(order)) => Some(order),
        Some(Place::Aside | Place::Outlier) => None,
        // An event from outside the room has no place in it, and is news at the position at which it came.
        None => Some(Order::live(user_row.since)),
    })
}

/// Tells that the user is no longer in a room to which they are invited again, where the answer does not tell the invitation.
fn add_end_of_stay(
    room: &RoomWindow<'_, '_>,
    data: Data,
    answer: &mut Answer<'_, '_>,
) -> Result<bool, Fault> {
    if !ends_stay(room.window, room.reader) {
        return Ok(false);
    }
    let news = collect::left(room, data)?;
    answer.left(room, &news)?;
    Ok(true)
}

/// Whether the user's last stay in a room ended since the client asked last.
fn ends_stay(window: &Window<'_>, reader: &Reader) -> bool {
    window.since.is_some() && reader.joined_until().is_some_and(|left| left > window.known_order())
}

/// Says how much a client knows of a room that the user is no longer in, since their last stay there ended at `left`.
fn after_stay(window: &Window<'_>, num: RoomNum, left: Order, reader: &Reader) -> Result<Standing, Fault> {
    let known = window.known_order();
    Ok(match collect::membership_at(window, num, window.from)? {
        Membership::Join => Standing::Knows(known),
        // A user who joined and left within this answer was not told of the room, or only of an earlier stay.
        _ if left > known => Standing::Returns(reader.first_stay(window.read, left)?),
        // An invitation or a knock is told without what went before it. If the stay ended in that same answer, then its
        // end is untold. A token does not say whether it did, so that the end is told, perhaps for the second time.
        Membership::Invite | Membership::Knock => {
            Standing::Returns(reader.first_stay(window.read, Order::MAX)?)
        }
        Membership::Leave | Membership::Ban => Standing::Knows(known),
    })
}

/// Says from where a room is told. All rooms share the position of the client's token, but a room that the user came to
/// since then is told as a new one.
fn place(
    window: &Window<'_>,
    (num, row, user_row): (RoomNum, &RoomRow, &UserRoomRow),
    reader: &Reader,
) -> Result<RoomPlace, Fault> {
    let known = window.known_order();
    let end = Order::upto(window.upto);
    let standing = match user_row.membership {
        _ if window.since.is_none() => Standing::New,
        // A client that wants all members was told nothing of the room while some of them were unknown.
        Membership::Join if user_row.since > window.from || (is_eager(window) && window.saw_whole(row)) => {
            Standing::Returns(reader.first_stay(window.read, Order::MAX)?)
        }
        Membership::Join => Standing::Knows(known),
        Membership::Leave | Membership::Ban | Membership::Invite | Membership::Knock => {
            match reader.joined_until() {
                Some(left) => after_stay(window, num, left, reader)?,
                None => Standing::Knows(known),
            }
        }
    };
    Ok(RoomPlace {
        standing,
        whole_state: window.ask.full_state,
        timeline_limit: window.ask.filter.timeline_limit,
        end: reader.joined_until().unwrap_or(end).min(end),
    })
}
