//! Reading a room: its state, single events, pages of its timeline, what surrounds and what refers to an event.

use ruma::api::{
    Direction as Wanted, IncomingRequest, Metadata,
    client::{
        context::get_context,
        message::get_message_events,
        relations::{
            get_relating_events, get_relating_events_with_rel_type,
            get_relating_events_with_rel_type_and_event_type,
        },
        room::{get_event_by_timestamp, get_room_event},
        state::{
            get_state_event_for_key::{self, v3::StateEventFormat},
            get_state_events,
        },
        threads::get_threads::{self, v1::IncludeThreads},
    },
    error::DeserializationError,
};
use ruma::{MilliSecondsSinceUnixEpoch, UInt};

use crate::{
    api::{Routes, extract::Client, reply::RawJson},
    error::Result,
    flows::{
        App,
        look::{self, PageWanted, RelationsWanted},
    },
    store::Direction,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_state_events);
    r.client(get_state_event_for_key);
    r.client(get_room_event);
    r.client(get_message_events);
    r.client(get_context);
    r.client(get_threads);
    r.client(get_event_by_timestamp);
    r.client(get_relating_events);
    r.client(get_relating_events_with_rel_type);
    r.client(get_relating_events_with_rel_type_and_event_type);
}

fn direction(wanted: Wanted) -> Direction {
    match wanted {
        Wanted::Forward => Direction::Up,
        Wanted::Backward => Direction::Down,
    }
}

/// `GET /_matrix/client/v3/rooms/{roomId}/state`
pub(crate) async fn get_state_events(
    app: App,
    client: Client<get_state_events::v3::Request>,
) -> Result<RawJson> {
    look::state(&app, &client.caller, &client.request.room_id).await.map(RawJson)
}

/// `GET /_matrix/client/v3/rooms/{roomId}/state/{eventType}/{stateKey}`
pub(crate) async fn get_state_event_for_key(
    app: App,
    client: Client<get_state_event_for_key::v3::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let (kind, whole_event) = (request.event_type.to_string(), request.format == StateEventFormat::Event);
    look::state_event(&app, &client.caller, &request.room_id, kind, request.state_key, whole_event)
        .await
        .map(RawJson)
}

/// `GET /_matrix/client/v3/rooms/{roomId}/event/{eventId}`
pub(crate) async fn get_room_event(app: App, client: Client<get_room_event::v3::Request>) -> Result<RawJson> {
    look::event(&app, &client.caller, &client.request.room_id, &client.request.event_id).await.map(RawJson)
}

/// `GET /_matrix/client/v3/rooms/{roomId}/context/{eventId}`
pub(crate) async fn get_context(app: App, client: Client<get_context::v3::Request>) -> Result<RawJson> {
    let request = client.request;
    let limit = request.limit.into();
    look::context(&app, &client.caller, &request.room_id, &request.event_id, limit, request.filter)
        .await
        .map(RawJson)
}

/// How many relations a client gets that asks for no number.
const RELATIONS_DEFAULT: u64 = 50;

/// What all three requests for relations say alike: a page of those of any kind.
fn relations(
    from: Option<String>,
    to: Option<String>,
    dir: Wanted,
    limit: Option<UInt>,
    recurse: bool,
) -> RelationsWanted {
    let limit = limit.map_or(RELATIONS_DEFAULT, Into::into);
    RelationsWanted { rel_type: None, event_type: None, from, to, direction: direction(dir), limit, recurse }
}

/// `GET /_matrix/client/v1/rooms/{roomId}/relations/{eventId}`
pub(crate) async fn get_relating_events(
    app: App,
    client: Client<get_relating_events::v1::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let wanted = relations(request.from, request.to, request.dir, request.limit, request.recurse);
    look::relations(&app, &client.caller, &request.room_id, &request.event_id, wanted).await.map(RawJson)
}

/// `GET /_matrix/client/v1/rooms/{roomId}/relations/{eventId}/{relType}`
pub(crate) async fn get_relating_events_with_rel_type(
    app: App,
    client: Client<get_relating_events_with_rel_type::v1::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let wanted = RelationsWanted {
        rel_type: Some(request.rel_type.to_string()),
        ..relations(request.from, request.to, request.dir, request.limit, request.recurse)
    };
    look::relations(&app, &client.caller, &request.room_id, &request.event_id, wanted).await.map(RawJson)
}

