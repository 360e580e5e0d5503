//! Writes what users of ours are to rooms that this server is not in (`rooms/change/outside.rs`).

use std::time::Duration;

use ruma::{OwnedRoomId, ServerName, UserId};

use crate::{
    error::{Error, Result},
    flows::{App, commit},
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        change::{
            Change, invited,
            outside::{self, Told},
        },
        members,
    },
    schema::rooms::Membership,
    store::{NotAccepted, Read},
};

/// Somebody else may give the room a number first; then this is tried again, this often.
const TRIES: usize = 3;
/// A server with too many invitations may try again after this time.
const PENDING_RETRY: Duration = Duration::from_secs(3_600);

/// Sets what a user of ours is to the room of this id and version. Nothing happens where this server has come into the room
/// meanwhile, because the room itself says it then. `via` is at fault where the room is known in another version.
pub(super) async fn set(
    app: &App,
    named: (OwnedRoomId, u8),
    via: &ServerName,
    user: UserNum,
    told: Told,
) -> Result<()> {
    set_after(app, named, via, user, told, None).await
}

/// Like [`set`], for what ends an invitation or a knock: nothing happens where the user is something else to the room by now than the
/// event `of` this number said.
pub(super) async fn set_after(
    app: &App,
    named: (OwnedRoomId, u8),
    via: &ServerName,
    user: UserNum,
    told: Told,
    of: Option<u64>,
) -> Result<()> {
    let mut tries = 0;
    loop {
        tries += 1;
        match try_to_set(app, named.clone(), via, (user, told.clone()), of).await {
            Err(Error::Busy { retry_after }) if tries < TRIES && retry_after < PENDING_RETRY => {}
            done => return done,
        }
    }
}

async fn try_to_set(
    app: &App,
    named: (OwnedRoomId, u8),
    via: &ServerName,
    (user, told): (UserNum, Told),
    of: Option<u64>,
) -> Result<()> {
    let view = app.store.view();
    let num = match rooms::find_room(&view, &named.0)? {
        Some(num) => num,
        None => app.rooms.next_num(&view)?,
    };
    drop(view);
    let (via, us) = (via.to_string(), app.config.server.name.to_string());
    let begin = move |app: &App, seat| Change::begin_outside(&app.store, seat, named, &via);
    let work = move |change: &mut Change, lock: &mut commit::ServerLock<'_>| {
        let is_here =
            change.row.resident.is_in() && members::is_server_joined(&change.batch, change.num, &us)?;
        if is_here || !still_is(change, user, of)? {
            return Ok(());
        }
        if told.membership == Membership::Invite {
            // Invitations to other rooms come at the same time, and are counted under the same lock.
            lock.take_user(change, user);
            let server = <&UserId>::try_from(told.sender.as_str()).map(UserId::server_name);
            let server = server.map_err(|_| Error::broken("an invitation has no sender"))?;
            require_room(&change.batch, (user, server), Some(change.num))?;
        }
        change.set_outside(user, told)
    };
    commit::in_turn(app, num, begin, work, or_again).await
}

/// Refuses an invitation where too many by users of that server, or by anybody, wait for the user: [`Error::Busy`].
pub(super) fn require_room(
    read: &(impl Read + ?Sized),
    (user, server): (UserNum, &ServerName),
    room: Option<RoomNum>,
) -> Result<()> {
    if invited::may_wait(read, (user, server.as_str()), room)? {
        return Ok(());
    }
    tracing::debug!(%user, %server, reason = "too many invitations wait", "an invitation is refused");
    Err(Error::Busy { retry_after: PENDING_RETRY })
}

/// Whether the user is to the room what the event of this number said; `true` without a number.
fn still_is(change: &Change, user: UserNum, of: Option<u64>) -> Result<bool> {
    let Some(of) = of else { return Ok(true) };
    let row = members::find(&change.batch, user, change.num)?;
    let told = row.map(|row| outside::find(&change.batch, change.num, user, &row)).transpose()?.flatten();
    Ok(told.is_some_and(|told| told.number == of))
}

/// A room that came to be under another number meanwhile is found the next time.
fn or_again(why: NotAccepted) -> Error {
    match why {
        NotAccepted::Conflict(_) => Error::Busy { retry_after: Duration::from_secs(1) },
        other => other.into(),
    }
}
