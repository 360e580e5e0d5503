//! The invitations and knocks of an answer. Anybody can invite a user, also from other servers, so that an answer has a bounded
//! number of them and of their bytes: they are told in the order in which they came, and those that are left are told in the next
//! answer, for which the token says how far the client was told.

use std::collections::BTreeSet;

use super::{add_end_of_stay, add_room, came_at, place};
use crate::{
    ids::{Position, RoomNum},
    rooms::{members, visibility::Reader},
    schema::rooms::{Membership, RoomRow, UserRoomRow},
    store::Fault,
    sync::{
        shape::v3::Answer,
        shares::Shares,
        streams::account_data::Data,
        window::{RoomWindow, Window},
    },
};

/// An answer tells at most this many invitations and knocks.
const INVITATIONS_MAX: usize = 100;
/// An answer tells no further invitation once those that it tells have this many bytes, because it is held in memory.
const INVITATIONS_BYTES_MAX: usize = 1 << 20;

/// A room to which the user is invited, or at which they knock.
pub(super) struct Invitation {
    /// The position at which it came.
    pub(super) came: Position,
    pub(super) num: RoomNum,
    pub(super) row: RoomRow,
    pub(super) user_row: UserRoomRow,
    pub(super) data: Data,
}

/// Whether a user with this row stands outside the room and before its door.
pub(super) fn is_one(user_row: &UserRoomRow) -> bool {
    matches!(user_row.membership, Membership::Invite | Membership::Knock)
}

/// Adds the rooms of invitations and knocks that earlier answers have left.
pub(super) fn add_left(window: &Window<'_>, rooms: &mut Vec<(RoomNum, UserRoomRow)>) -> Result<(), Fault> {
    let told_upto = window.invites_from();
    if told_upto >= window.from {
        return Ok(());
    }
    let known: BTreeSet<RoomNum> = rooms.iter().map(|(room, _)| *room).collect();
    for row in members::list_user_rooms(window.read, window.ask.caller.user)? {
        let (room, row) = row?;
        if !is_one(&row) || row.forgotten || known.contains(&room) {
            continue;
        }
        let is_left = came_at(window, room, &row)?.is_some_and(|came| came.anchor > told_upto);
        if is_left {
            rooms.push((room, row));
        }
    }
    Ok(())
}

/// Adds as many invitations as an answer may have. Says whether it told anything, and up to which position they are told if
/// some are left.
pub(super) fn add(
    window: &Window<'_>,
    mut invitations: Vec<Invitation>,
    shares: &mut Shares,
    answer: &mut Answer<'_, '_>,
) -> Result<(bool, Option<Position>), Fault> {
    invitations.sort_by_key(|it| (it.came, it.num));
    let (mut told, mut last, mut told_upto) = (0, None, None);
    let mut has_news = false;
    for Invitation { came, num, row, user_row, data } in invitations {
        let is_full = told >= INVITATIONS_MAX || answer.invitation_bytes() >= INVITATIONS_BYTES_MAX;
        // The token can only name a whole position.
        if told_upto.is_none() && is_full && last < Some(came) {
            told_upto = last;
        }
        if told_upto.is_none() {
            let is_news = add_room(window, (num, &row, &user_row), data, shares, answer)?;
            told += usize::from(is_news);
            has_news |= is_news;
            last = Some(came);
            continue;
        }
        // That an earlier stay has ended is news of this answer's time, whenever the invitation after it is told.
        let caller = &window.ask.caller;
        let reader = Reader::with_row(num, &caller.user_id, &user_row, window.ignored()?.clone());
        let place = place(window, (num, &row, &user_row), &reader)?;
        let room = RoomWindow { window, num, row: &row, user_row: &user_row, place, reader: &reader };
        has_news |= add_end_of_stay(&room, data, answer)?;
    }
    Ok((has_news, told_upto))
}
