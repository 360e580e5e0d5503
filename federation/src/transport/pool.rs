//! Connections that are kept for the next request.
//!
//! A connection serves a target if its certificate was valid for the target's name, and if it leads to one of the addresses that
//! the target may be reached at *now*: so a connection never outlives the guard or the DNS answer that let it be opened.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use parking_lot::Mutex;

use crate::{
    ports::{Clock, Place, Target},
    transport::connect::Reached,
};

/// Connections that are kept at most; each costs a socket and some ten kilobytes.
const KEPT_MAX: usize = 512;
/// Connections of HTTP/1.1 that are kept for one name.
const KEPT_OF_NAME_MAX: usize = 8;
/// A connection that was not used for this long is closed: most servers close it about then.
const KEPT_MS: u64 = 60_000;
/// A connection that should be ready is given this long.
const READY_TIMEOUT: Duration = Duration::from_secs(1);

/// An open connection.
pub(super) enum Connection {
    /// HTTP/1.1: one request at a time.
    One(http1::SendRequest<Full<Bytes>>),
    /// HTTP/2: many.
    Many(http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    fn is_closed(&self) -> bool {
        match self {
            Self::One(sender) => sender.is_closed(),
            Self::Many(sender) => sender.is_closed(),
        }
    }

    async fn is_ready(&mut self) -> bool {
        let ready = async {
            match self {
                Self::One(sender) => sender.ready().await,
                Self::Many(sender) => sender.ready().await,
            }
        };
        tokio::time::timeout(READY_TIMEOUT, ready).await.is_ok_and(|it| it.is_ok())
    }
}

/// A connection, and what it may serve.
pub(super) struct Pooled {
    pub(super) tls_name: Option<String>,
    pub(super) reached: Reached,
    pub(super) connection: Connection,
}

impl Pooled {
    fn serves(&self, target: &Target) -> bool {
        self.tls_name == target.tls_name
            && match (&target.place, &self.reached) {
                (Place::Addresses(admitted), Reached::Address(address)) => {
                    admitted.as_slice().contains(address)
                }
                (Place::Names(names), Reached::Name(host, port)) => {
                    names.iter().any(|(name, its_port)| name == host && its_port == port)
                }
                (Place::Addresses(_), Reached::Name(..)) | (Place::Names(_), Reached::Address(_)) => false,
            }
    }
}

struct Kept {
    pooled: Pooled,
    since_ms: u64,
}

/// The connections that are kept, the one that was used last at the end.
pub(super) struct Pool {
    kept: Mutex<VecDeque<Kept>>,
    clock: Arc<dyn Clock>,
}

impl Pool {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { kept: Mutex::new(VecDeque::new()), clock }
    }

    /// A connection for this target, if one is kept that still lives.
    pub(super) async fn take(&self, target: &Target) -> Option<Pooled> {
        while let Some(mut pooled) = self.next(target) {
            if pooled.connection.is_ready().await {
                return Some(pooled);
            }
        }
        None
    }

    fn next(&self, target: &Target) -> Option<Pooled> {
        let mut kept = self.kept.lock();
        self.clear(&mut kept);
        let at = kept.iter().rposition(|it| it.pooled.serves(target))?;
        let Kept { pooled, .. } = kept.remove(at)?;
        if let Connection::Many(sender) = &pooled.connection {
            // It stays for others, as one that was just used.
            let connection = Connection::Many(sender.clone());
            let (tls_name, reached) = (pooled.tls_name.clone(), pooled.reached.clone());
            let since_ms = self.clock.now_ms();
            kept.push_back(Kept { pooled: Pooled { tls_name, reached, connection }, since_ms });
        }
        Some(pooled)
    }

    /// Keeps a connection for the next request, if it has TLS: one without has no name that could tell whom it serves.
    pub(super) fn put(&self, pooled: Pooled) {
        if pooled.tls_name.is_none() {
            return;
        }
        let mut kept = self.kept.lock();
        self.clear(&mut kept);
        let same = |it: &Kept| it.pooled.tls_name == pooled.tls_name && it.pooled.reached == pooled.reached;
        let is_many = |it: &Kept| matches!(it.pooled.connection, Connection::Many(_));
        if matches!(pooled.connection, Connection::Many(_)) && kept.iter().any(|it| same(it) && is_many(it)) {
            return;
        }
        let of_name = kept.iter().filter(|it| it.pooled.tls_name == pooled.tls_name).count();
        let first_of_name = kept.iter().position(|it| it.pooled.tls_name == pooled.tls_name);
        if let Some(first) = first_of_name.filter(|_| of_name >= KEPT_OF_NAME_MAX) {
            kept.remove(first);
        }
        if kept.len() >= KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(Kept { pooled, since_ms: self.clock.now_ms() });
    }

    /// Closes what was not used for long; what is from the future was put there before the clock went back.
    fn clear(&self, kept: &mut VecDeque<Kept>) {
        let now_ms = self.clock.now_ms();
        kept.retain(|it| {
            let is_recent = (it.since_ms..it.since_ms.saturating_add(KEPT_MS)).contains(&now_ms);
            is_recent && !it.pooled.connection.is_closed()
        });
    }
}
