//! Explains to the operator where an event stands in its room, and why a user sees it or does not.

use std::{fmt, sync::Arc};

use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedUserId, UserId};
use serde::{Deserialize, Serialize};

use super::accounts::require_user;
use crate::{
    accounts::{ignored::Ignored, users},
    error::{Refusal, Result},
    flows::App,
    ids::{EventNum, RoomNum},
    push::{Push, reader::Place as PushPlace},
    rooms::{
        self,
        event::{self, KeptEvent, StoredEvent},
        members, state,
        view::RoomView,
        visibility::{HistoryVisibility, Reader},
    },
    schema,
    schema::{
        event_types::{HISTORY_VISIBILITY, MEMBER},
        rooms::{Membership, Place, RoomRow, UserRoomRow},
        state::StateRef,
    },
    store::Snapshot,
};

/// The place of an event in its room, with the reasons for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explanation {
    /// The id of the event.
    pub event_id: OwnedEventId,
    /// The id of the room that the event belongs to.
    pub room_id: OwnedRoomId,
    /// Other rooms that have an event of the same id, as only rooms of versions 1 and 2 may. They are not explained.
    #[serde(default)]
    pub also_in: Vec<OwnedRoomId>,
    /// Our number of the room, by which log lines name it.
    pub room_number: u64,
    /// Our number of the event within its room, by which log lines name it.
    pub event_number: u64,
    /// The position at which it stands in the timeline, as tokens of `/sync` begin with one; none outside the timeline.
    pub position: Option<u64>,
    /// Whether it came in to fill a hole in the room's past. Its position is that of the hole then.
    pub is_back_filled: bool,
    /// The type of the event.
    pub event_type: String,
    /// The state key, if the event is a state event.
    pub state_key: Option<String>,
    /// The user id of the sender.
    pub sender: String,
    /// Whether the event was accepted, rejected, soft-failed, or is an outlier, and the rule that says so.
    pub verdict: String,
    /// Whether it is a head of its room: an event that no other cites yet.
    pub is_head: bool,
    /// The ids of the heads of its room.
    pub heads: Vec<OwnedEventId>,
    /// The ids of the events that it cites, as far as they are here.
    pub prev_events: Vec<OwnedEventId>,
    /// The ids of the events that authorise it, as far as they are here.
    pub auth_events: Vec<OwnedEventId>,
    /// The state before it: a place on the main line, or a side state.
    pub state_before: String,
    /// Whether it is part of the room's current state.
    pub is_current_state: bool,
    /// The id of the event that redacted it, if one did.
    pub redacted_by: Option<OwnedEventId>,
    /// The view of one user on the event, if one was asked for.
    pub reader: Option<ForReader>,
}

