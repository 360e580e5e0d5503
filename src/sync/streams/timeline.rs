//! The newest events of a room that the client has not been told of.

use std::collections::BTreeMap;

use crate::{
    ids::{EventNum, Order, StateKeyNum},
    rooms::{
        event::{self, StoredEvent},
        filter::Steps,
        timeline::{self, PageToken},
    },
    schema::{event_types::REDACTION, rooms::Membership},
    store::{Direction, Fault},
    sync::{filter::OfRooms, window::RoomWindow},
};

/// Look at no more than this many events for one timeline, because a filter may leave out most of them.
const LOOKED_AT_MAX: usize = 5_000;
/// The timeline ends after this many events in a row that the user may not see, because more of them will follow.
const HIDDEN_MAX: usize = 200;
/// A timeline has at most this many bytes, so that one room does not fill the answer; its first event may go beyond.
const BYTES_MAX: usize = 1 << 20;

/// A part of a room's timeline, as one answer tells it.
#[derive(Debug)]
pub(crate) struct Timeline {
    /// The events, rising, each with the user's membership at that event.
    pub(crate) events: Vec<(StoredEvent, Membership)>,
    /// Events may be missing between the last answer and these.
    pub(crate) limited: bool,
    /// There may be a redaction among the events that were looked for, shown or not.
    pub(crate) may_redact: bool,
    /// Events that the client does not know were left out: by the filter, because the user may not see them or ignores their
    /// sender, or because the timeline is limited.
    pub(crate) leaves_out: bool,
    /// The order of the first event; the order next above `end` if there is none.
    pub(crate) start: Order,
    /// The order up to which events were looked for.
    pub(crate) end: Order,
}

impl Timeline {
    /// Makes a timeline that shows nothing, up to this order.
    pub(crate) fn empty(end: Order) -> Self {
        Self {
            events: Vec::new(),
            limited: false,
            may_redact: false,
            leaves_out: true,
            start: end.next(),
            end,
        }
    }

    /// Whether the event at this order is shown.
    pub(crate) fn shows(&self, order: Order) -> bool {
        self.events.binary_search_by_key(&order, |(stored, _)| stored.order).is_ok()
    }

    /// The token with which `/messages` goes on towards older events.
    pub(crate) fn prev_batch(&self) -> PageToken {
        PageToken::below(self.start)
    }

    /// The newest event of each state key that the timeline shows.
    pub(crate) fn shown_state(&self) -> BTreeMap<StateKeyNum, (Order, EventNum)> {
        let states = self
            .events
            .iter()
            .filter_map(|(stored, _)| Some((stored.row.header.state_key?, (stored.order, stored.event()))));
        states.collect()
    }

    /// Leaves out everything at or below an order, and marks the timeline as limited.
    pub(crate) fn cut_through(&mut self, order: Order) {
        self.events.retain(|(stored, _)| stored.order > order);
        self.limited = true;
        self.leaves_out = true;
        self.start = self.events.first().map_or_else(|| self.end.next(), |(stored, _)| stored.order);
    }

    /// The ids of the users who sent its events.
    pub(crate) fn senders(&self) -> impl Iterator<Item = String> {
        self.events.iter().map(|(stored, _)| stored.row.sender().into_owned())
    }

    /// The ids of the users whom its member events are about.
    pub(crate) fn subjects(&self) -> impl Iterator<Item = String> {
        let members = self.events.iter().filter(|(stored, _)| stored.membership().is_some());
        members.filter_map(|(stored, _)| Some(stored.row.state_key()?.into_owned()))
    }
}

/// Collects the newest events up to the end of the window and above what the client knows.
pub(crate) fn collect(room: &RoomWindow<'_, '_>) -> Result<Timeline, Fault> {
    let (window, end) = (room.window, room.place.end);
    let filter = &window.ask.filter.timeline;
    let mut events: Vec<(StoredEvent, Membership)> = Vec::new();
    let (mut limited, mut may_redact) = (false, true);
    let mut leaves_out = !filter.wants_room(&room.row.id);
    if filter.wants_room(&room.row.id) {
        let (bytes_left, looks_left) = window.timeline_left();
        let (bytes_max, looked_at_max) = (bytes_left.min(BYTES_MAX), looks_left.min(LOOKED_AT_MAX));
        let after = room.place.known().map(PageToken);
        let page = timeline::page(window.read, room.num, PageToken(end), after, Direction::Down)?;
        let (mut looked_at, mut hidden, mut bytes) = (0, 0, 0);
        let (mut is_at_gap, mut steps) = (false, Steps::of_page());
        may_redact = false;
        for stored in page {
            let stored = stored?;
            // Events that are missing, or that came later, are for `/messages`: a timeline has no gap.
            is_at_gap |= stored.order.minor != 0;
            if is_at_gap {
                break;
            }
            if looked_at == looked_at_max || hidden > HIDDEN_MAX || steps.are_taken() {
                limited = true;
                break;
            }
            looked_at += 1;
            is_at_gap = event::lacks_cited(&stored.row);
            may_redact |= stored.row.event_type() == REDACTION;
            if is_unwanted(room, filter, &stored, &mut steps)? {
                leaves_out = true;
                continue;
            }
            let (membership, sees) = room.reader.look(window.read, &stored)?;
            if !sees {
                hidden += 1;
                leaves_out = true;
                continue;
            }
            hidden = 0;
            let is_too_large = bytes + stored.row.json.len() > bytes_max && (bytes > 0 || bytes_left == 0);
            if events.len() == room.place.timeline_limit || is_too_large {
                limited = true;
                break;
            }
            bytes += stored.row.json.len();
            events.push((stored, membership));
        }
        limited |= is_at_gap;
        window.spend_timeline(bytes, looked_at);
        if limited {
            tracing::debug!(
                user = %window.ask.caller.user,
                room = room.num.0,
                events = events.len(),
                looked_at,
                bytes,
                reason = "limit of events, bytes or looks, or a gap in the room's past",
                "a timeline is limited"
            );
        }
    } else {
        let user = window.ask.caller.user;
        tracing::debug!(%user, room = room.num.0, reason = "filter of rooms", "a timeline is withheld");
    }
    events.reverse();
    debug_assert!(events.is_sorted_by(|(a, _), (b, _)| a.order < b.order), "a timeline rises");
    debug_assert!(
        events.iter().all(|(stored, _)| room.place.known().is_none_or(|known| stored.order > known)),
        "nothing is told twice"
    );
    let start = events.first().map_or_else(|| end.next(), |(stored, _)| stored.order);
    let (may_redact, leaves_out) = (may_redact || limited, leaves_out || limited);
    Ok(Timeline { events, limited, may_redact, leaves_out, start, end })
}

/// Whether the client does not want an event in its timeline, whether or not the user may see it.
fn is_unwanted(
    room: &RoomWindow<'_, '_>,
    filter: &OfRooms,
    stored: &StoredEvent,
    steps: &mut Steps,
) -> Result<bool, Fault> {
    let related = &room.window.ask.filter.timeline_related;
    let reason = if room.reader.ignores(stored) {
        "ignored sender"
    } else if !room.wants(filter, stored)? {
        "filter"
    } else if !related.allows(room.view(), stored, &room.viewer(), steps)? {
        "filter of relations"
    } else {
        return Ok(false);
    };
    let (user, event) = (room.window.ask.caller.user, stored.event().0);
    tracing::debug!(%user, room = room.num.0, event, reason, "an event is left out of a timeline");
    Ok(true)
}
