//! Invitations between servers (server-server API, "Inviting to a room"): another server invites a user of ours to a room, or one
//! of ours invites a user of another server.

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use bytes::Bytes;
use federation::call::Options;
use ruma::{
    CanonicalJsonObject, EventId, OwnedRoomId, OwnedUserId, RoomVersionId, ServerName, UserId,
    api::{
        error::{ErrorKind, IncompatibleRoomVersionErrorData},
        federation::membership::{RawStrippedState, create_invite},
    },
};
use serde_json::value::RawValue;

use crate::{
    accounts::{invites, users},
    error::{Error, Refusal, Result},
    flows::{
        App, commit, own_events,
        remote::{
            ask::{at_fault, failed},
            hand_over::{is_unknown, put},
            outside,
            verify::{self, Verified},
        },
        room::ingest,
    },
    ids::{RoomNum, UserNum},
    json::JsonRef,
    rooms::{
        self, acl,
        build::Draft,
        change::{Change, Outcome, Signed, outside::Told},
        event::{self, StoredEvent},
        members,
        policy::{self, Author},
        versions,
    },
    schema::{
        event_types::{AVATAR, CANONICAL_ALIAS, CREATE, ENCRYPTION, JOIN_RULES, MEMBER, NAME, TOPIC},
        rooms::{Membership, Resident, RoomRow},
    },
};

/// An invitation comes with at most this many events that tell which room it is to.
const STATE_MAX: usize = 100;
/// They have at most this many bytes together.
const STATE_BYTES_MAX: usize = 256 << 10;
/// A server that withdrew too many invitations of a user may try again after this time.
const WITHDREW_AGAIN: Duration = Duration::from_secs(60 * 60);
/// From this room version on, the events that tell which room it is must be whole and signed.
const WHOLE_STATE_FROM: u8 = 12;

/// The state that tells somebody outside which room this is.
const TELLING: [&str; 7] = [CREATE, NAME, AVATAR, TOPIC, JOIN_RULES, CANONICAL_ALIAS, ENCRYPTION];

/// An invitation as another server sends it.
pub(crate) struct Coming {
    pub(crate) room_id: OwnedRoomId,
    pub(crate) event_id: ruma::OwnedEventId,
    pub(crate) version: RoomVersionId,
    pub(crate) event: Box<RawValue>,
    pub(crate) state: Vec<Box<RawValue>>,
}

/// The refusal of a room version that this server does not speak: 400 `M_INCOMPATIBLE_ROOM_VERSION`.
pub(crate) fn incompatible(version: RoomVersionId) -> Refusal {
    let why = format!("This server does not know room version {version}.");
    Refusal::new(ErrorKind::IncompatibleRoomVersion(IncompatibleRoomVersionErrorData::new(version)), why)
}

/// Gives the version of the room of an invitation that does not name it: the first form of the endpoint is for rooms of versions 1 and
/// 2 alone, and an invitation to either is the same.
pub(crate) fn version_in(state: &[Box<RawValue>]) -> RoomVersionId {
    #[derive(serde::Deserialize)]
    struct Create<'a> {
        #[serde(borrow, rename = "type")]
        event_type: Cow<'a, str>,
        content: Version,
    }
    #[derive(serde::Deserialize)]
    struct Version {
        room_version: RoomVersionId,
    }
    let is_second = state.iter().any(|event| {
        serde_json::from_str::<Create<'_>>(event.get()).is_ok_and(|create| {
            create.event_type == CREATE && create.content.room_version == RoomVersionId::V2
        })
    });
    if is_second { RoomVersionId::V2 } else { RoomVersionId::V1 }
}

