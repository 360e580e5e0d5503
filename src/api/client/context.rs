//! Reads the events around an event of a room.

use ruma::api::client::{context::get_context, filter::RoomEventFilter};

use crate::{
    accounts::filters,
    api::{
        Routes, client::relations::relation_filter, extract::Client, policy::Guests, raw::Raw, reply::RawJson,
    },
    error::Result,
    flows::{App, limits::Limit, room::look},
    rooms::filter::Filter,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_context).limit(Limit::Read).guests(Guests::Yes);
}

/// `GET /_matrix/client/v3/rooms/{roomId}/context/{eventId}`
pub(crate) async fn get_context(app: App, client: Client<Raw<get_context::v3::Request>>) -> Result<RawJson> {
    client.request.check_query::<RoomEventFilter>("filter")?;
    let request = client.request.read()?;
    filters::require_cheap_events(&request.filter)?;
    let filter = Filter::new(&request.filter, relation_filter(&client.request)?)?;
    let limit = request.limit.into();
    look::context(&app, &client.caller, &request.room_id, &request.event_id, limit, filter).await.map(RawJson)
}
