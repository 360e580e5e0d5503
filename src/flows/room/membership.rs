//! Changes of membership in rooms that this server is in: join, leave, invite, kick, ban, unban, knock, forget.
//!
//! Each member event of our users in such a room is made here, whichever endpoint asks for it, and passes the gate of
//! `rooms::policy`. `flows/membership.rs` is the door of clients, and decides whether a room is such.

use ruma::{CanonicalJsonObject, OwnedEventId, OwnedUserId, RoomId, UserId, api::error::ErrorKind};

use crate::{
    accounts::{self, Caller},
    error::{Error, Refusal, Result},
    flows::{App, account::carry_over, commit, jobs, own_events, room::completing},
    ids::{RoomNum, UserNum},
    rooms::{
        build::Draft,
        change::Change,
        members,
        membership::{Act, content, without_profile},
        policy::{self, Approved, Author},
        receipts,
        vouch::{self, Admission},
    },
    schema::event_types::MEMBER,
    schema::rooms::Membership,
    store::LogEntry,
};

/// Has the gate approve a member event with this content.
fn approve(
    app: &App,
    change: &mut Change,
    author: &Author,
    target: &str,
    content: CanonicalJsonObject,
) -> Result<Approved> {
    let draft = Draft::state(author.user_id.clone(), MEMBER, target, content, app.env.event_ms());
    policy::approve(change, app.rooms.signer().server(), author, draft)
}

fn add(
    app: &App,
    change: &mut Change,
    author: &Author,
    target: &UserId,
    content: CanonicalJsonObject,
) -> Result<()> {
    approve(app, change, author, target.as_str(), content)?.add(change, app.rooms.signer()).map(drop)
}

/// Joins a room; nothing happens if the caller is in it. `extra` holds further fields that the client wants in the member event.
/// They do not replace the fields that we set. Gives `false`, and does nothing, where the room is restricted and only other servers
/// that are in it may be able to vouch for the caller.
pub(crate) async fn join(
    app: &App,
    caller: &Caller,
    num: RoomNum,
    reason: Option<String>,
    extra: CanonicalJsonObject,
) -> Result<bool> {
    let (owned, author) = (app.clone(), Author::from(caller));
    let joined = own_events::in_room(app, num, move |change| {
        let was = change.membership(author.user_id.as_str())?;
        if was == Membership::Join {
            return Ok(Some(None));
        }
        if !matches!(was, Membership::Invite | Membership::Ban) && needs_others(&owned, change, &author)? {
            return Ok(None);
        }
        let mut content = content(&change.batch, &author.user_id, "join", reason.as_deref())?;
        for (key, value) in extra {
            content.entry(key).or_insert(value);
        }
        add(&owned, change, &author, &author.user_id, content)?;
        carry_over::promise(&owned, change, author.user).map(Some)
    })
    .await?;
    let Some(promised) = joined else { return Ok(false) };
    jobs::keep(app, promised).await?;
    Ok(true)
}

/// Whether a user may come into a restricted room by the word of other servers alone: nobody of ours may vouch, or what the room asks
/// cannot be checked here.
fn needs_others(app: &App, change: &mut Change, author: &Author) -> Result<bool> {
    let us = app.rooms.signer().server();
    let may_be = match vouch::judge(change, us, &author.user_id)? {
        Admission::NoVoucher | Admission::Unchecked => true,
        Admission::NoConditions | Admission::Vouched(_) | Admission::Unmet => false,
    };
    Ok(may_be && !author.is_guest && members::has_other_servers(&change.batch, change.num, us.as_str())?)
}

