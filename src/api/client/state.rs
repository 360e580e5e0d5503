//! The state of a room: reading it, and setting it.

use ruma::api::client::state::{
    get_state_event_for_key::{self, v3::StateEventFormat},
    get_state_events, send_state_event,
};

use crate::{
    api::{
        Routes,
        client::{
            delay::{DELAY, query_number, require_delay, scheduled, sticky_ms},
            message::{EVENT, sent},
        },
        extract::Client,
        policy::Guests,
        raw::Raw,
        reply::RawJson,
    },
    error::Result,
    flows::{
        App,
        limits::{Limit, Source},
        membership,
        room::{
            delayed::{self, Wanted},
            look,
            look::Whole,
            send::{self, Piece},
        },
    },
    schema::event_types::MEMBER,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_state_events).limit(Limit::Read).guests(Guests::Yes);
    r.client(get_state_event_for_key).limit(Limit::Read).guests(Guests::Yes);
    r.client(send_state_event).limit(Limit::Send).guests(Guests::Yes).body(EVENT).not_suspended();
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
    client: Client<Raw<send_state_event::v3::Request>>,
) -> Result<RawJson> {
    let (delay_ms, sticky_ms) = (query_number(&client.request, DELAY)?, sticky_ms(&client.request)?);
    let request = client.request.read()?;
    let content = send::content(request.body.json().get())?;
    // `ts` is ignored: the time of an event may be set by application services only.
    let (event_type, state_key) = (request.event_type.to_string(), request.state_key);
    if let Some(delay_ms) = delay_ms {
        require_delay(&app, delay_ms, true)?;
        let (room, state_key) = (request.room_id, Some(state_key));
        let wanted = Wanted { room, event_type, state_key, txn: None, content, delay_ms, sticky_ms };
        return delayed::schedule(&app, &client.caller, wanted).await.map(|id| scheduled(&id));
    }
    if event_type == MEMBER {
        // A change of membership counts as one here too, so that this endpoint does not get around the limit. One that is scheduled counts
        // when it is sent.
        app.limits.take(Limit::Membership, Source::User(client.caller.user))?;
    }
    let piece = Piece { event_type, state_key, content, confirmed: Vec::new(), sticky_ms };
    let event_id = membership::set_state(&app, &client.caller, &request.room_id, piece).await?;
    Ok(sent(&event_id))
}
