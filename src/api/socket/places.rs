//! The places of sockets: how many a device, a user, an address and the whole server have. Each socket costs memory and a
//! connection for as long as its client likes, so that all of these are bounded.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use crate::{
    accounts::Caller,
    config::Limits,
    env::{
        hold::{Hold, Kept, hold},
        payer::network,
    },
    error::{Refusal, Result, limit_exceeded},
    flows::App,
    ids::{DeviceNum, UserNum},
    metrics::Metrics,
};

/// A client for whose socket there is no place is told to come back after this time.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// The places of all sockets of a server. A clone is cheap.
#[derive(Clone)]
pub(super) struct Sockets(Arc<Inner>);

struct Inner {
    metrics: Metrics,
    all_max: usize,
    of_address_max: usize,
    of_user_max: usize,
    of_device_max: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    last: u64,
    /// The open sockets by their number, which rises, so that the oldest comes first.
    sockets: BTreeMap<u64, Owner>,
    of_address: HashMap<u128, usize>,
    of_user: HashMap<UserNum, usize>,
    of_device: HashMap<(UserNum, DeviceNum), Vec<u64>>,
}

struct Owner {
    /// The network that the client is in. None if clients cannot be told apart, as behind a proxy on this machine.
    address: Option<u128>,
    user: UserNum,
    device: DeviceNum,
    /// Dropped when the socket must make room for a newer one.
    _kept: Kept,
}

/// The place of one socket, which is free again when this is dropped.
pub(super) struct Place {
    sockets: Sockets,
    number: u64,
    hold: Hold,
}

/// Four fifths of the connections, so that other requests find a connection, too.
fn part_of(connections: u32) -> usize {
    (connections - connections / 5) as usize
}

impl Sockets {
    pub(super) fn new(app: &App) -> Self {
        Self::with(&app.config.limits, app.metrics.clone())
    }

    fn with(limits: &Limits, metrics: Metrics) -> Self {
        let all_max = (limits.sockets_max as usize).min(part_of(limits.connections_max));
        let of_address = limits.sockets_by_address_max as usize;
        Self(Arc::new(Inner {
            metrics,
            all_max,
            of_address_max: of_address.min(part_of(limits.connections_by_address_max)),
            of_user_max: limits.sockets_by_user_max as usize,
            of_device_max: limits.sockets_by_device_max as usize,
            open: Mutex::default(),
        }))
    }

    /// Takes a place for a socket of this caller. A device that has all of its places gives up that of its oldest socket.
    /// Errors: 429 `M_LIMIT_EXCEEDED` where the user, the address or the server has no place left.
    pub(super) fn take(&self, caller: &Caller, peer: IpAddr) -> Result<Place> {
        let known = !peer.is_loopback() && !peer.is_unspecified();
        self.take_for(caller.user, caller.device, known.then(|| network(peer)))
    }

    fn take_for(&self, user: UserNum, device: DeviceNum, address: Option<u128>) -> Result<Place> {
        let inner = &self.0;
        let mut open = inner.open.lock();
        let of_device = open.of_device.get(&(user, device)).map_or(0, Vec::len);
        // The oldest socket of a device gives up its place only if the newer one finds one.
        let gives_up = usize::from(of_device >= inner.of_device_max);
        let same_address = open.oldest_of(user, device).is_some_and(|owner| owner.address == address);
        let count = open.sockets.len().saturating_sub(gives_up);
        let of_user = count_of(&open.of_user, &user).saturating_sub(gives_up);
        let of_address = address.map_or(0, |address| count_of(&open.of_address, &address));
        let of_address = of_address.saturating_sub(if same_address { gives_up } else { 0 });
        let full = match () {
            () if count >= inner.all_max => "the server has all the sockets that it may have",
            () if of_user >= inner.of_user_max => "the user has too many sockets",
            () if address.is_some() && of_address >= inner.of_address_max => {
                "the address has too many sockets"
            }
            () => "",
        };
        if !full.is_empty() {
            tracing::debug!(%user, reason = full, "a socket is refused");
            let why = ["There are too many sockets: ", full, "."].concat();
            return Err(Refusal::new(limit_exceeded(RETRY_AFTER), why).into());
        }
        if gives_up > 0
            && let Some(oldest) =
                open.of_device.get(&(user, device)).and_then(|numbers| numbers.first()).copied()
        {
            open.remove(oldest);
            inner.metrics.sockets(-1);
        }
        let (kept, hold) = hold();
        open.last += 1;
        let number = open.last;
        open.sockets.insert(number, Owner { address, user, device, _kept: kept });
        open.of_device.entry((user, device)).or_default().push(number);
        *open.of_user.entry(user).or_default() += 1;
        if let Some(address) = address {
            *open.of_address.entry(address).or_default() += 1;
        }
        inner.metrics.sockets(1);
        Ok(Place { sockets: self.clone(), number, hold })
    }
}

