//! Translates results to HTTP, and logs failures. Nothing else does either; only this file knows status codes.

mod coming;
mod file;

use std::{
    future::{Future, ready},
    time::{Duration, SystemTime},
};

use axum::{body::Body, response::Response};
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::{HeaderValue, StatusCode, header};
use ruma::api::{
    OutgoingResponse, OutgoingResponseExt,
    error::{ErrorBody, ErrorKind, RetryAfter, StandardErrorBody},
};

use crate::{
    error::{Error, Exception, Refusal, Result, limit_exceeded},
    flows::{App, room::look::Whole},
    media::range::Asked,
};

pub(crate) use coming::{AnyFileReply, ComingReply};
pub(crate) use file::{Conditions, FileReply, Multipart};

/// A handler returns a value of a type that can be written as an answer.
pub trait IntoReply: Send {
    /// Writes the answer as HTTP.
    fn into_reply(self) -> Result<Response>;
}

impl<T: OutgoingResponse + Send> IntoReply for T {
    fn into_reply(self) -> Result<Response> {
        let response = self
            .try_into_http_response::<BytesMut>()
            .map_err(|error| Error::broken(format!("an answer cannot be written: {error}")))?;
        Ok(response.map(|body| Body::from(body.freeze())))
    }
}

/// A page for people, which loads nothing from outside.
pub(crate) struct Page {
    /// The whole page, as HTML.
    pub(crate) html: String,
    /// The page has a script of its own, so that its policy must allow scripts.
    pub(crate) has_script: bool,
}

impl IntoReply for Page {
    fn into_reply(self) -> Result<Response> {
        let policy = if self.has_script {
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        } else {
            "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        };
        let mut response = Response::new(Body::from(self.html));
        for (name, value) in [
            (header::CONTENT_TYPE, "text/html; charset=utf-8"),
            (header::CONTENT_SECURITY_POLICY, policy),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::X_FRAME_OPTIONS, "DENY"),
            (header::REFERRER_POLICY, "no-referrer"),
        ] {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        Ok(response)
    }
}

/// An answer that is JSON already, because it is put together from stored bytes.
#[derive(Debug)]
pub struct RawJson(pub Bytes);

impl IntoReply for RawJson {
    fn into_reply(self) -> Result<Response> {
        Ok(json(StatusCode::OK, self.0))
    }
}

/// The answer of a poll for news, which is JSON already.
pub(crate) struct Polled {
    /// The answer, as the client gets it.
    pub(crate) json: Bytes,
    /// The position from which the client asks next.
    pub(crate) pos: String,
    /// Whether the answer tells something, and did not come only because the time was up.
    pub(crate) is_news: bool,
}

/// The facts about the answer of a poll that a socket must know, and does not read out of its JSON.
#[derive(Clone, Debug)]
pub(crate) struct News {
    /// The position from which the client asks next.
    pub(crate) pos: String,
    /// Whether the answer tells something.
    pub(crate) is_news: bool,
}

impl IntoReply for Polled {
    fn into_reply(self) -> Result<Response> {
        let mut response = json(StatusCode::OK, self.json);
        response.extensions_mut().insert(News { pos: self.pos, is_news: self.is_news });
        Ok(response)
    }
}

/// The code of a refusal, for a socket, which does not read it out of the JSON.
#[derive(Clone, Debug)]
pub(crate) struct Refused(pub(crate) ErrorKind);

/// The answer to a handshake, after which the connection is a WebSocket.
pub(crate) struct Switching {
    /// The answer to the key of the client.
    pub(crate) accept: String,
    /// The protocol that was selected. None if the client has named none.
    pub(crate) protocol: Option<&'static str>,
}

impl IntoReply for Switching {
    fn into_reply(self) -> Result<Response> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let accept = HeaderValue::try_from(self.accept)
            .map_err(|error| Error::broken(format!("a handshake cannot be answered: {error}")))?;
        let fields = response.headers_mut();
        fields.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        fields.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        fields.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        if let Some(protocol) = self.protocol {
            fields.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
        }
        Ok(response)
    }
}

