//! The door through which our users come into rooms and go out of them. A room that this server is in is changed by
//! `flows/room/membership.rs`, and any other one by way of other servers (`flows/remote/`).

use std::time::Duration;

use futures_util::{StreamExt, stream};
use ruma::{
    CanonicalJsonObject, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, RoomOrAliasId,
    api::client::room::create_room::v3::Request,
};

use crate::{
    accounts::Caller,
    error::{Error, Refusal, Result},
    flows::{
        App, commit,
        remote::{
            self,
            ask::Named,
            attempts::{Attempt, Ended},
            candidates::{CANDIDATES_MAX, candidates, find_here, find_named},
            join::Alone,
            late,
            template::Wanted,
        },
        room::{
            completing,
            create::{self, Created},
            membership as here, send,
        },
    },
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        change::{Change, outside},
        members,
        membership::{Act, content},
        policy::{self, Author},
    },
    schema::{
        event_types::{CANONICAL_ALIAS, MEMBER},
        rooms::Membership,
    },
};

/// Ask at most this many servers at once to take invitations to a new room.
const INVITES_AT_ONCE: usize = 8;
/// Wait at most this long for servers that take invitations to a new room.
const INVITES_TAKE: Duration = Duration::from_secs(5);

/// A room as a client names it, and the servers that it names as likely to be in the room.
pub(crate) type Address<'a> = (&'a RoomOrAliasId, Vec<OwnedServerName>);

/// Joins a room; nothing happens if the caller is in it. `extra` holds further fields that the client wants in the member event.
/// They do not replace the fields that we set.
pub(crate) async fn join(
    app: &App,
    caller: &Caller,
    (name, via): Address<'_>,
    reason: Option<String>,
    extra: CanonicalJsonObject,
) -> Result<OwnedRoomId> {
    let Named { room_id, servers } = find_named(app, name, via).await?;
    late::forget(app, &room_id, caller.user)?;
    let mut num = find_here(app, &room_id)?;
    if num.is_none() {
        let (author, servers, reason, extra) =
            (Author::from(caller), servers.clone(), reason.clone(), extra.clone());
        let attempt = app.remote.attempts.begin(&room_id, caller.user);
        let alone = app.remote.joining.enter(app, &room_id).await?;
        num = join_elsewhere(app, author, &room_id, servers, (reason, extra), (attempt, alone)).await?;
    }
    if let Some(num) = num
        && !here::join(app, caller, num, reason.clone(), extra.clone()).await?
    {
        let wanted = wanted(app, &Author::from(caller), &room_id, reason, extra)?;
        let candidates = candidates(app, &room_id, servers)?;
        if candidates.is_empty() {
            return Err(Refusal::forbidden("Nobody of this server may let you into the room.").into());
        }
        let attempt = app.remote.attempts.begin(&room_id, caller.user);
        let alone = app.remote.joining.enter(app, &room_id).await?;
        remote::join::vouched(app, attempt, num, wanted, candidates, alone).await?;
    }
    Ok(room_id)
}

/// The join that a user wants of a server that is in the room.
fn wanted(
    app: &App,
    author: &Author,
    room_id: &RoomId,
    reason: Option<String>,
    extra: CanonicalJsonObject,
) -> Result<Wanted> {
    let snapshot = app.store.snapshot();
    policy::require_may_go_elsewhere(&*snapshot, author)?;
    let mut content = content(&*snapshot, &author.user_id, "join", reason.as_deref())?;
    for (key, value) in extra {
        content.entry(key).or_insert(value);
    }
    let (user_id, membership) = (author.user_id.clone(), Membership::Join);
    Ok(Wanted { room_id: room_id.to_owned(), user_id, membership, content })
}

/// Joins a room that this server is not in. Gives its number where this server has come into it meanwhile, so that others are not
/// asked.
async fn join_elsewhere(
    app: &App,
    author: Author,
    room_id: &RoomId,
    servers: Vec<OwnedServerName>,
    (reason, extra): (Option<String>, CanonicalJsonObject),
    (attempt, alone): (Attempt, Alone),
) -> Result<Option<RoomNum>> {
    attempt.require_wanted()?;
    if let Some(num) = find_here(app, room_id)? {
        return Ok(Some(num));
    }
    let wanted = wanted(app, &author, room_id, reason, extra)?;
    let servers = with_inviter(app, &author, room_id, servers)?;
    let candidates = candidates(app, room_id, servers)?;
    remote::join::join(app, attempt, wanted, candidates, alone).await?;
    Ok(None)
}

