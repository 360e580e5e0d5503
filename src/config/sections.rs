//! One struct per section of `conduit.toml`, each with its defaults. `conduit.toml` at the top of the repository says
//! what each setting means to an operator; a test keeps the two equal.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use ruma::{OwnedServerName, RoomVersionId};
use serde::{Deserialize, Serialize};

use crate::config::{S3, Size};

/// `[server]`: who this server is.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// The part after the colon in the ids of its users. It cannot change once data exists, because stored ids contain it.
    pub name: OwnedServerName,
    /// The directory that holds everything the server keeps.
    pub data_dir: PathBuf,
    /// The URL by which clients reach the server; `/.well-known/matrix/client` says it.
    pub public_base_url: String,
}

/// `[[listener]]`: an address where the server listens; each has a section of its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listener {
    /// A TCP address; not together with `unix`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// The path of a Unix socket; not together with `address`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix: Option<PathBuf>,
    /// The certificate with which it serves TLS; without one it serves plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Whether the last address of `X-Forwarded-For` is believed. Anybody can write that header, so only behind a reverse proxy.
    pub behind_proxy: bool,
}

/// `tls` of a `[[listener]]`: the files with which it serves TLS.
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
    /// Who may register an account.
    pub mode: RegistrationMode,
    /// Whether guests may come in without an account.
    pub guests: bool,
    /// A secret with which one may register over `/_synapse/admin/v1/register`; where it is empty, nobody may.
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
    /// Nobody may register; the operator makes accounts.
    Closed,
    /// Only who has a registration token may register.
    #[default]
    Token,
    /// Everybody who can reach the server may register.
    Open,
}

/// `[passwords]`: how passwords are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Passwords {
    /// The memory that one argon2id hash takes, in KiB.
    pub argon2_memory_kib: u32,
    /// The number of passes over that memory.
    pub argon2_iterations: u32,
    /// The number of lanes of the hash: as many threads can compute it together.
    pub argon2_lanes: u32,
}

/// `[rooms]`: how new rooms are made, for how long redacted content is kept, and which events may be scheduled.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rooms {
    /// The version of a room whose maker asks for none.
    pub default_version: RoomVersionId,
    /// The new rooms that are end-to-end encrypted though their maker does not say so.
    pub encrypt_new: EncryptNew,
    /// The number of days in which moderators may see redacted content; then it is deleted. With 0 it is deleted at once.
    pub redacted_events_kept_days: u32,
    /// The number of events that a user may have scheduled at a time (MSC4140). With 0 nobody may schedule any.
    pub delayed_events_max: u32,
    /// The number of days by which an event may be delayed at most.
    pub delay_max_days: u32,
}

/// Says which new rooms are encrypted by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EncryptNew {
    /// No room, so that clients decide.
    #[default]
    Off,
    /// Rooms that not everybody may enter: their join rule is not `public`.
    Invite,
    /// Every room that is made here.
    All,
}

impl Rooms {
    /// `redacted_events_kept_days` in milliseconds.
    pub fn redacted_events_kept_ms(&self) -> u64 {
        u64::from(self.redacted_events_kept_days) * 24 * 60 * 60 * 1000
    }

    /// `delay_max_days` in milliseconds.
    pub fn delay_max_ms(&self) -> u64 {
        u64::from(self.delay_max_days) * 24 * 60 * 60 * 1000
    }
}

/// `[retention]`: for how long messages are kept (MSC1763). What is 0 is not bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// The number of days for which messages are kept in rooms whose state does not say it.
    pub default_days: u32,
    /// The least number of days that a room can have, whatever its state says.
    pub min_days: u32,
    /// The greatest number of days that a room can have, whatever its state says.
    pub max_days: u32,
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

/// `[rendezvous]`: the meeting of two devices while one logs the other in by a QR code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rendezvous {
    /// Who may begin such a meeting.
    pub mode: RendezvousMode,
}

/// Says who may begin a rendezvous.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RendezvousMode {
    /// Nobody may, and the endpoints are not there.
    Off,
    /// Users of this server may, as MSC4388 recommends.
    #[default]
    Users,
    /// Everybody who can reach the server may, as MSC4108 of 2024 has it.
    Everybody,
}

/// `[storage]`: the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// Says when a write counts as done, and is acknowledged.
    pub durability: Durability,
    /// The size of the cache of blocks that were read from disk.
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
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Federation {
    /// Whether rooms may be shared with other servers.
    pub enabled: bool,
    /// A PEM file with certificate authorities that are trusted besides the system's; empty for none.
    pub trusted_ca_file: PathBuf,
    /// Patterns of servers that this one talks with; with none, it talks with all.
    pub allow: Vec<String>,
    /// Patterns of servers that this one does not talk with, even where `allow` names them.
    pub deny: Vec<String>,
    /// Servers that are asked for keys of servers that do not answer.
    pub notaries: Vec<OwnedServerName>,
    /// Networks that it may connect to although they are not public: those of a closed federation.
    pub networks_allowed: Vec<String>,
    /// The URL of an HTTP proxy that all requests to other servers go through; empty for none. It may hold a password.
    pub proxy: String,
    /// Whether other servers may read the public directory of rooms.
    pub public_rooms: bool,
    /// Whether servers that share a room with a user are told how present the user is.
    pub presence: bool,
}