/// The outcome of a request to a rendezvous of MSC4108.
pub(crate) enum Met {
    /// A session was begun, which this JSON names.
    Opened(Bytes),
    /// The payload is this.
    Told(Bytes),
    /// The payload is the one that the client knows.
    Unchanged,
    /// The payload of the client was written.
    Written,
    /// The payload of the client was not written, because somebody else has written meanwhile.
    Overtaken,
}

/// An answer about a session of a rendezvous, which says in its header fields how the session stands.
pub(crate) struct Meeting {
    /// The outcome of the request.
    pub(crate) met: Met,
    /// The entity tag of the payload.
    pub(crate) tag: String,
    /// When the payload was written, in milliseconds since the epoch.
    pub(crate) changed_ms: u64,
    /// When the session ends, in milliseconds since the epoch.
    pub(crate) ends_ms: u64,
}

impl IntoReply for Meeting {
    fn into_reply(self) -> Result<Response> {
        let mut response = match self.met {
            Met::Opened(body) => json(StatusCode::CREATED, body),
            Met::Told(payload) => {
                let mut response = Response::new(Body::from(payload));
                for (name, value) in [
                    (header::CONTENT_TYPE, "text/plain"),
                    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
                    (header::CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'"),
                ] {
                    response.headers_mut().insert(name, HeaderValue::from_static(value));
                }
                response
            }
            Met::Unchanged => without_body(StatusCode::NOT_MODIFIED),
            Met::Written => without_body(StatusCode::ACCEPTED),
            Met::Overtaken => {
                // The proposal names its new code like this as long as it is not part of the specification.
                let body = serde_json::json!({
                    "errcode": "M_UNKNOWN",
                    "error": "Somebody else has written meanwhile: read that first.",
                    "org.matrix.msc4108.errcode": "M_CONCURRENT_WRITE",
                });
                json(StatusCode::PRECONDITION_FAILED, Bytes::from(body.to_string()))
            }
        };
        let date = |ms| httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_millis(ms));
        for (name, value) in [
            (header::ETAG, self.tag),
            (header::EXPIRES, date(self.ends_ms)),
            (header::LAST_MODIFIED, date(self.changed_ms)),
            (header::CACHE_CONTROL, "no-store".to_owned()),
            (header::PRAGMA, "no-cache".to_owned()),
        ] {
            let value = HeaderValue::try_from(value)
                .map_err(|error| Error::broken(format!("a header field cannot be written: {error}")))?;
            response.headers_mut().insert(name, value);
        }
        Ok(response)
    }
}

/// The answer to a request that has ended something: 204.
pub(crate) struct Gone;

impl IntoReply for Gone {
    fn into_reply(self) -> Result<Response> {
        Ok(without_body(StatusCode::NO_CONTENT))
    }
}

