//! Events: how they are named, found and parsed. `rooms/show.rs` says how they are shown.

use std::{borrow::Cow, sync::Arc};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use ruma::{
    EventId, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, ServerName, UserId,
    events::TimelineEventType, room_version_rules::RedactionRules, state_res,
};
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    env::payer,
    ids::{EventNum, Order, RoomNum},
    schema,
    schema::event_types::{MEMBER, REDACTION},
    schema::rooms::{EventHash, EventKey, EventRow, Membership, Place, RoomRow, Span, Spans},
    store::{Direction, Fault, Read},
};

/// Gives the server of a user; `None` for what is no user id.
pub(in crate::rooms) fn server_of(user_id: &str) -> Option<&str> {
    <&UserId>::try_from(user_id).ok().map(|user| user.server_name().as_str())
}

/// Whether a user is of the server of this name.
pub fn is_of(user_id: &str, server: &str) -> bool {
    user_id.split_once(':').is_some_and(|(_, of)| of == server)
}

/// Whether this server tells other servers of an event: a user of its own sent it, or it let the sender in. A join by way of
/// another server is told by that one.
pub fn is_ours_to_tell(row: &EventRow, own_server: &ServerName) -> bool {
    let is_own = server_of(&row.sender()) == Some(own_server.as_str());
    is_own != row.header.let_in
}

/// An event with its place in its room's timeline.
#[derive(Clone, Debug)]
pub struct StoredEvent {
    /// The event's place among the events of its room.
    pub order: Order,
    /// The header that this server made, and the event's bytes.
    pub row: EventRow,
}

impl StoredEvent {
    /// The event's number in its room.
    pub fn event(&self) -> EventNum {
        self.row.header.event
    }

    /// The event's id, as its room's version writes ids.
    pub fn id(&self, room: &RoomRow) -> OwnedEventId {
        event_id(&self.row.header.key, room.version)
    }

    /// The membership that the event gives to its state key, if it is a member event.
    pub fn membership(&self) -> Option<Membership> {
        let is_member = self.row.header.state_key.is_some() && self.row.event_type() == MEMBER;
        if is_member { membership_of(self.row.content()) } else { None }
    }
}

/// Reads the membership from the content of a member event; `None` for a word that Matrix does not have.
pub fn membership_of(content: &str) -> Option<Membership> {
    #[derive(Deserialize)]
    struct Content<'a> {
        #[serde(borrow)]
        membership: Cow<'a, str>,
    }
    let content: Content<'_> = serde_json::from_str(content).ok()?;
    Membership::parse(&content.membership)
}

/// The last room version in which servers choose the ids of their events freely.
const CHOSEN_IDS_UPTO: u8 = 2;
/// The one room version that writes ids in the standard alphabet of base64, which is not safe in URLs.
const STANDARD_ALPHABET: u8 = 3;

/// Whether servers choose the ids of their events freely in rooms of this version.
pub fn are_ids_chosen(version: u8) -> bool {
    version <= CHOSEN_IDS_UPTO
}

/// Gives the key of an event in a room of this version, by its id where servers choose ids, and else by its reference hash.
pub fn key(hash: EventHash, id: &EventId, room: RoomNum, version: u8) -> EventKey {
    if are_ids_chosen(version) { EventKey::Chosen(room, id.as_str().into()) } else { EventKey::from(hash) }
}

/// Writes the id of an event for a room of this version.
#[expect(clippy::expect_used, reason = "a dollar sign and base64 is an event id by every grammar")]
pub fn event_id(key: &EventKey, version: u8) -> OwnedEventId {
    let hash = match key {
        EventKey::Hash(hash) => hash,
        EventKey::Chosen(_, id) => return OwnedEventId::try_from(&**id).expect("a stored id was an id"),
    };
    let mut id = String::with_capacity(44);
    id.push('$');
    if version == STANDARD_ALPHABET {
        STANDARD_NO_PAD.encode_string(hash, &mut id);
    } else {
        URL_SAFE_NO_PAD.encode_string(hash, &mut id);
    }
    OwnedEventId::try_from(id).expect("base64 is an id")
}

/// Reads the key of an event from its id, for a room of this version. `None` if the id is not written as that version
/// writes ids: the same hash in another alphabet names no event. Nor do 32 zero bytes, which no row may have for a hash.
pub fn parse_event_id(id: &EventId, room: RoomNum, version: u8) -> Option<EventKey> {
    let text = id.as_str().strip_prefix('$')?;
    if are_ids_chosen(version) {
        return id.server_name().map(|_| EventKey::Chosen(room, id.as_str().into()));
    }
    let bytes = match version {
        STANDARD_ALPHABET => STANDARD_NO_PAD.decode(text),
        _ => URL_SAFE_NO_PAD.decode(text),
    };
    bytes.ok()?.try_into().ok().and_then(EventKey::of_hash)
}

