//! Pushers and the list of notifications ask of an event whether it notifies the user *now*. That it did when it came says
//! nothing any more once it was read or redacted, or the user has left, ignores its sender or has other rules.

use std::sync::Arc;

use super::{Explained, Judge, Place, READING_STEPS, Reader};
use crate::{
    accounts::{
        ignored::Ignored,
        invites::{Permissions, Verdict},
    },
    ids::{Order, Position, RoomNum},
    json::JsonText,
    push::{condition::Owner, floors::Floors, scene::Scene},
    rooms::{self, change::outside, event::StoredEvent, members, relations, visibility::Sight},
    schema::{
        self,
        push::{Lane, Outcomes},
        remote::OutsideRow,
        rooms::{Membership, RoomRow, UserRoomRow},
    },
    store::{Fault, Read},
};

/// Count the unread messages of at most this many rooms of a user; those of further ones are left out, because each takes some reads.
const BADGE_ROOMS_MAX: usize = 10_000;

/// An event that notifies a user as things stand.
#[derive(Clone, Debug)]
pub struct Notifies {
    /// The rule by which it does.
    pub rule: Explained,
    /// Whether the user has read it.
    pub is_read: bool,
}

/// An invitation of a user of ours from outside the room.
#[derive(Clone, Debug)]
pub struct Invitation {
    /// The row that tells of it.
    pub told: OutsideRow,
    /// The member event, as clients see it.
    pub event: JsonText,
}