fn without_body(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// An answer to a client that has a copy already.
fn unchanged() -> Response {
    without_body(StatusCode::NOT_MODIFIED)
}

/// An answer to a client that is sent elsewhere with the same request.
fn elsewhere() -> Response {
    without_body(StatusCode::TEMPORARY_REDIRECT)
}

/// The answer, which says whether it is the whole, a part, or a part that is not there.
fn in_part(mut response: Response, asked: &Asked) -> Response {
    *response.status_mut() = match asked {
        Asked::All => StatusCode::OK,
        Asked::Part(_) => StatusCode::PARTIAL_CONTENT,
        Asked::Outside => StatusCode::RANGE_NOT_SATISFIABLE,
    };
    response
}

/// An answer that is JSON in pieces, of which no more than one is in memory.
pub struct InPieces(Body);

impl InPieces {
    /// An answer whose first piece was made before anything is sent, so that a request which fails in it is still refused. `next`
    /// makes a later piece of what is left, and answers what is left then. When it fails, the answer breaks off, and its client
    /// sees that it is not whole.
    pub(crate) fn of<T: Send + 'static, F: Future<Output = Result<(Bytes, Option<T>)>> + Send + 'static>(
        first: Bytes,
        rest: Option<T>,
        next: impl Fn(T) -> F + Send + 'static,
    ) -> Self {
        let Some(rest) = rest else { return Self(Body::from(first)) };
        let later = stream::try_unfold(Some(rest), move |rest| {
            let piece = rest.map(&next);
            async move {
                match piece {
                    Some(piece) => piece.await.map(Some),
                    None => Ok(None),
                }
            }
        });
        let later = later.inspect_err(|error: &Error| match error.refusal() {
            Some(_) => tracing::debug!(reason = %error, "an answer breaks off"),
            None => tracing::error!(%error, "an answer breaks off"),
        });
        Self(Body::from_stream(stream::once(ready(Ok(first))).chain(later)))
    }
}

impl IntoReply for Whole {
    fn into_reply(self) -> Result<Response> {
        InPieces::of(self.first, self.rest, |rest| async move {
            rest.next().await.map(|page| (page.first, page.rest))
        })
        .into_reply()
    }
}

impl IntoReply for InPieces {
    fn into_reply(self) -> Result<Response> {
        Ok(json(StatusCode::OK, self.0))
    }
}

fn json(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Writes the answer to a request that failed. A failure of ours is logged here, under an incident id that the answer
/// names.
pub(crate) fn refuse(app: &App, error: Error) -> Response {
    let refusal = match error {
        Error::Refused(refusal) => {
            tracing::debug!(code = %refusal.kind.errcode(), reason = refusal.message, "refused");
            *refusal
        }
        Error::Busy { retry_after } => {
            tracing::debug!(?retry_after, reason = "the server is busy", "refused");
            let kind = limit_exceeded(retry_after);
            Refusal::new(kind, "The server is busy. Try again later.")
        }
        Error::Remote { server, cause } => {
            tracing::info!(%server, %cause, "a request to another server failed");
            Refusal::new(
                ErrorKind::Unknown,
                format!("The server {server} could not be reached or gave no valid answer."),
            )
            .exception(Exception::Remote)
        }
        Error::Broken(cause) => {
            let incident = app.env.random_string(10);
            tracing::error!(%incident, %cause, "a request failed");
            Refusal::new(
                ErrorKind::Unknown,
                format!("The server failed. Tell its operator: incident {incident}."),
            )
            .exception(Exception::Broken)
        }
    };
    refusal_as_http(refusal)
}

/// Refuses a path that nobody knows: 404.
pub(crate) fn no_such_endpoint() -> Refusal {
    Refusal::unrecognized("There is no such endpoint.")
}

/// Refuses a method that a path does not have: 405.
pub(crate) fn no_such_method() -> Refusal {
    Refusal::unrecognized("The endpoint has no such method.").exception(Exception::WrongMethod)
}

/// Refuses a body that does not arrive in time: 408.
pub(crate) fn too_slow() -> Refusal {
    Refusal::new(ErrorKind::Unknown, "The request's body did not arrive in time.")
        .exception(Exception::TimedOut)
}

fn refusal_as_http(refusal: Refusal) -> Response {
    let status = refusal.exception.map_or_else(|| status_of(&refusal.kind), status_of_exception);
    let retry_after_s = match &refusal.kind {
        ErrorKind::LimitExceeded(data) => match data.retry_after {
            // Whole seconds are rounded up, so that a client which waits that long is not refused again.
            Some(RetryAfter::Delay(delay)) => Some(delay.as_millis().div_ceil(1000)),
            _ => None,
        },
        _ => None,
    };
    let refused = Refused(refusal.kind.clone());
    let is_no_websocket = refusal.exception == Some(Exception::NoWebSocket);
    let body = match refusal.body {
        Some(body) => ErrorBody::Json(body),
        None => ErrorBody::Standard(StandardErrorBody::new(refusal.kind, refusal.message)),
    };
    let response = body.into_error(status).try_into_http_response::<BytesMut>();
    let mut response = match response {
        Ok(response) => response.map(|body| Body::from(body.freeze())),
        Err(error) => {
            tracing::error!(%error, "a refusal cannot be written");
            json(
                StatusCode::INTERNAL_SERVER_ERROR,
                Bytes::from_static(br#"{"errcode":"M_UNKNOWN","error":"The server failed."}"#),
            )
        }
    };
    if let Some(seconds) = retry_after_s
        && let Ok(value) = HeaderValue::try_from(seconds.to_string())
    {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    response.extensions_mut().insert(refused);
    if is_no_websocket {
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    }
    response
}

/// The status of a refusal whose error code does not decide it.
fn status_of_exception(exception: Exception) -> StatusCode {
    match exception {
        Exception::Taken => StatusCode::CONFLICT,
        Exception::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
        Exception::Forbidden => StatusCode::FORBIDDEN,
        Exception::Parameter => StatusCode::BAD_REQUEST,
        Exception::Interactive => StatusCode::UNAUTHORIZED,
        Exception::LongUri => StatusCode::URI_TOO_LONG,
        Exception::LargeFields => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        Exception::ContentCoding => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        Exception::TransferCoding => StatusCode::NOT_IMPLEMENTED,
        Exception::TimedOut => StatusCode::REQUEST_TIMEOUT,
        Exception::NoWebSocket => StatusCode::UPGRADE_REQUIRED,
        Exception::Remote => StatusCode::BAD_GATEWAY,
        Exception::Broken => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The status that belongs to an error code, unless the refusal is an exception.
fn status_of(kind: &ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::MissingToken | ErrorKind::UnknownToken(_) | ErrorKind::Unauthorized => {
            StatusCode::UNAUTHORIZED
        }
        ErrorKind::Forbidden
        | ErrorKind::GuestAccessForbidden
        | ErrorKind::UserDeactivated
        | ErrorKind::UserSuspended
        | ErrorKind::InviteBlocked
        | ErrorKind::ResourceLimitExceeded(_)
        | ErrorKind::ThreepidAuthFailed
        | ErrorKind::ThreepidDenied
        | ErrorKind::ServerNotTrusted
        | ErrorKind::CannotLeaveServerNoticeRoom
        | ErrorKind::WrongRoomKeysVersion(_) => StatusCode::FORBIDDEN,
        ErrorKind::UserLocked => StatusCode::UNAUTHORIZED,
        ErrorKind::NotFound | ErrorKind::Unrecognized | ErrorKind::ThreepidNotFound => StatusCode::NOT_FOUND,
        ErrorKind::CannotOverwriteMedia => StatusCode::CONFLICT,
        ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::LimitExceeded(_) => StatusCode::TOO_MANY_REQUESTS,
        ErrorKind::NotYetUploaded | ErrorKind::ConnectionTimeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorKind::ConnectionFailed => StatusCode::BAD_GATEWAY,
        _ => StatusCode::BAD_REQUEST,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    /// The error code of a kind by its name in ruma: `NotJson` becomes `M_NOT_JSON`.
    fn code(kind: &str) -> String {
        let mut code = String::from("M");
        for character in kind.chars() {
            if character.is_ascii_uppercase() {
                code.push('_');
            }
            code.push(character.to_ascii_uppercase());
        }
        // The specification spells this one code in the British way.
        code.replace("_AUTHORIZE_", "_AUTHORISE_")
    }

    fn collect(folder: &Path, kinds: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, kinds);
            } else if path.extension().is_some_and(|it| it == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                // Those of other libraries are no codes.
                let text = text.replace("io::ErrorKind::", "").replace("HttpErrorKind::", "");
                let names = text.split("ErrorKind::").skip(1);
                kinds
                    .extend(names.map(|rest| {
                        rest.chars().take_while(char::is_ascii_alphanumeric).collect::<String>()
                    }));
            }
        }
    }

    #[test]
    fn every_code_is_explained() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let page = fs::read_to_string(root.join("docs/errors.md")).unwrap();
        let mut kinds = BTreeSet::new();
        collect(&root.join("src"), &mut kinds);
        kinds.retain(|kind| kind.starts_with(|first: char| first.is_ascii_uppercase()));
        assert!(kinds.len() > 25, "the codes were not found");
        let missing: Vec<_> =
            kinds.iter().map(|kind| code(kind)).filter(|code| !page.contains(&format!("`{code}`"))).collect();
        assert!(missing.is_empty(), "docs/errors.md does not say what these mean: {missing:?}");
    }
}
