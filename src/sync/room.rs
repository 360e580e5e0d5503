//! One room in an answer: joined, left, invited to, or knocked at.

use std::collections::BTreeSet;

use crate::{
    accounts,
    ids::{EventNum, Order, Position, RoomNum},
    json::JsonText,
    rooms::{
        event::{self, Stored},
        members as room_members, show, state as room_state,
        view::RoomView,
        visibility::Sight,
    },
    schema::{
        accounts::WrittenRow,
        rooms::{Membership, RoomRow, UserRoomRow},
        state::{Ref, Val},
    },
    store::Fault,
    sync::{
        answer::Object,
        streams::{
            Window, account_data,
            device_lists::Shares,
            members, receipts,
            state::{self, MemberChange, RoomState},
            timeline::{self, Timeline},
            typing, unread,
        },
    },
};

/// State that tells somebody outside what room they are invited to.
const STRIPPED: [&str; 7] = [
    "m.room.create",
    "m.room.name",
    "m.room.avatar",
    "m.room.topic",
    "m.room.join_rules",
    "m.room.canonical_alias",
    "m.room.encryption",
];

/// A room with what the user is to it, and the user's account data in it that is new.
pub(crate) struct Room<'a> {
    /// Its number.
    pub(crate) num: RoomNum,
    /// The room.
    pub(crate) row: &'a RoomRow,
    /// What the user is to it.
    pub(crate) user_row: &'a UserRoomRow,
    /// New account data.
    pub(crate) account_data: &'a [(String, WrittenRow)],
}

/// A room that the user is in. `None` if nothing in it is new.
pub(crate) fn joined(
    window: &Window<'_>,
    room: &Room<'_>,
    shares: &mut Shares,
) -> Result<Option<String>, Fault> {
    let Room { num, row, user_row, .. } = *room;
    let is_new = window.since.is_none() || user_row.since > window.from;
    let upto = Order::upto(window.upto);
    let after = (!is_new).then(|| window.known_order());
    let mut sight = Sight::of(window.read, num, window.ask.caller.user, &window.ask.caller.user_id)?;
    let mut timeline = timeline::collect(window, num, row, &mut sight, after, upto)?;
    if window.since.is_none() {
        members::forget(window, num);
    } else if is_new {
        // The client may know parts of this from an earlier stay: it begins the timeline anew.
        timeline.limited = true;
    }
    let begins = is_new || window.ask.full_state;
    let changes = match after {
        Some(known) => state::changed(window, num, &timeline, known, upto)?,
        None => RoomState::default(),
    };
    note_shares(window, num, &changes.members, is_new, shares)?;
    let mut answer = Object::new();
    // Heroes take part in lazy loading: a client cannot name the room without them.
    let members_changed = begins || !changes.members.is_empty();
    let heroes = if members_changed { members::heroes(window, num)? } else { None };
    let shown = room_state(window, room, &timeline, changes, begins, upto, heroes.as_deref())?;
    if members_changed {
        answer.raw("summary", &members::summary(row, heroes.as_deref()));
    }
    put_timeline(window, room, &timeline, &shown, begins, &mut answer)?;
    let known = if is_new { Position::ZERO } else { window.from };
    let mut ephemeral = receipts::collect(window, num, row, known)?;
    ephemeral.extend(typing::collect(window, num, row, !is_new));
    let data = if is_new && window.since.is_some() {
        let whole = account_data::of_room(window, row.id.as_str())?;
        show_data(window, &Room { account_data: &whole, ..*room })
    } else {
        show_data(window, room)
    };
    let is_empty = timeline.events.is_empty()
        && !timeline.limited
        && shown.is_empty()
        && ephemeral.is_empty()
        && data.is_empty();
    if is_empty && !begins && !unread::is_news(window, num, row, user_row.since)? {
        return Ok(None);
    }
    answer.events("ephemeral", ephemeral);
    answer.events("account_data", data);
    unread::collect(window, num, row, user_row.since, &mut answer)?;
    Ok(Some(answer.finish()))
}

