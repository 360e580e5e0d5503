//! Sends messages from one device to others.

use std::collections::BTreeMap;

use ruma::api::client::to_device::send_event_to_device;
use serde::{Deserialize, de::IgnoredAny};

use crate::{
    api::{
        Routes,
        extract::Client,
        policy::{Body, Guests, MIB, Wish},
    },
    error::Result,
    flows::{App, device::send_to_device, limits::Limit},
    schema::event_types::{ENCRYPTED, ROOM_KEY_REQUEST},
};

pub(crate) fn routes(r: &mut Routes) {
    // The body has room for the keys of a room for some hundred devices, encrypted for each of them.
    let route = r.client(send_event_to_device).limit(Limit::ToDevice).guests(Guests::Yes);
    route.body(Body::Json(2 * MIB)).suspended_if(keeps_to_itself);
}

/// Types of messages that a suspended user sends to devices of others, too. Without them the user could not decrypt what others say: a
/// session of Olm that broke is begun anew by an encrypted message, and a lost key is asked for.
const TO_OTHERS: [&str; 2] = [ENCRYPTED, ROOM_KEY_REQUEST];

/// Whether a request sends messages to the user's own devices alone, such as those by which a device is verified, or those that a
/// suspended user needs to read what others say.
fn keeps_to_itself(wish: &Wish<'_>) -> bool {
    #[derive(Deserialize)]
    struct Sent {
        messages: BTreeMap<String, IgnoredAny>,
    }
    let is_needed = wish.path.first().is_some_and(|kind| TO_OTHERS.contains(&kind.as_str()));
    let is_to_own = |sent: Sent| sent.messages.keys().all(|user| *user == wish.user_id.as_str());
    is_needed || serde_json::from_slice(wish.body).is_ok_and(is_to_own)
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
