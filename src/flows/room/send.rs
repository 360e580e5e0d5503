//! Sends messages, state events and redactions.

use ruma::{CanonicalJsonObject, OwnedEventId, OwnedRoomId, RoomId};

use crate::{
    accounts::{Caller, tokens},
    error::{Refusal, Result},
    flows::{
        App,
        account::carry_over,
        commit, jobs, own_events,
        room::{membership, presence},
    },
    rooms::{
        build::Draft,
        change::Txn,
        event,
        policy::{self, Author},
    },
    schema::event_types::{MEMBER, REDACTION, TOMBSTONE},
};

/// A message or redaction that a client sends with a transaction id.
#[derive(Debug)]
pub(crate) struct Message {
    /// The room to which it is sent.
    pub(crate) room: OwnedRoomId,
    /// The type of the event.
    pub(crate) event_type: String,
    /// The client's transaction id.
    pub(crate) txn: String,
    /// The content as the client wrote it.
    pub(crate) content: CanonicalJsonObject,
    /// The event that it redacts, if it is a redaction.
    pub(crate) redacts: Option<OwnedEventId>,
}

/// Reads the content of an event. Errors: 400 `M_BAD_JSON` for JSON that is not canonical (floats, integers beyond 2^53 - 1).
pub(crate) fn content(json: &str) -> Result<CanonicalJsonObject, Refusal> {
    serde_json::from_str(json)
        .map_err(|error| Refusal::bad_json(format!("The content cannot be that of an event: {error}.")))
}

/// A transaction id has at most this many bytes, here as for messages to devices.
const TXN_BYTES_MAX: usize = 255;

/// Sends a message event. It is sent once, however often the request comes with the same transaction id.
pub(crate) async fn send(app: &App, caller: &Caller, message: Message) -> Result<OwnedEventId> {
    let room = commit::require_num(app, &message.room)?;
    if message.txn.is_empty() || message.txn.len() > TXN_BYTES_MAX {
        return Err(Refusal::invalid_param("`txnId` has from 1 to 255 bytes.").into());
    }
    let endpoint = match &message.redacts {
        Some(target) => format!("redact/{target}"),
        None => format!("send/{}", message.event_type),
    };
    let now_ms = app.env.now_ms();
    let txn = Txn { user: caller.user, device: caller.device, endpoint, id: message.txn, now_ms };
    let redacts = match message.redacts {
        None if message.event_type == REDACTION => redacts_of(&message.content)?,
        redacts => redacts,
    };
    let draft = Draft {
        sender: caller.user_id.clone(),
        event_type: message.event_type,
        state_key: None,
        content: message.content,
        redacts,
        sent_ms: app.env.event_ms(),
    };
    let author = Author::from(caller);
    let signer = app.rooms.signer().clone();
    presence::note_active(app, caller);
    let caller = caller.clone();
    own_events::in_room(app, room, move |change| {
        if let Some(event) = txn.find(&change.batch, room)? {
            return Ok(event::require(&change.batch, room, event)?.id(&change.row));
        }
        // The transaction is kept for the device, which may have been logged out while this waited.
        tokens::require_session(&change.batch, &caller)?;
        let approved = policy::approve(change, signer.server(), &author, draft)?;
        Ok(approved.add_once(change, &signer, &txn)?.id(&change.row))
    })
    .await
}

/// The event that a redaction redacts if it was sent like any message. Its content names the event, in every room version.
fn redacts_of(content: &CanonicalJsonObject) -> Result<Option<OwnedEventId>, Refusal> {
    let Some(target) = content.get("redacts") else { return Ok(None) };
    let target = target.as_str().and_then(|id| OwnedEventId::try_from(id).ok());
    target.map(Some).ok_or_else(|| Refusal::bad_json("`redacts` is not an event id."))
}

/// Sets a piece of a room's state. Setting the content that is set already changes nothing, and answers the event that is there.
/// Member events are set by [`membership`].
pub(crate) async fn set_state(
    app: &App,
    caller: &Caller,
    room_id: &RoomId,
    event_type: String,
    state_key: String,
    content: CanonicalJsonObject,
) -> Result<OwnedEventId> {
    if event_type == MEMBER {
        return membership::set(app, caller, room_id, state_key, content).await;
    }
    let room = commit::require_num(app, room_id)?;
    let author = Author::from(caller);
    let draft = Draft::state(caller.user_id.clone(), &event_type, &state_key, content, app.env.event_ms());
    let (owned, signer) = (app.clone(), app.rooms.signer().clone());
    let replaces_room = event_type == TOMBSTONE && state_key.is_empty();
    presence::note_active(app, caller);
    let (event_id, promised) = own_events::in_room(app, room, move |change| {
        let approved = policy::approve(change, signer.server(), &author, draft)?;
        if let Some(same) = approved.find_same(change)? {
            return Ok((same, None));
        }
        let event_id = approved.add(change, &signer)?.id(&change.row);
        let promised =
            if replaces_room { carry_over::promise_to_author(&owned, change, author.user)? } else { None };
        Ok((event_id, promised))
    })
    .await?;
    jobs::keep(app, promised).await?;
    Ok(event_id)
}