/// The view of one user on an event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForReader {
    /// The user id of the reader.
    pub user_id: OwnedUserId,
    /// The user's membership now; `nothing` if there is none.
    pub membership_now: String,
    /// The user's membership at the event; `nothing` if there was none.
    pub membership_then: String,
    /// The history visibility at the event.
    pub history_visibility: String,
    /// Whether the user is shown the event by endpoints that are asked for it, such as `/messages`.
    pub sees: bool,
    /// Whether `/sync` tells the user of the event, unless a filter or a limit leaves it out.
    pub told_by_sync: bool,
    /// The push rule by which it notifies the user, if one does.
    pub notified_by: Option<String>,
    /// The reasons, each a sentence for the operator.
    pub why: Vec<String>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.state_key.as_ref().map(|key| format!(", state key {key:?}")).unwrap_or_default();
        writeln!(f, "{} ({}{key}) of {} in {}", self.event_id, self.event_type, self.sender, self.room_id)?;
        for room_id in &self.also_in {
            writeln!(f, "  Another event of the same id is in {room_id}.")?;
        }
        write!(f, "  In the log the room is {} and the event {}. ", self.room_number, self.event_number)?;
        match self.position {
            Some(position) if self.is_back_filled => {
                writeln!(f, "It fills a hole in the room's past at position {position}.")?;
            }
            Some(position) => writeln!(f, "It is new to clients with a token of /sync below s{position}_.")?,
            None => writeln!(f, "It has no position in the room's timeline.")?,
        }
        writeln!(f, "  It is {}.", self.verdict)?;
        writeln!(f, "  The state before it is {}.", self.state_before)?;
        if self.state_key.is_some() {
            let is = if self.is_current_state { "is" } else { "is not" };
            writeln!(f, "  It {is} part of the room's current state.")?;
        }
        if let Some(redaction) = &self.redacted_by {
            writeln!(f, "  It was redacted by {redaction}.")?;
        }
        let list = |ids: &[OwnedEventId]| ids.iter().map(|id| id.to_string()).collect::<Vec<_>>().join(", ");
        writeln!(f, "  It cites {} and is allowed by {}.", list(&self.prev_events), list(&self.auth_events))?;
        writeln!(f, "  The room's heads are {}.", list(&self.heads))?;
        if let Some(reader) = &self.reader {
            let shown = match (reader.sees, reader.told_by_sync) {
                (true, true) => "is shown it, by /sync too",
                (true, false) => "is shown it where they ask for it, and not by /sync",
                (false, true) => "is shown it by /sync alone",
                (false, false) => "is not shown it",
            };
            writeln!(f, "  {} {shown}:", reader.user_id)?;
            for why in &reader.why {
                writeln!(f, "    {why}")?;
            }
        }
        Ok(())
    }
}

/// Explains an event by its id, for a user by name or id. Errors: 400 for what is no event id, 404 for what is not known here.
pub(super) async fn of_event(app: &App, event: &str, user: Option<String>) -> Result<Explanation> {
    let event = EventId::parse(event).map_err(|_| Refusal::invalid_param("This is not an event id."))?;
    let user = user.map(|name| require_user(app, &name).map(|(_, user_id)| user_id)).transpose()?;
    explain(app, event, user).await
}

/// Explains an event, and the view of a user of this server on it. Errors: 404 `M_NOT_FOUND` for an event or user that is not
/// here.
pub(crate) async fn explain(
    app: &App,
    event_id: OwnedEventId,
    user_id: Option<OwnedUserId>,
) -> Result<Explanation> {
    let owned = app.clone();
    app.env.blocking(move || about(&owned.store.snapshot(), &owned.push, &event_id, user_id)).await
}

fn about(
    read: &Snapshot,
    push: &Push,
    event_id: &EventId,
    user_id: Option<OwnedUserId>,
) -> Result<Explanation> {
    let unknown = || Refusal::not_found("There is no such event here.");
    let found = event::list_anywhere_by_id(read, event_id)?;
    let (first, others) = found.split_first().ok_or_else(unknown)?;
    let (num, event) = *first;
    let mut also_in = Vec::with_capacity(others.len());
    for (other, _) in others {
        also_in.push(rooms::require_row(read, *other)?.id);
    }
    let room = rooms::require_row(read, num)?;
    let kept = event::require_kept(read, num, event)?;
    let ids = |events: &[EventNum]| -> Result<Vec<OwnedEventId>> {
        let mut ids = Vec::with_capacity(events.len());
        for event in events {
            ids.extend(event::find_kept(read, num, *event)?.map(|kept| kept.id(&room)));
        }
        Ok(ids)
    };
    let header = &kept.row.header;
    let heads: Vec<EventNum> = room.heads.iter().map(|head| head.event).collect();
    let current = header.state_key.map(|key| state::current(read, num, key)).transpose()?.flatten();
    let view = RoomView { read, num, row: &room };
    let is_current_state = current == Some(event);
    let reader =
        user_id.map(|user_id| for_reader(view, push, &kept, is_current_state, user_id)).transpose()?;
    Ok(Explanation {
        event_id: kept.id(&room),
        room_id: room.id.clone(),
        also_in,
        room_number: num.0,
        event_number: event.0,
        position: kept.order().map(|order| order.anchor.number()),
        is_back_filled: kept.order().is_some_and(|order| order.minor != 0),
        event_type: kept.row.event_type().into_owned(),
        state_key: kept.row.state_key().map(std::borrow::Cow::into_owned),
        sender: kept.row.sender().into_owned(),
        verdict: verdict(read, num, &kept)?,
        is_head: heads.contains(&event),
        heads: ids(&heads)?,
        prev_events: ids(&header.prev)?,
        auth_events: ids(&header.auth)?,
        state_before: state_before(&kept, &room),
        is_current_state,
        redacted_by: ids(header.redacted_by.as_slice())?.pop(),
        reader,
    })
}

