//! Coming and going: join, leave, invite, kick, ban, unban, knock, forget.

use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, OwnedRoomId, OwnedUserId, RoomId, RoomOrAliasId, UserId,
    api::error::ErrorKind,
};
use serde::Deserialize;

use crate::{
    accounts::{self, Caller, account_data},
    error::{Error, Refusal, Result},
    flows::{App, account::carry_over, commit, follow_up},
    ids::{RoomNum, UserNum},
    rooms::{self, aliases, build::Draft, change::Change, members, power::Action, receipts},
    schema,
    schema::rooms::Membership,
    store::{Fault, LogEntry, Read},
};

/// The content of a member event about this user, with their profile if they are one of ours.
pub(crate) fn content(
    read: &(impl Read + ?Sized),
    user: &UserId,
    membership: &str,
    reason: Option<&str>,
) -> Result<CanonicalJsonObject, Fault> {
    let mut content = CanonicalJsonObject::new();
    content.insert("membership".to_owned(), membership.into());
    if let Some(reason) = reason {
        content.insert("reason".to_owned(), reason.into());
    }
    if let Some(user) = accounts::users::find_num(read, user)? {
        for field in ["displayname", "avatar_url"] {
            let value = schema::PROFILES.get(read, (user, field))?;
            let value = value.and_then(|value| serde_json::from_slice::<CanonicalJsonValue>(&value).ok());
            if let Some(value @ CanonicalJsonValue::String(_)) = value {
                content.insert(field.to_owned(), value);
            }
        }
    }
    Ok(content)
}

fn draft(app: &App, sender: &OwnedUserId, target: &UserId, content: CanonicalJsonObject) -> Draft {
    Draft::state(sender.clone(), "m.room.member", target.as_str(), content, app.env.event_ms())
}

/// The room that an id or an alias names. Refuses what names none here: 404 `M_NOT_FOUND`.
pub(crate) fn find_room(app: &App, name: &RoomOrAliasId) -> Result<(RoomNum, OwnedRoomId)> {
    let snapshot = app.store.snapshot();
    let unknown =
        || Error::from(Refusal::not_found("This server knows no such room, and can ask no other server."));
    match <&RoomId>::try_from(name) {
        Ok(id) => {
            let (num, row) = rooms::require_room(&*snapshot, id).map_err(|_| unknown())?;
            Ok((num, row.id))
        }
        Err(alias) => {
            let row = aliases::find(&*snapshot, alias)?.ok_or_else(unknown)?;
            let num = row.room;
            Ok((num, rooms::require_row(&*snapshot, num)?.id))
        }
    }
}

/// Joins a room. Joining a room one is in does nothing. `extra` is what the client wants in the member event beside what
/// we put there.
pub(crate) async fn join(
    app: &App,
    caller: &Caller,
    name: &RoomOrAliasId,
    reason: Option<String>,
    extra: CanonicalJsonObject,
) -> Result<OwnedRoomId> {
    let (num, room_id) = find_room(app, name)?;
    let (inner, caller) = (app.clone(), caller.clone());
    let promised = commit::in_room(app, num, move |change| {
        let user = &caller.user_id;
        let was = change.membership(user.as_str())?;
        if was == Membership::Join {
            return Ok(None);
        }
        if caller.is_guest && !guests_may_join(change)? {
            return Err(
                Refusal::new(ErrorKind::GuestAccessForbidden, "Guests may not join this room.").into()
            );
        }
        let mut content = content(&change.batch, user, "join", reason.as_deref())?;
        for (key, value) in extra {
            content.entry(key).or_insert(value);
        }
        content.remove("join_authorised_via_users_server");
        if was != Membership::Invite
            && let Some(allower) = find_allower(change, caller.user)?
        {
            content.insert("join_authorised_via_users_server".to_owned(), allower.as_str().into());
        }
        change.add(inner.rooms.signer(), &draft(&inner, user, user, content), None)?;
        carry_over::promise(&inner, change, caller.user)
    })
    .await?;
    if let Some(promised) = promised {
        follow_up::keep(app, promised).await?;
    }
    Ok(room_id)
}

fn state_content<T: serde::de::DeserializeOwned>(
    change: &mut Change,
    kind: &str,
) -> Result<Option<T>, Fault> {
    let event = change.state(kind, "")?;
    Ok(event.and_then(|event| serde_json::from_str(event.parsed.content.get()).ok()))
}

