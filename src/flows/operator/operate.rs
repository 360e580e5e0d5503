//! The operator's commands for accounts, backups and checks, and the way to all others. The command line calls them, in its own
//! process or over the operator's socket. Their results are typed, and the command line finds the words for people.

use std::{collections::BTreeMap, path::PathBuf};

use ruma::{OwnedDeviceId, OwnedUserId};
use serde::{Deserialize, Serialize};

use crate::{
    accounts::{
        devices::{self, Ending},
        names, users,
    },
    env::Long,
    error::{Refusal, Result},
    flows::{
        App,
        account::{
            change_password, deactivate, log_out,
            register::{self, Wish},
        },
        jobs,
        operator::{
            accounts::{DevicesOf, Standing, list_devices, require_live, require_user, set_standing},
            check,
            emails::{self, EmailCommand, EmailsOf},
            explain::{self, Explanation},
            federation::{self, CheckedServer, Retried, Statuses},
            media::{self, MediaCommand, MediaOutcome},
            reports::{self, Dismissed, Reported},
            signing_keys::{self, MadeKey},
            tokens::{TokenEntry, create_token, list_tokens, revoke_token},
        },
        searching::SearchStatus,
        write,
    },
    store::backup::{self, Manifest, Progress},
};

/// A password that is made here has this many characters.
const MADE_CHARS: usize = 24;

/// A command of the operator, as the command line sends it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum Command {
    /// Makes an account with a password.
    CreateUser {
        /// Localpart or user id.
        name: String,
        /// The password; one is made if there is none.
        password: Option<String>,
        /// Whether the account administers the server. If this is none, the first account does.
        admin: Option<bool>,
    },
    /// Lists all accounts, the oldest first.
    ListUsers,
    /// Makes an account an admin of this server, or takes that from it.
    SetAdmin {
        /// Localpart or user id.
        name: String,
        /// Whether it administers the server.
        admin: bool,
    },
    /// Sets a password and ends all sessions.
    ResetPassword {
        /// Localpart or user id.
        name: String,
        /// The password; one is made if there is none.
        password: Option<String>,
    },
    /// Ends an account for good.
    DeactivateUser {
        /// Localpart or user id.
        name: String,
        /// Whether the account is to be erased, so that its events are shown redacted.
        erase: bool,
    },
    /// Locks or suspends an account, or ends that.
    SetStanding {
        /// Localpart or user id.
        name: String,
        /// Whether it is locked; as before, if none.
        locked: Option<bool>,
        /// Whether it is suspended; as before, if none.
        suspended: Option<bool>,
    },
    /// Lists what users have reported.
    ListReports,
    /// Deletes a report that was dealt with.
    DismissReport {
        /// Localpart or user id of the user who made it.
        by: String,
        /// The name of the thing that was reported, as the list gives it.
        about: String,
    },
    /// Lists the devices of an account.
    ListDevices {
        /// Localpart or user id.
        name: String,
    },
    /// Ends sessions of an account.
    LogOut {
        /// Localpart or user id.
        name: String,
        /// The device whose session ends; all end if there is none.
        device: Option<OwnedDeviceId>,
    },
    /// Makes a registration token.
    CreateToken {
        /// The token; one is made if there is none.
        token: Option<String>,
        /// How many accounts may be made with it; any number, if none.
        uses_max: Option<u64>,
        /// The number of seconds after which the token ends; it never does if this is none.
        expires_in_s: Option<u64>,
    },
    /// Lists all registration tokens.
    ListTokens,
    /// Ends a registration token.
    RevokeToken {
        /// The text of the token.
        token: String,
    },
    /// Takes a backup of the store while the server goes on.
    BackUp {
        /// An empty or absent directory, as an absolute path.
        to: PathBuf,
    },
    /// Says where an event stands, and whether and why a user sees it.
    Explain {
        /// The id of the event.
        event: String,
        /// Localpart or user id.
        user: Option<String>,
    },
    /// Reads every row of the store and reports those that are wrong.
    Check,
    /// Lists the other servers that do not answer, or for which something waits.
    ListServers,
    /// Tries to reach another server again now.
    RetryServer {
        /// The name of the server.
        server: String,
    },
    /// Finds a server as others do, and says what they see of it.
    CheckServer {
        /// The name of the server.
        server: String,
    },
    /// Makes a signing key that signs from the next start on.
    MakeKey,
    /// Builds the index of search anew, beside whatever else the server does.
    RebuildSearch,
    /// Says how far the index of search has come.
    SearchStatus,
    /// Looks at media, or deals with it.
    Media(MediaCommand),
    /// Lists the e-mail addresses of an account, or changes them.
    Email(EmailCommand),
}