/// A room that the user has left, or was kicked or banned from. `None` if that is no news.
pub(crate) fn left(
    window: &Window<'_>,
    room: &Room<'_>,
    shares: &mut Shares,
) -> Result<Option<String>, Fault> {
    let Room { num, row, user_row, .. } = *room;
    let is_new = window.since.is_none();
    let Some(upto) = members::since_order(window.read, num, user_row.event)? else { return Ok(None) };
    let was_joined = was_joined(window, num, upto)?;
    let mut sight = Sight::of(window.read, num, window.ask.caller.user, &window.ask.caller.user_id)?;
    // Who was never in, or comes to know of it now, is shown the end and not the past.
    let after = if is_new { None } else { Some(window.known_order()) };
    let timeline = timeline::collect(window, num, row, &mut sight, after, upto)?;
    let begins = is_new || window.ask.full_state;
    let changes = match after {
        Some(known) if was_joined => state::changed(window, num, &timeline, known, upto)?,
        _ => RoomState::default(),
    };
    if was_joined && !is_new {
        shares.left_room(window, num, upto)?;
    }
    let mut answer = Object::new();
    let begins_here = begins && sight.joined_until().is_some();
    let shown = room_state(window, room, &timeline, changes, begins_here, upto, None)?;
    put_timeline(window, room, &timeline, &shown, begins_here, &mut answer)?;
    answer.events("account_data", show_data(window, room));
    Ok(Some(answer.finish()))
}

/// A room that the user is invited to. `None` if the user does not want to hear of who invites, or of any invitation.
pub(crate) fn invited(window: &Window<'_>, room: &Room<'_>) -> Result<Option<String>, Fault> {
    let Some(own) = event::find(window.read, room.num, room.user_row.event)? else { return Ok(None) };
    let blocks = || accounts::account_data::blocks_invites(window.read, window.ask.caller.user);
    if window.ignores(&own.row.sender()) || blocks()? {
        return Ok(None);
    }
    let mut answer = Object::new();
    answer.events("invite_state", stripped(window, room, &own)?);
    Ok(Some(answer.finish()))
}

/// A room that the user knocks at.
pub(crate) fn knocked(window: &Window<'_>, room: &Room<'_>) -> Result<Option<String>, Fault> {
    let Some(own) = event::find(window.read, room.num, room.user_row.event)? else { return Ok(None) };
    let mut answer = Object::new();
    answer.events("knock_state", stripped(window, room, &own)?);
    Ok(Some(answer.finish()))
}

/// What the room looked like from outside when this member event was sent.
fn stripped(window: &Window<'_>, room: &Room<'_>, own: &Stored) -> Result<Vec<JsonText>, Fault> {
    let Room { num, row, .. } = *room;
    let view = RoomView { read: window.read, num, row };
    let at = Ref::Main(own.order);
    let mut keys: Vec<(&str, String)> = STRIPPED.iter().map(|kind| (*kind, String::new())).collect();
    let sender = own.row.sender().into_owned();
    if own.row.state_key().is_some_and(|key| key != sender) {
        keys.push(("m.room.member", sender));
    }
    let mut events = Vec::new();
    for (kind, state_key) in keys {
        let Some(key) = room_state::find_key(window.read, num, kind, &state_key)? else { continue };
        if let Some(stored) = event_of(window, num, room_state::at(window.read, num, at, key)?)? {
            events.push(show::stripped_state(&*window.viewer().seen_in_state(view, &stored)?));
        }
    }
    events.push(show::stripped_state(&*window.viewer().seen_in_state(view, own)?));
    Ok(events)
}

fn event_of(window: &Window<'_>, num: RoomNum, value: Val) -> Result<Option<Stored>, Fault> {
    Ok(match value.event() {
        Some(event) => event::find(window.read, num, event)?,
        None => None,
    })
}

