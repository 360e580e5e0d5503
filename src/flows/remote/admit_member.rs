//! Users of other servers come, go and knock by way of this server: their server asks for a template of the event, completes and
//! signs it, and sends it here (server-server API, "Joining Rooms", "Leaving Rooms", "Knocking upon a room"). This server tells
//! the others in the room, because the sender's server is not in it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use ruma::{
    OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, RoomVersionId, ServerName, UserId,
    api::error::{ErrorKind, IncompatibleRoomVersionErrorData},
};
use serde::Deserialize;

use super::{
    history,
    verify::{Verified, verify},
    whole_state::{Form, Walk, Wanted},
};
use crate::{
    error::{Error, Refusal, Result},
    flows::{App, commit, room::ingest},
    ids::{EventNum, RoomNum},
    json::{JsonText, Object},
    rooms::{
        self, acl,
        build::Draft,
        change::{Change, Outcome, Received, Signed, left_out},
        event::{self, Event, StoredEvent},
        membership::without_profile,
        vouch::{self, AUTHORISED_VIA, Admission},
    },
    schema,
    schema::{
        event_types::{AVATAR, CANONICAL_ALIAS, CREATE, ENCRYPTION, JOIN_RULES, MEMBER, NAME, TOPIC},
        rooms::{Membership, Resident, RoomRow},
    },
    store::{Fault, Snapshot},
};

/// A server whose event cannot be judged now is told to try again after this time.
const AGAIN: Duration = Duration::from_secs(10);
/// The state by which somebody who knocks recognizes the room.
const SHOWN: [&str; 7] = [CREATE, JOIN_RULES, NAME, AVATAR, TOPIC, CANONICAL_ALIAS, ENCRYPTION];

/// The change of membership by which a user of another server comes, goes or asks to be let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    /// They enter the room.
    Join,
    /// They leave it, refuse an invitation to it, or take back that they knocked.
    Leave,
    /// They ask to be let in.
    Knock,
}

impl Move {
    fn membership(self) -> Membership {
        match self {
            Self::Join => Membership::Join,
            Self::Leave => Membership::Leave,
            Self::Knock => Membership::Knock,
        }
    }
}

/// Opens a room for a server whose user wants to move. Errors: 404 `M_NOT_FOUND` for a room that this server does not follow;
/// [`Error::Busy`] for one that it will follow before long, or whose state it does not know whole; 403 `M_FORBIDDEN` for a server that the room does not admit.
pub(super) fn open(snapshot: &Snapshot, origin: &ServerName, room: &RoomId) -> Result<(RoomNum, RoomRow)> {
    let unknown = || Error::from(Refusal::not_found("This server is not in such a room."));
    let num = rooms::find_room(snapshot, room)?.ok_or_else(unknown)?;
    let row = rooms::find_row(snapshot, num)?.ok_or_else(unknown)?;
    match row.resident {
        Resident::Yes => {}
        Resident::Joining => return Err(Error::Busy { retry_after: AGAIN }),
        // Who is banned may be unknown, and nobody could be given the room's state: another server is to be asked.
        Resident::Partial => return Err(unknown()),
        Resident::No | Resident::Invited | Resident::Knocked | Resident::Left => return Err(unknown()),
    }
    if !vouch::is_current(snapshot, num)? {
        return Err(unknown());
    }
    if !acl::admits(snapshot, num, origin)? {
        return Err(Refusal::forbidden("The room does not admit your server.").into());
    }
    left_out::require_whole(snapshot, num)?;
    Ok((num, row))
}

/// Makes the template of an event by which a user moves. `versions` are the room versions that the other server speaks, where
/// it says so. Gives the answer's JSON.
///
/// Errors: as for [`open`]; 403 `M_FORBIDDEN` for a user of another server, and for a move that the room does not allow; 400
/// `M_INCOMPATIBLE_ROOM_VERSION`, `M_UNABLE_TO_AUTHORISE_JOIN` and `M_UNABLE_TO_GRANT_JOIN`.
pub(crate) async fn template(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    user: OwnedUserId,
    wanted: Move,
    versions: Option<Vec<String>>,
) -> Result<Bytes> {
    if user.server_name() != origin {
        return Err(Refusal::forbidden("The user in the path is not one of your server.").into());
    }
    let (num, row) = open(&app.store.snapshot(), origin, room)?;
    let version = row.version.to_string();
    if versions.is_some_and(|versions| !versions.contains(&version)) {
        return Err(incompatible(&version).into());
    }
    let owned = app.clone();
    let event = commit::in_room(app, num, move |change| {
        let server = owned.rooms.signer().server();
        let mut content = without_profile(wanted.membership().as_str(), None);
        if wanted == Move::Join
            && let Some(voucher) = admission(change, server, &user)?
        {
            content.insert(AUTHORISED_VIA.to_owned(), voucher.as_str().into());
        }
        let draft = Draft::state(user.clone(), MEMBER, user.as_str(), content, owned.env.event_ms());
        change.template(&draft, server)
    });
    let event = event.await?;
    let mut answer = Object::new();
    answer.json("event", &event);
    answer.text("room_version", &version);
    Ok(answer.finish().into())
}