impl std::fmt::Debug for Federation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Federation")
            .field("enabled", &self.enabled)
            .field("trusted_ca_file", &self.trusted_ca_file)
            .field("allow", &self.allow)
            .field("deny", &self.deny)
            .field("notaries", &self.notaries)
            .field("networks_allowed", &self.networks_allowed)
            .field("proxy", &if self.proxy.is_empty() { "" } else { "(set)" })
            .field("public_rooms", &self.public_rooms)
            .field("presence", &self.presence)
            .finish()
    }
}

/// `[outbound]`: requests this server makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Outbound {
    /// Whether it may connect to private and loopback addresses where others name the host, as a server, a push gateway or a page.
    pub allow_private_addresses: bool,
}

/// `[search]`: the search in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Search {
    /// Whether messages are indexed and searched.
    pub enabled: bool,
    /// The memory in which words are gathered before they are written to the disk.
    pub writer_bytes_max: Size,
    /// The number of milliseconds for which changes are gathered before they are written to the index, or a quarter of it where a
    /// search waits for them.
    pub delay_ms: u64,
}

/// `[media]`: files that users upload, and those of other servers. What is 0 is not bounded.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Media {
    /// The directory of the files; empty for `media` in the data directory.
    pub directory: PathBuf,
    /// The size of one upload at most.
    pub upload_bytes_max: Size,
    /// The size of all files of one user.
    pub user_bytes_max: Size,
    /// The size of all files together, thumbnails and files of other servers included.
    pub server_bytes_max: Size,
    /// The number of URIs of one user to which nothing was uploaded yet.
    pub pending_uploads_max: u32,
    /// The number of hours after which such a URI ends.
    pub pending_upload_hours: u32,
    /// The size of one file of another server at most.
    pub remote_bytes_max: Size,
    /// Whether the endpoints that ask for no access token give new files, too.
    pub unauthenticated: bool,
    /// The number of pixels of an image of which thumbnails are made, at most.
    pub thumbnail_pixels_max: u32,
    /// The number of days after which a file of a user of this server is deleted, if nobody has asked for it.
    pub local_kept_days: u32,
    /// The number of days after which a file of another server is deleted, if nobody has asked for it.
    pub remote_kept_days: u32,
    /// Whether this server looks at pages of the web for its users, and at which.
    pub previews: Previews,
    /// Whether images that users upload become smaller files.
    pub compression: Compression,
    /// The bucket in which files lie in place of the disk.
    pub s3: S3,
}

/// `[media.compression]`: how images that users of this server upload become smaller files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Compression {
    /// Whether images become smaller at all.
    pub images: bool,
    /// The quality of JPEG files, from 1 to 100.
    pub jpeg_quality: u8,
    /// The longer side has at most this many pixels; 0 for as many as it had.
    pub side_max: u32,
    /// Whether the file that was uploaded is kept, too, for operators.
    pub keep_original: bool,
}

impl Default for Compression {
    fn default() -> Self {
        Self { images: false, jpeg_quality: 85, side_max: 4096, keep_original: true }
    }
}

/// `[media.previews]`: the previews of URLs that clients ask for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Previews {
    /// Whether this server asks for pages, to tell its users what they are about.
    pub enabled: bool,
    /// Patterns of the hosts that are asked; empty for all.
    pub allow: Vec<String>,
    /// Patterns of hosts that are not asked, even where `allow` names them.
    pub deny: Vec<String>,
    /// The languages in which pages are asked for, as the header `Accept-Language` has them.
    pub accept_language: String,
}

impl Default for Previews {
    fn default() -> Self {
        Self { enabled: false, allow: Vec::new(), deny: Vec::new(), accept_language: "en".to_owned() }
    }
}

