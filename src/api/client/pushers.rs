//! Pushers.

use ruma::api::{
    IncomingRequest, Metadata,
    client::push::{
        get_pushers,
        set_pusher::v3::{PusherAction, Request as SetRequest, Response as SetResponse},
    },
    error::DeserializationError,
};
use serde_json::json;

use crate::{
    api::{Routes, extract::Client, reply::RawJson},
    error::{Refusal, Result},
    flows::{App, pushers as flow},
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

/// The body of `/pushers/set`. ruma's own type takes one without `kind` for one that deletes.
pub(crate) struct SetPusher(SetRequest);

impl Metadata for SetPusher {
    const METHOD: http::Method = SetRequest::METHOD;
    const RATE_LIMITED: bool = SetRequest::RATE_LIMITED;
    type Authentication = <SetRequest as Metadata>::Authentication;
    type PathBuilder = <SetRequest as Metadata>::PathBuilder;
    const PATH_BUILDER: Self::PathBuilder = SetRequest::PATH_BUILDER;
}

impl IncomingRequest for SetPusher {
    type EndpointError = <SetRequest as IncomingRequest>::EndpointError;
    type OutgoingResponse = SetResponse;

    fn try_from_http_request_inner(
        request: http::Request<&[u8]>,
        path_args: &[&str],
    ) -> Result<Self, DeserializationError> {
        #[derive(serde::Deserialize)]
        struct Kind {
            #[serde(rename = "kind")]
            _kind: serde_json::Value,
        }
        serde_json::from_slice::<Kind>(request.body())?;
        SetRequest::try_from_http_request_inner(request, path_args).map(Self)
    }
}

/// `POST /_matrix/client/v3/pushers/set`
pub(crate) async fn set_pusher(app: App, client: Client<SetPusher>) -> Result<SetResponse> {
    match client.request.0.action {
        PusherAction::Post(data) => flow::set(&app, &client.caller, data).await?,
        PusherAction::Delete(ids) => flow::delete(&app, &client.caller, ids).await?,
        _ => return Err(Refusal::invalid_param("There are pushers of kind http only.").into()),
    }
    Ok(SetResponse::new())
}
