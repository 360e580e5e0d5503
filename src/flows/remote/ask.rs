//! Questions of ours to other servers whose answers go to our clients, and how failures of other servers are told to them.

use std::{sync::Arc, time::Duration};

use federation::{
    call::{Failure, Lane, Options},
    client::ServerAuthentication,
    json::Limits,
};
use ruma::{
    OwnedRoomId, OwnedServerName, OwnedUserId, RoomAliasId, RoomVersionId, ServerName, UInt, UserId,
    api::{
        OutgoingRequest,
        error::{ErrorKind, IncompatibleRoomVersionErrorData},
        federation::{
            directory::get_public_rooms_filtered,
            query::{get_profile_information, get_room_information},
        },
        path_builder::PathBuilder,
    },
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, value::RawValue};

use super::{entries::readable, kept::Kept, spaces};
use crate::{
    accounts::profiles,
    error::{Error, Refusal, Result},
    flows::{
        App,
        places::{Place, Places},
        remote::identify::require_federation,
    },
};

/// Take at most this many servers of those that an answer about an alias names.
const SERVERS_MAX: usize = 50;
/// Look at no more than this many for them.
const SERVERS_READ_MAX: usize = 500;

/// A room, as a client names it, and servers that may be in it, the likeliest first.
pub(crate) struct Named {
    pub(crate) room_id: OwnedRoomId,
    pub(crate) servers: Vec<OwnedServerName>,
}

/// Asks the server of an alias for the room that it names. Errors: 404 `M_NOT_FOUND`; [`Error::Remote`].
pub(crate) async fn alias(app: &App, alias: &RoomAliasId) -> Result<Named> {
    #[derive(Deserialize)]
    struct Answer {
        room_id: OwnedRoomId,
        #[serde(default)]
        servers: Vec<Box<RawValue>>,
    }
    require_federation(app)?;
    let server = alias.server_name();
    let request = get_room_information::v1::Request::new(alias.to_owned());
    let _place = app.remote.asking.enter()?;
    let answer: Answer = ask(app, server, request, ANSWERS).await?;
    let mut servers: Vec<OwnedServerName> = readable(answer.servers.iter().take(SERVERS_READ_MAX));
    servers.retain(|it| it != server);
    servers.truncate(SERVERS_MAX);
    // The server that knows the alias is the likeliest to be in the room.
    servers.insert(0, server.to_owned());
    Ok(Named { room_id: answer.room_id, servers })
}

/// The profiles that other servers told lately, and how many questions may be under way whose askers have no account.
/// Clones share it.
#[derive(Clone)]
pub(crate) struct Asking(Arc<Inner>);

struct Inner {
    profiles: Kept<OwnedUserId, Arc<Map<String, Value>>>,
    spaces: Kept<spaces::Question, Option<Arc<spaces::Told>>>,
    silent: Kept<OwnedServerName, ()>,
    places: Places,
    device_places: Places,
}

impl Default for Asking {
    fn default() -> Self {
        Self(Arc::new(Inner {
            profiles: Kept::new(PROFILES_BYTES_MAX),
            spaces: Kept::new(spaces::KEPT_BYTES_MAX),
            silent: Kept::new(SILENT_BYTES_MAX),
            places: Places::new(AT_ONCE, PAYERS_MIN),
            device_places: Places::new(DEVICES_AT_ONCE, PAYERS_MIN),
        }))
    }
}

impl Asking {
    /// Takes a place for a question that somebody has us ask. Errors: [`Error::Busy`] where there is none, or where those who
    /// pay for it hold their share.
    pub(super) fn enter(&self) -> Result<Place> {
        self.0.places.enter().ok_or(Error::Busy { retry_after: AGAIN })
    }

    /// Waits for a place for a question about devices that somebody has us ask. Whoever asks many servers at once waits behind
    /// their own questions.
    pub(super) async fn enter_for_devices(&self) -> Place {
        self.0.device_places.wait().await
    }

