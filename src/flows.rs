//! What people do: one use case a file. Flows wait; what they call below does not.

use std::{ops::Deref, sync::Arc};

use ruma::signatures::Ed25519KeyPair;

use crate::{config::Config, env::Env, store::Store};

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
    /// The key that signs this server's events and requests.
    pub signing: Arc<Ed25519KeyPair>,
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
