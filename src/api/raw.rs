//! Requests that are read by hand: ruma's method, paths and authentication, with path, query and body as they came.

use axum::extract::Query;
use bytes::Bytes;
use http::{Method, Uri};
use ruma::{
    IdParseError,
    api::{
        IncomingRequest, Metadata,
        error::{DeserializationError, FromHttpRequestError},
    },
};
use serde::de::DeserializeOwned;
use std::marker::PhantomData;

use crate::{
    api::extract,
    error::{Refusal, Result},
};

/// The request `R` as it came: for endpoints that keep what they are given, or that ruma reads too narrowly.
pub(crate) struct Raw<R> {
    /// The parameters of the path, decoded.
    pub(crate) path: Vec<String>,
    /// The body.
    pub(crate) body: Bytes,
    uri: Uri,
    request: PhantomData<fn() -> R>,
}

impl<R> Raw<R> {
    /// The parameter of the path at this index; an endpoint knows how many it has.
    pub(crate) fn arg(&self, index: usize) -> &str {
        self.path.get(index).map_or("", String::as_str)
    }

    /// The parameter of the path at this index, read as an id. Errors: 400 `M_INVALID_PARAM`.
    pub(crate) fn id<T: for<'a> TryFrom<&'a str, Error = IdParseError>>(&self, index: usize) -> Result<T> {
        let id = T::try_from(self.arg(index));
        Ok(id
            .map_err(|why| Refusal::invalid_param(format!("A parameter is not what it should be: {why}.")))?)
    }

    /// The body, read as another type than ruma's. Refuses what does not fit as any request is refused.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).map_err(|error| {
            let error = FromHttpRequestError::Deserialization(DeserializationError::Json(error));
            extract::refusal(error, &self.body).into()
        })
    }

    /// The parameter of the query of this name, decoded; the first, if there are several.
    pub(crate) fn query(&self, name: &str) -> Option<String> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&self.uri).ok()?;
        pairs.into_iter().find_map(|(key, value)| (key == name).then_some(value))
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

impl<R: IncomingRequest> Raw<R> {
    /// The request as ruma reads it. Refuses what ruma does, as if nobody had read it by hand.
    pub(crate) fn read(&self) -> Result<R> {
        let mut request = http::Request::new(&*self.body);
        *request.uri_mut() = self.uri.clone();
        let args: Vec<_> = self.path.iter().map(String::as_str).collect();
        R::try_from_http_request_inner(request, &args).map_err(|error| {
            extract::refusal(FromHttpRequestError::Deserialization(error), &self.body).into()
        })
    }
}

impl<R: Metadata> Metadata for Raw<R> {
    const METHOD: Method = R::METHOD;
    const RATE_LIMITED: bool = R::RATE_LIMITED;
    type Authentication = R::Authentication;
    type PathBuilder = R::PathBuilder;
    const PATH_BUILDER: Self::PathBuilder = R::PATH_BUILDER;
}

impl<R: IncomingRequest> IncomingRequest for Raw<R> {
    type EndpointError = R::EndpointError;
    type OutgoingResponse = R::OutgoingResponse;

    fn try_from_http_request_inner(
        request: http::Request<&[u8]>,
        path_args: &[&str],
    ) -> Result<Self, DeserializationError> {
        Ok(Self {
            path: path_args.iter().map(|&arg| arg.to_owned()).collect(),
            body: Bytes::copy_from_slice(request.body()),
            uri: request.uri().clone(),
            request: PhantomData,
        })
    }
}
