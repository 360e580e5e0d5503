//! Rows of the versioned state map (`rooms/state.rs` explains the layout).

use bytes::Bytes;

use crate::{
    ids::{EventNum, Order, Position, SideNum, StateKeyNum},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout, layout_upto},
    },
};

/// The state of a room at some point: equal states on the main line have equal references.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StateRef {
    /// The state of the main line, up to and including this order.
    Main(Order),
    /// A side state of a fork.
    Side(SideNum),
}

impl StateRef {
    /// The state before a room has any: nothing is set.
    pub const EMPTY: Self = Self::Main(Order::MIN);

    /// The settled reference, once the batch's first position is known.
    #[must_use]
    pub fn settle(self, base: Position) -> Self {
        match self {
            Self::Main(order) => Self::Main(order.settle(base)),
            Self::Side(side) => Self::Side(side),
        }
    }

    /// Appends the reference as a row of a side state holds its base: 13 bytes for a place on the main line, 5 for a side state.
    /// A pending position in it is filled in when the batch is accepted.
    pub fn encode(self, to: &mut Encoder) {
        match self {
            Self::Main(order) => {
                to.raw(&[0]);
                Order::encode_key(order, to);
            }
            Self::Side(side) => {
                to.raw(&[1]);
                SideNum::encode_key(side, to);
            }
        }
    }

    /// Reads a reference as it was appended.
    pub fn decode(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        match from.byte()? {
            0 => Key::decode_key(from).map(Self::Main),
            1 => Key::decode_key(from).map(Self::Side),
            _ => Err(Fault::Corrupt("a reference to a state is of an unknown kind")),
        }
    }
}

/// The value of a state key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StateValue {
    /// This event holds the key.
    Event(EventNum),
    /// No event holds the key: it is not set.
    Absent,
    /// It is not known yet, because the room was joined with part of its state.
    Unknown,
    /// A number that we derived ourselves holds the key, and no event does.
    Derived(u32),
}

pub use crate::schema::event_types::DERIVED;
/// The codes of derived numbers stand above those of all events that a room will ever have.
const DERIVED_CODES: u64 = (1 << 40) - (1 << 32);

impl StateValue {
    /// The event, if there is one and it is known.
    pub fn event(self) -> Option<EventNum> {
        match self {
            Self::Event(event) => Some(event),
            Self::Absent | Self::Unknown | Self::Derived(_) => None,
        }
    }

    /// Whether this is a number that we derived.
    pub fn is_derived(self) -> bool {
        matches!(self, Self::Derived(_))
    }

    fn code(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Unknown => 1,
            Self::Event(event) => event.0.saturating_add(2),
            Self::Derived(number) => DERIVED_CODES + u64::from(number),
        }
    }

    fn from_code(code: u64) -> Self {
        match code {
            0 => Self::Absent,
            1 => Self::Unknown,
            // Codes above the derived numbers are never written.
            code if code >= DERIVED_CODES => {
                Self::Derived(u32::try_from(code - DERIVED_CODES).unwrap_or(u32::MAX))
            }
            event => Self::Event(EventNum(event - 2)),
        }
    }
}

/// `state_undo`: the value of a key before a change, in at most 7 bytes.
impl Value for StateValue {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.code());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        from.varint().map(Self::from_code)
    }
}

/// `state_now`: the current value of a key. Layout 1 is a plain value, layout 2 one that was written by a staged step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NowRow {
    /// The current value of the key.
    pub val: StateValue,
    /// The order of the staged step that wrote it. It does not count while that step is not finished: the row of
    /// `state_undo` at this order says what does.
    pub staged_at: Option<Order>,
}

impl From<StateValue> for NowRow {
    fn from(val: StateValue) -> Self {
        Self { val, staged_at: None }
    }
}

