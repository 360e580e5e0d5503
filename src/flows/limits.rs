//! Limits on how fast a source may act. There is one bucket for each kind of act and each source, in memory.
//!
//! A route names its limit beside its handler (`src/api/client/*`, `src/api/pages.rs`). A flow that finds out that a request does more than one
//! act counts the others here with [`RateLimits::take_more`].

use std::{
    convert::Infallible,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use quick_cache::sync::Cache;
use sha2::{Digest as _, Sha256};

use crate::{
    config::{Bucket, Limits},
    env::{Env, payer::network},
    error::{Refusal, Result},
    ids::{DeviceNum, UserNum},
};

/// At most this many buckets of users, and as many of addresses and of names, are in memory. Beyond that, one that was used little is
/// forgotten, and is full when it is used again.
const BUCKETS_MAX: usize = 100_000;

/// A request that acts more than once may put its source into debt, up to this many bursts.
const DEBT_BURSTS_MAX: u64 = 9;

/// A kind of act that has a limit of its own: the setting of the same name in `[limits]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Logins and requests that may be confirmed with a password, by address or user. A password that is typed into a fallback page
    /// counts as `Register` instead, as the other stages there do.
    Login,
    /// Wrong passwords for one account, from all addresses together. Sessions of the account, and networks from which one of its
    /// devices was used lately, are counted apart, each for itself.
    Password,
    /// Requests that make an account or turn a guest into one, and stages that are completed on a fallback page.
    Register,
    /// Requests that send an event.
    Send,
    /// Requests that make a room or change somebody's membership, by act; a new name is an act in each room that shows it.
    Membership,
    /// Messages to devices, by device that is reached and by 4 KiB, and claims of one-time keys, by device.
    ToDevice,
    /// Messages to devices that other servers bring, by device that is reached and by 4 KiB, by host and by address; and claims of
    /// one-time keys by them, by device and by host.
    InboundToDevice,
    /// Answers of `/sync` that come at once, by device.
    Sync,
    /// Requests that only read.
    Read,
    /// Transactions of other servers, by address.
    Transaction,
    /// Requests that change something and have no limit of their own.
    Other,
}

impl Limit {
    /// The name of the limit's setting in `[limits]`.
    pub fn setting(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Password => "password",
            Self::Register => "register",
            Self::Send => "send",
            Self::Membership => "membership",
            Self::ToDevice => "to_device",
            Self::Sync => "sync",
            Self::Read => "read",
            Self::InboundToDevice => "inbound_to_device",
            Self::Transaction => "transaction",
            Self::Other => "other",
        }
    }
}

/// The user, device or address whose acts share a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// An account, whichever device asks.
    User(UserNum),
    /// A device of an account.
    Device(UserNum, DeviceNum),
    /// An account, as far as it is reached from this address.
    UserAt(UserNum, u128),
    /// The digest of a name under which somebody tries passwords, whether an account has it or not.
    Name(u128),
    /// An address; of IPv6 the network of 64 bits, which one household has to itself.
    Address(u128),
    /// A host on which other servers are, by the digest of its name.
    Host(u128),
}

impl Source {
    /// The host of another server, whichever of its ports that has.
    pub fn host(host: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(host).into();
        let (half, _) = digest.split_first_chunk().unwrap_or((&[0; 16], &[]));
        Self::Host(u128::from_be_bytes(*half))
    }

    /// The source of a request without a token.
    pub fn address(address: IpAddr) -> Self {
        Self::Address(network(address))
    }

    /// The account, as far as it is reached from this address.
    pub fn user_at(user: UserNum, address: IpAddr) -> Self {
        Self::UserAt(user, network(address))
    }
}

/// The buckets of one server, which clones of this share.
#[derive(Clone)]
pub struct RateLimits(Arc<Buckets>);

/// A bucket is the moment, in microseconds of uptime, at which it would be full again.
type FullAt = Cache<(Limit, Source), Arc<AtomicU64>>;

struct Buckets {
    env: Env,
    limits: Limits,
    /// The buckets of users, addresses, names and hosts are apart from each other, so that somebody with many addresses or names cannot
    /// have buckets of users forgotten.
    of_users: FullAt,
    of_addresses: FullAt,
    of_names: FullAt,
    of_hosts: FullAt,
}

