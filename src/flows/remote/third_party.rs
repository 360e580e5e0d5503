//! Invitations of people by an address: their server, which learns from an identity server who they are, asks the server of the
//! inviter to make the invitation (server-server API, "Third-party invites").

use ruma::{CanonicalJsonObject, CanonicalJsonValue, OwnedRoomId, OwnedUserId, RoomId, ServerName};
use serde::Deserialize;

use super::{admit_member, invite};
use crate::{
    accounts::users,
    error::{Error, Refusal, Result},
    flows::App,
    rooms::{self, change::Change, membership::without_profile, policy::Author},
    schema::{
        event_types::{MEMBER, THIRD_PARTY_INVITE},
        rooms::Membership,
    },
};

/// The part of an invitation that the invited user's server knows.
#[derive(Deserialize)]
pub(crate) struct Partial {
    #[serde(rename = "type")]
    event_type: String,
    /// Some servers leave it to the path.
    room_id: Option<OwnedRoomId>,
    sender: OwnedUserId,
    state_key: OwnedUserId,
    content: Content,
}

#[derive(Deserialize)]
struct Content {
    membership: String,
    third_party_invite: ThirdParty,
}

#[derive(Deserialize)]
struct ThirdParty {
    signed: CanonicalJsonObject,
}

/// Invites a user whom one of ours invited by an address. An identity server has signed who has that address, and the rules of
/// the room check its signature.
///
/// Errors: 400 `M_INVALID_PARAM` for what is no such invitation; 403 `M_FORBIDDEN` where nobody of ours has invited by this token,
/// and for a user of another server than the one that asks; otherwise as for [`admit_member::open`] and [`invite::send`].
pub(crate) async fn exchange(app: &App, origin: &ServerName, room: &RoomId, partial: Partial) -> Result<()> {
    let invalid = |why: &str| Error::from(Refusal::invalid_param(why));
    let Partial { event_type, room_id, sender, state_key: target, content } = partial;
    let Content { membership, third_party_invite: ThirdParty { signed } } = content;
    let text = |field: &str| signed.get(field).and_then(CanonicalJsonValue::as_str).map(str::to_owned);
    let token = text("token").ok_or_else(|| invalid("`signed` has no `token`."))?;
    if event_type != MEMBER || membership != Membership::Invite.as_str() {
        return Err(invalid("The event is no invitation: `type` or `membership` says otherwise."));
    }
    if room_id.is_some_and(|id| id != room) {
        return Err(invalid("`room_id` is not the room in the path."));
    }
    if text("mxid").as_deref() != Some(target.as_str()) {
        return Err(invalid("`mxid` in `signed` is not the user whom `state_key` names."));
    }
    if target.server_name() != origin {
        return Err(Refusal::forbidden("The invited user is not one of your server.").into());
    }
    let snapshot = app.store.snapshot();
    let (num, _) = admit_member::open(&snapshot, origin, room)?;
    let not_ours = || Error::from(Refusal::forbidden("`sender` is no user of this server who invited them."));
    let user = users::find_num(&*snapshot, &sender)?.ok_or_else(not_ours)?;
    let author = Author::of(&*snapshot, user)?;
    let member = rooms::find_state(&*snapshot, num, MEMBER, target.as_str())?;
    if member.and_then(|member| member.membership()) == Some(Membership::Invite) {
        // The invitation stands, so that a request which is repeated has nothing to do.
        return Ok(());
    }
    drop(snapshot);
    let content = move |change: &mut Change| {
        let invited = change.state(THIRD_PARTY_INVITE, &token)?;
        let invited = invited.filter(|event| event.parsed.sender == sender).ok_or_else(not_ours)?;
        let told: CanonicalJsonObject = serde_json::from_str(invited.parsed.content.get())
            .map_err(|_| Error::from(Refusal::forbidden("The invitation by an address cannot be read.")))?;
        let mut third_party =
            CanonicalJsonObject::from([("signed".to_owned(), CanonicalJsonValue::Object(signed))]);
        if let Some(name @ CanonicalJsonValue::String(_)) = told.get("display_name") {
            third_party.insert("display_name".to_owned(), name.clone());
        }
        let mut content = without_profile(Membership::Invite.as_str(), None);
        content.insert("third_party_invite".to_owned(), CanonicalJsonValue::Object(third_party));
        Ok(content)
    };
    invite::send(app, num, &author, &target, content).await.map(drop)
}
