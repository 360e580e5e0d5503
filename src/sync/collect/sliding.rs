//! The news of a room as sliding sync tells it: of a room from a place of its own, with the state that the client wants.

use super::{
    EndOfStay, end_of_stay, heroes, note_members,
    required::{self, StateNews, Wanted},
    state::{self, RoomState},
};
use crate::{
    ids::Position,
    json::JsonText,
    rooms::{
        self,
        event::StoredEvent,
        timeline::{PageToken, page},
    },
    schema::event_types::{AVATAR, CREATE, ENCRYPTED, MEMBER, MESSAGE, NAME},
    store::{Direction, Fault},
    sync::{
        shares::Shares,
        streams::{
            timeline::{self, Timeline},
            unread::{self, Counts},
        },
        window::{RoomPlace, RoomWindow, Standing},
    },
};

/// The types of events by which a room counts as active (MSC4186, `bump_stamp`), and the names of some before they were settled.
const BUMPING: [&str; 9] = [
    CREATE,
    MESSAGE,
    ENCRYPTED,
    "m.sticker",
    "m.call.invite",
    "m.poll.start",
    "org.matrix.msc3381.poll.start",
    "m.beacon_info",
    "org.matrix.msc3672.beacon_info",
];
/// Look at no more than this many events below a timeline for one by which the room was active.
const BUMP_LOOKED_AT: usize = 100;

/// The news of a room that the user is or was in.
#[derive(Debug)]
pub(crate) struct RoomNews {
    /// The newest events of the room.
    pub(crate) timeline: Timeline,
    /// How many of them came since the client asked last.
    pub(crate) live_count: usize,
    /// The timeline goes back behind what the client was told, because the client wants more events now.
    pub(crate) is_expanded: bool,
    /// The state that the client wants and does not know.
    pub(crate) state: StateNews,
    /// The event that says what the user is now where it stands nowhere in the room as it is known here.
    pub(crate) outside: Option<JsonText>,
    /// The room's name, if that changed: None where it has none any more.
    pub(crate) name: Option<Option<String>>,
    /// The room's picture, if that changed: None where it has none any more.
    pub(crate) avatar: Option<Option<String>>,
    /// How many members there are, and after whom the room is named, if that changed.
    pub(crate) summary: Option<Summary>,
    /// How much of the room the user has not read. None where they are not in it.
    pub(crate) counts: Option<Counts>,
    /// When the room was last active, if that changed.
    pub(crate) bump_stamp: Option<Position>,
    /// Whether any of this is new to the client.
    pub(crate) is_news: bool,
}

/// The members of a room, counted, and those after whom it is named.
#[derive(Debug)]
pub(crate) struct Summary {
    /// How many users are joined, on all servers.
    pub(crate) joined: u32,
    /// How many users are invited, on all servers.
    pub(crate) invited: u32,
    /// The members after whom a client names the room. None if it has a name.
    pub(crate) heroes: Option<Vec<Hero>>,
}

/// A member after whom a client names a room.
#[derive(Debug)]
pub(crate) struct Hero {
    /// The id of the user.
    pub(crate) user_id: String,
    /// The name that the user goes by in the room.
    pub(crate) display_name: Option<String>,
    /// The picture of the user in the room.
    pub(crate) avatar_url: Option<String>,
}

