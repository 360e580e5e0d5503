//! For whom the server works. Places of pools and bytes in memory are shared by all, so each use of them counts for its payers,
//! and no payer holds more than its share: whoever asks for much waits behind their own requests and not before others'.
//!
//! The door of requests (`api/serve.rs`) names the payers of a request once, and all that is done for it finds them here.

use std::{
    collections::BTreeMap,
    future::Future,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use crate::{error::Result, ids::UserNum};

/// A user or an address may hold one part in this many of whatever all share.
const PARTS: usize = 4;

/// Stands before each step of a request, and counts the answer while it is being made.
pub trait Gate: Send + Sync {
    /// Begins to count the answer, if that has not begun. It fails with [`crate::error::Error::Busy`] while the payers of the
    /// request hold more than they may.
    fn pass(&self) -> Result<()>;

    /// Counts this many bytes more that are in memory for the answer. It fails with [`crate::error::Error::Busy`] where the answer becomes
    /// larger than there is room for, and others as large are being made already.
    fn grow(&self, bytes: usize) -> Result<()>;

    /// Counts the answer no more, because nothing is made of it until the next step.
    fn rest(&self);
}

tokio::task_local! {
    static PAYERS: Payers;
    static GATE: Arc<dyn Gate>;
}

/// Somebody for whom places and bytes count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Payer {
    /// The server, for work of its own. That is bounded where it is begun, so that the server has no share.
    Server,
    /// Clients that cannot be told apart, because a proxy on this machine stands for all of them. They have no share.
    Anybody,
    /// An account, from whichever address and device it asks.
    User(UserNum),
    /// An account that somebody means to log in to, by a digest of its name, whether it exists or not.
    Name(u128),
    /// An address without an account; of IPv6 the network of 64 bits, which one household has to itself.
    Address(u128),
    /// Another server that is asked for work of the server's own, by a digest of its name. Names are cheap, so that it stands beside
    /// a user where there is one.
    Peer(u64),
}

impl Payer {
    /// The payer for requests from this address.
    pub fn address(address: IpAddr) -> Self {
        if address.is_loopback() || address.is_unspecified() {
            return Self::Anybody;
        }
        Self::Address(network(address))
    }

    /// The payer, or the network of 48 bits that an address of IPv6 lies in: one site may have that to itself, and with it 65,536 of the
    /// networks that count as one address each.
    #[must_use]
    pub fn site(self) -> Self {
        match self {
            Self::Address(bits) if Ipv6Addr::from_bits(bits).to_ipv4_mapped().is_none() => {
                Self::Address(bits >> 80 << 80)
            }
            _ => self,
        }
    }

    /// The payer for what another server is asked.
    pub fn peer(server: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        server.hash(&mut hasher);
        Self::Peer(hasher.finish())
    }

    /// A number that stands for the payer where something else counts; `None` for those without a share.
    pub fn number(self) -> Option<u64> {
        match self {
            Self::Server | Self::Anybody => None,
            Self::User(_) | Self::Name(_) | Self::Address(_) | Self::Peer(_) => {
                let mut hasher = DefaultHasher::new();
                self.hash(&mut hasher);
                Some(hasher.finish())
            }
        }
    }

    /// The most of `all` that this payer may hold at once.
    fn share_of(self, all: usize) -> usize {
        match self {
            Self::Server | Self::Anybody => usize::MAX,
            Self::User(_) | Self::Name(_) | Self::Address(_) | Self::Peer(_) => (all / PARTS).max(1),
        }
    }
}

/// The address, or the network of 64 bits that it lies in.
pub fn network(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(address) => address.to_ipv6_mapped().to_bits(),
            None => address.to_bits() >> 64 << 64,
        },
    }
}

/// The payers of one piece of work. It waits in the line of the first, and is within the shares of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payers {
    first: Payer,
    second: Option<Payer>,
}

impl Payers {
    /// The payers of the server's own work.
    pub const SERVER: Self = Self::one(Payer::Server);

    /// A single payer, for work that counts for one alone.
    pub const fn one(payer: Payer) -> Self {
        Self { first: payer, second: None }
    }

    /// The payers of work of the server's own that follows from what a user did, and for which another server is asked.
    pub fn of_work(user: Option<UserNum>, server: &str) -> Self {
        let peer = Payer::peer(server);
        match user {
            Some(user) => Self { first: Payer::User(user), second: Some(peer) },
            None => Self::one(peer),
        }
    }

