//! The composition root: builds a server from its parts, from left to right, and starts its workers; its modules listen
//! and stop.

pub mod flusher;
pub mod gateway;
mod identity;
mod connections;
mod lead;
mod listen;
pub mod logging;
pub mod operator;
mod readers;
mod serve;
mod steps;
mod timers;

use std::sync::Arc;

use axum::Router;
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::Accounts,
    api,
    config::Config,
    delivery::{gateways::Gateways, mail::Mails, servers::Servers},
    env::Env,
    error::Result,
    flows::{
        App, Services, commit, follow_up,
        jobs::Running,
        limits::RateLimits,
        media::{Media, preview, preview::Previews},
        operator::signing_keys,
        policy_server::PolicyServers,
        remote::{self, Remote, gaps::Gaps, receive::Lanes, staged::Staged},
        room::{
            completing::Completing,
            presence,
            receipts::{self, Receipts},
        },
        searching::Searching,
        sharing::Sharing,
        write,
    },
    metrics::Metrics,
    push::Push,
    rooms::{Rooms, resolve::Resolver},
    store::Store,
    sync::{Ephemeral, Notifier, Polls},
};

pub use lead::Lead;
pub use listen::Listening;
pub use serve::{Stopped, serve};

/// A running server, without its listeners.
#[derive(Clone)]
pub struct Server {
    app: App,
    router: Router,
}

impl Server {
    /// Builds the server over a store and starts its workers; with `lead`, also the workers that one node runs for all.
    /// Fails if the store belongs to a server of another name, or if it has no signing key and this node does not lead.
    pub fn start(config: Config, env: Env, store: Store, lead: Option<Lead>) -> Result<Self> {
        if lead.is_some() {
            steps::take(&store)?;
        }
        let signing = Arc::new(identity::open(&config, &env, &store, lead.as_ref())?);
        let accounts = Accounts::open(&*store.snapshot(), &env, config.server.name.clone())?;
        let metrics = Metrics::new();
        let resolver = Resolver::new(env.clone(), metrics.clone());
        let rooms = Rooms::open(&*store.snapshot(), config.server.name.clone(), signing.clone(), resolver)?;
        let (notifier, stopping) = (Notifier::new(), CancellationToken::new());
        let ephemeral = Ephemeral::new(&env, config.presence.enabled);
        let push = Push::new(metrics.clone());
        let polls = Polls::new(
            env.clone(),
            store.clone(),
            notifier.clone(),
            ephemeral.clone(),
            push.clone(),
            stopping.clone(),
        );
        let keys =
            (identity::open(&config, &env, &store, None)?, signing_keys::list_old(&*store.snapshot())?);
        let remote = Remote::open(&config, &env, &store, keys)?;
        let staged = Staged::open(&*store.snapshot())?;
        let delivery = Servers::new(
            env.clone(),
            store.clone(),
            metrics.clone(),
            remote.client.clone(),
            config.server.name.clone(),
        );
        let mails = Mails::open(&config, &env, &store, &metrics, &push)?;
        let gateways = Gateways::new(
            env.clone(),
            store.clone(),
            metrics.clone(),
            push.clone(),
            remote.web.clone(),
            mails.clone(),
        );
        let limits = RateLimits::new(env.clone(), &config.limits);
        let push_gateway = gateway::open(&config, &env, &metrics)?;
        let searching = Searching::open(&config.search, &env, &store, &config.server.data_dir);
        let bucket = remote::ports::open_to_bucket(&config, &env)?;
        let media = Media::new(&config, &env, bucket)?;
        let previews = Previews::new(&config);
        let app = App::new(Services {
            env,
            store,
            config: Arc::new(config),
            accounts,
            rooms,
            notifier,
            ended_sessions: Notifier::new(),
            metrics,
            stopping,
            signing,
            remote,
            gaps: Gaps::default(),
            completing: Completing::default(),
            policy_servers: PolicyServers::default(),
            ephemeral,
            limits,
            polls,
            push,
            running: Running::new(follow_up::carry_out),
            receipts: Receipts::default(),
            lanes: Lanes::default(),
            staged,
            sharing: Sharing::default(),
            searching,
            media,
            previews,
            delivery,
            gateways,
            mails,
            push_gateway,
        });
        let (woken, flushed) = (app.clone(), app.clone());
        let wake = move |wake| write::on_publish(&woken, wake);
        let written = readers::Written::new();
        let read_on = written.subscribe();
        flusher::start(&app.store, &app.env, wake, move |it, took| {
            flushed.notifier.wake_gathered();
            written.tell();
            flushed.metrics.flush(it.batches, it.rows, it.bytes, it.synced, took);
            flushed.metrics.queue_depth("store", flushed.store.queue_depth());
        })?;
        if let Some(lead) = &lead {
            timers::start(&app, lead);
            readers::start(&app, lead, &read_on)?;
            remote::staged::begin_all(&app);
            app.env.spawn(remote::forget::run(app.clone()));
            app.env.spawn(preview::forget(app.clone()));
            let inner = app.clone();
            app.env.spawn(async move {
                if let Err(error) = commit::clear_unfinished(&inner).await {
                    tracing::warn!(%error, "what unfinished changes have left of rooms could not be cleared");
                }
            });
        }
        app.searching.start(&app, read_on.clone());
        let restored = app.clone();
        app.env.spawn(async move { presence::restore(&restored).await });
        let router = api::router(&app);
        Ok(Self { app, router })
    }