fn incompatible(version: &str) -> Refusal {
    let message = format!("The room has version {version}, which your server does not say that it speaks.");
    match RoomVersionId::try_from(version) {
        Ok(version) => {
            let data = IncompatibleRoomVersionErrorData::new(version);
            Refusal::new(ErrorKind::IncompatibleRoomVersion(data), message)
        }
        Err(_) => Refusal::new(ErrorKind::UnsupportedRoomVersion, message),
    }
}

/// Finds the user of ours in whose name this server vouches for a user who joins; `None` where nobody needs to. Refuses a
/// user whom the room's conditions do not admit, and one whom this server cannot vouch for.
fn admission(change: &mut Change, server: &ServerName, user: &UserId) -> Result<Option<OwnedUserId>> {
    match change.membership(user.as_str())? {
        Membership::Join | Membership::Invite => return Ok(None),
        Membership::Ban => return Err(Refusal::forbidden("The user is banned from the room.").into()),
        Membership::Leave | Membership::Knock => {}
    }
    match vouch::judge(change, server, user)? {
        Admission::NoConditions => Ok(None),
        Admission::Vouched(voucher) => Ok(Some(voucher)),
        Admission::NoVoucher => Err(Refusal::new(
            ErrorKind::UnableToGrantJoin,
            "Nobody of this server may invite to the room; ask another server that is in it.",
        )
        .into()),
        Admission::Unchecked => Err(Refusal::new(
            ErrorKind::UnableToAuthorizeJoin,
            "This server cannot check all of the room's conditions; ask another server that is in it.",
        )
        .into()),
        Admission::Unmet => {
            Err(Refusal::forbidden("The user is in none of the rooms whose members the room admits.").into())
        }
    }
}

/// An event that another server sends because one of its users moves.
pub(crate) struct Sent {
    /// The server that sends it.
    pub(crate) origin: OwnedServerName,
    /// The room in the path.
    pub(crate) room: OwnedRoomId,
    /// The event's id in the path, which is no id at all if it is not that of the event.
    pub(crate) id: String,
    /// The event, as it came.
    pub(crate) json: Bytes,
}

/// A room that an event has come into.
struct Entered {
    snapshot: Arc<Snapshot>,
    num: RoomNum,
    row: RoomRow,
    event: EventNum,
}

/// Takes in an event by which a user moves; answers when it is durable and visible. An event that this server has already is
/// answered in the same way, because the other server may not have got the first answer.
///
/// Errors: as for [`open`]; 400 `M_BAD_JSON` for what is no event of the room's version, and `M_INVALID_PARAM` for one that is not as it
/// must be; 403 `M_FORBIDDEN` for one that is of another server's user or not signed, and for one that the room does not allow; for joins
/// of restricted rooms as for [`template`].
async fn enter(app: &App, sent: Sent, wanted: Move) -> Result<Entered> {
    let Sent { origin, room, id, json } = sent;
    let (num, row) = open(&app.store.snapshot(), &origin, &room)?;
    let (owned, of_room) = (app.clone(), row.clone());
    let read = move || read(&owned, num, &of_room, &json, wanted);
    let (signed, voucher) = app.env.blocking(read).await?;
    check(signed.unverified(), &origin, &id, wanted)?;
    if signed.is_redacted() {
        return Err(Refusal::invalid_param("`hashes` does not fit the event.").into());
    }
    let event = match verify(app, row.version, vec![signed]).await?.pop() {
        Some(Verified::Received(event)) => event.let_in(),
        Some(Verified::Forged(why)) => return Err(why.into()),
        Some(Verified::Later(server)) => {
            tracing::debug!(%server, "a move is to be sent again: the keys of this server cannot be had now");
            return Err(Error::Busy { retry_after: AGAIN });
        }
        None => return Err(Error::broken("an event got no verdict")),
    };
    // The server vouches for a condition that must still hold, as it did when the template was made.
    if voucher.is_some() && !is_known(app, num, &event)? {
        let (user, server) = (event.event().sender.clone(), app.config.server.name.clone());
        commit::in_room(app, num, move |change| admission(change, &server, &user).map(drop)).await?;
    }
    let event = take_in(app, num, event).await?;
    let snapshot = app.store.snapshot();
    Ok(Entered { row: rooms::require_row(&*snapshot, num)?, snapshot, num, event })
}

fn is_known(app: &App, room: RoomNum, event: &Received) -> Result<bool, Fault> {
    Ok(event::find_key(&*app.store.snapshot(), room, &event.key(room))?.is_some())
}

