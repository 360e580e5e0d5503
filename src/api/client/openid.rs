//! Tokens by which a user shows another service who they are.

use std::time::Duration;

use ruma::{OwnedUserId, api::client::account::request_openid_token, authentication::TokenType};

use crate::{
    accounts::openid,
    api::{Routes, client::config::require_self, extract::Client, raw::Raw},
    error::Result,
    flows::{App, account::keep, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(request_openid_token).limit(Limit::Other).not_suspended();
}

/// `POST /_matrix/client/v3/user/{userId}/openid/request_token`
pub(crate) async fn request_openid_token(
    app: App,
    client: Client<Raw<request_openid_token::v3::Request>>,
) -> Result<request_openid_token::v3::Response> {
    require_self(&client.caller, &client.request.id::<OwnedUserId>(0)?)?;
    let token = keep::make_openid_token(&app, &client.caller).await?;
    Ok(request_openid_token::v3::Response::new(
        token,
        TokenType::Bearer,
        app.config.server.name.clone(),
        Duration::from_millis(openid::LIFETIME_MS),
    ))
}
