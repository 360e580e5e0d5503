//! Signing requests, and checking who made one
//! ([request authentication](https://spec.matrix.org/v1.19/server-server-api/#request-authentication)).
//!
//! A request is signed over its method, its path and query as they were sent, both servers' names, and its content in
//! canonical JSON. Headers are written as old servers read them, and read as liberally as the specification allows.

pub mod header;
#[cfg(test)]
mod tests;

use http::HeaderValue;
use ruma::{OwnedServerName, ServerName};

use crate::{
    json::{Canonical, Json, tree::write_text},
    keys::{KeyFailure, OwnKeys, Purpose, Ring, Wanted, is_signed},
};

pub use header::{Credentials, Malformed};

/// What of a request is signed.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'r> {
    /// The method in capitals.
    pub method: &'r str,
    /// Path and query exactly as they are on the wire, from `/_matrix` on.
    pub uri: &'r str,
    /// The body, where there is one.
    pub content: Option<&'r Canonical>,
}

/// A request whose origin is not proved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has no `Authorization` header of the scheme `X-Matrix`.
    #[error("the Authorization header of scheme X-Matrix is missing")]
    Missing,
    /// The header makes no sense.
    #[error("the Authorization header makes no sense: {0}")]
    Malformed(#[from] Malformed),
    /// It is meant for another server.
    #[error("the request is meant for {0}")]
    WrongDestination(String),
    /// Our settings forbid to talk with its origin.
    #[error("federation.allow and federation.deny do not let this server talk with {0}")]
    NotAllowed(OwnedServerName),
    /// The key cannot be had, or is not valid now.
    #[error(transparent)]
    UnknownKey(KeyFailure),
    /// The signature is not that of the key over this request.
    #[error("the signature of {0} does not fit the request")]
    BadSignature(OwnedServerName),
}

impl Signed<'_> {
    /// The text that is signed: an object in canonical JSON, whose names are in their order.
    fn text(self, origin: &ServerName, destination: &ServerName) -> Canonical {
        let mut out = String::from("{");
        if let Some(content) = self.content {
            out.push_str("\"content\":");
            out.push_str(content.as_str());
            out.push(',');
        }
        let fields = [
            ("destination", destination.as_str()),
            ("method", self.method),
            ("origin", origin.as_str()),
            ("uri", self.uri),
        ];
        for (index, (name, value)) in fields.into_iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            write_text(&mut out, name);
            out.push(':');
            write_text(&mut out, value);
        }
        out.push('}');
        Canonical::written(out)
    }
}

/// Signs a request of ours: the value of its `Authorization` header. None where a name cannot stand in a header.
pub fn sign(own: &OwnKeys, destination: &ServerName, request: Signed<'_>) -> Option<HeaderValue> {
    let signature = own.sign(&request.text(own.server(), destination));
    let header = format!(
        "X-Matrix origin=\"{}\",destination=\"{destination}\",key=\"{}\",sig=\"{signature}\"",
        own.server(),
        own.key_id(),
    );
    HeaderValue::from_str(&header).ok()
}

/// Checks who made a request, and answers that server's name. `credentials` come from [`header::parse`]. Errors: [`Refusal`].
pub async fn verify(
    ring: &Ring,
    credentials: &Credentials,
    request: Signed<'_>,
) -> Result<OwnedServerName, Refusal> {
    let Credentials { origin, destination, signatures } = credentials;
    let us = ring.own().server();
    // Servers of before version 1.3 of the specification name no destination; what they signed names us all the same.
    if let Some(other) = destination.as_ref().filter(|it| it.as_str() != us.as_str()) {
        return Err(Refusal::WrongDestination(other.to_string()));
    }
    if !ring.allows(origin) {
        return Err(Refusal::NotAllowed(origin.clone()));
    }
    let text = request.text(origin, us);
    let wanted: Vec<_> = signatures
        .iter()
        .map(|(key_id, _)| Wanted {
            server: origin.clone(),
            key_id: key_id.clone(),
            purpose: Purpose::Request,
        })
        .collect();
    let mut refusal = None;
    // One valid signature is proof; the others may be of keys that we do not know yet.
    for ((_, signature), key) in signatures.iter().zip(ring.list(&wanted).await) {
        match key {
            Ok(key) if is_signed(&text, &key, signature) => return Ok(origin.clone()),
            Ok(_) => refusal = Some(Refusal::BadSignature(origin.clone())),
            Err(failure) => {
                refusal.get_or_insert(Refusal::UnknownKey(failure));
            }
        }
    }
    Err(refusal.unwrap_or(Refusal::Missing))
}

/// The content of a request, as it is signed. None for an empty body. Errors: the body is no JSON.
pub fn content(body: &[u8]) -> Result<Option<Canonical>, crate::json::NotJson> {
    if body.is_empty() { Ok(None) } else { Json::parse(body).map(|json| Some(json.canonical())) }
}
