//! DNS over the real network, as the system is configured.

use std::{net::SocketAddr, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts},
    lookup::Lookup,
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::rr::{Name, RData, RecordType},
};

use crate::ports::{Addresses, NotResolved, Resolver, Service, Services};

/// Answers that are remembered at most.
const REMEMBERED_MAX: u64 = 10_000;
/// An answer is believed this long at most, whatever it says.
const TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// That there is no such name is believed this long at most.
const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(3600);
/// One question to one server.
const TIMEOUT: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 2;
/// What is not said holds this long.
const TTL_DEFAULT_S: u32 = 60;

/// The system's DNS. Cheap to clone.
#[derive(Clone)]
pub struct SystemDns(TokioResolver);

/// DNS cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DNS cannot be used: {0}")]
pub struct BadDns(String);

impl SystemDns {
    /// Reads the system's configuration; where it has none, a resolver on this machine is asked, as the C library does.
    /// It reads files, and is called within a runtime. Errors: [`BadDns`].
    pub fn new() -> Result<Self, BadDns> {
        let builder = TokioResolver::builder_tokio().unwrap_or_else(|error| {
            tracing::warn!(%error, "the system's configuration of DNS cannot be read; the resolver on this machine is asked");
            builder_with(&[SocketAddr::from(([127, 0, 0, 1], 53))])
        });
        Self::build(builder)
    }

    /// Asks these servers and reads no configuration. Errors: [`BadDns`].
    pub fn with_servers(servers: &[SocketAddr]) -> Result<Self, BadDns> {
        Self::build(builder_with(servers))
    }

    fn build(mut builder: Builder) -> Result<Self, BadDns> {
        bound(builder.options_mut());
        builder.build().map(Self).map_err(|error| BadDns(error.to_string()))
    }

    async fn find_addresses(&self, host: &str) -> Result<Addresses, NotResolved> {
        let found = self.0.lookup_ip(absolute(host)?).await.map_err(not_resolved)?;
        let addresses: Vec<_> = found.iter().collect();
        if addresses.is_empty() {
            return Err(NotResolved::Absent { ttl_s: TTL_DEFAULT_S });
        }
        let lookup = found.as_lookup();
        let is_alias = lookup.answers().iter().any(|it| it.record_type() == RecordType::CNAME);
        Ok(Addresses { addresses, ttl_s: ttl_s(lookup), is_alias })
    }

    async fn find_services(&self, name: &str) -> Result<Services, NotResolved> {
        let lookup = self.0.lookup(absolute(name)?, RecordType::SRV).await.map_err(not_resolved)?;
        let services: Vec<_> = lookup
            .answers()
            .iter()
            .filter_map(|record| match &record.data {
                RData::SRV(srv) => Some(Service {
                    priority: srv.priority,
                    weight: srv.weight,
                    port: srv.port,
                    host: srv.target.to_ascii().trim_end_matches('.').to_owned(),
                }),
                _ => None,
            })
            .collect();
        if services.is_empty() {
            return Err(NotResolved::Absent { ttl_s: TTL_DEFAULT_S });
        }
        Ok(Services { services, ttl_s: ttl_s(&lookup) })
    }
}

impl Resolver for SystemDns {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, NotResolved>> {
        self.find_addresses(host).boxed()
    }

    fn services<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Services, NotResolved>> {
        self.find_services(name).boxed()
    }
}

type Builder = hickory_resolver::ResolverBuilder<TokioRuntimeProvider>;

fn builder_with(servers: &[SocketAddr]) -> Builder {
    let servers = servers.iter().map(|address| {
        let mut server = NameServerConfig::udp_and_tcp(address.ip());
        for connection in &mut server.connections {
            connection.port = address.port();
        }
        server
    });
    let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
}

fn bound(options: &mut ResolverOpts) {
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.cache_size = REMEMBERED_MAX;
    options.positive_max_ttl = Some(TTL_MAX);
    options.negative_max_ttl = Some(NEGATIVE_TTL_MAX);
    options.timeout = TIMEOUT;
    options.attempts = ATTEMPTS;
    // Aliases are told to operators.
    options.preserve_intermediates = true;
}

/// The name as an absolute one, so that the system's search domains do not count.
fn absolute(name: &str) -> Result<Name, NotResolved> {
    let mut name = Name::from_ascii(name).map_err(|error| NotResolved::Failed(error.to_string()))?;
    name.set_fqdn(true);
    Ok(name)
}

#[expect(
    clippy::disallowed_methods,
    reason = "hickory says until when an answer holds on the machine's clock"
)]
fn ttl_s(lookup: &Lookup) -> u32 {
    let left = lookup.valid_until().saturating_duration_since(std::time::Instant::now());
    u32::try_from(left.as_secs()).unwrap_or(u32::MAX)
}

