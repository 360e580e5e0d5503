//! Redacts an event, by sending an event that names it.

use ruma::{OwnedEventId, OwnedRoomId, api::client::redact::redact_event};
use serde::Deserialize;

use crate::{
    accounts::Caller,
    api::{Routes, client::message::sent, extract::Client, raw::Raw, reply::RawJson},
    error::Result,
    flows::{
        App,
        limits::Limit,
        room::send::{self, Message},
    },
    schema::event_types::REDACTION,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(redact_event).limit(Limit::Send);
    r.client(redact_event_without_txn).limit(Limit::Send);
}

endpoint!(
    /// The endpoint of old clients, which name no transaction; ruma and the specification do not know it.
    WithoutTxn, POST,
    "/_matrix/client/v3/rooms/{room_id}/redact/{event_id}"
);

/// `PUT /_matrix/client/v3/rooms/{roomId}/redact/{eventId}/{txnId}`
pub(crate) async fn redact_event(
    app: App,
    client: Client<redact_event::v3::Request>,
) -> Result<redact_event::v3::Response> {
    let redact_event::v3::Request { room_id, event_id, txn_id, reason, .. } = client.request;
    let event_id = redact(&app, &client.caller, room_id, event_id, Some(txn_id.into()), reason).await?;
    Ok(redact_event::v3::Response::new(event_id))
}

/// `POST /_matrix/client/v3/rooms/{roomId}/redact/{eventId}`
pub(crate) async fn redact_event_without_txn(app: App, client: Client<Raw<WithoutTxn>>) -> Result<RawJson> {
    #[derive(Deserialize)]
    struct Body {
        reason: Option<String>,
    }
    let Body { reason } = client.request.json()?;
    let (room_id, target) = (client.request.id(0)?, client.request.id(1)?);
    redact(&app, &client.caller, room_id, target, None, reason).await.map(|event_id| sent(&event_id))
}

async fn redact(
    app: &App,
    caller: &Caller,
    room: OwnedRoomId,
    target: OwnedEventId,
    txn: Option<String>,
    reason: Option<String>,
) -> Result<OwnedEventId> {
    let reason = reason.map(|reason| ("reason".to_owned(), reason.into()));
    let (event_type, content) = (REDACTION.to_owned(), reason.into_iter().collect());
    let message = Message { room, event_type, txn, content, redacts: Some(target), sticky_ms: None };
    send::send(app, caller, message).await
}
