//! Rows of rooms: the room itself, who is in it, its names. Rows of events stand in `schema/events.rs`.

use std::collections::BTreeSet;

use bytes::Bytes;
use ruma::{OwnedRoomId, RoomId};

use crate::{
    ids::{EventNum, Order, Position, RoomNum},
    schema::{
        encoding::{decode_bytes, decode_ref, decode_u32, encode_bytes, encode_ref},
        state::StateRef,
    },
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout, layout_upto},
    },
};

pub use super::events::{
    AsideCount, AsideRow, EventHash, EventHeader, EventKey, EventRow, Place, RedactionWaitingRow,
    RetentionRow, SentBy, Span, Spans,
};

/// The relation of a user to a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Membership {
    /// The user is in the room.
    Join = 1,
    /// The user is invited to the room.
    Invite = 2,
    /// The user has asked to be let in.
    Knock = 3,
    /// The user is not in the room: left, kicked, or never there.
    Leave = 4,
    /// The user is banned from the room.
    Ban = 5,
}

impl Membership {
    /// The name that the specification gives this membership.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Invite => "invite",
            Self::Knock => "knock",
            Self::Leave => "leave",
            Self::Ban => "ban",
        }
    }

    /// The membership that the specification gives this name; `None` for any other name.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Join, Self::Invite, Self::Knock, Self::Leave, Self::Ban]
            .into_iter()
            .find(|kind| kind.as_str() == word)
    }

    pub(super) fn from_byte(byte: u8) -> Result<Self, Fault> {
        [Self::Join, Self::Invite, Self::Knock, Self::Leave, Self::Ban]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or(Fault::Corrupt("a membership is of an unknown kind"))
    }
}

/// The part that this server has in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Resident {
    /// The room is being made here, in parts. Nothing of it counts before the last one.
    No = 0,
    /// Users of ours are in the room, and we hold its whole state.
    Yes = 1,
    /// A user of ours is joining the room, of which we had nothing, and its state is being laid down in parts. Nothing of it
    /// counts before the last one. The position that is reserved for the join stands in the row of `STAGE`.
    Joining = 2,
    /// Users of ours are in the room, but of its state we hold a part only.
    Partial = 3,
    /// A user of ours is invited to the room, and we know of it what the invitation says.
    Invited = 4,
    /// A user of ours has asked to be let into the room, and we know of it what the answer said.
    Knocked = 5,
    /// Nobody of ours is in the room any more: we hold what it was until then.
    Left = 6,
}

impl Resident {
    const ALL: [Self; 7] =
        [Self::No, Self::Yes, Self::Joining, Self::Partial, Self::Invited, Self::Knocked, Self::Left];

    /// Whether the room counts: a room that is being made or joined does not, because its rows come in parts.
    pub fn counts(self) -> bool {
        match self {
            Self::Yes | Self::Partial | Self::Invited | Self::Knocked | Self::Left => true,
            Self::No | Self::Joining => false,
        }
    }

    /// Whether we hold events and state of the room, which those who are or were in it may read.
    pub fn has_history(self) -> bool {
        match self {
            Self::Yes | Self::Partial | Self::Left => true,
            Self::No | Self::Joining | Self::Invited | Self::Knocked => false,
        }
    }

    /// Whether we hold the whole state at the tip of the room as we know it, so that counts and memberships follow from it.
    pub fn has_whole_state(self) -> bool {
        match self {
            Self::Yes | Self::Left => true,
            Self::No | Self::Joining | Self::Partial | Self::Invited | Self::Knocked => false,
        }
    }

    /// Whether users of ours are in the room, or were until nobody was left, so that its events come to us.
    pub fn is_in(self) -> bool {
        match self {
            Self::Yes | Self::Partial => true,
            Self::No | Self::Joining | Self::Invited | Self::Knocked | Self::Left => false,
        }
    }

    pub(super) fn from_byte(byte: u8) -> Result<Self, Fault> {
        let found = Self::ALL.into_iter().find(|kind| *kind as u8 == byte);
        found.ok_or(Fault::Corrupt("a room is of a kind that this version does not know"))
    }
}

/// An event that no other event cites yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The number of the event.
    pub event: EventNum,
    /// The key that names the event.
    pub key: EventKey,
    /// The depth of the event.
    pub depth: u64,
    /// When we stored it: milliseconds since the epoch.
    pub stored_ms: u64,
    /// Whether this server made the event.
    pub is_own: bool,
    /// The room's state after the event.
    pub after: StateRef,
}

