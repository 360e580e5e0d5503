//! Writes what users of ours are to rooms that this server is not in (`rooms/change/outside.rs`).

use std::time::Duration;

use ruma::{OwnedRoomId, RoomId, ServerName, UserId};

use crate::{
    error::{Error, Result},
    flows::{App, commit},
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        change::{
            Change,
            invited::{self, Admission},
            outside::{End, Told},
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
    let invited = (told.membership == Membership::Invite).then(|| told.sender.clone());
    let sender = invited.clone();
    let act = move |change: &mut Change, lock: &mut commit::ServerLock<'_>| {
        if let Some(sender) = &invited {
            // Invitations to other rooms come at the same time, and are counted under the same lock.
            lock.take_user(change, user);
            let server = <&UserId>::try_from(sender.as_str()).map(UserId::server_name);
            let server = server.map_err(|_| Error::broken("an invitation has no sender"))?;
            require_room(&change.batch, (user, server), Some(change.num), false)?;
        }
        change.set_outside(user, told.clone())
    };
    let mut tries = 0;
    loop {
        tries += 1;
        if let Some(sender) = &sender {
            give_way(app, &named.0, via, (user, sender)).await?;
        }
        match try_to_change(app, named.clone(), via, act.clone()).await {
            Err(Error::Busy { retry_after }) if tries < TRIES && retry_after < PENDING_RETRY => {}
            done => return done,
        }
    }
}

/// Ends the invitation that gives way to one more, where one has to.
async fn give_way(app: &App, room: &RoomId, via: &ServerName, (user, sender): (UserNum, &str)) -> Result<()> {
    let Ok(server) = <&UserId>::try_from(sender).map(UserId::server_name) else { return Ok(()) };
    let snapshot = app.store.snapshot();
    let num = rooms::find_room(&*snapshot, room)?;
    let Admission::InPlaceOf(other, of) = invited::judge(&*snapshot, (user, server.as_str()), num)? else {
        return Ok(());
    };
    let row = rooms::require_row(&*snapshot, other)?;
    drop(snapshot);
    tracing::debug!(%user, room = %other, server = %of, by = %server, "an invitation gives way to another");
    change(app, (row.id, row.version), via, move |change, _| change.give_way_outside(user, &of)).await
}

/// Ends what a user of ours is to the room by the word of the sender of an event. The rest is as for [`set`].
pub(super) async fn end(
    app: &App,
    named: (OwnedRoomId, u8),
    via: &ServerName,
    user: UserNum,
    end: End,
) -> Result<()> {
    change(app, named, via, move |change, _| change.end_outside(user, end.clone())).await
}

async fn change(
    app: &App,
    named: (OwnedRoomId, u8),
    via: &ServerName,
    act: impl Fn(&mut Change, &mut commit::ServerLock<'_>) -> Result<()> + Clone + Send + 'static,
) -> Result<()> {
    let mut tries = 0;
    loop {
        tries += 1;
        match try_to_change(app, named.clone(), via, act.clone()).await {
            Err(Error::Busy { retry_after }) if tries < TRIES && retry_after < PENDING_RETRY => {}
            done => return done,
        }
    }
}

async fn try_to_change(
    app: &App,
    named: (OwnedRoomId, u8),
    via: &ServerName,
    act: impl FnOnce(&mut Change, &mut commit::ServerLock<'_>) -> Result<()> + Send + 'static,
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
        if is_here { Ok(()) } else { act(change, lock) }
    };
    commit::in_turn(app, num, begin, work, or_again).await
}

/// Refuses an invitation where too many by users of that server, or by anybody, wait for the user: [`Error::Busy`]. `is_first` says that
/// another may still give way to it.
pub(super) fn require_room(
    read: &(impl Read + ?Sized),
    (user, server): (UserNum, &ServerName),
    room: Option<RoomNum>,
    is_first: bool,
) -> Result<()> {
    match invited::judge(read, (user, server.as_str()), room)? {
        Admission::Free => return Ok(()),
        Admission::InPlaceOf(..) if is_first => return Ok(()),
        // Others came in between, so that another gives way to it when it is tried again.
        Admission::InPlaceOf(..) => return Err(Error::Busy { retry_after: Duration::from_secs(1) }),
        Admission::Full => {}
    }
    tracing::debug!(%user, %server, reason = "too many invitations wait", "an invitation is refused");
    Err(Error::Busy { retry_after: PENDING_RETRY })
}

/// A room that came to be under another number meanwhile is found the next time.
fn or_again(why: NotAccepted) -> Error {
    match why {
        NotAccepted::Conflict(_) => Error::Busy { retry_after: Duration::from_secs(1) },
        other => other.into(),
    }
}
