//! Rows of rooms: the room itself, its events, who is in it, its names.
//!
//! An [`EventRow`] is a header (numbers, references, byte ranges of the top-level fields) and the signed canonical
//! bytes: what clients see is spliced from the ranges, so reading an event never parses or re-serialises its JSON.

use std::borrow::Cow;

use bytes::Bytes;
use ruma::{OwnedRoomId, RoomId};

use crate::{
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum},
    json::JsonRef,
    schema::state::Ref,
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout},
    },
};

/// The reference hash that names an event from room version 3 on.
pub type EventHash = [u8; 32];

/// What a user is to a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Membership {
    /// In it.
    Join = 1,
    /// Invited.
    Invite = 2,
    /// Asked to be let in.
    Knock = 3,
    /// Not in it: left, kicked, or never there.
    Leave = 4,
    /// Kept out.
    Ban = 5,
}

impl Membership {
    /// As Matrix writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Invite => "invite",
            Self::Knock => "knock",
            Self::Leave => "leave",
            Self::Ban => "ban",
        }
    }

    /// From Matrix's word; `None` for any other.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Join, Self::Invite, Self::Knock, Self::Leave, Self::Ban]
            .into_iter()
            .find(|kind| kind.as_str() == word)
    }

    fn from_byte(byte: u8) -> Result<Self, Fault> {
        [Self::Join, Self::Invite, Self::Knock, Self::Leave, Self::Ban]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or(Fault::Corrupt("a membership is of an unknown kind"))
    }
}

/// Whether we are in the room ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resident {
    /// No: what we hold of it is history or an invite.
    No,
    /// We are, and hold its whole state.
    Yes,
}

/// An event that no other event cites yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Which.
    pub event: EventNum,
    /// Its id.
    pub hash: EventHash,
    /// Its depth.
    pub depth: u64,
    /// When we stored it: milliseconds since the epoch.
    pub stored_ms: u64,
    /// Made by this server.
    pub is_own: bool,
    /// The state after it.
    pub after: Ref,
}

/// A room. Rewritten with each of its events; the room's lock guards it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomRow {
    /// Its id.
    pub id: OwnedRoomId,
    /// Its version, as a number: 1 to 12.
    pub version: u8,
    /// Whether we are in it.
    pub resident: Resident,
    /// The order of its newest event on the main line.
    pub tip: Order,
    /// The order of the newest change of its current state (`rooms/state.rs` rounds references down to it).
    pub state_tip: Order,
    /// The number the next event gets.
    pub next_event: u64,
    /// The number the next state key gets.
    pub next_key: u32,
    /// The number the next side state gets.
    pub next_side: u32,
    /// Its heads, at most 20; sorted by event.
    pub heads: Vec<Head>,
    /// How many users are joined.
    pub joined: u32,
    /// How many users are invited.
    pub invited: u32,
}

impl Value for RoomRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, self.version, u8::from(self.resident == Resident::Yes)]);
        encode_bytes(self.id.as_bytes(), to);
        Order::encode_key(self.tip, to);
        Order::encode_key(self.state_tip, to);
        to.varint(self.next_event);
        to.varint(self.next_key.into());
        to.varint(self.next_side.into());
        to.varint(self.joined.into());
        to.varint(self.invited.into());
        to.varint(self.heads.len() as u64);
        for head in &self.heads {
            to.varint(head.event.0);
            to.raw(&head.hash);
            to.varint(head.depth);
            to.varint(head.stored_ms);
            to.raw(&[u8::from(head.is_own)]);
            encode_ref(head.after, to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let version = from.byte()?;
        let resident = if from.byte()? == 1 { Resident::Yes } else { Resident::No };
        let id = std::str::from_utf8(decode_bytes(&mut from)?).ok().and_then(|id| RoomId::parse(id).ok());
        Ok(Self {
            id: id.ok_or(Fault::Corrupt("a room has no id"))?,
            version,
            resident,
            tip: Key::decode_key(&mut from)?,
            state_tip: Key::decode_key(&mut from)?,
            next_event: from.varint()?,
            next_key: decode_u32(&mut from)?,
            next_side: decode_u32(&mut from)?,
            joined: decode_u32(&mut from)?,
            invited: decode_u32(&mut from)?,
            heads: {
                let count = from.varint()?;
                (0..count)
                    .map(|_| {
                        Ok(Head {
                            event: EventNum(from.varint()?),
                            hash: Key::decode_key(&mut from)?,
                            depth: from.varint()?,
                            stored_ms: from.varint()?,
                            is_own: from.byte()? == 1,
                            after: decode_ref(&mut from)?,
                        })
                    })
                    .collect::<Result<_, Fault>>()?
            },
        })
    }
}

