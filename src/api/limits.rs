//! How fast a client may ask, where the specification marks an endpoint as rate-limited: one bucket a kind of request
//! and source, in memory.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::Method;
use quick_cache::sync::Cache;

use crate::{
    config::{Bucket, Limits},
    ids::UserNum,
};

/// Buckets in memory. Above this, one that was not asked for long is forgotten: that is, full again.
const BUCKETS_MAX: usize = 100_000;

/// Which limit applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Checks of a password.
    Login,
    /// New accounts.
    Register,
    /// Events sent.
    Send,
    /// Rooms made, joins, invitations.
    Membership,
    /// The rest.
    Other,
}

impl Kind {
    /// The kind of an endpoint.
    pub(crate) fn of(method: &Method, template: &str) -> Self {
        let last = template.rsplit('/').find(|segment| !segment.starts_with('{')).unwrap_or_default();
        match last {
            "login" | "password" | "deactivate" => Self::Login,
            "register" => Self::Register,
            "send" | "redact" => Self::Send,
            "state" if method == Method::PUT => Self::Send,
            "createRoom" | "join" | "invite" | "knock" | "kick" | "ban" | "unban" | "leave" | "upgrade" => {
                Self::Membership
            }
            _ => Self::Other,
        }
    }
}

/// Who is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// An account.
    User(UserNum),
    /// An address; of IPv6 the network of 64 bits, which one household has to itself.
    Address(u128),
}

impl Source {
    /// The source of a request without a token.
    pub(crate) fn address(address: IpAddr) -> Self {
        Self::Address(match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => match address.to_ipv4_mapped() {
                Some(address) => address.to_ipv6_mapped().to_bits(),
                None => address.to_bits() >> 64 << 64,
            },
        })
    }
}

/// The buckets of one server. A bucket is the moment (microseconds of uptime) at which it would be full again.
pub(crate) struct RateLimits {
    limits: Limits,
    full_at_us: Cache<(Kind, Source), Arc<AtomicU64>>,
}

impl RateLimits {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self { limits: limits.clone(), full_at_us: Cache::new(BUCKETS_MAX) }
    }

    fn bucket(&self, kind: Kind) -> Bucket {
        match kind {
            Kind::Login => self.limits.login,
            Kind::Register => self.limits.register,
            Kind::Send => self.limits.send,
            Kind::Membership => self.limits.membership,
            Kind::Other => self.limits.other,
        }
    }

    /// Takes one from the bucket, or says how long to wait until there is one.
    pub(crate) fn take(&self, kind: Kind, source: Source, uptime: Duration) -> Result<(), Duration> {
        let bucket = self.bucket(kind);
        let one_us = (1_000_000.0 / bucket.per_second).ceil().max(1.0) as u64;
        let all_us = one_us.saturating_mul(u64::from(bucket.burst));
        let now_us = u64::try_from(uptime.as_micros()).unwrap_or(u64::MAX);
        let full_at = self
            .full_at_us
            .get_or_insert_with(&(kind, source), || Ok::<_, std::convert::Infallible>(Arc::default()));
        let full_at = full_at.unwrap_or_else(|never| match never {});
        let taken = full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let full_at = full_at.max(now_us) + one_us;
            (full_at <= now_us.saturating_add(all_us)).then_some(full_at)
        });
        taken.map(drop).map_err(|full_at| {
            Duration::from_micros((full_at + one_us).saturating_sub(now_us.saturating_add(all_us)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_granted_then_the_rate_holds_and_the_wait_is_true() {
        let limits = Limits { send: Bucket { per_second: 2.0, burst: 3 }, ..Limits::default() };
        let limits = RateLimits::new(&limits);
        let alice = Source::User(UserNum(1));
        let at = Duration::from_millis;
        for _ in 0..3 {
            limits.take(Kind::Send, alice, at(100)).unwrap();
        }
        let wait = limits.take(Kind::Send, alice, at(100)).unwrap_err();
        assert_eq!(wait, at(500));
        // Others, and other kinds, are not concerned.
        limits.take(Kind::Send, Source::User(UserNum(2)), at(100)).unwrap();
        limits.take(Kind::Membership, alice, at(100)).unwrap();
        limits.take(Kind::Send, alice, at(599)).unwrap_err();
        limits.take(Kind::Send, alice, at(600)).unwrap();
        limits.take(Kind::Send, alice, at(600)).unwrap_err();
    }

    #[test]
    fn a_household_is_one_address() {
        let source = |text: &str| Source::address(text.parse().unwrap());
        assert_eq!(source("2001:db8:1:2::1"), source("2001:db8:1:2:ffff::9"));
        assert_ne!(source("2001:db8:1:2::1"), source("2001:db8:1:3::1"));
        assert_eq!(source("192.0.2.1"), source("::ffff:192.0.2.1"));
        assert_ne!(source("192.0.2.1"), source("192.0.2.2"));
    }

    #[test]
    fn endpoints_have_the_kind_one_expects() {
        for (method, template, kind) in [
            (Method::POST, "/_matrix/client/v3/login", Kind::Login),
            (Method::POST, "/_matrix/client/v3/account/password", Kind::Login),
            (Method::POST, "/_matrix/client/v3/register", Kind::Register),
            (Method::PUT, "/_matrix/client/v3/rooms/{room_id}/send/{event_type}/{txn_id}", Kind::Send),
            (Method::PUT, "/_matrix/client/v3/rooms/{room_id}/state/{event_type}/{state_key}", Kind::Send),
            (Method::GET, "/_matrix/client/v3/rooms/{room_id}/state/{event_type}/{state_key}", Kind::Other),
            (Method::POST, "/_matrix/client/v3/join/{room_id_or_alias}", Kind::Membership),
            (Method::POST, "/_matrix/client/v3/rooms/{room_id}/invite", Kind::Membership),
            (Method::PUT, "/_matrix/client/v3/profile/{user_id}/displayname", Kind::Other),
        ] {
            assert_eq!(Kind::of(&method, template), kind, "{method} {template}");
        }
    }
}
