//! Rows of push: rules of users, and the running numbers that unread counts are worked out from.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{DeviceNum, EventNum},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout},
    },
};

/// Where a user wants to be told of notifications.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PusherRow {
    /// The number of the device that set it, with which it goes.
    pub device: DeviceNum,
    /// The pusher, as clients see it.
    pub pusher: serde_json::Value,
}

/// A part of a room that is read on its own: the main timeline, or one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(pub EventNum);

impl Lane {
    /// Everything outside threads.
    pub const MAIN: Self = Self(EventNum(0));

    /// The thread that grows from this event.
    pub fn thread(root: EventNum) -> Self {
        Self(EventNum(root.0 + 1))
    }

    /// The event from which the thread grows; none for the main timeline.
    pub fn root(self) -> Option<EventNum> {
        self.0.0.checked_sub(1).map(EventNum)
    }
}

impl Key for Lane {
    type Ref<'a> = Self;
    fn encode_key(key: Self, to: &mut Encoder) {
        EventNum::encode_key(key.0, to);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        EventNum::decode_key(from).map(Self)
    }
}

impl Value for Lane {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        EventNum::encode_key(self.0, to);
    }
    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        EventNum::decode_key(&mut from).map(Self)
    }
}

/// What an event does to somebody's counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// It counts as a notification.
    pub notify: bool,
    /// It counts as a highlight as well.
    pub highlight: bool,
}

impl Outcome {
    fn bits(self) -> u8 {
        u8::from(self.notify) | u8::from(self.highlight) << 1
    }

    fn from_bits(bits: u8) -> Self {
        Self { notify: bits & 1 != 0, highlight: bits & 2 != 0 }
    }
}

/// What an event does to the counts of each class of users.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// To those who have the default rules.
    pub default: Outcome,
    /// To those who hear of mentions only.
    pub mentions: Outcome,
}

impl Outcomes {
    fn bits(self) -> u8 {
        self.default.bits() | self.mentions.bits() << 2
    }

    fn from_bits(bits: u8) -> Self {
        Self { default: Outcome::from_bits(bits), mentions: Outcome::from_bits(bits >> 2) }
    }
}

/// How much has notified each class, from the beginning of a lane up to and including one event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// What that event itself does.
    pub last: Outcomes,
    /// (notifications, highlights) of those who have the default rules.
    pub default: (u64, u64),
    /// The same of those who hear of mentions only.
    pub mentions: (u64, u64),
}

impl Totals {
    /// With one more event.
    #[must_use]
    pub fn plus(self, event: Outcomes) -> Self {
        let add = |(notify, highlight): (u64, u64), outcome: Outcome| {
            (notify + u64::from(outcome.notify), highlight + u64::from(outcome.highlight))
        };
        Self {
            last: event,
            default: add(self.default, event.default),
            mentions: add(self.mentions, event.mentions),
        }
    }
}

impl Value for Totals {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, self.last.bits()]);
        for number in [self.default.0, self.default.1, self.mentions.0, self.mentions.1] {
            to.varint(number);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self {
            last: Outcomes::from_bits(from.byte()?),
            default: (from.varint()?, from.varint()?),
            mentions: (from.varint()?, from.varint()?),
        })
    }
}

/// An event that does something else to one user's counts than to those of the user's class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnOutcome {
    /// Where the event stands.
    pub lane: Lane,
    /// What it does to this user.
    pub own: Outcome,
    /// What it does to the classes.
    pub classes: Outcomes,
}

impl Value for OwnOutcome {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, self.own.bits() | self.classes.bits() << 2]);
        to.varint(self.lane.0.0);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let bits = from.byte()?;
        Ok(Self {
            own: Outcome::from_bits(bits),
            classes: Outcomes::from_bits(bits >> 2),
            lane: Lane(EventNum(from.varint()?)),
        })
    }
}

/// An event that counted and was redacted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedactedOutcome {
    /// Where it stands.
    pub lane: Lane,
    /// What it did.
    pub classes: Outcomes,
}

impl Value for RedactedOutcome {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, self.classes.bits()]);
        to.varint(self.lane.0.0);
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { classes: Outcomes::from_bits(from.byte()?), lane: Lane(EventNum(from.varint()?)) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn again<V: Value>(value: &V) -> V {
        let mut to = Encoder::default();
        value.encode(&mut to);
        V::decode(to.bytes.into()).unwrap()
    }

    proptest! {
        #[test]
        fn rows_come_back(bits in 0_u8..64, lane in 0_u64..1 << 40, numbers: [u64; 4]) {
            let classes = Outcomes::from_bits(bits >> 2);
            let lane = Lane(EventNum(lane));
            let own = OwnOutcome { lane, own: Outcome::from_bits(bits), classes };
            prop_assert_eq!(again(&own), own);
            let redacted = RedactedOutcome { lane, classes };
            prop_assert_eq!(again(&redacted), redacted);
            let [a, b, c, d] = numbers;
            let totals = Totals { last: classes, default: (a, b), mentions: (c, d) };
            prop_assert_eq!(again(&totals), totals);
            prop_assert_eq!(again(&lane), lane);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let bytes = Bytes::from(bytes);
            let _ = Totals::decode(bytes.clone());
            let _ = OwnOutcome::decode(bytes.clone());
            let _ = RedactedOutcome::decode(bytes);
        }
    }

    #[test]
    fn the_first_event_of_a_room_is_not_taken_for_the_main_timeline() {
        assert_ne!(Lane::thread(EventNum(0)), Lane::MAIN);
        assert_eq!(Lane::thread(EventNum(7)).root(), Some(EventNum(7)));
        assert_eq!(Lane::MAIN.root(), None);
    }
}