/// The judgement that an event got when it came in, in words for the operator.
fn verdict(read: &Snapshot, num: RoomNum, kept: &KeptEvent) -> Result<String> {
    let aside = schema::ASIDE.get(read, (num, kept.event()))?;
    let place = schema::PLACE.get(read, (num, kept.event()))?;
    Ok(match (place, aside) {
        (Some(Place::Outlier), Some(aside)) if aside.rejected => {
            format!("an outlier, rejected: {}", aside.why)
        }
        (Some(Place::Outlier), _) => "an outlier: known only because others need it".to_owned(),
        (_, Some(aside)) if aside.rejected => format!("rejected: {}", aside.why),
        (_, Some(aside)) => format!("soft-failed: {}", aside.why),
        _ if kept.row.header.expired => {
            "accepted; its content is deleted, because its lifetime is over".to_owned()
        }
        _ if kept.row.header.unseen => "accepted, and withheld from clients: it only merges heads, or is a \
                                        redaction that may not be or whose event is not here"
            .to_owned(),
        _ => "accepted".to_owned(),
    })
}

fn state_before(kept: &KeptEvent, room: &RoomRow) -> String {
    match (kept.row.header.before, kept.order()) {
        (Some(StateRef::Side(side)), _) => format!("side state {side}, for the room forked there"),
        (Some(StateRef::Main(order)), _) if order == room.state_tip => "the room's current state".to_owned(),
        (Some(StateRef::Main(order)), _) => format!("that of the main line at position {}", order.anchor),
        (None, Some(order)) => format!("that of the main line just below position {}", order.anchor),
        (None, None) => "not known".to_owned(),
    }
}

fn for_reader(
    view: RoomView<'_, Snapshot>,
    push: &Push,
    kept: &KeptEvent,
    is_current_state: bool,
    user_id: OwnedUserId,
) -> Result<ForReader> {
    let RoomView { read, num, .. } = view;
    let user = users::require_num(read, &user_id)?;
    let row = members::find(read, user, num)?;
    let now = row.as_ref().map_or("nothing", |row| row.membership.as_str());
    let (membership_then, visibility_then) = at_event(view, kept, &user_id)?;
    let mut found = ForReader {
        membership_now: now.to_owned(),
        membership_then: membership_then.map_or("nothing", Membership::as_str).to_owned(),
        history_visibility: visibility_then.as_str().to_owned(),
        sees: false,
        told_by_sync: false,
        notified_by: None,
        why: Vec::new(),
        user_id,
    };
    let mut why = vec![format!("Now the user is {now} to the room.")];
    if row.as_ref().is_some_and(|row| row.forgotten) {
        why.push("The user has forgotten the room.".to_owned());
    }
    if before(kept).is_some() {
        why.push(format!(
            "At the event the user was {} to the room, whose history was {} then.",
            found.membership_then, found.history_visibility
        ));
    }
    let joined = row.as_ref().filter(|row| row.membership == Membership::Join);
    if let Some(stored) = kept.in_timeline() {
        let ignored = Arc::new(Ignored::of(read, user, &found.user_id)?);
        let reader = Reader::of(read, num, user, &found.user_id, ignored)?;
        found.sees = !stored.row.header.unseen && reader.sees(read, &stored)?;
        if reader.ignores(&stored) {
            why.push("The user ignores its sender.".to_owned());
        }
        let told = by_sync(&reader, row.as_ref(), &stored, found.sees);
        found.told_by_sync = told.is_told;
        why.push(told.why.to_owned());
        if let Some(row) = joined.filter(|_| found.sees && stored.order.minor == 0) {
            let place = PushPlace { num, row: view.row, joined: row.since };
            let rule = push.reader(read, user, &found.user_id)?.explain(read, place, &stored)?;
            let rule = rule.filter(|rule| rule.outcome.notify);
            found.notified_by = rule.map(|rule| rule.rule_id);
            why.push(match &found.notified_by {
                Some(rule) => format!("It notifies the user by the rule {rule}."),
                None => "It notifies the user by no rule.".to_owned(),
            });
        }
        if users::is_erased(read, &stored.row.sender())? && found.membership_then != "join" {
            why.push("Its sender asked to be erased: it is shown redacted.".to_owned());
        }
    } else {
        why.push("The event is not part of the room's timeline.".to_owned());
    }
    if is_current_state && joined.is_some() && !found.told_by_sync {
        found.told_by_sync = true;
        why.push("It is current state, which /sync tells beside the timeline.".to_owned());
    }
    found.why = why;
    Ok(found)
}

