//! What people do: one use case a file. Flows wait; what they call below does not.

pub mod account;
pub mod device;
pub mod follow_up;
pub mod keys;
pub mod limits;
pub mod operator;
pub mod room;
pub(crate) mod commit;
pub(crate) mod write;

use std::{ops::Deref, sync::Arc};

use ruma::signatures::Ed25519KeyPair;
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::Accounts,
    config::Config,
    env::Env,
    metrics::Metrics,
    push::Push,
    rooms::Rooms,
    store::Store,
    sync::{Ephemeral, Notifier, Polls},
};

/// Everything that a use case works with. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<House>);

/// The parts of a running server.
pub struct House {
    /// Clock, randomness, tasks, blocking work.
    pub env: Env,
    /// The store.
    pub store: Store,
    /// The settings.
    pub config: Arc<Config>,
    /// Users' locks and sessions.
    pub accounts: Accounts,
    /// Wakes polls.
    pub notifier: Notifier,
    /// What the server counts about itself.
    pub metrics: Metrics,
    /// Cancelled when the server stops: whoever waits for long answers at once.
    pub stopping: CancellationToken,
    /// The key that signs this server's events and requests.
    pub signing: Arc<Ed25519KeyPair>,
    /// What rooms keep in memory: their locks.
    pub rooms: Rooms,
    /// Who is typing, who is there.
    pub ephemeral: Ephemeral,
    /// How fast somebody may act.
    pub limits: limits::RateLimits,
    /// What polls of `/sync` work with.
    pub polls: Polls,
    /// What push keeps in memory.
    pub push: Push,
    /// Jobs that are being carried out.
    pub running: follow_up::Running,
    /// Receipts on their way to the store.
    pub receipts: room::receipts::Receipts,
}

impl App {
    /// A handle to these parts.
    pub fn new(house: House) -> Self {
        Self(Arc::new(house))
    }
}

impl Deref for App {
    type Target = House;

    fn deref(&self) -> &House {
        &self.0
    }
}
