//! The part of coming and going that is decided without waiting: the content of a member event, and the membership that
//! follows from an act.

use ruma::{CanonicalJsonObject, CanonicalJsonValue, UserId, api::error::ErrorKind};

use crate::{
    accounts::users,
    error::{Exception, Refusal, Result},
    schema::{self, rooms::Membership},
    store::{Fault, Read},
};

/// Gives the content of a member event about this user, with their profile if they are one of ours.
pub fn content(
    read: &(impl Read + ?Sized),
    user_id: &UserId,
    membership: &str,
    reason: Option<&str>,
) -> Result<CanonicalJsonObject, Fault> {
    let mut content = without_profile(membership, reason);
    if let Some(user) = users::find_num(read, user_id)? {
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

/// Gives the content of a member event by which somebody goes or stays away, which shows no profile.
pub fn without_profile(membership: &str, reason: Option<&str>) -> CanonicalJsonObject {
    let mut content = CanonicalJsonObject::from([("membership".to_owned(), membership.into())]);
    if let Some(reason) = reason {
        content.insert("reason".to_owned(), reason.into());
    }
    content
}

/// An act by which somebody changes the membership of somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Asks them to come into the room.
    Invite,
    /// Puts them out of the room; they may come back as the join rules allow.
    Kick,
    /// Keeps them out of the room until they are unbanned.
    Ban,
    /// Takes back a ban, so that they may come back.
    Unban,
}

impl Act {
    /// Gives the membership after the act on somebody whose membership was this. Errors: 403 `M_FORBIDDEN` or
    /// `M_BAD_STATE` where there is nothing to do.
    pub fn outcome(self, was: Membership) -> Result<&'static str, Refusal> {
        match (self, was) {
            (Self::Invite, Membership::Join) => Err(Refusal::forbidden("The user is in the room already.")),
            (Self::Invite, _) => Ok("invite"),
            (Self::Kick, Membership::Join | Membership::Invite | Membership::Knock) => Ok("leave"),
            (Self::Kick, Membership::Leave | Membership::Ban) => {
                Err(Refusal::forbidden("The user is not in the room."))
            }
            // A second ban may change the reason.
            (Self::Ban, _) => Ok("ban"),
            (Self::Unban, Membership::Ban) => Ok("leave"),
            (Self::Unban, _) => {
                Err(Refusal::new(ErrorKind::BadState, "The user is not banned from the room.")
                    .exception(Exception::Forbidden))
            }
        }
    }
}
