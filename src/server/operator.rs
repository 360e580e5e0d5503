//! Carries out the operator's commands: in this process if no server runs, otherwise over a Unix socket in the data
//! directory that only its owner may open.
//!
//! One connection carries one command: a line of JSON each way, and lines of progress in between.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::mpsc,
};

use crate::{
    config::Config,
    encryption::incarnation,
    env::Env,
    error::{Error, Result},
    flows::{
        App,
        operator::operate::{Command, Outcome, RestoredStore, operate},
    },
    server::{Lead, Server, listen::bind_unix},
    store::{
        DataDir, NotHeld,
        backup::{self, Progress},
    },
};

const SOCKET: &str = "operator.sock";
/// The server reads at most this many bytes of a command.
const COMMAND_BYTES_MAX: u64 = 64 << 10;
/// At most this many lines of progress wait for a slow terminal; further ones are dropped.
const PROGRESS_MAX: usize = 16;

/// One line that the server sends to a command.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Progress { doing: String, done: u64, of: u64 },
    Done(Box<Outcome>),
    Refused(String),
}

/// Is told how far a long command is: the current step, how much of it is done, and out of how much (0 if not known).
pub type Report<'a> = dyn FnMut(&str, u64, u64) + Send + 'a;

/// Carries a command out, in this process or in the server that has the store. Its errors are written for the operator.
pub async fn run(config: &Config, command: Command, report: &mut Report<'_>) -> Result<Outcome> {
    match DataDir::hold(&config.server.data_dir) {
        Ok(data_dir) => run_here(config, &data_dir, command, report).await,
        Err(NotHeld::InUse(_)) => ask_server(&config.server.data_dir, &command, report).await,
        Err(other) => Err(Error::broken(other.to_string())),
    }
}

async fn run_here(
    config: &Config,
    data_dir: &DataDir,
    command: Command,
    report: &mut Report<'_>,
) -> Result<Outcome> {
    let store = data_dir.open_store(config.storage.cache_bytes_max.in_memory(), config.storage.durability)?;
    let mut config = config.clone();
    // A command that is soon over has no business with other servers: they are told when the server runs.
    config.federation.enabled &= command.is_about_servers();
    config.search.enabled &= command.is_about_search();
    // A mail that is on its way when the command is over would be sent again.
    config.email.host.clear();
    let server = Server::start(config, Env::real()?, store, Some(Lead::of_only_node()))?;
    let (sender, mut receiver) = mpsc::channel::<Progress>(PROGRESS_MAX);
    let work = operate(server.app(), command, tell(sender));
    tokio::pin!(work);
    let answer = loop {
        tokio::select! {
            biased;
            Some(it) = receiver.recv() => report(it.doing, it.done, it.of),
            answer = &mut work => break answer,
        }
    };
    server.stop().await?;
    answer
}

/// Passes progress on, and drops it if nobody has the time to read it.
fn tell(to: mpsc::Sender<Progress>) -> impl FnMut(Progress) + Send + 'static {
    move |progress| {
        let _ = to.try_send(progress);
    }
}

async fn ask_server(data_dir: &Path, command: &Command, report: &mut Report<'_>) -> Result<Outcome> {
    let path = data_dir.join(SOCKET);
    let refuse = |why: &dyn std::fmt::Display| {
        Error::broken(format!("{} is in use, and its server cannot be asked: {why}", data_dir.display()))
    };
    let stream = UnixStream::connect(&path).await.map_err(|error| refuse(&error))?;
    let (reader, mut writer) = stream.into_split();
    let mut line = serde_json::to_vec(command).map_err(|error| refuse(&error))?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str(&line).map_err(|error| refuse(&error))? {
            Line::Progress { doing, done, of } => report(&doing, done, of),
            Line::Done(outcome) => return Ok(*outcome),
            Line::Refused(why) => return Err(Error::broken(why)),
        }
    }
    Err(refuse(&"it closed the connection without an answer"))
}

/// Serves the operator's socket until the server stops. Returns its path.
pub(super) fn listen(app: &App, data_dir: &Path) -> Result<PathBuf> {
    let path = data_dir.join(SOCKET);
    let socket = bind_unix(&path, 0o600)?;
    app.env.spawn(accept(app.clone(), socket));
    Ok(path)
}

async fn accept(app: App, socket: UnixListener) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = app.stopping.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let serving = app.clone();
                app.env.spawn(async move {
                    if let Err(error) = serve(&serving, stream).await {
                        tracing::info!(%error, "an operator's command ended before its answer was sent");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection of an operator's command could not be accepted");
                app.env.sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve(app: &App, stream: UnixStream) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(COMMAND_BYTES_MAX)).read_line(&mut line).await?;
    let command: Command = match serde_json::from_str(&line) {
        Ok(command) => command,
        Err(_) => {
            let why =
                "The running server does not know this command; it may be of another version.".to_owned();
            return say(&mut writer, &Line::Refused(why)).await;
        }
    };
    let (sender, mut receiver) = mpsc::channel::<Progress>(PROGRESS_MAX);
    let work = operate(app, command, tell(sender));
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            Some(it) = receiver.recv() => {
                let line = Line::Progress { doing: it.doing.to_owned(), done: it.done, of: it.of };
                say(&mut writer, &line).await?;
            }
            answer = &mut work => {
                let line = answer.map_or_else(
                    |error| Line::Refused(sentence(&error)),
                    |outcome| Line::Done(Box::new(outcome)),
                );
                return say(&mut writer, &line).await;
            }
        }
    }
}

async fn say(writer: &mut (impl AsyncWriteExt + Unpin), line: &Line) -> Result<()> {
    let mut bytes = serde_json::to_vec(line)
        .map_err(|error| Error::broken(format!("an answer cannot be written: {error}")))?;
    bytes.push(b'\n');
    Ok(writer.write_all(&bytes).await?)
}

/// Gives an error as a sentence for the operator.
pub fn sentence(error: &Error) -> String {
    match error {
        Error::Refused(refusal) => refusal.message.clone(),
        other => other.to_string(),
    }
}

/// Puts a backup in place of the store. Fails if a server runs, or if the backup is incomplete or of another server.
pub fn restore(config: &Config, from: &Path, report: &mut Report<'_>) -> Result<Outcome> {
    let refuse = |why: String| Error::broken(format!("nothing was restored: {why}"));
    let data_dir = DataDir::hold(&config.server.data_dir).map_err(|error| refuse(error.to_string()))?;
    let manifest = backup::read_manifest(from).map_err(|error| refuse(error.to_string()))?;
    let name = config.server.name.as_str();
    if manifest.server_name != name {
        let other = &manifest.server_name;
        return Err(refuse(format!("the backup is of {other:?}, and server.name is {name:?}")));
    }
    let mut progress = |it: Progress| report(it.doing, it.done, it.of);
    let restored = backup::restore(from, &data_dir, &mut incarnation::begin, &mut progress)
        .map_err(|error| refuse(error.to_string()))?;
    Ok(Outcome::Restored(RestoredStore {
        position: restored.manifest.position,
        incarnation: restored.incarnation,
        replaced: restored.replaced,
    }))
}
