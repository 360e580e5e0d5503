//! Requests that are read by hand: ruma's method, paths and authentication, with path, query and body as they came.

use bytes::Bytes;
use http::Method;
use ruma::api::{IncomingRequest, Metadata, error::DeserializationError};
use std::marker::PhantomData;

/// The request `R` as it came: for endpoints that keep what they are given, or that ruma reads too narrowly.
pub(crate) struct Raw<R> {
    /// The parameters of the path, decoded.
    pub(crate) path: Vec<String>,
    /// The body.
    pub(crate) body: Bytes,
    request: PhantomData<fn() -> R>,
}

impl<R> Raw<R> {
    /// The parameter of the path at this index; an endpoint knows how many it has.
    pub(crate) fn arg(&self, index: usize) -> &str {
        self.path.get(index).map_or("", String::as_str)
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
            request: PhantomData,
        })
    }
}