/// The servers that a client names, and then those that are in the room by what an invitation or a knock told of it.
fn with_inviter(
    app: &App,
    author: &Author,
    room_id: &RoomId,
    mut servers: Vec<OwnedServerName>,
) -> Result<Vec<OwnedServerName>> {
    let snapshot = app.store.snapshot();
    servers.truncate(CANDIDATES_MAX);
    if let Some(num) = rooms::find_room(&*snapshot, room_id)?
        && let Some(row) = members::find(&*snapshot, author.user, num)?
        && let Some(told) = outside::find(&*snapshot, num, author.user, &row)?
    {
        servers.extend(remote::leave::servers_of(&told));
    }
    Ok(servers)
}

/// Sets a piece of a room's state. A member event by which a user of another server is invited goes to their server first, and the
/// servers of canonical aliases are asked before.
pub(crate) async fn set_state(
    app: &App,
    caller: &Caller,
    room_id: &RoomId,
    mut piece: send::Piece,
) -> Result<OwnedEventId> {
    if piece.event_type == CANONICAL_ALIAS {
        piece.confirmed =
            remote::canonical::confirm(app, caller, room_id, &piece.state_key, &piece.content).await?;
    }
    let is_invite = piece.event_type == MEMBER
        && piece.content.get("membership").and_then(|membership| membership.as_str()) == Some("invite");
    let target = OwnedUserId::try_from(piece.state_key.as_str()).ok().filter(|_| is_invite);
    match target.filter(|target| *target.server_name() != app.config.server.name) {
        Some(target) => {
            let num = commit::require_num(app, room_id)?;
            completing::known(app, caller, room_id, &target).await?;
            remote::invite::send(app, num, &Author::from(caller), &target, move |_| Ok(piece.content)).await
        }
        None => send::set_state(app, caller, room_id, piece).await,
    }
}

/// Leaves a room, or refuses an invitation to it. Nothing happens if the caller has left already, and whatever of the caller is
/// still on its way into the room ends.
pub(crate) async fn leave(app: &App, caller: &Caller, room: &RoomId, reason: Option<String>) -> Result<()> {
    // Others would read what a suspended user says with it, also where another server takes part in it.
    let reason = reason.filter(|_| !caller.is_suspended);
    let Ended { was_coming, sent } = app.remote.attempts.end(app, room, caller.user).await;
    late::promise(app, caller.user, room, sent).await?;
    // A job of an earlier leave goes on at once, also after a restart.
    let was_coming = was_coming || late::begin(app, room, caller.user);
    match leave_now(app, caller, room, reason).await {
        Err(Error::Refused(_)) if was_coming && !is_in(app, caller, room)? => Ok(()),
        left => left,
    }
}

async fn leave_now(app: &App, caller: &Caller, room: &RoomId, reason: Option<String>) -> Result<()> {
    let num = commit::require_num(app, room)?;
    if leave_outside(app, caller.user, num, room, reason.as_deref()).await? {
        return Ok(());
    }
    here::leave(app, caller, num, reason).await
}

fn is_in(app: &App, caller: &Caller, room: &RoomId) -> Result<bool> {
    let snapshot = app.store.snapshot();
    let Some(num) = rooms::find_room(&*snapshot, room)? else { return Ok(false) };
    Ok(members::is_joined(&*snapshot, caller.user, num)?)
}

/// Ends an invitation or a knock that the room itself knows nothing of, because this server is not in it. Gives `false` where there
/// is none.
async fn leave_outside(
    app: &App,
    user: UserNum,
    num: RoomNum,
    room: &RoomId,
    reason: Option<&str>,
) -> Result<bool> {
    let snapshot = app.store.snapshot();
    let row = members::find(&*snapshot, user, num)?;
    let told = row.map(|row| outside::find(&*snapshot, num, user, &row)).transpose()?.flatten();
    drop(snapshot);
    match told {
        None => Ok(false),
        Some(_) => app.remote.joining.leave(app, room, remote::leave::leave(app, user, num, reason)).await,
    }
}

/// Leaves every room that the user is in, and refuses every invitation, because their account ends.
pub(crate) async fn leave_all(app: &App, user: UserNum) -> Result<()> {
    for room in app.remote.attempts.list_rooms(user) {
        let Ended { sent, .. } = app.remote.attempts.end(app, &room, user).await;
        late::promise(app, user, &room, sent).await?;
    }
    let snapshot = app.store.snapshot();
    let mut outside_of = Vec::new();
    for row in members::list_user_rooms(&*snapshot, user)? {
        let (room, row) = row?;
        if members::is_near(row.membership) && outside::find(&*snapshot, room, user, &row)?.is_some() {
            outside_of.push((room, rooms::require_row(&*snapshot, room)?.id));
        }
    }
    drop(snapshot);
    for (room, room_id) in outside_of {
        match leave_outside(app, user, room, &room_id, None).await {
            Ok(_) => {}
            Err(Error::Broken(why)) => return Err(Error::Broken(why)),
            Err(why) => tracing::debug!(%room, %why, "an invitation could not be refused as an account ends"),
        }
    }
    here::leave_all(app, user).await
}