impl Head {
    fn encode(&self, to: &mut Encoder) {
        to.varint(self.event.0);
        EventKey::encode_key(&self.key, to);
        to.varint(self.depth);
        to.varint(self.stored_ms);
        to.raw(&[u8::from(self.is_own)]);
        encode_ref(self.after, to);
    }

    fn decode(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        Ok(Self {
            event: EventNum(from.varint()?),
            key: Key::decode_key(from)?,
            depth: from.varint()?,
            stored_ms: from.varint()?,
            is_own: from.byte()? == 1,
            after: decode_ref(from)?,
        })
    }
}

/// The newest event of a branch whose state is far from the room's. The room's state does not follow from it before the
/// branch is reunited with the heads (`docs/decisions/branches-that-stand-apart.md`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Apart {
    /// The event, which becomes a head when the branch is reunited.
    pub head: Head,
    /// The heads that this event, or an earlier one of its branch, cites. They are heads no more when the branch is
    /// reunited.
    pub replaces: Vec<EventNum>,
}

impl Apart {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        let head = Head::decode(from)?;
        let count = from.varint()?;
        let replaces = (0..count).map(|_| from.varint().map(EventNum)).collect::<Result<_, Fault>>()?;
        Ok(Self { head, replaces })
    }
}

/// The progress of a room that we joined without its members, until its state is whole
/// (`docs/decisions/partial-state-joins.md`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartialState {
    /// The order at which the state before our join is read: the marker of the hole below the join.
    pub base: Order,
    /// Our member event, before which the state is asked for.
    pub join: EventNum,
    /// The server that let us in, which is the likeliest to give the rest of the state.
    pub via: String,
    /// The name of this server, whose members are all known.
    pub us: String,
    /// Whether the state before the join is whole by now, so that only the events since then are to be judged again.
    pub is_filled: bool,
}

impl PartialState {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[u8::from(self.is_filled)]);
        Order::encode_key(self.base, to);
        to.varint(self.join.0);
        encode_bytes(self.via.as_bytes(), to);
        encode_bytes(self.us.as_bytes(), to);
    }

    fn decode(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        let is_filled = from.byte()? == 1;
        let (base, join) = (Key::decode_key(from)?, EventNum(from.varint()?));
        let mut name = || {
            let name = std::str::from_utf8(decode_bytes(from)?).map(ToOwned::to_owned);
            name.map_err(|_| Fault::Corrupt("the name of a server is not UTF-8"))
        };
        Ok(Self { base, join, via: name()?, us: name()?, is_filled })
    }
}

/// An earlier stay of ours in a room, which ended before its state was whole. Events may still stand on those of that time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EarlierStay {
    /// The join with which it began, and how far the state before that has come.
    pub state: PartialState,
    /// The order at which the state before the next join is read. From there on nothing rests on this stay's base.
    pub end: Order,
}

/// The bit of a room's row that says that the state of the room is partial.
const HAS_PARTIAL: u8 = 1;
/// The bit that says that the row tells when the state became whole.
const HAS_FILLED_AT: u8 = 2;
/// The bit that says that the row has earlier stays.
const HAS_EARLIER: u8 = 4;

/// A room. Rewritten with each of its events; the room's lock guards it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomRow {
    /// The id of the room.
    pub id: OwnedRoomId,
    /// The version of the room, as a number from 1 to 12.
    pub version: u8,
    /// The part that this server has in the room.
    pub resident: Resident,
    /// The order of its newest event on the main line.
    pub tip: Order,
    /// The order of the newest change of its current state (`rooms/state.rs` rounds references down to it).
    pub state_tip: Order,
    /// The number that the next event gets.
    pub next_event: u64,
    /// The number that the next state key gets.
    pub next_key: u32,
    /// The number that the next side state gets.
    pub next_side: u32,
    /// Its heads, at most 20; sorted by event.
    pub heads: Vec<Head>,
    /// Its branches that stand apart, at most 20; sorted by event.
    pub apart: Vec<Apart>,
    /// The number of users of all servers who are joined.
    pub joined: u32,
    /// The number of users of all servers who are invited.
    pub invited: u32,
    /// How far a join without members has come; `None` where the state is whole.
    pub partial: Option<PartialState>,
    /// The position at which the state last became whole after such a join. Clients who were told of the room before know
    /// only a part of it.
    pub filled_at: Option<Position>,
    /// Earlier stays whose states are not whole yet, oldest first; few (`rooms/change/stays.rs`).
    pub earlier: Vec<EarlierStay>,
}

