//! The tags of rooms, which are account data of type `m.tag`.

use ruma::api::client::tag::{create_tag, delete_tag, get_tags};
use serde_json::{Value, json};

use crate::{
    accounts::account_data,
    api::{Routes, client::config::require_self, extract::Client, raw::Raw, reply::RawJson},
    error::Result,
    flows::{App, account::keep, limits::Limit},
    schema::event_types::TAG,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_tags).limit(Limit::Read);
    r.client(create_tag).limit(Limit::Other);
    r.client(delete_tag).limit(Limit::Other);
}

/// `GET /_matrix/client/v3/user/{userId}/rooms/{roomId}/tags`
pub(crate) async fn get_tags(app: App, client: Client<get_tags::v3::Request>) -> Result<RawJson> {
    let (caller, request) = (client.caller, client.request);
    require_self(&caller, &request.user_id)?;
    let row = account_data::find(&*app.store.snapshot(), caller.user, Some(&request.room_id), TAG)?;
    let content: Value = row.and_then(|row| serde_json::from_slice(&row.content).ok()).unwrap_or_default();
    let tags = content.get("tags").filter(|tags| tags.is_object()).cloned().unwrap_or_else(|| json!({}));
    Ok(RawJson(json!({ "tags": tags }).to_string().into()))
}

/// `PUT /_matrix/client/v3/user/{userId}/rooms/{roomId}/tags/{tag}`
pub(crate) async fn create_tag(
    app: App,
    client: Client<Raw<create_tag::v3::Request>>,
) -> Result<create_tag::v3::Response> {
    let (caller, request) = (client.caller, client.request.read()?);
    require_self(&caller, &request.user_id)?;
    // The tag is kept as it came, because clients may keep fields of their own beside the order.
    let info = client.request.json()?;
    keep::change_tag(&app, &caller, request.room_id, request.tag, Some(info)).await?;
    Ok(create_tag::v3::Response::new())
}

/// `DELETE /_matrix/client/v3/user/{userId}/rooms/{roomId}/tags/{tag}`
pub(crate) async fn delete_tag(
    app: App,
    client: Client<delete_tag::v3::Request>,
) -> Result<delete_tag::v3::Response> {
    let (caller, request) = (client.caller, client.request);
    require_self(&caller, &request.user_id)?;
    keep::change_tag(&app, &caller, request.room_id, request.tag, None).await?;
    Ok(delete_tag::v3::Response::new())
}