    /// A server with the default settings over an empty store in memory, for tests of its parts.
    #[cfg(test)]
    pub(crate) fn in_memory(env: Env) -> Self {
        let memory = crate::store::engine::Memory::default();
        let durability = crate::store::Durability::Fsync;
        let store = Store::open(crate::store::Engine::Memory(memory), durability).unwrap();
        let mut config = Config::default();
        config.search.enabled = false;
        Self::start(config, env, store, Some(Lead::of_only_node())).unwrap()
    }

    /// Registers an account of this name and logs it in, for the same tests.
    #[cfg(test)]
    pub(crate) async fn register(&self, name: &str) -> crate::accounts::Caller {
        use crate::{accounts, flows::account::register};
        let wish = register::Wish {
            username: Some(name.to_owned()),
            password: None,
            log_in: Some(accounts::devices::LogIn::default()),
            refreshable: false,
        };
        let made = register::register_by_operator(&self.app, wish, None).await.unwrap();
        let token = made.session.unwrap().tokens.access_token;
        let (snapshot, now_ms) = (self.app.store.snapshot(), self.app.env.now_ms());
        accounts::tokens::find_caller(&*snapshot, now_ms, &token).unwrap()
    }

    /// The router of all endpoints, for listeners and for tests.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// Makes ready to listen: each listener that is opened there serves all endpoints.
    pub fn listening(&self) -> Listening {
        let (app, router) = (&self.app, self.router());
        Listening::new(app.env.clone(), app.metrics.clone(), router, app.stopping.clone(), &app.config.limits)
    }

    /// The parts of the server, which commands and tests work with.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// Ends every task and writes what was accepted, so that the store may be closed afterwards.
    pub async fn stop(&self) -> Result<()> {
        self.app.stopping.cancel();
        // Receipts are answered before they are written, so that they are written out before tasks end.
        receipts::write_out(&self.app).await;
        self.app.env.kill();
        self.app.env.ended().await;
        while self.app.store.queue_depth() > 0 {
            self.app.store.flush()?;
        }
        self.app.searching.close();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        ids::UserNum,
        schema::jobs::Job,
        store::{Direction, Durability, Engine, Guard, engine::Memory, timer},
    };

    #[tokio::test(start_paused = true)]
    async fn a_server_that_does_not_lead_makes_no_key_and_fires_no_timer() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let follow = |env: Env| Server::start(Config::default(), env, store.clone(), None);
        let refused = follow(Env::simulated(1, 0)).err().unwrap();
        assert!(refused.to_string().contains("only the node that leads"), "{refused}");
        assert_eq!(
            crate::schema::SERVER_FACTS.prefix::<()>(&store.view(), (), Direction::Up).unwrap().count(),
            0
        );
        let lead = Some(Lead::of_only_node());
        let leading = Server::start(Config::default(), Env::simulated(1, 0), store.clone(), lead).unwrap();
        leading.stop().await.unwrap();
        let mut batch = store.batch(&Guard::own_tables());
        let due = Job::TellRooms { user: UserNum(7) }.timer(1);
        timer::set(&mut batch, &due);
        drop(store.enqueue(batch).unwrap());
        let env = Env::simulated(2, 10);
        let following = follow(env.clone()).unwrap();
        env.sleep(Duration::from_secs(60)).await;
        assert!(timer::is_waiting(&store.view(), &due).unwrap());
        following.stop().await.unwrap();
        let env = Env::simulated(3, 10);
        let lead = Some(Lead::of_only_node());
        let _leading = Server::start(Config::default(), env.clone(), store.clone(), lead).unwrap();
        env.sleep(Duration::from_secs(5)).await;
        assert!(!timer::is_waiting(&store.view(), &due).unwrap());
    }
}