/// Takes an invitation of a user of ours by another server, and gives the event with our signature. Errors: 400
/// `M_BAD_JSON` for what is no event of the room's version, `M_INVALID_PARAM` for what is no such invitation,
/// `M_INCOMPATIBLE_ROOM_VERSION`; 403 `M_FORBIDDEN`, `M_INVITE_BLOCKED`; 404 for a user who is not here; 429 where too many invitations wait for the user.
pub(crate) async fn receive(app: &App, origin: &ServerName, coming: Coming) -> Result<Box<RawValue>> {
    let version = versions::number(&coming.version).ok_or_else(|| incompatible(coming.version.clone()))?;
    if !versions::may_have_id(version, &coming.room_id) {
        return Err(invalid("`room_version` is one whose rooms have no such id").into());
    }
    let bytes: usize = coming.state.iter().map(|event| event.get().len()).sum();
    if coming.state.len() > STATE_MAX || bytes > STATE_BYTES_MAX {
        return Err(invalid("`invite_room_state` has at most 100 events and 262,144 bytes").into());
    }
    let row = RoomRow::new(coming.room_id.clone(), version, Resident::Invited);
    let signed = Signed::read(RoomNum(0), &row, coming.event.get().as_bytes())
        .map_err(|why| Refusal::new(why.kind, format!("`event` is not accepted: {}", why.message)))?;
    let target = judge(app, origin, &coming.event_id, &signed)?;
    let sender = signed.unverified().sender.to_string();
    let user = find_target(app, origin, &coming, (&target, &signed.unverified().sender))?;
    if app.remote.withdrawn.is_too_much(app.env.now_ms(), user, origin) {
        tracing::debug!(%user, %origin, "an invitation is refused: its server withdrew too many today");
        return Err(Error::Busy { retry_after: WITHDREW_AGAIN });
    }
    let json: Bytes = signed.cosigned(app.rooms.signer())?;
    match verify::verify(app, version, vec![signed]).await?.pop() {
        Some(Verified::Received(_)) => {}
        Some(Verified::Later(_)) => {
            return Err(Error::Busy { retry_after: Duration::from_secs(60) });
        }
        Some(Verified::Forged(why)) => return Err(why.into()),
        None => return Err(Error::broken("an event was not verified")),
    }
    let whole = check_state(app, &row, &coming.state).await?;
    let answer = RawValue::from_string(String::from_utf8_lossy(&json).into_owned());
    let answer = answer.map_err(|error| Error::broken(format!("an event is no JSON: {error}")))?;
    let snapshot = app.store.snapshot();
    if let Some(num) = rooms::find_room(&*snapshot, &coming.room_id)?
        && members::is_server_joined(&*snapshot, num, app.config.server.name.as_str())?
    {
        // The room itself brings the event.
        return Ok(answer);
    }
    if rooms::is_known_otherwise(&*snapshot, &coming.room_id, version)? {
        // It comes to nothing, and is answered as for a room that nobody here knows: whether one does is told to no stranger.
        return Ok(answer);
    }
    drop(snapshot);
    let mut state: Vec<String> = match whole {
        Some(whole) => whole,
        None => coming.state.iter().filter_map(|event| shown(event)).collect(),
    };
    state.extend(shown(&coming.event));
    let (membership, via, event) = (Membership::Invite, origin.to_string(), answer.get().to_owned());
    let told = Told { membership, version, via, sender, event, state };
    let named = (coming.room_id, version);
    outside::set(app, named, origin, user, told).await?;
    Ok(answer)
}

fn invalid(why: &str) -> Refusal {
    Refusal::invalid_param(format!("The invitation is not accepted: {why}."))
}