impl Value for RoomRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[6, self.version, self.resident as u8]);
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
            head.encode(to);
        }
        to.varint(self.apart.len() as u64);
        for branch in &self.apart {
            branch.head.encode(to);
            to.varint(branch.replaces.len() as u64);
            for event in &branch.replaces {
                to.varint(event.0);
            }
        }
        let bit = |is_there: bool, bit: u8| if is_there { bit } else { 0 };
        to.raw(&[bit(self.partial.is_some(), HAS_PARTIAL)
            | bit(self.filled_at.is_some(), HAS_FILLED_AT)
            | bit(!self.earlier.is_empty(), HAS_EARLIER)]);
        if let Some(partial) = &self.partial {
            partial.encode(to);
        }
        if let Some(filled_at) = self.filled_at {
            to.position(filled_at);
        }
        if !self.earlier.is_empty() {
            to.varint(self.earlier.len() as u64);
        }
        for stay in &self.earlier {
            stay.state.encode(to);
            Order::encode_key(stay.end, to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 knew events by their hashes only, which are written alike; layout 2 had no branches that stand apart;
        // layout 3 knew two kinds of rooms only, which are written alike; layout 4 had no partial states; layout 5 had no
        // earlier stays.
        let layout = layout_upto(&mut from, 6)?;
        let version = from.byte()?;
        let resident = Resident::from_byte(from.byte()?)?;
        let id = std::str::from_utf8(decode_bytes(&mut from)?).ok().and_then(|id| RoomId::parse(id).ok());
        let mut row = Self {
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
                (0..count).map(|_| Head::decode(&mut from)).collect::<Result<_, Fault>>()?
            },
            apart: {
                let count = if layout < 3 { 0 } else { from.varint()? };
                (0..count).map(|_| Apart::decode(&mut from)).collect::<Result<_, Fault>>()?
            },
            partial: None,
            filled_at: None,
            earlier: Vec::new(),
        };
        let flags = if layout < 5 { 0 } else { from.byte()? };
        if flags & HAS_PARTIAL != 0 {
            row.partial = Some(PartialState::decode(&mut from)?);
        }
        if flags & HAS_FILLED_AT != 0 {
            row.filled_at = Some(Key::decode_key(&mut from)?);
        }
        if flags & HAS_EARLIER != 0 {
            for _ in 0..from.varint()? {
                let state = PartialState::decode(&mut from)?;
                row.earlier.push(EarlierStay { state, end: Key::decode_key(&mut from)? });
            }
        }
        Ok(row)
    }
}

impl RoomRow {
    /// A room of which there is nothing yet.
    pub fn new(id: OwnedRoomId, version: u8, resident: Resident) -> Self {
        Self {
            id,
            version,
            resident,
            tip: Order::MIN,
            state_tip: Order::MIN,
            next_event: 0,
            next_key: 0,
            next_side: 0,
            heads: Vec::new(),
            apart: Vec::new(),
            joined: 0,
            invited: 0,
            partial: None,
            filled_at: None,
            earlier: Vec::new(),
        }
    }

    /// The stay of ours in the room whose state is to be completed next: the one of now, and then earlier ones, the latest first.
    pub fn incomplete(&self) -> Option<&PartialState> {
        self.partial.as_ref().or(self.earlier.last().map(|stay| &stay.state))
    }

    /// The states after the room's heads, and after the branches that stand apart from it.
    pub fn states(&self) -> BTreeSet<StateRef> {
        self.heads.iter().chain(self.apart.iter().map(|branch| &branch.head)).map(|head| head.after).collect()
    }

    /// Settles every pending position in the row, once the batch's first position is known.
    #[must_use]
    pub fn settle(mut self, base: Position) -> Self {
        self.tip = self.tip.settle(base);
        self.state_tip = self.state_tip.settle(base);
        for head in self.heads.iter_mut().chain(self.apart.iter_mut().map(|branch| &mut branch.head)) {
            head.after = head.after.settle(base);
        }
        self.filled_at = self.filled_at.map(|position| position.settle(base));
        self
    }
}

