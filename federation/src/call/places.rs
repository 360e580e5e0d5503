//! How many requests run at once, to one server and in all.
//!
//! A server that answers slowly must not take all connections, memory and waiting callers: it has a few places of
//! its own, and a short line before them. Each kind of request has places apart: what users ask for, or what others make us fetch,
//! holds up neither deliveries nor keys, the answer to a request may wait for keys, and a slow policy server holds up nothing else.
//!
//! Names of servers are cheap, so that a bound for each server alone bounds nothing: whoever pays for requests holds a share of each
//! kind, and waits behind their own requests and not before those of others.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use ruma::{OwnedServerName, ServerName};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests that run at once to one server.
const OF_SERVER_MAX: usize = 8;
/// Files that come from one server at once. A large one takes its place for long.
const FILES_OF_SERVER_MAX: usize = 16;
/// Requests that may wait for a place of one server, besides.
const WAITING_MAX: usize = 64;
/// Requests of one kind that run at once to all servers.
const ALL_MAX: usize = 512;
/// Questions for devices that run at once to all servers. One user asks many servers at once, and each answer is small.
const DEVICES_MAX: usize = 1_024;

/// Whoever pays for requests has at most one part in this many of the places of a kind.
const SHARE: usize = 8;
/// Whoever pays for files that are fetched has at most this many of the places of one server: a server that is in order holds up a file on
/// purpose, while it waits for its upload, and must not do so to what others ask of it.
const FILES_OF_PAYER_AT_SERVER_MAX: usize = 4;

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
    /// Files that users ask for, which take long to come.
    Media,
}

/// One for whom a line stands before the places of a kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Of {
    Server(OwnedServerName),
    Payer(u64),
    PayerAt(u64, OwnedServerName),
}

type Key = (Lane, Of);

/// The places of all servers. A server that nothing is asked of has no entry, nor has anybody who pays for nothing.
pub(super) struct Places {
    lines: Mutex<BTreeMap<Key, Line>>,
    requests: Arc<Semaphore>,
    devices: Arc<Semaphore>,
    deliveries: Arc<Semaphore>,
    fetches: Arc<Semaphore>,
    keys: Arc<Semaphore>,
    signatures: Arc<Semaphore>,
    media: Arc<Semaphore>,
}

struct Line {
    places: Arc<Semaphore>,
    /// Requests that run or wait.
    present: usize,
}

/// A place, given back when it is dropped.
pub(super) struct Seat {
    _all: OwnedSemaphorePermit,
    _of_server: InLine,
    _of_payer: Option<(InLine, InLine)>,
}

/// A place of one line.
struct InLine {
    // The permit goes before the line does, because fields are dropped in this order.
    _place: OwnedSemaphorePermit,
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
            media: all(),
        }
    }
}

impl Places {
    /// Waits for a place for this payer, or for none. None where the line of this server is full.
    pub(super) async fn take(
        self: &Arc<Self>,
        server: &ServerName,
        lane: Lane,
        payer: Option<u64>,
    ) -> Option<Seat> {
        let (all, count) = match lane {
            Lane::Requests => (&self.requests, ALL_MAX),
            Lane::Devices => (&self.devices, DEVICES_MAX),
            Lane::Deliveries => (&self.deliveries, ALL_MAX),
            Lane::Fetches => (&self.fetches, ALL_MAX),
            Lane::Keys => (&self.keys, ALL_MAX),
            Lane::Signatures => (&self.signatures, ALL_MAX),
            Lane::Media => (&self.media, ALL_MAX),
        };
        let (of_server_max, of_payer_max) = match lane {
            Lane::Media => (FILES_OF_SERVER_MAX, FILES_OF_PAYER_AT_SERVER_MAX),
            Lane::Requests
            | Lane::Devices
            | Lane::Deliveries
            | Lane::Fetches
            | Lane::Keys
            | Lane::Signatures => (OF_SERVER_MAX, OF_SERVER_MAX),
        };
        // First the payer's own places, then the server's: whoever waits holds none that others could use.
        let of_payer = match payer {
            Some(payer) => {
                let at_server = (lane, Of::PayerAt(payer, server.to_owned()));
                let at_server = self.enter(at_server, of_payer_max, usize::MAX).await?;
                Some((at_server, self.enter((lane, Of::Payer(payer)), count / SHARE, usize::MAX).await?))
            }
            None => None,
        };
        let of_server = (lane, Of::Server(server.to_owned()));
        let of_server = self.enter(of_server, of_server_max, of_server_max + WAITING_MAX).await?;
        let all = Arc::clone(all).acquire_owned().await.ok()?;
        Some(Seat { _all: all, _of_server: of_server, _of_payer: of_payer })
    }