/// `[limits]`: bounds of what clients may ask for.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Whether the rate limits below apply.
    pub rate_limits: bool,
    /// At most this many bytes of bodies and answers are in memory at once; above that, requests wait.
    pub in_flight_bytes_max: Size,
    /// At most this many connections are open at once, over all listeners.
    pub connections_max: u32,
    /// At most this many connections are open at once from one address, unless a proxy stands before the listener.
    pub connections_by_address_max: u32,
    /// At most this many WebSockets are open at once, and never more than four fifths of the connections; 0 for none.
    pub sockets_max: u32,
    /// At most this many WebSockets are open at once from one address, and never more than four fifths of its connections.
    pub sockets_by_address_max: u32,
    /// At most this many WebSockets of one user are open at once.
    pub sockets_by_user_max: u32,
    /// At most this many WebSockets of one device are open at once; one more ends the oldest.
    pub sockets_by_device_max: u32,
    /// The rate of logins and of requests that are confirmed with a password, for each address or user; fallback pages take
    /// [`Limits::register`].
    pub login: Bucket,
    /// The rate of wrong passwords for one account, from all addresses together.
    pub password: Bucket,
    /// The rate of registrations and of stages on fallback pages, for each address.
    pub register: Bucket,
    /// The rate of events that are sent, for each user.
    pub send: Bucket,
    /// The rate of new rooms, joins and invitations, for each user; a new name counts once for each room that shows it.
    pub membership: Bucket,
    /// The rate of messages to devices, for each user; a message counts for each device that it reaches and each 4 KiB,
    /// a claim of one-time keys for each device.
    pub to_device: Bucket,
    /// The rate of messages to devices that other servers bring, for each of their hosts and each address; counted as `to_device`.
    pub inbound_to_device: Bucket,
    /// The rate of answers of `/sync` that come at once, for each device. A poll that comes too soon waits for its turn.
    pub sync: Bucket,
    /// The rate of requests that only read, for each user or address.
    pub read: Bucket,
    /// The rate of transactions of other servers, for each address.
    pub transaction: Bucket,
    /// The rate of all other requests, for each user or address.
    pub other: Bucket,
}

/// A rate limit: how often something may be done.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// How many times a second it may be done in the long run.
    pub per_second: f64,
    /// How many times it may be done at once, after a pause.
    pub burst: u32,
}

/// `[log]`: what is written to standard error.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`; also per module, as in `info,aqueduct::sync=debug`.
    pub level: String,
    /// The form in which each line is written.
    pub format: LogFormat,
    /// Requests that take longer than this many milliseconds are logged with where the time went.
    pub slow_request_ms: u64,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Each line is text that people read.
    #[default]
    Text,
    /// Each line is one JSON object, which programs read.
    Json,
}

/// `[metrics]`: figures for Prometheus.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// The address of the listener that serves `/metrics`; empty for none.
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
        Self {
            default_version: RoomVersionId::V12,
            encrypt_new: EncryptNew::Off,
            redacted_events_kept_days: 7,
            delayed_events_max: 100,
            delay_max_days: 31,
        }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self { durability: Durability::Fsync, cache_bytes_max: Size::mib(256) }
    }
}

impl Default for Federation {
    fn default() -> Self {
        Self {
            enabled: true,
            trusted_ca_file: PathBuf::new(),
            allow: Vec::new(),
            deny: Vec::new(),
            notaries: Vec::new(),
            networks_allowed: Vec::new(),
            proxy: String::new(),
            public_rooms: false,
            presence: true,
        }
    }
}

impl Default for Search {
    fn default() -> Self {
        Self { enabled: true, writer_bytes_max: Size::mib(64), delay_ms: 1000 }
    }
}

impl Default for Media {
    fn default() -> Self {
        Self {
            directory: PathBuf::new(),
            upload_bytes_max: Size::mib(100),
            user_bytes_max: Size::mib(0),
            server_bytes_max: Size::mib(0),
            pending_uploads_max: 20,
            pending_upload_hours: 24,
            remote_bytes_max: Size::mib(100),
            unauthenticated: false,
            thumbnail_pixels_max: 32_000_000,
            local_kept_days: 0,
            remote_kept_days: 0,
            previews: Previews::default(),
            compression: Compression::default(),
            s3: S3::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            rate_limits: true,
            in_flight_bytes_max: Size::mib(256),
            connections_max: 10_000,
            connections_by_address_max: 500,
            sockets_max: 8_000,
            sockets_by_address_max: 250,
            sockets_by_user_max: 50,
            sockets_by_device_max: 4,
            login: Bucket { per_second: 1.0, burst: 30 },
            password: Bucket { per_second: 0.2, burst: 10 },
            register: Bucket { per_second: 1.0, burst: 30 },
            send: Bucket { per_second: 20.0, burst: 200 },
            membership: Bucket { per_second: 5.0, burst: 100 },
            to_device: Bucket { per_second: 100.0, burst: 5000 },
            inbound_to_device: Bucket { per_second: 500.0, burst: 20_000 },
            sync: Bucket { per_second: 10.0, burst: 100 },
            read: Bucket { per_second: 100.0, burst: 1000 },
            transaction: Bucket { per_second: 50.0, burst: 1000 },
            other: Bucket { per_second: 20.0, burst: 200 },
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text, slow_request_ms: 1000 }
    }
}
