//! The operator's questions about other servers: who does not answer and why, to try again now, and what others see of a server.

use bytes::Bytes;
use federation::{
    call::{Failure, Options},
    json::Json,
    keys::document,
};
use http::Request;
use ruma::{OwnedServerName, ServerName};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Refusal, Result},
    flows::App,
};

/// A list has at most this many servers.
const SERVERS_MAX: usize = 1_000;
/// A text of another server is cut to this many characters.
const TOLD_CHARACTERS_MAX: usize = 200;

/// The state of another server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerStatus {
    /// The name of the server.
    pub server: OwnedServerName,
    /// How often in a row it did not take what it was to be told; 0 if it answers.
    pub failures: u32,
    /// The last of these failures in words.
    pub why: Option<String>,
    /// For how many seconds it has not answered.
    pub failing_for_s: Option<u64>,
    /// In how many seconds it is tried again.
    pub next_try_in_s: Option<u64>,
    /// The number of rooms in which it misses events.
    pub rooms_behind: usize,
    /// The number of messages that wait for its devices.
    pub messages_waiting: usize,
    /// Whether something is being sent to it now.
    pub sending: bool,
}

/// The state of all servers of which something is to be said, and how far the log was read for them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Statuses {
    /// The servers that do not answer, or for which something waits; at most a thousand.
    pub servers: Vec<ServerStatus>,
    /// The number of positions of the log that are still to be told.
    pub lag: u64,
}

/// The findings about a server from outside.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckedServer {
    /// The name of the server.
    pub server: OwnedServerName,
    /// Each step of finding it, with what it found.
    pub steps: Vec<String>,
    /// The step that found it: a number of the specification.
    pub found_by: Option<String>,
    /// The name that its certificate must be valid for.
    pub tls_name: Option<String>,
    /// The software that it says it runs.
    pub version: Option<String>,
    /// The ids of the keys that it publishes, if its document is right.
    pub keys: Vec<String>,
    /// A line for each thing that is wrong; none if others reach it.
    pub faults: Vec<String>,
    /// The knowledge that this server has of it, unless it is this server.
    pub status: Option<ServerStatus>,
}

/// A server that is tried again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Retried {
    /// The name of the server.
    pub server: OwnedServerName,
    /// Whether it did not answer, or something waited for it.
    pub waited: bool,
}

fn require_server(name: &str) -> Result<OwnedServerName> {
    let refused = || Refusal::invalid_param(format!("{name} is no name of a server."));
    OwnedServerName::try_from(name).map_err(|_| refused().into())
}

fn status_of(app: &App, server: OwnedServerName) -> Result<ServerStatus> {
    let status = app.delivery.state_of(&server)?;
    let now_ms = app.env.now_ms();
    let failing = status.failing;
    Ok(ServerStatus {
        server,
        failures: failing.map_or(0, |failing| failing.failures),
        why: status.why.filter(|_| failing.is_some()),
        failing_for_s: failing.map(|failing| now_ms.saturating_sub(failing.since_ms) / 1000),
        next_try_in_s: failing.map(|failing| failing.next_try_ms.saturating_sub(now_ms) / 1000),
        rooms_behind: status.rooms_behind,
        messages_waiting: status.messages,
        sending: status.is_sending,
    })
}

/// Lists the servers that do not answer, or for which something waits. Errors: only failures of the store.
pub async fn list(app: &App) -> Result<Statuses> {
    let owned = app.clone();
    let list = move || {
        let names = owned.delivery.list().into_iter().take(SERVERS_MAX);
        let servers = names.map(|name| status_of(&owned, name)).collect::<Result<_>>()?;
        Ok(Statuses { servers, lag: owned.delivery.lag() })
    };
    app.env.blocking(list).await
}

/// Tries a server again now. Errors: 400 for what is no name of a server, and where rooms are not shared with others.
pub fn retry(app: &App, name: &str) -> Result<Retried> {
    let server = require_server(name)?;
    if !app.config.federation.enabled {
        let why =
            "Nothing is told to other servers here: either federation.enabled is false, or no server runs.";
        return Err(Refusal::invalid_param(why).into());
    }
    let waited = app.delivery.retry(&server);
    Ok(Retried { server, waited })
}

/// Finds a server as others do, and says what they see of it. Errors: 400 for what is no name of a server.
pub async fn check(app: &App, name: &str) -> Result<CheckedServer> {
    let server = require_server(name)?;
    let caller = app.remote.client.caller();
    let explained = caller.discovery().explain(&server).await;
    let mut steps = Vec::new();
    for line in &explained.lines {
        steps.push(format!("step {}: {}", line.step.number(), line.told));
    }
    let is_us = server == app.config.server.name;
    let mut checked = CheckedServer {
        status: if is_us { None } else { Some(status_of(app, server.clone())?) },
        server,
        steps,
        found_by: None,
        tls_name: None,
        version: None,
        keys: Vec::new(),
        faults: Vec::new(),
    };
    let found = match explained.result {
        Ok(found) => found,
        Err(why) => {
            checked.faults.push(why.to_string());
            return Ok(checked);
        }
    };
    checked.found_by = Some(found.step.number().to_owned());
    checked.tls_name = found.target.tls_name;
    match ask(app, &checked.server, "/_matrix/federation/v1/version").await {
        Ok(json) => checked.version = version(&json),
        Err(why) => checked.faults.push(format!("its version: {why}")),
    }
    match ask(app, &checked.server, "/_matrix/key/v2/server").await {
        Ok(json) => match document::check(&checked.server, &json, app.env.now_ms()) {
            Ok(document) => {
                let keys = document.keys.iter().map(|(id, key)| match key.expired_ms {
                    None => id.to_string(),
                    Some(_) => format!("{id} (old)"),
                });
                checked.keys = keys.collect();
                if is_us {
                    compare(app, &mut checked);
                }
            }
            Err(why) => checked.faults.push(format!("its keys: {why}")),
        },
        Err(why) => checked.faults.push(format!("its keys: {why}")),
    }
    Ok(checked)
}

/// Says so where this server is found under its name and another key is published there.
fn compare(app: &App, checked: &mut CheckedServer) {
    let own = app.remote.ring.own().key_id().to_string();
    if !checked.keys.contains(&own) {
        let why = format!(
            "its keys: this server signs with {own}, which is not published there; another server answers under this name"
        );
        checked.faults.push(why);
    }
}

async fn ask(app: &App, server: &ServerName, path: &str) -> Result<Json, Failure> {
    let request = Request::get(path).body(Bytes::new());
    let request = request.map_err(|error| Failure::BadRequest(error.to_string()))?;
    let reply = app.remote.client.caller().call(server, request, Options::default()).await?;
    Json::parse(reply.answer.bytes()).map_err(|why| Failure::Nonsense(why.to_string()))
}

/// The name and the version of the software, as the answer has them.
fn version(json: &Json) -> Option<String> {
    let server = json.field("server")?;
    let text = |name: &str| server.field(name).and_then(Json::as_text).unwrap_or_default();
    let told = format!("{} {}", text("name"), text("version"));
    Some(told.chars().filter(|it| !it.is_control()).take(TOLD_CHARACTERS_MAX).collect())
}
