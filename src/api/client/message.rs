//! The messages of a room: sending one, and reading pages of the timeline.

use ruma::api::client::{
    filter::RoomEventFilter,
    message::{get_message_events, send_message_event},
};

use crate::{
    accounts::filters,
    api::{
        Routes,
        client::relations::{direction, relation_filter},
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
    r.client(send_message_event).limit(Limit::Send).guests(Guests::Yes).body(EVENT);
    r.client(get_message_events).limit(Limit::Read).guests(Guests::Yes);
}

/// `PUT /_matrix/client/v3/rooms/{roomId}/send/{eventType}/{txnId}`
pub(crate) async fn send_message_event(
    app: App,
    client: Client<send_message_event::v3::Request>,
) -> Result<send_message_event::v3::Response> {
    let request = client.request;
    let message = Message {
        room: request.room_id,
        event_type: request.event_type.to_string(),
        txn: request.txn_id.into(),
        content: send::content(request.body.json().get())?,
        redacts: None,
    };
    let event_id = send::send(&app, &client.caller, message).await?;
    Ok(send_message_event::v3::Response::new(event_id))
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
