//! Logging in, and keeping logged in.

use ruma::api::{
    IncomingRequest, Metadata,
    client::{
        session::{
            get_login_types::{self, v3::PasswordLoginType},
            login::{
                self,
                v3::{LoginInfo, Request as LoginRequest},
            },
            refresh_token,
        },
        uiaa::UserIdentifier,
    },
    error::{DeserializationError, ErrorKind},
};

use crate::{
    accounts::{devices::LogIn, names},
    api::{Routes, extract::Public},
    error::{Refusal, Result},
    flows::{
        App,
        account::{confirm, log_in},
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(get_login_types);
    r.public(login);
    r.public(refresh_token);
}

/// `GET /_matrix/client/v3/login`
pub(crate) async fn get_login_types(
    _app: App,
    _public: Public<get_login_types::v3::Request>,
) -> Result<get_login_types::v3::Response> {
    let password = get_login_types::v3::LoginType::Password(PasswordLoginType::new());
    Ok(get_login_types::v3::Response::new(vec![password]))
}

/// The body of `/login`. ruma's own type panics on a body without `type`, so that is looked at first.
pub(crate) struct Login(LoginRequest);

impl Metadata for Login {
    const METHOD: http::Method = LoginRequest::METHOD;
    const RATE_LIMITED: bool = LoginRequest::RATE_LIMITED;
    type Authentication = <LoginRequest as Metadata>::Authentication;
    type PathBuilder = <LoginRequest as Metadata>::PathBuilder;
    const PATH_BUILDER: Self::PathBuilder = LoginRequest::PATH_BUILDER;
}

impl IncomingRequest for Login {
    type EndpointError = <LoginRequest as IncomingRequest>::EndpointError;
    type OutgoingResponse = login::v3::Response;

    fn try_from_http_request_inner(
        request: http::Request<&[u8]>,
        path_args: &[&str],
    ) -> Result<Self, DeserializationError> {
        #[derive(serde::Deserialize)]
        struct Typed {
            #[serde(rename = "type")]
            _type: String,
        }
        serde_json::from_slice::<Typed>(request.body())?;
        LoginRequest::try_from_http_request_inner(request, path_args).map(Self)
    }
}

/// `POST /_matrix/client/v3/login`
pub(crate) async fn login(app: App, public: Public<Login>) -> Result<login::v3::Response> {
    let Login(request) = public.request;
    let LoginInfo::Password(info) = request.login_info else {
        let why = "This server knows no such type of login.";
        return Err(Refusal::new(ErrorKind::Unknown, why).into());
    };
    #[expect(deprecated, reason = "clients of before r0.4.0 name the user here")]
    let meant = match (&info.identifier, &info.user) {
        (Some(identifier @ UserIdentifier::Matrix(_)), _) => confirm::meant_by(&app, identifier),
        (Some(_), _) => None,
        (None, Some(user)) => names::meant_user_id(user, app.accounts.server_name()),
        (None, None) => return Err(Refusal::missing_param("Whose login it is, is missing.").into()),
    };
    let (display_name, ip) = (request.initial_device_display_name, Some(public.peer));
    let device = LogIn { id: request.device_id, display_name, ip };
    let logged_in = log_in::with_password(&app, meant, info.password, device, request.refresh_token).await?;
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
