//! The bounds of how many deliveries run and wait, by what they could hold up.
//!
//! Endpoints are chosen by users, and some answer slowly on purpose. So a delivery takes its place in the narrowest line first: whoever
//! waits for a slow host holds no place that others could use. Names of hosts are cheap, so that the addresses behind them have lines,
//! too; and a caller has a share of all.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests of one caller that are worked on at once; more are told to come later.
const REQUESTS_OF_CALLER_MAX: usize = 128;
/// Requests of all callers that are worked on at once.
const REQUESTS_MAX: usize = 512;
/// Deliveries to endpoints of users that run at once.
const CHOSEN_MAX: usize = 512;
/// Deliveries to the providers of operators that run at once, for all apps.
const FIXED_MAX: usize = 512;
/// Names of hosts of users that are looked up at once; each takes some seconds at most.
const LOOKUPS_MAX: usize = 512;

/// One for whom a line stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Of {
    /// The requests of a caller.
    Requests(IpAddr),
    /// The deliveries of a caller to endpoints that users chose.
    Caller(IpAddr),
    /// The deliveries to one host that a user chose.
    Host(String),
    /// The deliveries to one address, whatever its names are.
    Address(IpAddr),
    /// The deliveries of one app, by its number.
    App(usize),
}

impl Of {
    /// How many run at once, and how many may be there, those that wait included.
    const fn bounds(&self) -> (usize, usize) {
        match self {
            Self::Requests(_) => (REQUESTS_OF_CALLER_MAX, REQUESTS_OF_CALLER_MAX),
            Self::Caller(_) => (128, usize::MAX),
            Self::Host(_) => (16, 16 + 128),
            Self::Address(_) => (24, 24 + 128),
            Self::App(_) => (256, 256 + 1024),
        }
    }
}

/// All lines. Whoever nothing is delivered for has none.
pub(crate) struct Lines {
    lines: Mutex<BTreeMap<Of, Line>>,
    requests: Arc<Semaphore>,
    lookups: Arc<Semaphore>,
    chosen: Arc<Semaphore>,
    fixed: Arc<Semaphore>,
}

struct Line {
    places: Arc<Semaphore>,
    /// Those that run or wait.
    present: usize,
}

/// A place in one line, given back when it is dropped.
pub(crate) struct InLine {
    // The permit goes before the line does, because fields are dropped in this order.
    _place: OwnedSemaphorePermit,
    _present: Present,
}

/// The places of one delivery, given back when it is dropped.
pub(crate) struct Seat {
    _all: OwnedSemaphorePermit,
    _lines: Vec<InLine>,
}

/// The place of one request of a homeserver.
pub(crate) struct Admitted {
    _all: OwnedSemaphorePermit,
    _of_caller: InLine,
}

struct Present {
    lines: Arc<Lines>,
    of: Of,
}

impl Default for Lines {
    fn default() -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        Self {
            lines: Mutex::default(),
            requests: places(REQUESTS_MAX),
            lookups: places(LOOKUPS_MAX),
            chosen: places(CHOSEN_MAX),
            fixed: places(FIXED_MAX),
        }
    }
}

impl Lines {
    /// Takes a place for a request at once. None where the caller, or all together, have as many as may be.
    pub(crate) fn admit(self: &Arc<Self>, caller: IpAddr) -> Option<Admitted> {
        let (present, places) = self.join(Of::Requests(network(caller)))?;
        let of_caller = InLine { _place: places.try_acquire_owned().ok()?, _present: present };
        let all = Arc::clone(&self.requests).try_acquire_owned().ok()?;
        Some(Admitted { _all: all, _of_caller: of_caller })
    }