impl Command {
    /// Whether the command has to do with other servers, so that they are told what waits for them while it runs.
    pub fn is_about_servers(&self) -> bool {
        match self {
            Self::ListServers | Self::CheckServer { .. } => true,
            Self::CreateUser { .. }
            | Self::ListUsers
            | Self::SetAdmin { .. }
            | Self::ResetPassword { .. }
            | Self::DeactivateUser { .. }
            | Self::SetStanding { .. }
            | Self::ListReports
            | Self::DismissReport { .. }
            | Self::ListDevices { .. }
            | Self::LogOut { .. }
            | Self::CreateToken { .. }
            | Self::ListTokens
            | Self::RevokeToken { .. }
            | Self::BackUp { .. }
            | Self::Explain { .. }
            | Self::RetryServer { .. }
            | Self::MakeKey
            | Self::RebuildSearch
            | Self::SearchStatus
            | Self::Media(_)
            | Self::Email(_)
            | Self::Check => false,
        }
    }

    /// Whether the command has to do with search, so that the index is opened for it.
    pub fn is_about_search(&self) -> bool {
        matches!(self, Self::RebuildSearch | Self::SearchStatus)
    }
}

/// The result of a command that was carried out.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// An account was made.
    UserCreated(CreatedUser),
    /// The accounts, oldest first.
    Users(Vec<UserEntry>),
    /// An account administers the server now, or no longer does.
    AdminSet(AdminSet),
    /// A password was set, and all sessions ended.
    PasswordSet(PasswordSet),
    /// An account was ended for good.
    UserDeactivated(DeactivatedUser),
    /// An account was locked, suspended, or neither any more.
    StandingSet(Standing),
    /// The reports that users have made, the newest first.
    Reports(Vec<Reported>),
    /// A report was deleted.
    ReportDismissed(Dismissed),
    /// The devices of an account.
    Devices(DevicesOf),
    /// Sessions of an account were ended.
    LoggedOut(LoggedOut),
    /// A registration token was made.
    TokenCreated(TokenEntry),
    /// The registration tokens, by their text.
    Tokens(Vec<TokenEntry>),
    /// A registration token was ended.
    TokenRevoked(TokenEntry),
    /// A backup was taken.
    BackedUp(Manifest),
    /// A backup was put in place of the store.
    Restored(RestoredStore),
    /// An event was explained.
    Explained(Box<Explanation>),
    /// Every row of the store was checked.
    Checked(CheckedStore),
    /// The other servers that do not answer, or for which something waits.
    Servers(Statuses),
    /// Another server is tried again.
    ServerRetried(Retried),
    /// A server was looked at from outside.
    ServerChecked(Box<CheckedServer>),
    /// A signing key was made.
    KeyMade(MadeKey),
    /// The index of search is built anew from now on.
    SearchBegun(SearchStatus),
    /// How far the index of search has come.
    SearchIs(SearchStatus),
    /// Media was looked at, or dealt with.
    Media(MediaOutcome),
    /// The e-mail addresses of an account.
    Emails(EmailsOf),
}

impl Outcome {
    /// Whether all is well. It is not if a check has found faults, though the command itself succeeded.
    pub fn is_good(&self) -> bool {
        match self {
            Self::Checked(report) => report.faults == 0,
            Self::ServerChecked(report) => report.faults.is_empty(),
            Self::UserCreated(_)
            | Self::Users(_)
            | Self::AdminSet(_)
            | Self::PasswordSet(_)
            | Self::UserDeactivated(_)
            | Self::StandingSet(_)
            | Self::Reports(_)
            | Self::ReportDismissed(_)
            | Self::Devices(_)
            | Self::LoggedOut(_)
            | Self::TokenCreated(_)
            | Self::Tokens(_)
            | Self::TokenRevoked(_)
            | Self::BackedUp(_)
            | Self::Explained(_)
            | Self::Servers(_)
            | Self::ServerRetried(_)
            | Self::KeyMade(_)
            | Self::SearchBegun(_)
            | Self::SearchIs(_)
            | Self::Media(_)
            | Self::Emails(_)
            | Self::Restored(_) => true,
        }
    }
}

/// An account that was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreatedUser {
    /// The user id of the new account.
    pub user_id: OwnedUserId,
    /// Whether it administers the server.
    pub admin: bool,
    /// The password, if it was made here.
    pub password: Option<String>,
}

/// An account in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UserEntry {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// When it was registered, in milliseconds since the epoch.
    pub created_ms: u64,
    /// Whether it administers the server.
    pub admin: bool,
    /// Whether it is a guest.
    pub guest: bool,
    /// Whether it has ended.
    pub deactivated: bool,
    /// Whether it is locked.
    #[serde(default)]
    pub locked: bool,
    /// Whether it is suspended.
    #[serde(default)]
    pub suspended: bool,
}

