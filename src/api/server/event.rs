//! Single events, the events that a server misses, and the state before an event.

use ruma::{
    EventId, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedRoomId, UInt,
    api::federation::{
        authorization::get_event_authorization,
        backfill::get_backfill,
        event::{get_event, get_event_by_timestamp, get_missing_events, get_room_state, get_room_state_ids},
    },
};

use crate::{
    api::{
        Routes,
        extract::Server,
        raw::Raw,
        reply::{InPieces, RawJson},
    },
    error::{Refusal, Result},
    flows::{App, limits::Limit, remote::history},
    json::{JsonText, Object},
    store::Direction,
};

pub(crate) fn routes(r: &mut Routes) {
    r.server(event).limit(Limit::Read);
    r.server(backfill).limit(Limit::Read);
    r.server(missing_events).limit(Limit::Read);
    r.server(state_ids).limit(Limit::Read);
    r.server(state).limit(Limit::Read);
    r.server(event_at_time).limit(Limit::Read);
    r.server(event_auth).limit(Limit::Read);
}

/// Writes events in the form of a transaction.
fn transaction(app: &App, events: &[JsonText]) -> RawJson {
    let mut answer = Object::new();
    answer.text("origin", app.config.server.name.as_str());
    answer.number("origin_server_ts", app.env.now_ms());
    answer.list("pdus", events);
    RawJson(answer.finish().into())
}

fn list(name: &str, events: &[JsonText]) -> RawJson {
    let mut answer = Object::new();
    answer.list(name, events);
    RawJson(answer.finish().into())
}

/// `GET /_matrix/federation/v1/event/{eventId}`
pub(crate) async fn event(app: App, server: Server<get_event::v1::Request>) -> Result<RawJson> {
    let event = history::one(&app, &server.origin, server.request.event_id).await?;
    Ok(transaction(&app, &[event]))
}

/// `GET /_matrix/federation/v1/backfill/{roomId}`
pub(crate) async fn backfill(app: App, server: Server<Raw<get_backfill::v1::Request>>) -> Result<RawJson> {
    let request = server.request;
    let room: OwnedRoomId = request.id(0)?;
    let limit = request.query("limit").and_then(|limit| limit.parse().ok());
    let limit = limit.ok_or_else(|| Refusal::invalid_param("`limit` must be a number of events."))?;
    let from = request.query_all("v").iter().map(EventId::parse).collect::<Result<Vec<_>, _>>();
    let from = from.map_err(|_| Refusal::invalid_param("`v` must be the id of an event."))?;
    let events = history::before(&app, &server.origin, &room, from, limit).await?;
    Ok(transaction(&app, &events))
}

/// `POST /_matrix/federation/v1/get_missing_events/{roomId}`
pub(crate) async fn missing_events(
    app: App,
    server: Server<get_missing_events::v1::Request>,
) -> Result<RawJson> {
    let get_missing_events::v1::Request { room_id, limit, min_depth, earliest_events, latest_events, .. } =
        server.request;
    let wanted = history::Missing {
        earliest: earliest_events,
        latest: latest_events,
        min_depth: min_depth.into(),
        limit: limit.into(),
    };
    let events = history::missing(&app, &server.origin, &room_id, wanted).await?;
    Ok(list("events", &events))
}

/// `GET /_matrix/federation/v1/state_ids/{roomId}`
pub(crate) async fn state_ids(
    app: App,
    server: Server<get_room_state_ids::v1::Request>,
) -> Result<get_room_state_ids::v1::Response> {
    let get_room_state_ids::v1::Request { room_id, event_id, .. } = server.request;
    let ids = history::state_ids(&app, &server.origin, &room_id, event_id).await?;
    Ok(get_room_state_ids::v1::Response::new(ids.auth_chain, ids.state))
}

/// `GET /_matrix/federation/v1/state/{roomId}`
pub(crate) async fn state(app: App, server: Server<get_room_state::v1::Request>) -> Result<InPieces> {
    let get_room_state::v1::Request { room_id, event_id, .. } = server.request;
    let (first, rest) = history::state(&app, &server.origin, &room_id, event_id).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}

fn direction(wanted: ruma::api::Direction) -> Direction {
    match wanted {
        ruma::api::Direction::Forward => Direction::Up,
        ruma::api::Direction::Backward => Direction::Down,
    }
}

/// `GET /_matrix/federation/v1/timestamp_to_event/{roomId}`
pub(crate) async fn event_at_time(
    app: App,
    server: Server<get_event_by_timestamp::v1::Request>,
) -> Result<get_event_by_timestamp::v1::Response> {
    let get_event_by_timestamp::v1::Request { room_id, ts, dir, .. } = server.request;
    let (time_ms, dir) = (ts.get().into(), direction(dir));
    let (event, sent_ms) = history::at_time(&app, &server.origin, &room_id, time_ms, dir).await?;
    let sent = MilliSecondsSinceUnixEpoch(UInt::new_saturating(sent_ms));
    Ok(get_event_by_timestamp::v1::Response::new(event, sent))
}

/// `GET /_matrix/federation/v1/event_auth/{roomId}/{eventId}`
pub(crate) async fn event_auth(
    app: App,
    server: Server<Raw<get_event_authorization::v1::Request>>,
) -> Result<RawJson> {
    let request = server.request;
    let (room, event): (OwnedRoomId, OwnedEventId) = (request.id(0)?, request.id(1)?);
    let chain = history::auth_chain(&app, &server.origin, &room, event).await?;
    Ok(list("auth_chain", &chain))
}
