//! The settings: `conduit.toml`, and environment variables over it.

mod check;
mod load;
mod sections;
mod size;

use serde::{Deserialize, Serialize};

pub use check::ROOM_VERSIONS;
pub use load::{ENVIRONMENT_PREFIX, Problem};
pub use sections::{
    Bucket, Durability, Federation, Limits, Listener, Log, LogFormat, Metrics, Outbound, Passwords, Presence,
    Registration, RegistrationMode, Rooms, Server, Storage, Tls,
};
pub use size::Size;

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Who this server is.
    pub server: Server,
    /// Where it listens.
    #[serde(rename = "listener")]
    pub listeners: Vec<Listener>,
    /// Who may make an account.
    pub registration: Registration,
    /// How passwords are kept.
    pub passwords: Passwords,
    /// Rooms made here.
    pub rooms: Rooms,
    /// Who is online.
    pub presence: Presence,
    /// The store.
    pub storage: Storage,
    /// Other servers.
    pub federation: Federation,
    /// Requests this server makes.
    pub outbound: Outbound,
    /// Bounds.
    pub limits: Limits,
    /// What is logged.
    pub log: Log,
    /// Figures for Prometheus.
    pub metrics: Metrics,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            server: Server::default(),
            listeners: vec![Listener::local()],
            registration: Registration::default(),
            passwords: Passwords::default(),
            rooms: Rooms::default(),
            presence: Presence::default(),
            storage: Storage::default(),
            federation: Federation::default(),
            outbound: Outbound::default(),
            limits: Limits::default(),
            log: Log::default(),
            metrics: Metrics::default(),
        }
    }
}
