//! Where this server may connect to, and with whom it talks at all.
//!
//! Other servers name hosts to us: in events, in well-known answers, in redirects, in DNS. Without a guard anyone could make
//! us send requests into the operator's own network. So every address goes through [`Guard::admit`] after DNS,
//! and only what it admits can be connected to: a [`Target`](crate::ports::Target) holds [`Admitted`] addresses, which exist
//! only where a guard made them, and nothing looks a name up a second time.
//!
//! The addresses that are refused are those that are not reachable by everyone, by the
//! [registry for IPv4](https://www.iana.org/assignments/iana-ipv4-special-registry) and
//! [for IPv6](https://www.iana.org/assignments/iana-ipv6-special-registry). Forms of IPv6 that carry an IPv4 address are
//! refused too, but for NAT64 of public addresses, without which a host that has IPv6 alone would reach nobody.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ruma::ServerName;

/// At most this many addresses are tried for one server: each may cost the time of a connection that fails.
pub const ADDRESSES_MAX: usize = 16;

/// Addresses that a [`Guard`] admitted, in the order in which they are tried. There is at least one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Admitted(Vec<SocketAddr>);

impl Admitted {
    /// The addresses in their order.
    pub fn as_slice(&self) -> &[SocketAddr] {
        &self.0
    }

    /// These addresses, then those, up to [`ADDRESSES_MAX`].
    pub(crate) fn then(mut self, others: &Self) -> Self {
        for address in &others.0 {
            if self.0.len() < ADDRESSES_MAX && !self.0.contains(address) {
                self.0.push(*address);
            }
        }
        self
    }
}

/// An address that may not be connected to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address} is {kind}; to allow it, add its network to federation.networks_allowed")]
pub struct Forbidden {
    /// The address that was found.
    pub address: IpAddr,
    /// What it is, in words.
    pub kind: &'static str,
}

/// Networks in IPv4 that are not everyone's, with what they are.
const CLOSED_V4: [(&str, u8, &str); 16] = [
    ("0.0.0.0", 8, "unspecified (0.0.0.0/8)"),
    ("10.0.0.0", 8, "private (10.0.0.0/8)"),
    ("100.64.0.0", 10, "of a provider's inner network (100.64.0.0/10)"),
    ("127.0.0.0", 8, "this machine (127.0.0.0/8)"),
    ("169.254.0.0", 16, "link-local (169.254.0.0/16)"),
    ("172.16.0.0", 12, "private (172.16.0.0/12)"),
    ("192.0.0.0", 24, "reserved for protocols (192.0.0.0/24)"),
    ("192.0.2.0", 24, "for documentation (192.0.2.0/24)"),
    ("192.31.196.0", 24, "reserved (192.31.196.0/24)"),
    ("192.88.99.0", 24, "a relay of 6to4 (192.88.99.0/24)"),
    ("192.168.0.0", 16, "private (192.168.0.0/16)"),
    ("198.18.0.0", 15, "for benchmarks (198.18.0.0/15)"),
    ("198.51.100.0", 24, "for documentation (198.51.100.0/24)"),
    ("203.0.113.0", 24, "for documentation (203.0.113.0/24)"),
    ("224.0.0.0", 4, "multicast (224.0.0.0/4)"),
    ("240.0.0.0", 4, "reserved (240.0.0.0/4)"),
];

/// Networks inside IPv6's global range that are not everyone's; all that is outside `2000::/3` is refused anyhow.
const CLOSED_V6: [(&str, u8, &str); 4] = [
    ("2001::", 23, "reserved for protocols (2001::/23)"),
    ("2001:db8::", 32, "for documentation (2001:db8::/32)"),
    ("2002::", 16, "an IPv4 address in a form of 6to4 (2002::/16)"),
    ("3fff::", 20, "for documentation (3fff::/20)"),
];

/// Says which addresses may be connected to.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    allowed: Vec<IpNet>,
}

impl Guard {
    /// A guard that also lets addresses of these networks pass, which others cannot reach: those of a closed federation.
    pub const fn new(allowed: Vec<IpNet>) -> Self {
        Self { allowed }
    }

