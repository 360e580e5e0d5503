//! The one translation of results to HTTP, and the one place that logs a failure. Only this file knows status codes.

use axum::{body::Body, response::Response};
use bytes::{Bytes, BytesMut};
use http::{HeaderValue, StatusCode, header};
use ruma::api::{
    OutgoingResponse, OutgoingResponseExt,
    error::{ErrorBody, ErrorKind, RetryAfter, StandardErrorBody},
};

use crate::{
    error::{Error, Refusal, Result, limit_exceeded},
    flows::App,
};

/// What a handler may answer with.
pub trait IntoReply: Send {
    /// The answer as HTTP.
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

/// An answer that is JSON already: spliced from stored bytes.
#[derive(Debug)]
pub struct RawJson(pub Bytes);

impl IntoReply for RawJson {
    fn into_reply(self) -> Result<Response> {
        Ok(json(StatusCode::OK, self.0))
    }
}

fn json(status: StatusCode, body: Bytes) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The answer to a request that failed. What is our fault is logged here, under an incident id that the answer names.
pub(crate) fn refuse(app: &App, error: Error) -> Response {
    let refusal = match error {
        Error::Refused(refusal) => *refusal,
        Error::Busy { retry_after } => {
            let kind = limit_exceeded(retry_after);
            Refusal::new(kind, "The server is busy. Try again later.")
        }
        Error::Remote { server, cause } => {
            tracing::info!(%server, %cause, "another server failed us");
            Refusal::new(ErrorKind::Unknown, format!("The server {server} could not be asked."))
                .status(StatusCode::BAD_GATEWAY)
        }
        Error::Broken(cause) => {
            let incident = app.env.random_string(10);
            tracing::error!(%incident, %cause, "a request failed");
            Refusal::new(
                ErrorKind::Unknown,
                format!("The server failed. Tell its operator: incident {incident}."),
            )
            .status(StatusCode::INTERNAL_SERVER_ERROR)
        }
    };
    refusal_as_http(refusal)
}

/// 404 for paths nobody knows.
pub(crate) fn no_such_endpoint() -> Refusal {
    Refusal::unrecognized("There is no such endpoint.")
}

/// 405 for methods that a path does not have.
pub(crate) fn no_such_method() -> Refusal {
    Refusal::unrecognized("The endpoint has no such method.").status(StatusCode::METHOD_NOT_ALLOWED)
}

/// 408 for bodies that do not arrive.
pub(crate) fn too_slow() -> Refusal {
    Refusal::new(ErrorKind::Unknown, "The request's body did not arrive in time.")
        .status(StatusCode::REQUEST_TIMEOUT)
}

fn refusal_as_http(refusal: Refusal) -> Response {
    let status = refusal.status.unwrap_or_else(|| status_of(&refusal.kind));
    let retry_after_s = match &refusal.kind {
        ErrorKind::LimitExceeded(data) => match data.retry_after {
            // Whole seconds, rounded up: who waits that long is not refused again.
            Some(RetryAfter::Delay(delay)) => Some(delay.as_millis().div_ceil(1000)),
            _ => None,
        },
        _ => None,
    };
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
    response
}

/// The status that belongs to a code, unless the refusal names its own.
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