/// Whether an account administers the server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AdminSet {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// Whether the account administers the server now.
    pub admin: bool,
}

/// A password that was set.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PasswordSet {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// The password, if it was made here.
    pub password: Option<String>,
}

/// An account that ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeactivatedUser {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// Whether the account was erased, so that its events are shown redacted.
    pub erased: bool,
}

/// The number of sessions of an account that were ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoggedOut {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// The number of devices that were logged out.
    pub devices: usize,
}

/// A store that was restored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RestoredStore {
    /// The last position that the restored store has.
    pub position: u64,
    /// The incarnation of the store that began with the restore.
    pub incarnation: u16,
    /// The path to which the earlier store was moved; none if there was none.
    pub replaced: Option<PathBuf>,
}

/// A store that was read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckedStore {
    /// The number of rows of each table, by the table's name.
    pub rows: BTreeMap<String, u64>,
    /// The number of faults that were found.
    pub faults: u64,
    /// The first faults, one line each.
    pub findings: Vec<String>,
    /// The number of rows that could not be judged, because that took too long beside a running server.
    pub unjudged: u64,
}

/// Carries out a command. `progress` is called while a long command runs, and must return quickly.
pub async fn operate(
    app: &App,
    command: Command,
    progress: impl FnMut(Progress) + Send + 'static,
) -> Result<Outcome> {
    Ok(match command {
        Command::CreateUser { name, password, admin } => {
            Outcome::UserCreated(create_user(app, &name, password, admin).await?)
        }
        Command::ListUsers => Outcome::Users(list_users(app).await?),
        Command::SetAdmin { name, admin } => Outcome::AdminSet(set_admin(app, &name, admin).await?),
        Command::ResetPassword { name, password } => {
            Outcome::PasswordSet(reset_password(app, &name, password).await?)
        }
        Command::DeactivateUser { name, erase } => {
            Outcome::UserDeactivated(deactivate(app, &name, erase).await?)
        }
        Command::SetStanding { name, locked, suspended } => {
            Outcome::StandingSet(set_standing(app, &name, locked, suspended).await?)
        }
        Command::ListReports => Outcome::Reports(reports::list(app).await?),
        Command::DismissReport { by, about } => {
            Outcome::ReportDismissed(reports::dismiss(app, &by, &about).await?)
        }
        Command::ListDevices { name } => Outcome::Devices(list_devices(app, &name).await?),
        Command::LogOut { name, device } => Outcome::LoggedOut(log_out(app, &name, device).await?),
        Command::CreateToken { token, uses_max, expires_in_s } => {
            Outcome::TokenCreated(create_token(app, token, uses_max, expires_in_s).await?)
        }
        Command::ListTokens => Outcome::Tokens(list_tokens(app)?),
        Command::RevokeToken { token } => Outcome::TokenRevoked(revoke_token(app, token).await?),
        Command::BackUp { to } => Outcome::BackedUp(back_up(app, to, progress).await?),
        Command::Explain { event, user } => {
            Outcome::Explained(Box::new(explain::of_event(app, &event, user).await?))
        }
        Command::Check => Outcome::Checked(check_store(app, progress).await?),
        Command::ListServers => Outcome::Servers(federation::list(app).await?),
        Command::MakeKey => Outcome::KeyMade(signing_keys::make(app).await?),
        Command::RebuildSearch => {
            app.searching.begin_anew().await?;
            Outcome::SearchBegun(app.searching.progress(&app.store)?)
        }
        Command::SearchStatus => Outcome::SearchIs(app.searching.progress(&app.store)?),
        Command::Media(command) => Outcome::Media(media::operate(app, command, progress).await?),
        Command::Email(command) => Outcome::Emails(emails::operate(app, command).await?),
        Command::RetryServer { server } => Outcome::ServerRetried(federation::retry(app, &server)?),
        Command::CheckServer { server } => {
            Outcome::ServerChecked(Box::new(federation::check(app, &server).await?))
        }
    })
}

/// The password to use, and the same again if it was made here, so that the operator is told it.
fn password_or_made(app: &App, password: Option<String>) -> (String, Option<String>) {
    match password {
        Some(password) => (password, None),
        None => {
            let made = app.env.random_string(MADE_CHARS);
            (made.clone(), Some(made))
        }
    }
}

