//! Shows events as readers see them.
//!
//! Events are stored as they were signed. A reader is shown JSON that is put together from parts of the stored event,
//! and `unsigned` is worked out for that reader: the events that refer to it ([`bundle`]), the one it replaced, the one
//! that redacted it, and nothing that was written by users who asked to be erased (`rooms/erased.rs`).

mod bundle;

use std::{borrow::Cow, collections::BTreeMap};

use ruma::{EventId, OwnedEventId, UserId};
use serde_json::value::RawValue;

use crate::{
    ids::DeviceNum,
    json::{JsonText, List, Object},
    rooms::{
        erased::Erased,
        event::{self, StoredEvent},
        sticky, versions,
        view::RoomView,
        visibility::Reader,
    },
    schema,
    schema::delayed::NO_DEVICE,
    schema::event_types::{CREATE, STICKY},
    schema::rooms::{EventRow, Membership, RoomRow},
    store::{Fault, Read},
};

pub(crate) use bundle::newest_in_thread;

use bundle::Depth;

/// The reader for whom an event is shown, and the form in which it is.
#[derive(Clone, Copy)]
pub struct Viewer<'a> {
    /// The user who reads the event.
    pub user: &'a UserId,
    /// The device that reads, which alone sees the transaction ids of its own events.
    pub device: Option<DeviceNum>,
    /// The time now, in milliseconds since the epoch, from which `age` is counted.
    pub now_ms: u64,
    /// Whether the event names its room; `/sync` leaves that out.
    pub with_room_id: bool,
    /// The reader's rights in the room: events that stand inside others are checked against them.
    pub reader: &'a Reader,
    /// The senders whose events are shown redacted to users who were not in the room.
    pub erased: &'a Erased,
}

impl Viewer<'_> {
    /// Gives the event as this viewer is shown it, in the timeline as in the state of the room.
    pub fn seen<'s>(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &'s StoredEvent,
    ) -> Result<Cow<'s, StoredEvent>, Fault> {
        self.erased.seen(view, stored, self.user)
    }

    /// Whether this viewer is shown only the redacted form of the event.
    pub fn hides(&self, view: RoomView<'_, impl Read + ?Sized>, stored: &StoredEvent) -> Result<bool, Fault> {
        self.erased.hides(view, stored, self.user)
    }

    /// Whether this viewer sees to which other event this one refers. An event that they are shown redacted refers to none.
    pub fn sees_relation(
        &self,
        view: RoomView<'_, impl Read + ?Sized>,
        stored: &StoredEvent,
    ) -> Result<bool, Fault> {
        Ok(self.reader.sees(view.read, stored)? && !self.hides(view, stored)?)
    }

    /// Whether this viewer sees every relation between events of the room, so that nothing need be asked for each.
    pub fn sees_all_relations(&self, read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
        Ok(self.reader.sees_everything(read)? && !self.erased.anybody(read)?)
    }
}

/// The fields of an event's `unsigned` beside its age.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// The transaction id, for the device that sent the event.
    pub transaction_id: Option<String>,
    /// For how many milliseconds more it is a sticky event (MSC4354).
    pub sticky_left_ms: Option<u64>,
    /// The id of the delayed event that it was (MSC4140), for its sender.
    pub delay_id: Option<String>,
    /// The state event that this one replaced, and its id.
    pub replaces: Option<(StoredEvent, OwnedEventId)>,
    /// The event that redacted this one, as the viewer is shown it, if they may see it too, and its id.
    pub redacted_because: Option<(JsonText, OwnedEventId)>,
    /// The viewer's membership of the room at this event (MSC4115).
    pub membership: Option<Membership>,
    /// The events that refer to this one, bundled as `m.relations`.
    pub relations: Option<JsonText>,
}

/// Writes the event as clients see it, put together from the stored bytes: nothing is parsed or serialised again.
pub fn client_json(room: &RoomRow, stored: &StoredEvent, viewer: &Viewer<'_>, extras: &Extras) -> JsonText {
    let mut event = Object::with_capacity(stored.row.json.len() + 192);
    write(&mut event, room, stored, viewer, extras);
    event.finish()
}

