//! Events: how they are named, found, parsed and shown.
//!
//! What is stored is what was signed. What a reader sees is spliced from byte ranges of it, and `unsigned` is worked
//! out for that reader ([`show`]).

use std::{borrow::Cow, sync::Arc};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use ruma::{
    EventId, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, UserId,
    events::TimelineEventType, room_version_rules::EventIdFormatVersion, state_res,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    ids::{EventNum, Order, RoomNum},
    json::{JsonText, Object},
    rooms::{
        erased::Erased,
        relations::{self, Depth},
        versions,
    },
    schema,
    schema::rooms::{EventHash, EventRow, Membership, Place, RoomRow, Span, Spans},
    store::{Fault, Read},
};

/// An event with the place where it stands.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Where in its room.
    pub order: Order,
    /// Header and bytes.
    pub row: EventRow,
}

impl Stored {
    /// Its number in its room.
    pub fn event(&self) -> EventNum {
        self.row.header.event
    }

    /// Its id, as its room's version writes it.
    pub fn id(&self, room: &RoomRow) -> OwnedEventId {
        event_id(&self.row.header.hash, room.version)
    }

    /// What it says of its state key's membership, if it is a member event.
    pub fn membership(&self) -> Option<Membership> {
        let is_member = self.row.header.state_key.is_some() && self.row.event_type() == "m.room.member";
        if is_member { membership_of(self.row.content()) } else { None }
    }
}

/// The membership that the content of a member event speaks of; `None` for a word that Matrix does not have.
pub fn membership_of(content: &str) -> Option<Membership> {
    #[derive(Deserialize)]
    struct Content<'a> {
        #[serde(borrow)]
        membership: Cow<'a, str>,
    }
    let content: Content<'_> = serde_json::from_str(content).ok()?;
    Membership::parse(&content.membership)
}

/// The id that a hash is in this room version.
#[expect(clippy::expect_used, reason = "a dollar sign and base64 is an event id by every grammar")]
pub fn event_id(hash: &EventHash, version: u8) -> OwnedEventId {
    let mut id = String::with_capacity(44);
    id.push('$');
    match versions::find_rules(version).map(|rules| rules.event_id_format) {
        Some(EventIdFormatVersion::V2) => STANDARD_NO_PAD.encode_string(hash, &mut id),
        _ => URL_SAFE_NO_PAD.encode_string(hash, &mut id),
    }
    OwnedEventId::try_from(id).expect("base64 is an id")
}

/// The hash that an id stands for; `None` if it is none of a room version from 3 on.
pub fn parse_event_id(id: &EventId) -> Option<EventHash> {
    let text = id.as_str().strip_prefix('$')?;
    let bytes = URL_SAFE_NO_PAD.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text)).ok()?;
    bytes.try_into().ok()
}

/// The event of this number, if it stands in the room's timeline.
pub fn find(read: &(impl Read + ?Sized), room: RoomNum, event: EventNum) -> Result<Option<Stored>, Fault> {
    let Some(Place::Timeline(order)) = schema::PLACE.get(read, (room, event))? else { return Ok(None) };
    let row = schema::TIMELINE.get(read, (room, order))?;
    Ok(row.map(|row| Stored { order, row }))
}

/// The event of this number, wherever it is kept: the state of a room may hold events that clients do not see in its
/// timeline. Such an event has the lowest order.
pub fn find_anywhere(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event: EventNum,
) -> Result<Option<Stored>, Fault> {
    match schema::PLACE.get(read, (room, event))? {
        None => Ok(None),
        Some(Place::Timeline(order)) => {
            Ok(schema::TIMELINE.get(read, (room, order))?.map(|row| Stored { order, row }))
        }
        Some(Place::Aside) => {
            let aside = schema::ASIDE.get(read, (room, event))?;
            Ok(aside.map(|aside| Stored { order: Order::MIN, row: aside.row }))
        }
    }
}

