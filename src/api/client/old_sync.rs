//! The endpoints by which clients learnt of rooms before `/sync`, which old clients still ask. The specification deprecates them, except
//! for looking into a room that everybody may read.

use std::{str::FromStr, time::Duration};

use ruma::{OwnedEventId, OwnedRoomId, presence::PresenceState};

use crate::{
    api::{Routes, extract::Client, policy::Guests, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{
        App,
        limits::Limit,
        room::{completing, look, presence, receipts},
    },
    sync::{MESSAGES_DEFAULT, StreamWanted, SyncToken},
};

/// One answer of `/events` has at most this many events of rooms, because an answer is held in memory.
const EVENTS_MAX: usize = 100;

pub(crate) fn routes(r: &mut Routes) {
    r.client(initial_sync).limit(Limit::Sync);
    r.client(room_initial_sync).limit(Limit::Read).guests(Guests::Yes);
    r.client(events).limit(Limit::Sync).guests(Guests::Yes).long_poll();
    r.client(one_event).limit(Limit::Read);
}

endpoint!(
    /// The endpoint that tells everything at once; ruma does not know it.
    InitialSync, GET,
    "/_matrix/client/v3/initialSync"
);

endpoint!(
    /// The endpoint that tells one room as it is; ruma does not know it.
    RoomInitialSync, GET,
    "/_matrix/client/v3/rooms/{room_id}/initialSync"
);

endpoint!(
    /// The stream of events; ruma knows only its form for one room.
    Events, GET,
    "/_matrix/client/v3/events"
);

endpoint!(
    /// The endpoint that gives an event without naming its room; ruma does not know it.
    OneEvent, GET,
    "/_matrix/client/v3/events/{event_id}"
);

/// Reads a parameter of the query, or takes the default. Refuses what is not of its kind: 400 `M_INVALID_PARAM`.
fn query<R, T: FromStr>(request: &Raw<R>, name: &str, kind: &str, default: T) -> Result<T> {
    let Some(text) = request.query(name) else { return Ok(default) };
    text.parse().map_err(|_| Refusal::invalid_param(format!("`{name}` must be {kind}.")).into())
}

fn limit<R>(request: &Raw<R>, default: usize) -> Result<usize> {
    query(request, "limit", "a number that is not negative", default)
}

/// `GET /_matrix/client/v3/initialSync`
pub(crate) async fn initial_sync(app: App, client: Client<Raw<InitialSync>>) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let limit = limit(&request, MESSAGES_DEFAULT)?;
    let archived = query(&request, "archived", "`true` or `false`", false)?;
    let _present = presence::begin_poll(&app, &caller, PresenceState::Online).await?;
    receipts::settle(&app, caller.user).await;
    app.polls.initial(caller, limit, archived).await.map(RawJson)
}

/// `GET /_matrix/client/v3/rooms/{roomId}/initialSync`
pub(crate) async fn room_initial_sync(app: App, client: Client<Raw<RoomInitialSync>>) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let room: OwnedRoomId = request.id(0)?;
    let limit = limit(&request, MESSAGES_DEFAULT)?;
    completing::whole(&app, &caller, &room).await?;
    receipts::settle(&app, caller.user).await;
    app.polls.initial_of_room(caller, room, limit).await.map(RawJson)
}

/// `GET /_matrix/client/v3/events`
pub(crate) async fn events(app: App, client: Client<Raw<Events>>) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    // Some old clients begin with an empty token.
    let from = match request.query("from").filter(|from| !from.is_empty()) {
        Some(from) => Some(app.polls.settle(SyncToken::parse(&from)?)?),
        None => None,
    };
    let room = request.query("room_id").map(OwnedRoomId::try_from).transpose();
    let room = room.map_err(|_| Refusal::invalid_param("`room_id` must be the id of a room."))?;
    let timeout_ms = query(&request, "timeout", "a number of milliseconds", 0)?;
    let limit = limit(&request, EVENTS_MAX)?.clamp(1, EVENTS_MAX);
    // Somebody who only looks into a room is not more present by that.
    let state = if room.is_some() { PresenceState::Offline } else { PresenceState::Online };
    let _present = presence::begin_poll(&app, &caller, state).await?;
    receipts::settle(&app, caller.user).await;
    let timeout = Duration::from_millis(timeout_ms);
    app.polls.stream(StreamWanted { caller, from, room, limit, timeout }).await.map(RawJson)
}

/// `GET /_matrix/client/v3/events/{eventId}`
pub(crate) async fn one_event(app: App, client: Client<Raw<OneEvent>>) -> Result<RawJson> {
    let id: OwnedEventId = client.request.id(0)?;
    look::event_anywhere(&app, &client.caller, id).await.map(RawJson)
}
