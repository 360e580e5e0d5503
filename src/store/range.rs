//! Ranges of keys, and the directions in which they are read.

use bytes::Bytes;

/// The direction in which a range is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It begins with the lowest key and goes up.
    Up,
    /// It begins with the highest key and goes down.
    Down,
}

impl Direction {
    /// The direction in which the same rows come the other way round.
    pub fn opposite(self) -> Self {
        match self {
            Self::Up => Self::Down,
            Self::Down => Self::Up,
        }
    }
}

/// Keys from the first, included, to the last, excluded.
pub(crate) type KeyRange = (Vec<u8>, Vec<u8>);

/// A row with its key.
pub(crate) type KeyValue = (Bytes, Bytes);

/// The first byte string above all that begin with `prefix`.
pub(crate) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    // The prefix has bytes 0xff only. No table has such an id, so nothing lies above.
    vec![0xff; prefix.len() + 1]
}
