//! Runs a server from its settings: starts it, listens, and stops it when told to.

use std::{io::Write, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    accounts::users,
    config::Config,
    env::Env,
    error::{Error, Result},
    server::{Lead, Server, operator},
    store::DataDir,
};

/// Requests under way may take this long to end when the server stops. Stopping must take no more than 5 s altogether.
const DRAIN: Duration = Duration::from_secs(3);

/// Calls off the async threads may take this long to end after everything else has.
const CALLS: Duration = Duration::from_millis(500);

/// How a server has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Nothing runs any more, and the store is closed.
    Whole,
    /// Some calls off the async threads run on. What was accepted is written, and they only read or work for requests that nobody
    /// answers any more, so the process may end under them as in a crash.
    WithCallsRunning,
}

/// Runs the server until SIGTERM or SIGINT. Fails with a sentence for the operator if the server cannot start.
pub async fn serve(config: Config) -> Result<Stopped> {
    let env = Env::real()?;
    let began = env.instant();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let data_dir =
        DataDir::hold(&config.server.data_dir).map_err(|error| Error::broken(error.to_string()))?;
    let store = data_dir.open_store(config.storage.cache_bytes_max.in_memory(), config.storage.durability)?;
    let server = Server::start(config.clone(), env.clone(), store, Some(Lead::of_only_node()))?;
    let app = server.app();
    let listening = server.listening();
    for listener in &config.listeners {
        let place = listening.open(listener).await?;
        tracing::info!(%place, "listening");
    }
    if !config.metrics.address.is_empty() {
        let looked_at = app.clone();
        let look = move || {
            looked_at.metrics.queue_depth("store", looked_at.store.queue_depth());
            for (queue, depth) in looked_at.env.long_calls() {
                looked_at.metrics.queue_depth(queue, depth);
            }
            let (waiting, failing) = looked_at.delivery.count();
            looked_at.metrics.servers_waiting(waiting, failing, looked_at.delivery.lag());
            let (pushers, behind) = looked_at.gateways.count();
            looked_at.metrics.pushers(pushers, behind);
        };
        let address = listening.open_metrics(&config.metrics.address, look).await?;
        tracing::info!(%address, "serving /metrics");
    }
    match operator::listen(app, data_dir.path()) {
        Ok(path) => tracing::debug!(path = %path.display(), "listening for the operator's commands"),
        // The server is of use without these commands; the path of the socket may be too long for the system.
        Err(error) => tracing::warn!(%error, "the operator's commands cannot reach this server"),
    }
    let took_ms =
        u64::try_from(env.instant().saturating_duration_since(began).as_millis()).unwrap_or(u64::MAX);
    tracing::info!(name = %config.server.name, version = env!("CARGO_PKG_VERSION"), %took_ms, "the server runs");

    welcome(&server)?;

    let signal = tokio::select! {
        biased;
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal, "stopping");
    app.stopping.cancel();
    if tokio::time::timeout(DRAIN, listening.drained()).await.is_err() {
        tracing::info!("requests did not end in time; their connections are cut");
    }
    let written_out = server.stop().await;
    let running = env.calls_ended(CALLS).await;
    drop(data_dir);
    if let Err(error) = written_out {
        tracing::info!(?running, "stopped without writing out everything");
        return Err(error);
    }
    if running.is_empty() {
        tracing::info!("stopped");
        return Ok(Stopped::Whole);
    }
    tracing::info!(?running, reason = "calls take long, and nobody waits for them", "stopped");
    Ok(Stopped::WithCallsRunning)
}

/// Says how to register the first account, while there is none. It goes to standard output, because it is for a person
/// and holds a token that no log may have.
fn welcome(server: &Server) -> Result<()> {
    let app = server.app();
    let has_account = users::any(&*app.store.snapshot())?;
    if let Some(token) = app.accounts.first_token().filter(|_| !has_account) {
        let line = format!(
            "Registration token: {token} (there is no account yet: register the first one with it, which becomes \
             the admin of this server; the token ends with this run)"
        );
        // A failure is ignored, because nobody may be there to read it.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    Ok(())
}
