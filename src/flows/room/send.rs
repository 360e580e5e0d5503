//! Sending: messages, state, redactions.

use ruma::{CanonicalJsonObject, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId};

use crate::{
    accounts::{Caller, account_data},
    error::{Refusal, Result},
    flows::{App, commit, room::presence},
    rooms::{
        aliases,
        build::Draft,
        change::{Change, Txn},
        event, relations,
    },
    schema::rooms::Membership,
};

/// What a client sends with a transaction id.
#[derive(Debug)]
pub(crate) struct Message {
    /// To which room.
    pub(crate) room: OwnedRoomId,
    /// The type of the event.
    pub(crate) kind: String,
    /// The client's transaction id.
    pub(crate) txn: String,
    /// The content as the client wrote it.
    pub(crate) content: CanonicalJsonObject,
    /// The event that it redacts.
    pub(crate) redacts: Option<OwnedEventId>,
    /// When; now, if none.
    pub(crate) sent_ms: Option<u64>,
}

/// Reads the content of an event. Refuses what canonical JSON does not have (floats, integers beyond 2^53 - 1):
/// 400 `M_BAD_JSON`.
pub(crate) fn content(json: &str) -> Result<CanonicalJsonObject, Refusal> {
    serde_json::from_str(json)
        .map_err(|error| Refusal::bad_json(format!("The content cannot be that of an event: {error}.")))
}

/// Sends a message event, once however often it is asked to with the same transaction id.
pub(crate) async fn send(app: &App, caller: &Caller, message: Message) -> Result<OwnedEventId> {
    let room = commit::require_num(app, &message.room)?;
    let endpoint = match &message.redacts {
        Some(target) => format!("redact/{target}"),
        None => format!("send/{}", message.kind),
    };
    let now_ms = app.env.now_ms();
    let txn = Txn { user: caller.user, device: caller.device, endpoint, id: message.txn, now_ms };
    let redacts = match message.redacts {
        None if message.kind == "m.room.redaction" => redacts_of(&message.content)?,
        redacts => redacts,
    };
    let draft = Draft {
        sender: caller.user_id.clone(),
        kind: message.kind,
        state_key: None,
        content: message.content,
        redacts,
        sent_ms: message.sent_ms.unwrap_or_else(|| app.env.event_ms()),
    };
    let signer = app.rooms.signer().clone();
    presence::note_active(app, caller);
    commit::in_room(app, room, move |change| {
        if let Some(event) = txn.find(&change.batch, room)? {
            return Ok(event::require(&change.batch, room, event)?.id(&change.row));
        }
        if let Some(target) = &draft.redacts {
            require_may_redact(change, &draft.sender, target)?;
        }
        relations::check(&change.batch, room, &draft)?;
        let stored = change.add_once(&signer, &draft, &txn)?;
        Ok(stored.id(&change.row))
    })
    .await
}

/// What a redaction that was sent like any message redacts: its content says so, in every room version.
fn redacts_of(content: &CanonicalJsonObject) -> Result<Option<OwnedEventId>, Refusal> {
    let Some(target) = content.get("redacts") else { return Ok(None) };
    let target = target.as_str().and_then(|id| OwnedEventId::try_from(id).ok());
    target.map(Some).ok_or_else(|| Refusal::bad_json("`redacts` is not an event id."))
}

fn require_may_redact(change: &mut Change, sender: &OwnedUserId, target: &ruma::EventId) -> Result<()> {
    if change.membership(sender.as_str())? != Membership::Join {
        return Err(commit::not_in_room().into());
    }
    let target = event::find_by_id(&change.batch, change.num, target)?
        .ok_or_else(|| Refusal::not_found("The room has no such event."))?;
    change.require_may_redact(sender, &target)
}

/// Sets a piece of a room's state. Setting what is set already changes nothing and answers with the event that is
/// there.
pub(crate) async fn set_state(
    app: &App,
    caller: &Caller,
    room_id: &RoomId,
    kind: String,
    state_key: String,
    content: CanonicalJsonObject,
    sent_ms: Option<u64>,
) -> Result<OwnedEventId> {
    let room = commit::require_num(app, room_id)?;
    let sent_ms = sent_ms.unwrap_or_else(|| app.env.event_ms());
    let mut draft = Draft::state(caller.user_id.clone(), &kind, &state_key, content, sent_ms);
    let signer = app.rooms.signer().clone();
    let server = signer.server().clone();
    presence::note_active(app, caller);
    commit::in_room(app, room, move |change| {
        if kind == "m.room.member" && change.membership(&state_key)? == Membership::Join {
            // Who is in needs nobody to vouch for them: clients send back what their member event says of that.
            draft.content.remove("join_authorised_via_users_server");
        }
        check_state(change, &draft, &server)?;
        let current = change.state(&kind, &state_key)?;
        if let Some(current) = current
            && current.parsed.sender == draft.sender
            && current.parsed.content.get() == draft.raw_content()?.get()
            && change.membership(draft.sender.as_str())? == Membership::Join
        {
            return Ok(current.parsed.id.clone());
        }
        let stored = change.add(&signer, &draft, None)?;
        Ok(stored.id(&change.row))
    })
    .await
}

/// What the authorization rules leave open and clients rely on.
fn check_state(change: &mut Change, draft: &Draft, server: &ruma::ServerName) -> Result<()> {
    match draft.kind.as_str() {
        "m.room.create" => {
            return Err(Refusal::bad_json("A room is created once.").into());
        }
        "m.room.power_levels" => change.power()?.check_levels(&draft.content)?,
        "m.room.member" => {
            let content = draft.raw_content()?;
            let user = draft.state_key.as_deref().and_then(|user| OwnedUserId::try_from(user).ok());
            if event::membership_of(content.get()).is_none() || user.is_none() {
                return Err(Refusal::bad_json("This is not the content of a member event.").into());
            }
            if let Some(user) =
                user.filter(|_| event::membership_of(content.get()) == Some(Membership::Invite))
            {
                commit::require_reachable(&change.batch, server, &user)?;
                account_data::check_invite(&change.batch, &user)?;
            }
        }
        "m.room.canonical_alias" => {
            let old = change.state(&draft.kind, draft.state_key.as_deref().unwrap_or_default())?;
            let old = old.as_ref().map(|event| event.parsed.content.get());
            aliases::check_canonical(&change.batch, change.num, server, &draft.content, old)?;
        }
        _ => {}
    }
    Ok(())
}
