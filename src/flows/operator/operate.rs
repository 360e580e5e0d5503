//! What the operator does: accounts, registration tokens, backups. The command line speaks to these, in its own
//! process or over the operator's socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    accounts::{devices, names, passwords, registration, users},
    env::Long,
    error::{Error, Refusal, Result},
    flows::{
        App,
        account::{
            deactivate, log_out,
            register::{self, Wish},
        },
        operator::check,
        write,
    },
    ids::UserNum,
    schema::accounts::RegistrationTokenRow,
    store::backup::{self, Progress},
};

/// Passwords and tokens made here are this long.
const MADE_CHARS: usize = 24;

/// One command.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum Command {
    /// Makes an account.
    CreateUser {
        /// The localpart.
        name: String,
        /// The password; one is made if there is none.
        password: Option<String>,
        /// Whether it administers the server. The first account always does.
        admin: bool,
    },
    /// Lists accounts.
    ListUsers,
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
        /// Whether it is to be forgotten, too.
        erase: bool,
    },
    /// Makes a registration token.
    CreateToken {
        /// The token; one is made if there is none.
        token: Option<String>,
        /// How many accounts may be made with it; any number, if none.
        uses_max: Option<u64>,
        /// In how many seconds it ends; never, if none.
        expires_in_s: Option<u64>,
    },
    /// Lists registration tokens.
    ListTokens,
    /// Takes a backup.
    BackUp {
        /// An empty or absent directory, as an absolute path.
        to: PathBuf,
    },
    /// Reads everything and says what is wrong.
    Check,
}

/// What was done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// For people.
    pub text: String,
    /// For programs.
    pub json: Value,
    /// Whether all is well; a check that finds something did its work, and is not.
    pub good: bool,
}

impl Answer {
    fn new(text: impl Into<String>, json: Value) -> Self {
        Self { text: text.into(), json, good: true }
    }
}

/// Carries a command out. `progress` learns how far a long one is; it must be short.
pub async fn operate(
    app: &App,
    command: Command,
    progress: impl FnMut(Progress) + Send + 'static,
) -> Result<Answer> {
    match command {
        Command::CreateUser { name, password, admin } => create_user(app, name, password, admin).await,
        Command::ListUsers => list_users(app).await,
        Command::ResetPassword { name, password } => reset_password(app, &name, password).await,
        Command::DeactivateUser { name, erase } => deactivate(app, &name, erase).await,
        Command::CreateToken { token, uses_max, expires_in_s } => {
            create_token(app, token, uses_max, expires_in_s).await
        }
        Command::ListTokens => list_tokens(app).await,
        Command::BackUp { to } => back_up(app, to, progress).await,
        Command::Check => check_store(app, progress).await,
    }
}

/// The password to use, and what to say about it.
fn password_or_made(app: &App, password: Option<String>) -> (String, Option<String>) {
    match password {
        Some(password) => (password, None),
        None => {
            let made = app.env.random_string(MADE_CHARS);
            (made.clone(), Some(made))
        }
    }
}

fn with_made(text: String, made: Option<&String>) -> String {
    match made {
        Some(password) => format!("{text}\nPassword: {password}"),
        None => text,
    }
}

async fn create_user(app: &App, name: String, password: Option<String>, admin: bool) -> Result<Answer> {
    let (password, made) = password_or_made(app, password);
    let wish = Wish { username: Some(name), password: Some(password), log_in: None, refreshable: false };
    let user_id = register::register_by_operator(app, wish, admin).await?.user_id;
    let user = users::require_num(&*app.store.snapshot(), &user_id)?;
    let is_admin = users::require(&*app.store.snapshot(), user)?.is_admin;
    let role = if is_admin { ", an admin of this server" } else { "" };
    Ok(Answer::new(
        with_made(format!("Created {user_id}{role}."), made.as_ref()),
        json!({ "user_id": user_id, "admin": is_admin, "password": made }),
    ))
}

async fn list_users(app: &App) -> Result<Answer> {
    let snapshot = app.store.snapshot();
    let rows = app.env.blocking(move || Ok(users::list(&*snapshot)?.collect::<Result<Vec<_>, _>>()?)).await?;
    let mut text = String::new();
    let mut list = Vec::new();
    for (_, row) in rows {
        let notes = [(row.is_admin, "admin"), (row.is_guest, "guest"), (row.is_deactivated, "deactivated")];
        let notes: Vec<_> = notes.into_iter().filter(|(is, _)| *is).map(|(_, note)| note).collect();
        text.push_str(&format!("{}  {}\n", row.user_id, notes.join(", ")));
        list.push(json!({
            "user_id": row.user_id,
            "created_ms": row.created_ms,
            "admin": row.is_admin,
            "guest": row.is_guest,
            "deactivated": row.is_deactivated,
        }));
    }
    if list.is_empty() {
        text.push_str("There is no account yet.\n");
    }
    Ok(Answer::new(text.trim_end(), json!({ "users": list })))
}

fn require_user(app: &App, name: &str) -> Result<(UserNum, ruma::OwnedUserId)> {
    let user_id = names::meant_user_id(name, app.accounts.server_name())
        .ok_or_else(|| Refusal::invalid_param(format!("{name} is no user of this server.")))?;
    let user = users::find_num(&*app.store.snapshot(), &user_id)?
        .ok_or_else(|| Refusal::not_found(format!("There is no account {user_id}.")))?;
    Ok((user, user_id))
}

