//! Rows that a staged step writes beside those of the room's state: users' memberships, and counts. Each holds the row as
//! it was before the step, too, and that one counts while the step is not finished (`rooms/state/stage.rs`).

use bytes::Bytes;

use crate::{
    ids::Position,
    schema::encoding::{decode_bytes, encode_bytes},
    store::{
        Fault,
        key::{Decoder, Encoder, Key, Value},
    },
};

/// The first byte of a row that a staged step wrote. The layouts of plain rows are small numbers.
const STAGED: u8 = 0xf0;

/// A row, or what a staged step made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked<V> {
    /// The row as it is now; none where a staged step took it away.
    pub now: Option<V>,
    /// The step that wrote it, if it was a staged one. The mark stays until the row is written again.
    pub staged: Option<Staged<V>>,
}

/// The mark of a staged step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staged<V> {
    /// The position that is reserved for the step.
    pub anchor: Position,
    /// The row before the step.
    pub before: Option<V>,
}

impl<V> From<V> for Marked<V> {
    fn from(now: V) -> Self {
        Self { now: Some(now), staged: None }
    }
}

impl<V: Value> Value for Marked<V> {
    fn encode(&self, to: &mut Encoder) {
        match (&self.now, &self.staged) {
            (Some(now), None) => now.encode(to),
            (now, staged) => {
                debug_assert!(staged.is_some(), "only a staged step takes a row away and leaves a mark");
                let Some(staged) = staged else { return };
                to.raw(&[STAGED]);
                to.position(staged.anchor);
                encode_bytes(&encoded(now.as_ref()), to);
                to.raw(&encoded(staged.before.as_ref()));
            }
        }
    }

    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        if bytes.first() != Some(&STAGED) {
            return V::decode(bytes).map(Self::from);
        }
        let mut from = Decoder(bytes.get(1..).unwrap_or_default());
        let anchor = Key::decode_key(&mut from)?;
        let (now, before) = (decode_bytes(&mut from)?, from.rest());
        let decoded = |part: &[u8]| match part {
            [] => Ok(None),
            part => V::decode(Bytes::copy_from_slice(part)).map(Some),
        };
        Ok(Self { now: decoded(now)?, staged: Some(Staged { anchor, before: decoded(before)? }) })
    }
}

/// Encodes a part of a marked row. Parts of staged steps are written at positions that are known already, so that none is
/// pending in it.
fn encoded<V: Value>(row: Option<&V>) -> Vec<u8> {
    let mut to = Encoder::default();
    if let Some(row) = row {
        row.encode(&mut to);
    }
    debug_assert!(to.pending.is_empty(), "a row of a staged step names settled positions only");
    to.bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{EventNum, Order},
        schema::{
            rooms::{Membership, UserRoomRow},
            round_trip,
        },
    };

    fn row() -> impl Strategy<Value = UserRoomRow> {
        let order = |order: Option<u32>| order.map(|order| Order::live(Position::new(order.into()).unwrap()));
        let orders = (any::<Option<u32>>(), any::<Option<u32>>());
        (0..2_u8, any::<bool>(), any::<u32>(), any::<u32>(), orders).prop_map(
            move |(membership, forgotten, since, event, (left, below))| UserRoomRow {
                membership: if membership == 0 { Membership::Join } else { Membership::Ban },
                since: Position::new(since.into()).unwrap(),
                event: EventNum(event.into()),
                forgotten,
                left: order(left),
                forgotten_below: order(below),
            },
        )
    }

    proptest! {
        #[test]
        fn marked_rows_come_back(now in prop::option::of(row()), before in prop::option::of(row()), at: u32) {
            let anchor = Position::new(at.into()).unwrap();
            let marked = Marked { now, staged: Some(Staged { anchor, before }) };
            prop_assert_eq!(round_trip(&marked), marked);
            if let Some(now) = now {
                prop_assert_eq!(round_trip(&Marked::from(now)), Marked::from(now));
            }
            let count = Marked { now: Some(3_u64), staged: Some(Staged { anchor, before: None }) };
            prop_assert_eq!(round_trip(&count), count);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Marked::<UserRoomRow>::decode(Bytes::from(bytes.clone()));
            let staged = [&[STAGED][..], &bytes].concat();
            let _ = Marked::<UserRoomRow>::decode(Bytes::from(staged.clone()));
            let _ = Marked::<u64>::decode(Bytes::from(staged));
        }
    }

    #[test]
    fn a_plain_row_has_the_bytes_that_it_always_had() {
        let mut plain = Encoder::default();
        Marked::from(Membership::Join).encode(&mut plain);
        assert_eq!(plain.bytes, [1, Membership::Join as u8]);
    }
}
