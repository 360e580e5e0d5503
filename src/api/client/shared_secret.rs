//! Registration with the shared secret of the server, as common tools do it.
//!
//! The specification does not have this endpoint: `GET` gives a nonce, and `POST` sends it back with an HMAC over the
//! account that is wanted.

use http::Method;
use serde::Deserialize;
use serde_json::json;

use crate::{
    accounts::{
        devices::LogIn,
        registration::{Claim, check_claim},
    },
    api::{
        Routes,
        extract::{Endpoint, Public},
        raw::Raw,
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{
        App,
        account::register::{Wish, register_by_operator},
        limits::Limit,
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(nonce).limit(Limit::Register);
    // Each request is a guess at the secret, so that it is limited as a registration.
    r.public(register).limit(Limit::Register);
}

/// The one path of both endpoints, which Synapse has given it.
const PATH: &str = "/_synapse/admin/v1/register";

/// The endpoint that gives the nonce of one registration.
pub(crate) struct Nonce;

impl Endpoint for Nonce {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec![PATH]
    }
}

/// The endpoint that registers an account with a nonce.
pub(crate) struct Register;

impl Endpoint for Register {
    fn method() -> Method {
        Method::POST
    }

    fn paths() -> Vec<&'static str> {
        vec![PATH]
    }
}

/// The body of a registration with the shared secret.
#[derive(Deserialize)]
struct Registration {
    nonce: String,
    username: String,
    password: String,
    #[serde(default)]
    admin: bool,
    user_type: Option<String>,
    mac: String,
    #[serde(default)]
    inhibit_login: bool,
}

fn require_secret(app: &App) -> Result<&str> {
    let secret = app.config.registration.shared_secret.as_str();
    if secret.is_empty() {
        Err(Refusal::unrecognized("There is no such endpoint.").into())
    } else {
        Ok(secret)
    }
}

/// `GET /_synapse/admin/v1/register`
pub(crate) async fn nonce(app: App, _public: Public<Raw<Nonce>>) -> Result<RawJson> {
    require_secret(&app)?;
    Ok(RawJson(json!({ "nonce": app.accounts.nonces().make(&app.env) }).to_string().into()))
}

/// `POST /_synapse/admin/v1/register`
pub(crate) async fn register(app: App, public: Public<Raw<Register>>) -> Result<RawJson> {
    let secret = require_secret(&app)?;
    let request: Registration = public.request.json()?;
    if !app.accounts.nonces().spend(&request.nonce, app.env.now_ms()) {
        return Err(Refusal::invalid_param(
            "`nonce` is not known, was used before or has expired: ask for a new one.",
        )
        .into());
    }
    let claim = Claim {
        nonce: &request.nonce,
        username: &request.username,
        password: &request.password,
        is_admin: request.admin,
        user_type: request.user_type.as_deref(),
    };
    check_claim(secret, &claim, &request.mac)?;
    let wish = Wish {
        username: Some(request.username),
        password: Some(request.password),
        log_in: (!request.inhibit_login).then(|| LogIn { ip: Some(public.peer), ..LogIn::default() }),
        refreshable: false,
    };
    let registered = register_by_operator(&app, wish, Some(request.admin)).await?;
    let mut answer = json!({ "user_id": registered.user_id, "home_server": app.accounts.server_name() });
    if let (Some(session), Some(fields)) = (registered.session, answer.as_object_mut()) {
        fields.insert("access_token".to_owned(), session.tokens.access_token.into());
        fields.insert("device_id".to_owned(), session.holder.device_id.as_str().into());
    }
    Ok(RawJson(answer.to_string().into()))
}