fn guests_may_join(change: &mut Change) -> Result<bool, Fault> {
    #[derive(Deserialize)]
    struct Guests {
        guest_access: String,
    }
    let guests = state_content::<Guests>(change, "m.room.guest_access")?;
    Ok(guests.is_some_and(|guests| guests.guest_access == "can_join"))
}

#[derive(Deserialize)]
struct JoinRules {
    join_rule: String,
    #[serde(default)]
    allow: Vec<Allow>,
}

#[derive(Deserialize)]
struct Allow {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    room_id: Option<OwnedRoomId>,
}

/// Where a room lets in who is in certain other rooms: the user of this server in whose name it does so.
/// `None` if the room has no such rule, or it does not let this user in.
fn find_allower(change: &mut Change, user: UserNum) -> Result<Option<OwnedUserId>> {
    let authorization = &change.rules().authorization;
    let Some(rules) = state_content::<JoinRules>(change, "m.room.join_rules")? else { return Ok(None) };
    let restricted = match rules.join_rule.as_str() {
        "restricted" => authorization.restricted_join_rule,
        "knock_restricted" => authorization.knock_restricted_join_rule,
        _ => false,
    };
    if !restricted {
        return Ok(None);
    }
    let mut is_let_in = false;
    for room in rules.allow.iter().filter(|allow| allow.kind == "m.room_membership") {
        if let Some(room) = &room.room_id
            && let Some(room) = rooms::find_room(&change.batch, room)?
        {
            is_let_in |= members::is_joined(&change.batch, user, room)?;
        }
    }
    if !is_let_in {
        return Ok(None);
    }
    let power = change.power()?;
    for user in members::list_joined_local_users(&change.batch, change.num)? {
        let Some(row) = accounts::users::find(&change.batch, user)? else { continue };
        let user_id = row.user_id;
        if power.may(&user_id, Action::Invite)? {
            return Ok(Some(user_id));
        }
    }
    Ok(None)
}

/// Leaves a room, or refuses an invitation to it. Leaving a room one has left does nothing.
pub(crate) async fn leave(app: &App, caller: &Caller, room: &RoomId, reason: Option<String>) -> Result<()> {
    let num = commit::require_num(app, room)?;
    let (inner, user) = (app.clone(), caller.user_id.clone());
    commit::in_room(app, num, move |change| {
        if change.state("m.room.member", user.as_str())?.is_none() {
            return Err(commit::not_in_room().into());
        }
        if change.membership(user.as_str())? == Membership::Leave {
            return Ok(());
        }
        let mut content = CanonicalJsonObject::new();
        content.insert("membership".to_owned(), "leave".into());
        if let Some(reason) = reason {
            content.insert("reason".to_owned(), reason.into());
        }
        change.add(inner.rooms.signer(), &draft(&inner, &user, &user, content), None)?;
        Ok(())
    })
    .await
}

/// What somebody does to the membership of somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Asks them in.
    Invite,
    /// Puts them out.
    Kick,
    /// Keeps them out.
    Ban,
    /// Lets them come back.
    Unban,
}

/// Changes the membership of somebody else.
pub(crate) async fn act(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    target: OwnedUserId,
    act: Act,
    reason: Option<String>,
) -> Result<()> {
    let num = commit::require_num(app, room)?;
    if act == Act::Invite {
        commit::require_reachable(&*app.store.snapshot(), app.rooms.signer().server(), &target)?;
    }
    let (inner, sender) = (app.clone(), caller.user_id.clone());
    commit::in_room(app, num, move |change| {
        if change.membership(sender.as_str())? != Membership::Join {
            return Err(commit::not_in_room().into());
        }
        let was = change.membership(target.as_str())?;
        let membership = match (act, was) {
            (Act::Invite, Membership::Join) => {
                return Err(Refusal::forbidden("They are in the room already.").into());
            }
            (Act::Invite, _) => "invite",
            (Act::Kick, Membership::Join | Membership::Invite | Membership::Knock) => "leave",
            (Act::Kick, _) => return Err(Refusal::forbidden("They are not in the room.").into()),
            // Banning again may change the reason.
            (Act::Ban, _) => "ban",
            (Act::Unban, Membership::Ban) => "leave",
            (Act::Unban, _) => {
                return Err(Refusal::new(ErrorKind::BadState, "They are not banned.")
                    .status(http::StatusCode::FORBIDDEN)
                    .into());
            }
        };
        let mut content = match act {
            Act::Invite => {
                account_data::check_invite(&change.batch, &target)?;
                content(&change.batch, &target, membership, None)?
            }
            _ => [("membership".to_owned(), membership.into())].into(),
        };
        if let Some(reason) = reason {
            content.insert("reason".to_owned(), reason.into());
        }
        change.add(inner.rooms.signer(), &draft(&inner, &sender, &target, content), None)?;
        Ok(())
    })
    .await
}

