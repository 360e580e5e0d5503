//! The use cases of people, devices and the operator, one in each file. Only flows and what is above them wait (async); the
//! modules that they call do not.

pub mod account;
pub(crate) mod backup;
pub mod device;
pub mod follow_up;
pub mod jobs;
pub mod keys;
mod lanes;
pub mod limits;
pub mod media;
pub(crate) mod membership;
pub mod operator;
mod places;
pub mod room;
pub mod remote;
pub(crate) mod report;
pub(crate) mod commit;
pub(crate) mod own_events;
pub mod searching;
pub mod policy_server;
pub(crate) mod sharing;
pub(crate) mod typists;
pub(crate) mod write;

use std::{ops::Deref, sync::Arc, time::Duration};

use ruma::signatures::Ed25519KeyPair;
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::Accounts,
    config::Config,
    delivery::{gateways::Gateways, mail::Mails, servers::Servers},
    env::Env,
    error::{Error, Result},
    metrics::Metrics,
    push::Push,
    rooms::Rooms,
    store::Store,
    sync::{Ephemeral, Notifier, Polls},
};

/// Those who ask a server that stops come back after this time.
const STOPS_FOR: Duration = Duration::from_secs(10);

/// A handle to everything that a use case works with. It is cheap to clone, for clones share it.
#[derive(Clone)]
pub struct App(Arc<Services>);

/// The parts of a running server.
pub struct Services {
    /// The source of time, randomness, tasks and blocking work.
    pub env: Env,
    /// The store of everything that is durable.
    pub store: Store,
    /// The settings that the server started with.
    pub config: Arc<Config>,
    /// The part of accounts that lives in memory: users' locks, and sessions of user-interactive authentication.
    pub accounts: Accounts,
    /// Wakes the polls of users when there is something new for them.
    pub notifier: Notifier,
    /// Wakes the sockets of users of whom a session has ended.
    pub ended_sessions: Notifier,
    /// The metrics that the server counts about itself.
    pub metrics: Metrics,
    /// Cancelled when the server stops, so that requests that wait for long are answered at once.
    pub stopping: CancellationToken,
    /// The key that signs this server's events.
    pub signing: Arc<Ed25519KeyPair>,
    /// The ways to other servers.
    pub remote: remote::Remote,
    /// The rooms for which something is fetched from other servers.
    pub gaps: remote::gaps::Gaps,
    /// Wakes requests that wait for the whole state of a room.
    pub completing: room::completing::Completing,
    /// The memory of the policy servers of rooms.
    pub policy_servers: policy_server::PolicyServers,
    /// The part of rooms that lives in memory: their turns, descriptions and state resolutions.
    pub rooms: Rooms,
    /// The typing and presence of users, as they are now.
    pub ephemeral: Ephemeral,
    /// The limits on how fast a user or address may act.
    pub limits: limits::RateLimits,
    /// The memory that polls of `/sync` share.
    pub polls: Polls,
    /// The caches of push: compiled rules and judged events.
    pub push: Push,
    /// The jobs that are being carried out now.
    pub running: jobs::Running,
    /// The receipts that wait to be written to the store.
    pub receipts: room::receipts::Receipts,
    /// The turns of servers that send transactions.
    pub lanes: remote::receive::Lanes,
    /// The events of other servers that wait to be judged.
    pub staged: remote::staged::Staged,
    /// The users of whom those are still to be woken who share a room with them.
    pub sharing: sharing::Sharing,
    /// The index of search, which follows the log.
    pub searching: searching::Searching,
    /// The media repository: its files, and those that are arriving.
    pub media: media::Media,
    /// The looks at pages of the web that are under way for users, and which hosts may be asked.
    pub previews: media::preview::Previews,
    /// Tells other servers what happens here.
    pub delivery: Servers,
    /// Tells push gateways what our users are to be notified of.
    pub gateways: Gateways,
    /// Mails users who are away what they have not read.
    pub mails: Mails,
    /// The push gateway, where an app is configured for it.
    pub push_gateway: Option<push_gateway::Gateway>,
}

impl App {
    /// A handle to these parts.
    pub fn new(services: Services) -> Self {
        Self(Arc::new(services))
    }

    /// Does something to its end in a task of its own, also where the requester hangs up: what another server has a part in cannot be left half
    /// done. Errors: those of the work, and that of [`Self::broke_off`].
    pub(crate) async fn to_the_end<T: Send + 'static>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.env.spawn(async move { drop(tell.send(work.await)) });
        told.await.map_err(|_| self.broke_off(what))?
    }

    /// The error for what ended before it was done: its task panicked, or the server stops, which is nobody's fault.
    pub(crate) fn broke_off(&self, what: &str) -> Error {
        if self.stopping.is_cancelled() {
            return Error::Busy { retry_after: STOPS_FOR };
        }
        Error::broken(format!("{what} panicked before it was done"))
    }
}

impl Deref for App {
    type Target = Services;

    fn deref(&self) -> &Services {
        &self.0
    }
}
