//! Room aliases: adding one, removing one, and finding the room that one names.

use ruma::api::client::alias::{create_alias, delete_alias, get_alias};

use crate::{
    api::{
        Routes,
        extract::{Client, Public},
    },
    error::Result,
    flows::{
        App,
        limits::Limit,
        remote::{ask, query},
        room::aliases,
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_alias).limit(Limit::Other).not_suspended();
    r.client(delete_alias).limit(Limit::Other).not_suspended();
    r.public(get_alias).limit(Limit::Read);
}

/// `PUT /_matrix/client/v3/directory/room/{roomAlias}`
pub(crate) async fn create_alias(
    app: App,
    client: Client<create_alias::v3::Request>,
) -> Result<create_alias::v3::Response> {
    aliases::add(&app, &client.caller, &client.request.room_alias, &client.request.room_id).await?;
    Ok(create_alias::v3::Response::new())
}

/// `DELETE /_matrix/client/v3/directory/room/{roomAlias}`
pub(crate) async fn delete_alias(
    app: App,
    client: Client<delete_alias::v3::Request>,
) -> Result<delete_alias::v3::Response> {
    aliases::remove(&app, &client.caller, &client.request.room_alias).await?;
    Ok(delete_alias::v3::Response::new())
}

/// `GET /_matrix/client/v3/directory/room/{roomAlias}`
pub(crate) async fn get_alias(
    app: App,
    public: Public<get_alias::v3::Request>,
) -> Result<get_alias::v3::Response> {
    let alias = &public.request.room_alias;
    if *alias.server_name() != app.config.server.name {
        let found = ask::alias(&app, alias).await?;
        return Ok(get_alias::v3::Response::new(found.room_id, found.servers));
    }
    let found = query::alias(&app, alias)?;
    Ok(get_alias::v3::Response::new(found.room_id, found.servers))
}
