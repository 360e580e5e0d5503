//! Registers accounts, of users and of guests.

use ruma::api::{
    client::account::{check_registration_token_validity, get_username_availability, register},
    error::ErrorKind,
};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    accounts::{devices::LogIn, registration},
    api::{Routes, extract::Public, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{
        App,
        account::register::{self as flow, Registered, Wish},
        limits::Limit,
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(register).limit(Limit::Register);
    r.public(get_username_availability).limit(Limit::Other);
    // Each request is a guess at a token, so that it is limited as a registration.
    r.public(check_registration_token_validity).limit(Limit::Register);
}

/// The part of a request that counts for a guest. All else in it is ignored, whatever it is.
#[derive(Deserialize)]
struct GuestBody {
    initial_device_display_name: Option<String>,
}

/// `POST /_matrix/client/v3/register`
pub(crate) async fn register(app: App, public: Public<Raw<register::v3::Request>>) -> Result<RawJson> {
    if public.request.query("kind").as_deref() == Some("guest") {
        let body: GuestBody = public.request.json()?;
        let display_name = body.initial_device_display_name;
        let log_in = LogIn { id: None, display_name, ip: Some(public.peer) };
        return answer(flow::register_guest(&app, log_in).await?);
    }
    let request = public.request.read_confirmed()?;
    let (display_name, ip) = (request.initial_device_display_name, Some(public.peer));
    let log_in = LogIn { id: request.device_id, display_name, ip };
    if request.login_type == Some(register::LoginType::ApplicationService) {
        let refusal = Refusal::new(
            ErrorKind::UnknownToken(Default::default()),
            "No application service has this token.",
        );
        return Err(refusal.into());
    }
    let registered = match request.kind {
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
        _ => return Err(Refusal::invalid_param("`kind` must be `user` or `guest`.").into()),
    };
    answer(registered)
}

fn answer(registered: Registered) -> Result<RawJson> {
    // The answer is not written by ruma, whose type writes `"device_id": null` where there is no device.
    let mut answer = Map::from_iter([("user_id".to_owned(), Value::from(registered.user_id.as_str()))]);
    if let Some(session) = registered.session {
        let tokens = session.tokens;
        answer.insert("device_id".to_owned(), session.holder.device_id.as_str().into());
        answer.insert("access_token".to_owned(), tokens.access_token.into());
        if let Some(token) = tokens.refresh_token {
            answer.insert("refresh_token".to_owned(), token.into());
        }
        if let Some(expires_in) = tokens.expires_in {
            answer.insert("expires_in_ms".to_owned(), (expires_in.as_millis() as u64).into());
        }
    }
    Ok(RawJson(Value::Object(answer).to_string().into()))
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