/// Invites a user, of this server or another.
pub(crate) async fn invite(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    target: OwnedUserId,
    reason: Option<String>,
) -> Result<()> {
    if *target.server_name() == app.config.server.name {
        return here::act(app, caller, room, target, Act::Invite, reason).await;
    }
    let num = commit::require_num(app, room)?;
    completing::known(app, caller, room, &target).await?;
    let author = Author::from(caller);
    let (author_id, invited) = (author.user_id.clone(), target.clone());
    let content = move |change: &mut Change| {
        if change.membership(author_id.as_str())? != Membership::Join {
            return Err(commit::not_in_room().into());
        }
        let membership = Act::Invite.outcome(change.membership(invited.as_str())?)?;
        Ok(content(&change.batch, &invited, membership, reason.as_deref())?)
    };
    remote::invite::send(app, num, &author, &target, content).await.map(drop)
}

/// Asks to be let into a room.
pub(crate) async fn knock(
    app: &App,
    caller: &Caller,
    (name, via): Address<'_>,
    reason: Option<String>,
) -> Result<OwnedRoomId> {
    let Named { room_id, servers } = find_named(app, name, via).await?;
    match find_here(app, &room_id)? {
        Some(num) => here::knock(app, caller, num, reason).await?,
        None => {
            // The other server keeps a knock that it has taken, whether the requester waits for that or not.
            let attempt = app.remote.attempts.begin(&room_id, caller.user);
            let (owned, author, room_id) = (app.clone(), Author::from(caller), room_id.clone());
            let work = async move {
                let knocked = knock_elsewhere(&owned, author, &room_id, servers, (reason, &attempt));
                owned.remote.joining.alone(&owned, &room_id, knocked).await
            };
            app.to_the_end("a knock", work).await?;
        }
    }
    Ok(room_id)
}

/// Knocks at a room that this server is not in. Who has knocked there already knocks again: it may have been refused, of which other
/// servers need not tell.
async fn knock_elsewhere(
    app: &App,
    author: Author,
    room_id: &RoomId,
    servers: Vec<OwnedServerName>,
    (reason, attempt): (Option<String>, &Attempt),
) -> Result<()> {
    let snapshot = app.store.snapshot();
    policy::require_may_go_elsewhere(&*snapshot, &author)?;
    let content = content(&*snapshot, &author.user_id, "knock", reason.as_deref())?;
    drop(snapshot);
    let servers = with_inviter(app, &author, room_id, servers)?;
    let candidates = candidates(app, room_id, servers)?;
    let (user_id, membership) = (author.user_id, Membership::Knock);
    let wanted = Wanted { room_id: room_id.to_owned(), user_id, membership, content };
    remote::knock::knock(app, attempt, &wanted, candidates).await
}

/// Creates a room, and has the servers of others invite those whom it is made with. The room is there then, whatever becomes of
/// that.
pub(crate) async fn create(app: &App, caller: &Caller, request: Request) -> Result<OwnedRoomId> {
    let Created { num, room_id, invited_elsewhere, .. } = create::create(app, caller, request).await?;
    if invited_elsewhere.is_empty() {
        return Ok(room_id);
    }
    let (owned, author) = (app.clone(), Author::from(caller));
    let (tell, told) = tokio::sync::oneshot::channel();
    app.env.spawn(async move {
        let invites =
            invited_elsewhere.into_iter().map(|invited| invite_to_new(&owned, num, &author, invited));
        let invites: Vec<_> = invites.collect();
        stream::iter(invites).buffer_unordered(INVITES_AT_ONCE).collect::<()>().await;
        let _ = tell.send(());
    });
    // Servers that are slow are told while the creator is in the room already.
    tokio::select! {
        biased;
        _ = told => {}
        () = app.env.sleep(INVITES_TAKE) => {}
    }
    Ok(room_id)
}

async fn invite_to_new(
    app: &App,
    num: RoomNum,
    author: &Author,
    (target, content): (OwnedUserId, CanonicalJsonObject),
) {
    if let Err(why) = remote::invite::send(app, num, author, &target, move |_| Ok(content)).await {
        tracing::info!(room = %num, %target, %why, "a user of another server could not be invited to a new room");
    }
}