/// The bit of a row of a user that says that they have forgotten the room.
const FORGOTTEN: u8 = 1;
/// The bit that says that the row tells where the user left.
const HAS_LEFT: u8 = 2;
/// The bit that says that the row tells below which order the room is forgotten.
const HAS_FORGOTTEN_BELOW: u8 = 4;

/// The relation of one of our users to a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRoomRow {
    /// The present membership of the user.
    pub membership: Membership,
    /// The position since which it is that: a join stays where it is when only the profile changes.
    pub since: Position,
    /// The member event that says so now.
    pub event: EventNum,
    /// Whether the user wants to hear no more of the room.
    pub forgotten: bool,
    /// The order at which somebody who is not joined last ceased to be; none for who never was.
    pub left: Option<Order>,
    /// The order of the first event about somebody who had forgotten the room. What stands below it does not count for
    /// them until they join again; none for a member, and for who never forgot the room.
    pub forgotten_below: Option<Order>,
}

impl Value for UserRoomRow {
    fn encode(&self, to: &mut Encoder) {
        let orders = [(self.left, HAS_LEFT), (self.forgotten_below, HAS_FORGOTTEN_BELOW)];
        let parts = orders.iter().filter(|(order, _)| order.is_some()).map(|(_, part)| *part);
        let flags = parts.fold(u8::from(self.forgotten), |flags, part| flags | part);
        to.raw(&[3, self.membership as u8, flags]);
        to.position(self.since);
        to.varint(self.event.0);
        for order in orders.into_iter().filter_map(|(order, _)| order) {
            Order::encode_key(order, to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        // Layout 1 did not say where they left: who had left then sees no more of the room's past.
        let layout = layout_upto(&mut from, 3)?;
        let membership = Membership::from_byte(from.byte()?)?;
        let flags = from.byte()?;
        let since: Position = Key::decode_key(&mut from)?;
        let event = EventNum(from.varint()?);
        let has_left = if layout < 3 { !from.0.is_empty() } else { flags & HAS_LEFT != 0 };
        let left = has_left.then(|| Key::decode_key(&mut from)).transpose()?;
        let forgotten_below = if layout < 3 {
            // Layout 2 did not say whether the room had been forgotten before: who may have forgotten it sees nothing of what
            // an earlier invitation let them see.
            (membership != Membership::Join && left.is_none()).then_some(Order::live(since))
        } else {
            (flags & HAS_FORGOTTEN_BELOW != 0).then(|| Key::decode_key(&mut from)).transpose()?
        };
        Ok(Self { membership, since, event, forgotten: flags & FORGOTTEN != 0, left, forgotten_below })
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

/// An alias of this server, which names a room.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AliasRow {
    /// The room that it names.
    pub room: RoomNum,
    /// The user id of who made it.
    #[serde(default)]
    pub creator: String,
}

/// A sticky event (MSC4354).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StickyRow {
    /// The event, which stands in the timeline.
    pub event: EventNum,
    /// Until when it is sticky, in milliseconds since the epoch.
    pub until_ms: u64,
    /// The id of its sender.
    pub sender: String,
}

impl Value for StickyRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.event.0);
        to.varint(self.until_ms);
        to.raw(self.sender.as_bytes());
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let (event, until_ms) = (EventNum(from.varint()?), from.varint()?);
        let sender = std::str::from_utf8(from.rest());
        let sender = sender.map_err(|_| Fault::Corrupt("the sender of a sticky event is not text"))?;
        Ok(Self { event, until_ms, sender: sender.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schema::round_trip;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let bytes = Bytes::from(bytes);
            let _ = RoomRow::decode(bytes.clone());
            let _ = UserRoomRow::decode(bytes);
        }
    }