/// The event of this number, wherever it is kept. Errors: [`Fault::Corrupt`] when there is none: numbers come from our
/// own rows.
pub fn require(read: &(impl Read + ?Sized), room: RoomNum, event: EventNum) -> Result<Stored, Fault> {
    find_anywhere(read, room, event)?.ok_or(Fault::Corrupt("an event is missing"))
}

/// The number of the event of this id in this room.
pub fn find_num(read: &(impl Read + ?Sized), room: RoomNum, id: &EventId) -> Result<Option<EventNum>, Fault> {
    let Some(hash) = parse_event_id(id) else { return Ok(None) };
    let found = schema::EVENT_ID.get(read, &hash)?;
    Ok(found.and_then(|(of, event)| (of == room).then_some(event)))
}

/// The event of this id, if it stands in this room's timeline.
pub fn find_by_id(read: &(impl Read + ?Sized), room: RoomNum, id: &EventId) -> Result<Option<Stored>, Fault> {
    find_num(read, room, id)?.map(|event| find(read, room, event)).transpose().map(Option::flatten)
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    content: &'a RawValue,
    #[serde(borrow)]
    sender: &'a RawValue,
    #[serde(borrow, rename = "type")]
    kind: &'a RawValue,
    #[serde(borrow, default)]
    state_key: Option<&'a RawValue>,
    #[serde(borrow, default)]
    redacts: Option<&'a RawValue>,
}

/// Where an event's fields stand in its JSON; `None` if it is not the JSON of an event.
pub fn locate(json: &[u8]) -> Option<Spans> {
    let fields: Fields<'_> = serde_json::from_slice(json).ok()?;
    let base = json.as_ptr().addr();
    let span = |field: &RawValue| {
        Some(Span {
            start: u32::try_from(field.get().as_ptr().addr() - base).ok()?,
            length: u32::try_from(field.get().len()).ok()?,
        })
    };
    let optional = |field: Option<&RawValue>| field.map_or(Some(Span::default()), span);
    Some(Spans {
        content: span(fields.content)?,
        sender: span(fields.sender)?,
        kind: span(fields.kind)?,
        state_key: optional(fields.state_key)?,
        redacts: optional(fields.redacts)?,
    })
}

/// An event, parsed: as the authorization rules see it.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its id.
    pub id: OwnedEventId,
    /// Its room; none in the create event of a room version whose room ids are hashes.
    pub room_id: Option<OwnedRoomId>,
    /// Who sent it.
    pub sender: OwnedUserId,
    /// When, as the sender says.
    pub sent: MilliSecondsSinceUnixEpoch,
    /// Its type.
    pub kind: TimelineEventType,
    /// Its content.
    pub content: Box<RawValue>,
    /// Its state key, if it is a state event.
    pub state_key: Option<String>,
    /// The events it cites.
    pub prev: Vec<OwnedEventId>,
    /// The events that allow it.
    pub auth: Vec<OwnedEventId>,
    /// The event that it redacts, where that stands beside the content.
    pub redacts: Option<OwnedEventId>,
    /// Whether it was rejected when it came in.
    pub rejected: bool,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    room_id: Option<OwnedRoomId>,
    sender: OwnedUserId,
    origin_server_ts: MilliSecondsSinceUnixEpoch,
    #[serde(rename = "type")]
    kind: TimelineEventType,
    content: Box<RawValue>,
    #[serde(default)]
    state_key: Option<String>,
    prev_events: Vec<OwnedEventId>,
    auth_events: Vec<OwnedEventId>,
    #[serde(default)]
    redacts: Option<OwnedEventId>,
}

impl Event {
    /// Parses the JSON of an event. Errors: what is wrong with it, for people.
    pub fn parse(id: OwnedEventId, json: &[u8]) -> Result<Self, String> {
        let wire: Wire = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        Ok(Self {
            id,
            room_id: wire.room_id,
            sender: wire.sender,
            sent: wire.origin_server_ts,
            kind: wire.kind,
            content: wire.content,
            state_key: wire.state_key,
            prev: wire.prev_events,
            auth: wire.auth_events,
            redacts: wire.redacts,
            rejected: false,
        })
    }
}

