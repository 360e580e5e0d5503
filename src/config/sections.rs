//! One struct per section of `conduit.toml`, each with its defaults. `conduit.toml` at the top of the repository says
//! what each setting means to an operator; a test keeps the two equal.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use ruma::{OwnedServerName, RoomVersionId};
use serde::{Deserialize, Serialize};

use crate::config::Size;

/// `[server]`: who this server is.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// The part after the colon in the ids of its users. Fixed once data exists.
    pub name: OwnedServerName,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// How clients reach it; `/.well-known/matrix/client` says so.
    pub public_base_url: String,
}

/// One `[[listener]]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listener {
    /// A TCP address; not together with `unix`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// The path of a Unix socket; not together with `address`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix: Option<PathBuf>,
    /// Serve TLS with this certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Believe the last address of `X-Forwarded-For`: behind a reverse proxy only.
    pub behind_proxy: bool,
}

/// The `tls` of a listener.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// A PEM file: the certificate, then those it depends on.
    pub certificate: PathBuf,
    /// A PEM file with the private key.
    pub key: PathBuf,
}

/// `[registration]`: who may make an account.
#[derive(Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registration {
    /// Who may register.
    pub mode: RegistrationMode,
    /// Whether guests may come in without an account.
    pub guests: bool,
    /// Not empty: whoever knows it may register over `/_synapse/admin/v1/register`.
    pub shared_secret: String,
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration")
            .field("mode", &self.mode)
            .field("guests", &self.guests)
            .field("shared_secret", &if self.shared_secret.is_empty() { "" } else { "(set)" })
            .finish()
    }
}

/// Says who may register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationMode {
    /// Nobody; the operator makes accounts.
    Closed,
    /// Who has a registration token.
    #[default]
    Token,
    /// Everybody may register.
    Open,
}

/// `[passwords]`: how passwords are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Passwords {
    /// Memory of one argon2id hash, in KiB.
    pub argon2_memory_kib: u32,
    /// Passes over that memory.
    pub argon2_iterations: u32,
    /// How many threads the hash is made for.
    pub argon2_lanes: u32,
}

/// `[rooms]`: rooms.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rooms {
    /// The version of a room whose maker asks for none.
    pub default_version: RoomVersionId,
    /// For so many days moderators may see what was redacted; then it is gone. 0: at once.
    pub redacted_events_kept_days: u32,
}

impl Rooms {
    /// `redacted_events_kept_days` in milliseconds.
    pub fn redacted_events_kept_ms(&self) -> u64 {
        u64::from(self.redacted_events_kept_days) * 24 * 60 * 60 * 1000
    }
}

/// `[presence]`: who is online.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Presence {
    /// Whether users see who is online.
    pub enabled: bool,
}

impl Default for Presence {
    fn default() -> Self {
        Self { enabled: true }
    }
}

/// `[storage]`: the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// When a write counts as done.
    pub durability: Durability,
    /// The cache of blocks read from disk.
    pub cache_bytes_max: Size,
}

/// Says when a write counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// An acknowledged write survives a power cut.
    #[default]
    Fsync,
    /// An acknowledged write survives the end of the process; a power cut may lose the last moments.
    Os,
}

/// `[federation]`: other servers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Federation {
    /// Whether rooms may be shared with other servers.
    pub enabled: bool,
    /// A PEM file with certificate authorities that are trusted besides the system's. Empty: none.
    pub trusted_ca_file: PathBuf,
}

/// `[outbound]`: requests this server makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Outbound {
    /// Whether it may connect to private and loopback addresses on behalf of others.
    pub allow_private_addresses: bool,
}

/// `[limits]`: bounds of what clients may ask for.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Whether the rate limits below apply.
    pub rate_limits: bool,
    /// Bytes of bodies and answers that are in memory at once; above that, requests wait.
    pub in_flight_bytes_max: Size,
    /// Connections open at once, over all listeners.
    pub connections_max: u32,
    /// Connections open at once from one address, unless a proxy stands before the listener.
    pub connections_by_address_max: u32,
    /// Logins and other requests that check a password, by address or user.
    pub login: Bucket,
    /// Passwords tried for one account, from wherever.
    pub password: Bucket,
    /// Registrations, by address.
    pub register: Bucket,
    /// Events sent, by user.
    pub send: Bucket,
    /// Rooms made, joins, invitations, by user.
    pub membership: Bucket,
    /// Messages to devices, by user.
    pub to_device: Bucket,
    /// Answers of `/sync` that come at once, by device.
    pub sync: Bucket,
    /// Requests that only read, by user or address.
    pub read: Bucket,
    /// Everything else, by user or address.
    pub other: Bucket,
}

/// How often something may be done.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// How often in the long run.
    pub per_second: f64,
    /// How often at once, after a pause.
    pub burst: u32,
}

/// `[log]`: what is written to standard error.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`; also per module, as in `info,aqueduct::sync=debug`.
    pub level: String,
    /// The form of a line.
    pub format: LogFormat,
    /// Requests that take longer than this many milliseconds are logged with where the time went.
    pub slow_request_ms: u64,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines that people read.
    #[default]
    Text,
    /// Lines that programs read: one JSON object each.
    Json,
}

/// `[metrics]`: figures for Prometheus.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// The address of the listener that serves `/metrics`. Empty: none.
    pub address: String,
}

impl Default for Server {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "a constant, and a test parses it")]
        let name = OwnedServerName::try_from("localhost:8008").expect("a server name");
        Self { name, data_dir: "data".into(), public_base_url: "http://localhost:8008".into() }
    }
}

impl Listener {
    /// The listener of a fresh installation.
    pub fn local() -> Self {
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8008);
        Self { address: Some(address), ..Self::default() }
    }
}

impl Default for Passwords {
    fn default() -> Self {
        Self { argon2_memory_kib: 19_456, argon2_iterations: 2, argon2_lanes: 1 }
    }
}

impl Default for Rooms {
    fn default() -> Self {
        Self { default_version: RoomVersionId::V12, redacted_events_kept_days: 7 }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self { durability: Durability::Fsync, cache_bytes_max: Size::mib(256) }
    }
}

impl Default for Federation {
    fn default() -> Self {
        Self { enabled: true, trusted_ca_file: PathBuf::new() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            rate_limits: true,
            in_flight_bytes_max: Size::mib(256),
            connections_max: 10_000,
            connections_by_address_max: 500,
            login: Bucket { per_second: 1.0, burst: 30 },
            password: Bucket { per_second: 0.2, burst: 10 },
            register: Bucket { per_second: 1.0, burst: 30 },
            send: Bucket { per_second: 20.0, burst: 200 },
            membership: Bucket { per_second: 5.0, burst: 100 },
            to_device: Bucket { per_second: 100.0, burst: 5000 },
            sync: Bucket { per_second: 10.0, burst: 100 },
            read: Bucket { per_second: 100.0, burst: 1000 },
            other: Bucket { per_second: 20.0, burst: 200 },
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text, slow_request_ms: 1000 }
    }
}