/// The state that goes with a timeline, lazily loaded members included.
fn room_state(
    window: &Window<'_>,
    room: &Room<'_>,
    timeline: &Timeline,
    changes: RoomState,
    begins: bool,
    upto: Order,
    heroes: Option<&[String]>,
) -> Result<Vec<Stored>, Fault> {
    let num = room.num;
    let lazy = window.ask.filter.lazy_members;
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    if lazy {
        wanted = members::senders(timeline);
        wanted.extend(heroes.unwrap_or_default().iter().cloned());
        if window.ask.use_state_after {
            // What the timeline says of members is not state to such a client.
            wanted.extend(members::subjects(timeline));
        }
        if begins {
            wanted.insert(window.ask.caller.user_id.to_string());
        }
    }
    let at = state::place(window, timeline, upto);
    let mut events =
        if begins { state::whole(window, num, at, lazy.then_some(&wanted))? } else { changes.events };
    if lazy && !begins {
        let missing = members::missing(window, num, at, &wanted, &events)?;
        // A member that is told in the timeline need not be told beside it.
        let shown: BTreeSet<EventNum> = timeline.events.iter().map(|(stored, _)| stored.event()).collect();
        let is_before = !window.ask.use_state_after;
        events.extend(missing.into_iter().filter(|stored| is_before || !shown.contains(&stored.event())));
    }
    if lazy {
        members::remember(window, num, events.iter().chain(timeline.events.iter().map(|(stored, _)| stored)));
    }
    Ok(events)
}

fn put_timeline(
    window: &Window<'_>,
    room: &Room<'_>,
    timeline: &Timeline,
    state: &[Stored],
    begins: bool,
    answer: &mut Object,
) -> Result<(), Fault> {
    let name = if window.ask.use_state_after { "state_after" } else { "state" };
    answer.events(name, state::show(window, room.num, room.row, state, !begins)?);
    let mut part = Object::new();
    part.list("events", timeline::show(window, room.num, room.row, timeline)?);
    part.flag("limited", timeline.limited);
    part.text("prev_batch", &timeline.prev_batch.to_string());
    answer.raw("timeline", &part.finish());
    Ok(())
}

fn show_data(window: &Window<'_>, room: &Room<'_>) -> Vec<String> {
    let filter = &window.ask.filter.room_account_data;
    account_data::show(room.account_data, |kind| filter.wants_room(&room.row.id) && filter.wants_type(kind))
}

/// Whether the user was joined at some moment since the client asked last.
fn was_joined(window: &Window<'_>, num: RoomNum, upto: Order) -> Result<bool, Fault> {
    let user_id = window.ask.caller.user_id.as_str();
    let Some(member) = room_state::find_key(window.read, num, "m.room.member", user_id)? else {
        return Ok(false);
    };
    for row in room_state::changes(window.read, num, window.known_order(), upto)? {
        for (key, prior) in row?.1 {
            if key == member && membership(window, num, prior)? == Membership::Join {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn membership(window: &Window<'_>, num: RoomNum, value: Val) -> Result<Membership, Fault> {
    match value.event() {
        Some(event) => room_members::membership_of_event(window.read, num, event),
        None => Ok(Membership::Leave),
    }
}

/// Who came to share the room with the user, and who no longer does.
fn note_shares(
    window: &Window<'_>,
    num: RoomNum,
    changes: &[MemberChange],
    is_new: bool,
    shares: &mut Shares,
) -> Result<(), Fault> {
    if window.since.is_none() {
        return Ok(());
    }
    if is_new {
        return shares.joined_room(window, num);
    }
    for change in changes {
        let before = membership(window, num, change.before)?;
        let after = membership(window, num, change.after)?;
        if after == Membership::Join && before != Membership::Join {
            shares.came.insert(change.user_id.clone());
        } else if before == Membership::Join && after != Membership::Join {
            shares.went.insert(change.user_id.clone());
        }
    }
    Ok(())
}
