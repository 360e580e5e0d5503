//! The caller's own account: who they are, changing the password, deactivating the account.

mod register;
mod third_party;

use ruma::api::{
    client::account::{ThirdPartyIdRemovalStatus, change_password, deactivate, whoami},
    error::ErrorKind,
};
use serde_json::json;

use crate::{
    accounts::{Caller, passwords},
    api::{
        Routes,
        extract::{Client, MaybeClient},
        policy::Guests,
        raw::Raw,
    },
    error::{Refusal, Result},
    flows::{self, App, account::confirm, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(whoami).limit(Limit::Read).guests(Guests::Yes);
    r.maybe_client(change_password).limit(Limit::Login);
    r.maybe_client(deactivate).limit(Limit::Login);
    register::routes(r);
    third_party::routes(r);
}

/// `GET /_matrix/client/v3/account/whoami`
pub(crate) async fn whoami(_app: App, client: Client<whoami::v3::Request>) -> Result<whoami::v3::Response> {
    let mut response = whoami::v3::Response::new(client.caller.user_id, client.caller.is_guest);
    response.device_id = Some(client.caller.device_id);
    Ok(response)
}

/// Refuses a request without a token. Only a third-party identifier could otherwise say whose account is meant, and
/// this server knows none.
pub(crate) fn require_caller(caller: Option<Caller>) -> Result<Caller> {
    caller.ok_or_else(|| Refusal::new(ErrorKind::MissingToken, "This endpoint needs an access token.").into())
}

/// `POST /_matrix/client/v3/account/password`
pub(crate) async fn change_password(
    app: App,
    client: MaybeClient<Raw<change_password::v3::Request>>,
) -> Result<change_password::v3::Response> {
    let (caller, request) = (require_caller(client.caller)?, client.request.read_confirmed()?);
    passwords::check(&request.new_password)?;
    let wanted = json!({ "password": request.new_password, "logout_devices": request.logout_devices });
    let operation = confirm::operation("change password", Some(&caller), &wanted);
    let flows = confirm::password_flow();
    confirm::confirm(&app, &operation, &flows, Some(&caller), request.auth.as_ref()).await?;
    flows::account::change_password::change_password(
        &app,
        &caller,
        request.new_password,
        request.logout_devices,
    )
    .await?;
    Ok(change_password::v3::Response::new())
}

/// `POST /_matrix/client/v3/account/deactivate`
pub(crate) async fn deactivate(
    app: App,
    client: MaybeClient<Raw<deactivate::v3::Request>>,
) -> Result<deactivate::v3::Response> {
    let (caller, request) = (require_caller(client.caller)?, client.request.read_confirmed()?);
    let operation = confirm::operation("deactivate", Some(&caller), &json!({ "erase": request.erase }));
    let flows = confirm::password_flow();
    confirm::confirm(&app, &operation, &flows, Some(&caller), request.auth.as_ref()).await?;
    flows::account::deactivate::deactivate(&app, caller.user, caller.user_id, request.erase).await?;
    // This server binds nothing at identity servers, so that nothing is left to be unbound there.
    Ok(deactivate::v3::Response::new(ThirdPartyIdRemovalStatus::Success))
}
