//! Rows of push: rules of users, and the running numbers that unread counts are worked out from.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{DeviceNum, EventNum, Position},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout, layout_upto},
    },
};

/// Where a user wants to be told of notifications.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PusherRow {
    /// The number of the device that set it, with which it goes.
    pub device: DeviceNum,
    /// The pusher, as clients see it.
    pub pusher: serde_json::Value,
    /// Whether notifications are sent to it (MSC3881).
    #[serde(default = "yes")]
    pub is_enabled: bool,
    /// When it was set, in milliseconds since the epoch; 0 in rows from before that was noted.
    #[serde(default)]
    pub set_ms: u64,
    /// Whether `PUSHER_PLACES` says how far it has come. Rows from before there were places have none until something is sent.
    #[serde(default)]
    pub has_place: bool,
}

fn yes() -> bool {
    true
}

impl PusherRow {
    /// Whether the pusher mails digests to its pushkey, and asks no gateway. Such a pusher belongs to the account and not to a device.
    pub fn is_email(&self) -> bool {
        self.pusher.get("kind").and_then(serde_json::Value::as_str) == Some("email")
    }
}

/// How far a pusher has come, as far as a crash must not forget it. A pusher that has come as far as the reader of the log needs no newer
/// row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PusherPlace {
    /// The position up to which everything is dealt with. A new pusher begins with the position at which it was set.
    pub upto: Position,
    /// Its gateway did not take something, so that it is not up to date: whatever came since is looked for in the user's rooms.
    pub is_behind: bool,
    /// The number of unread messages that the gateway was told last; none before the first.
    pub badge: Option<u64>,
}

impl Value for PusherPlace {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, u8::from(self.is_behind)]);
        to.position(self.upto);
        to.varint(self.badge.map_or(0, |badge| badge.saturating_add(1)));
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let is_behind = match from.byte()? {
            0 => false,
            1 => true,
            _ => return Err(Fault::Corrupt("a pusher is neither behind nor up to date")),
        };
        let upto = Position::decode_key(&mut from)?;
        Ok(Self { upto, is_behind, badge: from.varint()?.checked_sub(1) })
    }
}

/// A part of a room that is read on its own: the main timeline, or one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(pub EventNum);

impl Lane {
    /// The main timeline: everything outside threads.
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

/// The sound that a notification comes with, as the rules that everybody has know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Sound {
    /// It comes without a sound.
    #[default]
    None = 0,
    /// It comes with the device's usual sound.
    Default = 1,
    /// It comes with the sound of a call.
    Ring = 2,
    /// It comes with another sound, which the user's rule names.
    Other = 3,
}

/// An event does this to somebody's counts, and somebody is told of it like this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// It counts as a notification.
    pub notify: bool,
    /// It counts as a highlight as well.
    pub highlight: bool,
    /// The sound of the notification.
    pub sound: Sound,
}

impl Outcome {
    fn bits(self) -> u8 {
        u8::from(self.notify) | u8::from(self.highlight) << 1 | (self.sound as u8) << 2
    }

    fn from_bits(bits: u8) -> Self {
        let sound = match bits >> 2 & 3 {
            0 => Sound::None,
            1 => Sound::Default,
            2 => Sound::Ring,
            _ => Sound::Other,
        };
        Self { sound, ..Self::from_old_bits(bits) }
    }

    /// Layout 1 of the rows knew no sounds, and had two bits an outcome.
    fn from_old_bits(bits: u8) -> Self {
        Self { notify: bits & 1 != 0, highlight: bits & 2 != 0, sound: Sound::None }
    }
}

/// An event does this to the counts of each class of users.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// The outcome for those who have the default rules.
    pub default: Outcome,
    /// The outcome for those who hear of mentions only.
    pub mentions: Outcome,
    /// The outcome for those who subscribe to the thread in which it stands (MSC4306). Outside threads it is that of the default rules.
    pub subscribed: Outcome,
}

impl Outcomes {
    /// Whether an event counts as much for those who subscribe to its thread as it does by the default rules. Rows of such events say
    /// nothing of subscribers, and so do those from before there were any.
    fn is_simple(self) -> bool {
        self.subscribed == self.default
    }

    fn bits(self) -> u8 {
        self.default.bits() | self.mentions.bits() << 4
    }

    fn from_bits(bits: u8) -> Self {
        let default = Outcome::from_bits(bits);
        Self { default, mentions: Outcome::from_bits(bits >> 4), subscribed: default }
    }

