//! The row of a timer: the example of how a row gets another layout.

use bytes::Bytes;

use crate::store::{
    Fault,
    key::{Decoder, Encoder, Value, layout_upto},
};

/// The row of a timer, beyond its key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TimerRow {
    /// How often carrying it out has failed.
    pub tries: u32,
    /// Everything the worker needs to know beyond the key.
    pub content: Bytes,
}

impl Value for TimerRow {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[2]);
        to.varint(self.tries.into());
        to.raw(&self.content);
    }

    /// Layout 2 is written, layout 1 is read: this is the example of how a row gets another layout. The old row is a type of
    /// its own in a module of its own, and reading it is a migration from one type to the other.
    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        if layout_upto(&mut from, 2)? == 1 {
            return layout_1::TimerRow::decode(from).map(Self::from);
        }
        let tries = u32::try_from(from.varint()?).unwrap_or(u32::MAX);
        Ok(Self { tries, content: Bytes::copy_from_slice(from.rest()) })
    }
}

/// The layout before failures were counted.
mod layout_1 {
    use bytes::Bytes;

    use crate::store::{Fault, key::Decoder};

    pub(super) struct TimerRow {
        content: Bytes,
    }

    impl TimerRow {
        pub(super) fn decode(mut from: Decoder<'_>) -> Result<Self, Fault> {
            Ok(Self { content: Bytes::copy_from_slice(from.rest()) })
        }
    }

    impl From<TimerRow> for super::TimerRow {
        fn from(old: TimerRow) -> Self {
            Self { tries: 0, content: old.content }
        }
    }
}
