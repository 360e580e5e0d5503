//! Makes an account, and logs it in.

use ruma::{
    OwnedUserId,
    api::{
        client::uiaa::{AuthData, AuthType},
        error::ErrorKind,
    },
};
use serde_json::json;

use crate::{
    accounts::{
        devices::{self, LogIn},
        interactive::Flows,
        names, passwords, profiles, registration,
        tokens::{self, Holder, Issued},
        users::{self, NewUser},
    },
    config::RegistrationMode,
    env::Long,
    error::{Refusal, Result},
    flows::{
        App,
        account::{confirm, log_in},
        write,
    },
    ids::UserNum,
    store::Batch,
};

/// Names that are made for accounts without one are this long.
const MADE_NAME_CHARS: usize = 12;
/// A made name that is taken is made again this often.
const MADE_NAME_TRIES: usize = 10;

/// What somebody who registers asks for.
pub(crate) struct Wish {
    /// The localpart; one is made if there is none.
    pub(crate) username: Option<String>,
    /// The password; without one, nobody can log in again.
    pub(crate) password: Option<String>,
    /// The device to log in, unless only the account is wanted.
    pub(crate) log_in: Option<LogIn>,
    /// Whether the client can refresh tokens.
    pub(crate) refreshable: bool,
}

/// An account that was made.
pub(crate) struct Registered {
    /// Its user id.
    pub(crate) user_id: OwnedUserId,
    /// Its device and tokens, if it was logged in.
    pub(crate) session: Option<Session>,
}

/// A device that was logged in.
pub(crate) struct Session {
    /// The account and device.
    pub(crate) holder: Holder,
    /// Its tokens.
    pub(crate) tokens: Issued,
}

/// `POST /register`: after user-interactive authentication, as the settings ask for it.
/// Errors: 403 where registration is closed, 400 `M_USER_IN_USE`, `M_INVALID_USERNAME`, `M_WEAK_PASSWORD`, 401 to go on.
pub(crate) async fn register(app: &App, wish: Wish, auth: Option<&AuthData>) -> Result<Registered> {
    let flows = flows(app)?;
    if let Some(username) = &wish.username {
        require_free(app, username)?;
    }
    if let Some(password) = &wish.password {
        passwords::check(password)?;
    }
    let operation = confirm::operation("register", None, &json!({ "username": wish.username }));
    let confirmed = confirm::confirm(app, &operation, &flows, None, auth).await?;
    make(app, wish, Made { token: confirmed.registration_token, ..Made::default() }).await
}

/// Makes a guest a user, with the name that it has and a password of its own; its devices and rooms stay.
/// Errors: 400 for another name or none, 401 for a token that is not a guest's, and as [`register`].
pub(crate) async fn upgrade_guest(
    app: &App,
    token: &str,
    wish: Wish,
    auth: Option<&AuthData>,
) -> Result<Registered> {
    let caller = tokens::find_caller(&*app.store.snapshot(), app.env.now_ms(), token)?;
    if !caller.is_guest {
        return Err(Refusal::forbidden("This is not the access token of a guest.").into());
    }
    if wish.username.as_deref() != Some(caller.user_id.localpart()) {
        return Err(Refusal::invalid_param("A guest becomes a user under the name that it has.").into());
    }
    let Some(password) = wish.password else {
        return Err(Refusal::missing_param("A user needs a password.").into());
    };
    passwords::check(&password)?;
    let flows = flows(app)?;
    let operation = confirm::operation("register", Some(&caller), &json!({ "username": wish.username }));
    let confirmed = confirm::confirm(app, &operation, &flows, Some(&caller), auth).await?;
    let house = app.clone();
    let hash = move || passwords::hash(&house.env, &house.config.passwords, &password);
    let hash = app.env.blocking_long(Long::Password, hash).await?;
    let user = caller.user;
    let upgrade = move |app: &App, batch: &mut Batch| {
        if let Some(token) = &confirmed.registration_token {
            registration::spend(batch, &app.accounts, token, app.env.now_ms())?;
        }
        let is_admin = !users::any(batch)?;
        users::make_user(batch, caller.user, is_admin)?;
        passwords::set(batch, caller.user, Some(&hash));
        let session = match wish.log_in {
            Some(log_in) => {
                Some(log_in::build(app, batch, caller.user, &caller.user_id, log_in, wish.refreshable)?)
            }
            None => None,
        };
        Ok(Registered { user_id: caller.user_id, session })
    };
    write::for_user_and_server(app, user, upgrade).await
}

