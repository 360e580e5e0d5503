//! Gathers what a digest may tell: the rooms of a user that have news, and which of their events are shown.

use crate::{
    ids::{Position, RoomNum, UserNum},
    push::{
        looker::{Hint, Looker},
        reader::Place,
        walk::{Finder, Walk},
    },
    store::{Fault, Read},
};

/// A mail tells at most this many events of a room, the newest ones; of others it says how many there are.
pub(super) const EVENTS_TOLD_MAX: usize = 10;
/// Keep at most this many rooms, of which a mail tells a few; of others it is known how many there are.
const ROOMS_KEPT_MAX: usize = 1_000;
/// A clock of another server that is faster than ours by more milliseconds than this is not trusted.
const FAST_MS: u64 = 60_000;

/// The state of the search for a digest between two plans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    walk: Walk,
    pub(super) gathered: Gathered,
}

/// The news that were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gathered {
    now_ms: u64,
    only_highlights: bool,
    /// The rooms with news.
    pub(super) rooms: Vec<Found>,
    /// The number of further rooms with news.
    pub(super) further_rooms: usize,
}

/// The news that one room has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) room: RoomNum,
    /// The positions of the events that are shown, the newest first.
    pub(super) shown: Vec<Position>,
    /// The number of further events.
    pub(super) further_events: usize,
    /// Whether one of them all highlights.
    pub(super) highlights: bool,
    /// Whether it is an invitation.
    pub(super) is_invitation: bool,
    /// The oldest of its events came at this time, as far as that is known, in milliseconds since the epoch.
    pub(super) since_ms: u64,
    /// The position of the newest of its events.
    pub(super) newest: Position,
}

impl Found {
    /// Those that are told first come first: with highlights, then the newest.
    pub(super) fn rank(&self) -> (bool, std::cmp::Reverse<Position>) {
        (!self.highlights, std::cmp::Reverse(self.newest))
    }
}

impl Search {
    /// A search for what came up to a position.
    pub(crate) fn begin(upto: Position, now_ms: u64, only_highlights: bool) -> Self {
        let gathered = Gathered { now_ms, only_highlights, rooms: Vec::new(), further_rooms: 0 };
        Self { walk: Walk::begin(upto), gathered }
    }

    /// The position up to which it looks.
    pub(super) fn upto(&self) -> Position {
        self.walk.upto()
    }

    /// Whether everything was looked at.
    pub(super) fn is_done(&self) -> bool {
        self.walk.is_done()
    }

    /// Goes on, for what came after a position. Answers whether everything was looked at.
    pub(super) fn go_on<R: Read + ?Sized>(
        &mut self,
        looker: &Looker<'_, R>,
        user: UserNum,
        after: Position,
    ) -> Result<bool, Fault> {
        self.walk.go_on(looker, user, after, &mut self.gathered)
    }
}

impl Finder for Gathered {
    fn may_hold<R: Read + ?Sized>(&self, looker: &Looker<'_, R>, place: Place<'_>) -> Result<bool, Fault> {
        let read = looker.read;
        Ok(looker.reader.tally(read, place, read.upto())?.total().notifications > 0)
    }

    fn take(&mut self, (at, room): (Position, RoomNum), hint: Hint) -> bool {
        let Hint { highlights, is_invitation, sent_ms } = hint;
        if self.only_highlights && !highlights && !is_invitation {
            return true;
        }
        // Another server may say that it was sent in the future: it waits for nothing then, unless a clock is only a little fast.
        let since_ms = if sent_ms > self.now_ms.saturating_add(FAST_MS) { 0 } else { sent_ms };
        if self.rooms.last().is_none_or(|last| last.room != room) {
            self.make_room();
            self.rooms.push(Found {
                room,
                shown: Vec::new(),
                further_events: 0,
                highlights: false,
                is_invitation,
                since_ms,
                newest: at,
            });
        }
        if let Some(found) = self.rooms.last_mut() {
            found.since_ms = found.since_ms.min(since_ms);
            found.highlights |= highlights;
            if found.shown.len() < EVENTS_TOLD_MAX {
                found.shown.push(at);
            } else {
                found.further_events += 1;
            }
        }
        true
    }
}

impl Gathered {
    /// Lets go of the room that would be told last, where there are too many.
    fn make_room(&mut self) {
        if self.rooms.len() < ROOMS_KEPT_MAX {
            return;
        }
        let last = self.rooms.iter().enumerate().max_by_key(|(_, found)| found.rank()).map(|(at, _)| at);
        if let Some(last) = last {
            self.rooms.swap_remove(last);
            self.further_rooms += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_beyond_the_bound_are_counted_and_those_that_are_told_first_stay() {
        let position = |number: usize| Position::new(u64::try_from(number).unwrap()).unwrap();
        let Search { mut gathered, .. } = Search::begin(position(1), 0, false);
        for number in 0..ROOMS_KEPT_MAX + 5 {
            gathered.make_room();
            gathered.rooms.push(Found {
                room: RoomNum(u64::try_from(number).unwrap()),
                shown: Vec::new(),
                further_events: 0,
                highlights: number == 0,
                is_invitation: false,
                since_ms: 0,
                newest: position(number + 1),
            });
        }
        assert_eq!((gathered.rooms.len(), gathered.further_rooms), (ROOMS_KEPT_MAX, 5));
        let kept = |number: u64| gathered.rooms.iter().any(|found| found.room == RoomNum(number));
        assert!(kept(0) && !kept(1) && !kept(5) && kept(6) && kept(1_004));
    }
}