    /// The servers that did not answer a question lately.
    pub(super) fn silent(&self) -> &Kept<OwnedServerName, ()> {
        &self.0.silent
    }

    /// The answers of other servers about rooms of spaces.
    pub(super) fn spaces(&self) -> &Kept<spaces::Question, Option<Arc<spaces::Told>>> {
        &self.0.spaces
    }
}

/// At most this many questions are under way that users have us ask.
const AT_ONCE: usize = 512;
/// At most this many questions about devices are under way that users have us ask.
const DEVICES_AT_ONCE: usize = 1_024;
/// The names of servers that did not answer have at most this many bytes.
const SILENT_BYTES_MAX: usize = 256 << 10;
/// It takes at least this many users, or addresses without one, to have as many under way.
const PAYERS_MIN: usize = 16;
/// The cause of a fault of another server has at most this many characters.
const CAUSE_CHARACTERS_MAX: usize = 300;
/// Another question may be tried again after this time.
const AGAIN: Duration = Duration::from_secs(2);
/// A profile is asked for anew after this time.
const PROFILE_KEPT: Duration = Duration::from_secs(60);
/// The profiles that are kept have at most this many bytes.
const PROFILES_BYTES_MAX: usize = 8 << 20;
/// A profile has at most this many bytes: servers keep them below 64 KiB.
const PROFILE_LIMITS: Limits = Limits::bytes(70_000);
/// A page of another server's directory has at most this many bytes.
const ROOMS_LIMITS: Limits = Limits::bytes(2 << 20);
/// Somebody waits for these answers.
pub(super) const ANSWERS: Options = Options {
    begins: Duration::from_secs(10),
    overall: Duration::from_secs(20),
    limits: Limits::JSON,
    lane: Lane::Requests,
};

/// Gives the profile of a user of another server, as that server told it within the last minute. Errors: 404 `M_NOT_FOUND`, 403
/// `M_FORBIDDEN`, as that server says; [`Error::Remote`].
pub(crate) async fn profile(app: &App, user_id: &UserId) -> Result<Arc<Map<String, Value>>> {
    require_federation(app)?;
    let (kept, now) = (&app.remote.asking.0.profiles, app.env.uptime());
    if let Some(known) = kept.find(&user_id.to_owned(), now) {
        return Ok(known);
    }
    let _place = app.remote.asking.enter()?;
    let server = user_id.server_name();
    let request = get_profile_information::v1::Request::new(user_id.to_owned());
    let options = Options { limits: PROFILE_LIMITS, ..ANSWERS };
    let mut profile: Map<String, Value> = ask(app, server, request, options).await?;
    profile.retain(|name, value| profiles::is_field_of_elsewhere(name, value));
    let profile = Arc::new(profile);
    let bytes = user_id.as_str().len()
        + profile.iter().map(|(name, value)| name.len() + value.to_string().len()).sum::<usize>();
    kept.keep(user_id.to_owned(), Arc::clone(&profile), bytes, now + PROFILE_KEPT);
    Ok(profile)
}

/// Asks another server for a page of its directory, for a client that asks us. Errors: as that server says; [`Error::Remote`].
pub(crate) async fn public_rooms(
    app: &App,
    server: &ServerName,
    wanted: get_public_rooms_filtered::v1::Request,
) -> Result<get_public_rooms_filtered::v1::Response> {
    #[derive(Deserialize)]
    struct Answer {
        chunk: Vec<Box<RawValue>>,
        next_batch: Option<String>,
        prev_batch: Option<String>,
        total_room_count_estimate: Option<UInt>,
    }
    require_federation(app)?;
    let _place = app.remote.asking.enter()?;
    let options = Options { limits: ROOMS_LIMITS, ..ANSWERS };
    let answer: Answer = ask(app, server, wanted, options).await?;
    let mut page = get_public_rooms_filtered::v1::Response::new();
    page.chunk = readable(&answer.chunk);
    (page.next_batch, page.prev_batch) = (answer.next_batch, answer.prev_batch);
    page.total_room_count_estimate = answer.total_room_count_estimate;
    Ok(page)
}

