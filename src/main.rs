//! The command line: `serve` (the default), and the operator's commands.

#[path = "main/media.rs"]
mod media;
#[path = "main/words.rs"]
mod words;

use std::{
    io::{IsTerminal, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use aqueduct::{
    config::{self, Config},
    flows::operator::{
        emails,
        operate::{Command as Operation, Outcome},
    },
    server::{self, Stopped, operator},
};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use media::MediaCommand;
use serde_json::{Value, json};
use words::for_people;

/// This allocator gives memory back to the system after a burst, sooner than the system's own.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Free memory goes back to the system after a second; jemalloc's own default is ten.
#[expect(unsafe_code, reason = "jemalloc reads its settings from this symbol, and no other has its name")]
#[unsafe(export_name = "_rjem_malloc_conf")]
static MALLOC_CONF: &[u8; 38] = b"dirty_decay_ms:1000,muzzy_decay_ms:0\0\0";

#[expect(unsafe_code, reason = "the standard library has no exit that leaves out what libraries do at exit")]
unsafe extern "C" {
    /// Ends the process at once (POSIX).
    safe fn _exit(code: std::ffi::c_int) -> !;
}

/// The threads of a server whose work has ended may take this long to end themselves.
const THREADS_END_MAX: Duration = Duration::from_millis(500);

/// The exit code for a refusal or a fault. Wrong usage is 2, as clap has it.
const REFUSED: u8 = 1;

/// A Matrix homeserver in one binary.
#[derive(Parser)]
#[command(name = "aqueduct", version, about)]
struct Cli {
    /// The file that holds the settings.
    #[arg(long, global = true, value_name = "FILE", default_value = "conduit.toml")]
    config: PathBuf,
    /// Answer in JSON, for programs to read.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server (the default).
    Serve,
    /// Run the push gateway alone, for the apps in the settings.
    PushGateway,
    /// Check the settings in the file and the environment.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Create, list, change and deactivate accounts.
    #[command(subcommand)]
    User(UserCommand),
    /// Create, list and revoke registration tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Reports that users make, of events, rooms and other users.
    #[command(subcommand)]
    Report(ReportCommand),
    /// Back up, restore and check the store.
    #[command(subcommand)]
    Db(DbCommand),
    /// Look at other servers: who does not answer and why, and what others see of a server.
    #[command(subcommand)]
    Federation(FederationCommand),
    /// Look at the index of search in messages, and build it anew.
    #[command(subcommand)]
    Search(SearchCommand),
    /// Look at files of the media repository, have them given to nobody, and delete them.
    #[command(subcommand)]
    Media(MediaCommand),
    /// Say where an event stands in its room, and whether and why a user sees it.
    Explain {
        /// The id of the event, as `$...`.
        event: String,
        /// A user id, or its part before the colon.
        #[arg(long = "for", value_name = "USER")]
        user: Option<String>,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Check the settings, and change nothing.
    Check,
}

#[derive(Subcommand)]
enum UserCommand {
    /// Create an account. Without a password, one is made and printed.
    Create {
        /// A user id, or its part before the colon.
        name: String,
        /// Make the account an admin of this server. The first account is one unless --no-admin is given.
        #[arg(long)]
        admin: bool,
        /// Do not make the account an admin, even if it is the first.
        #[arg(long, conflicts_with = "admin")]
        no_admin: bool,
        #[command(flatten)]
        password: Password,
    },
    /// List all accounts of this server.
    List,
    /// Make an account an admin of this server.
    Promote {
        /// A user id, or its part before the colon.
        name: String,
    },
    /// Take from an account the role of an admin of this server.
    Demote {
        /// A user id, or its part before the colon.
        name: String,
    },
    /// Lock an account: nothing can be done with it but to log out.
    Lock {
        /// Localpart or user id.
        name: String,
    },
    /// Unlock an account, whose sessions then go on.
    Unlock {
        /// Localpart or user id.
        name: String,
    },
    /// Suspend an account: it reads, and does nothing that others see.
    Suspend {
        /// Localpart or user id.
        name: String,
    },
    /// End the suspension of an account.
    Unsuspend {
        /// Localpart or user id.
        name: String,
    },
    /// List the devices of an account.
    Devices {
        /// A user id, or its part before the colon.
        name: String,
    },
    /// End the sessions of an account, and delete its devices.
    LogOut {
        /// A user id, or its part before the colon.
        name: String,
        /// End the session of this device only.
        #[arg(long, value_name = "DEVICE_ID")]
        device: Option<String>,
    },
    /// Set a password, and end all sessions. Without a password, one is made and printed.
    ResetPassword {
        /// A user id, or its part before the colon.
        name: String,
        #[command(flatten)]
        password: Password,
    },
    /// Deactivate an account for good.
    Deactivate {
        /// A user id, or its part before the colon.
        name: String,
        /// Also erase the user: their messages are shown redacted to everybody who was not in the room at the time.
        #[arg(long)]
        erase: bool,
    },
    /// Add, remove and list the e-mail addresses of an account.
    #[command(subcommand)]
    Email(EmailCommand),
}

/// The commands for e-mail addresses.
#[derive(Subcommand)]
enum EmailCommand {
    /// Add an address, which must be known to be the user's: digests of messages may be sent there.
    Add {
        /// A user id, or its part before the colon.
        name: String,
        /// The address, as alice@example.org.
        address: String,
    },
    /// Remove an address, and end the digests that are sent there.
    Remove {
        /// A user id, or its part before the colon.
        name: String,
        /// The address to remove.
        address: String,
    },
    /// List the addresses of an account.
    List {
        /// A user id, or its part before the colon.
        name: String,
    },
}

#[derive(Args)]
struct Password {
    /// The password. Others on this machine may see it in the list of processes: --password-stdin is safer.
    #[arg(long, conflicts_with = "password_stdin")]
    password: Option<String>,
    /// Read the password from standard input, up to the end of its first line.
    #[arg(long)]
    password_stdin: bool,
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Create a registration token, and print it.
    Create {
        /// The token: 1 to 64 of the characters A-Z a-z 0-9 . _ ~ -. Without it, one is made.
        #[arg(long)]
        token: Option<String>,
        /// How many accounts may be registered with it, 1 or more. Without it, any number.
        #[arg(long, value_name = "N")]
        uses: Option<u64>,
        /// When the token ends, as 30m, 12h or 7d from now. Without it, never.
        #[arg(long, value_name = "TIME", value_parser = seconds)]
        expires_in: Option<u64>,
    },
    /// List all registration tokens, with their uses.
    List,
    /// End a registration token, so that nobody can register with it.
    Revoke {
        /// The registration token to end.
        token: String,
    },
}

/// The commands for reports.
#[derive(Subcommand)]
enum ReportCommand {
    /// List the reports, the newest first.
    List,
    /// Delete a report that was dealt with.
    Dismiss {
        /// The user who made it.
        by: String,
        /// The name of what is reported, as the list gives it.
        about: String,
    },
}

#[derive(Subcommand)]
enum FederationCommand {
    /// List the servers that do not answer or for which something waits, or say all about one of them.
    Status {
        /// The name of a server, as it stands in user ids. Without it, all of which something is to be said.
        server: Option<String>,
    },
    /// Try to reach a server again now, instead of when its time comes.
    Retry {
        /// The name of the server.
        server: String,
    },
    /// Find a server as others do, and say what they see: well-known file, SRV record, certificate, keys, version.
    Check {
        /// The name of the server, which may be this one.
        name: String,
    },
    /// Make a new signing key. It signs from the next start of the server on; the old one is still published then.
    RotateKey,
}

#[derive(Subcommand)]
enum SearchCommand {
    /// Build the index anew from the store. Searches answer from what is indexed meanwhile.
    Rebuild,
    /// Say how many texts the index has, and how far it is behind.
    Status,
}

#[derive(Subcommand)]
enum DbCommand {
    /// Take a backup into an empty directory. The server may run meanwhile.
    Backup {
        /// The directory for the backup, which must be empty or absent.
        dir: PathBuf,
    },
    /// Put a backup in place of the store. The server must not run.
    Restore {
        /// The directory that holds the backup.
        dir: PathBuf,
    },
    /// Read the whole store, and say what is wrong in it.
    Check,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(why) => {
            if cli.json {
                say(&json!({ "ok": false, "error": why }).to_string());
            } else {
                eprintln!("aqueduct: {why}");
            }
            ExitCode::from(REFUSED)
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode, String> {
    let config = Config::load(&cli.config, variables()).map_err(|problem| problem.to_string())?;
    let operation = match &cli.command {
        None | Some(Command::Serve) => {
            server::logging::begin(&config.log).map_err(|error| operator::sentence(&error))?;
            let runtime = runtime()?;
            let ended = runtime.block_on(server::serve(config));
            if matches!(ended, Ok(Stopped::WithCallsRunning)) {
                return leave();
            }
            // Dropping the runtime would wait for calls without an end, also where the server failed.
            runtime.shutdown_timeout(THREADS_END_MAX);
            return ended.map(|_| ExitCode::SUCCESS).map_err(|error| operator::sentence(&error));
        }
        Some(Command::PushGateway) => {
            server::logging::begin(&config.log).map_err(|error| operator::sentence(&error))?;
            let runtime = runtime()?;
            let ended = runtime.block_on(server::gateway::serve(config));
            runtime.shutdown_timeout(THREADS_END_MAX);
            return ended.map(|()| ExitCode::SUCCESS).map_err(|error| operator::sentence(&error));
        }
        Some(Command::Config(ConfigCommand::Check)) => {
            let unknown = config::list_unknown_variables(variables());
            if !unknown.is_empty() {
                let example = config::ENVIRONMENT_PREFIX;
                return Err(format!(
                    "these environment variables set nothing: {}; a variable that sets something is named {example}SECTION__KEY",
                    unknown.join(", ")
                ));
            }
            let text = format!("{}: all settings are valid", cli.config.display());
            say(&if cli.json { json!({ "ok": true }).to_string() } else { text });
            return Ok(ExitCode::SUCCESS);
        }
        Some(Command::Db(DbCommand::Restore { dir })) => {
            let mut bar = Bar::new(cli.json);
            let answer = operator::restore(&config, dir, &mut |doing, done, of| bar.report(doing, done, of));
            bar.end();
            return answer.map(|answer| tell(cli, &answer)).map_err(|error| operator::sentence(&error));
        }
        Some(Command::Db(DbCommand::Backup { dir })) => Operation::BackUp { to: absolute(dir)? },
        Some(Command::Db(DbCommand::Check)) => Operation::Check,
        Some(Command::Explain { event, user }) => {
            Operation::Explain { event: event.clone(), user: user.clone() }
        }
        Some(Command::User(command)) => user_operation(command)?,
        Some(Command::Federation(command)) => match command {
            FederationCommand::Status { server: None } => Operation::ListServers,
            FederationCommand::Status { server: Some(server) }
            | FederationCommand::Check { name: server } => Operation::CheckServer { server: server.clone() },
            FederationCommand::RotateKey => Operation::MakeKey,
            FederationCommand::Retry { server } => Operation::RetryServer { server: server.clone() },
        },
        Some(Command::Token(command)) => token_operation(command),
        Some(Command::Search(SearchCommand::Rebuild)) => Operation::RebuildSearch,
        Some(Command::Search(SearchCommand::Status)) => Operation::SearchStatus,
        Some(Command::Media(command)) => Operation::Media(command.operation()?),
        Some(Command::Report(ReportCommand::List)) => Operation::ListReports,
        Some(Command::Report(ReportCommand::Dismiss { by, about })) => {
            Operation::DismissReport { by: by.clone(), about: about.clone() }
        }
    };
    let mut bar = Bar::new(cli.json);
    let answer = runtime()?
        .block_on(operator::run(&config, operation, &mut |doing, done, of| bar.report(doing, done, of)));
    bar.end();
    answer.map(|answer| tell(cli, &answer)).map_err(|error| operator::sentence(&error))
}

/// Ends the process while threads read the store. It is not closed, because that would wait for them; nor does anything run that
/// libraries do at exit, because it takes away what those threads use. All that was accepted is on disk, as after a crash.
fn leave() -> Result<ExitCode, String> {
    _exit(0)
}

fn user_operation(command: &UserCommand) -> Result<Operation, String> {
    Ok(match command {
        UserCommand::Create { name, admin, no_admin, password } => Operation::CreateUser {
            name: name.clone(),
            password: password.read()?,
            admin: if *no_admin { Some(false) } else { admin.then_some(true) },
        },
        UserCommand::List => Operation::ListUsers,
        UserCommand::Promote { name } => Operation::SetAdmin { name: name.clone(), admin: true },
        UserCommand::Demote { name } => Operation::SetAdmin { name: name.clone(), admin: false },
        UserCommand::Lock { name } => standing(name, Some(true), None),
        UserCommand::Unlock { name } => standing(name, Some(false), None),
        UserCommand::Suspend { name } => standing(name, None, Some(true)),
        UserCommand::Unsuspend { name } => standing(name, None, Some(false)),
        UserCommand::Devices { name } => Operation::ListDevices { name: name.clone() },
        UserCommand::LogOut { name, device } => {
            Operation::LogOut { name: name.clone(), device: device.as_deref().map(Into::into) }
        }
        UserCommand::ResetPassword { name, password } => {
            Operation::ResetPassword { name: name.clone(), password: password.read()? }
        }
        UserCommand::Deactivate { name, erase } => {
            Operation::DeactivateUser { name: name.clone(), erase: *erase }
        }
        UserCommand::Email(command) => Operation::Email(email_operation(command)),
    })
}

fn email_operation(command: &EmailCommand) -> emails::EmailCommand {
    match command {
        EmailCommand::Add { name, address } => {
            emails::EmailCommand::Add { name: name.clone(), address: address.clone() }
        }
        EmailCommand::Remove { name, address } => {
            emails::EmailCommand::Remove { name: name.clone(), address: address.clone() }
        }
        EmailCommand::List { name } => emails::EmailCommand::List { name: name.clone() },
    }
}

fn standing(name: &str, locked: Option<bool>, suspended: Option<bool>) -> Operation {
    Operation::SetStanding { name: name.to_owned(), locked, suspended }
}

fn token_operation(command: &TokenCommand) -> Operation {
    match command {
        TokenCommand::Create { token, uses, expires_in } => {
            Operation::CreateToken { token: token.clone(), uses_max: *uses, expires_in_s: *expires_in }
        }
        TokenCommand::List => Operation::ListTokens,
        TokenCommand::Revoke { token } => Operation::RevokeToken { token: token.clone() },
    }
}

impl Password {
    fn read(&self) -> Result<Option<String>, String> {
        if !self.password_stdin {
            return Ok(self.password.clone());
        }
        let mut text = String::new();
        let read = std::io::stdin().lock().take(64 << 10).read_to_string(&mut text);
        read.map_err(|error| format!("the password can't be read: {error}"))?;
        match text.lines().next() {
            Some(line) if !line.is_empty() => Ok(Some(line.to_owned())),
            _ => Err("standard input must hold the password in its first line".into()),
        }
    }
}

/// Reads a time such as `7d`, in seconds.
fn seconds(text: &str) -> Result<u64, String> {
    let wrong = || "expected a time such as 90s, 30m, 12h or 7d".to_owned();
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 60 * 60,
        Some('d') => 24 * 60 * 60,
        _ => return Err(wrong()),
    };
    let number: u64 = text.get(..text.len() - 1).unwrap_or_default().parse().map_err(|_| wrong())?;
    number.checked_mul(unit).ok_or_else(wrong)
}

/// Makes a path absolute, because the server may run in another directory than this command.
fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Prints what was done, for people or as JSON, and chooses the exit code.
fn tell(cli: &Cli, outcome: &Outcome) -> ExitCode {
    if cli.json {
        let mut json = for_programs(outcome);
        if let Some(fields) = json.as_object_mut() {
            fields.insert("ok".into(), outcome.is_good().into());
        }
        say(&json.to_string());
    } else {
        say(&for_people(outcome));
    }
    if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::from(REFUSED) }
}

/// Writes an outcome as one JSON object, in which a list has a field of its own.
fn for_programs(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::UserCreated(it) => json!(it),
        Outcome::Users(list) => json!({ "users": list }),
        Outcome::AdminSet(it) => json!(it),
        Outcome::StandingSet(it) => json!(it),
        Outcome::Reports(list) => json!({ "reports": list }),
        Outcome::ReportDismissed(it) => json!(it),
        Outcome::PasswordSet(it) => json!(it),
        Outcome::UserDeactivated(it) => json!(it),
        Outcome::Devices(it) => json!(it),
        Outcome::LoggedOut(it) => json!(it),
        Outcome::TokenCreated(it) | Outcome::TokenRevoked(it) => json!(it),
        Outcome::Tokens(list) => json!({ "tokens": list }),
        Outcome::BackedUp(it) => json!(it),
        Outcome::Restored(it) => json!(it),
        Outcome::Explained(it) => json!(it),
        Outcome::Media(it) => json!(it),
        Outcome::Emails(it) => json!(it),
        Outcome::Checked(it) => json!(it),
        Outcome::Servers(it) => json!(it),
        Outcome::ServerRetried(it) => json!(it),
        Outcome::KeyMade(it) => json!(it),
        Outcome::SearchBegun(it) | Outcome::SearchIs(it) => json!(it),
        Outcome::ServerChecked(it) => json!(it),
    }
}

/// Writes a line. A reader that has gone (`| head`) is no fault.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// A progress bar, which is shown on a terminal only.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new(json: bool) -> Self {
        let shown = !json && std::io::stderr().is_terminal();
        Self(shown.then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        }))
    }

    fn report(&mut self, doing: &str, done: u64, of: u64) {
        let Some(bar) = &self.0 else { return };
        if of > 0 && bar.length() != Some(of) {
            if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}") {
                bar.set_style(style);
            }
            bar.set_length(of);
        }
        bar.set_position(done);
        let message = if of == 0 && done > 0 { format!("{doing}: {done}") } else { doing.to_owned() };
        bar.set_message(message);
    }

    fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// The environment variables whose names and values are text.
fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("aqueduct")
        .build()
        .map_err(|error| format!("the runtime cannot start: {error}"))
}
