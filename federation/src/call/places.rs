//! How many requests run at once, to one server and in all.
//!
//! A server that answers slowly must not take all connections, memory and waiting callers: it has a few places of
//! its own, and a short line before them. Each kind of request has places apart: what users ask for, or what others make us fetch,
//! holds up neither deliveries nor keys, the answer to a request may wait for keys, and a slow policy server holds up nothing else.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use ruma::{OwnedServerName, ServerName};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests that run at once to one server.
const OF_SERVER_MAX: usize = 8;
/// Requests that may wait for a place of one server, besides.
const WAITING_MAX: usize = 64;
/// Requests of one kind that run at once to all servers.
const ALL_MAX: usize = 512;
/// Questions for devices that run at once to all servers. One user asks many servers at once, and each answer is small.
const DEVICES_MAX: usize = 1_024;

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Anything that is none of the others: mostly questions of users.
    Requests,
    /// Users ask for devices of others and for their keys.
    Devices,
    /// What happens here is told to other servers.
    Deliveries,
    /// The past and the states of rooms are fetched, for events of others that lack them.
    Fetches,
    /// Keys of servers.
    Keys,
    /// Signatures of policy servers.
    Signatures,
}

type Key = (Lane, OwnedServerName);

/// The places of all servers. A server that nothing is asked of has no entry.
pub(super) struct Places {
    lines: Mutex<BTreeMap<Key, Line>>,
    requests: Arc<Semaphore>,
    devices: Arc<Semaphore>,
    deliveries: Arc<Semaphore>,
    fetches: Arc<Semaphore>,
    keys: Arc<Semaphore>,
    signatures: Arc<Semaphore>,
}

struct Line {
    places: Arc<Semaphore>,
    /// Requests that run or wait.
    present: usize,
}

/// A place, given back when it is dropped.
pub(super) struct Seat {
    // The permits go before the line does, because fields are dropped in this order.
    _places: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    _present: Present,
}

/// One request in a line.
struct Present {
    places: Arc<Places>,
    key: Key,
}

impl Default for Places {
    fn default() -> Self {
        let all = || Arc::new(Semaphore::new(ALL_MAX));
        Self {
            lines: Mutex::default(),
            requests: all(),
            devices: Arc::new(Semaphore::new(DEVICES_MAX)),
            deliveries: all(),
            fetches: all(),
            keys: all(),
            signatures: all(),
        }
    }
}

impl Places {
    /// Waits for a place. None where the line of this server is full.
    pub(super) async fn take(self: &Arc<Self>, server: &ServerName, lane: Lane) -> Option<Seat> {
        let key = (lane, server.to_owned());
        let (own, present) = {
            let mut lines = self.lines.lock();
            let line = lines
                .entry(key.clone())
                .or_insert_with(|| Line { places: Arc::new(Semaphore::new(OF_SERVER_MAX)), present: 0 });
            if line.present >= OF_SERVER_MAX + WAITING_MAX {
                return None;
            }
            line.present += 1;
            (Arc::clone(&line.places), Present { places: Arc::clone(self), key })
        };
        // First the server's own place: whoever waits for a slow server holds none that others could use.
        let own = own.acquire_owned().await.ok()?;
        let all = match lane {
            Lane::Requests => &self.requests,
            Lane::Devices => &self.devices,
            Lane::Deliveries => &self.deliveries,
            Lane::Fetches => &self.fetches,
            Lane::Keys => &self.keys,
            Lane::Signatures => &self.signatures,
        };
        let all = Arc::clone(all).acquire_owned().await.ok()?;
        Some(Seat { _places: (own, all), _present: present })
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut lines = self.places.lines.lock();
        if let Some(line) = lines.get_mut(&self.key) {
            line.present = line.present.saturating_sub(1);
            if line.present == 0 {
                lines.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn one_kind_of_request_holds_up_no_other() {
        let places = Arc::new(Places::default());
        let mut seats = Vec::new();
        for number in 0..ALL_MAX / OF_SERVER_MAX {
            let server = ruma::OwnedServerName::try_from(format!("s{number}.example")).unwrap();
            for _ in 0..OF_SERVER_MAX {
                seats.push(places.take(&server, Lane::Requests).await.unwrap());
            }
        }
        let other: &ServerName = "other.example".try_into().unwrap();
        let mut waits = Box::pin(places.take(other, Lane::Requests));
        assert!((&mut waits).now_or_never().is_none(), "all places for requests are taken");
        for lane in [Lane::Devices, Lane::Deliveries, Lane::Fetches, Lane::Keys] {
            assert!(places.take(other, lane).await.is_some(), "{lane:?}");
        }
    }

    #[tokio::test]
    async fn one_server_has_its_own_places_and_a_short_line() {
        let places = Arc::new(Places::default());
        let slow: &ServerName = "slow.example".try_into().unwrap();
        let mut seats = Vec::new();
        for _ in 0..OF_SERVER_MAX {
            seats.push(places.take(slow, Lane::Requests).await.unwrap());
        }
        let mut waiting: Vec<_> =
            (0..WAITING_MAX).map(|_| Box::pin(places.take(slow, Lane::Requests))).collect();
        for it in &mut waiting {
            assert!(it.now_or_never().is_none());
        }
        assert!(places.take(slow, Lane::Requests).await.is_none(), "the line is full");
        assert!(places.take(slow, Lane::Keys).await.is_some(), "keys wait apart");
        assert!(places.take(slow, Lane::Signatures).await.is_some(), "and signatures do");
        let other: &ServerName = "other.example".try_into().unwrap();
        assert!(places.take(other, Lane::Requests).await.is_some());
        seats.pop();
        assert!(waiting.remove(0).await.is_some());
        drop(waiting);
        drop(seats);
        assert!(places.lines.lock().is_empty());
    }
}