/// Sets a member event as the client wrote it. The change of membership is judged and followed up as if its own endpoint had
/// been called. Setting the content that is set already changes nothing, and answers the event that is there.
pub(crate) async fn set(
    app: &App,
    caller: &Caller,
    room_id: &RoomId,
    target: String,
    content: CanonicalJsonObject,
) -> Result<OwnedEventId> {
    let room = commit::require_num(app, room_id)?;
    let (owned, author) = (app.clone(), Author::from(caller));
    let (event_id, promised) = own_events::in_room(app, room, move |change| {
        let was = change.membership(author.user_id.as_str())?;
        let approved = approve(&owned, change, &author, &target, content)?;
        if let Some(same) = approved.find_same(change)? {
            return Ok((same, None));
        }
        let stored = approved.add(change, owned.rooms.signer())?;
        let has_joined =
            was != Membership::Join && change.membership(author.user_id.as_str())? == Membership::Join;
        let promised = if has_joined { carry_over::promise(&owned, change, author.user)? } else { None };
        Ok((stored.id(&change.row), promised))
    })
    .await?;
    jobs::keep(app, promised).await?;
    Ok(event_id)
}

/// Leaves a room, or refuses an invitation to it. Nothing happens if the caller has left already.
pub(crate) async fn leave(app: &App, caller: &Caller, num: RoomNum, reason: Option<String>) -> Result<()> {
    leave_as(app, Author::from(caller), num, reason).await
}

/// Leaves a room for a user, as [`leave`] does.
pub(crate) async fn leave_as(app: &App, author: Author, num: RoomNum, reason: Option<String>) -> Result<()> {
    let owned = app.clone();
    own_events::in_room(app, num, move |change| {
        let user_id = &author.user_id;
        if change.state(MEMBER, user_id.as_str())?.is_none() {
            return Err(commit::not_in_room().into());
        }
        if change.membership(user_id.as_str())? == Membership::Leave {
            return Ok(());
        }
        add(&owned, change, &author, user_id, without_profile("leave", reason.as_deref()))
    })
    .await
}

/// Leaves a room for a user who is in it by one of these joins. Gives `false` where they are not.
pub(crate) async fn leave_if_by(
    app: &App,
    author: Author,
    num: RoomNum,
    joins: Vec<OwnedEventId>,
) -> Result<bool> {
    if !members::is_joined(&*app.store.snapshot(), author.user, num)? {
        return Ok(false);
    }
    let owned = app.clone();
    own_events::in_room(app, num, move |change| {
        let user_id = &author.user_id;
        let member = change.state(MEMBER, user_id.as_str())?;
        let is_by = member.is_some_and(|member| joins.contains(&member.parsed.id));
        if !is_by || change.membership(user_id.as_str())? != Membership::Join {
            return Ok(false);
        }
        add(&owned, change, &author, user_id, without_profile("leave", None))?;
        Ok(true)
    })
    .await
}

/// Changes the membership of another user: invite, kick, ban or unban.
pub(crate) async fn act(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    target: OwnedUserId,
    act: Act,
    reason: Option<String>,
) -> Result<()> {
    let num = commit::require_num(app, room)?;
    completing::known(app, caller, room, &target).await?;
    let (owned, author) = (app.clone(), Author::from(caller));
    own_events::in_room(app, num, move |change| {
        if change.membership(author.user_id.as_str())? != Membership::Join {
            return Err(commit::not_in_room().into());
        }
        let membership = act.outcome(change.membership(target.as_str())?)?;
        let content = match act {
            Act::Invite => content(&change.batch, &target, membership, reason.as_deref())?,
            Act::Kick | Act::Ban | Act::Unban => without_profile(membership, reason.as_deref()),
        };
        add(&owned, change, &author, &target, content)
    })
    .await
}

/// Asks to be let into a room.
pub(crate) async fn knock(app: &App, caller: &Caller, num: RoomNum, reason: Option<String>) -> Result<()> {
    let (owned, author) = (app.clone(), Author::from(caller));
    own_events::in_room(app, num, move |change| {
        let user_id = &author.user_id;
        if change.membership(user_id.as_str())? == Membership::Knock {
            return Ok(());
        }
        let content = content(&change.batch, user_id, "knock", reason.as_deref())?;
        add(&owned, change, &author, user_id, content)
    })
    .await
}

