//! Sessions: logging in, refreshing a token, logging out.

use ruma::api::{
    client::{
        session::{
            get_login_types::{self, v3::PasswordLoginType},
            login::{self, v3::LoginInfo},
            logout, logout_all, refresh_token,
        },
        uiaa::UserIdentifier,
    },
    error::ErrorKind,
};

use crate::{
    accounts::{
        devices::{Ending, LogIn},
        names,
    },
    api::{
        Routes,
        extract::{Client, Public},
        policy::Guests,
        raw::Raw,
    },
    error::{Refusal, Result},
    flows::{
        App,
        account::{
            log_in::{self, Named},
            log_out::log_out,
        },
        limits::Limit,
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(get_login_types).limit(Limit::Read);
    r.public(login).limit(Limit::Login);
    r.public(refresh_token).limit(Limit::Other);
    r.client(logout).limit(Limit::Other).guests(Guests::Yes).also_locked();
    r.client(logout_all).limit(Limit::Other).also_locked();
}

/// The field that must be there, because ruma's type of a login panics without it.
#[derive(serde::Deserialize)]
struct Typed {
    #[serde(rename = "type")]
    _type: String,
}

/// `GET /_matrix/client/v3/login`
pub(crate) async fn get_login_types(
    _app: App,
    _public: Public<get_login_types::v3::Request>,
) -> Result<get_login_types::v3::Response> {
    let password = get_login_types::v3::LoginType::Password(PasswordLoginType::new());
    Ok(get_login_types::v3::Response::new(vec![password]))
}

/// `POST /_matrix/client/v3/login`
pub(crate) async fn login(app: App, public: Public<Raw<login::v3::Request>>) -> Result<login::v3::Response> {
    public.request.json::<Typed>()?;
    let request = public.request.read()?;
    let LoginInfo::Password(info) = request.login_info else {
        let why = "`type` must be `m.login.password`: this server offers no other login.";
        return Err(Refusal::new(ErrorKind::Unknown, why).into());
    };
    #[expect(deprecated, reason = "clients of before r0.4.0 name the user here")]
    let named = match (&info.identifier, &info.user) {
        (Some(UserIdentifier::Matrix(matrix)), _) => name(&app, matrix.user.clone()),
        // This server knows nobody by an address or a number. Tries are counted by it all the same.
        (Some(other), _) => Named { given: serde_json::to_string(other).unwrap_or_default(), meant: None },
        (None, Some(user)) => name(&app, user.clone()),
        (None, None) => return Err(Refusal::missing_param("`identifier` is missing.").into()),
    };
    let (display_name, ip) = (request.initial_device_display_name, Some(public.peer));
    let device = LogIn { id: request.device_id, display_name, ip };
    let logged_in = log_in::with_password(&app, named, info.password, device, request.refresh_token).await?;
    let session = logged_in.session;
    let mut response =
        login::v3::Response::new(logged_in.user_id, session.tokens.access_token, session.holder.device_id);
    response.refresh_token = session.tokens.refresh_token;
    response.expires_in = session.tokens.expires_in;
    #[expect(deprecated, reason = "some clients still read it")]
    {
        response.home_server = Some(app.accounts.server_name().to_owned());
    }
    Ok(response)
}

fn name(app: &App, given: String) -> Named {
    let meant = names::meant_user_id(&given, app.accounts.server_name());
    Named { given, meant }
}

/// `POST /_matrix/client/v3/refresh`
pub(crate) async fn refresh_token(
    app: App,
    public: Public<refresh_token::v3::Request>,
) -> Result<refresh_token::v3::Response> {
    let issued = log_in::refresh(&app, public.request.refresh_token).await?;
    let mut response = refresh_token::v3::Response::new(issued.access_token);
    response.refresh_token = issued.refresh_token;
    response.expires_in_ms = issued.expires_in;
    Ok(response)
}

/// `POST /_matrix/client/v3/logout`
pub(crate) async fn logout(app: App, client: Client<logout::v3::Request>) -> Result<logout::v3::Response> {
    log_out(&app, &client.caller, Ending::One(client.caller.device)).await?;
    Ok(logout::v3::Response::new())
}

/// `POST /_matrix/client/v3/logout/all`
pub(crate) async fn logout_all(
    app: App,
    client: Client<logout_all::v3::Request>,
) -> Result<logout_all::v3::Response> {
    log_out(&app, &client.caller, Ending::All).await?;
    Ok(logout_all::v3::Response::new())
}