impl Reader<'_> {
    /// Whether the steps of this look are used up, so that nothing is judged any more.
    pub fn is_spent(&self) -> bool {
        self.steps.borrow().left() == 0
    }

    /// Whether an event may notify the user, as far as is known without judging the event: the pushers of those are not woken whom the
    /// running numbers show to be told of nothing. `classes` are the event's outcomes for classes of rules.
    pub fn may_notify(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        (stored, lane, classes): (&StoredEvent, Lane, Outcomes),
    ) -> Result<bool, Fault> {
        match self.judge_of(read, place)? {
            Judge::Own(_) => Ok(true),
            Judge::Class(lanes) if lanes.are_muted() => Ok(false),
            Judge::Class(mut lanes) => {
                let own = schema::UNREAD_OWN.get(read, (place.num, self.user, stored.order))?;
                if let Some(own) = own {
                    return Ok(own.own.notify);
                }
                let class = lanes.class(read, (self.user, place.num), lane)?;
                Ok(class.outcome(classes).notify)
            }
        }
    }

    /// Whether no event of a room notifies the user, whatever it says.
    pub fn is_silent(&self, read: &(impl Read + ?Sized), place: Place<'_>) -> Result<bool, Fault> {
        Ok(match self.judge_of(read, place)? {
            Judge::Class(lanes) => lanes.are_muted(),
            Judge::Own(_) => false,
        })
    }

    /// Whether a live event of a room notifies the user as things stand now. An event from before the user joined does not, and of those
    /// that came before one does only the invitation itself.
    pub fn look_again(
        &self,
        read: &(impl Read + ?Sized),
        (room, row): (RoomNum, &RoomRow),
        stored: &StoredEvent,
    ) -> Result<Option<Notifies>, Fault> {
        let header = &stored.row.header;
        if header.unseen || header.expired || header.rejected || stored.order.minor != 0 {
            return Ok(None);
        }
        let Some(own) = members::find(read, self.user, room)? else { return Ok(None) };
        let concerns = match own.membership {
            Membership::Join => stored.order > Order::live(own.since),
            Membership::Invite => {
                own.event == stored.event() && self.wants_invitation_of(read, &stored.row.sender())?
            }
            Membership::Knock | Membership::Leave | Membership::Ban => false,
        };
        if !concerns {
            return Ok(None);
        }
        // The event is read in full, which costs as much as it has bytes; an event that cannot be paid for ends the look.
        self.steps.borrow_mut().take(READING_STEPS.max(stored.row.json.len())).unwrap_or(());
        let place = Place { num: room, row, joined: own.since };
        let Some(rule) = self.explain(read, place, stored)?.filter(|rule| rule.outcome.notify) else {
            return Ok(None);
        };
        let is_invite = own.membership == Membership::Invite;
        if !is_invite && !Sight::of(read, room, self.user, self.user_id)?.can_see(read, stored)? {
            return Ok(None);
        }
        let is_read = !is_invite && self.is_read(read, &mut self.floors(read, place)?, stored)?;
        Ok(Some(Notifies { rule, is_read }))
    }

    /// Whether the user has read an event of a room that they are in.
    fn is_read(
        &self,
        read: &(impl Read + ?Sized),
        floors: &mut Floors<'_>,
        stored: &StoredEvent,
    ) -> Result<bool, Fault> {
        if stored.order <= floors.base() {
            return Ok(true);
        }
        let lane = relations::lane_of(read, floors.room(), stored)?;
        let lane = floors.shown(read, lane)?;
        Ok(stored.order <= floors.of_lane(read, lane)?)
    }

    /// Finds the invitation from outside that a user got at this position, if it still stands and is shown to them, with the rule by which
    /// it notifies them.
    pub fn look_outside(
        &self,
        read: &(impl Read + ?Sized),
        (room, row): (RoomNum, &RoomRow),
        at: Position,
    ) -> Result<Option<(Invitation, Explained)>, Fault> {
        let Some(own) = members::find(read, self.user, room)? else { return Ok(None) };
        if own.membership != Membership::Invite || own.since != at {
            return Ok(None);
        }
        let Some(told) = outside::find(read, room, self.user, &own)? else { return Ok(None) };
        if !self.wants_invitation_of(read, &told.shown.sender)? {
            return Ok(None);
        }
        let Some(event) = outside::shown(&told, row.version) else { return Ok(None) };
        let Some(scene) = Scene::of_outside(read, room, row, &event) else { return Ok(None) };
        let rule = self.find_rule(row, (&scene, Lane::MAIN), &Owner::new(self.user_id))?;
        let rule = rule.filter(|rule| rule.outcome.notify);
        Ok(rule.map(|rule| (Invitation { told, event }, rule)))
    }

    fn wants_invitation_of(&self, read: &(impl Read + ?Sized), sender: &str) -> Result<bool, Fault> {
        let ignored = Arc::new(Ignored::of(read, self.user, self.user_id)?);
        Ok(Permissions::of(read, self.user, ignored)?.judge(sender) == Verdict::Allow)
    }

    /// The number of messages that the user has not read, over all rooms that they are in, and of invitations that they have not answered.
    pub fn badge(&self, read: &(impl Read + ?Sized)) -> Result<u64, Fault> {
        let mut badge = 0;
        for row in members::list_user_rooms(read, self.user)?.take(BADGE_ROOMS_MAX) {
            let (room, own) = row?;
            badge += match own.membership {
                Membership::Join => self.count_unread(read, room, &own)?,
                Membership::Invite => u64::from(self.is_invited(read, room, &own)?),
                Membership::Knock | Membership::Leave | Membership::Ban => 0,
            };
        }
        Ok(badge)
    }

    fn count_unread(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        own: &UserRoomRow,
    ) -> Result<u64, Fault> {
        let Some(row) = rooms::find_row(read, room)? else { return Ok(0) };
        let place = Place { num: room, row: &row, joined: own.since };
        let mut floors = self.floors(read, place)?;
        if floors.base() >= row.tip {
            return Ok(0);
        }
        Ok(self.tally_above(read, place, &mut floors, Order::upto(read.upto()))?.total().notifications)
    }

    /// Whether an invitation of the user is shown to them.
    fn is_invited(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        own: &UserRoomRow,
    ) -> Result<bool, Fault> {
        let sender = match outside::find(read, room, self.user, own)? {
            Some(told) => Some(told.shown.sender),
            None => {
                let event = rooms::event::find_kept(read, room, own.event)?;
                event.map(|event| event.row.sender().into_owned())
            }
        };
        sender.map_or(Ok(false), |sender| self.wants_invitation_of(read, &sender))
    }
}
