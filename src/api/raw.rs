//! Requests that the handler reads by itself: the endpoint's method and paths, with path, query and body as they came.

use std::marker::PhantomData;

use axum::{body::Body, extract::Query};
use bytes::Bytes;
use http::{HeaderMap, Method, Uri, Version, request::Parts};
use ruma::{
    IdParseError,
    api::{IncomingRequest, error::FromHttpRequestError},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{
    api::{checked::Checked, misfit},
    error::{Error, Refusal, Result},
};

/// The body of a request, as its route reads it: one field is filled, and the others are empty.
pub struct Content {
    /// The JSON object that was sent.
    pub json: Checked,
    /// The bytes that were sent, whatever they are.
    pub raw: Bytes,
    /// The part of the body that the handler receives by itself.
    pub stream: Body,
}

/// The request of the endpoint `E` as it came, for handlers that keep what they are given or that ruma reads too
/// narrowly.
pub struct Raw<E> {
    /// The parameters of the path, decoded.
    pub path: Vec<String>,
    /// The body of a route that reads JSON; otherwise an empty object.
    pub body: Checked,
    /// The body of a route that takes bytes of any kind.
    pub bytes: Bytes,
    /// The body of a route that receives it part by part.
    pub stream: Body,
    /// The method that was sent: a request for the header fields alone says so.
    pub method: Method,
    /// The header fields that were sent.
    pub headers: HeaderMap,
    /// The version of HTTP in which the request came.
    pub version: Version,
    uri: Uri,
    endpoint: PhantomData<fn() -> E>,
}

impl<E> Raw<E> {
    pub(crate) fn new(path: Vec<String>, parts: Parts, content: Content) -> Self {
        let Content { json: body, raw: bytes, stream } = content;
        let Parts { method, headers, uri, version, .. } = parts;
        Self { path, body, bytes, stream, method, headers, version, uri, endpoint: PhantomData }
    }

    /// The parameter of the path at this index; empty if there is none. The handler knows how many its endpoint has.
    pub(crate) fn arg(&self, index: usize) -> &str {
        self.path.get(index).map_or("", String::as_str)
    }

    /// Reads the parameter of the path at this index as an id. Refuses one that is not valid: 400 `M_INVALID_PARAM`.
    pub(crate) fn id<T: for<'a> TryFrom<&'a str, Error = IdParseError>>(&self, index: usize) -> Result<T> {
        let arg = self.arg(index);
        T::try_from(arg).map_err(|why| {
            Refusal::invalid_param(format!("{arg:?} in the path is not a valid id: {why}.")).into()
        })
    }

    /// Reads the body as another type than ruma's. Refuses a body that does not fit, as for any request.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        self.body.read()
    }

    /// The parameter of the query of this name, decoded. If several have the name, the first one counts.
    pub(crate) fn query(&self, name: &str) -> Option<String> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&self.uri).ok()?;
        pairs.into_iter().find_map(|(key, value)| (key == name).then_some(value))
    }

    /// The values of a parameter of the query that may be there several times.
    pub(crate) fn query_all(&self, name: &str) -> Vec<String> {
        let pairs = Query::<Vec<(String, String)>>::try_from_uri(&self.uri);
        let pairs = pairs.map_or_else(|_| Vec::new(), |Query(pairs)| pairs);
        pairs.into_iter().filter(|(key, _)| key == name).map(|(_, value)| value).collect()
    }

    /// Refuses (400 `M_INVALID_PARAM`) a parameter of the query that is JSON but not of the expected type, and says
    /// why.
    pub(crate) fn check_query<T: DeserializeOwned>(&self, name: &str) -> Result<()> {
        let text = self.query(name).filter(|text| text.trim_start().starts_with('{'));
        match text.map(|text| serde_json::from_str::<T>(&text)) {
            Some(Err(why)) => {
                Err(Refusal::invalid_param(format!("The query parameter `{name}` cannot be read: {why}."))
                    .into())
            }
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// Adds this parameter to the query if the client has sent none of this name. Name and value must need no escapes.
    pub(crate) fn or_query(mut self, name: &str, value: &str) -> Self {
        if self.query(name).is_none() {
            let query = self.uri.query().unwrap_or_default();
            let with = format!("{}?{query}&{name}={value}", self.uri.path());
            self.uri = with.parse().unwrap_or(self.uri);
        }
        self
    }
}

impl<E: IncomingRequest> Raw<E> {
    /// Reads the request as ruma does, and refuses what ruma refuses.
    pub(crate) fn read(&self) -> Result<E> {
        let mut request = http::Request::new(self.body.as_ref());
        *request.uri_mut() = self.uri.clone();
        let args: Vec<_> = self.path.iter().map(String::as_str).collect();
        E::try_from_http_request_inner(request, &args)
            .map_err(|error| misfit::of_request(FromHttpRequestError::Deserialization(error)).into())
    }

    /// Reads the request as ruma does, but takes the `auth` of old clients too, which name the user or the address
    /// beside the password instead of in an `identifier`
    /// (<https://spec.matrix.org/v1.19/client-server-api/#password-based>).
    pub(crate) fn read_confirmed(mut self) -> Result<E> {
        if let Some(newer) = self.body.field("auth").and_then(renewed) {
            self.body = self.body.with_field("auth", &newer).map_err(Error::from)?;
        }
        self.read()
    }
}

/// Reads the fields of a form as a browser sends them. Bytes that are no form have none.
pub(crate) fn form(bytes: &[u8]) -> Vec<(String, String)> {
    let query = std::str::from_utf8(bytes).unwrap_or_default();
    let uri = format!("/?{query}").parse::<Uri>().ok();
    let fields = uri.and_then(|uri| Query::<Vec<(String, String)>>::try_from_uri(&uri).ok());
    fields.map(|Query(fields)| fields).unwrap_or_default()
}

/// Rewrites an old or an empty `auth` in today's form. None if it is in that form already, or is something else.
fn renewed(auth: &str) -> Option<String> {
    let mut auth: Map<String, Value> = serde_json::from_str(auth).ok()?;
    // An empty `auth` confirms nothing, so that the answer is the same as to a request without one: what to confirm.
    if auth.is_empty() {
        return Some("null".to_owned());
    }
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
    serde_json::to_string(&auth).ok()
}