/// Holds an event to what an invitation of a user of ours by a user of that server is, so that nothing else gets our
/// signature. Gives the user who is invited.
fn judge(app: &App, origin: &ServerName, id: &EventId, signed: &Signed) -> Result<OwnedUserId> {
    let event = signed.unverified();
    let target = event.state_key.as_deref().and_then(|user| OwnedUserId::try_from(user).ok());
    let us = &app.config.server.name;
    let target = target.filter(|user| user.server_name() == us);
    let is_member = event.event_type.to_string() == MEMBER;
    let is_invite = event::membership_of(event.content.get()) == Some(Membership::Invite);
    // In versions 1 and 2 the sender's server could have us sign an event under an id of ours, or of a third server.
    let is_of_sender = event.id.server_name().is_none_or(|server| server == event.sender.server_name());
    let why = match target {
        _ if event.id != *id => "its id is not that of the path",
        _ if !is_of_sender => "its id is not one of its sender's server",
        _ if signed.is_redacted() => "its content is not that of its hash",
        _ if !is_member || !is_invite => "it is no member event whose membership is invite",
        _ if event.sender.server_name() != origin => "its sender is not a user of your server",
        None => "its state key is not a user of this server",
        Some(target) => return Ok(target),
    };
    Err(invalid(why).into())
}

/// Finds the account that is invited, and refuses what the user or the room does not want.
fn find_target(
    app: &App,
    origin: &ServerName,
    coming: &Coming,
    (target, sender): (&UserId, &UserId),
) -> Result<UserNum> {
    let snapshot = app.store.snapshot();
    let room = rooms::find_room(&*snapshot, &coming.room_id)?;
    // A server that the room shuts out is not told who is here, either.
    if let Some(num) = room
        && !acl::admits(&*snapshot, num, origin)?
    {
        return Err(Refusal::forbidden("The room does not admit your server.").into());
    }
    let user = users::require_num(&*snapshot, target)?;
    // Guests are invited like others: whether they may join, the room says when they do.
    if users::require(&*snapshot, user)?.is_deactivated {
        return Err(Refusal::forbidden("This user cannot be invited.").into());
    }
    invites::check(&*snapshot, target, sender)?;
    // It is looked at again when the invitation is written; here it spares the work before that.
    outside::require_room(&*snapshot, (user, origin), room, true)?;
    Ok(user)
}

/// Checks the events that tell which room it is, where the room's version has them whole, and gives those that are right as clients
/// see them. `None` for older versions, in which they are anybody's word.
pub(super) async fn check_state(
    app: &App,
    row: &RoomRow,
    state: &[Box<RawValue>],
) -> Result<Option<Vec<String>>> {
    if row.version < WHOLE_STATE_FROM {
        return Ok(None);
    }
    let mut signed = Vec::with_capacity(state.len());
    for event in state {
        let event = Signed::read(RoomNum(0), row, event.get().as_bytes());
        let event = event.map_err(|why| {
            invalid(&format!("`invite_room_state` has an event that is wrong: {}", why.message))
        })?;
        signed.push(event);
    }
    // The id of such a room is the hash of its create event, whoever tells it.
    let create_id = row.id.as_str().replacen('!', "$", 1);
    let is_create = |event: &Signed| {
        let event = event.unverified();
        event.event_type.to_string() == CREATE && event.state_key.as_deref() == Some("")
    };
    if signed.iter().any(|event| is_create(event) && event.unverified().id.as_str() != create_id) {
        return Err(invalid("`invite_room_state` has the create event of another room").into());
    }
    if !signed.iter().any(|event| is_create(event) && !event.is_redacted()) {
        return Err(invalid("`invite_room_state` has no `m.room.create` of the room").into());
    }
    let creates: Vec<bool> = signed.iter().map(is_create).collect();
    let verified = verify::verify(app, row.version, signed).await?;
    let mut right = Vec::with_capacity(state.len());
    for ((event, verified), is_create) in state.iter().zip(verified).zip(creates) {
        match verified {
            Verified::Received(_) => right.extend(shown(event)),
            // A server whose keys cannot be had now forges no create event, because the room's id is its hash.
            Verified::Later(_) if is_create => right.extend(shown(event)),
            Verified::Later(_) => {}
            Verified::Forged(why) => {
                return Err(
                    invalid(&format!("`invite_room_state` has a forged event: {}", why.message)).into()
                );
            }
        }
    }
    Ok(Some(right))
}

