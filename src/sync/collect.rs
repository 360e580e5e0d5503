//! Collects the news of rooms, each from a place of its own, as typed values. Shapes decide how they are written.

mod heroes;
mod lazy;
pub(crate) mod required;
pub(crate) mod sliding;
mod state;

pub(crate) use heroes::Summary;

use crate::{
    accounts::invites::Verdict,
    ids::{EventNum, Order, Position, RoomNum},
    json::JsonText,
    rooms::{
        change::outside,
        event::{self, StoredEvent},
        members, state as room_state, stripped,
    },
    schema,
    schema::event_types::MEMBER,
    schema::{
        receipts::{ReceiptKey, ReceiptRow},
        remote::OutsideRow,
        rooms::{Membership, Place, UserRoomRow},
        state::{StateRef, StateValue},
    },
    store::Fault,
    sync::{
        collect::state::{MemberChange, RoomState},
        shares::Shares,
        streams::{
            account_data::{self, Data},
            receipts, sticky,
            timeline::{self, Timeline},
            typing,
            unread::{self, Counts},
        },
        window::{RoomPlace, RoomWindow, Standing, Window},
    },
};

/// The news of a room that the user is in.
#[derive(Debug)]
pub(crate) struct JoinedNews {
    /// The newest events that the client does not know.
    pub(crate) timeline: Timeline,
    /// The state that goes with the timeline, lazily loaded members included.
    pub(crate) state: Vec<StoredEvent>,
    /// The members that clients name the room after, and how many there are, if that or the room's name changed.
    pub(crate) summary: Option<Summary>,
    /// How far others have read, and the user on other devices.
    pub(crate) receipts: Vec<(ReceiptKey, ReceiptRow)>,
    /// The sticky events that the timeline does not show.
    pub(crate) sticky: Vec<StoredEvent>,
    /// The users who type now, if that changed.
    pub(crate) typing: Option<Vec<String>>,
    /// The account data that the user's clients keep for the room.
    pub(crate) account_data: Data,
    /// How much of the room the user has not read.
    pub(crate) counts: Counts,
}

/// The news of a room that the user has left, or was kicked or banned from.
#[derive(Debug)]
pub(crate) struct LeftNews {
    /// The newest events up to where the user ceased to be in the room, then the event that says what they are now.
    pub(crate) timeline: Timeline,
    /// The state that goes with the timeline, as it was when the user left.
    pub(crate) state: Vec<StoredEvent>,
    /// The event that says what they are now where it stands nowhere in the room as it is known here. It is told after the timeline.
    pub(crate) outside: Option<JsonText>,
    /// The account data that the user's clients keep for the room.
    pub(crate) account_data: Data,
}

