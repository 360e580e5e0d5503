//! Sends messages from one device to others.

use ruma::api::client::to_device::send_event_to_device;

use crate::{
    api::{
        Routes,
        extract::Client,
        policy::{Body, Guests, MIB},
    },
    error::Result,
    flows::{App, device::send_to_device, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    // The body has room for the keys of a room for some hundred devices, encrypted for each of them.
    r.client(send_event_to_device).limit(Limit::ToDevice).guests(Guests::Yes).body(Body::Json(2 * MIB));
}

/// `PUT /_matrix/client/v3/sendToDevice/{eventType}/{txnId}`
pub(crate) async fn send_event_to_device(
    app: App,
    client: Client<send_event_to_device::v3::Request>,
) -> Result<send_event_to_device::v3::Response> {
    let request = client.request;
    let kind = request.event_type.to_string();
    send_to_device::send_to_device(&app, &client.caller, kind, &request.txn_id, request.messages).await?;
    Ok(send_event_to_device::v3::Response::new())
}