impl RateLimits {
    /// Buckets that are all full.
    pub fn new(env: Env, limits: &Limits) -> Self {
        let buckets = || Cache::new(BUCKETS_MAX);
        let (of_users, of_addresses, of_names, of_hosts) = (buckets(), buckets(), buckets(), buckets());
        Self(Arc::new(Buckets { env, limits: limits.clone(), of_users, of_addresses, of_names, of_hosts }))
    }

    /// Takes one act from the bucket. Errors: 429 `M_LIMIT_EXCEEDED` with the time until there is one.
    pub fn take(&self, limit: Limit, source: Source) -> Result<()> {
        self.0.take(limit, source, 1, 0).map(drop)
    }

    /// Counts the acts of a request beyond the one that its route took, such as further invitations or targets. The source may
    /// get into debt, and then waits before its next act. Errors: 413 `M_TOO_LARGE` for more acts than a source may ever do at
    /// once, 429 `M_LIMIT_EXCEEDED` if the debt would be too large now.
    pub fn take_more(&self, limit: Limit, source: Source, count: usize) -> Result<()> {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        if count == 0 {
            return Ok(());
        }
        let bucket = self.0.bucket(limit);
        let count_max = u64::from(bucket.burst).saturating_mul(DEBT_BURSTS_MAX + 1);
        if self.0.limits.rate_limits && count > count_max {
            tracing::debug!(
                ?limit,
                ?source,
                count,
                count_max,
                "a request is refused: it does more acts at once than the limit ever allows"
            );
            let why =
                format!("The request does {count} acts of a kind of which {count_max} are allowed at once.");
            return Err(Refusal::too_large(why).into());
        }
        self.0.take_in_debt(limit, source, count)
    }

    /// Counts the acts that follow from another one and cannot be asked for in parts: a new name in each room of the source. No
    /// more of them are counted than the debt may be, so that a user of very many rooms is slowed down but never shut out. Errors:
    /// 429 `M_LIMIT_EXCEEDED` where the debt would be too large.
    pub fn take_following(&self, limit: Limit, source: Source, count: usize) -> Result<()> {
        let count_max = u64::from(self.0.bucket(limit).burst).saturating_mul(DEBT_BURSTS_MAX);
        let count = u64::try_from(count).unwrap_or(u64::MAX).min(count_max);
        self.0.take_in_debt(limit, source, count)
    }

    /// Counts the acts of a request that cannot be asked for in parts, all of them, and lets it pass where its source could act once: whoever does
    /// so much waits for all of it afterwards. The caller bounds the number. Errors: 429 `M_LIMIT_EXCEEDED` where the source has no act left.
    pub fn take_whole(&self, limit: Limit, source: Source, count: usize) -> Result<()> {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        let debt_us = self.0.bucket(limit).one_us().saturating_mul(count.saturating_sub(1));
        self.0.take(limit, source, count, debt_us).map(drop)
    }

    /// Takes one act that may have to wait, and says for how long. Errors: 429 `M_LIMIT_EXCEEDED` where it would wait longer
    /// than `patience`.
    pub fn take_soon(&self, limit: Limit, source: Source, patience: Duration) -> Result<Duration> {
        self.0.take(limit, source, 1, micros(patience))
    }

    /// Gives one act back that does not count after all, such as trying a password that was right.
    pub fn give_back(&self, limit: Limit, source: Source) {
        let one_us = self.0.bucket(limit).one_us();
        let full_at = self.0.full_at(limit, source);
        full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| Some(it.saturating_sub(one_us))).ok();
    }
}

impl Buckets {
    /// Takes `count` acts, which may put the source into debt.
    fn take_in_debt(&self, limit: Limit, source: Source, count: u64) -> Result<()> {
        let debt_us = self.bucket(limit).all_us().saturating_mul(DEBT_BURSTS_MAX);
        self.take(limit, source, count, debt_us).map(drop)
    }