/// The state before an event, if it is known.
fn before(kept: &KeptEvent) -> Option<StateRef> {
    kept.row.header.before.or_else(|| kept.order().map(|order| StateRef::Main(order.before())))
}

/// The membership that a user had just before an event, and the history visibility then, which is shared where none was set.
fn at_event(
    view: RoomView<'_, Snapshot>,
    kept: &KeptEvent,
    user_id: &UserId,
) -> Result<(Option<Membership>, HistoryVisibility)> {
    let RoomView { read, num, .. } = view;
    let Some(before) = before(kept) else { return Ok((None, HistoryVisibility::Shared)) };
    let at = |event_type: &str, state_key: &str| -> Result<Option<KeptEvent>> {
        let Some(key) = state::find_key(read, num, event_type, state_key)? else { return Ok(None) };
        let event = state::at(read, num, before, key)?.event();
        Ok(event.map(|event| event::require_kept(read, num, event)).transpose()?)
    };
    let visibility = at(HISTORY_VISIBILITY, "")?;
    let visibility = visibility.map(|kept| HistoryVisibility::of_content(kept.row.content()));
    let membership = at(MEMBER, user_id.as_str())?.and_then(|kept| kept.membership());
    Ok((membership, visibility.unwrap_or(HistoryVisibility::Shared)))
}

/// Whether `/sync` tells an event, and why.
struct BySync {
    is_told: bool,
    why: &'static str,
}

/// Says whether `/sync` tells the user of an event of the timeline. It tells less than other endpoints show: only what is live,
/// up to the end of the user's stay, and the event that ended it.
fn by_sync(reader: &Reader, row: Option<&UserRoomRow>, stored: &StoredEvent, sees: bool) -> BySync {
    let not = |why| BySync { is_told: false, why };
    let told = |why| BySync { is_told: true, why };
    if stored.row.header.unseen {
        return not("No client is shown the event.");
    }
    let Some(row) = row else { return not("/sync tells nothing of a room to which the user is nothing.") };
    if row.event == stored.event() && row.membership != Membership::Join {
        return match row.membership {
            Membership::Invite => {
                told("/sync tells it as the user's invitation, unless invitations are blocked.")
            }
            _ => told("/sync tells it once, because it made the user what they are to the room."),
        };
    }
    if stored.order.minor != 0 {
        return not("It was back-filled, so that /messages shows it and /sync does not.");
    }
    match reader.joined_until() {
        Some(until) if stored.order <= until && sees => {
            told("The timeline of /sync tells it, unless a filter or a limit leaves it out.")
        }
        Some(until) if stored.order <= until => not("/sync does not tell what the user may not see."),
        Some(_) => not("It came after the user's stay, at whose end /sync stops."),
        None => not("The user has no stay in the room, of which /sync would tell the timeline."),
    }
}
