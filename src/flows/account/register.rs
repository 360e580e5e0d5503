//! Makes an account, and logs it in.

use ruma::{
    OwnedDeviceId, OwnedUserId,
    api::{
        client::uiaa::{AuthData, AuthType},
        error::ErrorKind,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    accounts::{
        devices::{DISPLAY_NAME_CHARS_MAX, LogIn},
        interactive::{Flows, Operation},
        names, passwords, profiles,
        registration::{self, Spent},
        tokens::{self, Holder},
        users::{self, NewUser},
    },
    config::RegistrationMode,
    encryption::device_lists,
    error::{Error, Refusal, Result},
    flows::{
        App,
        account::{
            confirm,
            log_in::{self, LoggedIn, Named, Session},
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

/// The fields of a wish that a session of authentication remembers, because some clients send them with their first request only.
#[derive(Serialize, Deserialize)]
struct Fields {
    username: Option<String>,
    password: Option<String>,
    device_id: Option<OwnedDeviceId>,
    device_name: Option<String>,
    logs_in: bool,
    refreshable: bool,
}

impl Wish {
    fn fields(&self) -> Fields {
        let log_in = self.log_in.as_ref();
        let device_name = log_in.and_then(|log_in| log_in.display_name.as_ref());
        Fields {
            username: self.username.clone(),
            password: self.password.clone(),
            device_id: log_in.and_then(|log_in| log_in.id.clone()),
            device_name: device_name.map(|name| name.chars().take(DISPLAY_NAME_CHARS_MAX).collect()),
            logs_in: log_in.is_some(),
            refreshable: self.refreshable,
        }
    }

    /// Whether the request asked for nothing but an account.
    fn is_bare(&self) -> bool {
        let Self { username, password, log_in, refreshable } = self;
        let is_plain = |log_in: &LogIn| log_in.id.is_none() && log_in.display_name.is_none();
        username.is_none() && password.is_none() && !refreshable && log_in.as_ref().is_some_and(is_plain)
    }

    /// The wish that has these fields, from the address that this one came from.
    fn with(self, fields: Fields) -> Self {
        let Fields { username, password, device_id: id, device_name: display_name, .. } = fields;
        let ip = self.log_in.and_then(|log_in| log_in.ip);
        let log_in = fields.logs_in.then_some(LogIn { id, display_name, ip });
        Self { username, password, log_in, refreshable: fields.refreshable }
    }

    /// A digest of everything but the password, which only its hash confirms.
    fn digest(&self) -> Result<[u8; 32]> {
        let fields = Fields { password: None, ..self.fields() };
        Ok(Sha256::digest(to_json(&fields)?).into())
    }
}

fn to_json(fields: &Fields) -> Result<Vec<u8>> {
    serde_json::to_vec(fields).map_err(|_| Error::broken("the fields of a registration are JSON"))
}

/// The name of the operation of [`register`].
const REGISTER: &str = "register";

/// An account that was made.
pub(crate) struct Registered {
    /// The user id of the new account.
    pub(crate) user_id: OwnedUserId,
    /// Whether it became an admin of the server by this request.
    pub(crate) is_admin: bool,
    /// The device and its tokens, if one was logged in.
    pub(crate) session: Option<Session>,
}

/// `POST /register`: makes an account after the user-interactive authentication that the settings ask for.
///
/// The specification has clients send the whole request again with each stage. Element Android, for one, sends the fields with
/// its first request and then only `auth`, so that the session remembers them. A client that lost the answer and sends its last
/// request again is logged in to the account that was made.
///
/// Errors: 403 where registration is closed, 400 `M_USER_IN_USE`, `M_INVALID_USERNAME`, `M_WEAK_PASSWORD`, 401 to go on.
pub(crate) async fn register(app: &App, wish: Wish, auth: Option<&AuthData>) -> Result<Registered> {
    let flows = flows(app)?;
    let session = auth.and_then(AuthData::session);
    let (wish, auth) = match session {
        Some(session) if wish.is_bare() => recall(app, wish, session, auth)?,
        _ => (wish, auth),
    };
    let asked = wish.digest()?;
    if let Some(session) = session
        && let Some(password) = wish.password.clone()
        && let Some(user_id) = app.accounts.sessions().find_made(&app.env, session, asked)
    {
        return log_in_again(app, user_id, password, wish).await;
    }
    let has_password = wish.password.is_some();
    if let Some(username) = &wish.username {
        require_free(app, username)?;
    }
    if let Some(password) = &wish.password {
        passwords::check(password)?;
    }
    let operation = Operation {
        parameters: Some(to_json(&wish.fields())?.into()),
        ..confirm::operation(REGISTER, None, &json!({ "username": wish.username }))
    };
    let confirmed = confirm::confirm(app, &operation, &flows, None, auth).await?;
    let made = make(app, wish, Role::Registers { token: confirmed.registration_token }).await?;
    if let Some(session) = confirmed.session.filter(|_| has_password) {
        app.accounts.sessions().note_made(&app.env, session, asked, made.user_id.clone());
    }
    Ok(made)
}

/// The wish that was sent before in a session, for a request that brings only `auth`. Where none is remembered, as after a
/// restart, the request counts as one without `auth`, so that no account is made that nobody wished for.
fn recall<'a>(
    app: &App,
    wish: Wish,
    session: &str,
    auth: Option<&'a AuthData>,
) -> Result<(Wish, Option<&'a AuthData>)> {
    let name = confirm::operation(REGISTER, None, &json!({})).name;
    let Some(json) = app.accounts.sessions().parameters_of(&app.env, session, name) else {
        return Ok((wish, None));
    };
    let fields = serde_json::from_slice(&json).map_err(|_| Error::broken("a session remembers JSON"))?;
    Ok((wish.with(fields), auth))
}

/// Logs in to an account that the same request made before, with the password that it chose then.
async fn log_in_again(app: &App, user_id: OwnedUserId, password: String, wish: Wish) -> Result<Registered> {
    let Some(log_in) = wish.log_in else { return Ok(Registered { user_id, is_admin: false, session: None }) };
    let named = Named { given: user_id.to_string(), meant: Some(user_id) };
    let LoggedIn { user_id, session } =
        log_in::with_password(app, named, password, log_in, wish.refreshable).await?;
    Ok(Registered { user_id, is_admin: false, session: Some(session) })
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
    let operation = confirm::operation(REGISTER, Some(&caller), &json!({ "username": wish.username }));
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
            let (device, _) = log_in::make_device(app, batch, user, log_in)?;
            // Other servers are told of the device when the user comes into a room that they are in.
            device_lists::changed(batch, user, &user_id, std::slice::from_ref(&device.id))?;
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