impl RoomRow {
    /// With every pending position settled, once the batch's first position is known.
    #[must_use]
    pub fn settle(mut self, base: Position) -> Self {
        self.tip = self.tip.settle(base);
        self.state_tip = self.state_tip.settle(base);
        for head in &mut self.heads {
            head.after = head.after.settle(base);
        }
        self
    }
}

/// A part of an event's signed bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Where it begins.
    pub start: u32,
    /// How many bytes it has; 0 when the event has no such field.
    pub length: u32,
}

/// Where an event's top-level fields stand in its signed bytes. Strings include their quotes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    /// `content`.
    pub content: Span,
    /// `sender`.
    pub sender: Span,
    /// `type`.
    pub kind: Span,
    /// `state_key`.
    pub state_key: Span,
    /// `redacts` beside the content (room versions before 11).
    pub redacts: Span,
}

/// The device that sent an event, and the transaction id it gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentBy {
    /// The device's id.
    pub device: String,
    /// The transaction id.
    pub txn: String,
}

/// What is known of an event beside its signed bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventHeader {
    /// Its number in its room.
    pub event: EventNum,
    /// Its id.
    pub hash: EventHash,
    /// When its sender says it was made: milliseconds since the epoch.
    pub sent_ms: u64,
    /// One more than the greatest depth of the events it cites.
    pub depth: u64,
    /// One more than the greatest such number of its auth events: 0 for a create event.
    pub auth_depth: u64,
    /// The number of its (type, state key), if it is a state event.
    pub state_key: Option<StateKeyNum>,
    /// The event that held its state key before it.
    pub replaces: Option<EventNum>,
    /// The event that redacted it.
    pub redacted_by: Option<EventNum>,
    /// Clients do not see it: it only merges heads.
    pub unseen: bool,
    /// The state before it, unless that is the main line just below its own order.
    pub before: Option<Ref>,
    /// The state after it, unless that is `before` (a message) or the main line at its own order (state).
    pub after: Option<Ref>,
    /// The events it cites, as far as we hold them.
    pub prev: Vec<EventNum>,
    /// The events that allow it.
    pub auth: Vec<EventNum>,
    /// For what our own clients sent with a transaction id.
    pub sent_by: Option<SentBy>,
    /// Where its fields are.
    pub spans: Spans,
}

/// An event as it is stored: header and signed bytes (those of the redacted form once it is redacted).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRow {
    /// What is known of it.
    pub header: EventHeader,
    /// The signed canonical JSON.
    pub json: Bytes,
}

const IS_STATE: u8 = 1;
const REPLACES: u8 = 2;
const REDACTED: u8 = 4;
const UNSEEN: u8 = 8;
const BEFORE: u8 = 16;
const AFTER: u8 = 32;
const SENT_BY: u8 = 64;