    fn from_old_bits(bits: u8) -> Self {
        let default = Outcome::from_old_bits(bits);
        Self { default, mentions: Outcome::from_old_bits(bits >> 2), subscribed: default }
    }

    /// Reads the outcome for subscribers, which stands at the end of a row.
    fn with_subscribed(self, from: &mut Decoder<'_>) -> Result<Self, Fault> {
        Ok(Self { subscribed: Outcome::from_bits(from.byte()?), ..self })
    }
}

/// How much has notified each class, from the beginning of a lane up to and including one event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// The outcome of that event alone.
    pub last: Outcomes,
    /// The sums (notifications, highlights) of those who have the default rules.
    pub default: (u64, u64),
    /// The sums (notifications, highlights) of those who hear of mentions only.
    pub mentions: (u64, u64),
    /// The sums (notifications, highlights) of those who subscribe to the thread, or as of the default rules outside threads.
    pub subscribed: (u64, u64),
}

impl Totals {
    /// The sums after one more event, which has these outcomes.
    #[must_use]
    pub fn plus(self, event: Outcomes) -> Self {
        let add = |(notify, highlight): (u64, u64), outcome: Outcome| {
            (notify + u64::from(outcome.notify), highlight + u64::from(outcome.highlight))
        };
        Self {
            last: event,
            default: add(self.default, event.default),
            mentions: add(self.mentions, event.mentions),
            subscribed: add(self.subscribed, event.subscribed),
        }
    }
}

impl Value for Totals {
    fn encode(&self, to: &mut Encoder) {
        let is_simple = self.last.is_simple() && self.subscribed == self.default;
        to.raw(&[if is_simple { 2 } else { 3 }, self.last.bits()]);
        for number in [self.default.0, self.default.1, self.mentions.0, self.mentions.1] {
            to.varint(number);
        }
        if !is_simple {
            to.varint(self.subscribed.0);
            to.varint(self.subscribed.1);
            to.raw(&[self.last.subscribed.bits()]);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        let (layout, bits) = (layout_upto(&mut from, 3)?, from.byte()?);
        let last = if layout == 1 { Outcomes::from_old_bits(bits) } else { Outcomes::from_bits(bits) };
        let default = (from.varint()?, from.varint()?);
        let mentions = (from.varint()?, from.varint()?);
        if layout < 3 {
            return Ok(Self { last, default, mentions, subscribed: default });
        }
        let subscribed = (from.varint()?, from.varint()?);
        Ok(Self { last: last.with_subscribed(&mut from)?, default, mentions, subscribed })
    }
}

/// An event that does something else to one user's counts than to those of the user's class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnOutcome {
    /// The lane in which the event stands.
    pub lane: Lane,
    /// The outcome for this user, which counts instead of the one for the user's class.
    pub own: Outcome,
    /// The outcomes for the classes, because one of them is taken out of the user's count.
    pub classes: Outcomes,
}

impl Value for OwnOutcome {
    fn encode(&self, to: &mut Encoder) {
        let is_simple = self.classes.is_simple();
        to.raw(&[if is_simple { 2 } else { 3 }, self.own.bits(), self.classes.bits()]);
        to.varint(self.lane.0.0);
        if !is_simple {
            to.raw(&[self.classes.subscribed.bits()]);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        let (layout, bits) = (layout_upto(&mut from, 3)?, from.byte()?);
        let (own, mut classes) = if layout == 1 {
            // Layout 1 had both outcomes in one byte.
            (Outcome::from_old_bits(bits), Outcomes::from_old_bits(bits >> 2))
        } else {
            (Outcome::from_bits(bits), Outcomes::from_bits(from.byte()?))
        };
        let lane = Lane(EventNum(from.varint()?));
        if layout == 3 {
            classes = classes.with_subscribed(&mut from)?;
        }
        Ok(Self { own, classes, lane })
    }
}

/// An event that counted and was redacted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedactedOutcome {
    /// The lane in which the event stands.
    pub lane: Lane,
    /// The outcome that is taken back.
    pub classes: Outcomes,
    /// The position of the redaction; zero if that was not written down yet.
    pub redacted_at: Position,
}