/// Finds the event of this number, if it stands in the room's timeline.
pub fn find(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event: EventNum,
) -> Result<Option<StoredEvent>, Fault> {
    let Some(Place::Timeline(order)) = schema::PLACE.get(read, (room, event))? else { return Ok(None) };
    let row = schema::TIMELINE.get(read, (room, order))?;
    Ok(row.map(|row| StoredEvent { order, row }))
}

/// An event wherever it is kept. A room's state may hold events that clients do not see in its timeline, so the events
/// of state keys are found as this type, and only [`KeptEvent::in_timeline`] gives one as an event of the timeline.
#[derive(Clone, Debug)]
pub struct KeptEvent {
    /// The header that this server made, and the event's bytes.
    pub row: EventRow,
    order: Option<Order>,
}

impl KeptEvent {
    /// The event's number in its room.
    pub fn event(&self) -> EventNum {
        self.row.header.event
    }

    /// The event's id, as its room's version writes ids.
    pub fn id(&self, room: &RoomRow) -> OwnedEventId {
        event_id(&self.row.header.key, room.version)
    }

    /// The event's place in its room's timeline, if it has one.
    pub fn order(&self) -> Option<Order> {
        self.order
    }

    /// The membership that the event gives to its state key, if it is a member event.
    pub fn membership(&self) -> Option<Membership> {
        let is_member = self.row.header.state_key.is_some() && self.row.event_type() == MEMBER;
        if is_member { membership_of(self.row.content()) } else { None }
    }

    /// Gives the event as one of the timeline, if it has a place there.
    pub fn in_timeline(&self) -> Option<StoredEvent> {
        self.order.map(|order| StoredEvent { order, row: self.row.clone() })
    }
}

/// Finds the event of this number, wherever it is kept.
pub fn find_kept(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event: EventNum,
) -> Result<Option<KeptEvent>, Fault> {
    match schema::PLACE.get(read, (room, event))? {
        None => Ok(None),
        Some(Place::Timeline(order)) => {
            Ok(schema::TIMELINE.get(read, (room, order))?.map(|row| KeptEvent { row, order: Some(order) }))
        }
        Some(Place::Aside | Place::Outlier) => {
            let aside = schema::ASIDE.get(read, (room, event))?;
            Ok(aside.map(|aside| KeptEvent { row: aside.row, order: None }))
        }
    }
}

/// Gives the event of this number, wherever it is kept. Errors: [`Fault::Corrupt`] when there is none, because numbers
/// come from our own rows.
pub fn require_kept(read: &(impl Read + ?Sized), room: RoomNum, event: EventNum) -> Result<KeptEvent, Fault> {
    find_kept(read, room, event)?.ok_or(Fault::Corrupt("an event is missing"))
}

/// Finds the event of this number, wherever it is kept, as if it stood in the timeline: an event without a place there
/// gets the lowest order. Callers read what the event says, and not its order.
pub fn find_anywhere(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    event: EventNum,
) -> Result<Option<StoredEvent>, Fault> {
    let kept = find_kept(read, room, event)?;
    Ok(kept.map(|kept| StoredEvent { order: kept.order.unwrap_or(Order::MIN), row: kept.row }))
}

/// Lists those of these events that are kept, by rising number, each as [`find_anywhere`] finds it. Those of the timeline are
/// read together, which costs little because they stand beside each other; the few kept aside are read one by one.
pub fn list_anywhere(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    mut events: Vec<EventNum>,
) -> Result<Vec<StoredEvent>, Fault> {
    events.sort_unstable();
    let places = schema::PLACE.get_many(read, events.iter().map(|event| (room, *event)))?;
    let orders = places.iter().filter_map(|place| match place {
        Some(Place::Timeline(order)) => Some(*order),
        Some(Place::Aside | Place::Outlier) | None => None,
    });
    let mut rows = schema::TIMELINE.get_many(read, orders.map(|order| (room, order)))?.into_iter();
    let mut found = Vec::with_capacity(events.len());
    for (event, place) in events.iter().zip(places) {
        match place {
            Some(Place::Timeline(order)) => {
                found.extend(rows.next().flatten().map(|row| StoredEvent { order, row }));
            }
            Some(Place::Aside | Place::Outlier) => found.extend(find_anywhere(read, room, *event)?),
            None => {}
        }
    }
    Ok(found)
}

