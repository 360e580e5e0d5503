//! The push gateway (`appservices/push`), opened with the doors of this process: beside the server where an app is configured for it, or
//! served alone.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{Router, extract::Request, response::Response};
use futures_util::{FutureExt, future::BoxFuture};
use http::StatusCode;
use push_gateway::{
    Caller, Gateway, NOTIFY_PATH,
    ports::{Figures, Ports, Secrets, Work},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    api::extract,
    config::Config,
    env::Env,
    error::{Error, Result},
    flows::remote::ports,
    metrics::Metrics,
    server::Listening,
};

/// Notifications under way may take this long to end when the process stops.
const DRAIN: Duration = Duration::from_secs(3);

/// Randomness, threads and figures of this process.
struct Doors {
    env: Env,
    metrics: Metrics,
}

impl Secrets for Doors {
    fn fill(&self, buffer: &mut [u8]) {
        self.env.fill_random(buffer);
    }
}

impl Work for Doors {
    fn run(&self, work: Box<dyn FnOnce() + Send>) -> BoxFuture<'static, ()> {
        let env = self.env.clone();
        async move {
            let done = env.blocking(move || {
                work();
                Ok(())
            });
            if let Err(error) = done.await {
                tracing::warn!(%error, "the push gateway could not make a message");
            }
        }
        .boxed()
    }
}

impl Figures for Doors {
    fn device(&self, kind: &'static str, outcome: &'static str) {
        self.metrics.gateway_pushed(kind, outcome);
    }
}

/// Opens the gateway; none where no app is configured. It has connections of its own, so that slow providers hold up no other server.
/// Fails where a setting or a key cannot be used.
pub(super) fn open(config: &Config, env: &Env, metrics: &Metrics) -> Result<Option<Gateway>> {
    let mut settings = config.push_gateway.clone();
    if !settings.is_enabled() {
        return Ok(None);
    }
    if config.outbound.allow_private_addresses {
        settings.networks_allowed.extend(["0.0.0.0/0", "::/0"].map(str::to_owned));
    }
    let network = ports::open(config, env)?;
    let common = Arc::new(ports::Doors(env.clone()));
    let own = Arc::new(Doors { env: env.clone(), metrics: metrics.clone() });
    let ports = Ports {
        clock: common.clone(),
        randomness: common.clone(),
        secrets: own.clone(),
        tasks: common,
        work: own.clone(),
        resolver: network.resolver,
        transport: network.transport,
        through_proxy: !config.federation.proxy.is_empty(),
        figures: own,
    };
    let gateway = Gateway::open(&settings, ports).map_err(|error| Error::broken(error.to_string()))?;
    for (app_id, application_server_key) in gateway.public_keys() {
        tracing::info!(app_id, application_server_key, "clients of this app subscribe with this public key");
    }
    Ok(Some(gateway))
}

/// Runs the gateway alone, on the listeners of the settings, until SIGTERM or SIGINT. It opens no store. Fails with a sentence for
/// the operator if it cannot start.
pub async fn serve(config: Config) -> Result<()> {
    let (env, metrics, stopping) = (Env::real()?, Metrics::new(), CancellationToken::new());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let Some(gateway) = open(&config, &env, &metrics)? else {
        return Err(Error::broken(
            "push_gateway.app: expected at least one [[push_gateway.app]] in the settings",
        ));
    };
    let router = alone(&env, &metrics, &gateway);
    let listening = Listening::new(env.clone(), metrics, router, stopping.clone(), &config.limits);
    for listener in &config.listeners {
        let place = listening.open(listener).await?;
        tracing::info!(%place, "listening");
    }
    if !config.metrics.address.is_empty() {
        let address = listening.open_metrics(&config.metrics.address, || ()).await?;
        tracing::info!(%address, "serving /metrics");
    }
    tracing::info!(
        apps = config.push_gateway.apps.len(),
        version = env!("CARGO_PKG_VERSION"),
        "the push gateway runs"
    );
    let signal = tokio::select! {
        biased;
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal, "stopping");
    stopping.cancel();
    if tokio::time::timeout(DRAIN, listening.drained()).await.is_err() {
        tracing::info!("notifications did not end in time; their homeservers send them again");
    }
    env.kill();
    env.ended().await;
    tracing::info!("stopped");
    Ok(())
}

/// The router of the gateway as the only one of a process: with the log and the figures of requests, and a panic ends its request alone.
fn alone(env: &Env, metrics: &Metrics, gateway: &Gateway) -> Router {
    let (env, metrics, inner) = (env.clone(), metrics.clone(), gateway.router());
    Router::new().fallback(move |mut request: Request| {
        let (env, metrics, inner) = (env.clone(), metrics.clone(), inner.clone());
        async move {
            let (began, method) = (env.instant(), request.method().clone());
            let route = if request.uri().path() == NOTIFY_PATH { NOTIFY_PATH } else { "none" };
            let peer = extract::peer(request.extensions());
            request.extensions_mut().insert(Caller(peer));
            let answer = AssertUnwindSafe(tower::ServiceExt::oneshot(inner, request)).catch_unwind().await;
            let response = answer.unwrap_or_else(|_| {
                metrics.panic();
                let mut response = Response::default();
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                Ok::<_, Infallible>(response)
            });
            let response = response.unwrap_or_else(|never| match never {});
            let took = env.instant().saturating_duration_since(began);
            let status = response.status().as_u16();
            metrics.request(&method, route, status, took);
            let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            tracing::info!(%method, route, status, took_us, "request");
            response
        }
    })
}
