//! Questions of other servers about our users and aliases.

use ruma::api::federation::query::{get_profile_information, get_room_information};
use serde_json::Value;

use crate::{
    api::{Routes, extract::Server, reply::RawJson},
    error::Result,
    flows::{App, limits::Limit, remote::query},
};

pub(crate) fn routes(r: &mut Routes) {
    r.server(profile).limit(Limit::Read);
    r.server(directory).limit(Limit::Read);
}

/// `GET /_matrix/federation/v1/query/profile`
pub(crate) async fn profile(
    app: App,
    server: Server<get_profile_information::v1::Request>,
) -> Result<RawJson> {
    let get_profile_information::v1::Request { user_id, field, .. } = server.request;
    let field = field.as_ref().map(|field| field.as_str());
    let profile = query::profile(&app, &user_id, field)?;
    Ok(RawJson(Value::Object(profile).to_string().into()))
}

/// `GET /_matrix/federation/v1/query/directory`
pub(crate) async fn directory(
    app: App,
    server: Server<get_room_information::v1::Request>,
) -> Result<get_room_information::v1::Response> {
    let found = query::alias(&app, &server.request.room_alias)?;
    Ok(get_room_information::v1::Response::new(found.room_id, found.servers))
}