impl Value for RedactedOutcome {
    fn encode(&self, to: &mut Encoder) {
        let is_simple = self.classes.is_simple();
        to.raw(&[if is_simple { 3 } else { 4 }, self.classes.bits()]);
        to.varint(self.lane.0.0);
        Position::encode_key(self.redacted_at, to);
        if !is_simple {
            to.raw(&[self.classes.subscribed.bits()]);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        let (layout, bits) = (layout_upto(&mut from, 4)?, from.byte()?);
        let mut classes = if layout == 1 { Outcomes::from_old_bits(bits) } else { Outcomes::from_bits(bits) };
        let lane = Lane(EventNum(from.varint()?));
        // Layouts 1 and 2 did not say when.
        let redacted_at = if layout >= 3 { Position::decode_key(&mut from)? } else { Position::ZERO };
        if layout == 4 {
            classes = classes.with_subscribed(&mut from)?;
        }
        Ok(Self { lane, classes, redacted_at })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schema::round_trip;

    proptest! {
        #[test]
        fn rows_come_back(
            own: u8, classes: u8, subscribed: Option<u8>, lane in 0_u64..1 << 40, numbers: [u64; 5],
        ) {
            let mut classes = Outcomes::from_bits(classes);
            if let Some(subscribed) = subscribed {
                classes.subscribed = Outcome::from_bits(subscribed);
            }
            let lane = Lane(EventNum(lane));
            let own = OwnOutcome { lane, own: Outcome::from_bits(own), classes };
            prop_assert_eq!(round_trip(&own), own);
            let redacted = RedactedOutcome { lane, classes, redacted_at: Position::new(numbers[0] >> 11).unwrap() };
            prop_assert_eq!(round_trip(&redacted), redacted);
            let [a, b, c, d, e] = numbers;
            for subscribed in [(a, b), (e, a)] {
                let totals = Totals { last: classes, default: (a, b), mentions: (c, d), subscribed };
                prop_assert_eq!(round_trip(&totals), totals);
            }
            prop_assert_eq!(round_trip(&lane), lane);
            for (is_behind, badge) in [(false, None), (true, Some(a >> 1)), (false, Some(0))] {
                let place = PusherPlace { upto: redacted.redacted_at, is_behind, badge };
                prop_assert_eq!(round_trip(&place), place);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let bytes = Bytes::from(bytes);
            let _ = Totals::decode(bytes.clone());
            let _ = OwnOutcome::decode(bytes.clone());
            let _ = RedactedOutcome::decode(bytes.clone());
            let _ = PusherPlace::decode(bytes);
        }
    }

    #[test]
    fn rows_of_the_first_layout_are_read() {
        let loud = Outcome { notify: true, highlight: true, sound: Sound::None };
        let quiet = Outcome { highlight: false, ..loud };
        let classes = Outcomes { default: loud, mentions: quiet, subscribed: loud };
        let totals = Totals::decode(vec![1, 0b0111, 3, 2, 1, 0].into()).unwrap();
        let expected = Totals { last: classes, default: (3, 2), mentions: (1, 0), subscribed: (3, 2) };
        assert_eq!(totals, expected);
        assert_eq!(Totals::decode(vec![2, classes.bits(), 3, 2, 1, 0].into()).unwrap(), expected);
        let own = OwnOutcome::decode(vec![1, 0b011101, 5].into()).unwrap();
        assert_eq!(own, OwnOutcome { lane: Lane(EventNum(5)), own: quiet, classes });
        let redacted = RedactedOutcome::decode(vec![1, 0b0111, 5].into()).unwrap();
        let expected = RedactedOutcome { lane: Lane(EventNum(5)), classes, redacted_at: Position::ZERO };
        assert_eq!(redacted, expected);
        let third = OwnOutcome::decode(vec![2, quiet.bits(), classes.bits(), 5].into()).unwrap();
        assert_eq!(third, own);
        let second = [2, classes.bits(), 5].to_vec();
        assert_eq!(RedactedOutcome::decode(second.into()).unwrap(), expected);
    }

    #[test]
    fn the_first_event_of_a_room_is_not_taken_for_the_main_timeline() {
        assert_ne!(Lane::thread(EventNum(0)), Lane::MAIN);
        assert_eq!(Lane::thread(EventNum(7)).root(), Some(EventNum(7)));
        assert_eq!(Lane::MAIN.root(), None);
    }

    #[test]
    fn pushers_from_before_they_could_be_switched_off_are_on_and_have_no_place() {
        let row: PusherRow = serde_json::from_str(r#"{"device":3,"pusher":{}}"#).unwrap();
        assert!(row.is_enabled && !row.has_place && row.set_ms == 0);
    }
}