/// Collects a room that the user is in. `None` if nothing in it is new.
pub(crate) fn joined(
    room: &RoomWindow<'_, '_>,
    data: Data,
    shares: &mut Shares,
) -> Result<Option<JoinedNews>, Fault> {
    let (window, place) = (room.window, room.place);
    let mut timeline = timeline::collect(room)?;
    match place.standing {
        Standing::Knows(_) => {}
        Standing::New => lazy::forget(room),
        Standing::Returns(_) => {
            lazy::forget(room);
            // The client may know parts of this from an earlier stay: `limited` makes it begin the timeline anew.
            timeline.limited = true;
        }
    }
    let changes = state::changes(room, &mut timeline)?;
    let are_others = note_shares(room, &changes, shares)?;
    let (state, summary, is_other_summary) = if place.is_whole() && !window.ask.filter.lazy_members {
        let state = state::collect(room, &timeline, &changes, None)?;
        // The room's name is at hand among all that is told, so that it need not be looked for.
        // A client that is told the state after the timeline takes none from the timeline.
        let timeline = timeline.events.iter().filter(|_| !window.ask.use_state_after);
        let summary = heroes::summary_of(room, state.iter().chain(timeline.map(|(stored, _)| stored)))?;
        (state, Some(summary), true)
    } else {
        // Heroes take part in lazy loading, because a client cannot name the room without their member events.
        let is_renamed = changes.is_renamed || (timeline.may_redact && heroes::lost_name(room)?);
        // The number of members is another one than was told while some of them were unknown.
        let is_other = is_renamed || room.saw_whole();
        let summary = match place.is_whole() || !changes.members.is_empty() || is_other {
            true => Some(heroes::summary(room)?),
            false => None,
        };
        let heroes = summary.as_ref().and_then(|summary| summary.heroes.as_deref());
        // A member who only changed their profile makes the summary no other than the client knows it.
        let is_other_summary = are_others || room.saw_whole() || (is_renamed && heroes.is_some());
        (state::collect(room, &timeline, &changes, heroes)?, summary, is_other_summary)
    };
    let receipts = receipts::collect(room)?;
    let sticky = sticky::collect(room, &timeline)?;
    let typing = typing::collect(room)?;
    let account_data = match place.standing {
        Standing::Returns(_) => account_data::of_room(window, room.row.id.as_str())?,
        Standing::New | Standing::Knows(_) => data,
    };
    let has_news = place.is_whole()
        || !timeline.events.is_empty()
        || timeline.limited
        || wants_any_state(room, &state)?
        || is_other_summary
        || !receipts.is_empty()
        || !sticky.is_empty()
        || typing.is_some()
        || wants_any_data(room, &account_data)
        || unread::is_news(room)?;
    if !has_news {
        return Ok(None);
    }
    let counts = unread::collect(room)?;
    Ok(Some(JoinedNews { timeline, state, summary, receipts, sticky, typing, account_data, counts }))
}

/// Collects a room's timeline and the state that goes with it, and nothing else of the room. It may be one that the user only looks
/// into.
pub(crate) fn plain(room: &RoomWindow<'_, '_>) -> Result<(Timeline, Vec<StoredEvent>), Fault> {
    let mut timeline = timeline::collect(room)?;
    let changes = state::changes(room, &mut timeline)?;
    let state = state::collect(room, &timeline, &changes, None)?;
    Ok((timeline, state))
}