/// `GET /_matrix/client/v1/rooms/{roomId}/relations/{eventId}/{relType}/{eventType}`
pub(crate) async fn get_relating_events_with_rel_type_and_event_type(
    app: App,
    client: Client<get_relating_events_with_rel_type_and_event_type::v1::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let wanted = RelationsWanted {
        rel_type: Some(request.rel_type.to_string()),
        event_type: Some(request.event_type.to_string()),
        ..relations(request.from, request.to, request.dir, request.limit, request.recurse)
    };
    look::relations(&app, &client.caller, &request.room_id, &request.event_id, wanted).await.map(RawJson)
}

/// The request for a page of messages. The specification demands a direction; Synapse takes one without as forwards, and
/// Complement relies on that.
pub(crate) struct Messages(get_message_events::v3::Request);

impl Metadata for Messages {
    const METHOD: http::Method = get_message_events::v3::Request::METHOD;
    const RATE_LIMITED: bool = get_message_events::v3::Request::RATE_LIMITED;
    type Authentication = <get_message_events::v3::Request as Metadata>::Authentication;
    type PathBuilder = <get_message_events::v3::Request as Metadata>::PathBuilder;
    const PATH_BUILDER: Self::PathBuilder = get_message_events::v3::Request::PATH_BUILDER;
}

impl IncomingRequest for Messages {
    type EndpointError = <get_message_events::v3::Request as IncomingRequest>::EndpointError;
    type OutgoingResponse = get_message_events::v3::Response;

    fn try_from_http_request_inner(
        mut request: http::Request<&[u8]>,
        path_args: &[&str],
    ) -> Result<Self, DeserializationError> {
        let uri = request.uri();
        let query = uri.query().unwrap_or_default();
        if !query.split('&').any(|pair| pair.starts_with("dir=")) {
            let with_direction = format!("{}?{query}&dir=f", uri.path());
            if let Ok(uri) = with_direction.parse() {
                *request.uri_mut() = uri;
            }
        }
        get_message_events::v3::Request::try_from_http_request_inner(request, path_args).map(Self)
    }
}

/// `GET /_matrix/client/v3/rooms/{roomId}/messages`
pub(crate) async fn get_message_events(app: App, client: Client<Messages>) -> Result<RawJson> {
    let Messages(request) = client.request;
    let wanted = PageWanted {
        from: request.from,
        to: request.to,
        direction: direction(request.dir),
        limit: request.limit.into(),
        filter: request.filter,
    };
    look::messages(&app, &client.caller, &request.room_id, wanted).await.map(RawJson)
}

/// How many threads a client gets that asks for no number.
const THREADS_DEFAULT: u64 = 20;

/// `GET /_matrix/client/v1/rooms/{roomId}/threads`
pub(crate) async fn get_threads(app: App, client: Client<get_threads::v1::Request>) -> Result<RawJson> {
    let request = client.request;
    let limit = request.limit.map_or(THREADS_DEFAULT, Into::into);
    let only_own = request.include == IncludeThreads::Participated;
    look::threads(&app, &client.caller, &request.room_id, request.from, limit, only_own).await.map(RawJson)
}

/// `GET /_matrix/client/v1/rooms/{roomId}/timestamp_to_event`
pub(crate) async fn get_event_by_timestamp(
    app: App,
    client: Client<get_event_by_timestamp::v1::Request>,
) -> Result<get_event_by_timestamp::v1::Response> {
    let request = client.request;
    let (time_ms, direction) = (request.ts.get().into(), direction(request.dir));
    let (event_id, sent_ms) =
        look::event_at_time(&app, &client.caller, &request.room_id, time_ms, direction).await?;
    let sent = MilliSecondsSinceUnixEpoch(UInt::new_saturating(sent_ms));
    Ok(get_event_by_timestamp::v1::Response::new(event_id, sent))
}