impl Open {
    fn oldest_of(&self, user: UserNum, device: DeviceNum) -> Option<&Owner> {
        let oldest = self.of_device.get(&(user, device))?.first()?;
        self.sockets.get(oldest)
    }

    /// Takes a socket out of all counts. False if it was taken out before.
    fn remove(&mut self, number: u64) -> bool {
        let Some(Owner { address, user, device, .. }) = self.sockets.remove(&number) else { return false };
        if let Some(numbers) = self.of_device.get_mut(&(user, device)) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.of_device.remove(&(user, device));
            }
        }
        give_back(&mut self.of_user, &user);
        if let Some(address) = address {
            give_back(&mut self.of_address, &address);
        }
        true
    }
}

fn count_of<K: Hash + Eq>(counts: &HashMap<K, usize>, key: &K) -> usize {
    counts.get(key).copied().unwrap_or_default()
}

fn give_back<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    let Some(count) = counts.get_mut(key) else { return };
    debug_assert!(*count > 0, "nobody without sockets is listed");
    *count = count.saturating_sub(1);
    if *count == 0 {
        counts.remove(key);
    }
}

impl Place {
    /// Resolves when a newer socket of the device has taken the place.
    pub(super) async fn lost(&mut self) {
        self.hold.lost().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Inner { metrics, open, .. } = &*self.sockets.0;
        if open.lock().remove(self.number) {
            metrics.sockets(-1);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const HERE: Option<u128> = Some(1);
    const THERE: Option<u128> = Some(2);

    fn sockets(all: u32, of_address: u32, of_user: u32, of_device: u32) -> Sockets {
        let limits = Limits {
            sockets_max: all,
            sockets_by_address_max: of_address,
            sockets_by_user_max: of_user,
            sockets_by_device_max: of_device,
            ..Limits::default()
        };
        Sockets::with(&limits, Metrics::new())
    }

    fn take(sockets: &Sockets, user: u64, device: u32, address: Option<u128>) -> Result<Place> {
        sockets.take_for(UserNum(user), DeviceNum(device), address)
    }

    #[test]
    fn the_newest_sockets_of_a_device_have_its_places() {
        let sockets = sockets(100, 100, 100, 2);
        let mut places: Vec<_> = (0..5).map(|_| take(&sockets, 1, 1, HERE).unwrap()).collect();
        let mut other = take(&sockets, 1, 2, HERE).unwrap();
        let lost: Vec<_> = places.iter_mut().map(|place| place.lost().now_or_never().is_some()).collect();
        assert_eq!(lost, [true, true, true, false, false]);
        assert!(other.lost().now_or_never().is_none());
        drop(places);
        drop(other);
        let open = sockets.0.open.lock();
        let left = (open.sockets.len(), open.of_user.len(), open.of_address.len(), open.of_device.len());
        assert_eq!(left, (0, 0, 0, 0));
    }

    #[test]
    fn users_addresses_and_the_server_have_their_bounds() {
        let by_user = sockets(100, 100, 2, 4);
        let _held = [take(&by_user, 1, 1, HERE).unwrap(), take(&by_user, 1, 2, THERE).unwrap()];
        assert!(take(&by_user, 1, 3, HERE).is_err());
        take(&by_user, 2, 1, HERE).unwrap();
        let by_address = sockets(100, 2, 100, 4);
        let _held = [take(&by_address, 1, 1, HERE).unwrap(), take(&by_address, 2, 1, HERE).unwrap()];
        assert!(take(&by_address, 3, 1, HERE).is_err());
        take(&by_address, 3, 1, THERE).unwrap();
        let _proxy = [1, 2, 3].map(|user| take(&by_address, user, 9, None).unwrap());
        let by_all = sockets(2, 100, 100, 4);
        let held = [take(&by_all, 1, 1, HERE).unwrap(), take(&by_all, 2, 1, THERE).unwrap()];
        let refused = take(&by_all, 3, 1, None).err().unwrap();
        assert_eq!(refused.refusal().unwrap().kind.errcode().to_string(), "M_LIMIT_EXCEEDED");
        drop(held);
        take(&by_all, 3, 1, None).unwrap();
    }

    #[test]
    fn a_device_with_all_its_places_may_open_one_more_where_everything_is_full() {
        let sockets = sockets(2, 2, 2, 2);
        let mut first = take(&sockets, 1, 1, HERE).unwrap();
        let _second = take(&sockets, 1, 1, HERE).unwrap();
        assert!(take(&sockets, 1, 2, HERE).is_err(), "another device");
        assert!(first.lost().now_or_never().is_none(), "what is refused takes no place away");
        let _third = take(&sockets, 1, 1, HERE).unwrap();
        assert!(first.lost().now_or_never().is_some());
    }

    #[test]
    fn a_fifth_of_the_connections_is_for_others() {
        let limits = Limits { connections_max: 10, connections_by_address_max: 5, ..Limits::default() };
        let sockets = Sockets::with(&limits, Metrics::new());
        assert_eq!((sockets.0.all_max, sockets.0.of_address_max), (8, 4));
    }
}