    #[test]
    fn a_room_comes_back() {
        let order = Order::live(Position::new(99).unwrap());
        let head = |event| Head {
            event: EventNum(event),
            key: [5; 32].into(),
            depth: 3,
            stored_ms: 7,
            is_own: true,
            after: StateRef::Main(order),
        };
        let room = RoomRow {
            id: RoomId::parse("!abc:example.org").unwrap(),
            version: 11,
            resident: Resident::Yes,
            tip: order,
            state_tip: order,
            next_event: 12,
            next_key: 4,
            next_side: 1,
            heads: vec![head(11)],
            apart: vec![
                Apart { head: head(9), replaces: Vec::new() },
                Apart { head: head(10), replaces: vec![EventNum(3), EventNum(11)] },
            ],
            joined: 2,
            invited: 1,
            partial: None,
            filled_at: None,
            earlier: Vec::new(),
        };
        for resident in Resident::ALL {
            let room = RoomRow { resident, ..room.clone() };
            assert_eq!(round_trip(&room), room);
        }
        let (via, us) = ("a.example".to_owned(), "b.example".to_owned());
        let partial = PartialState { base: order, join: EventNum(7), via, us, is_filled: true };
        let earlier = vec![EarlierStay { state: partial.clone(), end: order }; 2];
        for (partial, filled_at) in [(Some(partial.clone()), None), (Some(partial), Some(order.anchor))] {
            let room = RoomRow { partial, filled_at, ..room.clone() };
            assert_eq!(round_trip(&room), room);
            let room = RoomRow { earlier: earlier.clone(), ..room };
            assert_eq!(round_trip(&room), room);
        }
        let bytes = |room: &RoomRow| {
            let mut to = Encoder::default();
            room.encode(&mut to);
            to.bytes
        };
        // A row of layout 3 says the same of rooms that are ours or are being made.
        for resident in [Resident::No, Resident::Yes] {
            let room = RoomRow { resident, ..room.clone() };
            let mut old = bytes(&room);
            assert_eq!((old[0], old[2]), (6, u8::from(resident == Resident::Yes)));
            // Up to layout 4 nothing stood behind the branches.
            assert_eq!(old.pop(), Some(0));
            for layout in [3, 4] {
                old[0] = layout;
                assert_eq!(RoomRow::decode(old.clone().into()).unwrap(), room);
            }
        }
        // A row of layout 2 ends after the heads.
        let whole = RoomRow { apart: Vec::new(), ..room };
        let mut old = bytes(&whole);
        assert_eq!((old.pop(), old.pop()), (Some(0), Some(0)));
        old[0] = 2;
        assert_eq!(RoomRow::decode(old.clone().into()).unwrap(), whole);
        old[2] = Resident::ALL.len() as u8;
        assert!(RoomRow::decode(old.into()).is_err(), "a room of a later version");
    }

    #[test]
    fn what_a_user_is_to_a_room_comes_back() {
        let since = Position::new(7).unwrap();
        let orders = [None, Some(Order::live(since)), Some(Order::upto(since))];
        for (left, forgotten_below) in
            orders.into_iter().flat_map(|left| orders.map(|forgotten_below| (left, forgotten_below)))
        {
            for forgotten in [false, true] {
                let (membership, event) = (Membership::Ban, EventNum(300));
                let row = UserRoomRow { membership, since, event, forgotten, left, forgotten_below };
                assert_eq!(round_trip(&row), row);
            }
        }
    }

    #[test]
    fn rows_of_users_of_older_layouts_are_read() {
        let since = Position::new(7).unwrap();
        let old = |layout: u8, membership: Membership, forgotten: bool, left: Option<Order>| {
            let mut to = Encoder::default();
            to.raw(&[layout, membership as u8, u8::from(forgotten)]);
            to.position(since);
            to.varint(300);
            if let Some(left) = left {
                Order::encode_key(left, &mut to);
            }
            UserRoomRow::decode(to.bytes.into()).unwrap()
        };
        let row = |membership, forgotten, left, forgotten_below| UserRoomRow {
            membership,
            since,
            event: EventNum(300),
            forgotten,
            left,
            forgotten_below,
        };
        let (left, below) = (Some(Order::upto(since)), Some(Order::live(since)));
        assert_eq!(old(1, Membership::Join, false, None), row(Membership::Join, false, None, None));
        assert_eq!(old(2, Membership::Leave, true, left), row(Membership::Leave, true, left, None));
        assert_eq!(old(2, Membership::Ban, false, left), row(Membership::Ban, false, left, None));
        // Who was never in the room may have forgotten it: what came before does not count.
        for membership in [Membership::Invite, Membership::Leave] {
            assert_eq!(old(2, membership, false, None), row(membership, false, None, below));
        }
    }
}
