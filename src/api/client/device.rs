//! The devices of the caller: reading them, renaming one, deleting them.

use ruma::api::client::device::{delete_device, delete_devices, get_device, get_devices, update_device};
use serde_json::{Value, json};

use crate::{
    accounts::devices::{self, Device, Ending},
    api::{
        Routes,
        extract::Client,
        policy::{Body, Guests, KIB},
        raw::Raw,
        reply::RawJson,
    },
    error::Result,
    flows::{
        App,
        account::{confirm, log_out::log_out},
        device::rename_device,
        limits::Limit,
    },
    ids::UserNum,
    store::{Fault, Read},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_devices).limit(Limit::Read).guests(Guests::Yes);
    r.client(get_device).limit(Limit::Read).guests(Guests::Yes);
    // Others see the name of a device, which is all that this changes.
    r.client(update_device).limit(Limit::Other).guests(Guests::Yes).not_suspended();
    r.client(delete_device).limit(Limit::Login);
    // The body has room for as many device ids as an account may have devices.
    r.client(delete_devices).limit(Limit::Login).body(Body::Json(256 * KIB));
}

/// A device as its owner sees it. Unknown fields are left out, where ruma would write null.
fn shown(read: &(impl Read + ?Sized), user: UserNum, device: Device) -> Result<Value, Fault> {
    let seen = devices::find_seen(read, user, device.num)?.unwrap_or_default();
    let last = if seen.ms == 0 { device.created_ms } else { seen.ms };
    let mut shown = json!({ "device_id": device.id, "last_seen_ts": last });
    for (key, value) in [("display_name", device.display_name), ("last_seen_ip", seen.ip)] {
        if let (Some(value), Some(shown)) = (value, shown.as_object_mut()) {
            shown.insert(key.to_owned(), value.into());
        }
    }
    Ok(shown)
}

/// `GET /_matrix/client/v3/devices`
pub(crate) async fn get_devices(app: App, client: Client<get_devices::v3::Request>) -> Result<RawJson> {
    let (store, user) = (app.store.clone(), client.caller.user);
    // An account may have thousands of devices, so they are read off the async threads.
    let list = move || {
        let snapshot = store.snapshot();
        let devices = devices::list(&*snapshot, user)?;
        let shown: Result<Vec<_>, Fault> =
            devices.into_iter().map(|device| shown(&*snapshot, user, device)).collect();
        Ok(json!({ "devices": shown? }).to_string().into())
    };
    Ok(RawJson(app.env.blocking(list).await?))
}

/// `GET /_matrix/client/v3/devices/{deviceId}`
pub(crate) async fn get_device(app: App, client: Client<get_device::v3::Request>) -> Result<RawJson> {
    let (snapshot, user) = (app.store.snapshot(), client.caller.user);
    let device = devices::require(&*snapshot, user, &client.request.device_id)?;
    Ok(RawJson(shown(&*snapshot, user, device)?.to_string().into()))
}

/// `PUT /_matrix/client/v3/devices/{deviceId}`
pub(crate) async fn update_device(
    app: App,
    client: Client<update_device::v3::Request>,
) -> Result<update_device::v3::Response> {
    let request = client.request;
    rename_device::rename_device(&app, &client.caller, request.device_id, request.display_name).await?;
    Ok(update_device::v3::Response::new())
}

/// `DELETE /_matrix/client/v3/devices/{deviceId}`
pub(crate) async fn delete_device(
    app: App,
    client: Client<Raw<delete_device::v3::Request>>,
) -> Result<delete_device::v3::Response> {
    let (caller, request) = (client.caller, client.request.read_confirmed()?);
    let endpoint = format!("delete device {}", request.device_id);
    let operation = confirm::operation(&endpoint, Some(&caller), &json!({}));
    let flows = confirm::password_flow();
    confirm::confirm(&app, &operation, &flows, Some(&caller), request.auth.as_ref()).await?;
    log_out(&app, &caller, Ending::These([request.device_id].into())).await?;
    Ok(delete_device::v3::Response::new())
}

/// `POST /_matrix/client/v3/delete_devices`
pub(crate) async fn delete_devices(
    app: App,
    client: Client<Raw<delete_devices::v3::Request>>,
) -> Result<delete_devices::v3::Response> {
    let (caller, request) = (client.caller, client.request.read_confirmed()?);
    let wanted = json!({ "devices": request.devices });
    let operation = confirm::operation("delete devices", Some(&caller), &wanted);
    let flows = confirm::password_flow();
    confirm::confirm(&app, &operation, &flows, Some(&caller), request.auth.as_ref()).await?;
    log_out(&app, &caller, Ending::These(request.devices.into_iter().collect())).await?;
    Ok(delete_devices::v3::Response::new())
}
