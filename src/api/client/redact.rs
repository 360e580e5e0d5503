//! Redacts an event, by sending an event that names it.

use ruma::api::client::redact::redact_event;

use crate::{
    api::{Routes, extract::Client},
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
}

/// `PUT /_matrix/client/v3/rooms/{roomId}/redact/{eventId}/{txnId}`
pub(crate) async fn redact_event(
    app: App,
    client: Client<redact_event::v3::Request>,
) -> Result<redact_event::v3::Response> {
    let request = client.request;
    let reason = request.reason.map(|reason| ("reason".to_owned(), reason.into()));
    let message = Message {
        room: request.room_id,
        event_type: REDACTION.to_owned(),
        txn: request.txn_id.into(),
        content: reason.into_iter().collect(),
        redacts: Some(request.event_id),
        sticky_ms: None,
    };
    let event_id = send::send(&app, &client.caller, message).await?;
    Ok(redact_event::v3::Response::new(event_id))
}
