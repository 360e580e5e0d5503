//! Dehydrated devices (MSC3814). Pages of messages are asked for by GET, and by older clients by POST, each of which ends in a way of its own.

use ruma::{DeviceId, OwnedDeviceId};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    accounts::dehydrated,
    api::{
        Routes,
        client::wordless,
        extract::Client,
        policy::{Body, KIB},
        raw::Raw,
        reply::RawJson,
    },
    encryption::{keys::Keys, uploads::Upload},
    error::Result,
    flows::{
        App,
        device::dehydrate::{self, End, ToDehydrate},
        limits::Limit,
    },
    json::{JsonRef, Object},
};

pub(crate) fn routes(r: &mut Routes) {
    // The body has room for the keys that an upload of keys may have, and for the data of the device.
    let route = r.client(put).limit(Limit::Other).body(Body::Json(320 * KIB));
    route.suspended_if(wordless::are_keys_of_device);
    r.client(get).limit(Limit::Read);
    r.client(delete).limit(Limit::Other);
    r.client(read).limit(Limit::Read);
    r.client(read_by_post).limit(Limit::Read).body(Body::Json(4 * KIB));
}

/// The path of the dehydrated device of the caller.
const DEVICE: &str = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device";
/// The path of the messages that wait for it.
const EVENTS: &str = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device/{device_id}/events";

endpoint!(
    /// The endpoint that makes the dehydrated device.
    Put, PUT, DEVICE
);
endpoint!(
    /// The endpoint that shows the dehydrated device.
    Get, GET, DEVICE
);
endpoint!(
    /// The endpoint that deletes the dehydrated device.
    Delete, DELETE, DEVICE
);
endpoint!(
    /// The endpoint that tells the messages of the dehydrated device.
    Read, GET, EVENTS
);
endpoint!(
    /// The endpoint that told the messages in earlier forms of the proposal.
    ReadByPost, POST, EVENTS
);

/// The body of a dehydrated device. Keys are kept as the text that they came as, because they are signed.
#[derive(Deserialize)]
struct ToPut {
    device_id: OwnedDeviceId,
    device_data: Box<RawValue>,
    initial_device_display_name: Option<String>,
    device_keys: Box<RawValue>,
    one_time_keys: Option<Keys>,
    fallback_keys: Option<Keys>,
}

/// The answer that names a device.
fn named(id: &DeviceId) -> RawJson {
    let mut answer = Object::new();
    answer.text("device_id", id.as_str());
    RawJson(answer.finish().into())
}

/// `PUT /_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device`
pub(crate) async fn put(app: App, client: Client<Raw<Put>>) -> Result<RawJson> {
    let body: ToPut = client.request.json()?;
    let id = body.device_id.clone();
    let wanted = ToDehydrate {
        id: body.device_id,
        display_name: body.initial_device_display_name,
        device_data: body.device_data.get().to_owned(),
        keys: Upload {
            device_keys: Some(body.device_keys),
            one_time_keys: body.one_time_keys.unwrap_or_default(),
            fallback_keys: body.fallback_keys.unwrap_or_default(),
        },
    };
    dehydrate::dehydrate(&app, &client.caller, wanted).await?;
    Ok(named(&id))
}

/// `GET /_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device`
pub(crate) async fn get(app: App, client: Client<Raw<Get>>) -> Result<RawJson> {
    let device = dehydrated::require(&*app.store.snapshot(), client.caller.user)?;
    let mut shown = Object::with_capacity(device.device_data.len() + 128);
    shown.text("device_id", device.id.as_str());
    shown.json("device_data", JsonRef::stored(device.device_data.as_bytes()));
    Ok(RawJson(shown.finish().into()))
}

/// `DELETE /_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device`
pub(crate) async fn delete(app: App, client: Client<Raw<Delete>>) -> Result<RawJson> {
    dehydrate::delete(&app, &client.caller).await.map(|id| named(&id))
}

/// `GET /_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device/{deviceId}/events`
pub(crate) async fn read(app: App, client: Client<Raw<Read>>) -> Result<RawJson> {
    let (id, from) = (client.request.arg(0).into(), client.request.query("from"));
    dehydrate::read(&app, &client.caller, id, from, End::NoToken).await.map(RawJson)
}

#[derive(Deserialize)]
struct ToRead {
    next_batch: Option<String>,
}

/// `POST /_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device/{deviceId}/events`
pub(crate) async fn read_by_post(app: App, client: Client<Raw<ReadByPost>>) -> Result<RawJson> {
    let body: ToRead = client.request.json()?;
    let id = client.request.arg(0).into();
    dehydrate::read(&app, &client.caller, id, body.next_batch, End::NoMessages).await.map(RawJson)
}
