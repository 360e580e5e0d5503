//! Logging out.

use ruma::api::client::session::{logout, logout_all};

use crate::{
    api::{Routes, extract::Client},
    error::Result,
    flows::{
        App,
        account::log_out::{Which, log_out},
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(logout);
    r.client(logout_all);
}

/// `POST /_matrix/client/v3/logout`
pub(crate) async fn logout(app: App, client: Client<logout::v3::Request>) -> Result<logout::v3::Response> {
    log_out(&app, &client.caller, Which::Own).await?;
    Ok(logout::v3::Response::new())
}

/// `POST /_matrix/client/v3/logout/all`
pub(crate) async fn logout_all(
    app: App,
    client: Client<logout_all::v3::Request>,
) -> Result<logout_all::v3::Response> {
    log_out(&app, &client.caller, Which::All).await?;
    Ok(logout_all::v3::Response::new())
}
