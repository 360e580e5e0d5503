//! From HTTP to a typed request. Who may call is a type: [`Public`], [`Client`], [`MaybeClient`].
//!
//! The token is checked before the body is read.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use axum::{
    body::Body,
    extract::{FromRequestParts, RawPathParams, Request},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{Method, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use ruma::api::{
    IncomingRequest, IncomingRequestExt,
    auth_scheme::{AccessTokenOptional, AuthScheme},
    error::{DeserializationError, ErrorKind, FromHttpRequestError},
};
use serde::de::IgnoredAny;

use crate::{
    accounts::{self, Caller},
    api::{guests, limits::Source, reply},
    env::spent::{self, Place},
    error::{Error, Refusal, Result},
    flows::{self, App},
    ids::UserNum,
};

/// The deepest JSON that is accepted, in levels. What is stored is wrapped in a few more levels when it is shown,
/// and readers of JSON commonly stop at 127.
const NESTING_MAX: usize = 110;

/// Numbers with more digits in a row may be beyond all bounds.
const NUMBER_DIGITS_MAX: usize = 100;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// A request that anybody may make.
#[derive(Debug)]
pub struct Public<R> {
    /// What is asked.
    pub request: R,
    /// From where.
    pub peer: IpAddr,
}

/// A request with a valid access token.
#[derive(Debug)]
pub struct Client<R> {
    /// Who asks.
    pub caller: Caller,
    /// What is asked.
    pub request: R,
    /// From where.
    pub peer: IpAddr,
}

/// A request with a valid access token or none.
#[derive(Debug)]
pub struct MaybeClient<R> {
    /// Who asks, if a token says so.
    pub caller: Option<Caller>,
    /// What is asked.
    pub request: R,
    /// From where.
    pub peer: IpAddr,
}

/// Who may call an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Auth {
    /// Everybody; a token is not looked at.
    None,
    /// Whoever has an access token.
    Token,
    /// Everybody; but a token that is there must be valid.
    MaybeToken,
}

/// The address a request came from. The listener puts it into the request's extensions.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// A request on its way: first its caller is known, then it is read.
pub(crate) struct Call {
    parts: Parts,
    unread: Body,
    body: Bytes,
    caller: Option<Caller>,
    peer: IpAddr,
}

impl Call {
    /// Checks the token. The body is not looked at.
    pub(crate) fn begin(app: &App, auth: Auth, request: Request) -> Result<Self> {
        let (parts, unread) = request.into_parts();
        let peer = parts.extensions.get::<Peer>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0);
        let caller = authenticate(app, auth, &parts)?;
        Ok(Self { parts, unread, body: Bytes::new(), caller, peer })
    }

    /// Whose request it is, if a token said so.
    pub(crate) fn user(&self) -> Option<UserNum> {
        self.caller.as_ref().map(|caller| caller.user)
    }

    /// Refuses what guests may not do, if a guest asks: 403 `M_GUEST_ACCESS_FORBIDDEN`.
    pub(crate) fn check_guest(&self, template: &str) -> Result<()> {
        if self.caller.as_ref().is_some_and(|caller| caller.is_guest) {
            guests::require_allowed(self.parts.method.as_str(), template)?;
        }
        Ok(())
    }

    /// Whom a rate limit counts.
    pub(crate) fn source(&self) -> Source {
        self.user().map_or_else(|| Source::address(self.peer), Source::User)
    }

    /// Notes that the caller was here.
    pub(crate) async fn note_caller(&mut self, app: &App) -> Result<()> {
        match &self.caller {
            Some(caller) => flows::account::seen::seen(app, caller, self.peer).await,
            None => Ok(()),
        }
    }

    /// Reads the body, within bounds.
    pub(crate) async fn read_body(&mut self, app: &App) -> Result<()> {
        if self.has_body() {
            let began = app.env.instant();
            let unread = std::mem::take(&mut self.unread);
            let bytes_max = app.config.limits.body_bytes_max.in_memory();
            let body = tokio::time::timeout(BODY_TIMEOUT, read_body(&self.parts, unread, bytes_max));
            self.body = body.await.map_err(|_| reply::too_slow())??;
            spent::add(Place::Receiving, app.env.instant().saturating_duration_since(began));
        }
        Ok(())
    }

    fn has_body(&self) -> bool {
        self.parts.method != Method::GET && self.parts.method != Method::HEAD
    }

    fn parse<R: IncomingRequest>(mut self) -> Result<R> {
        let args = path_args(&mut self.parts)?;
        let args: Vec<_> = args.iter().map(|(_, value)| value).collect();
        if self.parts.method == Method::PUT && self.body.is_empty() {
            // What is put somewhere has to be said: the specification asks each of these requests for a body.
            return Err(Refusal::new(ErrorKind::NotJson, "The request has no body.").into());
        }
        // Where every field is optional, nothing says as much as an empty object.
        let body: &[u8] = if self.has_body() && self.body.is_empty() { b"{}" } else { &self.body };
        check_json(body)?;
        R::try_from_http_request(http::Request::from_parts(self.parts, body), &args)
            .map_err(|error| refusal(error, &self.body).into())
    }
}