impl Value for NowRow {
    fn encode(&self, to: &mut Encoder) {
        match self.staged_at {
            None => self.val.encode(to),
            Some(order) => {
                to.raw(&[2]);
                Order::encode_key(order, to);
                to.varint(self.val.code());
            }
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        let is_staged = layout_upto(&mut from, 2)? == 2;
        let staged_at = is_staged.then(|| Key::decode_key(&mut from)).transpose()?;
        Ok(Self { val: StateValue::from_code(from.varint()?), staged_at })
    }
}

/// `stage`: a step of a room that is larger than a batch, while its parts are being written. What they hold does not
/// count until this row goes, with the step's last batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageRow {
    /// The position that is reserved for the step; none as long as its parts need none.
    pub anchor: Option<Position>,
    /// Whether the step makes the room, so that nothing of the room was there before.
    pub makes_room: bool,
    /// The numbers of the first event and of the first state key that the step takes into a room that was there before.
    /// Whatever has a greater one is part of the step.
    pub brings_from: Option<(EventNum, StateKeyNum)>,
}

const MAKES_ROOM: u8 = 1;
const HAS_ANCHOR: u8 = 2;
const BRINGS: u8 = 4;

impl Value for StageRow {
    fn encode(&self, to: &mut Encoder) {
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let flags = flag(self.makes_room, MAKES_ROOM)
            | flag(self.anchor.is_some(), HAS_ANCHOR)
            | flag(self.brings_from.is_some(), BRINGS);
        to.raw(&[2, flags]);
        if let Some(anchor) = self.anchor {
            to.position(anchor);
        }
        if let Some((event, key)) = self.brings_from {
            to.varint(event.0);
            to.varint(key.0.into());
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 had an anchor always, and brought no events.
        let (layout, flags) = (layout_upto(&mut from, 2)?, from.byte()?);
        let flags = if layout == 1 { flags & MAKES_ROOM | HAS_ANCHOR } else { flags };
        let has = |bit: u8| flags & bit != 0;
        Ok(Self {
            anchor: has(HAS_ANCHOR).then(|| Key::decode_key(&mut from)).transpose()?,
            makes_room: has(MAKES_ROOM),
            brings_from: if has(BRINGS) {
                let (event, key) = (EventNum(from.varint()?), u32::try_from(from.varint()?));
                let key = key.map_err(|_| Fault::Corrupt("a state key number is too large"))?;
                Some((event, StateKeyNum(key)))
            } else {
                None
            },
        })
    }
}

/// `state_key`: the type and the state key behind a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateKeyRow {
    /// The event type; derived keys, which no client can set, begin with byte 0x01.
    pub event_type: String,
    /// The state key of the events.
    pub state_key: String,
}

impl Value for StateKeyRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.event_type.len() as u64);
        to.raw(self.event_type.as_bytes());
        to.raw(self.state_key.as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let length =
            usize::try_from(from.varint()?).map_err(|_| Fault::Corrupt("a state key is too long"))?;
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec()).map_err(|_| Fault::Corrupt("a state key is not UTF-8"))
        };
        Ok(Self { event_type: text(from.take(length)?)?, state_key: text(from.rest())? })
    }
}

/// `state_log`: what changed at an order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogRow {
    /// How many changes the room has seen up to and including this row, without those that are derived from others: a hint
    /// of what a comparison will cost. What fills a hole is not added to the rows above it.
    pub count: u64,
    /// The keys that changed, rising, each with its value before. Empty: a marker that rounding stops at.
    pub changes: Vec<(StateKeyNum, StateValue)>,
}

impl Value for LogRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.count);
        let mut last = 0;
        for (key, val) in &self.changes {
            to.varint(u64::from(key.0.wrapping_sub(last)));
            to.varint(val.code());
            last = key.0;
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let count = from.varint()?;
        let (mut changes, mut last) = (Vec::new(), 0_u32);
        while !from.0.is_empty() {
            let step = u32::try_from(from.varint()?)
                .map_err(|_| Fault::Corrupt("a state key number is too large"))?;
            last = last.wrapping_add(step);
            changes.push((StateKeyNum(last), StateValue::from_code(from.varint()?)));
        }
        Ok(Self { count, changes })
    }
}

/// Bytes of one entry of a side state: key (4), value (5).
const ENTRY_BYTES: usize = 9;

/// `side`: the state of a fork, as a difference to another state. Never changes what it means once written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideRow {
    /// The state from which it differs.
    pub base: StateRef,
    /// The number of steps to the main line: 1 where the base is on it, otherwise one more than the base has.
    pub depth: u8,
    /// Sorted entries of [`ENTRY_BYTES`] each, searched where they lie.
    entries: Bytes,
}