impl Value for EventRow {
    fn encode(&self, to: &mut Encoder) {
        let header = &self.header;
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let flags = flag(header.state_key.is_some(), IS_STATE)
            | flag(header.replaces.is_some(), REPLACES)
            | flag(header.redacted_by.is_some(), REDACTED)
            | flag(header.unseen, UNSEEN)
            | flag(header.before.is_some(), BEFORE)
            | flag(header.after.is_some(), AFTER)
            | flag(header.sent_by.is_some(), SENT_BY);
        to.raw(&[1, flags]);
        to.raw(&header.hash);
        for number in [header.event.0, header.sent_ms, header.depth, header.auth_depth] {
            to.varint(number);
        }
        if let Some(key) = header.state_key {
            to.varint(key.0.into());
        }
        for event in [header.replaces, header.redacted_by].into_iter().flatten() {
            to.varint(event.0);
        }
        for state in [header.before, header.after].into_iter().flatten() {
            encode_ref(state, to);
        }
        for events in [&header.prev, &header.auth] {
            to.varint(events.len() as u64);
            for event in events {
                to.varint(event.0);
            }
        }
        if let Some(sent_by) = &header.sent_by {
            encode_bytes(sent_by.device.as_bytes(), to);
            encode_bytes(sent_by.txn.as_bytes(), to);
        }
        let spans = &header.spans;
        for span in [spans.content, spans.sender, spans.kind, spans.state_key, spans.redacts] {
            to.varint(span.start.into());
            to.varint(span.length.into());
        }
        to.raw(&self.json);
    }

    fn decode(mut bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let flags = from.byte()?;
        let has = |bit: u8| flags & bit != 0;
        let header = EventHeader {
            hash: Key::decode_key(&mut from)?,
            event: EventNum(from.varint()?),
            sent_ms: from.varint()?,
            depth: from.varint()?,
            auth_depth: from.varint()?,
            state_key: has(IS_STATE).then(|| decode_u32(&mut from)).transpose()?.map(StateKeyNum),
            replaces: has(REPLACES).then(|| from.varint()).transpose()?.map(EventNum),
            redacted_by: has(REDACTED).then(|| from.varint()).transpose()?.map(EventNum),
            unseen: has(UNSEEN),
            before: has(BEFORE).then(|| decode_ref(&mut from)).transpose()?,
            after: has(AFTER).then(|| decode_ref(&mut from)).transpose()?,
            prev: decode_events(&mut from)?,
            auth: decode_events(&mut from)?,
            sent_by: has(SENT_BY)
                .then(|| {
                    Ok::<_, Fault>(SentBy {
                        device: decode_string(&mut from)?,
                        txn: decode_string(&mut from)?,
                    })
                })
                .transpose()?,
            spans: Spans {
                content: decode_span(&mut from)?,
                sender: decode_span(&mut from)?,
                kind: decode_span(&mut from)?,
                state_key: decode_span(&mut from)?,
                redacts: decode_span(&mut from)?,
            },
        };
        let at = bytes.len() - from.0.len();
        Ok(Self { header, json: bytes.split_off(at) })
    }
}

impl EventRow {
    /// The bytes of a field, as JSON; empty if the event has none such.
    pub fn field(&self, span: Span) -> &[u8] {
        let start = span.start as usize;
        self.json.get(start..start + span.length as usize).unwrap_or_default()
    }

    /// A field, as it may be put into other JSON.
    pub fn json_of(&self, span: Span) -> JsonRef<'_> {
        JsonRef::stored(self.field(span))
    }

    /// A field that is a string, unescaped; `None` if the event has none such.
    pub fn text(&self, span: Span) -> Option<Cow<'_, str>> {
        let json = std::str::from_utf8(self.field(span)).ok()?;
        let inside = json.strip_prefix('"')?.strip_suffix('"')?;
        if inside.contains('\\') {
            serde_json::from_str(json).ok().map(Cow::Owned)
        } else {
            Some(Cow::Borrowed(inside))
        }
    }

    /// Who sent it.
    pub fn sender(&self) -> Cow<'_, str> {
        self.text(self.header.spans.sender).unwrap_or_default()
    }

    /// Its type.
    pub fn event_type(&self) -> Cow<'_, str> {
        self.text(self.header.spans.kind).unwrap_or_default()
    }

    /// Its state key, if it is a state event.
    pub fn state_key(&self) -> Option<Cow<'_, str>> {
        self.text(self.header.spans.state_key)
    }

    /// Its content: the JSON of an object.
    pub fn content(&self) -> &str {
        std::str::from_utf8(self.field(self.header.spans.content)).unwrap_or("{}")
    }

    /// Whether it was redacted.
    pub fn is_redacted(&self) -> bool {
        self.header.redacted_by.is_some()
    }
}

