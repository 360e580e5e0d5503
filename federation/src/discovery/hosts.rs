//! Where hosts are: each is looked up once, and guarded.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use url::{Host as UrlHost, Url};

use crate::{
    discovery::{NotFound, name::Host, services},
    guard::{Forbidden, Guard},
    ports::{NotResolved, Place, Resolver, Target},
};

/// One DNS look-up takes at most this long.
pub(super) const DNS_TIMEOUT: Duration = Duration::from_secs(10);

/// Finds hosts.
pub(crate) struct Hosts {
    resolver: Arc<dyn Resolver>,
    guard: Guard,
    /// Whether hosts are resolved by a forward proxy, which guards them, too.
    leaves_names_to_proxy: bool,
}

/// Where a host is.
pub(crate) struct Located {
    pub(crate) place: Place,
    pub(super) ttl_s: u32,
    pub(super) is_alias: bool,
    /// An address that was left out, and why.
    left_out: Option<Forbidden>,
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Addresses(admitted) => {
                let list: Vec<_> = admitted.as_slice().iter().map(ToString::to_string).collect();
                write!(f, "connect to {}", list.join(", "))?;
            }
            Place::Names(names) => {
                let list: Vec<_> = names.iter().map(|(host, port)| format!("{host}:{port}")).collect();
                write!(f, "connect to {} through the proxy", list.join(", "))?;
            }
        }
        self.left_out.as_ref().map_or(Ok(()), |forbidden| write!(f, "; left out: {forbidden}"))
    }
}

impl Hosts {
    /// Finds hosts by this resolver, and only those that the guard admits; or leaves them to a forward proxy.
    pub(crate) fn new(resolver: Arc<dyn Resolver>, guard: Guard, leaves_names_to_proxy: bool) -> Self {
        Self { resolver, guard, leaves_names_to_proxy }
    }

    /// Where this URL leads, whose scheme is `https` or `http`: it is looked up now and guarded, whoever named it. Errors: [`NotFound`].
    pub(crate) async fn find_url(&self, url: &Url) -> Result<Target, NotFound> {
        let bad = |why| NotFound::BadName { server: url.host_str().unwrap_or_default().to_owned(), why };
        let has_tls = match url.scheme() {
            "https" => true,
            "http" => false,
            _ => return Err(bad("the scheme of its URL is neither https nor http")),
        };
        let (host, written) = match url.host() {
            // The parser of URLs has made an address of each form of one, so that no other form is taken for a name.
            Some(UrlHost::Domain(name)) if services::is_host(name) => {
                (Host::Dns(name.to_owned()), name.to_owned())
            }
            Some(UrlHost::Domain(_)) => return Err(bad("it is no name that DNS can know")),
            Some(UrlHost::Ipv4(address)) => (Host::Literal(address.into()), address.to_string()),
            Some(UrlHost::Ipv6(address)) => (Host::Literal(address.into()), format!("[{address}]")),
            None => return Err(bad("the URL names no host")),
        };
        let tls_name = match &host {
            Host::Literal(address) => address.to_string(),
            Host::Dns(name) => name.clone(),
        };
        let tls_name = has_tls.then_some(tls_name);
        let host_header = url.port().map_or_else(|| written.clone(), |port| format!("{written}:{port}"));
        let port = url.port_or_known_default().unwrap_or(if has_tls { 443 } else { 80 });
        let place = self.locate(&host, port).await?.place;
        Ok(Target { place, tls_name, host_header })
    }

    /// Where a host can be connected to: looked up once, and guarded here.
    pub(super) async fn locate(&self, host: &Host, port: u16) -> Result<Located, NotFound> {
        match host {
            Host::Literal(address) => self.admit(&address.to_string(), vec![*address], port, u32::MAX, false),
            Host::Dns(name) if self.leaves_names_to_proxy && services::is_address(name) => {
                Err(NotFound::NoAddress { host: name.clone() })
            }
            Host::Dns(name) if self.leaves_names_to_proxy => Ok(Located {
                place: Place::Names(vec![(name.clone(), port)]),
                ttl_s: u32::MAX,
                is_alias: false,
                left_out: None,
            }),
            Host::Dns(name) => {
                let answer = tokio::time::timeout(DNS_TIMEOUT, self.resolver.addresses(name)).await;
                match answer {
                    Ok(Ok(it)) => self.admit(name, alternate(it.addresses), port, it.ttl_s, it.is_alias),
                    Ok(Err(NotResolved::Absent { .. })) => Err(NotFound::NoAddress { host: name.clone() }),
                    Ok(Err(NotResolved::Failed(why))) => Err(NotFound::Failed { host: name.clone(), why }),
                    Err(_) => Err(NotFound::Failed {
                        host: name.clone(),
                        why: "DNS did not answer in time".to_owned(),
                    }),
                }
            }
        }
    }

    fn admit(
        &self,
        host: &str,
        addresses: Vec<IpAddr>,
        port: u16,
        ttl_s: u32,
        is_alias: bool,
    ) -> Result<Located, NotFound> {
        let left_out = addresses.iter().find_map(|it| self.guard.require(*it).err());
        let sockets = addresses.into_iter().map(|address| SocketAddr::new(address, port));
        match self.guard.admit(sockets) {
            Ok(admitted) => Ok(Located { place: Place::Addresses(admitted), ttl_s, is_alias, left_out }),
            Err(Some(forbidden)) => Err(NotFound::Forbidden { host: host.to_owned(), forbidden }),
            Err(None) => Err(NotFound::NoAddress { host: host.to_owned() }),
        }
    }
}

/// Lets the families take turns, IPv6 first ([RFC 8305](https://www.rfc-editor.org/rfc/rfc8305.html), section 4), so that a
/// family that does not work here costs one attempt.
fn alternate(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let (six, four): (Vec<_>, Vec<_>) = addresses.into_iter().partition(IpAddr::is_ipv6);
    let (mut six, mut four) = (six.into_iter(), four.into_iter());
    let mut ordered = Vec::new();
    loop {
        let pair = (six.next(), four.next());
        if pair == (None, None) {
            return ordered;
        }
        ordered.extend(pair.0);
        ordered.extend(pair.1);
    }
}