/// Asks to be let into a room.
pub(crate) async fn knock(
    app: &App,
    caller: &Caller,
    name: &RoomOrAliasId,
    reason: Option<String>,
) -> Result<OwnedRoomId> {
    let (num, room_id) = find_room(app, name)?;
    let (inner, user) = (app.clone(), caller.user_id.clone());
    commit::in_room(app, num, move |change| {
        if change.membership(user.as_str())? == Membership::Knock {
            return Ok(());
        }
        let content = content(&change.batch, &user, "knock", reason.as_deref())?;
        change.add(inner.rooms.signer(), &draft(&inner, &user, &user, content), None)?;
        Ok(())
    })
    .await?;
    Ok(room_id)
}

/// The caller wants to hear no more of a room that they left. Refuses a room that they are in: 400 `M_UNKNOWN`.
pub(crate) async fn forget(app: &App, caller: &Caller, room: &RoomId) -> Result<()> {
    let num = commit::require_num(app, room)?;
    let user = caller.user;
    commit::in_room(app, num, move |change| {
        match members::find(&change.batch, user, num)? {
            None => Err(commit::not_in_room().into()),
            Some(row) if matches!(row.membership, Membership::Leave | Membership::Ban) => {
                if !row.forgotten {
                    // A position, so that it is as durable as what it answers.
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

/// Writes the user's profile, as it is now, into every room that they are in. Rooms are independent of one another: one
/// that does not allow it is left out.
pub(crate) async fn renew_profile(app: &App, user: UserNum, user_id: &UserId) -> Result<()> {
    let rooms = members::list_joined_rooms(&*app.store.snapshot(), user)?;
    for room in rooms {
        let (inner, user_id) = (app.clone(), user_id.to_owned());
        let renewed = commit::in_room(app, room, move |change| {
            if change.membership(user_id.as_str())? != Membership::Join {
                return Ok(());
            }
            let content = content(&change.batch, &user_id, "join", None)?;
            let draft = draft(&inner, &user_id, &user_id, content);
            let current = change.state("m.room.member", user_id.as_str())?;
            if current.is_some_and(|event| {
                draft.raw_content().is_ok_and(|new| new.get() == event.parsed.content.get())
            }) {
                return Ok(());
            }
            change.add(inner.rooms.signer(), &draft, None)?;
            Ok(())
        });
        left_out(renewed.await)?;
    }
    Ok(())
}

/// Leaves every room that the user is in, and refuses every invitation: their account ends.
pub(crate) async fn leave_all(app: &App, user: UserNum, user_id: &UserId) -> Result<()> {
    let snapshot = app.store.snapshot();
    let is_erased = accounts::users::require(&*snapshot, user)?.is_erased;
    let mut rooms = Vec::new();
    for row in members::list_user_rooms(&*snapshot, user)? {
        let (room, row) = row?;
        if is_erased || matches!(row.membership, Membership::Join | Membership::Invite | Membership::Knock) {
            rooms.push(room);
        }
    }
    drop(snapshot);
    for room in rooms {
        let (inner, user_id) = (app.clone(), user_id.to_owned());
        let left = commit::in_room(app, room, move |change| {
            if is_erased {
                receipts::delete_all(&mut change.batch, room, user_id.as_str());
            }
            if !matches!(
                change.membership(user_id.as_str())?,
                Membership::Join | Membership::Invite | Membership::Knock
            ) {
                return Ok(());
            }
            let content = [("membership".to_owned(), "leave".into())].into();
            change.add(inner.rooms.signer(), &draft(&inner, &user_id, &user_id, content), None)?;
            Ok(())
        });
        left_out(left.await)?;
    }
    Ok(())
}

/// What one room refuses does not keep the others from it.
fn left_out(answer: Result<()>) -> Result<()> {
    match answer {
        Err(Error::Refused(_)) => Ok(()),
        other => other,
    }
}
