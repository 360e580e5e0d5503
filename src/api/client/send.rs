//! Sending events to a room: messages, state, redactions.

use ruma::{
    MilliSecondsSinceUnixEpoch,
    api::client::{message::send_message_event, redact::redact_event, state::send_state_event},
};

use crate::{
    api::{Routes, extract::Client},
    error::Result,
    flows::{
        App,
        room::send::{self, Message},
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(send_message_event);
    r.client(send_state_event);
    r.client(redact_event);
}

fn milliseconds(time: Option<MilliSecondsSinceUnixEpoch>) -> Option<u64> {
    time.map(|time| time.get().into())
}

/// `PUT /_matrix/client/v3/rooms/{roomId}/send/{eventType}/{txnId}`
pub(crate) async fn send_message_event(
    app: App,
    client: Client<send_message_event::v3::Request>,
) -> Result<send_message_event::v3::Response> {
    let request = client.request;
    let message = Message {
        room: request.room_id,
        kind: request.event_type.to_string(),
        txn: request.txn_id.into(),
        content: send::content(request.body.json().get())?,
        redacts: None,
        sent_ms: milliseconds(request.timestamp),
    };
    let event_id = send::send(&app, &client.caller, message).await?;
    Ok(send_message_event::v3::Response::new(event_id))
}

/// `PUT /_matrix/client/v3/rooms/{roomId}/state/{eventType}/{stateKey}`
pub(crate) async fn send_state_event(
    app: App,
    client: Client<send_state_event::v3::Request>,
) -> Result<send_state_event::v3::Response> {
    let request = client.request;
    let content = send::content(request.body.json().get())?;
    let (kind, sent_ms) = (request.event_type.to_string(), milliseconds(request.timestamp));
    let event_id =
        send::set_state(&app, &client.caller, &request.room_id, kind, request.state_key, content, sent_ms)
            .await?;
    Ok(send_state_event::v3::Response::new(event_id))
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
        kind: "m.room.redaction".to_owned(),
        txn: request.txn_id.into(),
        content: reason.into_iter().collect(),
        redacts: Some(request.event_id),
        sent_ms: None,
    };
    let event_id = send::send(&app, &client.caller, message).await?;
    Ok(redact_event::v3::Response::new(event_id))
}