impl<R: IncomingRequest> TryFrom<Call> for Public<R> {
    type Error = Error;
    fn try_from(call: Call) -> Result<Self> {
        Ok(Self { peer: call.peer, request: call.parse()? })
    }
}

impl<R: IncomingRequest> TryFrom<Call> for Client<R> {
    type Error = Error;
    fn try_from(mut call: Call) -> Result<Self> {
        let caller = call.caller.take().ok_or_else(missing_token)?;
        Ok(Self { caller, peer: call.peer, request: call.parse()? })
    }
}

impl<R: IncomingRequest> TryFrom<Call> for MaybeClient<R> {
    type Error = Error;
    fn try_from(mut call: Call) -> Result<Self> {
        Ok(Self { caller: call.caller.take(), peer: call.peer, request: call.parse()? })
    }
}

fn missing_token() -> Error {
    Refusal::new(ErrorKind::MissingToken, "This needs an access token.").into()
}

fn authenticate(app: &App, auth: Auth, parts: &Parts) -> Result<Option<Caller>> {
    if auth == Auth::None {
        return Ok(None);
    }
    let mut request = http::Request::new(());
    *request.uri_mut() = parts.uri.clone();
    if let Some(value) = parts.headers.get(header::AUTHORIZATION) {
        request.headers_mut().insert(header::AUTHORIZATION, value.clone());
    }
    let token = AccessTokenOptional::extract_authentication(&request)
        .map_err(|_| Refusal::new(ErrorKind::MissingToken, "The access token is not readable."))?;
    match token {
        Some(token) => {
            let snapshot = app.store.snapshot();
            accounts::tokens::find_caller(&*snapshot, app.env.now_ms(), &token).map(Some)
        }
        None if auth == Auth::Token => Err(missing_token()),
        None => Ok(None),
    }
}

/// The parameters in the path, percent-decoded, in their order.
fn path_args(parts: &mut Parts) -> Result<RawPathParams> {
    // It only looks into the extensions, so it is ready at once.
    let params = RawPathParams::from_request_parts(parts, &()).now_or_never();
    match params {
        Some(Ok(params)) => Ok(params),
        _ => Err(Refusal::invalid_param("The path is not valid UTF-8.").into()),
    }
}

fn too_large(bytes_max: usize) -> Refusal {
    Refusal::too_large(format!("The request is larger than {bytes_max} bytes."))
}

async fn read_body(parts: &Parts, body: Body, bytes_max: usize) -> Result<Bytes> {
    let announced =
        parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|bytes: usize| bytes > bytes_max) {
        return Err(too_large(bytes_max).into());
    }
    match Limited::new(body, bytes_max).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large(bytes_max).into()),
        Err(_) => Err(Refusal::new(ErrorKind::NotJson, "The request's body ended early.").into()),
    }
}

/// What serde does not refuse by itself: bytes that are not UTF-8 in parts nobody reads, arrays where an object is
/// asked for, and, in parts that are kept as they are, what a reader could not take in: deep nesting, numbers beyond all
/// bounds, halves of characters.
fn check_json(body: &[u8]) -> Result<(), Refusal> {
    if body.is_empty() {
        return Ok(());
    }
    let not_json = || Refusal::new(ErrorKind::NotJson, "The request's body is not JSON.");
    let text = std::str::from_utf8(body).map_err(|_| not_json())?;
    let shape = Shape::of(body);
    if shape.nesting > NESTING_MAX {
        return Err(Refusal::bad_json("The request's body is nested too deeply."));
    }
    let is_json = || serde_json::from_str::<IgnoredAny>(text).is_ok();
    if shape.is_odd && serde_json::from_str::<serde_json::Value>(text).is_err() && is_json() {
        return Err(Refusal::bad_json("The request's body holds a number or a character that can't be."));
    }
    match text.trim_ascii_start().starts_with('{') {
        true => Ok(()),
        false if is_json() => Err(Refusal::bad_json("The request's body is not an object.")),
        false => Err(not_json()),
    }
}

