//! The search of a pusher that is behind, as after an outage of its gateway: the newest event of each of its user's rooms that is to be
//! told, the oldest of these first.

use std::collections::BTreeSet;

use crate::{
    ids::{Position, RoomNum, UserNum},
    push::{
        looker::{Hint, Looker},
        reader::Place,
        walk::{Finder, Walk},
    },
    store::{Fault, Read},
};

/// At most this many events are found before they are told. If there are more, the search begins again after these.
const FOUND_MAX: usize = 200;

/// The state of a search between two plans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatchUp {
    walk: Walk,
    oldest: Oldest,
}

/// The events that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Oldest {
    /// The oldest events that were found and not dealt with.
    found: BTreeSet<(Position, RoomNum)>,
    /// More were found than these.
    is_cut: bool,
}

impl Finder for Oldest {
    fn may_hold<R: Read + ?Sized>(&self, looker: &Looker<'_, R>, place: Place<'_>) -> Result<bool, Fault> {
        Ok(!looker.reader.is_silent(looker.read, place)?)
    }

    fn take(&mut self, at: (Position, RoomNum), _: Hint) -> bool {
        self.found.insert(at);
        if self.found.len() > FOUND_MAX {
            self.found.pop_last();
            self.is_cut = true;
        }
        false
    }
}

/// The outcome of going on with a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is more to look at, in the next plan.
    More,
    /// The event of a room at this position may be told next.
    Found(Position, RoomNum),
    /// Nothing up to this position is left.
    Nothing(Position),
}

impl CatchUp {
    /// A search for what came up to a position.
    pub(super) fn begin(upto: Position) -> Self {
        Self { walk: Walk::begin(upto), oldest: Oldest::default() }
    }

    /// Goes on, for what came after a position. An event that is found is taken out, and counts as dealt with.
    pub(super) fn step<R: Read + ?Sized>(
        &mut self,
        looker: &Looker<'_, R>,
        user: UserNum,
        after: Position,
    ) -> Result<Step, Fault> {
        if !self.walk.go_on(looker, user, after, &mut self.oldest)? {
            return Ok(Step::More);
        }
        Ok(match self.oldest.found.pop_first() {
            Some((at, room)) => Step::Found(at, room),
            None if self.oldest.is_cut => {
                *self = Self::begin(looker.read.upto());
                Step::More
            }
            None => Step::Nothing(self.walk.upto()),
        })
    }

    /// Puts an event back that was found and not looked at.
    pub(super) fn put_back(&mut self, at: (Position, RoomNum)) {
        self.oldest.found.insert(at);
    }

    /// An event that was found is not to be told any more: what stands below it in its room may be.
    pub(super) fn look_below(&mut self, at: (Position, RoomNum)) {
        self.walk.look_below(at);
    }
}