    /// Admits those of the addresses that may be connected to, at most [`ADDRESSES_MAX`], in their order.
    /// Errors: the first that is refused, where none may; nothing at all for no address.
    pub fn admit(
        &self,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Admitted, Option<Forbidden>> {
        let mut refused = None;
        let mut admitted = Vec::new();
        for address in addresses {
            match self.require(address.ip()) {
                Ok(()) if admitted.len() < ADDRESSES_MAX && !admitted.contains(&address) => {
                    admitted.push(address);
                }
                Ok(()) => {}
                Err(forbidden) => {
                    refused.get_or_insert(forbidden);
                }
            }
        }
        if admitted.is_empty() { Err(refused) } else { Ok(Admitted(admitted)) }
    }

    /// Whether this address may be connected to. Errors: what it is instead.
    pub fn require(&self, address: IpAddr) -> Result<(), Forbidden> {
        let is_allowed = |it: IpAddr| self.allowed.iter().any(|network| network.contains(&it));
        // An operator who allows 10.0.0.0/8 means those hosts, however the address is written.
        if is_allowed(address) || is_allowed(address.to_canonical()) {
            return Ok(());
        }
        let kind = match address {
            IpAddr::V4(v4) => closed_v4(v4),
            IpAddr::V6(v6) => closed_v6(v6),
        };
        kind.map_or(Ok(()), |kind| Err(Forbidden { address, kind }))
    }
}

fn closed_v4(address: Ipv4Addr) -> Option<&'static str> {
    CLOSED_V4.into_iter().find_map(|(network, prefix, kind)| {
        let network = Ipv4Net::new(network.parse().ok()?, prefix).ok()?;
        network.contains(&address).then_some(kind)
    })
}

fn closed_v6(address: Ipv6Addr) -> Option<&'static str> {
    if address.to_ipv4_mapped().is_some() {
        return Some("an IPv4 address in a form of IPv6 (::ffff:0:0/96)");
    }
    let octets = address.octets();
    // The well-known prefix of NAT64 (RFC 6052): the last four bytes are where the packet goes.
    if let Some(&[a, b, c, d]) = octets.strip_prefix(&[0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0]) {
        return closed_v4(Ipv4Addr::new(a, b, c, d))
            .map(|_| "an IPv4 address that is not public, in a form of NAT64 (64:ff9b::/96)");
    }
    if address.is_loopback() {
        return Some("this machine (::1)");
    }
    if address.is_unspecified() {
        return Some("unspecified (::)");
    }
    if address.is_unique_local() {
        return Some("private (fc00::/7)");
    }
    if address.is_unicast_link_local() {
        return Some("link-local (fe80::/10)");
    }
    if address.is_multicast() {
        return Some("multicast (ff00::/8)");
    }
    // Addresses of hosts are given out from this range alone (RFC 4291, section 2.4, and IANA's registry).
    if octets.first().is_none_or(|first| first >> 5 != 0b001) {
        return Some("outside the public range of IPv6 (2000::/3)");
    }
    CLOSED_V6.into_iter().find_map(|(network, prefix, kind)| {
        let network = Ipv6Net::new(network.parse().ok()?, prefix).ok()?;
        network.contains(&address).then_some(kind)
    })
}

/// Reads a network as an operator writes it: `10.0.0.0/8`, `fd00::/8`, or one address.
/// Errors: a sentence that says what was expected.
pub fn parse_network(text: &str) -> Result<IpNet, String> {
    let single = |address: IpAddr| IpNet::from(address);
    text.parse()
        .or_else(|_| text.parse().map(single))
        .map_err(|_| format!("expected a network such as \"10.0.0.0/8\" or one address; found {text:?}"))
}

/// Servers that we talk with, or hosts: all but those that are denied, or only those that are allowed.
#[derive(Clone, Debug, Default)]
pub struct ServerList {
    allow: Vec<String>,
    deny: Vec<String>,
}

impl ServerList {
    /// A list of patterns, in which `*` stands for any characters and `?` for one. A pattern is held against the
    /// server's name, and against its host alone, so that `example.org` also means `example.org:8448`; case does not count. No
    /// pattern in `allow` allows all; `deny` is the stronger one.
    pub fn new<P: AsRef<str>>(allow: &[P], deny: &[P]) -> Self {
        let lower = |patterns: &[P]| patterns.iter().map(|it| it.as_ref().to_ascii_lowercase()).collect();
        Self { allow: lower(allow), deny: lower(deny) }
    }

    /// Whether we talk with this server.
    pub fn allows(&self, server: &ServerName) -> bool {
        self.allows_either(server.as_str(), server.host())
    }

    /// Whether we ask this host for pages of the web: a name in DNS or an address, without brackets.
    pub fn allows_host(&self, host: &str) -> bool {
        self.allows_either(host, host)
    }

    fn allows_either(&self, name: &str, host: &str) -> bool {
        let (name, host) = (name.to_ascii_lowercase(), host.to_ascii_lowercase());
        let is_in = |patterns: &[String]| patterns.iter().any(|it| matches(it, &name) || matches(it, &host));
        !is_in(&self.deny) && (self.allow.is_empty() || is_in(&self.allow))
    }
}