/// An event that is shown is in memory several times at the largest: as a row, as its own JSON, and as a part of an answer that is
/// copied once.
const COPIES: usize = 4;
/// About this many bytes of events are read before they are counted, as far as one can tell from those before.
const COUNTED_AT_ONCE: usize = 1 << 20;
/// At first this many events are read before they are counted.
const FIRST_COUNTED: usize = 64;

/// Lists events as [`list_anywhere`] does, for an answer that shows all of them, and counts what the answer takes in memory. Errors:
/// [`Fault::Crowded`] where there is no room for it.
pub fn list_shown(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    mut events: Vec<EventNum>,
) -> Result<Vec<StoredEvent>, Fault> {
    events.sort_unstable();
    let mut found = Vec::with_capacity(events.len());
    let (mut rest, mut next_count, mut all_bytes) = (events.as_slice(), FIRST_COUNTED, 0);
    while !rest.is_empty() {
        let (events, further) = rest.split_at(next_count.clamp(1, rest.len()));
        let rows = list_anywhere(read, room, events.to_vec())?;
        let bytes: usize = rows.iter().map(|stored| stored.row.json.len()).sum();
        count_shown(bytes)?;
        found.extend(rows);
        all_bytes += bytes;
        let average = all_bytes / found.len().max(1);
        (rest, next_count) = (further, COUNTED_AT_ONCE / average.max(1));
    }
    Ok(found)
}

/// Counts the memory that an answer takes by showing events of so many bytes. Errors: [`Fault::Crowded`] where there is no room for it.
pub fn count_shown(bytes: usize) -> Result<(), Fault> {
    payer::grow(bytes.saturating_mul(COPIES)).map_err(|_| Fault::Crowded)
}

/// Like [`find_anywhere`], with [`Fault::Corrupt`] when there is no such event, because numbers come from our own rows.
pub fn require(read: &(impl Read + ?Sized), room: RoomNum, event: EventNum) -> Result<StoredEvent, Fault> {
    find_anywhere(read, room, event)?.ok_or(Fault::Corrupt("an event is missing"))
}

/// Look for an event in at most this many rooms: in room versions 1 and 2 a server can give events of many rooms the same id.
const ROOMS_OF_AN_ID_MAX: usize = 20;

/// Lists the events of this id, whatever rooms they are in, with these rooms: one at most, unless its server chose the id. Of
/// more than 20 that share an id the others are not listed.
pub fn list_anywhere_by_id(
    read: &(impl Read + ?Sized),
    id: &EventId,
) -> Result<Vec<(RoomNum, EventNum)>, Fault> {
    let leading = EventKey::leading_of_chosen(id.as_str());
    let chosen = schema::EVENT_ID.prefix::<(EventHash, String)>(read, leading, Direction::Up)?;
    let mut found = Vec::new();
    for row in chosen.take(ROOMS_OF_AN_ID_MAX) {
        found.push(row?.1);
    }
    // The same hash is written in two alphabets, and only the room's version tells which one counts.
    for version in [STANDARD_ALPHABET, STANDARD_ALPHABET + 1] {
        let Some(key) = parse_event_id(id, RoomNum::default(), version) else { continue };
        let Some((room, event)) = schema::EVENT_ID.get(read, &key)? else { continue };
        let row = schema::ROOM.get(read, room)?;
        if row.is_some_and(|row| event_id(&key, row.version) == id) {
            found.push((room, event));
        }
    }
    Ok(found)
}

/// The field of an event that names those before it.
#[derive(Deserialize)]
struct Citing<T> {
    #[serde(default = "Vec::new")]
    prev_events: Vec<T>,
}

/// Whether an event cites others that this server did not have when it took the event in: there was a hole below it.
pub fn lacks_cited(row: &EventRow) -> bool {
    serde_json::from_slice::<Citing<IgnoredAny>>(&row.json)
        .is_ok_and(|citing| citing.prev_events.len() > row.header.prev.len())
}

/// Lists the ids of the events that an event cites as those before it, whether this server has them or not.
pub fn list_cited(row: &EventRow) -> Vec<OwnedEventId> {
    let citing = serde_json::from_slice::<Citing<Cited>>(&row.json);
    citing.map(|citing| citing.prev_events.into_iter().map(|cited| cited.0).collect()).unwrap_or_default()
}