/// Writes the fields of an event as clients see them.
pub(crate) fn write(
    event: &mut Object,
    room: &RoomRow,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
    extras: &Extras,
) {
    let (row, spans) = (&stored.row, &stored.row.header.spans);
    let rules = versions::find_rules(room.version).map(|rules| &rules.redaction);
    let target = rules.and_then(|rules| event::redaction_target(row, rules));
    match &target {
        // Clients look in the content or beside it, whatever the room's version (`m.room.redaction`).
        Some(target) => event.json("content", &content_with_target(row, target)),
        None => event.json("content", row.json_of(spans.content)),
    }
    event.text("event_id", stored.id(room).as_str());
    if let Some(sticky) = sticky::field(&row.json) {
        event.json(STICKY, &*sticky);
    }
    event.number("origin_server_ts", row.header.sent_ms);
    if let Some(target) = &target {
        event.text("redacts", target.as_str());
    }
    if viewer.with_room_id {
        event.text("room_id", room.id.as_str());
    }
    event.json("sender", row.json_of(spans.sender));
    if spans.state_key.length > 0 {
        event.json("state_key", row.json_of(spans.state_key));
    }
    event.json("type", row.json_of(spans.event_type));
    event.object("unsigned", |unsigned| write_unsigned(unsigned, stored, viewer, extras));
}

/// Writes the content of a redaction, with the id of the redacted event in place of whatever its sender wrote there.
fn content_with_target(row: &EventRow, target: &EventId) -> JsonText {
    let fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(row.content()).unwrap_or_default();
    let mut content = Object::new();
    for (name, value) in fields.into_iter().filter(|(name, _)| name != "redacts") {
        content.json(&name, value);
    }
    content.text("redacts", target.as_str());
    content.finish()
}

fn write_unsigned(unsigned: &mut Object, stored: &StoredEvent, viewer: &Viewer<'_>, extras: &Extras) {
    unsigned.number("age", viewer.now_ms.saturating_sub(stored.row.header.sent_ms));
    if let Some(membership) = extras.membership {
        unsigned.text("membership", membership.as_str());
    }
    if let Some(relations) = &extras.relations {
        unsigned.json("m.relations", relations);
    }
    if let Some(left_ms) = extras.sticky_left_ms {
        unsigned.number("msc4354_sticky_duration_ttl_ms", left_ms);
    }
    if let Some((replaced, _)) = &extras.replaces {
        unsigned.json("prev_content", replaced.row.json_of(replaced.row.header.spans.content));
        // This and `replaces_state` are not in the specification, but clients have always been given them.
        unsigned.json("prev_sender", replaced.row.json_of(replaced.row.header.spans.sender));
    }
    if let Some(delay_id) = &extras.delay_id {
        unsigned.text("org.matrix.msc4140.delay_id", delay_id);
    }
    if let Some((redaction, id)) = &extras.redacted_because {
        unsigned.json("redacted_because", redaction);
        // The specification does not have this either.
        unsigned.text("redacted_by", id.as_str());
    }
    if let Some((_, id)) = &extras.replaces {
        unsigned.text("replaces_state", id.as_str());
    }
    if let Some(txn) = &extras.transaction_id {
        unsigned.text("transaction_id", txn);
    }
}

/// Writes the event as this viewer sees it, with everything in `unsigned` that can be worked out from the store.
/// `membership` is the viewer's membership of the room at the event. The caller has asked before whether the viewer may
/// see it.
pub fn show(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
    membership: Option<Membership>,
) -> Result<JsonText, Fault> {
    let relations = bundle::bundle(view, stored, viewer, Depth::Full)?;
    let extras = Extras { membership, relations, ..gather(view, stored, viewer)? };
    Ok(client_json(view.row, &*viewer.seen(view, stored)?, viewer, &extras))
}

/// Shows several events of one room, as [`show`] shows each.
pub fn show_all(
    view: RoomView<'_, impl Read + ?Sized>,
    events: &[(StoredEvent, Membership)],
    viewer: &Viewer<'_>,
) -> Result<Vec<JsonText>, Fault> {
    let mut shown = Vec::with_capacity(events.len());
    for_each(view, events, viewer, |seen, extras| shown.push(client_json(view.row, seen, viewer, extras)))?;
    Ok(shown)
}

/// Writes several events of one room into a list, as [`show`] shows each.
pub(crate) fn write_all(
    list: &mut List<'_>,
    view: RoomView<'_, impl Read + ?Sized>,
    events: &[(StoredEvent, Membership)],
    viewer: &Viewer<'_>,
) -> Result<(), Fault> {
    for_each(view, events, viewer, |seen, extras| {
        list.object(|event| write(event, view.row, seen, viewer, extras));
    })
}

/// Calls `show` with each event as the viewer is shown it, and with the fields of its `unsigned`.
fn for_each(
    view: RoomView<'_, impl Read + ?Sized>,
    events: &[(StoredEvent, Membership)],
    viewer: &Viewer<'_>,
    mut show: impl FnMut(&StoredEvent, &Extras),
) -> Result<(), Fault> {
    let related =
        schema::RELATED.get_many(view.read, events.iter().map(|(stored, _)| (view.num, stored.event())))?;
    for ((stored, membership), related) in events.iter().zip(related) {
        let mut extras = gather(view, stored, viewer)?;
        extras.membership = Some(*membership);
        if let Some(related) = related {
            extras.relations = bundle::bundle_related(view, stored, &related, viewer, Depth::Full)?;
        }
        show(&*viewer.seen(view, stored)?, &extras);
    }
    Ok(())
}