fn not_resolved(error: NetError) -> NotResolved {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) if !is_failure(&none) => {
            NotResolved::Absent { ttl_s: none.negative_ttl.unwrap_or(TTL_DEFAULT_S) }
        }
        other => NotResolved::Failed(other.to_string()),
    }
}

/// Whether the server failed rather than said that there is nothing.
fn is_failure(none: &hickory_resolver::net::NoRecords) -> bool {
    use hickory_resolver::proto::op::ResponseCode;
    !matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::disallowed_methods, reason = "these tests are about the real world behind the doors")]

    use std::net::Ipv4Addr;

    use hickory_resolver::proto::{
        op::{Message, MessageType, OpCode, ResponseCode},
        rr::{
            Record,
            rdata::{A, AAAA, CNAME, SRV},
        },
    };
    use tokio::net::UdpSocket;

    use super::*;

    /// The records of the test's zone.
    fn records(name: &Name, kind: RecordType) -> Result<Vec<Record>, ResponseCode> {
        let parse = |text: &str| Name::from_ascii(text).unwrap();
        let record = |owner: &str, data: RData| Record::from_rdata(parse(owner), 120, data);
        let text = name.to_ascii().to_ascii_lowercase();
        Ok(match (text.as_str(), kind) {
            ("a.example.", RecordType::A) => vec![record("a.example.", RData::A(A::new(5, 0, 0, 1)))],
            ("a.example.", RecordType::AAAA) => {
                vec![record("a.example.", RData::AAAA(AAAA::new(0x2a00, 0, 0, 0, 0, 0, 0, 1)))]
            }
            ("alias.example.", RecordType::A) => vec![
                record("alias.example.", RData::CNAME(CNAME(parse("a.example.")))),
                record("a.example.", RData::A(A::new(5, 0, 0, 1))),
            ],
            ("_matrix-fed._tcp.a.example.", RecordType::SRV) => vec![
                record("_matrix-fed._tcp.a.example.", RData::SRV(SRV::new(1, 2, 3, parse("b.example.")))),
                record("_matrix-fed._tcp.a.example.", RData::SRV(SRV::new(4, 5, 6, Name::root()))),
            ],
            ("fails.example.", _) => return Err(ResponseCode::ServFail),
            ("a.example." | "alias.example.", _) => Vec::new(),
            _ => return Err(ResponseCode::NXDomain),
        })
    }

    async fn dns() -> SystemDns {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let asked = Message::from_vec(&buffer[..length]).unwrap();
                let query = asked.queries[0].clone();
                let mut answer = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
                answer.add_query(query.clone());
                match records(query.name(), query.query_type()) {
                    Ok(records) => {
                        answer.add_answers(records);
                    }
                    Err(code) => answer.metadata.response_code = code,
                }
                let _ = socket.send_to(&answer.to_vec().unwrap(), from).await;
            }
        });
        SystemDns::with_servers(&[address]).unwrap()
    }

    #[tokio::test]
    async fn addresses_of_both_families_and_aliases_are_found() {
        let dns = dns().await;
        let found = dns.addresses("a.example").await.unwrap();
        assert_eq!(found.addresses.len(), 2, "{found:?}");
        assert!((100..=120).contains(&found.ttl_s) && !found.is_alias, "{found:?}");
        let alias = dns.addresses("alias.example").await.unwrap();
        assert_eq!(alias.addresses, [std::net::IpAddr::from([5, 0, 0, 1])]);
        assert!(alias.is_alias);
    }

    #[tokio::test]
    async fn srv_records_are_found_and_a_root_is_empty() {
        let mut found = dns().await.services("_matrix-fed._tcp.a.example").await.unwrap().services;
        found.sort_by_key(|it| it.priority);
        let first = Service { priority: 1, weight: 2, port: 3, host: "b.example".to_owned() };
        assert_eq!(found, [first, Service { priority: 4, weight: 5, port: 6, host: String::new() }]);
    }

    #[tokio::test]
    async fn nothing_and_failure_are_told_apart() {
        let dns = dns().await;
        for absent in ["none.example", "x.a.example"] {
            assert!(matches!(dns.addresses(absent).await, Err(NotResolved::Absent { .. })), "{absent}");
            assert!(matches!(dns.services(absent).await, Err(NotResolved::Absent { .. })), "{absent}");
        }
        let failed = dns.services("fails.example").await;
        assert!(matches!(failed, Err(NotResolved::Failed(_))), "{failed:?}");
        assert!(matches!(dns.addresses("fails.example").await, Err(NotResolved::Failed(_))));
        assert!(dns.addresses("a..b").await.is_err());
    }
}