async fn reset_password(app: &App, name: &str, password: Option<String>) -> Result<Answer> {
    let (user, user_id) = require_user(app, name)?;
    if users::require(&*app.store.snapshot(), user)?.is_deactivated {
        return Err(Refusal::invalid_param(format!("{user_id} is deactivated.")).into());
    }
    let (password, made) = password_or_made(app, password);
    passwords::check(&password)?;
    let house = app.clone();
    let hash = move || passwords::hash(&house.env, &house.config.passwords, &password);
    let hash = app.env.blocking_long(Long::Password, hash).await?;
    let whose = user_id.clone();
    write::for_user(app, user, move |_, batch| {
        passwords::set(batch, user, Some(&hash));
        let all = devices::list(batch, user)?;
        log_out::end_all(batch, user, &whose, &all)
    })
    .await?;
    let text = format!("Set the password of {user_id}, and ended all its sessions.");
    Ok(Answer::new(with_made(text, made.as_ref()), json!({ "user_id": user_id, "password": made })))
}

async fn deactivate(app: &App, name: &str, erase: bool) -> Result<Answer> {
    let (user, user_id) = require_user(app, name)?;
    if users::require(&*app.store.snapshot(), user)?.is_deactivated {
        return Err(Refusal::invalid_param(format!("{user_id} is deactivated already.")).into());
    }
    deactivate::deactivate(app, user, user_id.clone(), erase).await?;
    Ok(Answer::new(format!("Deactivated {user_id}."), json!({ "user_id": user_id, "erased": erase })))
}

async fn create_token(
    app: &App,
    token: Option<String>,
    uses_max: Option<u64>,
    expires_in_s: Option<u64>,
) -> Result<Answer> {
    let token = token.unwrap_or_else(|| app.env.random_string(MADE_CHARS));
    let now_ms = app.env.now_ms();
    let expires_ms = expires_in_s.map(|seconds| now_ms.saturating_add(seconds.saturating_mul(1000)));
    let row = RegistrationTokenRow { created_ms: now_ms, uses_max, uses: 0, expires_ms };
    let (name, kept) = (token.clone(), row.clone());
    write::for_server(app, move |_, batch| registration::create_token(batch, &name, &kept), Error::from)
        .await?;
    Ok(Answer::new(token.clone(), token_json(&token, &row)))
}

fn token_json(token: &str, row: &RegistrationTokenRow) -> Value {
    json!({ "token": token, "uses": row.uses, "uses_max": row.uses_max, "expires_ms": row.expires_ms })
}

async fn list_tokens(app: &App) -> Result<Answer> {
    let tokens = registration::list_tokens(&*app.store.snapshot())?;
    let now_ms = app.env.now_ms();
    let lines = tokens.iter().map(|(token, row)| {
        let uses_max = row.uses_max.map_or_else(|| "any number of".to_owned(), |max| max.to_string());
        let end = match row.expires_ms {
            None => String::new(),
            Some(end) if end <= now_ms => ", expired".to_owned(),
            Some(end) => format!(", ends in {} s", (end - now_ms) / 1000),
        };
        format!("{token}  {} of {uses_max} uses{end}", row.uses)
    });
    let lines: Vec<_> = lines.collect();
    let text = if lines.is_empty() { "There is no registration token.".to_owned() } else { lines.join("\n") };
    let list: Vec<_> = tokens.iter().map(|(token, row)| token_json(token, row)).collect();
    Ok(Answer::new(text, json!({ "tokens": list })))
}

async fn back_up(
    app: &App,
    to: PathBuf,
    mut progress: impl FnMut(Progress) + Send + 'static,
) -> Result<Answer> {
    let house = app.clone();
    let manifest = app
        .env
        .blocking_long(Long::Maintenance, move || {
            let name = house.config.server.name.as_str();
            backup::back_up(&house.store, &to, name, house.env.now_ms(), true, &mut progress)
                .map_err(|why| Refusal::invalid_param(format!("No backup was taken: {why}.")).into())
        })
        .await?;
    let text = format!("Backed up everything to position {}.", manifest.position);
    Ok(Answer::new(text, json!(manifest)))
}

async fn check_store(app: &App, mut progress: impl FnMut(Progress) + Send + 'static) -> Result<Answer> {
    let store = app.store.clone();
    let report =
        app.env.blocking_long(Long::Maintenance, move || Ok(check::check(&store, &mut progress)?)).await?;
    let rows: u64 = report.rows.iter().map(|(_, rows)| rows).sum();
    let mut text = if report.faults == 0 {
        format!("Read {rows} rows: nothing is wrong.")
    } else {
        format!("Read {rows} rows, {} faults:\n{}", report.faults, report.findings.join("\n"))
    };
    if report.unjudged > 0 {
        let unjudged = report.unjudged;
        text.push_str(&format!(
            "\n{unjudged} rows take too long beside a running server: check a copy of the store."
        ));
    }
    let by_table: serde_json::Map<_, _> =
        report.rows.iter().map(|(table, rows)| ((*table).to_owned(), json!(rows))).collect();
    let json = json!({
        "rows": by_table, "faults": report.faults, "findings": report.findings, "unjudged": report.unjudged,
    });
    Ok(Answer { text, json, good: report.faults == 0 })
}
