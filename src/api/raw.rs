//! Requests that are read by hand: the endpoint's method and paths, with path, query and body as they came.

use std::marker::PhantomData;

use axum::{body::Body, extract::Query};
use bytes::Bytes;
use http::Uri;
use ruma::{
    IdParseError,
    api::{IncomingRequest, error::FromHttpRequestError},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{
    api::{
        checked::Checked,
        extract::{self, Content},
    },
    error::{Error, Refusal, Result},
};

/// The request of the endpoint `E` as it came: for handlers that keep what they are given, or that ruma reads too narrowly.
pub struct Raw<E> {
    /// The parameters of the path, decoded.
    pub path: Vec<String>,
    /// The body that is JSON; an empty object, if the route reads none.
    pub body: Checked,
    /// The body of a route that takes bytes of any kind.
    pub bytes: Bytes,
    /// The body of a route that receives it part by part.
    pub stream: Body,
    uri: Uri,
    endpoint: PhantomData<fn() -> E>,
}

impl<E> Raw<E> {
    pub(crate) fn new(path: Vec<String>, uri: Uri, content: Content) -> Self {
        let Content { json: body, raw: bytes, stream } = content;
        Self { path, body, bytes, stream, uri, endpoint: PhantomData }
    }

    /// The parameter of the path at this index; an endpoint knows how many it has.
    pub(crate) fn arg(&self, index: usize) -> &str {
        self.path.get(index).map_or("", String::as_str)
    }

    /// The parameter of the path at this index, read as an id. Errors: 400 `M_INVALID_PARAM`.
    pub(crate) fn id<T: for<'a> TryFrom<&'a str, Error = IdParseError>>(&self, index: usize) -> Result<T> {
        let arg = self.arg(index);
        T::try_from(arg).map_err(|why| {
            Refusal::invalid_param(format!("{arg:?} in the path is not the id it should be: {why}.")).into()
        })
    }

    /// The body, read as another type than ruma's. Errors: what does not fit, as any request is refused.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        self.body.read()
    }

    /// The parameter of the query of this name, decoded; the first, if there are several.
    pub(crate) fn query(&self, name: &str) -> Option<String> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&self.uri).ok()?;
        pairs.into_iter().find_map(|(key, value)| (key == name).then_some(value))
    }

    /// Refuses (400 `M_INVALID_PARAM`) a parameter of the query that is JSON but not what it should be, and says why.
    pub(crate) fn check_query<T: DeserializeOwned>(&self, name: &str) -> Result<()> {
        let text = self.query(name).filter(|text| text.trim_start().starts_with('{'));
        match text.map(|text| serde_json::from_str::<T>(&text)) {
            Some(Err(why)) => {
                Err(Refusal::invalid_param(format!("`{name}` is not what it should be: {why}.")).into())
            }
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// With this parameter in the query where the client gives none of this name. Neither needs escapes.
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
    /// The request as ruma reads it. Refuses what ruma does, as if nobody had read it by hand.
    pub(crate) fn read(&self) -> Result<E> {
        let mut request = http::Request::new(self.body.as_ref());
        *request.uri_mut() = self.uri.clone();
        let args: Vec<_> = self.path.iter().map(String::as_str).collect();
        E::try_from_http_request_inner(request, &args)
            .map_err(|error| extract::refusal(FromHttpRequestError::Deserialization(error)).into())
    }

    /// The request as ruma reads it, with the `auth` of old clients, which name the user or the address beside the password
    /// instead of in an `identifier` (<https://spec.matrix.org/v1.19/client-server-api/#password-based>).
    pub(crate) fn read_confirmed(mut self) -> Result<E> {
        if let Some(newer) = self.body.field("auth").and_then(renewed) {
            self.body = self.body.with_field("auth", &newer).map_err(Error::from)?;
        }
        self.read()
    }
}

/// The fields of a form as a browser sends them; none where the bytes are no form.
pub(crate) fn form(bytes: &[u8]) -> Vec<(String, String)> {
    let query = std::str::from_utf8(bytes).unwrap_or_default();
    let uri = format!("/?{query}").parse::<Uri>().ok();
    let fields = uri.and_then(|uri| Query::<Vec<(String, String)>>::try_from_uri(&uri).ok());
    fields.map(|Query(fields)| fields).unwrap_or_default()
}

/// An old `auth` as it is written today; none if it is, or is something else.
fn renewed(auth: &str) -> Option<String> {
    let mut auth: Map<String, Value> = serde_json::from_str(auth).ok()?;
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
