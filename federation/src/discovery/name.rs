//! The parts of a server's name ([grammar](https://spec.matrix.org/v1.19/appendices/#server-name)), as discovery needs them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ruma::ServerName;

/// The host of a server's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// The address itself.
    Literal(IpAddr),
    /// A name in DNS.
    Dns(String),
}

/// A server's name, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) host: Host,
    pub(crate) port: Option<u16>,
    /// The name as it was written: what the `Host` header says.
    pub(crate) written: String,
}

impl Name {
    /// Takes a name apart that follows the grammar. Errors: what is wrong with it.
    pub(crate) fn of(server: &ServerName) -> Result<Self, &'static str> {
        Self::parse(server.as_str())
    }

    /// Takes any text apart. Errors: what is wrong with it as a server's name.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let (host, port) = split(text)?;
        let port = port.map(parse_port).transpose()?;
        let written = text.to_owned();
        if let Some(inside) = host.strip_prefix('[') {
            let inside = inside.strip_suffix(']').ok_or("the bracket of an IPv6 address does not close")?;
            let address: Ipv6Addr =
                inside.parse().map_err(|_| "what stands in brackets is no IPv6 address")?;
            return Ok(Self { host: Host::Literal(address.into()), port, written });
        }
        if let Ok(address) = host.parse::<Ipv4Addr>() {
            return Ok(Self { host: Host::Literal(address.into()), port, written });
        }
        require_dns(host)?;
        Ok(Self { host: Host::Dns(host.to_ascii_lowercase()), port, written })
    }
}

fn split(text: &str) -> Result<(&str, Option<&str>), &'static str> {
    if text.starts_with('[') {
        let end = text.find(']').ok_or("the bracket of an IPv6 address does not close")?;
        let (host, rest) = text.split_at_checked(end + 1).ok_or("the name is cut off")?;
        return match rest.strip_prefix(':') {
            Some(port) => Ok((host, Some(port))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err("something that is no port follows the IPv6 address"),
        };
    }
    Ok(text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))))
}

fn parse_port(port: &str) -> Result<u16, &'static str> {
    const WRONG: &str = "the port is not a number from 1 to 65535";
    if port.is_empty() || port.len() > 5 || !port.bytes().all(|it| it.is_ascii_digit()) {
        return Err(WRONG);
    }
    port.parse().ok().filter(|port| *port > 0).ok_or(WRONG)
}

/// A name can be asked for in DNS if its labels have 1 to 63 characters, 253 in all (RFC 1035, section 2.3.4).
fn require_dns(host: &str) -> Result<(), &'static str> {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|it| it.is_ascii_alphanumeric() || it == b'-')
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    if host.len() > 253 {
        return Err("the host has more than 253 characters");
    }
    if host.split('.').all(is_label) { Ok(()) } else { Err("the host is no name that DNS can know") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let parts = |text: &str| Name::parse(text).map(|it| (it.host, it.port));
        let dns = |host: &str| Host::Dns(host.to_owned());
        assert_eq!(parts("Example.org"), Ok((dns("example.org"), None)));
        assert_eq!(parts("matrix.org:8888"), Ok((dns("matrix.org"), Some(8888))));
        assert_eq!(parts("1.2.3.4"), Ok((Host::Literal([1, 2, 3, 4].into()), None)));
        assert_eq!(parts("1.2.3.4:1234"), Ok((Host::Literal([1, 2, 3, 4].into()), Some(1234))));
        let six: IpAddr = "1234:5678::abcd".parse().unwrap();
        assert_eq!(parts("[1234:5678::abcd]"), Ok((Host::Literal(six), None)));
        assert_eq!(parts("[1234:5678::abcd]:5678"), Ok((Host::Literal(six), Some(5678))));
        assert_eq!(parts("1.2.3.400"), Ok((dns("1.2.3.400"), None)), "a name in DNS, though an odd one");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(64) + ".example";
        let longer = "a.".repeat(127) + "example";
        for wrong in [
            "",
            ":80",
            "a:",
            "a:+80",
            "a:0",
            "a:65536",
            "a:080808",
            "a:8 0",
            "[::1",
            "[::1]80",
            "[1.2.3.4]",
            "[]",
            "[::1%eth0]",
            "a..b",
            ".a",
            "a.",
            "a_b.example",
            "a b",
            "user@host",
            "a/b",
            "::1",
            "é.example",
            &long,
            &longer,
        ] {
            assert!(Name::parse(wrong).is_err(), "{wrong}");
        }
    }
}
