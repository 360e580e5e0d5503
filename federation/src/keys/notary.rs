//! Answering those who ask us for a third server's keys
//! ([querying keys through another server](https://spec.matrix.org/v1.19/server-server-api/#querying-keys-through-another-server)).
//!
//! We vouch for what we have or fetch by signing it, too. Anyone may ask, so that a question is bounded in servers, in
//! requests that it causes, in time, and in what is answered; what could not be had is left out.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use ruma::{OwnedServerName, ServerName};

use crate::{json::Json, keys::Ring, ports::StoreFailed};

/// Servers that one question may name; the rest is left out of the answer.
const SERVERS_MAX: usize = 500;
/// Servers that are looked at together; each may have to be asked.
const TOGETHER_MAX: usize = 16;
/// The answer is given after this time, with what is there.
const TIMEOUT: Duration = Duration::from_secs(20);
/// An answer has at most this many bytes of documents.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What somebody asks us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Servers, and the time until which the documents should be valid; none for now.
    servers: Vec<(OwnedServerName, Option<u64>)>,
}

/// A question that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadQuestion(&'static str);

impl Question {
    /// `GET /_matrix/key/v2/query/{serverName}`, with its parameter `minimum_valid_until_ts` as it was written.
    /// Errors: [`BadQuestion`].
    pub fn of_path(
        server: OwnedServerName,
        minimum_valid_until_ts: Option<&str>,
    ) -> Result<Self, BadQuestion> {
        let until_ms = match minimum_valid_until_ts {
            Some(text) => {
                Some(moment(text).ok_or(BadQuestion("minimum_valid_until_ts is no moment in milliseconds"))?)
            }
            None => None,
        };
        Ok(Self { servers: vec![(server, until_ms)] })
    }

    /// `POST /_matrix/key/v2/query`. Names that are none are left out. Errors: [`BadQuestion`].
    pub fn of_body(body: &[u8]) -> Result<Self, BadQuestion> {
        let json = Json::parse(body).map_err(|_| BadQuestion("the body is not JSON"))?;
        let servers = json.field("server_keys").and_then(Json::as_object);
        let servers = servers.ok_or(BadQuestion("server_keys is missing or no object"))?;
        let servers = servers.iter().filter_map(|(server, keys)| {
            let server = OwnedServerName::try_from(server.as_str()).ok()?;
            let minimum = |it: &Json| it.field("minimum_valid_until_ts").and_then(Json::as_ms);
            // Documents hold all keys of a server, so the latest moment that is asked for counts.
            let until_ms = keys.as_object().and_then(|keys| keys.values().filter_map(minimum).max());
            Some((server, until_ms))
        });
        Ok(Self { servers: servers.take(SERVERS_MAX).collect() })
    }
}

fn moment(text: &str) -> Option<u64> {
    Json::parse(text.as_bytes()).ok()?.as_ms()
}

/// Answers a question in JSON. Errors: our cache failed.
pub async fn answer(ring: &Ring, question: &Question, now_ms: u64) -> Result<String, StoreFailed> {
    let looking = question.servers.clone().into_iter().map(|(server, until_ms)| {
        let ring = ring.clone();
        async move { find(&ring, &server, until_ms.unwrap_or(now_ms), now_ms).await }
    });
    let mut looking = stream::iter(looking).buffered(TOGETHER_MAX);
    let mut documents = Vec::new();
    let mut bytes = 0_usize;
    let gathering = async {
        while let Some(document) = looking.next().await {
            let Some(document) = document? else { continue };
            bytes = bytes.saturating_add(document.len());
            if bytes > ANSWER_BYTES_MAX {
                break;
            }
            documents.extend(Json::parse(document.as_bytes()));
        }
        Ok(())
    };
    tokio::time::timeout(TIMEOUT, gathering).await.unwrap_or(Ok(()))?;
    Ok(Json::object([("server_keys", Json::List(documents))]).canonical().into())
}

/// The document of one server with our signature.
async fn find(
    ring: &Ring,
    server: &ServerName,
    until_ms: u64,
    now_ms: u64,
) -> Result<Option<String>, StoreFailed> {
    if *server == *ring.own().server() {
        return Ok(Some(ring.own().document(now_ms).to_string()));
    }
    let Some(document) = ring.find_document(server, until_ms).await? else { return Ok(None) };
    let json = Json::parse(document.json.as_bytes()).ok();
    Ok(json.map(|json| ring.own().sign_object(json).canonical().into()))
}
