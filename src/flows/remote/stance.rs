//! Whether a user who asked for a join still wants in when a server answers, which may be minutes later.

use ruma::{OwnedRoomId, RoomId};

use crate::{
    error::Result,
    flows::remote::attempts::left_meanwhile,
    ids::{EventNum, UserNum},
    rooms::{self, members, policy},
    schema::rooms::Membership,
    store::Read,
};

/// The relation that a user had to a room when they asked to join it.
#[derive(Clone, Debug)]
pub(super) struct Stance {
    user: UserNum,
    room: OwnedRoomId,
    /// The event by which they were that; `None` where they were nothing to it.
    by: Option<EventNum>,
}

impl Stance {
    /// Finds what the user is to the room now.
    pub(super) fn find(read: &(impl Read + ?Sized), user: UserNum, room: &RoomId) -> Result<Self> {
        let by = find_membership(read, user, room)?.map(|(_, event)| event);
        Ok(Self { user, room: room.to_owned(), by })
    }

    /// Refuses where the user has left since, was removed or banned, or where their account has ended: another server that answers
    /// late must not bring them back. Whoever invites them meanwhile changes nothing. Errors: 403 `M_FORBIDDEN`.
    pub(super) fn require_same(&self, read: &(impl Read + ?Sized)) -> Result<()> {
        policy::require_live(read, self.user)?;
        match find_membership(read, self.user, &self.room)? {
            Some((Membership::Leave | Membership::Ban, event)) if Some(event) != self.by => {
                Err(left_meanwhile().into())
            }
            Some((
                Membership::Leave
                | Membership::Ban
                | Membership::Join
                | Membership::Invite
                | Membership::Knock,
                _,
            ))
            | None => Ok(()),
        }
    }
}

fn find_membership(
    read: &(impl Read + ?Sized),
    user: UserNum,
    room: &RoomId,
) -> Result<Option<(Membership, EventNum)>> {
    let Some(num) = rooms::find_room(read, room)? else { return Ok(None) };
    Ok(members::find(read, user, num)?.map(|row| (row.membership, row.event)))
}
