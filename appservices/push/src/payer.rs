//! The payer of work: whoever calls, by the network that their address lies in.
//!
//! Nobody proves who they are to a push gateway, so that an address is all there is: a homeserver behind it pays for all of its users. Of
//! IPv6 one customer has many addresses, so that a network of 64 bits counts as one payer, and all payers of a network of 48 bits, which one
//! site may have to itself, have one share together.

use std::net::{IpAddr, Ipv6Addr};

/// The network of a site: an address of IPv4, or a network of 48 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Site(u128);

/// One caller, by the network of their address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Payer {
    site: Site,
    own: u128,
}

impl Payer {
    /// The payer behind this address.
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let own = v4.to_ipv6_mapped().to_bits();
                Self { site: Site(own), own }
            }
            IpAddr::V6(v6) => Self { site: Site(v6.to_bits() >> 80 << 80), own: v6.to_bits() >> 64 << 64 },
        }
    }

    /// The site that the payer belongs to, which has the share.
    pub(crate) const fn site(self) -> Site {
        self.site
    }
}

impl Site {
    /// The bytes that stand for the site in a mark.
    pub(crate) const fn bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }
}

/// The network that counts as one where something is sent to: whoever has IPv6 has a whole one of 64 bits.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_household_is_one_payer_and_a_site_has_one_share() {
        let of = |text: &str| Payer::of(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2::3"), of("2001:db8:1:2:ffff::1"));
        assert_ne!(of("2001:db8:1:2::3"), of("2001:db8:1:3::3"));
        assert_eq!(of("2001:db8:1:2::3").site(), of("2001:db8:1:3::3").site());
        assert_ne!(of("2001:db8:1:2::3").site(), of("2001:db8:2:2::3").site());
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.2").site(), of("192.0.2.1").site());
        assert_eq!(network("2001:db8:1:2::3".parse().unwrap()), network("2001:db8:1:2::4".parse().unwrap()));
    }
}