/// Finds the number of the event of this id in this room.
pub fn find_num(read: &(impl Read + ?Sized), room: RoomNum, id: &EventId) -> Result<Option<EventNum>, Fault> {
    let Some(row) = schema::ROOM.get(read, room)? else { return Ok(None) };
    match parse_event_id(id, room, row.version) {
        Some(key) => find_key(read, room, &key),
        None => Ok(None),
    }
}

/// Finds the number of the event of this key in this room.
pub fn find_key(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    key: &EventKey,
) -> Result<Option<EventNum>, Fault> {
    let found = schema::EVENT_ID.get(read, key)?;
    Ok(found.and_then(|(of, event)| (of == room).then_some(event)))
}

/// Finds the event of this id, if it stands in this room's timeline.
pub fn find_by_id(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    id: &EventId,
) -> Result<Option<StoredEvent>, Fault> {
    find_num(read, room, id)?.map(|event| find(read, room, event)).transpose().map(Option::flatten)
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    content: &'a RawValue,
    #[serde(borrow)]
    sender: &'a RawValue,
    #[serde(borrow, rename = "type")]
    event_type: &'a RawValue,
    #[serde(borrow, default)]
    state_key: Option<&'a RawValue>,
    #[serde(borrow, default)]
    redacts: Option<&'a RawValue>,
}

/// Finds the places of an event's fields in its JSON; `None` if it is not the JSON of an event.
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
        event_type: span(fields.event_type)?,
        state_key: optional(fields.state_key)?,
        redacts: optional(fields.redacts)?,
    })
}

/// A parsed event, as the authorization rules see it.
#[derive(Clone, Debug)]
pub struct Event {
    /// The event's id, as its room's version writes ids.
    pub id: OwnedEventId,
    /// The room's id; `None` in the create event of a room version whose room ids are hashes.
    pub room_id: Option<OwnedRoomId>,
    /// The user who sent the event.
    pub sender: OwnedUserId,
    /// The time of sending, as the sender's server says.
    pub sent: MilliSecondsSinceUnixEpoch,
    /// The type of the event.
    pub event_type: TimelineEventType,
    /// The content, as JSON that is not parsed yet.
    pub content: Box<RawValue>,
    /// The state key, if it is a state event.
    pub state_key: Option<String>,
    /// The ids of the events it cites (`prev_events`).
    pub prev: Vec<OwnedEventId>,
    /// The ids of the events that allow it (`auth_events`).
    pub auth: Vec<OwnedEventId>,
    /// The event that it redacts, where that stands beside the content (before room version 11).
    pub redacts: Option<OwnedEventId>,
    /// Whether the rules forbade the event when it came in.
    pub rejected: bool,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    room_id: Option<OwnedRoomId>,
    sender: OwnedUserId,
    origin_server_ts: MilliSecondsSinceUnixEpoch,
    #[serde(rename = "type")]
    event_type: TimelineEventType,
    content: Box<RawValue>,
    #[serde(default)]
    state_key: Option<String>,
    prev_events: Vec<Cited>,
    auth_events: Vec<Cited>,
    #[serde(default)]
    redacts: Option<OwnedEventId>,
}

/// The id of an event as another one cites it: alone, or in room versions 1 and 2 in a list with the event's hash.
struct Cited(OwnedEventId);

impl<'de> Deserialize<'de> for Cited {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = Cited;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the id of an event")
            }

            fn visit_str<E: de::Error>(self, id: &str) -> Result<Cited, E> {
                OwnedEventId::try_from(id).map(Cited).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Cited, A::Error> {
                let id = list.next_element::<OwnedEventId>()?;
                while list.next_element::<IgnoredAny>()?.is_some() {}
                id.map(Cited).ok_or_else(|| de::Error::invalid_length(0, &self))
            }
        }

        from.deserialize_any(Form)
    }
}