impl state_res::Event for Event {
    type Id = OwnedEventId;

    fn event_id(&self) -> &OwnedEventId {
        &self.id
    }
    fn room_id(&self) -> Option<&RoomId> {
        self.room_id.as_deref()
    }
    fn sender(&self) -> &UserId {
        &self.sender
    }
    fn origin_server_ts(&self) -> MilliSecondsSinceUnixEpoch {
        self.sent
    }
    fn event_type(&self) -> &TimelineEventType {
        &self.kind
    }
    fn content(&self) -> &RawValue {
        &self.content
    }
    fn state_key(&self) -> Option<&str> {
        self.state_key.as_deref()
    }
    fn prev_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.prev.iter())
    }
    fn auth_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.auth.iter())
    }
    fn redacts(&self) -> Option<&OwnedEventId> {
        self.redacts.as_ref()
    }
    fn rejected(&self) -> bool {
        self.rejected
    }
}

/// A state event with what building upon it needs.
#[derive(Clone, Debug)]
pub struct StateEvent {
    /// Its number in its room.
    pub event: EventNum,
    /// See [`EventHeader`](crate::schema::rooms::EventHeader).
    pub auth_depth: u64,
    /// The event.
    pub parsed: Event,
}

impl StateEvent {
    /// Parses a stored event. Errors: [`Fault::Corrupt`]; what is stored was checked.
    pub fn read(room: &RoomRow, stored: &Stored) -> Result<Arc<Self>, Fault> {
        let parsed = Event::parse(stored.id(room), &stored.row.json)
            .map_err(|_| Fault::Corrupt("an event is not the JSON of an event"))?;
        Ok(Arc::new(Self { event: stored.event(), auth_depth: stored.row.header.auth_depth, parsed }))
    }
}

/// For whom, and how, an event is shown.
#[derive(Clone, Copy, Debug)]
pub struct Viewer<'a> {
    /// The user.
    pub user: &'a UserId,
    /// The device: it alone sees its transaction ids.
    pub device: Option<&'a str>,
    /// The time, for `age`.
    pub now_ms: u64,
    /// Whether the event names its room: `/sync` leaves that out.
    pub with_room_id: bool,
    /// Up to where they see what refers to an event: to the end, unless they left.
    pub until: Order,
    /// Whose events are shown redacted to whoever was not there.
    pub erased: &'a Erased,
}

impl Viewer<'_> {
    /// The event as this viewer is shown it.
    pub fn seen<'s>(
        &self,
        read: &(impl Read + ?Sized),
        num: RoomNum,
        room: &RoomRow,
        stored: &'s Stored,
    ) -> Result<Cow<'s, Stored>, Fault> {
        self.erased.seen(read, num, room, stored, self.user)
    }

    /// The event as this viewer is shown it in the state of the room.
    pub fn seen_in_state<'s>(
        &self,
        read: &(impl Read + ?Sized),
        num: RoomNum,
        room: &RoomRow,
        stored: &'s Stored,
    ) -> Result<Cow<'s, Stored>, Fault> {
        self.erased.seen_in_state(read, num, room, stored, self.user)
    }

    /// Whether this viewer is not shown what the event says.
    pub fn hides(&self, read: &(impl Read + ?Sized), num: RoomNum, stored: &Stored) -> Result<bool, Fault> {
        self.erased.hides(read, num, stored, self.user)
    }
}

/// What stands in an event's `unsigned` beside its age.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// For the device that sent it.
    pub transaction_id: Option<String>,
    /// The content of the state event that this one replaced, and that event's id.
    pub replaces: Option<(Stored, OwnedEventId)>,
    /// The event that redacted it.
    pub redacted_because: Option<JsonText>,
    /// What the viewer was to the room at this event (MSC4115).
    pub membership: Option<Membership>,
    /// Its bundled relations.
    pub relations: Option<JsonText>,
}