impl SideRow {
    /// A side state from entries in rising order of their keys.
    pub fn new(
        base: StateRef,
        depth: u8,
        entries: impl IntoIterator<Item = (StateKeyNum, StateValue)>,
    ) -> Self {
        let mut to = Encoder::default();
        for (key, val) in entries {
            StateKeyNum::encode_key(key, &mut to);
            EventNum::encode_key(EventNum(val.code()), &mut to);
        }
        Self { base, depth, entries: to.bytes.into() }
    }

    /// The number of keys that it sets.
    pub fn key_count(&self) -> usize {
        self.entries.len() / ENTRY_BYTES
    }

    fn entry(&self, index: usize) -> Option<(StateKeyNum, StateValue)> {
        let at = index.checked_mul(ENTRY_BYTES)?;
        let mut from = Decoder(self.entries.get(at..at.checked_add(ENTRY_BYTES)?)?);
        let key = Key::decode_key(&mut from).ok()?;
        let code: EventNum = Key::decode_key(&mut from).ok()?;
        Some((key, StateValue::from_code(code.0)))
    }

    /// The value that it sets for this key; `None` where its base decides.
    pub fn find(&self, key: StateKeyNum) -> Option<StateValue> {
        let (mut low, mut high) = (0, self.key_count());
        while low < high {
            let middle = low + (high - low) / 2;
            let (found, val) = self.entry(middle)?;
            match found.cmp(&key) {
                std::cmp::Ordering::Equal => return Some(val),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// The entries of the side state, rising.
    pub fn iter(&self) -> impl Iterator<Item = (StateKeyNum, StateValue)> + '_ {
        (0..self.key_count()).filter_map(|index| self.entry(index))
    }
}

impl Value for SideRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, self.depth]);
        self.base.encode(to);
        to.raw(&self.entries);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let depth = from.byte()?;
        let base = StateRef::decode(&mut from)?;
        let left = from.0.len();
        if left % ENTRY_BYTES != 0 {
            return Err(Fault::Corrupt("a side state ends within an entry"));
        }
        Ok(Self { base, depth, entries: bytes.slice(bytes.len() - left..) })
    }
}

/// `hole`: events that are missing below an order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HoleRow {
    /// Whether there is nothing of the room below the hole.
    pub is_bottomless: bool,
    /// The ids of the missing events that events above the hole name as their previous ones.
    pub missing: Vec<String>,
    /// The number of parts that an unfinished fill may have written just above the hole; 0 where no fill is under way.
    pub parts: u32,
}

impl Value for HoleRow {
    fn encode(&self, to: &mut Encoder) {
        // Layout 1 had no parts.
        to.raw(&[2, u8::from(self.is_bottomless)]);
        to.varint(self.parts.into());
        for id in &self.missing {
            String::encode_key(id, to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        let layout = layout_upto(&mut from, 2)?;
        let is_bottomless = from.byte()? == 1;
        let parts = if layout == 1 { 0 } else { from.varint()? };
        let parts = u32::try_from(parts).map_err(|_| Fault::Corrupt("a hole has too many parts"))?;
        let mut missing = Vec::new();
        while !from.0.is_empty() {
            missing.push(String::decode_key(&mut from)?);
        }
        Ok(Self { is_bottomless, missing, parts })
    }
}

/// `left_out`: an event that a join brought and that could not be believed then, because its server's keys could not be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOutRow {
    /// The place on the main line from which on the state of the join counts.
    pub base: Order,
    /// Whether the event is part of that state. Others are there because they allow such ones.
    pub is_state: bool,
    /// When it was left out, in milliseconds since the epoch.
    pub at_ms: u64,
    /// The event as canonical JSON, signatures included.
    pub json: Bytes,
}

impl Value for LeftOutRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, u8::from(self.is_state)]);
        Order::encode_key(self.base, to);
        to.varint(self.at_ms);
        to.raw(&self.json);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let is_state = from.byte()? == 1;
        let base = Key::decode_key(&mut from)?;
        let at_ms = from.varint()?;
        Ok(Self { base, is_state, at_ms, json: bytes.slice_ref(from.rest()) })
    }
}

