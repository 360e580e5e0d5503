//! The state of a room: reading it, and setting it.

use ruma::{
    api::client::state::{
        get_state_event_for_key::{self, v3::StateEventFormat},
        get_state_events, send_state_event,
    },
    events::StateEventType,
};

use crate::{
    api::{Routes, client::message::EVENT, extract::Client, policy::Guests, reply::RawJson},
    error::Result,
    flows::{
        App,
        limits::{Limit, Source},
        membership,
        room::{look, look::Whole, send},
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_state_events).limit(Limit::Read).guests(Guests::Yes);
    r.client(get_state_event_for_key).limit(Limit::Read).guests(Guests::Yes);
    r.client(send_state_event).limit(Limit::Send).guests(Guests::Yes).body(EVENT);
}

/// `GET /_matrix/client/v3/rooms/{roomId}/state`
pub(crate) async fn get_state_events(
    app: App,
    client: Client<get_state_events::v3::Request>,
) -> Result<Whole> {
    look::state(&app, &client.caller, &client.request.room_id).await
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

/// `PUT /_matrix/client/v3/rooms/{roomId}/state/{eventType}/{stateKey}`
pub(crate) async fn send_state_event(
    app: App,
    client: Client<send_state_event::v3::Request>,
) -> Result<send_state_event::v3::Response> {
    let request = client.request;
    if request.event_type == StateEventType::RoomMember {
        // A change of membership counts as one here too, so that this endpoint does not get around the limit.
        app.limits.take(Limit::Membership, Source::User(client.caller.user))?;
    }
    let content = send::content(request.body.json().get())?;
    // `ts` is ignored: the time of an event may be set by application services only.
    let kind = request.event_type.to_string();
    let event_id =
        membership::set_state(&app, &client.caller, &request.room_id, kind, request.state_key, content)
            .await?;
    Ok(send_state_event::v3::Response::new(event_id))
}
