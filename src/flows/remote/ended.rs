//! An invitation that is withdrawn, or a knock that is refused, where this server is not in the room: another server tells the member
//! event like any other of the room, and the room's state by which to judge it is not here.
//!
//! Such an event counts if the server that sends it signed it, if it names the invitation or the knock among the events that allow
//! it, which only servers know that are in the room, and if it is by who made the invitation, or for a knock by somebody of a server
//! that the answer to the knock showed to be in the room. Whether anybody else has the power to cannot be judged here.

use std::time::Duration;

use ruma::{OwnedServerName, OwnedUserId, ServerName};
use serde::Deserialize;

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
            outside::{self as told_outside, End, Told},
        },
        event, members,
    },
    schema::{
        event_types::MEMBER,
        remote::OutsideRow,
        rooms::{Membership, RoomRow},
    },
    store::Snapshot,
};

/// The end of what a user of ours is to a room from outside, as another server says it.
pub(super) struct Ended {
    row: RoomRow,
    user: UserNum,
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
    let Some((user, user_id, told)) = find_told(snapshot, us, room, pdu)? else { return Ok(None) };
    for standing in told_outside::list_standing(&told) {
        // Each was told with a word of its own on the version, by which its events are read.
        let row = RoomRow { version: standing.version_or(row.version), ..row.clone() };
        let Ok(signed) = Signed::read(room, &row, pdu) else { continue };
        let event = signed.unverified();
        let is_end = event.event_type.to_string() == MEMBER
            && matches!(event::membership_of(event.content.get()), Some(Membership::Leave | Membership::Ban))
            && event.state_key.as_deref() == Some(user_id.as_str())
            && event.sender.server_name() == origin;
        if is_end && told_outside::may_end(&told, &user_id, event.sender.as_str(), &event.auth, row.version) {
            return Ok(Some(Ended { row, user, signed }));
        }
    }
    Ok(None)
}

/// Finds the user of ours whom an event is about, if they are invited to the room from outside or have knocked at it.
fn find_told(
    snapshot: &Snapshot,
    us: &ServerName,
    room: RoomNum,
    pdu: &[u8],
) -> Result<Option<(UserNum, OwnedUserId, OutsideRow)>> {
    #[derive(Deserialize)]
    struct About {
        state_key: OwnedUserId,
    }
    let Ok(About { state_key: user_id }) = serde_json::from_slice(pdu) else { return Ok(None) };
    if user_id.server_name() != us {
        return Ok(None);
    }
    let Some(user) = users::find_num(snapshot, &user_id)? else { return Ok(None) };
    let now = members::find(snapshot, user, room)?;
    let now = now.filter(|now| matches!(now.membership, Membership::Invite | Membership::Knock));
    let told = now.map(|now| told_outside::find(snapshot, room, user, &now)).transpose()?.flatten();
    Ok(told.map(|told| (user, user_id, told)))
}

/// Tells the user, once the signatures are checked, unless they knocked again or were invited anew meanwhile. Gives the reason
/// where the event does not count.
pub(super) async fn tell(
    app: &App,
    origin: &OwnedServerName,
    ended: Ended,
    until: Duration,
) -> Result<Option<String>> {
    let Ended { row, user, signed } = ended;
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
        version: row.version,
        via: origin.to_string(),
        sender: event.event().sender.to_string(),
        event: String::from_utf8_lossy(event.json()).into_owned(),
        state: Vec::new(),
    };
    let end = End { told, names: event.event().auth.clone() };
    match outside::end(app, (row.id, row.version), origin, user, end).await {
        Ok(()) => {
            app.remote.withdrawn.note(app.env.now_ms(), user, origin);
            Ok(None)
        }
        Err(Error::Remote { cause, .. }) => Ok(Some(cause)),
        Err(error) => Err(error),
    }
}
