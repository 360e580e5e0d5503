//! The rows in which events are stored.
//!
//! An [`EventRow`] is a header (numbers, references, byte ranges of the top-level fields) and the signed canonical bytes: what
//! clients see is put together from the ranges, so reading an event never parses its JSON or writes it again.

use std::borrow::Cow;

use bytes::Bytes;

use crate::{
    ids::{DeviceNum, EventNum, Order, RoomNum, StateKeyNum},
    json::JsonRef,
    schema::{
        encoding::{decode_bytes, decode_ref, decode_string, decode_u32, encode_bytes, encode_ref},
        state::StateRef,
    },
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout, layout_upto},
    },
};

/// The reference hash that names an event from room version 3 on.
pub type EventHash = [u8; 32];

/// The name of an event, by the version of its room. Its id is how that version writes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EventKey {
    /// From version 3 on: the reference hash, which is the same in whatever room.
    Hash(EventHash),
    /// In versions 1 and 2: an id that its server chose. Two rooms may have events of the same id.
    Chosen(RoomNum, Box<str>),
}

/// These zeros stand before a chosen id in the place of a hash, so that they name no event themselves.
const CHOSEN: EventHash = [0; 32];

impl EventKey {
    /// The key of the event of this hash, whoever states it; `None` for the zeros that stand before chosen ids: a row with them
    /// in the place of a hash could not be read again.
    pub fn of_hash(hash: EventHash) -> Option<Self> {
        (hash != CHOSEN).then_some(Self::Hash(hash))
    }

    /// The parts with which the keys of all events begin that chose this id, each in a room of its own.
    pub fn leading_of_chosen(id: &str) -> (&'static EventHash, &str) {
        (&CHOSEN, id)
    }
}

/// The key of an event whose hash this server worked out itself. For a hash that others state there is [`EventKey::of_hash`].
impl From<EventHash> for EventKey {
    fn from(hash: EventHash) -> Self {
        debug_assert_ne!(hash, CHOSEN, "no hash has only zeros");
        Self::Hash(hash)
    }
}

impl Key for EventKey {
    type Ref<'a> = &'a Self;

    fn encode_key(key: &Self, to: &mut Encoder) {
        match key {
            Self::Hash(hash) => to.raw(hash),
            Self::Chosen(room, id) => {
                // The id comes first, so that the rooms which have an event of it stand side by side.
                to.raw(&CHOSEN);
                String::encode_key(id, to);
                RoomNum::encode_key(*room, to);
            }
        }
    }

    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        let hash: EventHash = Key::decode_key(from)?;
        if hash != CHOSEN {
            return Ok(Self::Hash(hash));
        }
        let id = String::decode_key(from)?;
        Ok(Self::Chosen(Key::decode_key(from)?, id.into()))
    }
}

/// A part of an event's signed bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The offset of its first byte.
    pub start: u32,
    /// How many bytes it has; 0 when the event has no such field.
    pub length: u32,
}

/// Where an event's top-level fields stand in its signed bytes. Strings include their quotes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    /// The value of `content`.
    pub content: Span,
    /// The value of `sender`.
    pub sender: Span,
    /// The value of `type`.
    pub event_type: Span,
    /// The value of `state_key`.
    pub state_key: Span,
    /// `redacts` beside the content (room versions before 11).
    pub redacts: Span,
}

/// The device that sent an event, and the transaction id it gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentBy {
    /// The number of the device. It is never given to another device, not even to one of the same id.
    pub device: DeviceNum,
    /// The transaction id of the request.
    pub txn: String,
    /// The day on which it was sent, since the epoch: the row of the transaction is found by it.
    pub day: u32,
}