    /// Takes `count` acts. Acts beyond those in the bucket may reach at most `allowance_us` into the future; the answer is how far
    /// they do.
    fn take(&self, limit: Limit, source: Source, count: u64, allowance_us: u64) -> Result<Duration> {
        if !self.limits.rate_limits {
            return Ok(Duration::ZERO);
        }
        let bucket = self.bucket(limit);
        let wanted_us = bucket.one_us().saturating_mul(count);
        let now_us = micros(self.env.uptime());
        let full_us = now_us.saturating_add(bucket.all_us());
        let taken =
            self.full_at(limit, source).fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                let full_at = full_at.max(now_us).saturating_add(wanted_us);
                (full_at <= full_us.saturating_add(allowance_us)).then_some(full_at)
            });
        match taken {
            Ok(before) => {
                let after = before.max(now_us).saturating_add(wanted_us);
                Ok(Duration::from_micros(after.saturating_sub(full_us)))
            }
            Err(full_at) => {
                let full_at = full_at.max(now_us).saturating_add(wanted_us);
                let wait = Duration::from_micros(full_at - full_us.saturating_add(allowance_us));
                tracing::debug!(?limit, ?source, count, ?wait, "refused: the source acts too fast");
                Err(Refusal::too_fast(wait).into())
            }
        }
    }

    fn full_at(&self, limit: Limit, source: Source) -> Arc<AtomicU64> {
        let buckets = match source {
            Source::Address(_) => &self.of_addresses,
            Source::Name(_) => &self.of_names,
            Source::Host(_) => &self.of_hosts,
            Source::User(_) | Source::Device(..) | Source::UserAt(..) => &self.of_users,
        };
        let found = buckets.get_or_insert_with(&(limit, source), || Ok::<_, Infallible>(Arc::default()));
        found.unwrap_or_else(|never| match never {})
    }

    fn bucket(&self, limit: Limit) -> Bucket {
        match limit {
            Limit::Login => self.limits.login,
            Limit::Password => self.limits.password,
            Limit::Register => self.limits.register,
            Limit::Send => self.limits.send,
            Limit::Membership => self.limits.membership,
            Limit::ToDevice => self.limits.to_device,
            Limit::Sync => self.limits.sync,
            Limit::Read => self.limits.read,
            Limit::InboundToDevice => self.limits.inbound_to_device,
            Limit::Transaction => self.limits.transaction,
            Limit::Other => self.limits.other,
        }
    }
}

impl Bucket {
    /// The time in which one act is earned, in microseconds.
    fn one_us(self) -> u64 {
        (1_000_000.0 / self.per_second).ceil().max(1.0) as u64
    }

