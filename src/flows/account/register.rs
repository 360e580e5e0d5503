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
        names, passwords, profiles,
        registration::{self, Spent},
        tokens::{self, Holder},
        users::{self, NewUser},
    },
    config::RegistrationMode,
    error::{Refusal, Result},
    flows::{
        App,
        account::{
            confirm,
            log_in::{self, Session},
            password,
        },
        write,
    },
    ids::UserNum,
    store::Batch,
};

/// A name that is made for an account without one has this many characters.
const MADE_NAME_CHARS: usize = 12;
/// A name is made at most this often until one is free.
const MADE_NAME_TRIES: usize = 10;

/// The account and device that a registration asks for.
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
    /// The user id of the new account.
    pub(crate) user_id: OwnedUserId,
    /// Whether it administers the server.
    pub(crate) is_admin: bool,
    /// The device and its tokens, if one was logged in.
    pub(crate) session: Option<Session>,
}

/// `POST /register`: makes an account after the user-interactive authentication that the settings ask for.
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
    make(app, wish, Role::Registers { token: confirmed.registration_token }).await
}

/// Turns a guest into a full account with the name that it has and a password; its devices and rooms stay. If several requests
/// do so at once, one of them succeeds.
/// Errors: 400 for another name or none, 403 for an account that is not a guest, and those of [`register`].
pub(crate) async fn upgrade_guest(
    app: &App,
    token: &str,
    wish: Wish,
    auth: Option<&AuthData>,
) -> Result<Registered> {
    let caller = tokens::find_caller(&*app.store.snapshot(), app.env.now_ms(), token)?;
    let no_guest = || Refusal::forbidden("This is not the access token of a guest.");
    if !caller.is_guest {
        return Err(no_guest().into());
    }
    if wish.username.as_deref() != Some(caller.user_id.localpart()) {
        return Err(Refusal::invalid_param("`username` must be the guest's own name, which it keeps.").into());
    }
    let Some(password) = wish.password else {
        return Err(Refusal::missing_param("`password` is missing.").into());
    };
    passwords::check(&password)?;
    let flows = flows(app)?;
    let operation = confirm::operation("register", Some(&caller), &json!({ "username": wish.username }));
    let confirmed = confirm::confirm(app, &operation, &flows, Some(&caller), auth).await?;
    let hash = password::hash(app, password).await?;
    let acting = caller.clone();
    let upgrade = move |app: &App, batch: &mut Batch| {
        // Another request may have come first, or the account may have ended, while the password was hashed.
        let row = users::require(batch, caller.user)?;
        if !row.is_guest || row.is_deactivated {
            return Err(no_guest().into());
        }
        let is_admin = spend(app, batch, confirmed.registration_token.as_deref())? == Spent::FirstAdmin;
        users::make_user(batch, caller.user, is_admin)?;
        passwords::set(batch, caller.user, Some(&hash));
        let session = match wish.log_in {
            Some(log_in) => {
                Some(log_in::build(app, batch, caller.user, &caller.user_id, log_in, wish.refreshable)?)
            }
            None => None,
        };
        Ok(Registered { user_id: caller.user_id, is_admin, session })
    };
    write::for_caller_and_users_and_server(app, &acting, Vec::new(), upgrade).await
}

/// Spends the registration token that was shown, if one was.
fn spend(app: &App, batch: &mut Batch, token: Option<&str>) -> Result<Spent> {
    match token {
        Some(token) => registration::spend(batch, &app.accounts, token, app.env.now_ms()),
        None => Ok(Spent::User),
    }
}

/// The flows of `/register`. While there is no account, the token for the first one is accepted in every mode.
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

/// Registers a guest. Errors: 403 `M_GUEST_ACCESS_FORBIDDEN` if the settings allow no guests.
pub(crate) async fn register_guest(app: &App, log_in: LogIn) -> Result<Registered> {
    if !app.config.registration.guests {
        let refusal = Refusal::new(ErrorKind::GuestAccessForbidden, "This server takes no guests.");
        return Err(refusal.into());
    }
    let wish = Wish { username: None, password: None, log_in: Some(log_in), refreshable: false };
    make(app, wish, Role::Guest).await
}

/// Registers without further authentication, for the operator or a client that knows the shared secret. If `is_admin` is none,
/// the account becomes an admin if it is the first one.
pub(crate) async fn register_by_operator(
    app: &App,
    wish: Wish,
    is_admin: Option<bool>,
) -> Result<Registered> {
    if let Some(username) = &wish.username {
        require_free(app, username)?;
    }
    if let Some(password) = &wish.password {
        passwords::check(password)?;
    }
    let role =
        is_admin.map_or(Role::AdminIfFirst, |is_admin| if is_admin { Role::Admin } else { Role::User });
    make(app, wish, role).await
}

/// The user id that an account with this name would have. Errors: 400 `M_INVALID_USERNAME`, `M_USER_IN_USE`.
pub(crate) fn require_free(app: &App, username: &str) -> Result<OwnedUserId> {
    let user_id = names::new_user_id(username, app.accounts.server_name())?;
    if users::is_free(&*app.store.snapshot(), &user_id)? { Ok(user_id) } else { Err(users::in_use().into()) }
}

/// The role in which an account is made, which decides its rights.
enum Role {
    /// The rights follow from the registration token that was shown, if any: nobody becomes an admin just by coming first.
    Registers { token: Option<String> },
    /// A guest, without a password or a chosen name.
    Guest,
    /// A user who does not administer the server.
    User,
    /// A user who administers the server.
    Admin,
    /// A user who administers the server if there is no other account.
    AdminIfFirst,
}

async fn make(app: &App, wish: Wish, role: Role) -> Result<Registered> {
    let hash = match wish.password.clone() {
        Some(password) => Some(password::hash(app, password).await?),
        None => None,
    };
    let user = app.accounts.next_user(&app.store.view())?;
    write::for_user_and_server(
        app,
        user,
        move |app, batch| build(app, batch, user, wish, &role, hash.as_deref()),
        users::or_in_use,
    )
    .await
}

fn build(
    app: &App,
    batch: &mut Batch,
    user: UserNum,
    wish: Wish,
    role: &Role,
    hash: Option<&str>,
) -> Result<Registered> {
    let user_id = match &wish.username {
        Some(username) => names::new_user_id(username, app.accounts.server_name())?,
        None => made_name(app, batch)?,
    };
    if !users::is_free(batch, &user_id)? {
        return Err(users::in_use().into());
    }
    let is_admin = match role {
        Role::Registers { token } => spend(app, batch, token.as_deref())? == Spent::FirstAdmin,
        Role::Guest | Role::User => false,
        Role::Admin => true,
        Role::AdminIfFirst => !users::any(batch)?,
    };
    let is_guest = matches!(role, Role::Guest);
    let new = NewUser { user_id: user_id.clone(), is_admin, is_guest, now_ms: app.env.now_ms() };
    users::create(batch, user, &new);
    if hash.is_some() {
        passwords::set(batch, user, hash);
    }
    if wish.username.is_some() {
        // The localpart is a name that people can read, until the user chooses one.
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
    Ok(Registered { user_id, is_admin, session })
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