/// The facts that are known of an event beside its signed bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventHeader {
    /// The number of the event in its room.
    pub event: EventNum,
    /// The key that names the event.
    pub key: EventKey,
    /// When its sender says it was made: milliseconds since the epoch.
    pub sent_ms: u64,
    /// One more than the greatest depth of the events it cites.
    pub depth: u64,
    /// One more than the greatest such number of its auth events: 0 for a create event.
    pub auth_depth: u64,
    /// The number of its (type, state key), if it is a state event.
    pub state_key: Option<StateKeyNum>,
    /// The event that held its state key before it, if one did.
    pub replaces: Option<EventNum>,
    /// The event that redacted it, if one has.
    pub redacted_by: Option<EventNum>,
    /// Whether clients do not see it: it only merges heads, or is a redaction that redacts nothing yet or may not.
    pub unseen: bool,
    /// The state before it, unless that is the main line just below its own order.
    pub before: Option<StateRef>,
    /// The state after it, unless that is `before` (a message) or the main line at its own order (state).
    pub after: Option<StateRef>,
    /// The events it cites, as far as we hold them.
    pub prev: Vec<EventNum>,
    /// Its auth events, which allow it.
    pub auth: Vec<EventNum>,
    /// The device and transaction id, for events that our own clients sent.
    pub sent_by: Option<SentBy>,
    /// Whether its sender came, left or knocked by way of another server than their own: a user of another server by way of this
    /// one, or one of ours by way of another. That server tells others of the event.
    pub let_in: bool,
    /// Whether the rules turned out to forbid the event after it had become part of the timeline, because it had been judged by a
    /// state of which only a part was known. It keeps its place there, but is part of no state.
    pub rejected: bool,
    /// Whether its content was deleted because its lifetime is over (`rooms/retention.rs`). What is left is the redacted form, which
    /// no client is shown and no other server is given.
    pub expired: bool,
    /// The places of its fields in the signed bytes.
    pub spans: Spans,
}

/// An event as it is stored: header and signed bytes (those of the redacted form once it is redacted).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRow {
    /// The facts beside the signed bytes.
    pub header: EventHeader,
    /// The canonical JSON with the signatures, as other servers get it.
    pub json: Bytes,
}

const IS_STATE: u8 = 1;
const REPLACES: u8 = 2;
const REDACTED: u8 = 4;
const UNSEEN: u8 = 8;
const BEFORE: u8 = 16;
const AFTER: u8 = 32;
const SENT_BY: u8 = 64;
/// It has no bytes of its own in the row, so that rows from before it are read as they are.
const LET_IN: u8 = 128;

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
            | flag(header.sent_by.is_some(), SENT_BY)
            | flag(header.let_in, LET_IN);
        // Layout 3 is written as layout 2 is, and says that the event turned out to be rejected. So do layout 4, of an event whose
        // lifetime is over, and layout 5, of one of which both are true.
        let layout = match (header.expired, header.rejected) {
            (false, false) => 2,
            (false, true) => 3,
            (true, false) => 4,
            (true, true) => 5,
        };
        to.raw(&[layout, flags]);
        EventKey::encode_key(&header.key, to);
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
            to.varint(sent_by.device.0.into());
            to.varint(sent_by.day.into());
            encode_bytes(sent_by.txn.as_bytes(), to);
        }
        let spans = &header.spans;
        for span in [spans.content, spans.sender, spans.event_type, spans.state_key, spans.redacts] {
            to.varint(span.start.into());
            to.varint(span.length.into());
        }
        to.raw(&self.json);
    }

    fn decode(mut bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 knew events by their hashes only, which are written alike.
        let layout = layout_upto(&mut from, 5)?;
        let flags = from.byte()?;
        let has = |bit: u8| flags & bit != 0;
        let header = EventHeader {
            key: Key::decode_key(&mut from)?,
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
            sent_by: if has(SENT_BY) { decode_sent_by(layout, &mut from)? } else { None },
            let_in: has(LET_IN),
            rejected: matches!(layout, 3 | 5),
            expired: matches!(layout, 4 | 5),
            spans: Spans {
                content: decode_span(&mut from)?,
                sender: decode_span(&mut from)?,
                event_type: decode_span(&mut from)?,
                state_key: decode_span(&mut from)?,
                redacts: decode_span(&mut from)?,
            },
        };
        let at = bytes.len() - from.0.len();
        Ok(Self { header, json: bytes.split_off(at) })
    }
}

