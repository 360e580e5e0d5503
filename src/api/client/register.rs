//! Making accounts.

use ruma::api::{
    client::account::{check_registration_token_validity, get_username_availability, register},
    error::ErrorKind,
};

use crate::{
    accounts::{devices::LogIn, registration},
    api::{Routes, confirmable::Confirmable, extract::Public},
    error::{Refusal, Result},
    flows::{
        App,
        register::{self as flow, Wish},
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(register);
    r.public(get_username_availability);
    r.public(check_registration_token_validity);
}

/// `POST /_matrix/client/v3/register`
pub(crate) async fn register(
    app: App,
    public: Public<Confirmable<register::v3::Request>>,
) -> Result<register::v3::Response> {
    let request = public.request.0;
    let (display_name, ip) = (request.initial_device_display_name, Some(public.peer));
    let log_in = LogIn { id: request.device_id, display_name, ip };
    if request.login_type == Some(register::LoginType::ApplicationService) {
        let refusal = Refusal::new(ErrorKind::UnknownToken(Default::default()), "There is no such service.");
        return Err(refusal.into());
    }
    let registered = match request.kind {
        register::RegistrationKind::Guest => flow::register_guest(&app, LogIn { id: None, ..log_in }).await?,
        register::RegistrationKind::User => {
            let wish = Wish {
                username: request.username,
                password: request.password,
                log_in: (!request.inhibit_login).then_some(log_in),
                refreshable: request.refresh_token,
            };
            match request.guest_access_token {
                Some(token) => flow::upgrade_guest(&app, &token, wish, request.auth.as_ref()).await?,
                None => flow::register(&app, wish, request.auth.as_ref()).await?,
            }
        }
        _ => return Err(Refusal::invalid_param("There are accounts of kind user and guest only.").into()),
    };
    let mut response = register::v3::Response::new(registered.user_id);
    if let Some(session) = registered.session {
        response.device_id = Some(session.holder.device_id);
        response.access_token = Some(session.tokens.access_token);
        response.refresh_token = session.tokens.refresh_token;
        response.expires_in = session.tokens.expires_in;
    }
    Ok(response)
}

/// `GET /_matrix/client/v3/register/available`
pub(crate) async fn get_username_availability(
    app: App,
    public: Public<get_username_availability::v3::Request>,
) -> Result<get_username_availability::v3::Response> {
    flow::require_free(&app, &public.request.username)?;
    Ok(get_username_availability::v3::Response::new(true))
}

/// `GET /_matrix/client/v1/register/m.login.registration_token/validity`
pub(crate) async fn check_registration_token_validity(
    app: App,
    public: Public<check_registration_token_validity::v1::Request>,
) -> Result<check_registration_token_validity::v1::Response> {
    let token = &public.request.token;
    let valid = registration::is_valid(&*app.store.snapshot(), &app.accounts, token, app.env.now_ms())?;
    Ok(check_registration_token_validity::v1::Response::new(valid))
}
