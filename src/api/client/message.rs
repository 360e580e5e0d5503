//! The messages of a room: sending one, and reading pages of the timeline.

use ruma::{
    EventId,
    api::client::{
        filter::RoomEventFilter,
        message::{get_message_events, send_message_event},
    },
};
use serde_json::json;

use crate::{
    accounts::filters,
    api::{
        Routes,
        client::{
            delay::{DELAY, query_number, require_delay, scheduled, sticky_ms},
            relations::{direction, relation_filter},
        },
        extract::Client,
        policy::{Body, Guests, KIB},
        raw::Raw,
        reply::RawJson,
    },
    error::Result,
    flows::{
        App,
        limits::Limit,
        remote::read_back,
        room::{
            delayed::{self, Wanted},
            look::PageWanted,
            send::{self, Message},
        },
    },
    rooms::filter::Filter,
};

/// The body of an event. It may be larger than an event, because escaped characters take up to three times their bytes
/// until the event is written canonically.
pub(super) const EVENT: Body = Body::Json(256 * KIB);

pub(crate) fn routes(r: &mut Routes) {
    r.client(send_message_event).limit(Limit::Send).guests(Guests::Yes).body(EVENT).not_suspended();
    r.client(send_message_event_without_txn)
        .limit(Limit::Send)
        .guests(Guests::Yes)
        .body(EVENT)
        .not_suspended();
    r.client(get_message_events).limit(Limit::Read).guests(Guests::Yes);
}

endpoint!(
    /// The endpoint of old clients, which name no transaction; ruma and the specification do not know it.
    WithoutTxn, POST,
    "/_matrix/client/v3/rooms/{room_id}/send/{event_type}"
);

/// `PUT /_matrix/client/v3/rooms/{roomId}/send/{eventType}/{txnId}`
pub(crate) async fn send_message_event(
    app: App,
    client: Client<Raw<send_message_event::v3::Request>>,
) -> Result<RawJson> {
    let (delay_ms, sticky_ms) = (query_number(&client.request, DELAY)?, sticky_ms(&client.request)?);
    let request = client.request.read()?;
    let event_type = request.event_type.to_string();
    let content = send::content(request.body.json().get())?;
    if let Some(delay_ms) = delay_ms {
        require_delay(&app, delay_ms, true)?;
        let (room, txn) = (request.room_id, Some(request.txn_id.into()));
        let wanted = Wanted { room, event_type, state_key: None, txn, content, delay_ms, sticky_ms };
        return delayed::schedule(&app, &client.caller, wanted).await.map(|id| scheduled(&id));
    }
    let (room, txn) = (request.room_id, Some(request.txn_id.into()));
    let message = Message { room, event_type, txn, content, redacts: None, sticky_ms };
    send::send(&app, &client.caller, message).await.map(|event_id| sent(&event_id))
}

/// `POST /_matrix/client/v3/rooms/{roomId}/send/{eventType}`
pub(crate) async fn send_message_event_without_txn(
    app: App,
    client: Client<Raw<WithoutTxn>>,
) -> Result<RawJson> {
    let (delay_ms, sticky_ms) = (query_number(&client.request, DELAY)?, sticky_ms(&client.request)?);
    let (room, event_type) = (client.request.id(0)?, client.request.arg(1).to_owned());
    let content = client.request.json()?;
    if let Some(delay_ms) = delay_ms {
        require_delay(&app, delay_ms, true)?;
        let wanted = Wanted { room, event_type, state_key: None, txn: None, content, delay_ms, sticky_ms };
        return delayed::schedule(&app, &client.caller, wanted).await.map(|id| scheduled(&id));
    }
    let message = Message { room, event_type, txn: None, content, redacts: None, sticky_ms };
    send::send(&app, &client.caller, message).await.map(|event_id| sent(&event_id))
}

/// The answer to a request that has sent this event.
pub(super) fn sent(event_id: &EventId) -> RawJson {
    RawJson(json!({ "event_id": event_id }).to_string().into())
}

/// `GET /_matrix/client/v3/rooms/{roomId}/messages`
///
/// The specification demands a direction. Without one this server goes forwards, as Synapse does, because Complement relies
/// on that.
pub(crate) async fn get_message_events(
    app: App,
    client: Client<Raw<get_message_events::v3::Request>>,
) -> Result<RawJson> {
    let raw = client.request.or_query("dir", "f");
    raw.check_query::<RoomEventFilter>("filter")?;
    let request = raw.read()?;
    filters::require_cheap_events(&request.filter)?;
    let wanted = PageWanted {
        from: request.from,
        to: request.to,
        direction: direction(request.dir),
        limit: request.limit.into(),
        filter: Filter::new(&request.filter, relation_filter(&raw)?)?,
    };
    read_back::messages(&app, &client.caller, &request.room_id, wanted).await.map(RawJson)
}