/// An event that another server tells, as clients see it who are outside the room. The create event stays whole. `None` for what
/// is no state event.
pub(super) fn shown(event: &RawValue) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Fields<'a> {
        #[serde(borrow)]
        content: &'a RawValue,
        #[serde(borrow)]
        sender: &'a RawValue,
        #[serde(borrow)]
        state_key: &'a RawValue,
        #[serde(borrow, rename = "type")]
        event_type: Cow<'a, str>,
    }
    let fields: Fields<'_> = serde_json::from_str(event.get()).ok()?;
    let is_text = |value: &RawValue| value.get().starts_with('"');
    let is_right =
        fields.content.get().starts_with('{') && [fields.sender, fields.state_key].into_iter().all(is_text);
    if !is_right {
        return None;
    }
    if fields.event_type == CREATE {
        return Some(event.get().to_owned());
    }
    let mut stripped = crate::json::Object::with_capacity(event.get().len());
    stripped.json("content", fields.content);
    stripped.json("sender", fields.sender);
    stripped.json("state_key", fields.state_key);
    stripped.text("type", &fields.event_type);
    Some(stripped.finish().into())
}

/// An invitation on its way to the server of a user whom one of ours invites.
struct Going {
    row: RoomRow,
    id: ruma::OwnedEventId,
    json: Bytes,
    state: Vec<Box<RawValue>>,
}

/// Invites a user of another server to a room that this server is in. Their server signs the event before it is part of the room, and shows it
/// to the user at once, so that this goes on when the requester hangs up.
/// Errors: 403 where the room or that server forbids it; [`Error::Remote`] where that server cannot be asked.
pub(crate) async fn send(
    app: &App,
    num: RoomNum,
    author: &Author,
    target: &UserId,
    content: impl FnOnce(&mut Change) -> Result<CanonicalJsonObject> + Send + 'static,
) -> Result<ruma::OwnedEventId> {
    let (owned, author, target) = (app.clone(), author.clone(), target.to_owned());
    let work = async move { send_and_add(&owned, num, &author, &target, content).await };
    app.to_the_end("an invitation", work).await
}

async fn send_and_add(
    app: &App,
    num: RoomNum,
    author: &Author,
    target: &UserId,
    content: impl FnOnce(&mut Change) -> Result<CanonicalJsonObject> + Send + 'static,
) -> Result<ruma::OwnedEventId> {
    super::identify::require_federation(app)?;
    let (owned, author, invited) = (app.clone(), author.clone(), target.to_owned());
    let going = commit::in_room(app, num, move |change| {
        let content = content(change)?;
        let (sender, sent_ms) = (author.user_id.clone(), owned.env.event_ms());
        let draft = Draft::state(sender, MEMBER, invited.as_str(), content, sent_ms);
        if !acl::admits(&change.batch, change.num, invited.server_name())? {
            return Err(Refusal::forbidden("The room does not admit the user's server.").into());
        }
        let approved = policy::approve_invite_elsewhere(change, &author, draft)?;
        let (built, unsigned) = approved.build(change, owned.rooms.signer())?;
        let state = telling(change, author.user_id.as_str())?;
        Ok((Going { row: change.row.clone(), id: built.event.id, json: built.json, state }, unsigned))
    });
    let (mut going, unsigned) = going.await?;
    // Nobody is told of an invitation that the room's policy server refuses.
    let endorsed = match unsigned {
        Some(unsigned) => {
            let server = unsigned.server.clone();
            let event = own_events::countersign(app, num, unsigned).await?;
            going.json = event.json().clone();
            Some((server, event))
        }
        None => None,
    };
    let server = target.server_name();
    let signed = ask_to_sign(app, server, &going).await?;
    let received = match verify::verify(app, going.row.version, vec![signed]).await?.pop() {
        Some(Verified::Received(received)) => *received,
        _ => return Err(at_fault(server, "it did not sign the invitation")),
    };
    // The other server need not give back all signatures that it was sent.
    let received = match endorsed {
        Some((policy_server, event)) => {
            let rules = rooms::rules(&going.row)?;
            received.with_signature_of(&policy_server, rules, &event).unwrap_or(received)
        }
        None => received,
    };
    let outcome = ingest::ingest(app, num, vec![received]).await?.pop();
    match outcome {
        Some(Outcome::Accepted(_) | Outcome::Known(_)) => Ok(going.id),
        Some(Outcome::Aside(_, why)) => {
            Err(Refusal::forbidden(format!("The room does not allow this any more: {why}.")).into())
        }
        _ => Err(Error::Busy { retry_after: std::time::Duration::from_secs(1) }),
    }
}