/// Where an event is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the room's timeline.
    Timeline(Order),
    /// Aside: known of, rejected, or soft-failed.
    Aside,
}

impl Value for Place {
    fn encode(&self, to: &mut Encoder) {
        match self {
            Self::Timeline(order) => {
                to.raw(&[1, 1]);
                Order::encode_key(*order, to);
            }
            Self::Aside => to.raw(&[1, 2]),
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        match from.byte()? {
            1 => Key::decode_key(&mut from).map(Self::Timeline),
            2 => Ok(Self::Aside),
            _ => Err(Fault::Corrupt("a place is of an unknown kind")),
        }
    }
}

/// An event that clients do not see: why, and the event itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsideRow {
    /// The rules forbid it; else only the current state did when it came in.
    pub rejected: bool,
    /// The rule, for people.
    pub why: String,
    /// The event.
    pub row: EventRow,
}

impl Value for AsideRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, u8::from(self.rejected)]);
        encode_bytes(self.why.as_bytes(), to);
        // The row's own offsets of pending positions move with it.
        self.row.encode(to);
    }

    fn decode(mut bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let rejected = from.byte()? == 1;
        let why = decode_string(&mut from)?;
        let at = bytes.len() - from.0.len();
        Ok(Self { rejected, why, row: EventRow::decode(bytes.split_off(at))? })
    }
}

/// What one of our users is to a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRoomRow {
    /// What.
    pub membership: Membership,
    /// The position since which it is that: a join stays where it is when only the profile changes.
    pub since: Position,
    /// The member event that says so now.
    pub event: EventNum,
    /// The user wants to hear no more of it.
    pub forgotten: bool,
    /// Of somebody who is not joined: where they last ceased to be; none for who never was.
    pub left: Option<Order>,
}

impl Value for UserRoomRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[2, self.membership as u8, u8::from(self.forgotten)]);
        to.position(self.since);
        to.varint(self.event.0);
        if let Some(left) = self.left {
            Order::encode_key(left, to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 did not say where they left: who had left then sees no more of the room's past.
        if !matches!(from.byte()?, 1 | 2) {
            return Err(Fault::Corrupt("a row has an unknown layout"));
        }
        Ok(Self {
            membership: Membership::from_byte(from.byte()?)?,
            forgotten: from.byte()? == 1,
            since: Key::decode_key(&mut from)?,
            event: EventNum(from.varint()?),
            left: (!from.0.is_empty()).then(|| Key::decode_key(&mut from)).transpose()?,
        })
    }
}

impl Value for Membership {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, *self as u8]);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Self::from_byte(from.byte()?)
    }
}

/// A redaction that waits for the event that it redacts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedactionWaitingRow {
    /// Its sender had the power to redact everybody's events; else it applies to those of the sender's own server.
    pub by_power: bool,
}

impl Value for RedactionWaitingRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, u8::from(self.by_power)]);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { by_power: from.byte()? == 1 })
    }
}

/// An alias of a room.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AliasRow {
    /// The room.
    pub room: RoomNum,
    /// Who made it.
    #[serde(default)]
    pub creator: String,
}

pub(super) fn encode_bytes(bytes: &[u8], to: &mut Encoder) {
    to.varint(bytes.len() as u64);
    to.raw(bytes);
}

fn decode_bytes<'a>(from: &mut Decoder<'a>) -> Result<&'a [u8], Fault> {
    let length = usize::try_from(from.varint()?).map_err(|_| Fault::Corrupt("a length is too large"))?;
    from.take(length)
}

pub(super) fn decode_string(from: &mut Decoder<'_>) -> Result<String, Fault> {
    String::from_utf8(decode_bytes(from)?.to_vec()).map_err(|_| Fault::Corrupt("a string is not UTF-8"))
}

fn decode_u32(from: &mut Decoder<'_>) -> Result<u32, Fault> {
    u32::try_from(from.varint()?).map_err(|_| Fault::Corrupt("a number is too large"))
}