impl Event {
    /// Parses the JSON of an event. Errors: the fault in it, for people to read.
    pub fn parse(id: OwnedEventId, json: &[u8]) -> Result<Self, String> {
        let wire: Wire = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        Ok(Self {
            id,
            room_id: wire.room_id,
            sender: wire.sender,
            sent: wire.origin_server_ts,
            event_type: wire.event_type,
            content: wire.content,
            state_key: wire.state_key,
            prev: wire.prev_events.into_iter().map(|cited| cited.0).collect(),
            auth: wire.auth_events.into_iter().map(|cited| cited.0).collect(),
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
        &self.event_type
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

impl Event {
    /// See [`redaction_target`].
    pub fn redaction_target(&self, rules: &RedactionRules) -> Option<OwnedEventId> {
        if self.event_type != TimelineEventType::RoomRedaction || self.state_key.is_some() {
            return None;
        }
        if rules.content_field_redacts { redacts_in(self.content.get()) } else { self.redacts.clone() }
    }
}

/// A state event, with the numbers that building on it needs.
#[derive(Clone, Debug)]
pub struct StateEvent {
    /// The event's number in its room.
    pub event: EventNum,
    /// See [`EventHeader`](crate::schema::rooms::EventHeader).
    pub auth_depth: u64,
    /// The parsed event, as the authorization rules see it.
    pub parsed: Event,
}

impl StateEvent {
    /// Parses a stored event. Errors: [`Fault::Corrupt`], because events are checked before they are stored.
    pub fn read(room: &RoomRow, stored: &StoredEvent) -> Result<Arc<Self>, Fault> {
        let mut parsed = Event::parse(stored.id(room), &stored.row.json)
            .map_err(|_| Fault::Corrupt("an event is not the JSON of an event"))?;
        parsed.rejected = stored.row.header.rejected;
        Ok(Arc::new(Self { event: stored.event(), auth_depth: stored.row.header.auth_depth, parsed }))
    }
}

/// Gives the event that a redaction redacts: from room version 11 on its content says so, and before that a field
/// beside the content. `None` for an event that is no redaction, such as a state event of that type, and for a
/// redaction of nothing.
pub fn redaction_target(row: &EventRow, rules: &RedactionRules) -> Option<OwnedEventId> {
    if row.header.spans.state_key.length > 0 || row.event_type() != REDACTION {
        return None;
    }
    if rules.content_field_redacts {
        return redacts_in(row.content());
    }
    row.text(row.header.spans.redacts).and_then(|id| OwnedEventId::try_from(&*id).ok())
}

fn redacts_in(content: &str) -> Option<OwnedEventId> {
    #[derive(Deserialize)]
    struct Content {
        redacts: OwnedEventId,
    }
    serde_json::from_str::<Content>(content).ok().map(|content| content.redacts)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: RoomNum = RoomNum(1);

    #[test]
    fn an_id_is_written_as_its_room_version_writes_it_and_read_back() {
        let key = EventKey::Hash([0xfb; 32]);
        let (v3, v4) = (event_id(&key, 3), event_id(&key, 4));
        assert!(v3.as_str().contains('+') || v3.as_str().contains('/'));
        assert!(v4.as_str().contains('-') || v4.as_str().contains('_'));
        assert_eq!(parse_event_id(&v3, ROOM, 3), Some(key.clone()));
        assert_eq!(parse_event_id(&v4, ROOM, 12), Some(key));
        assert_eq!(parse_event_id(&v4, ROOM, 3), None, "it is another alphabet");
        assert_eq!(parse_event_id(&v3, ROOM, 4), None, "it is another alphabet");
        let zeros = format!("${}", "A".repeat(43));
        for odd in ["$x:y", "$", "$\"", &v4.as_str()[..43], &format!("{v4}="), &zeros] {
            assert_eq!(parse_event_id(&OwnedEventId::try_from(odd).unwrap(), ROOM, 11), None, "{odd}");
        }
    }

    #[test]
    fn ids_that_servers_choose_name_an_event_of_one_room_only() {
        let id = OwnedEventId::try_from("$chosen:example.org").unwrap();
        let here = parse_event_id(&id, ROOM, 2).unwrap();
        assert_ne!(Some(&here), parse_event_id(&id, RoomNum(2), 2).as_ref());
        assert_eq!(event_id(&here, 2), id);
        assert_eq!(
            parse_event_id(&event_id(&EventKey::Hash([1; 32]), 4), ROOM, 1),
            None,
            "it names no server"
        );
    }

    #[test]
    fn fields_are_found_where_they_stand() {
        let json = br#"{"content":{"type":"x"},"sender":"@a:b","state_key":"","type":"t"}"#;
        let spans = locate(json).unwrap();
        let text = |span: Span| &json[span.start as usize..(span.start + span.length) as usize];
        assert_eq!(text(spans.content), br#"{"type":"x"}"#);
        assert_eq!(text(spans.state_key), br#""""#);
        assert_eq!(text(spans.event_type), br#""t""#);
        assert_eq!(spans.redacts, Span::default());
        assert!(locate(b"[]").is_none());
    }
}