    /// The payers of a request: its user, if it has one, and its address.
    pub fn of_request(user: Option<UserNum>, address: IpAddr) -> Self {
        let address = Payer::address(address);
        match user {
            Some(user) => Self { first: Payer::User(user), second: Some(address) },
            None => Self::one(address),
        }
    }

    /// These payers, but in the line of `payer` and within its share. The second payer stays, or the first one if there is
    /// no second.
    pub fn led_by(self, payer: Payer) -> Self {
        Self { first: payer, second: Some(self.second.unwrap_or(self.first)) }
    }

    /// The payer in whose line the work waits.
    pub fn first(&self) -> Payer {
        self.first
    }

    /// The payer for whom alone something counts that can count once only: the address, unless many clients share it.
    pub fn narrowest(&self) -> Payer {
        match self.second {
            Some(address @ Payer::Address(_)) => address,
            _ => self.first,
        }
    }

    /// Whether somebody who has a share pays for both pieces of work.
    pub fn overlap(self, other: Self) -> bool {
        let has_share = |payer: &Payer| payer.number().is_some();
        self.each().filter(has_share).any(|payer| other.each().any(|it| it == payer))
    }

    /// Lists each of the payers once, since both may be the same.
    fn each(self) -> impl Iterator<Item = Payer> {
        [Some(self.first), self.second.filter(|second| *second != self.first)].into_iter().flatten()
    }

    /// Runs the function, such as the poll of a body; what is done for it counts for these payers.
    pub fn for_now<T>(self, call: impl FnOnce() -> T) -> T {
        PAYERS.sync_scope(self, call)
    }

    /// Runs the future; what is done for it counts for these payers.
    pub fn during<F: Future>(self, future: F) -> impl Future<Output = F::Output> + use<F> {
        PAYERS.scope(self, future)
    }
}

/// The payers of the work of the current task. A task that no request waits for works for the server.
pub fn current() -> Payers {
    PAYERS.try_with(|payers| *payers).unwrap_or(Payers::SERVER)
}

/// Runs the future; each call off the async threads for it passes the gate when its turn has come. So requests that waited in
/// line together are refused as soon as the answers to the first of them fill the share of their payers.
pub fn behind_gate<F: Future>(gate: Arc<dyn Gate>, future: F) -> impl Future<Output = F::Output> + use<F> {
    GATE.scope(gate, future)
}

/// Fails if the gate of the current task does. A task without a gate always passes. The call keeps the gate until it ends, so that
/// what it makes counts also when nobody waits for it any more.
pub(super) fn pass_gate() -> Result<Option<Arc<dyn Gate>>> {
    let gate = GATE.try_with(Arc::clone).ok();
    gate.as_ref().map_or(Ok(()), |gate| gate.pass())?;
    Ok(gate)
}

/// Runs a call off the async threads with the gate that its request has passed.
pub(super) fn with_gate<T>(gate: Option<Arc<dyn Gate>>, call: impl FnOnce() -> T) -> T {
    match gate {
        Some(gate) => GATE.sync_scope(gate, call),
        None => call(),
    }
}

/// Counts bytes that are in memory for the answer of the current request, before more of them are read. What no request waits for always
/// passes. Errors: [`crate::error::Error::Busy`], as of [`Gate::grow`].
pub fn grow(bytes: usize) -> Result<()> {
    GATE.try_with(|gate| gate.grow(bytes)).unwrap_or(Ok(()))
}

/// Says that the request of the current task waits now, and makes nothing of its answer meanwhile.
pub fn rest() {
    let _none_where_no_request_waits = GATE.try_with(|gate| gate.rest());
}

/// The amounts of one thing that payers hold, such as places of a pool or bytes in memory.
#[derive(Debug)]
pub struct Shares {
    all: usize,
    held: BTreeMap<Payer, usize>,
}

impl Shares {
    /// Shares of this amount, of which nobody holds anything yet.
    pub fn new(all: usize) -> Self {
        Self { all, held: BTreeMap::new() }
    }

    /// Shares of which each is this amount.
    pub fn of_each(share: usize) -> Self {
        Self::new(share.saturating_mul(PARTS))
    }

    /// The amount that a payer holds.
    pub fn held_by(&self, payer: Payer) -> usize {
        self.held.get(&payer).copied().unwrap_or_default()
    }

    /// The amount that a payer holds, as far as it is within the payer's share.
    pub fn held_within_share(&self, payer: Payer) -> usize {
        self.held_by(payer).min(payer.share_of(self.all))
    }