/// Like [`show`], with only the newest edit of its bundled relations: for the newest event of a thread.
pub(crate) fn show_inside(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
) -> Result<JsonText, Fault> {
    let relations = bundle::bundle(view, stored, viewer, Depth::Edit)?;
    show_bundled(view, stored, viewer, relations)
}

/// Shows an event that is bundled with another, with what is bundled with it in turn.
fn show_bundled(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
    relations: Option<JsonText>,
) -> Result<JsonText, Fault> {
    let (membership, _) = viewer.reader.look(view.read, stored)?;
    let extras = Extras { membership: Some(membership), relations, ..gather(view, stored, viewer)? };
    Ok(client_json(view.row, &*viewer.seen(view, stored)?, viewer, &extras))
}

/// Like [`show`], without bundled relations: for events that stand inside others, and for those of the room's state.
pub fn show_plain(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
) -> Result<JsonText, Fault> {
    let mut event = Object::with_capacity(stored.row.json.len() + 192);
    write_plain(&mut event, view, stored, viewer)?;
    Ok(event.finish())
}

/// Writes the fields of an event as [`show_plain`] shows it.
pub(crate) fn write_plain(
    event: &mut Object,
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
) -> Result<(), Fault> {
    let extras = gather(view, stored, viewer)?;
    write(event, view.row, &*viewer.seen(view, stored)?, viewer, &extras);
    Ok(())
}

fn gather(
    view: RoomView<'_, impl Read + ?Sized>,
    stored: &StoredEvent,
    viewer: &Viewer<'_>,
) -> Result<Extras, Fault> {
    let header = &stored.row.header;
    let mut extras = Extras::default();
    if let Some(sent_by) = &header.sent_by
        && (viewer.device == Some(sent_by.device) || sent_by.device == NO_DEVICE)
        && stored.row.sender() == viewer.user.as_str()
    {
        let id = Some(sent_by.txn.clone());
        let is_own = viewer.device == Some(sent_by.device);
        (extras.transaction_id, extras.delay_id) = if is_own { (id, None) } else { (None, id) };
    }
    if sticky::field(&stored.row.json).is_some() {
        extras.sticky_left_ms = sticky::left_ms(view.read, view.num, stored.order.anchor, viewer.now_ms)?;
    }
    if let Some(replaced) = header.replaces
        && let Some(replaced) = event::find_anywhere(view.read, view.num, replaced)?
        // The state that somebody finds on entering was often set before. They may know it, but not what was there before
        // it. Whoever sees a change of state also knew the state before that change.
        && (viewer.reader.may_see(view.read, stored)? || viewer.reader.may_see(view.read, &replaced)?)
    {
        let (replaced, id) = (viewer.seen(view, &replaced)?, replaced.id(view.row));
        extras.replaces = Some((replaced.into_owned(), id));
    }
    if let Some(redaction) = header.redacted_by
        && let Some(redaction) = event::find(view.read, view.num, redaction)?
        // A redaction is an event of its own: it may have been sent after the viewer left, or by somebody they ignore.
        && viewer.reader.sees(view.read, &redaction)?
    {
        let viewer = Viewer { with_room_id: true, ..*viewer };
        let redaction = viewer.seen(view, &redaction)?;
        let shown = client_json(view.row, &redaction, &viewer, &Extras::default());
        extras.redacted_because = Some((shown, redaction.id(view.row)));
    }
    Ok(extras)
}

/// Writes the event as somebody sees it who is not in the room (invites and knocks): sender, type, state key, content.
/// The create event is shown whole, as servers see it (MSC4311), so that somebody who is invited can check that the
/// room's id is the hash of that event.
pub fn stripped_state(stored: &StoredEvent) -> JsonText {
    let (row, spans) = (&stored.row, &stored.row.header.spans);
    if row.event_type() == CREATE && row.state_key().as_deref() == Some("") {
        return JsonText::stored(&row.json);
    }
    let mut event = Object::with_capacity(row.json.len());
    event.json("content", row.json_of(spans.content));
    event.json("sender", row.json_of(spans.sender));
    if spans.state_key.length > 0 {
        event.json("state_key", row.json_of(spans.state_key));
    } else {
        event.text("state_key", "");
    }
    event.json("type", row.json_of(spans.event_type));
    event.finish()
}