/// Reads an event, with this server's signature added where the event says that a user of ours vouches for the sender. Gives
/// that user, too.
fn read(
    app: &App,
    num: RoomNum,
    row: &RoomRow,
    json: &[u8],
    wanted: Move,
) -> Result<(Signed, Option<OwnedUserId>)> {
    #[derive(Deserialize)]
    struct Content {
        join_authorised_via_users_server: Option<OwnedUserId>,
    }
    #[derive(Deserialize)]
    struct Vouched {
        content: Content,
    }
    let rules = rooms::rules(row)?;
    let mut voucher = None;
    if wanted == Move::Join && rules.signatures.check_join_authorised_via_users_server {
        let vouched = serde_json::from_slice::<Vouched>(json).ok();
        voucher = vouched.and_then(|vouched| vouched.content.join_authorised_via_users_server);
        voucher = voucher.filter(|voucher| voucher.server_name() == app.config.server.name);
    }
    let signed = match &voucher {
        Some(_) => {
            let countersigned = app.rooms.signer().countersign(json, rules)?;
            Signed::read(num, row, &countersigned)?
        }
        None => Signed::read(num, row, json)?,
    };
    Ok((signed, voucher))
}

/// Refuses an event that is not such a move: 400 `M_INVALID_PARAM`; and the move of a user of another server: 403 `M_FORBIDDEN`.
fn check(event: &Event, origin: &ServerName, id: &str, wanted: Move) -> Result<(), Refusal> {
    let membership = wanted.membership();
    let why = if event.id != id {
        "The event has another id than the path says.".to_owned()
    } else if event.event_type.to_string() != MEMBER {
        "`type` is not `m.room.member`.".to_owned()
    } else if event::membership_of(event.content.get()) != Some(membership) {
        format!("`membership` is not `{}`.", membership.as_str())
    } else if event.sender.server_name() != origin {
        return Err(Refusal::forbidden("`sender` is not a user of your server."));
    } else if event.state_key.as_deref() != Some(event.sender.as_str()) {
        "`state_key` is not the event's sender.".to_owned()
    } else {
        return Ok(());
    };
    Err(Refusal::invalid_param(why))
}

/// Has the room judge an event, and gives its number where it is part of the room.
async fn take_in(app: &App, room: RoomNum, event: Received) -> Result<EventNum> {
    let refused =
        |why: &str| Error::from(Refusal::forbidden(format!("The room does not allow this: {why}.")));
    let outcome = ingest::ingest(app, room, vec![event.clone()]).await?.pop();
    match outcome {
        Some(Outcome::Accepted(stored)) => Ok(stored.event()),
        Some(Outcome::Known(known)) => {
            let snapshot = app.store.snapshot();
            let (row, kept) =
                (rooms::require_row(&*snapshot, room)?, event::require_kept(&*snapshot, room, known)?);
            if !event.is_in(&kept.row, rooms::rules(&row)?) {
                return Err(Refusal::invalid_param("The room has another event with the event's id.").into());
            }
            match schema::ASIDE.get(&*snapshot, (room, known))? {
                None => Ok(known),
                Some(aside) => Err(refused(&aside.why)),
            }
        }
        Some(Outcome::Aside(_, why)) => Err(refused(&why)),
        Some(Outcome::Need { .. }) => Err(Refusal::invalid_param(
            "`prev_events` or `auth_events` names events that this server does not have; ask for a template first.",
        )
        .into()),
        Some(Outcome::Outlier(_) | Outcome::Unknown | Outcome::Held) | None => Err(Error::Busy { retry_after: AGAIN }),
    }
}

/// Lets a user join. Gives the first piece of the answer: the event, the state before it and all that allowed these.
pub(crate) async fn join(
    app: &App,
    sent: Sent,
    omit_members: bool,
    form: Form,
) -> Result<(Bytes, Option<Walk>)> {
    let origin = sent.origin.clone();
    let entered = enter(app, sent, Move::Join).await?;
    let owned = app.clone();
    app.env
        .blocking(move || {
            let Entered { snapshot, num, row, event } = entered;
            let stored = event::require(&*snapshot, num, event)?;
            let at = history::state_before(&snapshot, num, &stored)?
                .ok_or_else(|| Error::broken("a join has no place in its room"))?;
            let sender = OwnedUserId::try_from(&*stored.row.sender()).ok();
            let wanted = Wanted {
                to: &origin,
                at,
                name: "state",
                with: &stored.row.header.auth,
                without_members_for: sender.as_deref().filter(|_| omit_members),
                event: Some(&stored),
                form,
            };
            Walk::begin(&owned, &snapshot, num, &row, &wanted)?.piece(&snapshot)
        })
        .await
}

/// Lets a user leave, refuse an invitation, or take back that they knocked.
pub(crate) async fn leave(app: &App, sent: Sent) -> Result<()> {
    enter(app, sent, Move::Leave).await.map(drop)
}

/// Lets a user knock. Gives the events by which they recognize the room, whole, so that their server can check them.
pub(crate) async fn knock(app: &App, sent: Sent) -> Result<Vec<JsonText>> {
    let Entered { snapshot, num, .. } = enter(app, sent, Move::Knock).await?;
    let mut shown = Vec::with_capacity(SHOWN.len());
    for event_type in SHOWN {
        let stored: Option<StoredEvent> = rooms::find_state(&*snapshot, num, event_type, "")?;
        shown.extend(stored.map(|stored| JsonText::stored(&stored.row.json)));
    }
    Ok(shown)
}
