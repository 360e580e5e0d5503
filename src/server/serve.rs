//! From settings to a server that listens, until it is told to stop.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    config::Config,
    env::Env,
    error::{Error, Result},
    server::{Server, listen::Listening},
    store::DataDir,
};

/// How long requests that are under way may take to end when the server stops. Everything together has 5 s.
const DRAIN: Duration = Duration::from_secs(3);

/// Runs the server until SIGTERM or SIGINT. Errors: what keeps it from starting, as a sentence for its operator.
pub async fn serve(config: Config) -> Result<()> {
    let env = Env::real()?;
    let began = env.instant();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let data_dir =
        DataDir::hold(&config.server.data_dir).map_err(|error| Error::broken(error.to_string()))?;
    let store = data_dir.open_store(config.storage.cache_bytes_max.in_memory(), config.storage.durability)?;
    let server = Server::start(config.clone(), env.clone(), store)?;
    let app = server.app();
    let listening = Listening::new(
        env.clone(),
        app.metrics.clone(),
        server.router(),
        app.stopping.clone(),
        config.limits.connections_max,
    );
    for listener in &config.listeners {
        let place = listening.open(listener).await?;
        tracing::info!(%place, "listening");
    }
    if !config.metrics.address.is_empty() {
        let address = listening.open_metrics(&config.metrics.address).await?;
        tracing::info!(%address, "serving /metrics");
    }
    let took_ms = env.instant().saturating_duration_since(began).as_millis();
    tracing::info!(name = %config.server.name, version = env!("CARGO_PKG_VERSION"), %took_ms, "the server runs");

    let signal = tokio::select! {
        biased;
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal, "stopping");
    app.stopping.cancel();
    if tokio::time::timeout(DRAIN, listening.drained()).await.is_err() {
        tracing::info!("some requests were still under way: their connections are cut");
    }
    server.stop().await?;
    drop(data_dir);
    tracing::info!("stopped");
    Ok(())
}
