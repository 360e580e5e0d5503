//! The rooms of a space, and what a single room is.

use ruma::api::client::{room::get_summary, space::get_hierarchy};

use crate::{
    api::{
        Routes,
        extract::{Client, MaybeClient},
        reply::RawJson,
    },
    error::Result,
    flows::{
        App,
        limits::Limit,
        remote::hierarchy::{self, Ask},
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(hierarchy).limit(Limit::Read);
    r.maybe_client(summary).limit(Limit::Read);
}

/// `GET /_matrix/client/v1/room_summary/{roomIdOrAlias}`
pub(crate) async fn summary(app: App, client: MaybeClient<get_summary::v1::Request>) -> Result<RawJson> {
    let get_summary::v1::Request { room_id_or_alias, via, .. } = client.request;
    Ok(RawJson(hierarchy::summary(&app, client.caller.as_ref(), &room_id_or_alias, via).await?))
}

/// `GET /_matrix/client/v1/rooms/{roomId}/hierarchy`
pub(crate) async fn hierarchy(app: App, client: Client<get_hierarchy::v1::Request>) -> Result<RawJson> {
    let get_hierarchy::v1::Request { room_id, from, limit, max_depth, suggested_only, .. } = client.request;
    let (limit, max_depth) = (limit.map(u64::from), max_depth.map(u64::from));
    let ask = Ask { limit, max_depth, suggested_only, from };
    Ok(RawJson(hierarchy::for_client(&app, &client.caller, &room_id, ask).await?))
}