/// Forgets a room that the caller left, so that they hear no more of it. Errors: 400 `M_UNKNOWN` for a room that they are in.
pub(crate) async fn forget(app: &App, caller: &Caller, room: &RoomId) -> Result<()> {
    let num = commit::require_num(app, room)?;
    let user = caller.user;
    commit::beside_room(app, num, move |change| {
        match members::find(&change.batch, user, num)? {
            None => Err(commit::not_in_room().into()),
            Some(row) if matches!(row.membership, Membership::Leave | Membership::Ban) => {
                if !row.forgotten {
                    // A batch with a position is durable before the answer; a room stays forgotten after a crash.
                    change.batch.position(&LogEntry::Account { user });
                    members::forget(&mut change.batch, user, num, &row);
                }
                Ok(())
            }
            Some(_) => {
                Err(Refusal::new(ErrorKind::Unknown, "You must leave a room before you can forget it.")
                    .into())
            }
        }
    })
    .await
}

/// Writes the user's current profile into every room that they are in. A room that does not allow it is left out. Errors: the first
/// room whose policy server cannot be asked now, after all others were tried.
pub(crate) async fn renew_profile(app: &App, user: UserNum) -> Result<()> {
    let snapshot = app.store.snapshot();
    let author = Author::of(&*snapshot, user)?;
    let mut later = Ok(());
    for room in members::list_joined_rooms(&*snapshot, user)? {
        let (owned, author) = (app.clone(), author.clone());
        let renewed = own_events::in_room_unasked(app, room, move |change| {
            let user_id = &author.user_id;
            if change.membership(user_id.as_str())? != Membership::Join {
                return Ok(());
            }
            let content = content(&change.batch, user_id, "join", None)?;
            let approved = approve(&owned, change, &author, user_id.as_str(), content)?;
            match approved.find_same(change)? {
                Some(_) => Ok(()),
                None => approved.add(change, owned.rooms.signer()).map(drop),
            }
        });
        later = later.and(left_out(room, renewed.await)?);
    }
    later
}

/// Leaves every room that this server is in, and refuses every invitation to one, because the user's account ends. Errors: as for
/// [`renew_profile`].
pub(crate) async fn leave_all(app: &App, user: UserNum) -> Result<()> {
    let snapshot = app.store.snapshot();
    let is_erased = accounts::users::require(&*snapshot, user)?.is_erased;
    let author = Author::of(&*snapshot, user)?;
    let mut rooms = Vec::new();
    for row in members::list_user_rooms(&*snapshot, user)? {
        let (room, row) = row?;
        if is_erased || is_present(row.membership) {
            rooms.push(room);
        }
    }
    drop(snapshot);
    let mut later = Ok(());
    for room in rooms {
        if is_erased {
            delete_receipts(app, room, &author.user_id).await?;
        }
        let (owned, author) = (app.clone(), author.clone());
        let left = own_events::in_room_unasked(app, room, move |change| {
            let user_id = &author.user_id;
            if !is_present(change.membership(user_id.as_str())?) {
                return Ok(());
            }
            add(&owned, change, &author, user_id, without_profile("leave", None))
        });
        later = later.and(left_out(room, left.await)?);
    }
    later
}

/// Deletes all receipts of a user in a room, in as many turns as that takes.
async fn delete_receipts(app: &App, room: RoomNum, user_id: &UserId) -> Result<()> {
    loop {
        let user_id = user_id.to_owned();
        let deleted = commit::beside_room(app, room, move |change| {
            Ok(receipts::delete_some(&mut change.batch, room, &user_id)?)
        });
        match deleted.await {
            Ok(true) => {}
            other => return left_out(room, other.map(drop))?,
        }
    }
}

/// Whether a user with this membership can leave the room.
fn is_present(membership: Membership) -> bool {
    matches!(membership, Membership::Join | Membership::Invite | Membership::Knock)
}

/// Passes over the refusal of one room, so that the user's other rooms are still written to. Gives the error for which this room is
/// to be tried again later.
fn left_out(room: RoomNum, answer: Result<()>) -> Result<Result<()>> {
    match answer {
        Err(Error::Refused(why)) => {
            tracing::debug!(%room, reason = why.message, "a room refuses a change that is written to all rooms of a user");
            Ok(Ok(()))
        }
        Err(why @ Error::Remote { .. }) => {
            tracing::info!(%room, %why, "a change that is written to all rooms of a user is put off in this one");
            Ok(Err(why))
        }
        other => other.map(Ok),
    }
}
