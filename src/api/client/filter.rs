//! The filters that clients store here: storing one, and reading it back.

use ruma::{
    OwnedUserId,
    api::client::filter::{create_filter, get_filter},
};

use crate::{
    accounts::filters,
    api::{Routes, client::config::require_self, extract::Client, policy::Guests, raw::Raw, reply::RawJson},
    error::Result,
    flows::{App, account::keep, limits::Limit},
    sync,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_filter).limit(Limit::Other).guests(Guests::Yes);
    r.client(get_filter).limit(Limit::Read).guests(Guests::Yes);
}

/// `POST /_matrix/client/v3/user/{userId}/filter`
pub(crate) async fn create_filter(
    app: App,
    client: Client<Raw<create_filter::v3::Request>>,
) -> Result<create_filter::v3::Response> {
    let request = client.request;
    require_self(&client.caller, &request.id::<OwnedUserId>(0)?)?;
    let body = request.body.bytes();
    sync::check_filter(&filters::read(&body)?, sync::Relations::read(&body)?)?;
    let id = keep::keep_filter(&app, &client.caller, body).await?;
    Ok(create_filter::v3::Response::new(id))
}

/// `GET /_matrix/client/v3/user/{userId}/filter/{filterId}`
pub(crate) async fn get_filter(app: App, client: Client<get_filter::v3::Request>) -> Result<RawJson> {
    require_self(&client.caller, &client.request.user_id)?;
    let filter = filters::require(&*app.store.snapshot(), client.caller.user, &client.request.filter_id)?;
    Ok(RawJson(filter))
}
