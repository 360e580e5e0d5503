//! Who pays for what is asked of other servers when no request waits for it.

use ruma::UserId;

use crate::{
    accounts::users,
    env::payer::Payers,
    ids::{RoomNum, UserNum},
    rooms::{self, event, members},
    store::{Fault, Snapshot},
};

/// Look at no more than this many of our users for the one who came into a room first.
const LOOKED_AT: usize = 100;

/// The payers for what a room lacks: the user of ours who came into it first, and the server that let them in as far as that is known.
pub(crate) fn of_room(snapshot: &Snapshot, room: RoomNum) -> Result<Payers, Fault> {
    let Some(row) = rooms::find_row(snapshot, room)? else { return Ok(Payers::SERVER) };
    if let Some(partial) = &row.partial {
        let joined = event::require_kept(snapshot, room, partial.join)?.row.header.state_key;
        let user = joined.map(|key| rooms::state::list_key_names(snapshot, room, [key])).transpose()?;
        let user = user.into_iter().flatten().flatten().next();
        let user = user.map(|(_, user)| find_user(snapshot, &user)).transpose()?.flatten();
        return Ok(Payers::of_work(user, &partial.via));
    }
    let mut first = None;
    for user in members::joined_local_users(snapshot, room)?.take(LOOKED_AT) {
        let user = user?;
        if let Some(row) = members::find(snapshot, user, room)? {
            let came = Some((row.since, user));
            first = first.min(came).or(came);
        }
    }
    Ok(Payers::of_work(first.map(|(_, user)| user), row.id.as_str()))
}

fn find_user(snapshot: &Snapshot, user: &str) -> Result<Option<UserNum>, Fault> {
    let Ok(user) = <&UserId>::try_from(user) else { return Ok(None) };
    users::find_num(snapshot, user)
}