impl EventRow {
    /// The bytes of a field, as JSON; empty if the event has no such field.
    pub fn field(&self, span: Span) -> &[u8] {
        let start = span.start as usize;
        self.json.get(start..start + span.length as usize).unwrap_or_default()
    }

    /// A field, as it may be put into other JSON.
    pub fn json_of(&self, span: Span) -> JsonRef<'_> {
        JsonRef::stored(self.field(span))
    }

    /// A field that is a string, unescaped; `None` if the event has no such field, or it is no string.
    pub fn text(&self, span: Span) -> Option<Cow<'_, str>> {
        let json = std::str::from_utf8(self.field(span)).ok()?;
        let inside = json.strip_prefix('"')?.strip_suffix('"')?;
        if inside.contains('\\') {
            serde_json::from_str(json).ok().map(Cow::Owned)
        } else {
            Some(Cow::Borrowed(inside))
        }
    }

    /// The user id of who sent it.
    pub fn sender(&self) -> Cow<'_, str> {
        self.text(self.header.spans.sender).unwrap_or_default()
    }

    /// The type of the event.
    pub fn event_type(&self) -> Cow<'_, str> {
        self.text(self.header.spans.event_type).unwrap_or_default()
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

/// Says where an event is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is in the room's timeline, at this order.
    Timeline(Order),
    /// It is kept aside, because it was rejected or soft-failed. The state before it is known.
    Aside,
    /// It is known only because other events name it among their auth events. Its place in the room, and so the state before
    /// it, is not known; an event that cites it as a previous event makes us fetch it once more.
    Outlier,
}

impl Value for Place {
    fn encode(&self, to: &mut Encoder) {
        match self {
            Self::Timeline(order) => {
                to.raw(&[1, 1]);
                Order::encode_key(*order, to);
            }
            Self::Aside => to.raw(&[1, 2]),
            Self::Outlier => to.raw(&[1, 3]),
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        match from.byte()? {
            1 => Key::decode_key(&mut from).map(Self::Timeline),
            2 => Ok(Self::Aside),
            3 => Ok(Self::Outlier),
            _ => Err(Fault::Corrupt("a place is of an unknown kind")),
        }
    }
}

/// An event that clients do not see: why, and the event itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsideRow {
    /// Whether the rules forbid it; otherwise only the room's current state did when it came in.
    pub rejected: bool,
    /// Whether the room's count of its events aside has it among those that are needed ([`AsideCount::needed`]).
    pub is_needed: bool,
    /// The rule that it breaks, in words for people.
    pub why: String,
    /// The event that is kept aside.
    pub row: EventRow,
}

/// `retention`: the messages of a room whose lifetime is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionRow {
    /// Up to this order no message is left that will be over one day.
    pub below: Order,
    /// When the room's timer is due, if one is set: milliseconds since the epoch.
    pub due_ms: Option<u64>,
    /// The lifetime by which that was worked out, in milliseconds.
    pub lifetime_ms: u64,
}

impl Value for RetentionRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        Order::encode_key(self.below, to);
        to.varint(self.due_ms.map_or(0, |due_ms| due_ms.saturating_add(1)));
        to.varint(self.lifetime_ms);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let below = Key::decode_key(&mut from)?;
        Ok(Self { below, due_ms: from.varint()?.checked_sub(1), lifetime_ms: from.varint()? })
    }
}

const REJECTED: u8 = 1;
const NEEDED: u8 = 2;

impl Value for AsideRow {
    fn encode(&self, to: &mut Encoder) {
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        to.raw(&[2, flag(self.rejected, REJECTED) | flag(self.is_needed, NEEDED)]);
        encode_bytes(self.why.as_bytes(), to);
        // The offsets of pending positions in the row move with the bytes.
        self.row.encode(to);
    }