    /// The time in which an empty bucket fills, in microseconds.
    fn all_us(self) -> u64 {
        self.one_us().saturating_mul(u64::from(self.burst))
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Source = Source::User(UserNum(1));
    const BOB: Source = Source::User(UserNum(2));

    fn limits(send: Bucket) -> (Env, RateLimits) {
        let env = Env::simulated(1, 0);
        (env.clone(), RateLimits::new(env, &Limits { rate_limits: true, send, ..Limits::default() }))
    }

    /// How long the caller has to wait.
    fn wait(refused: Result<()>) -> Duration {
        use ruma::api::error::{ErrorKind, RetryAfter};
        let error = refused.unwrap_err();
        let ErrorKind::LimitExceeded(data) = &error.refusal().unwrap().kind else { panic!("{error}") };
        let Some(RetryAfter::Delay(delay)) = data.retry_after else { panic!("no time is named") };
        delay
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_granted_then_the_rate_holds_and_the_wait_is_true() {
        let (env, limits) = limits(Bucket { per_second: 2.0, burst: 3 });
        for _ in 0..3 {
            limits.take(Limit::Send, ALICE).unwrap();
        }
        assert_eq!(wait(limits.take(Limit::Send, ALICE)), Duration::from_millis(500));
        // The buckets of other sources, and of other kinds of acts, are still full.
        limits.take(Limit::Send, BOB).unwrap();
        limits.take(Limit::Membership, ALICE).unwrap();
        env.sleep(Duration::from_millis(499)).await;
        limits.take(Limit::Send, ALICE).unwrap_err();
        env.sleep(Duration::from_millis(1)).await;
        limits.take(Limit::Send, ALICE).unwrap();
        limits.take(Limit::Send, ALICE).unwrap_err();
        limits.give_back(Limit::Send, ALICE);
        limits.take(Limit::Send, ALICE).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_does_much_at_once_waits_for_it_afterwards() {
        let (env, limits) = limits(Bucket { per_second: 1.0, burst: 10 });
        limits.take(Limit::Send, ALICE).unwrap();
        limits.take_more(Limit::Send, ALICE, 60).unwrap();
        assert_eq!(wait(limits.take(Limit::Send, ALICE)), Duration::from_secs(52));
        // A second request of this size would exceed the bound of the debt.
        limits.take_more(Limit::Send, ALICE, 60).unwrap_err();
        env.sleep(Duration::from_secs(52)).await;
        limits.take(Limit::Send, ALICE).unwrap();
        let refusal = limits.take_more(Limit::Send, BOB, 101).unwrap_err();
        assert_eq!(refusal.refusal().unwrap().kind, ruma::api::error::ErrorKind::TooLarge);
        limits.take_more(Limit::Send, BOB, 0).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_follows_from_an_act_is_counted_and_never_too_much() {
        let (env, limits) = limits(Bucket { per_second: 1.0, burst: 10 });
        for _ in 0..4 {
            limits.take_following(Limit::Send, ALICE, 25).unwrap();
        }
        assert_eq!(wait(limits.take_following(Limit::Send, ALICE, 25)), Duration::from_secs(25));
        env.sleep(Duration::from_secs(25)).await;
        limits.take_following(Limit::Send, ALICE, 25).unwrap();
        limits.take_following(Limit::Send, BOB, 1_000_000).unwrap();
        assert_eq!(wait(limits.take_following(Limit::Send, BOB, 1_000_000)), Duration::from_secs(80));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_one_whole_passes_once_and_is_waited_for_in_full() {
        let (env, limits) = limits(Bucket { per_second: 1.0, burst: 10 });
        for _ in 0..9 {
            limits.take(Limit::Send, ALICE).unwrap();
        }
        limits.take_whole(Limit::Send, ALICE, 1_000).unwrap();
        assert_eq!(wait(limits.take_whole(Limit::Send, ALICE, 2)), Duration::from_secs(1_000));
        assert_eq!(wait(limits.take(Limit::Send, ALICE)), Duration::from_secs(1_000));
        env.sleep(Duration::from_secs(1_000)).await;
        limits.take_whole(Limit::Send, ALICE, 1).unwrap();
        limits.take(Limit::Send, ALICE).unwrap_err();
        limits.take_whole(Limit::Send, ALICE, 0).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_act_may_wait_for_its_turn_as_long_as_there_is_patience() {
        let (_, limits) = limits(Bucket { per_second: 10.0, burst: 1 });
        let soon = || limits.take_soon(Limit::Send, ALICE, Duration::from_millis(250));
        assert_eq!(soon().unwrap(), Duration::ZERO);
        assert_eq!(soon().unwrap(), Duration::from_millis(100));
        assert_eq!(soon().unwrap(), Duration::from_millis(200));
        soon().unwrap_err();
    }

    #[test]
    fn many_addresses_do_not_make_the_bucket_of_a_user_be_forgotten() {
        let (_, limits) = limits(Bucket { per_second: 0.001, burst: 1 });
        let address = |number| Source::address(std::net::Ipv4Addr::from_bits(number).into());
        limits.take(Limit::Send, ALICE).unwrap();
        for number in 0..2 * BUCKETS_MAX as u32 {
            let _ = limits.take(Limit::Send, address(number));
        }
        limits.take(Limit::Send, ALICE).unwrap_err();
        assert!(limits.0.of_addresses.len() <= BUCKETS_MAX + BUCKETS_MAX / 100, "buckets are bounded");
        // A bucket that was forgotten is full again, so that nobody is refused for want of memory.
        let granted = (0..2 * BUCKETS_MAX as u32).filter(|it| limits.take(Limit::Send, address(*it)).is_ok());
        assert!(granted.count() >= BUCKETS_MAX / 2);
    }
}
