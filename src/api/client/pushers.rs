//! Pushers.

use ruma::api::client::push::{
    get_pushers,
    set_pusher::{self, v3::PusherAction},
};
use serde_json::json;

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{App, account::pushers as flow},
    push::pushers,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_pushers);
    r.client(set_pusher);
}

/// `GET /_matrix/client/v3/pushers`
pub(crate) async fn get_pushers(app: App, client: Client<get_pushers::v3::Request>) -> Result<RawJson> {
    let pushers = pushers::list(&*app.store.snapshot(), client.caller.user)?;
    Ok(RawJson(json!({ "pushers": pushers }).to_string().into()))
}

/// What ruma takes for one that deletes: a body without `kind`.
#[derive(serde::Deserialize)]
struct Kind {
    #[serde(rename = "kind")]
    _kind: serde_json::Value,
}

/// `POST /_matrix/client/v3/pushers/set`
pub(crate) async fn set_pusher(
    app: App,
    client: Client<Raw<set_pusher::v3::Request>>,
) -> Result<set_pusher::v3::Response> {
    if serde_json::from_slice::<Kind>(&client.request.body).is_err() {
        return Err(Refusal::missing_param("A pusher has a `kind`; it is null to take one away.").into());
    }
    match client.request.read()?.action {
        PusherAction::Post(data) => flow::set(&app, &client.caller, data).await?,
        PusherAction::Delete(ids) => flow::delete(&app, &client.caller, ids).await?,
        _ => return Err(Refusal::invalid_param("There are pushers of kind http only.").into()),
    }
    Ok(set_pusher::v3::Response::new())
}
