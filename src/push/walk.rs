//! The walk through a user's rooms that finds what is to be told of them, for a push gateway that was away as for a mail.
//!
//! There may be many rooms and events, so that a walk goes on from plan to plan, each of which looks at a bounded number of them. Nothing
//! counts as looked at before it was.

use std::ops::Bound;

use crate::{
    ids::{Order, Position, RoomNum, UserNum},
    push::{
        looker::{Hint, Looker},
        reader::Place,
    },
    rooms::{self, event::StoredEvent, members},
    schema::{
        self,
        rooms::{Membership, RoomRow, UserRoomRow},
    },
    store::{Direction, Fault, Read},
};

/// Look at no more than this many events and rooms in one plan.
const LOOKED_AT_MAX: usize = 500;
/// Look at no more than this many events of a room for those that notify.
const LOOKED_AT_OF_ROOM_MAX: usize = 10_000;

/// The state of a walk between two plans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Walk {
    /// It looks for what came up to here. Whatever comes later is looked for by the next walk.
    upto: Position,
    /// The rooms up to this one are done.
    after: Option<RoomNum>,
    /// All rooms were looked at.
    is_whole: bool,
    /// The room within which the walk goes on.
    within: Option<Within>,
}

/// The place within a room at which a walk goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Within {
    room: RoomNum,
    /// The room is looked at from this position down.
    from: Position,
    /// The number of its events that were looked at.
    count: usize,
}

/// The one for whom a walk finds something.
pub(super) trait Finder {
    /// Whether a room that the user is in may hold anything, as far as that costs little to learn.
    fn may_hold<R: Read + ?Sized>(&self, looker: &Looker<'_, R>, place: Place<'_>) -> Result<bool, Fault>;

    /// Takes what is to be told of a room. The newest of it comes first. Answers whether the rest of the room is looked at, too.
    fn take(&mut self, at: (Position, RoomNum), hint: Hint) -> bool;
}

impl Walk {
    /// A walk for what came up to a position.
    pub(super) fn begin(upto: Position) -> Self {
        Self { upto, after: None, is_whole: false, within: None }
    }

    /// The position up to which it looks.
    pub(super) fn upto(&self) -> Position {
        self.upto
    }

    /// Whether everything was looked at.
    pub(super) fn is_done(&self) -> bool {
        self.is_whole && self.within.is_none()
    }

    /// Has a room be looked at again, below a position.
    pub(super) fn look_below(&mut self, (at, room): (Position, RoomNum)) {
        self.within = Some(Within { room, from: at.before(), count: 0 });
    }

    /// Goes on, for what came after a position. Answers whether everything was looked at; where it was not, the next plan goes on.
    pub(super) fn go_on<R: Read + ?Sized>(
        &mut self,
        looker: &Looker<'_, R>,
        user: UserNum,
        after: Position,
        finder: &mut impl Finder,
    ) -> Result<bool, Fault> {
        let mut looks = LOOKED_AT_MAX;
        if let Some(within) = self.within.take()
            && let Some(row) = rooms::find_row(looker.read, within.room)?
        {
            self.look_into(looker, &row, (after, within), (&mut looks, finder))?;
        }
        if self.within.is_none() && !self.is_whole {
            self.look(looker, user, after, (&mut looks, finder))?;
        }
        Ok(self.is_done())
    }

    fn look<R: Read + ?Sized>(
        &mut self,
        looker: &Looker<'_, R>,
        user: UserNum,
        after: Position,
        (looks, finder): (&mut usize, &mut impl Finder),
    ) -> Result<(), Fault> {
        for room in members::list_user_rooms(looker.read, user)? {
            let (room, own) = room?;
            if self.after.is_some_and(|done| room <= done) {
                continue;
            }
            if *looks == 0 || looker.reader.is_spent() {
                return Ok(());
            }
            *looks -= 1;
            self.after = Some(room);
            self.look_at(looker, (room, &own), after, (looks, finder))?;
            if self.within.is_some() {
                return Ok(());
            }
        }
        self.is_whole = true;
        Ok(())
    }

    fn look_at<R: Read + ?Sized>(
        &mut self,
        looker: &Looker<'_, R>,
        (room, own): (RoomNum, &UserRoomRow),
        after: Position,
        (looks, finder): (&mut usize, &mut impl Finder),
    ) -> Result<(), Fault> {
        let read = looker.read;
        let Some(row) = rooms::find_row(read, room)? else { return Ok(()) };
        match own.membership {
            Membership::Join if row.tip > Order::upto(after.max(looker.oldest)) => {
                if !finder.may_hold(looker, Place { num: room, row: &row, joined: own.since })? {
                    return Ok(());
                }
                let within = Within { room, from: self.upto, count: 0 };
                self.look_into(looker, &row, (after, within), (looks, finder))
            }
            Membership::Invite => {
                // One that was repeated is told by its newest event. One from outside the room has none here.
                let event = rooms::event::find(read, room, own.event)?;
                let at = event.map_or(own.since, |event| event.order.anchor);
                if at > after
                    && at <= self.upto
                    && let Some(told) = looker.find(room, at)?
                {
                    let (highlights, is_invitation) = (told.highlights, told.is_invitation());
                    finder.take((at, room), Hint { highlights, is_invitation, sent_ms: told.sent_ms });
                }
                Ok(())
            }
            Membership::Join | Membership::Knock | Membership::Leave | Membership::Ban => Ok(()),
        }
    }

    /// Looks for the events of a room that are to be told, from the newest on.
    fn look_into<R: Read + ?Sized>(
        &mut self,
        looker: &Looker<'_, R>,
        row: &RoomRow,
        (after, within): (Position, Within),
        (looks, finder): (&mut usize, &mut impl Finder),
    ) -> Result<(), Fault> {
        let Within { room, mut from, mut count } = within;
        let low = Order::upto(after.max(looker.oldest));
        // Events that filled a hole stand below the live event with the same anchor, and notify nobody.
        'below: loop {
            let (low, high) = (Bound::Excluded((room, low)), Bound::Included((room, Order::live(from))));
            let rows = schema::TIMELINE.range::<(RoomNum, Order)>(looker.read, low, high, Direction::Down)?;
            for event in rows {
                let ((_, order), event) = event?;
                if count >= LOOKED_AT_OF_ROOM_MAX {
                    tracing::debug!(%room, count, reason = "too many events notify of nothing", "the rest of a room is not told");
                    return Ok(());
                }
                if *looks == 0 || looker.reader.is_spent() {
                    self.within = Some(Within { room, from: order.anchor, count });
                    return Ok(());
                }
                (*looks, count) = (*looks - 1, count + 1);
                if order.minor != 0 {
                    from = order.anchor.before();
                    continue 'below;
                }
                if let Some(hint) = looker.hint(room, row, &StoredEvent { order, row: event })?
                    && !finder.take((order.anchor, room), hint)
                {
                    return Ok(());
                }
            }
            return Ok(());
        }
    }
}