/// Whether the whole text follows the pattern, in which `*` stands for any characters and `?` for one byte. It takes at most pattern
/// times text steps, whatever the pattern is.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (mut pattern, mut text) = (pattern.as_bytes(), text.as_bytes());
    // The pattern after the last `*`, and the text that this `*` may swallow one byte more of.
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        match (pattern.split_first(), text.split_first()) {
            (Some((b'*', rest)), _) => {
                retry = Some((rest, text));
                pattern = rest;
            }
            (None, None) => return true,
            (Some((it, after)), Some((byte, rest))) if *it == b'?' || it == byte => {
                (pattern, text) = (after, rest);
            }
            _ => {
                let Some((after, skipped)) = retry else { return false };
                let Some((_, skipped)) = skipped.split_first() else { return false };
                retry = Some((after, skipped));
                (pattern, text) = (after, skipped);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(guard: &Guard, address: &str) -> bool {
        guard.require(address.parse().unwrap()).is_ok()
    }

    #[test]
    fn every_network_of_the_lists_is_one() {
        for (network, prefix, _) in CLOSED_V4 {
            let net = Ipv4Net::new(network.parse().unwrap(), prefix).unwrap();
            assert_eq!(net.network(), net.addr(), "{network}");
        }
        for (network, prefix, _) in CLOSED_V6 {
            let net = Ipv6Net::new(network.parse().unwrap(), prefix).unwrap();
            assert_eq!(net.network(), net.addr(), "{network}");
        }
    }

    #[test]
    fn only_public_addresses_are_admitted() {
        let guard = Guard::default();
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "64:ff9b::a00:1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:10::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "4000::1",
        ] {
            assert!(!allows(&guard, address), "{address}");
        }
        for address in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00::1",
            "2400:cb00::1",
            "3ffe::1",
            "64:ff9b::101:101",
        ] {
            assert!(allows(&guard, address), "{address}");
        }
    }

    #[test]
    fn an_allowed_network_is_admitted_in_every_form() {
        let guard = Guard::new(vec![parse_network("10.0.0.0/8").unwrap(), parse_network("fd00::7").unwrap()]);
        for address in ["10.1.2.3", "::ffff:10.1.2.3", "fd00::7"] {
            assert!(allows(&guard, address), "{address}");
        }
        for address in ["127.0.0.1", "fd00::8", "64:ff9b::a01:203"] {
            assert!(!allows(&guard, address), "{address}");
        }
        assert!(parse_network("10.0.0.0/40").is_err());
        assert!(parse_network("example.org").is_err());
    }

    #[test]
    fn what_may_not_be_connected_to_is_left_out() {
        let guard = Guard::default();
        let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
        let admitted =
            guard.admit([socket("127.0.0.1:1"), socket("1.1.1.1:1"), socket("1.1.1.1:1")]).unwrap();
        assert_eq!(admitted.as_slice(), [socket("1.1.1.1:1")]);
        let refused = guard.admit([socket("127.0.0.1:1"), socket("10.0.0.1:1")]).unwrap_err().unwrap();
        assert_eq!(refused.address, socket("127.0.0.1:1").ip());
        assert_eq!(guard.admit([]), Err(None));
        let many = (0..100_u16).map(|port| SocketAddr::new([1, 1, 1, 1].into(), port));
        assert_eq!(guard.admit(many).unwrap().as_slice().len(), ADDRESSES_MAX);
    }

    #[test]
    fn servers_are_allowed_and_denied_by_patterns() {
        let list = |allow: &[&str], deny: &[&str], server: &str| {
            ServerList::new(allow, deny).allows(server.try_into().unwrap())
        };
        assert!(list(&[], &[], "example.org"));
        assert!(!list(&[], &["*"], "example.org"));
        assert!(!list(&[], &["*.evil.example"], "a.EVIL.example:8448"));
        assert!(list(&[], &["*.evil.example"], "evil.example"));
        assert!(list(&["*.school.example", "school.example"], &[], "school.example:443"));
        assert!(!list(&["*.school.example"], &[], "example.org"));
        assert!(!list(&["*"], &["example.org"], "example.org:1"));
        assert!(!list(&["h?.example"], &[], "h12.example"));
        assert!(list(&["h?.example"], &[], "h1.example"));
        assert!(list(&["[fd00::*"], &[], "[fd00::1]:8448"));
    }

    #[test]
    fn a_hostile_pattern_takes_no_long_time() {
        let pattern = "*a".repeat(60) + "b";
        assert!(!matches(&pattern, &"a".repeat(230)));
        assert!(matches("*a*b", "xxaxxbxxab"));
        assert!(matches("", "") && !matches("", "a") && matches("**", ""));
    }
}