    /// Waits for one of so many places of a line. None where as many run or wait as may.
    async fn enter(self: &Arc<Self>, key: Key, places: usize, present_max: usize) -> Option<InLine> {
        let (places, present) = {
            let mut lines = self.lines.lock();
            let line = lines
                .entry(key.clone())
                .or_insert_with(|| Line { places: Arc::new(Semaphore::new(places)), present: 0 });
            if line.present >= present_max {
                return None;
            }
            line.present += 1;
            (Arc::clone(&line.places), Present { places: Arc::clone(self), key })
        };
        let place = places.acquire_owned().await.ok()?;
        Some(InLine { _place: place, _present: present })
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
                seats.push(places.take(&server, Lane::Requests, None).await.unwrap());
            }
        }
        let other: &ServerName = "other.example".try_into().unwrap();
        let mut waits = Box::pin(places.take(other, Lane::Requests, None));
        assert!((&mut waits).now_or_never().is_none(), "all places for requests are taken");
        for lane in [Lane::Devices, Lane::Deliveries, Lane::Fetches, Lane::Keys] {
            assert!(places.take(other, lane, None).await.is_some(), "{lane:?}");
        }
    }

    #[tokio::test]
    async fn one_server_has_its_own_places_and_a_short_line() {
        let places = Arc::new(Places::default());
        let slow: &ServerName = "slow.example".try_into().unwrap();
        let mut seats = Vec::new();
        for _ in 0..OF_SERVER_MAX {
            seats.push(places.take(slow, Lane::Requests, None).await.unwrap());
        }
        let mut waiting: Vec<_> =
            (0..WAITING_MAX).map(|_| Box::pin(places.take(slow, Lane::Requests, None))).collect();
        for it in &mut waiting {
            assert!(it.now_or_never().is_none());
        }
        assert!(places.take(slow, Lane::Requests, None).await.is_none(), "the line is full");
        assert!(places.take(slow, Lane::Keys, None).await.is_some(), "keys wait apart");
        assert!(places.take(slow, Lane::Signatures, None).await.is_some(), "and signatures do");
        let other: &ServerName = "other.example".try_into().unwrap();
        assert!(places.take(other, Lane::Requests, None).await.is_some());
        seats.pop();
        assert!(waiting.remove(0).await.is_some());
        drop(waiting);
        drop(seats);
        assert!(places.lines.lock().is_empty());
    }

    #[tokio::test]
    async fn whoever_pays_for_requests_takes_but_a_part_of_the_places_of_one_server() {
        let places = Arc::new(Places::default());
        let slow: &ServerName = "slow.example".try_into().unwrap();
        let mut seats = Vec::new();
        for _ in 0..FILES_OF_PAYER_AT_SERVER_MAX {
            seats.push(places.take(slow, Lane::Media, Some(1)).await.unwrap());
        }
        let mut waiting: Vec<_> =
            (0..2 * WAITING_MAX).map(|_| Box::pin(places.take(slow, Lane::Media, Some(1)))).collect();
        for it in &mut waiting {
            assert!(it.now_or_never().is_none(), "the share is taken");
        }
        assert!(places.take(slow, Lane::Media, Some(2)).await.is_some(), "nothing of the server's line is");
        let other: &ServerName = "other.example".try_into().unwrap();
        assert!(places.take(other, Lane::Media, Some(1)).await.is_some(), "nor of other servers");
        seats.pop();
        assert!(waiting.remove(0).await.is_some());
        drop((waiting, seats));
        assert!(places.lines.lock().is_empty());
    }

    #[tokio::test]
    async fn whoever_pays_for_requests_has_a_share_whatever_the_names_of_servers() {
        let places = Arc::new(Places::default());
        let mut seats = Vec::new();
        let named = |number: usize| OwnedServerName::try_from(format!("s{number}.example")).unwrap();
        for number in 0..ALL_MAX / SHARE {
            seats.push(places.take(&named(number), Lane::Keys, Some(1)).await.unwrap());
        }
        let honest: &ServerName = "honest.example".try_into().unwrap();
        let mut waiting: Vec<_> =
            (0..OF_SERVER_MAX + 1).map(|_| Box::pin(places.take(honest, Lane::Keys, Some(1)))).collect();
        for it in &mut waiting {
            assert!(it.now_or_never().is_none(), "the share is taken");
        }
        assert!(places.take(honest, Lane::Keys, Some(2)).await.is_some(), "and nothing of the server's line");
        assert!(places.take(honest, Lane::Keys, None).await.is_some());
        assert!(places.take(honest, Lane::Requests, Some(1)).await.is_some(), "kinds are apart");
        seats.pop();
        assert!(waiting.remove(0).await.is_some());
        drop((waiting, seats));
        assert!(places.lines.lock().is_empty());
    }
}