    /// The payer that would hold more than its share with this amount besides. None if all of them have room for it.
    pub fn find_without_room(&self, payers: Payers, amount: usize) -> Option<Payer> {
        payers.each().find(|payer| self.held_by(*payer).saturating_add(amount) > payer.share_of(self.all))
    }

    /// Counts an amount for each of the payers, also where that is more than a share.
    pub fn take(&mut self, payers: Payers, amount: usize) {
        if amount == 0 {
            return;
        }
        for payer in payers.each() {
            *self.held.entry(payer).or_default() += amount;
        }
    }

    /// Gives back what was taken for these payers.
    pub fn give_back(&mut self, payers: Payers, amount: usize) {
        for payer in payers.each() {
            let Some(held) = self.held.get_mut(&payer) else { continue };
            debug_assert!(*held >= amount, "more is given back than was taken");
            *held = held.saturating_sub(amount);
            if *held == 0 {
                self.held.remove(&payer);
            }
        }
    }

    /// Whether nobody holds anything.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_quarter_for_each_payer_and_everything_for_the_server() {
        let mut shares = Shares::new(16);
        let address: IpAddr = [192, 0, 2, 1].into();
        let alice = Payers::of_request(Some(UserNum(1)), address);
        let bob = Payers::of_request(Some(UserNum(2)), address);
        let carol = Payers::of_request(Some(UserNum(3)), [192, 0, 2, 2].into());
        shares.take(alice, 3);
        assert_eq!(shares.find_without_room(alice, 1), None);
        assert_eq!(shares.find_without_room(alice, 2), Some(Payer::User(UserNum(1))));
        // Bob asks from the same address, and carol does not.
        assert_eq!(shares.find_without_room(bob, 2), Some(Payer::address(address)));
        assert_eq!(shares.find_without_room(carol, 4), None);
        assert_eq!(shares.find_without_room(Payers::SERVER, 16), None);
        let proxy = Payers::of_request(None, [127, 0, 0, 1].into());
        assert_eq!(shares.find_without_room(proxy, 16), None);
        shares.give_back(alice, 3);
        assert!(shares.is_empty());
    }

    #[test]
    fn a_small_pool_still_has_a_place_for_each() {
        let mut shares = Shares::new(2);
        let alice = Payers::one(Payer::User(UserNum(1)));
        assert_eq!(shares.find_without_room(alice, 1), None);
        shares.take(alice, 1);
        assert!(shares.find_without_room(alice, 1).is_some());
    }

    #[test]
    fn a_log_in_counts_for_the_account_and_for_the_address() {
        let name = Payer::Name(7);
        let from_address = Payers::of_request(None, [192, 0, 2, 1].into()).led_by(name);
        assert_eq!(from_address.each().collect::<Vec<_>>(), [name, Payer::address([192, 0, 2, 1].into())]);
        let from_session = Payers::of_request(Some(UserNum(1)), [192, 0, 2, 1].into());
        assert_eq!(from_session.led_by(Payer::User(UserNum(1))), from_session);
    }

    #[tokio::test]
    async fn work_of_a_request_finds_its_payers() {
        assert_eq!(current(), Payers::SERVER);
        let payers = Payers::one(Payer::User(UserNum(1)));
        assert_eq!(payers.during(async { current() }).await, payers);
    }

    #[test]
    fn a_household_is_one_payer() {
        let payer = |text: &str| Payer::address(text.parse().unwrap());
        assert_eq!(payer("2001:db8:1:2::1"), payer("2001:db8:1:2:ffff::9"));
        assert_ne!(payer("2001:db8:1:2::1"), payer("2001:db8:1:3::1"));
        assert_eq!(payer("192.0.2.1"), payer("::ffff:192.0.2.1"));
        assert_eq!(payer("127.0.0.1"), Payer::Anybody);
    }

    #[test]
    fn a_site_has_many_networks_of_ipv6_and_one_address_of_ipv4() {
        let site = |text: &str| Payer::address(text.parse().unwrap()).site();
        assert_eq!(site("2001:db8:1:2::1"), site("2001:db8:1:3::9"));
        assert_ne!(site("2001:db8:1:2::1"), site("2001:db8:2:2::1"));
        assert_ne!(site("192.0.2.1"), site("192.0.2.2"));
        assert_eq!(Payer::User(UserNum(1)).site(), Payer::User(UserNum(1)));
    }
}
