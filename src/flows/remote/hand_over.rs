//! Hands events of ours over to other servers, which let our users into rooms and out of them.

use bytes::Bytes;
use federation::{
    call::{Failure, Options, Reply},
    ports::NotSent,
};
use http::{Method, Request, header};
use ruma::ServerName;

use crate::flows::App;

/// Whether a server may have done what it was asked for, though the request failed.
pub(super) fn may_have_acted(failure: &Failure) -> bool {
    match failure {
        Failure::Refused { status, .. } => status.is_server_error(),
        Failure::Unreachable(NotSent::Broken(_)) => true,
        Failure::Unreachable(NotSent::Unreachable(_) | NotSent::Certificate(_) | NotSent::TimedOut) => false,
        Failure::NotAllowed { .. } | Failure::NotFound(_) | Failure::BadRequest(_) => false,
        // A request that found no place looks like one whose answer found no memory.
        Failure::TimedOut | Failure::Nonsense(_) | Failure::Busy => true,
    }
}

/// Sends an event of ours to this path below that of the server-server API.
pub(super) async fn put(
    app: &App,
    server: &ServerName,
    path: &[&str],
    event: &Bytes,
    options: Options,
) -> Result<Reply, Failure> {
    put_with(app, server, (path, ""), event, options).await
}

/// Like [`put`], with a query.
pub(super) async fn put_with(
    app: &App,
    server: &ServerName,
    (path, query): (&[&str], &str),
    event: &Bytes,
    options: Options,
) -> Result<Reply, Failure> {
    let mut uri = "/_matrix/federation".to_owned();
    for part in path {
        uri.push('/');
        uri.extend(encoded(part));
    }
    uri.push_str(query);
    let request = Request::builder().method(Method::PUT).uri(uri);
    let request = request.header(header::CONTENT_TYPE, "application/json").body(event.clone());
    let request = request.map_err(|error| Failure::BadRequest(error.to_string()))?;
    app.remote.client.send_signed(server, request, options).await
}

/// A part of a path, in which only what every server reads alike stands for itself.
fn encoded(part: &str) -> impl Iterator<Item = char> {
    part.bytes().flat_map(|byte| {
        let is_plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        let encoded = if is_plain { char::from(byte).to_string() } else { format!("%{byte:02X}") };
        encoded.chars().collect::<Vec<_>>()
    })
}

/// Whether a server does not know an endpoint.
pub(super) fn is_unknown(failure: &Failure) -> bool {
    match failure {
        Failure::Refused { status, errcode, .. } => {
            let code = errcode.as_deref();
            code == Some("M_UNRECOGNIZED") || (code.is_none() && matches!(status.as_u16(), 404 | 405))
        }
        _ => false,
    }
}