/// The event as clients see it, put together from the stored bytes: nothing is parsed or serialised again.
pub fn client_json(room: &RoomRow, stored: &Stored, viewer: &Viewer<'_>, extras: &Extras) -> JsonText {
    let (row, spans) = (&stored.row, &stored.row.header.spans);
    let mut event = Object::with_capacity(row.json.len() + 192);
    event.json("content", row.json_of(spans.content));
    event.text("event_id", stored.id(room).as_str());
    event.number("origin_server_ts", row.header.sent_ms);
    if spans.redacts.length > 0 {
        event.json("redacts", row.json_of(spans.redacts));
    } else if let Some(redacts) = redacts_in_content(row) {
        // Older clients look beside the content (client-server API, m.room.redaction).
        event.text("redacts", redacts.as_str());
    }
    if viewer.with_room_id {
        event.text("room_id", room.id.as_str());
    }
    event.json("sender", row.json_of(spans.sender));
    if spans.state_key.length > 0 {
        event.json("state_key", row.json_of(spans.state_key));
    }
    event.json("type", row.json_of(spans.kind));
    event.json("unsigned", &unsigned(stored, viewer, extras));
    event.finish()
}

fn unsigned(stored: &Stored, viewer: &Viewer<'_>, extras: &Extras) -> JsonText {
    let mut unsigned = Object::new();
    unsigned.number("age", viewer.now_ms.saturating_sub(stored.row.header.sent_ms));
    if let Some(membership) = extras.membership {
        unsigned.text("membership", membership.as_str());
    }
    if let Some(relations) = &extras.relations {
        unsigned.json("m.relations", relations);
    }
    if let Some((replaced, _)) = &extras.replaces {
        unsigned.json("prev_content", replaced.row.json_of(replaced.row.header.spans.content));
    }
    if let Some(redaction) = &extras.redacted_because {
        unsigned.json("redacted_because", redaction);
    }
    if let Some((_, id)) = &extras.replaces {
        unsigned.text("replaces_state", id.as_str());
    }
    if let Some(txn) = &extras.transaction_id {
        unsigned.text("transaction_id", txn);
    }
    unsigned.finish()
}

/// What a redaction of room version 11 and above redacts.
pub fn redacts_in_content(row: &EventRow) -> Option<OwnedEventId> {
    #[derive(Deserialize)]
    struct Content {
        redacts: OwnedEventId,
    }
    if row.event_type() != "m.room.redaction" {
        return None;
    }
    serde_json::from_str::<Content>(row.content()).ok().map(|content| content.redacts)
}

/// The event as this viewer sees it, with everything in `unsigned` that can be worked out from the store.
/// `membership` is what the viewer was to the room at the event. Whether the viewer may see it is asked before.
pub fn show(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    room: &RoomRow,
    stored: &Stored,
    viewer: &Viewer<'_>,
    membership: Option<Membership>,
) -> Result<JsonText, Fault> {
    let relations = relations::bundle(read, num, room, stored, viewer, Depth::Full)?;
    let extras = Extras { membership, relations, ..gather(read, num, room, stored, viewer)? };
    Ok(client_json(room, &*viewer.seen(read, num, room, stored)?, viewer, &extras))
}

/// Several events of one room as [`show`] shows each.
pub fn show_all(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    room: &RoomRow,
    events: &[(Stored, Membership)],
    viewer: &Viewer<'_>,
) -> Result<Vec<JsonText>, Fault> {
    let related = schema::RELATED.get_many(read, events.iter().map(|(stored, _)| (num, stored.event())))?;
    let mut shown = Vec::with_capacity(events.len());
    for ((stored, membership), related) in events.iter().zip(related) {
        let mut extras = gather(read, num, room, stored, viewer)?;
        extras.membership = Some(*membership);
        if let Some(related) = related {
            extras.relations =
                relations::bundle_related(read, num, room, stored, &related, viewer, Depth::Full)?;
        }
        shown.push(client_json(room, &*viewer.seen(read, num, room, stored)?, viewer, &extras));
    }
    Ok(shown)
}

