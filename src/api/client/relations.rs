//! Lists the events that refer to an event, such as replies in a thread, edits and reactions.

use ruma::{
    UInt,
    api::{
        Direction as Wanted,
        client::relations::{
            get_relating_events, get_relating_events_with_rel_type,
            get_relating_events_with_rel_type_and_event_type,
        },
    },
};

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{
        App,
        limits::Limit,
        room::look::{self, RelationsWanted},
    },
    rooms::filter::RelationFilter,
    store::Direction,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_relating_events).limit(Limit::Read);
    r.client(get_relating_events_with_rel_type).limit(Limit::Read);
    r.client(get_relating_events_with_rel_type_and_event_type).limit(Limit::Read);
}

/// A client that asks for no number of relations gets at most this many.
const RELATIONS_DEFAULT: u64 = 50;

/// Makes the wish for a page of relations of any kind, from the parameters that all three endpoints have.
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

/// The direction in which the pages of a list go, as a request says it.
pub(super) fn direction(wanted: Wanted) -> Direction {
    match wanted {
        Wanted::Forward => Direction::Up,
        Wanted::Backward => Direction::Down,
    }
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

/// Reads the part of a filter in the query that is about relations, which ruma does not read.
pub(super) fn relation_filter<R>(raw: &Raw<R>) -> Result<RelationFilter> {
    let Some(filter) = raw.query("filter") else { return Ok(RelationFilter::default()) };
    serde_json::from_str(&filter).map_err(|error| {
        Refusal::invalid_param(format!("The query parameter `filter` cannot be read: {error}.")).into()
    })
}
