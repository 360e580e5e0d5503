//! Answers with a file: its ranges, the conditions under which it is sent, and the header fields that keep it from running as a page of
//! this server.
//!
//! Specification: client-server API, "Content repository"; server-server API, "Content repository";
//! [RFC 9110, sections 13 and 14](https://www.rfc-editor.org/rfc/rfc9110#section-13).

use std::future::ready;

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::{
    api::reply::{IntoReply, elsewhere, in_part, unchanged},
    error::{Error, Result},
    flows::{App, media::download::File},
    media::{
        kinds,
        presign::Shown,
        range::{self, Asked},
    },
};

/// The policy that the specification recommends, by which nothing of a file runs where it is opened as a page.
const POLICY: &str = "sandbox; default-src 'none'; script-src 'none'; plugin-types application/pdf; style-src 'unsafe-inline'; \
     object-src 'self';";
/// The bytes behind a URI never change. Only the client itself keeps them, because whoever is between may not ask for them.
pub(super) const CACHED: &str = "private, max-age=86400, immutable";

/// The header fields of a request that decide how much of a file is sent, if any.
pub(crate) struct Conditions {
    range: Option<HeaderValue>,
    if_range: Option<HeaderValue>,
    if_none_match: Vec<HeaderValue>,
}

impl Conditions {
    /// The conditions of a request with these header fields.
    pub(crate) fn of(fields: &HeaderMap) -> Self {
        let one = |name: HeaderName| fields.get(name).cloned();
        Self {
            range: one(header::RANGE),
            if_range: one(header::IF_RANGE),
            if_none_match: fields.get_all(header::IF_NONE_MATCH).iter().cloned().collect(),
        }
    }

    /// Whether all of the file is wanted, whatever its tag is: a player that begins asks for all of it as a range.
    pub(crate) fn want_all(&self) -> bool {
        self.if_none_match.is_empty()
            && self.if_range.is_none()
            && self.range.as_ref().is_none_or(|range| range == "bytes=0-")
    }

    /// Whether the client has a copy with this tag.
    fn has_copy(&self, tag: &str) -> bool {
        let lists = self.if_none_match.iter().filter_map(|value| value.to_str().ok());
        lists.flat_map(|list| list.split(',')).map(str::trim).any(|other| {
            // A copy counts as the same also where it was changed on its way.
            other == "*" || other.strip_prefix("W/").unwrap_or(other) == tag
        })
    }

    /// The part of so many bytes with this tag that is to be sent.
    fn part(&self, tag: &str, bytes: u64) -> Asked {
        // A range of another version than this one is not what the client goes on with.
        if self.if_range.as_ref().is_some_and(|other| other != tag) {
            return Asked::All;
        }
        range::asked(self.range.as_ref().and_then(|value| value.to_str().ok()), bytes)
    }
}

/// An answer with a file, or a part of it.
pub(crate) struct FileReply {
    /// The server, which reads it.
    pub(crate) app: App,
    /// The file to send.
    pub(crate) file: File,
    /// The name under which it is saved, in place of its own.
    pub(crate) name: Option<String>,
    /// The conditions of the request.
    pub(crate) conditions: Conditions,
    /// The client takes the file from elsewhere, too (MSC3860).
    pub(crate) may_redirect: bool,
    /// It is given by a link that ends, so that nobody keeps a copy or tells the link to others.
    pub(crate) is_temporary: bool,
}

impl IntoReply for FileReply {
    fn into_reply(self) -> Result<Response> {
        let Self { app, file, name, conditions, may_redirect, is_temporary } = self;
        let cached = if is_temporary { "private, no-store" } else { CACHED };
        let bytes = file.bytes();
        let tag = tag(&file);
        if conditions.has_copy(&tag) {
            let mut response = unchanged();
            put(&mut response, [(header::ETAG, tag), (header::CACHE_CONTROL, cached.to_owned())])?;
            return Ok(response);
        }
        let name = name.or_else(|| file.name.clone());
        let disposition = kinds::disposition(&file.content_type, name.as_deref());
        if may_redirect && let Some(location) = location(&app, &file, &disposition) {
            let mut response = elsewhere();
            let fields = [
                (header::LOCATION, location),
                // The URL ends soon, and another request is given another one.
                (header::CACHE_CONTROL, "no-store".to_owned()),
                (HeaderName::from_static("cross-origin-resource-policy"), "cross-origin".to_owned()),
            ];
            put(&mut response, fields)?;
            return Ok(response);
        }
        let asked = conditions.part(&tag, bytes);
        let (part, range) = match &asked {
            Asked::All => (0..bytes, None),
            Asked::Part(part) => {
                (part.clone(), Some(format!("bytes {}-{}/{bytes}", part.start, part.end - 1)))
            }
            Asked::Outside => (0..0, Some(format!("bytes */{bytes}"))),
        };
        let length = part.end - part.start;
        let body = if length == 0 { Body::empty() } else { streamed(file.read(&app, part)) };
        let mut response = in_part(Response::new(body), &asked);
        put(&mut response, guarding(disposition))?;
        let fields =
            [(header::CONTENT_LENGTH, length.to_string()), (header::ACCEPT_RANGES, "bytes".to_owned())];
        put(&mut response, fields)?;
        put(&mut response, range.map(|range| (header::CONTENT_RANGE, range)))?;
        if asked != Asked::Outside {
            let fields = [
                (header::CONTENT_TYPE, file.content_type),
                (header::ETAG, tag),
                (header::CACHE_CONTROL, cached.to_owned()),
            ];
            put(&mut response, fields)?;
        }
        if is_temporary {
            put(&mut response, [(header::REFERRER_POLICY, "no-referrer".to_owned())])?;
        }
        Ok(response)
    }
}

