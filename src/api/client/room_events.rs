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
        room::get_room_event,
        state::{
            get_state_event_for_key::{self, v3::StateEventFormat},
            get_state_events,
        },
    },
};

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

/// `GET /_matrix/client/v3/rooms/{roomId}/messages`
pub(crate) async fn get_message_events(
    app: App,
    client: Client<get_message_events::v3::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let wanted = PageWanted {
        from: request.from,
        to: request.to,
        direction: direction(request.dir),
        limit: request.limit.into(),
        filter: request.filter,
    };
    look::messages(&app, &client.caller, &request.room_id, wanted).await.map(RawJson)
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

/// `GET /_matrix/client/v1/rooms/{roomId}/relations/{eventId}`
pub(crate) async fn get_relating_events(
    app: App,
    client: Client<get_relating_events::v1::Request>,
) -> Result<RawJson> {
    let request = client.request;
    let wanted = RelationsWanted {
        rel_type: None,
        event_type: None,
        from: request.from,
        to: request.to,
        direction: direction(request.dir),
        limit: request.limit.map_or(RELATIONS_DEFAULT, Into::into),
        recurse: request.recurse,
    };
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
        event_type: None,
        from: request.from,
        to: request.to,
        direction: direction(request.dir),
        limit: request.limit.map_or(RELATIONS_DEFAULT, Into::into),
        recurse: request.recurse,
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
        from: request.from,
        to: request.to,
        direction: direction(request.dir),
        limit: request.limit.map_or(RELATIONS_DEFAULT, Into::into),
        recurse: request.recurse,
    };
    look::relations(&app, &client.caller, &request.room_id, &request.event_id, wanted).await.map(RawJson)
}