/// Makes an account. Errors: 400 `M_USER_IN_USE`, `M_INVALID_USERNAME`, `M_WEAK_PASSWORD`.
pub async fn create_user(
    app: &App,
    name: &str,
    password: Option<String>,
    admin: Option<bool>,
) -> Result<CreatedUser> {
    let (password, made) = password_or_made(app, password);
    let username = names::localpart_of(name, app.accounts.server_name())?.to_owned();
    let wish = Wish { username: Some(username), password: Some(password), log_in: None, refreshable: false };
    let registered = register::register_by_operator(app, wish, admin).await?;
    Ok(CreatedUser { user_id: registered.user_id, admin: registered.is_admin, password: made })
}

/// Lists all accounts, the oldest first.
pub async fn list_users(app: &App) -> Result<Vec<UserEntry>> {
    let snapshot = app.store.snapshot();
    let list = move || {
        let mut entries = Vec::new();
        for row in users::list(&*snapshot)? {
            let (_, row) = row?;
            entries.push(UserEntry {
                user_id: row.user_id,
                created_ms: row.created_ms,
                admin: row.is_admin,
                guest: row.is_guest,
                deactivated: row.is_deactivated,
                locked: row.is_locked,
                suspended: row.is_suspended,
            });
        }
        Ok(entries)
    };
    app.env.blocking(list).await
}

/// Makes an account an admin of this server, or takes that from it. Errors: 400 for a guest or an account that has ended.
pub async fn set_admin(app: &App, name: &str, admin: bool) -> Result<AdminSet> {
    let (user, user_id) = require_live(app, name)?;
    write::for_user(app, user, move |_, batch| {
        let row = users::require(batch, user)?;
        if admin && (row.is_guest || row.is_deactivated) {
            return Err(Refusal::invalid_param("Guests and ended accounts cannot be admins.").into());
        }
        users::set_admin(batch, user, admin)
    })
    .await?;
    Ok(AdminSet { user_id, admin })
}

/// Sets a password and ends all sessions. Errors: 400 for a weak password or an account that has ended, 404 for no account.
pub async fn reset_password(app: &App, name: &str, password: Option<String>) -> Result<PasswordSet> {
    let (user, user_id) = require_live(app, name)?;
    let (password, made) = password_or_made(app, password);
    change_password::reset_password(app, user, user_id.clone(), password).await?;
    Ok(PasswordSet { user_id, password: made })
}

/// Ends an account for good. One that has ended can still be erased. Errors: 400 for an account that has ended already, 404 for one that
/// does not exist.
pub async fn deactivate(app: &App, name: &str, erase: bool) -> Result<DeactivatedUser> {
    let (user, user_id) = if erase { require_user(app, name)? } else { require_live(app, name)? };
    deactivate::deactivate(app, user, user_id.clone(), erase).await?;
    Ok(DeactivatedUser { user_id, erased: erase })
}

/// Ends one session of an account, or all. Errors: 404 for a device that does not exist.
pub async fn log_out(app: &App, name: &str, device: Option<OwnedDeviceId>) -> Result<LoggedOut> {
    let (user, user_id) = require_user(app, name)?;
    let whose = user_id.clone();
    let (devices, promised) = write::for_user(app, user, move |app, batch| {
        let (count, ending) = match &device {
            Some(id) => {
                let no_device = || Refusal::not_found(format!("{whose} has no device {id}."));
                let device = devices::find(batch, user, id)?.ok_or_else(no_device)?;
                (1, Ending::One(device.num))
            }
            None => (devices::list(batch, user)?.len(), Ending::All),
        };
        Ok((count, log_out::end(app, batch, user, &whose, &ending)?))
    })
    .await?;
    jobs::begin(app, promised);
    Ok(LoggedOut { user_id, devices })
}

async fn back_up(
    app: &App,
    to: PathBuf,
    mut progress: impl FnMut(Progress) + Send + 'static,
) -> Result<Manifest> {
    let owned = app.clone();
    let work = move || {
        let name = owned.config.server.name.as_str();
        backup::back_up(&owned.store, &to, name, owned.env.now_ms(), true, &mut progress)
            .map_err(|why| Refusal::invalid_param(format!("No backup was taken: {why}.")).into())
    };
    app.env.blocking_long(Long::Maintenance, work).await
}

async fn check_store(app: &App, mut progress: impl FnMut(Progress) + Send + 'static) -> Result<CheckedStore> {
    let store = app.store.clone();
    let report =
        app.env.blocking_long(Long::Maintenance, move || Ok(check::check(&store, &mut progress)?)).await?;
    let rows = report.rows.into_iter().map(|(table, rows)| (table.to_owned(), rows)).collect();
    let (faults, findings, unjudged) = (report.faults, report.findings, report.unjudged);
    Ok(CheckedStore { rows, faults, findings, unjudged })
}