/// Collects a room that the user is in. `events` says how many of the newest events the client has; if it wants more, they are
/// told.
pub(crate) fn joined(room: &RoomWindow<'_, '_>, wanted: Wanted<'_>, events: u32) -> Result<RoomNews, Fault> {
    let place = room.place;
    let (mut timeline, is_expanded) = timeline_of(room, events)?;
    timeline.limited |= matches!(place.standing, Standing::Returns(_));
    let changes = state::changes(room, &mut timeline)?;
    // A client that was told the room while some of its members were unknown is told the state anew.
    let wanted = Wanted { known: wanted.known.filter(|_| !room.saw_whole()), ..wanted };
    let state = required::collect(room, &timeline, &changes, wanted)?;
    let is_renamed = changes.is_renamed || (timeline.may_redact && heroes::lost_name(room)?);
    let is_other_summary = is_renamed || room.saw_whole() || !changes.members.is_empty();
    let summary = if place.is_whole() || is_other_summary { Some(summary(room)?) } else { None };
    let are_others = note_members(room, &changes.members, &mut Shares::default())?;
    let name = changed_text(room, &changes, NAME, "name")?;
    let avatar = changed_text(room, &changes, AVATAR, "url")?;
    let is_news = place.is_whole()
        || !timeline.events.is_empty()
        || timeline.limited
        || !state.events.is_empty()
        || !state.gone.is_empty()
        || name.is_some()
        || avatar.is_some()
        || are_others
        || is_renamed
        || room.saw_whole()
        || unread::is_news(room)?;
    let (mut counts, mut bumped) = (None, None);
    if is_news {
        counts = Some(unread::collect(room)?);
        bumped = bump_stamp(room, &timeline)?;
    }
    let live_count = live_count(room, &timeline);
    Ok(RoomNews {
        timeline,
        live_count,
        is_expanded,
        state,
        outside: None,
        name,
        avatar,
        summary,
        counts,
        bump_stamp: bumped,
        is_news,
    })
}

/// Collects the newest events that the client does not know. If it has fewer than it wants of the newest ones, those before are
/// told again, and the second answer is true.
fn timeline_of(room: &RoomWindow<'_, '_>, events: u32) -> Result<(Timeline, bool), Fault> {
    let timeline = timeline::collect(room)?;
    let limit = room.place.timeline_limit;
    let has_all = timeline.limited || timeline.events.len() >= limit || events as usize >= limit;
    let Some(known) = room.place.known().filter(|_| !has_all) else { return Ok((timeline, false)) };
    let wider = timeline::collect(&room.at(RoomPlace { standing: Standing::New, ..room.place }))?;
    let is_expanded = wider.start <= known;
    Ok((if is_expanded { wider } else { timeline }, is_expanded))
}

/// Collects a room that the user has left, or was kicked or banned from, or did not come into.
pub(crate) fn left(room: &RoomWindow<'_, '_>, wanted: Wanted<'_>) -> Result<RoomNews, Fault> {
    let EndOfStay { mut timeline, changes, own, outside } = end_of_stay(room)?;
    let mut state = StateNews { members: wanted.members.to_vec(), ..StateNews::default() };
    let (mut name, mut avatar) = (None, None);
    if let Some(changes) = &changes {
        timeline.limited |= matches!(room.place.standing, Standing::Returns(_));
        state = required::collect(room, &timeline, changes, wanted)?;
        name = changed_text(room, changes, NAME, "name")?;
        avatar = changed_text(room, changes, AVATAR, "url")?;
    }
    let live_count = live_count(room, &timeline) + usize::from(own.is_some());
    match own {
        Some(own) => {
            if timeline.events.is_empty() {
                timeline.start = own.order;
            }
            // Clients learn from this event that their user is not in the room, whatever state they want.
            required::replace(&mut state, own.clone());
            timeline.events.push((own, room.user_row.membership));
        }
        None => tell_own_end(room, &mut state)?,
    }
    let bump_stamp = Some(room.user_row.left.map_or(room.user_row.since, |left| left.anchor));
    Ok(RoomNews {
        timeline,
        live_count,
        is_expanded: false,
        state,
        outside,
        name,
        avatar,
        summary: None,
        counts: None,
        bump_stamp,
        is_news: true,
    })
}

/// Tells the event by which the user is no longer in the room, or that no event says that they are, whatever state the client
/// wants.
fn tell_own_end(room: &RoomWindow<'_, '_>, state: &mut StateNews) -> Result<(), Fault> {
    let user_id = room.window.caller().user_id.as_str();
    if room.reader.joined_until().is_none() {
        return Ok(());
    }
    match required::find(room, MEMBER, user_id)? {
        Some(own) => required::replace(state, own),
        None => {
            let key = (MEMBER.to_owned(), user_id.to_owned());
            if !state.gone.contains(&key) {
                state.gone.push(key);
            }
        }
    }
    Ok(())
}

