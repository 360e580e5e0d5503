//! Sends messages from one device to others.

use std::collections::BTreeMap;

use ruma::api::client::to_device::send_event_to_device;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    api::{
        Routes,
        client::wordless::{is_base64, is_id},
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

/// An encrypted message to a device (client-server API, `m.olm.v1.curve25519-aes-sha2`), with the id that clients give it for their logs.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Olm {
    algorithm: String,
    sender_key: String,
    ciphertext: BTreeMap<String, OlmText>,
    #[serde(rename = "org.matrix.msgid")]
    id: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OlmText {
    #[serde(rename = "type")]
    kind: u8,
    body: String,
}

impl Olm {
    fn is_well_formed(&self) -> bool {
        self.algorithm == "m.olm.v1.curve25519-aes-sha2"
            && is_base64(&self.sender_key)
            && self.id.as_ref().is_none_or(|id| is_id(id))
            && self
                .ciphertext
                .iter()
                .all(|(key, text)| is_base64(key) && text.kind <= 1 && is_base64(&text.body))
    }
}

/// A request for the key of a message, or its end (client-server API, `m.room_key_request`).
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyRequest {
    action: String,
    requesting_device_id: String,
    request_id: String,
    body: Option<WantedKey>,
    #[serde(rename = "org.matrix.msgid")]
    id: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedKey {
    algorithm: String,
    room_id: String,
    sender_key: Option<String>,
    session_id: String,
}

impl KeyRequest {
    fn is_well_formed(&self) -> bool {
        let is_wanted = |key: &WantedKey| {
            key.algorithm == "m.megolm.v1.aes-sha2"
                && is_id(&key.room_id)
                && key.sender_key.as_ref().is_none_or(|key| is_base64(key))
                && is_base64(&key.session_id)
        };
        let mut names = [&self.requesting_device_id, &self.request_id].into_iter().chain(&self.id);
        matches!(&*self.action, "request" | "request_cancellation")
            && names.all(|name| is_id(name))
            && self.body.as_ref().is_none_or(is_wanted)
    }
}

/// Whether a suspended user may send a message to devices of others. Without these the user could not decrypt what others say: a session
/// of Olm that broke is begun anew by an encrypted message, and a lost key is asked for. What is not of their form is text for people.
fn is_needed(kind: &str, content: &RawValue) -> bool {
    match kind {
        ENCRYPTED => serde_json::from_str(content.get()).is_ok_and(|olm: Olm| olm.is_well_formed()),
        ROOM_KEY_REQUEST => {
            serde_json::from_str(content.get()).is_ok_and(|wish: KeyRequest| wish.is_well_formed())
        }
        _ => false,
    }
}

/// Whether a request sends messages to the user's own devices, such as those by which a device is verified, and to devices of others only
/// those that a suspended user needs to read what others say.
fn keeps_to_itself(wish: &Wish<'_>) -> bool {
    #[derive(Deserialize)]
    struct Sent<'a> {
        #[serde(borrow)]
        messages: BTreeMap<String, BTreeMap<String, &'a RawValue>>,
    }
    let kind = wish.path.first().map_or("", String::as_str);
    let is_for_all = |sent: Sent<'_>| {
        sent.messages.iter().all(|(user, devices)| {
            *user == wish.user_id.as_str() || devices.values().all(|content| is_needed(kind, content))
        })
    };
    serde_json::from_slice(wish.body).is_ok_and(is_for_all)
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
