//! An invitation that is withdrawn, or a knock that is refused, where this server is not in the room: another server tells the member
//! event like any other of the room, and the room's state by which to judge it is not here.
//!
//! Such an event counts if the server that sends it signed it and if it names the invitation or the knock among the events that allow
//! it, which only servers know that are in the room. An invitation is withdrawn by who made it: whether somebody else has the power to
//! cannot be judged here.

use std::time::Duration;

use ruma::{OwnedServerName, ServerName, UserId};

use super::{
    judge::within,
    outside,
    verify::{self, Verified},
};
use crate::{
    accounts::users,
    error::{Error, Result},
    flows::App,
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        change::{
            Signed,
            outside::{self as told_outside, Told},
        },
        event, members,
    },
    schema::{
        event_types::MEMBER,
        rooms::{Membership, RoomRow},
    },
    store::Snapshot,
};

/// The end of what a user of ours is to a room from outside, as another server says it.
pub(super) struct Ended {
    row: RoomRow,
    user: UserNum,
    /// The number of the invitation or the knock that it ends.
    number: u64,
    pub(super) signed: Signed,
}

/// Reads an event of a room that this server is not in, which may end what a user of ours is to it. `None` for any other event.
pub(super) fn read(
    snapshot: &Snapshot,
    us: &ServerName,
    origin: &ServerName,
    room: RoomNum,
    pdu: &[u8],
) -> Result<Option<Ended>> {
    let Some(row) = rooms::find_row(snapshot, room)? else { return Ok(None) };
    let Ok(signed) = Signed::read(room, &row, pdu) else { return Ok(None) };
    let event = signed.unverified();
    let membership = event::membership_of(event.content.get());
    if !matches!(membership, Some(Membership::Leave | Membership::Ban)) {
        return Ok(None);
    }
    let target = event.state_key.as_deref().and_then(|key| <&UserId>::try_from(key).ok());
    let Some(target) = target.filter(|user| user.server_name() == us) else { return Ok(None) };
    if event.event_type.to_string() != MEMBER || event.sender.server_name() != origin {
        return Ok(None);
    }
    let Some(user) = users::find_num(snapshot, target)? else { return Ok(None) };
    let now = members::find(snapshot, user, room)?;
    let now = now.filter(|now| matches!(now.membership, Membership::Invite | Membership::Knock));
    let Some(now) = now else { return Ok(None) };
    let Some(told) = told_outside::find(snapshot, room, user, &now)? else { return Ok(None) };
    if now.membership == Membership::Invite && told.sender != event.sender {
        return Ok(None);
    }
    let named = Signed::find_id(row.version, told.event.as_bytes());
    if !named.is_some_and(|id| event.auth.contains(&id)) {
        return Ok(None);
    }
    Ok(Some(Ended { row, user, number: told.number, signed }))
}

/// Tells the user, once the signatures are checked, unless they knocked again or were invited anew meanwhile. Gives the reason
/// where the event does not count.
pub(super) async fn tell(
    app: &App,
    origin: &OwnedServerName,
    ended: Ended,
    until: Duration,
) -> Result<Option<String>> {
    let Ended { row, user, number, signed } = ended;
    let checking = verify::verify(app, row.version, vec![signed]);
    let event = match within(app, Some(until), checking).await.transpose()?.and_then(|mut all| all.pop()) {
        Some(Verified::Received(event)) => event,
        Some(Verified::Forged(why)) => return Ok(Some(why.message)),
        Some(Verified::Later(_)) | None => {
            return Ok(Some("The keys of its sender cannot be had now.".to_owned()));
        }
    };
    // Whether a ban still holds is for the room to say when the user comes back.
    let told = Told {
        membership: Membership::Leave,
        sender: event.event().sender.to_string(),
        event: String::from_utf8_lossy(event.json()).into_owned(),
        state: Vec::new(),
    };
    match outside::set_after(app, (row.id, row.version), origin, user, told, Some(number)).await {
        Ok(()) => Ok(None),
        Err(Error::Remote { cause, .. }) => Ok(Some(cause)),
        Err(error) => Err(error),
    }
}