/// What one pass over JSON tells.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    /// How many levels of objects and arrays stand in one another at most.
    nesting: usize,
    /// There is a number, or an escape, that is worth a second look.
    is_odd: bool,
}

impl Shape {
    fn of(json: &[u8]) -> Self {
        let mut shape = Self { nesting: 0, is_odd: false };
        let (mut depth, mut digits) = (0_usize, 0_usize);
        let (mut in_string, mut escaped, mut unicode) = (false, false, false);
        for byte in json {
            let after_digit = digits > 0;
            digits = if !in_string && byte.is_ascii_digit() { digits + 1 } else { 0 };
            match byte {
                b'd' | b'D' if unicode => shape.is_odd = true,
                b'u' if escaped => {
                    unicode = true;
                    escaped = false;
                    continue;
                }
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                b'{' | b'[' if !in_string => {
                    depth += 1;
                    shape.nesting = shape.nesting.max(depth);
                }
                b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
                b'e' | b'E' if after_digit => shape.is_odd = true,
                _ if digits > NUMBER_DIGITS_MAX => shape.is_odd = true,
                _ => {}
            }
            unicode = false;
        }
        shape
    }
}

/// What is wrong with a request, in Matrix's words.
pub(crate) fn refusal(error: FromHttpRequestError, body: &[u8]) -> Refusal {
    let FromHttpRequestError::Deserialization(error) = error else {
        return Refusal::unrecognized("The endpoint has no such method.");
    };
    let missing = |why: &str| why.starts_with("missing field");
    match error {
        DeserializationError::Json(error) => {
            let why = error.to_string();
            let is_json = serde_json::from_slice::<IgnoredAny>(body).is_ok();
            if !is_json || error.is_syntax() || error.is_eof() {
                Refusal::new(ErrorKind::NotJson, format!("The request's body is not JSON: {why}."))
            } else if missing(&why) {
                Refusal::missing_param(format!("The request's body is incomplete: {why}."))
            } else {
                Refusal::bad_json(format!("The request's body is not what it should be: {why}."))
            }
        }
        DeserializationError::Query(error) if missing(&error.to_string()) => {
            Refusal::missing_param(format!("The request is incomplete: {error}."))
        }
        error => Refusal::invalid_param(format!("A parameter is not what it should be: {error}.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_finds_nesting_and_what_is_odd() {
        let shape = |json: &str| {
            let Shape { nesting, is_odd } = Shape::of(json.as_bytes());
            (nesting, is_odd)
        };
        assert_eq!(shape(r#"{"a":[{"b":"[[[{{{"}],"c":"\\\"[["}"#), (3, false));
        assert_eq!(shape(r#"{"true":true,"false":false,"1e9":"2e9"}"#), (1, false));
        assert_eq!(shape(r#"{"a":-1e999}"#), (1, true));
        assert_eq!(shape(r#"{"a":"\ud800"}"#), (1, true));
        assert_eq!(shape(r#"{"a":"\\ud800 \u00e9"}"#), (1, false));
        assert_eq!(shape(&format!("[{}]", "9".repeat(400))), (1, true));
    }

    #[test]
    fn what_nobody_could_read_again_is_refused() {
        let code =
            |json: &str| check_json(json.as_bytes()).err().map(|refusal| refusal.kind.errcode().to_string());
        for (json, expected) in [
            (r#"{"a":-1e999}"#, Some("M_BAD_JSON")),
            (r#"{"a":"\ud800"}"#, Some("M_BAD_JSON")),
            (r#"{"a":"\ud83d\ude00","b":1e9}"#, None),
            (r#"{"a":"\ud800""#, None),
            ("[1e9]", Some("M_BAD_JSON")),
            ("[1e9", Some("M_NOT_JSON")),
            ("{}", None),
        ] {
            assert_eq!(code(json).as_deref(), expected, "{json}");
        }
        assert_eq!(code(&format!("{{\"a\":{}}}", "9".repeat(400))).as_deref(), Some("M_BAD_JSON"));
    }
}
