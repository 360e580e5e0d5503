//! Requests that are confirmed by user-interactive authentication, with the `auth` of old clients, which name the user or the
//! address beside the password instead of in an `identifier`
//! (<https://spec.matrix.org/v1.19/client-server-api/#password-based>).

use http::Method;
use ruma::api::{IncomingRequest, Metadata, error::DeserializationError};
use serde_json::{Map, Value, json};

/// The request `R`, whose `auth` may be of the old form.
pub(crate) struct Confirmable<R>(pub(crate) R);

impl<R: Metadata> Metadata for Confirmable<R> {
    const METHOD: Method = R::METHOD;
    const RATE_LIMITED: bool = R::RATE_LIMITED;
    type Authentication = R::Authentication;
    type PathBuilder = R::PathBuilder;
    const PATH_BUILDER: Self::PathBuilder = R::PATH_BUILDER;
}

impl<R: IncomingRequest> IncomingRequest for Confirmable<R> {
    type EndpointError = R::EndpointError;
    type OutgoingResponse = R::OutgoingResponse;

    fn try_from_http_request_inner(
        request: http::Request<&[u8]>,
        path_args: &[&str],
    ) -> Result<Self, DeserializationError> {
        let (parts, body) = request.into_parts();
        let newer = renewed(body);
        let body = newer.as_deref().unwrap_or(body);
        R::try_from_http_request_inner(http::Request::from_parts(parts, body), path_args).map(Self)
    }
}

/// The body with an `auth` as it is written today; none if it is, or is something else.
fn renewed(body: &[u8]) -> Option<Vec<u8>> {
    let mut request: Map<String, Value> = serde_json::from_slice(body).ok()?;
    let auth = request.get_mut("auth")?.as_object_mut()?;
    if auth.get("type").and_then(Value::as_str) != Some("m.login.password") || auth.contains_key("identifier")
    {
        return None;
    }
    let identifier = match (auth.get("user"), auth.get("medium"), auth.get("address")) {
        (Some(user), ..) => json!({ "type": "m.id.user", "user": user }),
        (None, Some(medium), Some(address)) => {
            json!({ "type": "m.id.thirdparty", "medium": medium, "address": address })
        }
        _ => return None,
    };
    auth.insert("identifier".to_owned(), identifier);
    serde_json::to_vec(&request).ok()
}