/// Asks another server, and reads its answer as a type that leaves open what the caller can do without. Errors: as that server
/// says; [`Error::Remote`].
pub(super) async fn ask<A, R>(app: &App, server: &ServerName, request: R, options: Options) -> Result<A>
where
    A: DeserializeOwned,
    R: OutgoingRequest,
    R::Authentication: ServerAuthentication,
    for<'a> R::PathBuilder: PathBuilder<Input<'a> = ()>,
{
    let reply = app.remote.client.ask(server, request, options).await;
    let reply = reply.map_err(|failure| failed(server, failure))?;
    let nonsense = |error| at_fault(server, format!("its answer makes no sense: {error}"));
    serde_json::from_slice(reply.answer.bytes()).map_err(nonsense)
}

/// Turns a failed request into an error for our client. What another server refuses is told with its reason, as far as its code
/// says something to a client, or is none that the specification has; for all else that server is at fault.
pub(crate) fn failed(server: &ServerName, failure: Failure) -> Error {
    match failure {
        Failure::Refused { status, errcode, message, body, .. } => {
            let told = format!("{server} refuses: {message}");
            let kind = match errcode.as_deref() {
                Some("M_FORBIDDEN") => Some(ErrorKind::Forbidden),
                Some("M_NOT_FOUND") => Some(ErrorKind::NotFound),
                Some("M_UNABLE_TO_AUTHORISE_JOIN") => Some(ErrorKind::UnableToAuthorizeJoin),
                Some("M_UNABLE_TO_GRANT_JOIN") => Some(ErrorKind::UnableToGrantJoin),
                // The other names are those of proposals, from before the code was in the specification.
                Some(
                    "M_INVITE_BLOCKED"
                    | "ORG.MATRIX.MSC4155.INVITE_BLOCKED"
                    | "ORG.MATRIX.MSC4155.M_INVITE_BLOCKED",
                ) => Some(ErrorKind::InviteBlocked),
                Some("M_INCOMPATIBLE_ROOM_VERSION") => incompatible(&body),
                Some(code) if status.as_u16() == 400 => unspecified(code),
                _ => None,
            };
            match kind {
                Some(kind) => Refusal::new(kind, told).into(),
                None => at_fault(server, format!("it refused with {status}: {message}")),
            }
        }
        Failure::NotAllowed { .. } => {
            Refusal::forbidden(format!("This server does not talk with {server}.")).into()
        }
        Failure::Busy => Error::Busy { retry_after: AGAIN },
        Failure::BadRequest(why) => {
            Error::broken(format!("a request to another server cannot be made: {why}"))
        }
        other @ (Failure::NotFound(_)
        | Failure::Unreachable(_)
        | Failure::TimedOut
        | Failure::Nonsense(_)) => at_fault(server, other.to_string()),
    }
}

/// The fault of another server. A cause may quote what that server said, so it is cut, and cleared of what would disturb a log.
pub(crate) fn at_fault(server: &ServerName, cause: impl AsRef<str>) -> Error {
    let cause = cause.as_ref().chars().filter(|it| !it.is_control()).take(CAUSE_CHARACTERS_MAX);
    Error::Remote { server: server.to_string(), cause: cause.collect() }
}

/// An error code that the specification does not have. No client gives its session up by such a one, or waits, so that it can be told as
/// another server says it.
fn unspecified(code: &str) -> Option<ErrorKind> {
    let is_code = code.chars().all(|it| it.is_ascii_alphanumeric() || matches!(it, '_' | '.'));
    let kind: ErrorKind = serde_json::from_value(serde_json::json!({ "errcode": code })).ok()?;
    (is_code && kind.custom_json_data().is_some()).then_some(kind)
}

fn incompatible(body: &[u8]) -> Option<ErrorKind> {
    #[derive(Deserialize)]
    struct Body {
        room_version: RoomVersionId,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    Some(ErrorKind::IncompatibleRoomVersion(IncompatibleRoomVersionErrorData::new(body.room_version)))
}