/// The state that tells which room this is, as servers see it.
fn telling(change: &Change, sender: &str) -> Result<Vec<Box<RawValue>>> {
    let keys = TELLING.iter().map(|event_type| (*event_type, "")).chain([(MEMBER, sender)]);
    let mut told = Vec::new();
    for (event_type, state_key) in keys {
        let found: Option<StoredEvent> = rooms::find_state(&change.batch, change.num, event_type, state_key)?;
        let json = found.map(|stored| String::from_utf8_lossy(&stored.row.json).into_owned());
        told.extend(json.and_then(|json| RawValue::from_string(json).ok()));
    }
    Ok(told)
}

async fn ask_to_sign(app: &App, server: &ServerName, going: &Going) -> Result<Signed> {
    let event = RawValue::from_string(String::from_utf8_lossy(&going.json).into_owned());
    let event = event.map_err(|error| Error::broken(format!("an event is no JSON: {error}")))?;
    let version = RoomVersionId::try_from(going.row.version.to_string())
        .map_err(|_| Error::broken("a room has an unknown version"))?;
    let state = going.state.iter().map(|event| RawStrippedState::Pdu(event.clone())).collect();
    let request =
        create_invite::v2::Request::new(going.row.id.clone(), going.id.clone(), version, event, state);
    let signed = match app.remote.client.send(server, request, Options::default()).await {
        Ok(answer) => answer.event,
        // Servers that know rooms of these versions alone may not know the newer form of the endpoint.
        Err(failure) if event::are_ids_chosen(going.row.version) && is_unknown(&failure) => {
            ask_to_sign_in_first_form(app, server, going).await?
        }
        Err(failure) => return Err(failed(server, failure)),
    };
    let json = signed.get().as_bytes();
    let other = || at_fault(server, "it gave back another event than the invitation that it was to sign");
    let signed = Signed::read_signed_by(RoomNum(0), &going.row, json, Some(server)).map_err(|_| other())?;
    let is_ours = signed.unverified().id == going.id && !signed.is_redacted();
    if is_ours { Ok(signed) } else { Err(other()) }
}

/// Asks for the signature as servers did that knew no room versions: the body is the event, and the answer a list.
async fn ask_to_sign_in_first_form(app: &App, server: &ServerName, going: &Going) -> Result<Box<RawValue>> {
    #[derive(serde::Deserialize)]
    struct Signed {
        event: Box<RawValue>,
    }
    let odd = || Error::broken("an invitation of ours is no JSON");
    let mut unsigned = crate::json::Object::new();
    unsigned.list("invite_room_state", going.state.iter().map(|event| JsonRef::from(&**event)));
    let unsigned = unsigned.finish();
    let fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(&going.json).map_err(|_| odd())?;
    let mut body = crate::json::Object::with_capacity(going.json.len() + unsigned.as_str().len());
    for (name, value) in fields {
        body.json(&name, JsonRef::from(value));
    }
    body.json("unsigned", &unsigned);
    let path = ["v1", "invite", going.row.id.as_str(), going.id.as_str()];
    let reply = put(app, server, &path, &body.finish().into(), Options::default()).await;
    let reply = reply.map_err(|failure| failed(server, failure))?;
    let answer = serde_json::from_slice::<(u16, Signed)>(reply.answer.bytes());
    let (_, signed) = answer.map_err(|_| at_fault(server, "its answer to an invitation makes no sense"))?;
    Ok(signed.event)
}