fn decode_span(from: &mut Decoder<'_>) -> Result<Span, Fault> {
    Ok(Span { start: decode_u32(from)?, length: decode_u32(from)? })
}

fn decode_events(from: &mut Decoder<'_>) -> Result<Vec<EventNum>, Fault> {
    let count = from.varint()?;
    (0..count).map(|_| from.varint().map(EventNum)).collect()
}

fn encode_ref(state: Ref, to: &mut Encoder) {
    match state {
        Ref::Main(order) => {
            to.raw(&[1]);
            Order::encode_key(order, to);
        }
        Ref::Side(side) => {
            to.raw(&[2]);
            to.varint(side.0.into());
        }
    }
}

fn decode_ref(from: &mut Decoder<'_>) -> Result<Ref, Fault> {
    match from.byte()? {
        1 => Key::decode_key(from).map(Ref::Main),
        2 => decode_u32(from).map(|side| Ref::Side(crate::ids::SideNum(side))),
        _ => Err(Fault::Corrupt("a state reference is of an unknown kind")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::SideNum;

    fn round_trip<V: Value>(value: &V) -> V {
        let mut to = Encoder::default();
        value.encode(&mut to);
        V::decode(to.bytes.into()).unwrap()
    }

    fn an_event(seed: u64) -> EventRow {
        let odd = seed % 2 == 1;
        EventRow {
            header: EventHeader {
                event: EventNum(seed),
                hash: [seed as u8; 32],
                sent_ms: seed * 3,
                depth: seed,
                auth_depth: seed / 2,
                state_key: odd.then_some(StateKeyNum(7)),
                replaces: odd.then_some(EventNum(3)),
                redacted_by: (!odd).then_some(EventNum(9)),
                unseen: odd,
                before: odd.then_some(Ref::Side(SideNum(4))),
                after: odd.then_some(Ref::Main(Order::live(Position::new(seed).unwrap_or_default()))),
                prev: vec![EventNum(1), EventNum(2)],
                auth: vec![EventNum(0)],
                sent_by: odd.then(|| SentBy { device: "DEV".into(), txn: "täx".into() }),
                spans: Spans { content: Span { start: 0, length: 2 }, ..Spans::default() },
            },
            json: Bytes::from_static(b"{}"),
        }
    }

    proptest! {
        #[test]
        fn events_come_back(seed in 0_u64..1 << 40) {
            let row = an_event(seed);
            prop_assert_eq!(round_trip(&row), row);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let bytes = Bytes::from(bytes);
            let _ = EventRow::decode(bytes.clone());
            let _ = RoomRow::decode(bytes.clone());
            let _ = UserRoomRow::decode(bytes);
        }
    }

    #[test]
    fn a_room_comes_back() {
        let order = Order::live(Position::new(99).unwrap());
        let room = RoomRow {
            id: RoomId::parse("!abc:example.org").unwrap(),
            version: 11,
            resident: Resident::Yes,
            tip: order,
            state_tip: order,
            next_event: 12,
            next_key: 4,
            next_side: 1,
            heads: vec![Head {
                event: EventNum(11),
                hash: [5; 32],
                depth: 3,
                stored_ms: 7,
                is_own: true,
                after: Ref::Main(order),
            }],
            joined: 2,
            invited: 1,
        };
        assert_eq!(round_trip(&room), room);
    }

    #[test]
    fn what_a_user_is_to_a_room_comes_back() {
        let since = Position::new(7).unwrap();
        for left in [None, Some(Order::live(since))] {
            let row = UserRoomRow {
                membership: Membership::Ban,
                since,
                event: EventNum(300),
                forgotten: true,
                left,
            };
            assert_eq!(round_trip(&row), row);
        }
    }

    #[test]
    fn escaped_strings_are_read_as_they_mean() {
        let json = r#"{"type":"a\"b"}"#;
        let mut row = an_event(2);
        row.json = Bytes::from_static(json.as_bytes());
        row.header.spans.kind = Span { start: 8, length: 6 };
        assert_eq!(row.event_type(), "a\"b");
        assert_eq!(row.state_key(), None);
    }
}
