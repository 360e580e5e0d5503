//! The timeline of a room: its events by order, read page by page.

use std::{fmt, ops::Bound};

use crate::{
    error::Refusal,
    ids::{Order, Position, RoomNum},
    rooms::event::StoredEvent,
    schema,
    store::{Direction, Fault, Read},
};

/// A place between two events of a room, as `/messages` and `/sync` give it to clients: events at or below it are
/// older, events above it newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageToken(pub Order);

impl PageToken {
    /// Gives the place just below this event.
    pub fn below(order: Order) -> Self {
        Self(order.before())
    }

    /// Gives the place just above this event.
    pub fn above(order: Order) -> Self {
        Self(order)
    }

    /// Reads a token from a client. Refuses one that this server did not make: 400 `M_INVALID_PARAM`.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let read = || {
            let text = text.strip_prefix('t')?;
            let (anchor, minor) = match text.split_once('_') {
                Some((anchor, minor)) => (anchor, minor.parse().ok()?),
                None => (text, 0),
            };
            let digits = !anchor.is_empty() && anchor.bytes().all(|byte| byte.is_ascii_digit());
            let anchor = digits.then(|| anchor.parse().ok()).flatten().and_then(Position::new)?;
            Some(Self(Order { anchor, minor }))
        };
        read().ok_or_else(|| {
            Refusal::invalid_param(
                "The token was not made by this server; use one from `/sync` or `/messages`.",
            )
        })
    }
}

impl fmt::Display for PageToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Order { anchor, minor } = self.0;
        if minor == 0 { write!(f, "t{anchor}") } else { write!(f, "t{anchor}_{minor}") }
    }
}

/// Reads the events from a place on, up or down, as far as `read` has them, and at most to `until` (the events on its
/// near side). Events that clients do not see are left out.
pub fn page<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    from: PageToken,
    until: Option<PageToken>,
    direction: Direction,
) -> Result<impl Iterator<Item = Result<StoredEvent, Fault>> + 'r, Fault> {
    let end = Order::upto(read.upto());
    let (low, high) = match direction {
        Direction::Up => (Some(from.0), until.map_or(end, |until| until.0.min(end))),
        Direction::Down => (until.map(|until| until.0), from.0.min(end)),
    };
    let low = low.map_or(Bound::Included((room, Order::MIN)), |low| Bound::Excluded((room, low)));
    let rows =
        schema::TIMELINE.range::<(RoomNum, Order)>(read, low, Bound::Included((room, high)), direction)?;
    Ok(rows
        .map(|row| row.map(|((_, order), row)| StoredEvent { order, row }))
        .filter(|stored| stored.as_ref().map_or(true, |stored| !stored.row.header.unseen)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_and_what_is_none_is_refused() {
        for (anchor, minor) in [(0, 0), (7, 0), (7, -3), (7, i32::MIN), ((1 << 53) - 1, i32::MAX)] {
            let token = PageToken(Order { anchor: Position::new(anchor).unwrap(), minor });
            assert_eq!(PageToken::parse(&token.to_string()).unwrap(), token);
        }
        for text in
            ["", "t", "7", "t+7", "t7_", "t7_x", "t9007199254740992", "t-1", "t1_99999999999", "s7_0_0"]
        {
            assert!(PageToken::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn below_an_event_is_not_above_the_one_before_it() {
        let order = Order::live(Position::new(5).unwrap());
        assert!(PageToken::below(order).0 < order);
        assert_eq!(PageToken::below(order).0.next(), order);
    }
}