    fn decode(mut bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 knew only whether the event was rejected, which is written alike.
        layout_upto(&mut from, 2)?;
        let flags = from.byte()?;
        let (rejected, is_needed) = (flags & REJECTED != 0, flags & NEEDED != 0);
        let why = decode_string(&mut from)?;
        let at = bytes.len() - from.0.len();
        Ok(Self { rejected, is_needed, why, row: EventRow::decode(bytes.split_off(at))? })
    }
}

/// How many events a room keeps aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AsideCount {
    /// The number of events that are kept aside now.
    pub count: u64,
    /// The search for events to forget has come up to this number.
    pub looked_at: EventNum,
    /// The greatest number of an event that was forgotten: those that are missing up to it may have been forgotten.
    pub forgotten: EventNum,
    /// How many of the events are known to be needed by the room's timeline or its state: those that are marked so. They take no
    /// place from others.
    pub needed: u64,
    /// The number that the room gave next to a side state when it was last swept.
    pub sides_swept: u32,
    /// The number that the room gave next to a state key when it was last swept.
    pub keys_swept: u32,
}

impl Value for AsideCount {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[3]);
        for number in [self.count, self.looked_at.0, self.forgotten.0, self.needed] {
            to.varint(number);
        }
        to.varint(self.sides_swept.into());
        to.varint(self.keys_swept.into());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 is from before rooms were swept, layout 2 from before state keys were.
        let layout = layout_upto(&mut from, 3)?;
        let (count, looked_at) = (from.varint()?, EventNum(from.varint()?));
        if layout == 1 {
            return Ok(Self { count, looked_at, forgotten: looked_at, ..Self::default() });
        }
        let (forgotten, needed) = (EventNum(from.varint()?), from.varint()?);
        let sides_swept = decode_u32(&mut from)?;
        let keys_swept = if layout == 2 { 0 } else { decode_u32(&mut from)? };
        Ok(Self { count, looked_at, forgotten, needed, sides_swept, keys_swept })
    }
}

/// A redaction that waits for the event that it redacts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedactionWaitingRow {
    /// Whether its sender had the power to redact everybody's events; otherwise it applies to events of the sender's server only.
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

/// Layout 1 named the device by its id, which another device may have by now: who sent the event is not known.
fn decode_sent_by(layout: u8, from: &mut Decoder<'_>) -> Result<Option<SentBy>, Fault> {
    if layout == 1 {
        decode_bytes(from)?;
        decode_bytes(from)?;
        return Ok(None);
    }
    let (device, day) = (DeviceNum(decode_u32(from)?), decode_u32(from)?);
    Ok(Some(SentBy { device, day, txn: decode_string(from)? }))
}

fn decode_span(from: &mut Decoder<'_>) -> Result<Span, Fault> {
    Ok(Span { start: decode_u32(from)?, length: decode_u32(from)? })
}