/// An answer to another server: what is known of a file, and the file, as `multipart/mixed`.
pub(crate) struct Multipart {
    /// The server, which reads it.
    pub(crate) app: App,
    /// The file to send.
    pub(crate) file: File,
    /// A text that does not occur in the file, because nobody could guess it when that was written.
    pub(crate) boundary: String,
}

impl IntoReply for Multipart {
    fn into_reply(self) -> Result<Response> {
        let Self { app, file, boundary } = self;
        let (bytes, content_type) = (file.bytes(), &file.content_type);
        let disposition = kinds::disposition(content_type, file.name.as_deref());
        let head =
            format!("\r\n--{boundary}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n--{boundary}\r\n");
        let after = format!("\r\n--{boundary}--\r\n");
        let kind = format!("multipart/mixed; boundary={boundary}");
        // Other servers follow to no other scheme, and to no place that only this server reaches.
        if let Some(location) = location(&app, &file, &disposition).filter(|url| url.starts_with("https://"))
        {
            let whole = format!("{head}Location: {location}\r\n\r\n{after}");
            let mut response = Response::new(Body::from(whole));
            put(&mut response, [(header::CONTENT_TYPE, kind)])?;
            return Ok(response);
        }
        let before =
            format!("{head}Content-Type: {content_type}\r\nContent-Disposition: {disposition}\r\n\r\n");
        let length = before.len() as u64 + bytes + after.len() as u64;
        let one = |text: String| stream::once(ready(Ok(Bytes::from(text))));
        let mut response =
            Response::new(streamed(one(before).chain(file.read(&app, 0..bytes)).chain(one(after))));
        let fields = [(header::CONTENT_TYPE, kind), (header::CONTENT_LENGTH, length.to_string())];
        put(&mut response, fields)?;
        Ok(response)
    }
}

/// The URL at which somebody may read the file from elsewhere, if there is one. It is answered there with what is safe about its header
/// fields here: the type, and whether it is shown in place. The policy has no counterpart there, and needs none, because nothing at
/// that place belongs to this server.
fn location(app: &App, file: &File, disposition: &str) -> Option<String> {
    file.location(app, Shown { content_type: &file.content_type, disposition, cached: CACHED })
}

/// The header fields by which nothing of a file runs where it is opened.
pub(super) fn guarding(disposition: String) -> [(HeaderName, String); 4] {
    [
        (header::CONTENT_DISPOSITION, disposition),
        (header::CONTENT_SECURITY_POLICY, POLICY.to_owned()),
        (HeaderName::from_static("cross-origin-resource-policy"), "cross-origin".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ]
}

/// The tag of a file: it names the bytes, so that it is the same for ever.
fn tag(file: &File) -> String {
    let digest = file.digest;
    ["\"", &digest.to_string(), "\""].concat()
}

/// A body whose length is said by a header field, and of which a piece is in memory at a time. Where a file cannot be read to its end,
/// the answer breaks off, and its client sees that it is not whole.
fn streamed(pieces: impl Stream<Item = Result<Bytes>> + Send + 'static) -> Body {
    Body::from_stream(
        pieces.inspect_err(|error: &Error| tracing::error!(%error, "an answer with a file breaks off")),
    )
}

pub(super) fn put(
    response: &mut Response,
    fields: impl IntoIterator<Item = (HeaderName, String)>,
) -> Result<()> {
    for (name, value) in fields {
        let value = HeaderValue::try_from(value)
            .map_err(|error| Error::broken(format!("a header field cannot be written: {error}")))?;
        response.headers_mut().insert(name, value);
    }
    Ok(())
}
