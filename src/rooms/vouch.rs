//! Vouching for users who enter a restricted room: a server that is in it says with its signature that the user meets one of
//! the conditions, in the name of a user of its own who may invite (client-server API, "Restricted rooms").

use ruma::{OwnedRoomId, OwnedUserId, ServerName, UserId};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    accounts::users,
    error::Result,
    ids::RoomNum,
    rooms::{self, change::Change, members, power::Action},
    schema::event_types::{JOIN_RULES, MEMBER},
    schema::rooms::{Membership, Resident},
    store::{Fault, Read},
};

/// The field by which a server vouches for a user who enters a restricted room. Nobody but the server may set it.
pub const AUTHORISED_VIA: &str = "join_authorised_via_users_server";

/// The way in which a room's conditions admit a user who is neither in it nor invited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The room has no conditions that its version knows.
    NoConditions,
    /// The user meets a condition, and this user of ours may say so.
    Vouched(OwnedUserId),
    /// The user meets a condition, but nobody of ours in the room may invite.
    NoVoucher,
    /// The user meets none of the conditions that can be checked here, and some cannot.
    Unchecked,
    /// The user meets none of the conditions.
    Unmet,
}

#[derive(Deserialize)]
struct JoinRules {
    join_rule: String,
    /// The conditions under which the room admits somebody. Each is read by itself, so that one that this server does not
    /// know closes the room to nobody whom another admits.
    #[serde(default)]
    allow: Value,
}

#[derive(Deserialize)]
struct Allow {
    #[serde(rename = "type")]
    condition: String,
    room_id: OwnedRoomId,
}

/// Judges by the conditions of a room whether this server, by its name, may vouch for a user of any server.
pub fn judge(change: &mut Change, server: &ServerName, user: &UserId) -> Result<Admission> {
    let authorization = &change.rules().authorization;
    let rules = change.state(JOIN_RULES, "")?;
    let rules = rules.and_then(|event| serde_json::from_str::<JoinRules>(event.parsed.content.get()).ok());
    let is_restricted = rules.as_ref().is_some_and(|rules| match rules.join_rule.as_str() {
        "restricted" => authorization.restricted_join_rule,
        "knock_restricted" => authorization.knock_restricted_join_rule,
        _ => false,
    });
    let Some(rules) = rules.filter(|_| is_restricted) else { return Ok(Admission::NoConditions) };
    let conditions = if let Value::Array(conditions) = rules.allow { conditions } else { Vec::new() };
    let mut unmet = Admission::Unmet;
    for condition in conditions {
        match is_in(&change.batch, server, user, condition)? {
            Some(true) => return Ok(find_voucher(change)?.map_or(Admission::NoVoucher, Admission::Vouched)),
            Some(false) => {}
            None => unmet = Admission::Unchecked,
        }
    }
    Ok(unmet)
}

/// Whether the user is in the room that a condition names; `None` for a condition that cannot be checked here: it is of another
/// kind, or of a room that this server is not in.
fn is_in(
    read: &(impl Read + ?Sized),
    server: &ServerName,
    user: &UserId,
    condition: Value,
) -> Result<Option<bool>, Fault> {
    let Ok(condition) = serde_json::from_value::<Allow>(condition) else { return Ok(None) };
    if condition.condition != "m.room_membership" {
        return Ok(None);
    }
    let Some(room) = rooms::find_room(read, &condition.room_id)? else { return Ok(None) };
    if user.server_name() == server {
        let user = users::find_num(read, user)?;
        return user.map(|user| members::is_joined(read, user, room)).transpose();
    }
    if !is_current(read, room)? {
        return Ok(None);
    }
    let member = rooms::find_state(read, room, MEMBER, user.as_str())?;
    Ok(Some(member.is_some_and(|member| member.membership() == Some(Membership::Join))))
}

/// Whether this server follows a room: it has its whole state and somebody in it, so that it hears of every change.
pub fn is_current(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    let is_in = rooms::find_row(read, room)?.is_some_and(|row| row.resident == Resident::Yes);
    Ok(is_in && members::joined_local_users(read, room)?.next().transpose()?.is_some())
}

/// Finds a user of this server who is in the room and may invite.
fn find_voucher(change: &mut Change) -> Result<Option<OwnedUserId>> {
    let power = change.power()?;
    match power.list_named_who_may(Action::Invite)? {
        // Everybody has a sufficient level, so nearly always the first member will do.
        None => {
            for local in members::joined_local_users(&change.batch, change.num)? {
                let user_id = users::require(&change.batch, local?)?.user_id;
                if power.may(&user_id, Action::Invite)? {
                    return Ok(Some(user_id));
                }
            }
            Ok(None)
        }
        Some(named) => {
            for user_id in named {
                let local = users::find_num(&change.batch, &user_id)?;
                if let Some(local) = local
                    && members::is_joined(&change.batch, local, change.num)?
                {
                    return Ok(Some(user_id));
                }
            }
            Ok(None)
        }
    }
}