/// Whether the client wants any of these events of a room's state.
fn wants_any_state(room: &RoomWindow<'_, '_>, state: &[StoredEvent]) -> Result<bool, Fault> {
    let filter = &room.window.ask.filter.state;
    if !filter.wants_room(&room.row.id) {
        return Ok(false);
    }
    for stored in state {
        if room.wants(filter, stored)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the client wants any of this account data of a room.
fn wants_any_data(room: &RoomWindow<'_, '_>, data: &Data) -> bool {
    let filter = &room.window.ask.filter.room_account_data;
    filter.wants_room(&room.row.id) && data.iter().any(|(event_type, _)| filter.wants_type(event_type))
}

/// Collects a room that the user has left, or was kicked or banned from.
pub(crate) fn left(room: &RoomWindow<'_, '_>, data: Data) -> Result<LeftNews, Fault> {
    let EndOfStay { mut timeline, changes, own, outside } = end_of_stay(room)?;
    let mut state = match changes {
        Some(changes) => {
            let sender: Vec<String> = own.iter().map(|own| own.row.sender().into_owned()).collect();
            state::collect(room, &timeline, &changes, Some(&sender))?
        }
        None => Vec::new(),
    };
    if let Some(own) = own {
        push_own_end(room, own, &mut timeline, &mut state);
    }
    // The next stay begins without knowledge of members, so that what the device knows of them is forgotten.
    lazy::forget(room);
    Ok(LeftNews { timeline, state, outside, account_data: data })
}

/// How a user's stay in a room ended, as far as the client does not know it.
struct EndOfStay {
    /// The newest events up to where the user ceased to be in the room.
    timeline: Timeline,
    /// The changes of state up to there. None for a user who was never in the room, or has forgotten it.
    changes: Option<RoomState>,
    /// The event that says what the user is now, where it is news and stands above the timeline.
    own: Option<StoredEvent>,
    /// The same where that event stands nowhere in the room as it is known here.
    outside: Option<JsonText>,
}

fn end_of_stay(room: &RoomWindow<'_, '_>) -> Result<EndOfStay, Fault> {
    let own = own_end(room)?;
    let is_apart = match &own {
        Some(own) => stands_apart(room, own)?,
        None => false,
    };
    let (mut timeline, changes) = match room.reader.joined_until() {
        Some(_) => {
            let mut timeline = match is_apart {
                // A timeline has no holes, so that it has its last event alone and leads into the hole.
                true => Timeline { may_redact: true, ..Timeline::empty(room.place.end) },
                false => timeline::collect(room)?,
            };
            timeline.limited |= matches!(room.place.standing, Standing::Returns(_));
            let changes = state::changes(room, &mut timeline)?;
            (timeline, Some(changes))
        }
        // A user who was never in the room, or has forgotten it, is shown how it ended for them and nothing before.
        None => (Timeline::empty(room.place.end), None),
    };
    timeline.limited |= is_apart;
    let outside = if own.is_none() { outside_end(room)? } else { None };
    Ok(EndOfStay { timeline, changes, own, outside })
}

/// Finds the event by which an invitation or a knock ended from outside the room, if it is news and the client wants it.
fn outside_end(room: &RoomWindow<'_, '_>) -> Result<Option<JsonText>, Fault> {
    let (window, user_row) = (room.window, room.user_row);
    let filter = &window.ask.filter.timeline;
    let is_end = matches!(user_row.membership, Membership::Leave | Membership::Ban);
    let is_news = room.place.known().is_none_or(|known| Order::live(user_row.since) > known);
    if !is_end || !is_news || !filter.wants_room(&room.row.id) || !filter.wants_type(MEMBER) {
        return Ok(None);
    }
    let told = outside::find(window.read, room.num, window.ask.caller.user, user_row)?;
    let shown = told.and_then(|told| outside::shown(&told, room.row.version));
    // Anybody can invite a user to many rooms and withdraw that. Once an answer has enough of it, the rooms are told without.
    let bytes = shown.as_ref().map_or(0, |shown| shown.as_str().len());
    if bytes > window.timeline_left().0 {
        return Ok(None);
    }
    window.spend_timeline(bytes, 0);
    Ok(shown)
}

/// Finds the event that made the user what they are to the room, if it is news and stands above everything that they were
/// told of their stay: a ban after a kick, or an invitation that they declined. `None` if the client does not want it.
fn own_end(room: &RoomWindow<'_, '_>) -> Result<Option<StoredEvent>, Fault> {
    if room.user_row.membership == Membership::Invite {
        // The user does not want to hear of this invitation, but of the end of the stay before it.
        return Ok(None);
    }
    let own = event::find(room.window.read, room.num, room.user_row.event)?;
    let Some(own) = own else { return Ok(None) };
    let filter = &room.window.ask.filter.timeline;
    let is_above = room.reader.joined_until().is_none_or(|until| own.order > until);
    let is_news = room.place.known().is_none_or(|known| own.order > known);
    let is_wanted = filter.wants_room(&room.row.id) && room.wants(filter, &own)?;
    Ok((is_above && is_news && is_wanted).then_some(own))
}

/// Whether there are events that the user may see and the client does not know between the end of their stay and the event
/// that made them what they are: the room is open to everybody, or they were invited in between.
fn stands_apart(room: &RoomWindow<'_, '_>, own: &StoredEvent) -> Result<bool, Fault> {
    let until = room.reader.joined_until();
    // Mostly nothing is seen above the end, which is found without a look at the events.
    let end = room.reader.end(room.window.read)?;
    if end.is_none_or(|end| until.is_some_and(|until| end <= until)) {
        return Ok(false);
    }
    let known = room.place.known().max(until).unwrap_or(Order::MIN);
    let (standing, end) = (Standing::Knows(known), own.order.before());
    let between = RoomPlace { standing, timeline_limit: 0, end, ..room.place };
    Ok(timeline::collect(&room.at(between))?.limited)
}

/// Ends a timeline with the event that made the user what they are to the room.
fn push_own_end(
    room: &RoomWindow<'_, '_>,
    own: StoredEvent,
    timeline: &mut Timeline,
    state: &mut Vec<StoredEvent>,
) {
    if timeline.events.is_empty() {
        timeline.start = own.order;
    }
    if room.window.ask.use_state_after {
        state.retain(|stored| stored.row.header.state_key != own.row.header.state_key);
        state.push(own.clone());
    }
    timeline.events.push((own, room.user_row.membership));
}

/// Where the event stands that made a user what they are to the room. `None` if it is outside the timeline.
pub(crate) fn order_of(window: &Window<'_>, num: RoomNum, event: EventNum) -> Result<Option<Order>, Fault> {
    Ok(match schema::PLACE.get(window.read, (num, event))? {
        Some(Place::Timeline(order)) => Some(order),
        Some(Place::Aside | Place::Outlier) | None => None,
    })
}

/// The events that tell somebody outside which room this is. The last of them is the invitation or the knock itself.
#[derive(Debug)]
pub(crate) enum Outside {
    /// The events of the room.
    Ours(Vec<StoredEvent>),
    /// The events as another server told them, in the form in which clients see them.
    Told(Vec<JsonText>),
}

/// Collects the events that tell somebody outside which room this is, as they were when the invitation or the knock was
/// sent. `None` if the user does not want to hear of it.
pub(crate) fn outside(room: &RoomWindow<'_, '_>) -> Result<Option<Outside>, Fault> {
    let (window, num) = (room.window, room.num);
    let (told, own) = invitation(window, num, room.user_row)?;
    let Some(sender) = sender_of(told.as_ref(), own.as_ref()) else { return Ok(None) };
    if room.user_row.membership == Membership::Invite
        && let verdict @ (Verdict::Ignore | Verdict::Block) = window.invites()?.judge(&sender)
    {
        tracing::debug!(room = num.0, reason = ?verdict, "an invitation is withheld");
        return Ok(None);
    }
    let own = match (told, own) {
        (Some(told), _) => {
            // Rows of older versions may hold more than is kept now.
            let state = stripped::bound(told.shown.state, &told.shown.sender);
            let state = state.iter().map(|event| JsonText::stored(event.as_bytes()));
            return Ok(Some(Outside::Told(state.collect())));
        }
        (None, Some(own)) => own,
        (None, None) => return Ok(None),
    };
    let at = StateRef::Main(own.order);
    let mut keys: Vec<(&str, &str)> = stripped::TELLING.iter().map(|event_type| (*event_type, "")).collect();
    if own.row.state_key().is_some_and(|key| key != sender) {
        keys.push((MEMBER, &sender));
    }
    let mut events = Vec::new();
    for (event_type, state_key) in keys {
        let Some(key) = room_state::find_key(window.read, num, event_type, state_key)? else { continue };
        if let Some(event) = room_state::at(window.read, num, at, key)?.event() {
            events.extend(event::find_anywhere(window.read, num, event)?);
        }
    }
    events.push(own);
    Ok(Some(Outside::Ours(events)))
}

/// Finds the invitation or the knock by which a user stands before a room: as another server told it, or as an event of the room.
fn invitation(
    window: &Window<'_>,
    num: RoomNum,
    user_row: &UserRoomRow,
) -> Result<(Option<OutsideRow>, Option<StoredEvent>), Fault> {
    let told = outside::find(window.read, num, window.ask.caller.user, user_row)?;
    let own = match told {
        Some(_) => None,
        None => event::find(window.read, num, user_row.event)?,
    };
    Ok((told, own))
}

fn sender_of(told: Option<&OutsideRow>, own: Option<&StoredEvent>) -> Option<String> {
    match (told, own) {
        (Some(told), _) => Some(told.shown.sender.clone()),
        (None, Some(own)) => Some(own.row.sender().into_owned()),
        (None, None) => None,
    }
}

/// Whether the user wants to hear of an invitation to a room.
pub(crate) fn is_wanted_invitation(
    window: &Window<'_>,
    num: RoomNum,
    user_row: &UserRoomRow,
) -> Result<bool, Fault> {
    if window.invites()?.allows_all() {
        return Ok(true);
    }
    let (told, own) = invitation(window, num, user_row)?;
    let Some(sender) = sender_of(told.as_ref(), own.as_ref()) else { return Ok(false) };
    Ok(window.invites()?.judge(&sender) == Verdict::Allow)
}

/// Notes who came to share a room that the user is in, and who ceased to, when nothing else of the room is wanted.
pub(crate) fn shares(room: &RoomWindow<'_, '_>, shares: &mut Shares) -> Result<(), Fault> {
    let changes = state::changes(room, &mut Timeline::empty(room.place.end))?;
    note_shares(room, &changes, shares).map(drop)
}

/// Notes who came to share the room with the user, and who ceased to. Answers whether somebody's membership is another than
/// the client knows.
fn note_shares(room: &RoomWindow<'_, '_>, changes: &RoomState, shares: &mut Shares) -> Result<bool, Fault> {
    match room.place.standing {
        Standing::New => Ok(true),
        Standing::Knows(_) => {
            // Nobody can say when the client was told of each of those who became known meanwhile.
            if room.window.saw_whole(room.row) {
                shares.joined_room(room.window, room.num)?;
            }
            note_members(room, &changes.members, shares)
        }
        Standing::Returns(_) => {
            if was_joined_at(room.window, room.num, room.window.from)? {
                let known = room.window.known_order();
                // The user was in the room when the client asked last: others may have gone while the user was out.
                let place = RoomPlace { standing: Standing::Knows(known), ..room.place };
                let changes = state::changes(&room.at(place), &mut Timeline::empty(place.end))?;
                note_members(room, &changes.members, shares)?;
            }
            shares.joined_room(room.window, room.num)?;
            Ok(true)
        }
    }
}

fn note_members(
    room: &RoomWindow<'_, '_>,
    changes: &[MemberChange],
    shares: &mut Shares,
) -> Result<bool, Fault> {
    let mut are_others = false;
    for change in changes {
        let before = membership(room, change.before)?;
        let after = membership(room, change.after)?;
        are_others |= before != after;
        if after == Membership::Join && before != Membership::Join {
            shares.came.insert(change.user_id.clone());
        } else if before == Membership::Join && after != Membership::Join {
            shares.went.insert(change.user_id.clone());
        }
    }
    Ok(are_others)
}

fn membership(room: &RoomWindow<'_, '_>, value: StateValue) -> Result<Membership, Fault> {
    match value.event() {
        Some(event) => members::membership_of_event(room.window.read, room.num, event),
        None => Ok(Membership::Leave),
    }
}

/// Whether the user was joined to a room at a position.
fn was_joined_at(window: &Window<'_>, num: RoomNum, position: Position) -> Result<bool, Fault> {
    Ok(membership_at(window, num, position)? == Membership::Join)
}

/// Says what the user was to a room at a position.
pub(crate) fn membership_at(
    window: &Window<'_>,
    num: RoomNum,
    position: Position,
) -> Result<Membership, Fault> {
    let user_id = window.ask.caller.user_id.as_str();
    let Some(key) = room_state::find_key(window.read, num, MEMBER, user_id)? else {
        return Ok(Membership::Leave);
    };
    let at = StateRef::Main(Order::upto(position));
    let Some(event) = room_state::at(window.read, num, at, key)?.event() else {
        return Ok(Membership::Leave);
    };
    members::membership_of_event(window.read, num, event)
}