/// Like [`show`], with no more of bundled relations than the newest edit: for the newest event of a thread.
pub(crate) fn show_inside(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    room: &RoomRow,
    stored: &Stored,
    viewer: &Viewer<'_>,
) -> Result<JsonText, Fault> {
    let relations = relations::bundle(read, num, room, stored, viewer, Depth::Edit)?;
    let extras = Extras { relations, ..gather(read, num, room, stored, viewer)? };
    Ok(client_json(room, &*viewer.seen(read, num, room, stored)?, viewer, &extras))
}

/// Like [`show`], without bundled relations: for events that stand inside others, and for those of the room's state.
pub fn show_plain(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    room: &RoomRow,
    stored: &Stored,
    viewer: &Viewer<'_>,
) -> Result<JsonText, Fault> {
    let extras = gather(read, num, room, stored, viewer)?;
    Ok(client_json(room, &*viewer.seen_in_state(read, num, room, stored)?, viewer, &extras))
}

fn gather(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    room: &RoomRow,
    stored: &Stored,
    viewer: &Viewer<'_>,
) -> Result<Extras, Fault> {
    let header = &stored.row.header;
    let mut extras = Extras::default();
    if let (Some(sent_by), Some(device)) = (&header.sent_by, viewer.device)
        && sent_by.device == device
        && stored.row.sender() == viewer.user.as_str()
    {
        extras.transaction_id = Some(sent_by.txn.clone());
    }
    if let Some(replaced) = header.replaces
        && let Some(replaced) = find(read, num, replaced)?
    {
        let (replaced, id) = (viewer.seen(read, num, room, &replaced)?, replaced.id(room));
        extras.replaces = Some((replaced.into_owned(), id));
    }
    if let Some(redaction) = header.redacted_by
        && let Some(redaction) = find(read, num, redaction)?
    {
        let viewer = Viewer { with_room_id: true, ..*viewer };
        let redaction = viewer.seen(read, num, room, &redaction)?;
        extras.redacted_because = Some(client_json(room, &redaction, &viewer, &Extras::default()));
    }
    Ok(extras)
}

/// The event as somebody sees it who is not in the room (invites and knocks): sender, type, state key, content. The create
/// event is shown whole, as servers see it (MSC4311): who is invited can check that the room's id is that of the event.
pub fn stripped_state(stored: &Stored) -> JsonText {
    let (row, spans) = (&stored.row, &stored.row.header.spans);
    if row.event_type() == "m.room.create" && row.state_key().as_deref() == Some("") {
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
    event.json("type", row.json_of(spans.kind));
    event.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_written_as_its_room_version_writes_it_and_read_back() {
        let hash = [0xfb; 32];
        let (v3, v4) = (event_id(&hash, 3), event_id(&hash, 4));
        assert!(v3.as_str().contains('+') || v3.as_str().contains('/'));
        assert!(v4.as_str().contains('-') || v4.as_str().contains('_'));
        assert_eq!(parse_event_id(&v3), Some(hash));
        assert_eq!(parse_event_id(&v4), Some(hash));
        assert_eq!(parse_event_id(&OwnedEventId::try_from("$x:y").unwrap()), None);
    }

    #[test]
    fn fields_are_found_where_they_stand() {
        let json = br#"{"content":{"type":"x"},"sender":"@a:b","state_key":"","type":"t"}"#;
        let spans = locate(json).unwrap();
        let text = |span: Span| &json[span.start as usize..(span.start + span.length) as usize];
        assert_eq!(text(spans.content), br#"{"type":"x"}"#);
        assert_eq!(text(spans.state_key), br#""""#);
        assert_eq!(text(spans.kind), br#""t""#);
        assert_eq!(spans.redacts, Span::default());
        assert!(locate(b"[]").is_none());
    }
}
