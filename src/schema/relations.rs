//! Rows of events that refer to others.

use bytes::Bytes;
use ruma::OwnedUserId;

use crate::{
    ids::{EventNum, Order},
    schema::encoding::{decode_string, encode_bytes},
    schema::event_types::{ANNOTATION, REFERENCE, REPLACE, THREAD},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value, expect_layout},
    },
};

/// The kind of a relation between events, as it stands in keys: relations of one kind stand together, because they are read
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum RelationKind {
    /// A type of relation that the server does nothing with.
    Other = 0,
    /// A reaction to an event: `m.annotation`.
    Annotation = 1,
    /// An event that speaks of another: `m.reference`.
    Reference = 2,
    /// An edit of an event: `m.replace`.
    Replace = 3,
    /// An answer in a thread: `m.thread`.
    Thread = 4,
}

impl RelationKind {
    /// Each kind of relation once.
    pub const ALL: [Self; 5] = [Self::Other, Self::Annotation, Self::Reference, Self::Replace, Self::Thread];

    /// The kind of a `rel_type`.
    pub fn of(rel_type: &str) -> Self {
        match rel_type {
            ANNOTATION => Self::Annotation,
            REFERENCE => Self::Reference,
            REPLACE => Self::Replace,
            THREAD => Self::Thread,
            _ => Self::Other,
        }
    }
}

impl Key for RelationKind {
    type Ref<'a> = Self;
    fn encode_key(key: Self, to: &mut Encoder) {
        to.raw(&[key as u8]);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        let byte = from.byte()?;
        let kind = Self::ALL.into_iter().find(|kind| *kind as u8 == byte);
        kind.ok_or(Fault::Corrupt("a relation is of an unknown kind"))
    }
}

/// `relation`: an event that refers to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelationRow {
    /// The event that refers.
    pub event: EventNum,
    /// The `rel_type` of the relation: `m.replace`, `m.thread`, or any other.
    pub rel_type: String,
    /// The type of the event that refers.
    pub event_type: String,
    /// The id of the user who sent it.
    pub sender: OwnedUserId,
}

impl Value for RelationRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.event.0);
        for text in [&*self.rel_type, &*self.event_type, self.sender.as_str()] {
            encode_bytes(text.as_bytes(), to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self {
            event: EventNum(from.varint()?),
            rel_type: decode_string(&mut from)?,
            event_type: decode_string(&mut from)?,
            sender: OwnedUserId::try_from(decode_string(&mut from)?)
                .map_err(|_| Fault::Corrupt("the id of a sender is not valid"))?,
        })
    }
}

/// `related`: what is bundled with an event, kept up to date, so that showing an event with 100,000 reactions costs no
/// more than one with none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelatedRow {
    /// The number of its newest edit.
    pub edit: Option<EventNum>,
    /// How many events its thread has.
    pub thread_count: u64,
    /// The newest event of its thread, with its order.
    pub thread_tip: Option<(Order, EventNum)>,
    /// How many events refer to it by `m.reference`.
    pub reference_count: u64,
}

impl Value for RelatedRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.varint(self.edit.map_or(0, |event| event.0 + 1));
        to.varint(self.reference_count);
        to.varint(self.thread_count);
        if let Some((order, event)) = self.thread_tip {
            to.varint(event.0);
            Order::encode_key(order, to);
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        let edit = from.varint()?.checked_sub(1).map(EventNum);
        let (reference_count, thread_count) = (from.varint()?, from.varint()?);
        let thread_tip = match from.0.is_empty() {
            true => None,
            false => {
                let event = EventNum(from.varint()?);
                Some((Key::decode_key(&mut from)?, event))
            }
        };
        Ok(Self { edit, thread_count, thread_tip, reference_count })
    }
}

/// The place of an event in a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InThread {
    /// The event from which the thread grows.
    pub root: EventNum,
    /// How many relations lead from the event to the root: 1 if the event itself says that it stands in the thread.
    pub hops: u8,
}

impl Value for InThread {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1, self.hops]);
        to.varint(self.root.0);
    }
    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Ok(Self { hops: from.byte()?, root: EventNum(from.varint()?) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::Position;
    use crate::schema::round_trip;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let bytes = Bytes::from(bytes);
            let _ = RelationRow::decode(bytes.clone());
            let _ = RelatedRow::decode(bytes);
        }

        #[test]
        fn a_summary_comes_back(edit: Option<u32>, threads: u32, tip: Option<u32>, references: u32) {
            let order = |number: u32| Order::live(Position::new(number.into()).unwrap());
            let row = RelatedRow {
                edit: edit.map(|event| EventNum(event.into())),
                thread_count: threads.into(),
                thread_tip: tip.map(|tip| (order(tip), EventNum(tip.into()))),
                reference_count: references.into(),
            };
            prop_assert_eq!(round_trip(&row), row);
        }
    }

    #[test]
    fn a_relation_comes_back() {
        let row = RelationRow {
            event: EventNum(7),
            rel_type: "m.thread".into(),
            event_type: "m.room.message".into(),
            sender: "@a:b".try_into().unwrap(),
        };
        assert_eq!(round_trip(&row), row);
    }
}