    /// Waits for a place to look up a name.
    pub(crate) async fn look_up(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.lookups).acquire_owned().await.ok()
    }

    /// Waits for the places of a delivery to a host that a user chose, which is at this address where that is known. None where a
    /// line is full.
    pub(crate) async fn take_chosen(
        self: &Arc<Self>,
        caller: IpAddr,
        app: usize,
        host: &str,
        address: Option<IpAddr>,
    ) -> Option<Seat> {
        let mut lines = Vec::with_capacity(4);
        if let Some(address) = address {
            lines.push(self.enter(Of::Address(network(address))).await?);
        }
        lines.push(self.enter(Of::Host(host.to_owned())).await?);
        lines.push(self.enter(Of::Caller(network(caller))).await?);
        lines.push(self.enter(Of::App(app)).await?);
        let all = Arc::clone(&self.chosen).acquire_owned().await.ok()?;
        Some(Seat { _all: all, _lines: lines })
    }

    /// Waits for the places of a delivery to a provider that the operator chose. None where the line of the app is full.
    pub(crate) async fn take_fixed(self: &Arc<Self>, app: usize) -> Option<Seat> {
        let lines = vec![self.enter(Of::App(app)).await?];
        let all = Arc::clone(&self.fixed).acquire_owned().await.ok()?;
        Some(Seat { _all: all, _lines: lines })
    }

    async fn enter(self: &Arc<Self>, of: Of) -> Option<InLine> {
        let (present, places) = self.join(of)?;
        Some(InLine { _place: places.acquire_owned().await.ok()?, _present: present })
    }

    /// Joins a line without a place yet. None where it is full.
    fn join(self: &Arc<Self>, of: Of) -> Option<(Present, Arc<Semaphore>)> {
        let (running_max, present_max) = of.bounds();
        let mut lines = self.lines.lock();
        let line = lines
            .entry(of.clone())
            .or_insert_with(|| Line { places: Arc::new(Semaphore::new(running_max)), present: 0 });
        if line.present >= present_max {
            return None;
        }
        line.present += 1;
        Some((Present { lines: Arc::clone(self), of }, Arc::clone(&line.places)))
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut lines = self.lines.lines.lock();
        if let Some(line) = lines.get_mut(&self.of) {
            line.present = line.present.saturating_sub(1);
            if line.present == 0 {
                lines.remove(&self.of);
            }
        }
    }
}

/// The network that counts as one: whoever has IPv6 has a whole one of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const CALLER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn address(last: u8) -> Option<IpAddr> {
        Some([198, 51, 100, last].into())
    }

    #[tokio::test]
    async fn a_slow_address_holds_up_neither_other_hosts_nor_the_app() {
        let lines = Arc::new(Lines::default());
        let mut seats = Vec::new();
        // Many names of one address: they share its places.
        for number in 0..24 {
            seats.push(lines.take_chosen(CALLER, 0, &format!("h{number}"), address(1)).await.unwrap());
        }
        let mut waiting: Vec<_> =
            (0..128).map(|_| Box::pin(lines.take_chosen(CALLER, 0, "one-more", address(1)))).collect();
        for it in &mut waiting {
            assert!(it.now_or_never().is_none());
        }
        assert!(lines.take_chosen(CALLER, 0, "one-more", address(1)).await.is_none(), "the line is full");
        assert!(lines.take_chosen(CALLER, 0, "other", address(2)).await.is_some());
        seats.pop();
        assert!(waiting.remove(0).await.is_some());
        drop((waiting, seats));
        assert!(lines.lines.lock().is_empty());
    }

    #[tokio::test]
    async fn a_caller_has_a_share_of_the_requests() {
        let lines = Arc::new(Lines::default());
        let admitted: Vec<_> = (0..REQUESTS_OF_CALLER_MAX).map(|_| lines.admit(CALLER).unwrap()).collect();
        assert!(lines.admit(CALLER).is_none());
        let other = IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, 1]);
        assert!(lines.admit(other).is_some());
        drop(admitted);
        assert!(lines.admit(CALLER).is_some());
        assert_eq!(network(other), network([0x2001, 0xdb8, 0, 1, 5, 6, 7, 8].into()));
    }

    #[tokio::test]
    async fn the_line_of_an_app_is_bounded() {
        let lines = Arc::new(Lines::default());
        let mut seats = Vec::new();
        for _ in 0..256 {
            seats.push(lines.take_fixed(3).await.unwrap());
        }
        let mut waiting: Vec<_> = (0..1024).map(|_| Box::pin(lines.take_fixed(3))).collect();
        for it in &mut waiting {
            assert!(it.now_or_never().is_none());
        }
        assert!(lines.take_fixed(3).await.is_none());
        assert!(lines.take_fixed(4).await.is_some(), "another app has places of its own");
        drop(seats);
        assert!(waiting.remove(0).await.is_some());
    }
}
