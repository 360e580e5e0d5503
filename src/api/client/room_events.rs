//! Reading a room: its state, single events, pages of its timeline, what surrounds and what refers to an event.

use ruma::api::{
    Direction as Wanted,
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
};
use ruma::{MilliSecondsSinceUnixEpoch, UInt};

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{
        App,
        room::look::{self, PageWanted, RelationsWanted},
    },
    rooms::filter::{Filter, RelationFilter},
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
pub(crate) async fn get_room_event(
    app: App,
    client: Client<Raw<get_room_event::v3::Request>>,
) -> Result<RawJson> {
    let request = client.request.read()?;
    let unredacted = client.request.query(INCLUDE_UNREDACTED).is_some_and(|value| value == "true");
    look::event(&app, &client.caller, &request.room_id, &request.event_id, unredacted).await.map(RawJson)
}

/// A moderator wants to see what was redacted (MSC2815).
const INCLUDE_UNREDACTED: &str = "fi.mau.msc2815.include_unredacted_content";

/// `GET /_matrix/client/v3/rooms/{roomId}/context/{eventId}`
pub(crate) async fn get_context(app: App, client: Client<Raw<get_context::v3::Request>>) -> Result<RawJson> {
    let request = client.request.read()?;
    let filter = Filter { relations: relation_filter(&client.request)?, ..Filter::of(request.filter) };
    let limit = request.limit.into();
    look::context(&app, &client.caller, &request.room_id, &request.event_id, limit, filter).await.map(RawJson)
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

/// `GET /_matrix/client/v3/rooms/{roomId}/messages`
///
/// The specification demands a direction; Synapse takes none as forwards, and Complement relies on that.
pub(crate) async fn get_message_events(
    app: App,
    client: Client<Raw<get_message_events::v3::Request>>,
) -> Result<RawJson> {
    let raw = client.request.or_query("dir", "f");
    let request = raw.read()?;
    let wanted = PageWanted {
        from: request.from,
        to: request.to,
        direction: direction(request.dir),
        limit: request.limit.into(),
        filter: Filter { relations: relation_filter(&raw)?, ..Filter::of(request.filter) },
    };
    look::messages(&app, &client.caller, &request.room_id, wanted).await.map(RawJson)
}

/// What a filter in the query says of relations: ruma does not read that.
fn relation_filter<R>(raw: &Raw<R>) -> Result<RelationFilter> {
    let Some(filter) = raw.query("filter") else { return Ok(RelationFilter::default()) };
    serde_json::from_str(&filter).map_err(|error| {
        Refusal::invalid_param(format!("The filter is not what it should be: {error}.")).into()
    })
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