/// `purge`: the states of a room below an order are being forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PurgeRow {
    /// The order whose state stays known.
    pub below: Order,
}

impl Value for PurgeRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        Order::encode_key(self.below, to);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { below: Key::decode_key(&mut from)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schema::round_trip;

    fn val() -> impl Strategy<Value = StateValue> {
        prop_oneof![
            Just(StateValue::Absent),
            Just(StateValue::Unknown),
            (0_u64..DERIVED_CODES - 2).prop_map(|event| StateValue::Event(EventNum(event))),
            any::<u32>().prop_map(StateValue::Derived),
        ]
    }

    fn entries() -> impl Strategy<Value = Vec<(StateKeyNum, StateValue)>> {
        proptest::collection::btree_map(any::<u32>().prop_map(StateKeyNum), val(), 0..80)
            .prop_map(|map| map.into_iter().collect())
    }

    proptest! {
        #[test]
        fn rows_come_back(
            val in val(), count: u64, changes in entries(), side: u32, depth: u8, is_bottomless: bool,
            missing in proptest::collection::vec("\\PC{0,9}", 0..4), name in "\\PC{0,9}", state_key in "\\PC{0,9}",
        ) {
            prop_assert_eq!(round_trip(&val), val);
            let order = Order { anchor: Position::new(count >> 12).unwrap_or_default(), minor: -3 };
            for now in [NowRow::from(val), NowRow { val, staged_at: Some(order) }] {
                prop_assert_eq!(round_trip(&now), now);
            }
            for (anchor, brings_from) in [(None, None), (Some(order.anchor), Some((EventNum(count), StateKeyNum(side))))] {
                let stage = StageRow { anchor, makes_room: is_bottomless, brings_from };
                prop_assert_eq!(round_trip(&stage), stage);
            }
            let stage = StageRow { anchor: Some(order.anchor), makes_room: is_bottomless, brings_from: None };
            let mut to = Encoder::default();
            stage.encode(&mut to);
            (to.bytes[0], to.bytes[1]) = (1, u8::from(is_bottomless));
            prop_assert_eq!(StageRow::decode(to.bytes.into()).unwrap(), stage, "layout 1");
            let log = LogRow { count, changes: changes.clone() };
            prop_assert_eq!(round_trip(&log), log);
            let row = SideRow::new(StateRef::Side(SideNum(side)), depth, changes.clone());
            prop_assert_eq!(&round_trip(&row), &row);
            prop_assert_eq!(round_trip(&row).iter().collect::<Vec<_>>(), changes);
            let hole = HoleRow { is_bottomless, missing, parts: side };
            prop_assert_eq!(round_trip(&hole), hole);
            let base = Order { anchor: Position::new(7).unwrap(), minor: -1 };
            let json = Bytes::from(name.clone());
            let left_out = LeftOutRow { base, is_state: is_bottomless, at_ms: side.into(), json };
            prop_assert_eq!(round_trip(&left_out), left_out);
            let key = StateKeyRow { event_type: name, state_key };
            prop_assert_eq!(round_trip(&key), key);
        }

        #[test]
        fn a_side_state_finds_exactly_its_keys(entries in entries(), other: u32) {
            let row = SideRow::new(StateRef::EMPTY, 1, entries.clone());
            for (key, val) in &entries {
                prop_assert_eq!(row.find(*key), Some(*val));
            }
            let expected = entries.iter().find(|(key, _)| key.0 == other).map(|(_, val)| *val);
            prop_assert_eq!(row.find(StateKeyNum(other)), expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let bytes = Bytes::from(bytes);
            let _ = StateValue::decode(bytes.clone());
            let _ = NowRow::decode(bytes.clone());
            let _ = StageRow::decode(bytes.clone());
            let _ = LogRow::decode(bytes.clone());
            let _ = SideRow::decode(bytes.clone()).map(|row| row.find(StateKeyNum(7)));
            let _ = HoleRow::decode(bytes.clone());
            let _ = LeftOutRow::decode(bytes.clone());
            let _ = StateKeyRow::decode(bytes);
        }
    }
}
