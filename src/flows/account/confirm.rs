//! User-interactive authentication of one request. The stage that the request brings is checked, and the answer says which
//! stages are still needed.

use std::net::IpAddr;

use ruma::{
    UserId,
    api::{
        client::uiaa::{AuthData, AuthType, UserIdentifier},
        error::ErrorKind,
    },
};
use sha2::{Digest, Sha256};

use crate::{
    accounts::{
        Caller,
        interactive::{Flows, Operation, Passed, Progress},
        names, passwords, registration, users,
    },
    error::{Refusal, Result},
    flows::{App, account::guess},
};

/// The proof that a request was confirmed, with the registration token that was shown for it.
#[derive(Debug)]
pub(crate) struct Confirmed {
    /// The registration token that was shown, if one was.
    pub(crate) registration_token: Option<String>,
    /// The session that was confirmed, if this server had given it to the client before.
    pub(crate) session: Option<String>,
}

/// Names the operation that the request wants done: the endpoint (with what its path names), the caller, and the part of the
/// request that may not change between the first confirmed stage and the last.
pub(crate) fn operation(endpoint: &str, caller: Option<&Caller>, request: &serde_json::Value) -> Operation {
    let name = match caller {
        Some(caller) => format!("{} {} {endpoint}", caller.user_id, caller.device.0),
        None => endpoint.to_owned(),
    };
    let (name, request) = (Sha256::digest(name).into(), Sha256::digest(request.to_string()).into());
    Operation { name, request, user_id: caller.map(|caller| caller.user_id.clone()), parameters: None }
}

/// Confirms a request once all stages of a flow were passed. Errors: 401 with flows and session until then.
pub(crate) async fn confirm(
    app: &App,
    operation: &Operation,
    flows: &Flows,
    caller: Option<&Caller>,
    auth: Option<&AuthData>,
) -> Result<Confirmed> {
    let sessions = app.accounts.sessions();
    let session = auth.and_then(AuthData::session);
    let passed = match auth {
        None | Some(AuthData::FallbackAcknowledgement(_)) => None,
        Some(auth) => match check(app, flows, caller, auth).await? {
            Ok(passed) => Some(passed),
            Err(why) => return Err(sessions.fail(&app.env, operation, flows, session, &why).into()),
        },
    };
    match sessions.advance(&app.env, operation, flows, session, passed)? {
        Progress::Done { registration_token, session } => Ok(Confirmed { registration_token, session }),
        Progress::More(refusal) => Err(refusal.into()),
    }
}

async fn check(
    app: &App,
    flows: &Flows,
    caller: Option<&Caller>,
    auth: &AuthData,
) -> Result<Result<Passed, Refusal>> {
    let Some(stage) = auth.auth_type().filter(|stage| flows.ask_for(stage)) else {
        let why = "`auth.type` is not a stage of any flow of this request.";
        return Ok(Err(Refusal::new(ErrorKind::Unrecognized, why)));
    };
    match auth {
        AuthData::Dummy(_) => Ok(Ok(Passed { stage, registration_token: None })),
        AuthData::Password(password) => {
            let wrong = Refusal::forbidden("The user name or the password is not right.");
            let Some(caller) = caller else { return Ok(Err(wrong)) };
            let meant = meant_by(app, &password.identifier);
            if !meant.is_some_and(|meant| is_name_of(&meant, &caller.user_id)) {
                // The user names another account, so another try would not help and no session is given.
                return Err(Refusal::forbidden(
                    "Only the owner of the account can confirm this; `auth.identifier` names another user.",
                )
                .into());
            }
            let guess = guess::by_session(app, caller)?;
            let hash = passwords::find(&*app.store.snapshot(), caller.user)?;
            let is_right = guess.verify(app, hash, password.password.clone()).await?;
            Ok(if is_right { Ok(Passed { stage, registration_token: None }) } else { Err(wrong) })
        }
        AuthData::RegistrationToken(shown) => {
            let snapshot = app.store.snapshot();
            let valid = registration::is_valid(&*snapshot, &app.accounts, &shown.token, app.env.now_ms())?;
            Ok(if valid {
                Ok(Passed { stage, registration_token: Some(shown.token.clone()) })
            } else {
                Err(Refusal::new(ErrorKind::Unauthorized, "This registration token is not valid."))
            })
        }
        _ => {
            let why = "This server does not know the type of authentication in `auth.type`.";
            Ok(Err(Refusal::new(ErrorKind::Unrecognized, why)))
        }
    }
}

/// Something that a person shows for a stage on its page in the browser.
pub(crate) enum Shown {
    /// Nothing, for a stage that asks for nothing.
    Nothing,
    /// The password of the account whose request it is.
    Password(String),
    /// The registration token that allows a new account.
    Token(String),
}

/// Checks what was shown on a page, and notes that the session has passed the stage. The inner error is for the person to
/// read. Errors: 429 `M_LIMIT_EXCEEDED` after too many wrong passwords.
pub(crate) async fn pass_on_page(
    app: &App,
    session: &str,
    shown: Shown,
    from: IpAddr,
) -> Result<Result<(), Refusal>> {
    let sessions = app.accounts.sessions();
    let passed = match shown {
        Shown::Nothing => Passed { stage: AuthType::Dummy, registration_token: None },
        Shown::Token(token) => {
            let snapshot = app.store.snapshot();
            if !registration::is_valid(&*snapshot, &app.accounts, &token, app.env.now_ms())? {
                return Ok(Err(Refusal::forbidden("This registration token is not valid.")));
            }
            Passed { stage: AuthType::RegistrationToken, registration_token: Some(token) }
        }
        Shown::Password(password) => {
            let Some(user_id) = sessions.user_of(&app.env, session) else {
                return Ok(Err(Refusal::not_found("This session has ended. Begin again in your app.")));
            };
            let user = users::require_num(&*app.store.snapshot(), &user_id)?;
            let guess = guess::by_stranger(app, user_id.as_str(), Some(user), Some(from)).await?;
            let hash = passwords::find(&*app.store.snapshot(), user)?;
            if !guess.verify(app, hash, password).await? {
                return Ok(Err(Refusal::forbidden("The password is not right.")));
            }
            Passed { stage: AuthType::Password, registration_token: None }
        }
    };
    Ok(sessions.pass_on_page(&app.env, session, passed))
}

/// Whether a name that a person wrote means that account. The case of letters makes no difference, as when they log in.
fn is_name_of(meant: &UserId, user_id: &UserId) -> bool {
    meant.localpart() == user_id.localpart() || meant.localpart().to_ascii_lowercase() == user_id.localpart()
}

/// The user of this server that an identifier means, whether they exist or not.
pub(crate) fn meant_by(app: &App, identifier: &UserIdentifier) -> Option<ruma::OwnedUserId> {
    match identifier {
        UserIdentifier::Matrix(matrix) => names::meant_user_id(&matrix.user, app.accounts.server_name()),
        _ => None,
    }
}

/// The flow that asks for the caller's password.
pub(crate) fn password_flow() -> Flows {
    Flows::one(AuthType::Password)
}
