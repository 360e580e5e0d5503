//! The settings: `conduit.toml`, and environment variables over it.

mod bounds;
mod email;
mod load;
mod s3;
mod sections;
mod size;

use serde::{Deserialize, Serialize};

pub use bounds::{ROOM_VERSIONS, UPLOAD_BYTES_MAX};
pub use email::{Email, EmailTls};
pub use load::{ENVIRONMENT_PREFIX, Problem, list_unknown_variables};
pub use s3::S3;
pub use sections::{
    Bucket, Compression, Durability, EncryptNew, Federation, Limits, Listener, Log, LogFormat, Media,
    Metrics, Outbound, Passwords, Presence, Previews, Registration, RegistrationMode, Rendezvous,
    RendezvousMode, Retention, Rooms, Search, Server, Storage, Tls,
};
pub use size::Size;

/// All settings of a server, one field a section of `conduit.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The name of this server, and how clients reach it.
    pub server: Server,
    /// The addresses where it listens for clients and other servers.
    #[serde(rename = "listener")]
    pub listeners: Vec<Listener>,
    /// Says who may make an account, and how.
    pub registration: Registration,
    /// The costs of the hashes by which passwords are kept.
    pub passwords: Passwords,
    /// The version of new rooms, and for how long redacted content is kept.
    pub rooms: Rooms,
    /// For how long messages are kept.
    pub retention: Retention,
    /// Says whether users see who is online.
    pub presence: Presence,
    /// Says who may have two devices meet here while one logs the other in.
    pub rendezvous: Rendezvous,
    /// How durable an acknowledged write is, and how much the store caches.
    pub storage: Storage,
    /// Says whether rooms are shared with other servers, and whom it trusts there.
    pub federation: Federation,
    /// Bounds of the requests that this server makes itself.
    pub outbound: Outbound,
    /// The apps that the push gateway delivers to.
    pub push_gateway: push_gateway::Settings,
    /// The mail server by which users get digests of what they have not read.
    pub email: Email,
    /// Says whether messages are searched, and what their index may take.
    pub search: Search,
    /// Where files lie that users share, how large they may be, and for how long they are kept.
    pub media: Media,
    /// Bounds of how much clients may ask for, and how often.
    pub limits: Limits,
    /// How much is logged, and in which form.
    pub log: Log,
    /// The address at which Prometheus finds the figures.
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
            retention: Retention::default(),
            presence: Presence::default(),
            rendezvous: Rendezvous::default(),
            storage: Storage::default(),
            federation: Federation::default(),
            outbound: Outbound::default(),
            push_gateway: push_gateway::Settings::default(),
            email: Email::default(),
            search: Search::default(),
            media: Media::default(),
            limits: Limits::default(),
            log: Log::default(),
            metrics: Metrics::default(),
        }
    }
}