/// Counts the events of a timeline that came since the client asked last, whether it knew the room then or not.
fn live_count(room: &RoomWindow<'_, '_>, timeline: &Timeline) -> usize {
    let window = room.window;
    if window.since.is_none() {
        return 0;
    }
    let known = window.known_order();
    timeline.events.iter().rev().take_while(|(stored, _)| stored.order > known).count()
}

/// Reads a text from the state event of a type, if the client does not know it as it is now.
fn changed_text(
    room: &RoomWindow<'_, '_>,
    changes: &RoomState,
    event_type: &str,
    field: &str,
) -> Result<Option<Option<String>>, Fault> {
    let is_whole = room.place.is_whole();
    let is_changed =
        changes.changed.iter().any(|key| key.event_type == event_type && key.state_key.is_empty());
    // A redaction takes the text away while the event stays what it is.
    if !is_whole && !is_changed && changes.redacted.is_empty() {
        return Ok(None);
    }
    let stored = required::find(room, event_type, "")?;
    let is_redacted = stored.as_ref().is_some_and(|stored| changes.redacted.contains(&stored.event()));
    let text = stored.and_then(|stored| text_of(&stored, field));
    Ok(match is_whole {
        true => text.map(Some),
        false => (is_changed || is_redacted).then_some(text),
    })
}

fn text_of(stored: &StoredEvent, field: &str) -> Option<String> {
    let content: serde_json::Value = serde_json::from_str(stored.row.content()).ok()?;
    let text = content.get(field)?.as_str()?;
    (!text.is_empty()).then(|| text.to_owned())
}

fn summary(room: &RoomWindow<'_, '_>) -> Result<Summary, Fault> {
    let heroes::Summary { heroes, joined, invited } = heroes::summary(room)?;
    let heroes = match heroes {
        Some(ids) => Some(ids.into_iter().map(|id| hero(room, id)).collect::<Result<_, _>>()?),
        None => None,
    };
    Ok(Summary { joined, invited, heroes })
}

fn hero(room: &RoomWindow<'_, '_>, user_id: String) -> Result<Hero, Fault> {
    let own = rooms::find_state(room.window.read, room.num, MEMBER, &user_id)?;
    let text = |field| own.as_ref().and_then(|own| text_of(own, field));
    let (display_name, avatar_url) = (text("displayname"), text("avatar_url"));
    Ok(Hero { user_id, display_name, avatar_url })
}

/// Finds when the room was last active: where the client does not know it, or where that changed.
fn bump_stamp(room: &RoomWindow<'_, '_>, timeline: &Timeline) -> Result<Option<Position>, Fault> {
    let bumps = |stored: &StoredEvent| BUMPING.contains(&&*stored.row.event_type());
    let shown = timeline.events.iter().rev().map(|(stored, _)| stored);
    if let Some(stored) = shown.into_iter().find(|stored| bumps(stored)) {
        return Ok(Some(stored.order.anchor));
    }
    let floor = room.place.known();
    if !timeline.limited && floor.is_some() {
        return Ok(None);
    }
    let mut last = room.place.end.min(timeline.start);
    let below = PageToken::below(timeline.start);
    let after = floor.map(PageToken);
    let events = page(room.window.read, room.num, below, after, Direction::Down)?;
    for stored in events.take(BUMP_LOOKED_AT) {
        let stored = stored?;
        last = stored.order;
        if bumps(&stored) && room.reader.sees(room.window.read, &stored)? {
            return Ok(Some(stored.order.anchor));
        }
    }
    // The room was last active further down, or not at all since the client knew it.
    Ok(floor.is_none().then_some(last.anchor))
}
