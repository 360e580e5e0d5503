//! Rows laid over other rows: what is accepted but not published, and what a batch is about to write.

use std::{cmp::Ordering, iter::Peekable};

use bytes::Bytes;

use crate::store::{Fault, engine::Rows, range::Direction};

/// Changed rows with their keys; `None` stands for a deleted one.
pub(crate) type OverRows<'a> = Box<dyn Iterator<Item = (Bytes, Option<Bytes>)> + 'a>;

/// Rows of `base` with the changes of `over` applied; both come in `direction`.
pub(crate) fn merge<'a>(
    base: Rows<'a>,
    over: impl Iterator<Item = (Bytes, Option<Bytes>)> + 'a,
    direction: Direction,
) -> Rows<'a> {
    Box::new(Merge { base: base.peekable(), over: over.peekable(), direction })
}

struct Merge<'a, O: Iterator<Item = (Bytes, Option<Bytes>)>> {
    base: Peekable<Rows<'a>>,
    over: Peekable<O>,
    direction: Direction,
}

impl<O: Iterator<Item = (Bytes, Option<Bytes>)>> Iterator for Merge<'_, O> {
    type Item = Result<(Bytes, Bytes), Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((over_key, _)) = self.over.peek() else { return self.base.next() };
            let order = match self.base.peek() {
                None => Ordering::Greater,
                Some(Err(_)) => return self.base.next(),
                Some(Ok((base_key, _))) if self.direction == Direction::Up => base_key.cmp(over_key),
                Some(Ok((base_key, _))) => over_key.cmp(base_key),
            };
            match order {
                Ordering::Less => return self.base.next(),
                Ordering::Equal => drop(self.base.next()),
                Ordering::Greater => {}
            }
            if let Some((key, Some(value))) = self.over.next() {
                return Some(Ok((key, value)));
            }
        }
    }
}
