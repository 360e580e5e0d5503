//! Sends messages, state events and redactions.

use ruma::{CanonicalJsonObject, OwnedEventId, OwnedRoomAliasId, OwnedRoomId, RoomId};

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
        build::{Draft, Signer},
        change::{Change, Txn},
        event::{self, StoredEvent},
        policy::{self, Approved, Author},
    },
    schema::event_types::{MEMBER, REDACTION, TOMBSTONE},
    store::timer::Timer,
};

/// A message or redaction that a client sends.
#[derive(Debug)]
pub(crate) struct Message {
    /// The room to which it is sent.
    pub(crate) room: OwnedRoomId,
    /// The type of the event.
    pub(crate) event_type: String,
    /// The client's transaction id. Old clients name none.
    pub(crate) txn: Option<String>,
    /// The content as the client wrote it.
    pub(crate) content: CanonicalJsonObject,
    /// The event that it redacts, if it is a redaction.
    pub(crate) redacts: Option<OwnedEventId>,
    /// For how many milliseconds the event is to be sticky, if it is to be so.
    pub(crate) sticky_ms: Option<u64>,
}

/// Reads the content of an event. Errors: 400 `M_BAD_JSON` for JSON that is not canonical (floats, integers beyond 2^53 - 1).
pub(crate) fn content(json: &str) -> Result<CanonicalJsonObject, Refusal> {
    serde_json::from_str(json)
        .map_err(|error| Refusal::bad_json(format!("The content cannot be that of an event: {error}.")))
}

/// A transaction id has at most this many bytes, here as for messages to devices.
const TXN_BYTES_MAX: usize = 255;

/// Refuses a transaction id that is empty or too long: 400 `M_INVALID_PARAM`.
pub(crate) fn require_txn(txn: &str) -> Result<()> {
    if txn.is_empty() || txn.len() > TXN_BYTES_MAX {
        return Err(Refusal::invalid_param("`txnId` has from 1 to 255 bytes.").into());
    }
    Ok(())
}

/// Sends a message event. It is sent once, however often the request comes with the same transaction id, and without one each time.
pub(crate) async fn send(app: &App, caller: &Caller, message: Message) -> Result<OwnedEventId> {
    let room = commit::require_num(app, &message.room)?;
    message.txn.as_deref().map_or(Ok(()), require_txn)?;
    let endpoint = match &message.redacts {
        Some(target) => format!("redact/{target}"),
        None => format!("send/{}", message.event_type),
    };
    let (user, device, now_ms) = (caller.user, caller.device, app.env.now_ms());
    let txn = message.txn.map(|id| Txn { user, device, endpoint, id, now_ms });
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
        sticky_ms: message.sticky_ms,
    };
    let author = Author::from(caller);
    let signer = app.rooms.signer().clone();
    presence::note_active(app, caller);
    let caller = caller.clone();
    own_events::in_room(app, room, move |change| {
        if let Some(txn) = &txn
            && let Some(event) = txn.find(&change.batch, room)?
        {
            return Ok(event::require(&change.batch, room, event)?.id(&change.row));
        }
        // The transaction is kept for the device, which may have been logged out while this waited.
        tokens::require_session(&change.batch, &caller)?;
        let approved = policy::approve(change, signer.server(), &author, draft)?;
        Ok(add(approved, change, &signer, txn.as_ref())?.id(&change.row))
    })
    .await
}

fn add(approved: Approved, change: &mut Change, signer: &Signer, txn: Option<&Txn>) -> Result<StoredEvent> {
    match txn {
        Some(txn) => approved.add_once(change, signer, txn),
        None => approved.add(change, signer),
    }
}

/// The event that a redaction redacts if it was sent like any message. Its content names the event, in every room version.
pub(crate) fn redacts_of(content: &CanonicalJsonObject) -> Result<Option<OwnedEventId>, Refusal> {
    let Some(target) = content.get("redacts") else { return Ok(None) };
    let target = target.as_str().and_then(|id| OwnedEventId::try_from(id).ok());
    target.map(Some).ok_or_else(|| Refusal::bad_json("`redacts` is not an event id."))
}

/// A piece of a room's state that a client sets.
#[derive(Debug)]
pub(crate) struct Piece {
    /// The type of the event.
    pub(crate) event_type: String,
    /// The state key of the event.
    pub(crate) state_key: String,
    /// The content as the client wrote it.
    pub(crate) content: CanonicalJsonObject,
    /// The aliases of other servers that were asked for and name the room.
    pub(crate) confirmed: Vec<OwnedRoomAliasId>,
    /// For how many milliseconds the event is to be sticky, if it is to be so.
    pub(crate) sticky_ms: Option<u64>,
}

/// Sets a piece of a room's state. Setting the content that is set already changes nothing, and answers the event that is there,
/// unless the new one is to be sticky. Member events are set by [`membership`].
pub(crate) async fn set_state(
    app: &App,
    caller: &Caller,
    room_id: &RoomId,
    piece: Piece,
) -> Result<OwnedEventId> {
    let Piece { event_type, state_key, content, confirmed, sticky_ms } = piece;
    if event_type == MEMBER {
        return membership::set(app, caller, room_id, state_key, content).await;
    }
    let room = commit::require_num(app, room_id)?;
    let author = Author { names: confirmed, ..Author::from(caller) };
    let draft = Draft::state(caller.user_id.clone(), &event_type, &state_key, content, app.env.event_ms());
    let draft = Draft { sticky_ms, ..draft };
    let owned = app.clone();
    presence::note_active(app, caller);
    let (event_id, promised) =
        own_events::in_room(app, room, move |change| add_state(&owned, change, &author, draft, None)).await?;
    jobs::keep(app, promised).await?;
    Ok(event_id)
}

/// Adds a state event to a room, by a transaction where it has one, and promises what follows from it. Nothing is added where exactly
/// this is set already.
pub(crate) fn add_state(
    app: &App,
    change: &mut Change,
    author: &Author,
    draft: Draft,
    txn: Option<&Txn>,
) -> Result<(OwnedEventId, Option<Timer>)> {
    let signer = app.rooms.signer();
    let replaces_room = draft.event_type == TOMBSTONE && draft.state_key.as_deref() == Some("");
    let approved = policy::approve(change, signer.server(), author, draft)?;
    if let Some(same) = approved.find_same(change)? {
        return Ok((same, None));
    }
    let stored = add(approved, change, signer, txn)?;
    let promised =
        if replaces_room { carry_over::promise_to_author(app, change, author.user)? } else { None };
    Ok((stored.id(&change.row), promised))
}
