//! The composition root: builds a server from left to right, starts its workers, stops it.

mod flusher;
mod identity;
mod timers;

use std::sync::Arc;

use axum::Router;

use crate::{
    accounts::Accounts,
    api,
    config::Config,
    env::Env,
    error::Result,
    flows::{App, House},
    store::Store,
    sync::Notifier,
};

/// A running server, without its listeners.
#[derive(Clone)]
pub struct Server {
    app: App,
    router: Router,
}

impl Server {
    /// Builds the server over a store and starts its workers. Errors: a store that belongs to another server name.
    pub fn start(config: Config, env: Env, store: Store) -> Result<Self> {
        let signing = Arc::new(identity::open(&config, &env, &store)?);
        let accounts = Accounts::open(&*store.snapshot(), &env, config.server.name.clone())?;
        let notifier = Notifier::new();
        let app = App::new(House { env, store, config: Arc::new(config), accounts, notifier, signing });
        flusher::start(&app.store, &app.env, |_, _| ())?;
        timers::start(&app.store, &app.env);
        let router = api::router(&app);
        Ok(Self { app, router })
    }

    /// All endpoints.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// The parts, for commands and tests.
    pub fn app(&self) -> &App {
        &self.app
    }
}
