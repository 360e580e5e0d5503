//! The composition root: builds a server from left to right, starts its workers, stops it.

mod identity;

use std::sync::Arc;

use axum::Router;

use crate::{
    api,
    config::Config,
    env::Env,
    error::Result,
    flows::{App, House},
    store::Store,
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
        let app = App::new(House { env, store, config: Arc::new(config), signing });
        start_flusher(&app)?;
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

/// The flusher has a thread of its own: it waits for the disk most of the time.
fn start_flusher(app: &App) -> Result<()> {
    let store = app.store.clone();
    app.env.spawn_thread("flusher", async move {
        loop {
            store.wanted().await;
            if let Err(fault) = store.flush() {
                // Builders have seen what is now lost, so nothing may go on: DESIGN, "a failed write ends the process".
                tracing::error!(%fault, "the disk cannot be written: the server ends");
                std::process::abort();
            }
        }
    })
}