fn decode_events(from: &mut Decoder<'_>) -> Result<Vec<EventNum>, Fault> {
    let count = from.varint()?;
    (0..count).map(|_| from.varint().map(EventNum)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Position, SideNum};
    use crate::schema::round_trip;

    fn an_event(seed: u64) -> EventRow {
        let odd = seed % 2 == 1;
        EventRow {
            header: EventHeader {
                event: EventNum(seed),
                key: if odd {
                    EventKey::Chosen(RoomNum(7), "$x:y".into())
                } else {
                    [seed as u8 | 1; 32].into()
                },
                sent_ms: seed * 3,
                depth: seed,
                auth_depth: seed / 2,
                state_key: odd.then_some(StateKeyNum(7)),
                replaces: odd.then_some(EventNum(3)),
                redacted_by: (!odd).then_some(EventNum(9)),
                unseen: odd,
                before: odd.then_some(StateRef::Side(SideNum(4))),
                after: odd.then_some(StateRef::Main(Order::live(Position::new(seed).unwrap_or_default()))),
                prev: vec![EventNum(1), EventNum(2)],
                auth: vec![EventNum(0)],
                sent_by: odd.then(|| SentBy { device: DeviceNum(3), txn: "täx".into(), day: 20_000 }),
                let_in: seed.is_multiple_of(3),
                rejected: seed.is_multiple_of(5),
                expired: seed.is_multiple_of(3),
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
            let _ = EventRow::decode(bytes.into());
        }
    }

    #[test]
    fn counts_of_events_aside_are_read_in_each_layout() {
        let count = AsideCount {
            count: 1_000,
            looked_at: EventNum(700),
            forgotten: EventNum(800),
            needed: 3,
            sides_swept: 5,
            keys_swept: 9,
        };
        assert_eq!(round_trip(&count), count);
        let read = |bytes: &'static [u8]| AsideCount::decode(Bytes::from_static(bytes)).unwrap();
        let count =
            AsideCount { count: 7, looked_at: EventNum(4), forgotten: EventNum(4), ..AsideCount::default() };
        assert_eq!(read(&[1, 7, 4]), count);
        let count = AsideCount { forgotten: EventNum(6), needed: 3, sides_swept: 5, ..count };
        assert_eq!(read(&[2, 7, 4, 6, 3, 5]), count);
    }

    #[test]
    fn events_aside_are_read_in_each_layout() {
        for (rejected, is_needed) in [(true, false), (false, true), (false, false)] {
            let aside = AsideRow { rejected, is_needed, why: "so".to_owned(), row: an_event(2) };
            assert_eq!(round_trip(&aside), aside);
            let mut to = Encoder::default();
            aside.encode(&mut to);
            to.bytes[..2].copy_from_slice(&[1, u8::from(rejected)]);
            assert_eq!(AsideRow::decode(to.bytes.into()).unwrap(), AsideRow { is_needed: false, ..aside });
        }
    }

    #[test]
    fn rows_of_the_layout_before_chosen_ids_are_read() {
        let mut row = an_event(2);
        row.header.key = [9; 32].into();
        let mut to = Encoder::default();
        row.encode(&mut to);
        to.bytes[0] = 1;
        assert_eq!(EventRow::decode(to.bytes.into()).unwrap(), row);
    }

    #[test]
    fn rows_from_before_others_were_let_in_are_read_as_of_nobody_let_in() {
        // The bytes of a row as they were written before the flag: layout 2, and flags of a state event that replaces another.
        let mut old = vec![2, IS_STATE | REPLACES];
        old.extend([9; 32]);
        old.extend([5, 3, 4, 2, 7, 1, 1, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
        old.extend(b"{}");
        let row = EventRow::decode(old.clone().into()).unwrap();
        assert!(!row.header.let_in);
        assert_eq!((row.header.event, row.header.state_key), (EventNum(5), Some(StateKeyNum(7))));
        assert_eq!((&*row.header.prev, &*row.header.auth), (&[EventNum(1)][..], &[EventNum(0)][..]));
        let mut to = Encoder::default();
        row.encode(&mut to);
        assert_eq!(to.bytes, old, "it is written as before");

        let told = EventRow { header: EventHeader { let_in: true, ..row.header }, json: row.json };
        let mut to = Encoder::default();
        told.encode(&mut to);
        assert_eq!(to.bytes.len(), old.len());
        assert_eq!(EventRow::decode(to.bytes.into()).unwrap(), told);
    }

    #[test]
    fn escaped_strings_are_read_as_they_mean() {
        let json = r#"{"type":"a\"b"}"#;
        let mut row = an_event(2);
        row.json = Bytes::from_static(json.as_bytes());
        row.header.spans.event_type = Span { start: 8, length: 6 };
        assert_eq!(row.event_type(), "a\"b");
        assert_eq!(row.state_key(), None);
    }
}