/// The flows of `/register`. While there is no account, the token of the first one is taken in every mode.
fn flows(app: &App) -> Result<Flows> {
    let token = vec![AuthType::RegistrationToken];
    let is_first = app.accounts.first_token().is_some() && !users::any(&*app.store.snapshot())?;
    match app.config.registration.mode {
        RegistrationMode::Open if is_first => Ok(Flows(vec![vec![AuthType::Dummy], token])),
        RegistrationMode::Open => Ok(Flows::one(AuthType::Dummy)),
        RegistrationMode::Token => Ok(Flows(vec![token])),
        RegistrationMode::Closed if is_first => Ok(Flows(vec![token])),
        RegistrationMode::Closed => Err(Refusal::forbidden("Registration is closed on this server.").into()),
    }
}

/// Registers a guest. Errors: 403 `M_GUEST_ACCESS_FORBIDDEN` where the settings allow none.
pub(crate) async fn register_guest(app: &App, log_in: LogIn) -> Result<Registered> {
    if !app.config.registration.guests {
        let refusal = Refusal::new(ErrorKind::GuestAccessForbidden, "This server takes no guests.");
        return Err(refusal.status(http::StatusCode::FORBIDDEN).into());
    }
    let wish = Wish { username: None, password: None, log_in: Some(log_in), refreshable: false };
    make(app, wish, Made { is_guest: true, ..Made::default() }).await
}

/// Registers without asking anything: the operator, or who knows the shared secret.
pub(crate) async fn register_by_operator(app: &App, wish: Wish, is_admin: bool) -> Result<Registered> {
    if let Some(username) = &wish.username {
        require_free(app, username)?;
    }
    if let Some(password) = &wish.password {
        passwords::check(password)?;
    }
    make(app, wish, Made { is_admin, ..Made::default() }).await
}

/// The user id that would be made of this name. Errors: 400 `M_INVALID_USERNAME`, `M_USER_IN_USE`.
pub(crate) fn require_free(app: &App, username: &str) -> Result<OwnedUserId> {
    let user_id = names::new_user_id(username, app.accounts.server_name())?;
    if users::is_free(&*app.store.snapshot(), &user_id)? { Ok(user_id) } else { Err(users::in_use().into()) }
}

/// What an account is made as.
#[derive(Default)]
struct Made {
    token: Option<String>,
    is_admin: bool,
    is_guest: bool,
}

async fn make(app: &App, wish: Wish, made: Made) -> Result<Registered> {
    let hash = match wish.password.clone() {
        Some(password) => {
            let house = app.clone();
            let hash = move || passwords::hash(&house.env, &house.config.passwords, &password);
            Some(app.env.blocking_long(Long::Password, hash).await?)
        }
        None => None,
    };
    let user = app.accounts.next_user(&app.store.view())?;
    write::for_users_and_server(
        app,
        vec![user],
        move |app, batch| build(app, batch, user, wish, &made, hash.as_deref()),
        users::or_in_use,
    )
    .await
}

fn build(
    app: &App,
    batch: &mut Batch,
    user: UserNum,
    wish: Wish,
    made: &Made,
    hash: Option<&str>,
) -> Result<Registered> {
    let user_id = match &wish.username {
        Some(username) => names::new_user_id(username, app.accounts.server_name())?,
        None => made_name(app, batch)?,
    };
    if !users::is_free(batch, &user_id)? {
        return Err(users::in_use().into());
    }
    if let Some(token) = &made.token {
        registration::spend(batch, &app.accounts, token, app.env.now_ms())?;
    }
    // The first account administers the server.
    let is_admin = made.is_admin || (!made.is_guest && !users::any(batch)?);
    let new =
        NewUser { user_id: user_id.clone(), is_admin, is_guest: made.is_guest, now_ms: app.env.now_ms() };
    users::create(batch, user, &new);
    if hash.is_some() {
        passwords::set(batch, user, hash);
    }
    if wish.username.is_some() {
        // A name that people can read, until they choose one.
        profiles::set(batch, user, "displayname", user_id.localpart().into())?;
    }
    let session = match wish.log_in {
        Some(log_in) => {
            let (device, _) = devices::log_in(batch, &app.env, user, log_in)?;
            let holder = Holder { user, device: device.num, device_id: device.id };
            let tokens = tokens::issue(batch, &app.env, &holder, wish.refreshable);
            Some(Session { holder, tokens })
        }
        None => None,
    };
    Ok(Registered { user_id, session })
}

fn made_name(app: &App, batch: &Batch) -> Result<OwnedUserId> {
    for _ in 0..MADE_NAME_TRIES {
        let localpart = app.env.random_string(MADE_NAME_CHARS).to_ascii_lowercase();
        let user_id = names::new_user_id(&localpart, app.accounts.server_name())?;
        if users::is_free(batch, &user_id)? {
            return Ok(user_id);
        }
    }
    Err(users::in_use().into())
}
