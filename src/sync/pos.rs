//! The position of sliding sync: where a client stands in a connection.
//!
//! It reads `{token of /sync}~{connection}.{step}.{counts}.{lists}.{data}.{subscriptions}.{sticky}`. The token says how far the log
//! is told, so that `/messages` takes a position as it takes a token. The connection and its step name what the client was told of
//! each room (`sync/connections.rs`). What follows says what the client was told beside rooms; positions from before there were
//! subscriptions and sticky events end before these.

use std::fmt;

use crate::{
    ids::{Order, Position},
    sync::SyncToken,
};

/// A longer string is not read at all, because no position of this server has more bytes.
const POS_BYTES_MAX: usize = 256;

/// Where a client stands in a connection of sliding sync. Clients treat it as an opaque string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pos {
    /// How far the log is told, and how far what is ephemeral.
    pub token: SyncToken,
    /// The random number of the connection.
    pub connection: u64,
    /// The step of the connection at which the client stands.
    pub step: u64,
    /// A hash of the names of lists and of how many rooms they have.
    pub counts: u32,
    /// Changes of device lists are told up to here. None if the client never asked for them.
    pub lists: Option<Position>,
    /// Account data that belongs to no room is told up to here. None if the client never asked for it.
    pub data: Option<Position>,
    /// Changes of subscriptions to threads are told up to here. None if the client never asked for them.
    pub subscriptions: Option<Position>,
    /// A client that has received all sticky events up to here by its own token has received those up to the position, too. None if
    /// some were left, or the client did not ask for them.
    pub sticky: Option<Position>,
}

impl Pos {
    /// Reads a position; none if this server cannot have given it.
    pub fn read(text: &str) -> Option<Self> {
        if text.len() > POS_BYTES_MAX {
            return None;
        }
        let (token, rest) = text.split_once('~')?;
        let token = SyncToken::parse(token).ok()?;
        let mut parts = rest.split('.');
        let mut number = |radix| digits(parts.next()?, radix);
        let (connection, step) = (number(16)?, number(16)?);
        let counts = u32::try_from(number(16)?).ok()?;
        let position = |part| match part {
            "" => Some(Some(token.position)),
            "-" => Some(None),
            text => Some(Some(Position::new(digits(text, 10)?)?)),
        };
        let (lists, data) = (position(parts.next()?)?, position(parts.next()?)?);
        let (subscriptions, sticky) = match parts.next() {
            None => (None, None),
            Some(part) => (position(part)?, position(parts.next()?)?),
        };
        let pos = Self { token, connection, step, counts, lists, data, subscriptions, sticky };
        parts.next().is_none().then_some(pos)
    }

    /// The order from which `/messages` goes on, if the text is a position of sliding sync.
    pub fn order(text: &str) -> Option<Order> {
        Self::read(text).map(|pos| pos.token.order())
    }
}

fn digits(text: &str, radix: u32) -> Option<u64> {
    let is_plain = !text.is_empty() && text.bytes().all(|byte| char::from(byte).is_digit(radix));
    is_plain.then(|| u64::from_str_radix(text, radix).ok()).flatten()
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { token, connection, step, counts, lists, data, subscriptions, sticky } = self;
        write!(f, "{token}~{connection:x}.{step:x}.{counts:x}")?;
        for position in [lists, data, subscriptions, sticky] {
            match position {
                Some(position) if *position == token.position => f.write_str(".")?,
                Some(position) => write!(f, ".{position}")?,
                None => f.write_str(".-")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token(position: u64) -> SyncToken {
        SyncToken {
            position: Position::new(position).unwrap(),
            boot: 7,
            ephemeral: 3,
            inbox: None,
            receipts: None,
            invites: None,
            sticky: None,
            device: Some(5),
        }
    }

    fn nothing_told() -> Pos {
        let (lists, data, subscriptions, sticky) = (None, None, None, None);
        Pos { token: token(0), connection: 0, step: 0, counts: 0, lists, data, subscriptions, sticky }
    }

    #[test]
    fn what_is_no_position_is_not_read() {
        let whole = Pos { token: token(9), connection: 1, step: 2, counts: 3, ..nothing_told() };
        let whole = whole.to_string();
        assert!(Pos::read(&whole).is_some());
        let before = Pos::read("s1_2_3~1.2.3.-.").map(|pos| (pos.data, pos.subscriptions, pos.sticky));
        assert_eq!(before, Some((Position::new(1), None, None)), "positions once ended here");
        for text in ["", "~", "s1_2_3", "s1_2_3~", "s1_2_3~1.2.3", "s1_2_3~1.2.3.-", "s1_2_3~1.2.3.-.-.-"] {
            assert!(Pos::read(text).is_none(), "{text}");
        }
        for text in ["s1_2_3~1.2.3.-.-.-.-.-", "s1_2_3~1.2.3.-.-.-.x", "s1_2_3~1.2.3.-.-.-.+1"] {
            assert!(Pos::read(text).is_none(), "{text}");
        }
        for text in ["s1_2_3~+1.2.3.-.-", "s1_2_3~1.2.100000000.-.-", "x~1.2.3.-.-", "s1_2_3~1.2.3.x.-"] {
            assert!(Pos::read(text).is_none(), "{text}");
        }
        assert!(Pos::read(&format!("{whole}{}", " ".repeat(300))).is_none());
    }

    proptest! {
        #[test]
        fn positions_come_back(
            position in 0_u64..1 << 53,
            connection: u64,
            step: u64,
            counts: u32,
            lists in prop::option::of(0_u64..1 << 53),
            data in prop::option::of(0_u64..1 << 53),
            subscriptions in prop::option::of(0_u64..1 << 53),
            sticky in prop::option::of(0_u64..1 << 53),
        ) {
            let at = |number: Option<u64>| number.and_then(Position::new);
            let (lists, data) = (at(lists), at(data));
            let (subscriptions, sticky) = (at(subscriptions), at(sticky));
            let token = token(position);
            let pos = Pos { token, connection, step, counts, lists, data, subscriptions, sticky };
            prop_assert_eq!(Pos::read(&pos.to_string()), Some(pos));
            prop_assert_eq!(Pos::order(&pos.to_string()), Some(pos.token.order()));
        }

        #[test]
        fn arbitrary_strings_never_panic(text: String) {
            let _ = Pos::read(&text);
        }
    }
}
