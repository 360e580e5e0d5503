//! The handshake that opens a socket ([RFC 6455, section 4.2](https://www.rfc-editor.org/rfc/rfc6455#section-4.2)).

use axum::extract::Request;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header, request::Parts};
use hyper::upgrade::OnUpgrade;
use sha1::{Digest, Sha1};

use crate::{
    api::{
        extract::{self, Asked, Endpoint},
        raw::Content,
        socket::inward::Inward,
    },
    error::{Error, Exception, Refusal, Result},
};
use ruma::api::error::ErrorKind;

/// The path at which sockets are opened.
pub(super) const PATH: &str = "/_aqueduct/client/v1/socket";
/// The name of the protocol that is spoken over a socket.
pub(super) const PROTOCOL: &str = "aqueduct.v1";
/// A script in a browser names a protocol that begins so, and goes on with its access token.
const BEARER: &[u8] = b"bearer.";
/// This is put after the client's key, so that only who knows of WebSockets can answer it.
const ACCEPT_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Opens a socket for a request that asks for one.
pub(crate) struct OpenSocket;

impl Endpoint for OpenSocket {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec![PATH]
    }
}

/// A request to open a socket.
pub(crate) struct Opening {
    /// The answer to the client's key.
    pub(super) accept: String,
    /// The client has named the protocol, so that it must be told that it was selected.
    pub(super) names_protocol: bool,
    /// The access token with which the client has asked.
    pub(super) token: String,
    /// Resolves to the connection when the handshake is done.
    pub(super) on_upgrade: OnUpgrade,
    /// The way from the socket to the endpoints.
    pub(super) inward: Inward,
}

impl Asked for Opening {
    type Endpoint = OpenSocket;

    fn read(mut parts: Parts, _path: Vec<String>, _body: Content) -> Result<Self> {
        let fields = &parts.headers;
        let has_word = |name: HeaderName, word: &str| {
            words(fields, &name).any(|it| it.eq_ignore_ascii_case(word.as_bytes()))
        };
        if parts.version != Version::HTTP_11 {
            return Err(no_handshake("it must come over HTTP/1.1"));
        }
        if !has_word(header::CONNECTION, "upgrade") || !has_word(header::UPGRADE, "websocket") {
            return Err(no_handshake(
                "`Connection` must name `Upgrade`, and `Upgrade` must name `websocket`",
            ));
        }
        if !has_word(header::SEC_WEBSOCKET_VERSION, "13") {
            return Err(no_handshake("`Sec-WebSocket-Version` must be 13"));
        }
        let key = fields.get(header::SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).unwrap_or_default();
        if STANDARD.decode(key).ok().is_none_or(|key| key.len() != 16) {
            return Err(no_handshake("`Sec-WebSocket-Key` must be 16 bytes in base64"));
        }
        let accept = accept(key);
        let names_protocol = has_word(header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL);
        if fields.contains_key(header::SEC_WEBSOCKET_PROTOCOL) && !names_protocol {
            let why = "`Sec-WebSocket-Protocol` must name `aqueduct.v1`.";
            return Err(Refusal::invalid_param(why).into());
        }
        let token = extract::find_token(&parts)?.unwrap_or_default();
        let (on_upgrade, inward) =
            (parts.extensions.remove::<OnUpgrade>(), parts.extensions.remove::<Inward>());
        let (Some(on_upgrade), Some(inward)) = (on_upgrade, inward) else {
            return Err(no_handshake("this connection cannot become a socket"));
        };
        Ok(Self { accept, names_protocol, token, on_upgrade, inward })
    }
}

/// Prepares a request that may open a socket: the token that a browser sends as a protocol is moved to where tokens stand, before
/// anybody looks at the request, and the socket's way to the endpoints is put beside it.
pub(crate) fn prepare(request: &mut Request, inward: &Inward) {
    if request.uri().path().trim_end_matches('/') == PATH {
        move_token(request.headers_mut());
        request.extensions_mut().insert(inward.clone());
    }
}

fn move_token(fields: &mut HeaderMap) {
    let named: Vec<Vec<u8>> = words(fields, &header::SEC_WEBSOCKET_PROTOCOL).map(<[u8]>::to_vec).collect();
    if named.is_empty() {
        return;
    }
    let (tokens, others): (Vec<_>, Vec<_>) = named.into_iter().partition(|name| name.starts_with(BEARER));
    if let Ok(others) = HeaderValue::from_bytes(&others.join(&b", "[..])) {
        fields.insert(header::SEC_WEBSOCKET_PROTOCOL, others);
    }
    let token = tokens.first().and_then(|name| name.strip_prefix(BEARER));
    let bearer = token.and_then(|token| HeaderValue::from_bytes(&[b"Bearer ", token].concat()).ok());
    if let Some(mut bearer) = bearer.filter(|_| !fields.contains_key(header::AUTHORIZATION)) {
        bearer.set_sensitive(true);
        fields.insert(header::AUTHORIZATION, bearer);
    }
}

/// The words of a field, which commas part.
fn words<'a>(fields: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let values = fields.get_all(name).into_iter();
    values.flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
}

fn accept(key: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(key);
    hash.update(ACCEPT_SUFFIX);
    STANDARD.encode(hash.finalize())
}

fn no_handshake(why: &str) -> Error {
    let why = format!("This endpoint opens a WebSocket: {why}.");
    Refusal::new(ErrorKind::Unknown, why).exception(Exception::NoWebSocket).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_answered_as_the_specification_of_websockets_says() {
        assert_eq!(accept(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_token_among_the_protocols_goes_to_its_field_and_nowhere_else() {
        let cases = [
            (vec!["aqueduct.v1, bearer.abc"], None, "aqueduct.v1", Some("Bearer abc")),
            (vec!["bearer.abc", "aqueduct.v1"], None, "aqueduct.v1", Some("Bearer abc")),
            (vec!["bearer.abc,bearer.def"], None, "", Some("Bearer abc")),
            (vec!["aqueduct.v1"], None, "aqueduct.v1", None),
            (vec!["aqueduct.v1, bearer.abc"], Some("Bearer own"), "aqueduct.v1", Some("Bearer own")),
        ];
        for (named, authorization, protocols, expected) in cases {
            let mut fields = HeaderMap::new();
            for value in named {
                fields.append(header::SEC_WEBSOCKET_PROTOCOL, value.parse().unwrap());
            }
            if let Some(value) = authorization {
                fields.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            move_token(&mut fields);
            let values: Vec<_> = fields.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().collect();
            assert_eq!(values, [protocols]);
            let token = fields.get(header::AUTHORIZATION);
            assert_eq!(token.map(|token| token.to_str().unwrap()), expected);
            if authorization.is_none() && token.is_some() {
                assert!(!format!("{fields:?}").contains("abc"), "{fields:?}");
            }
        }
    }
}
