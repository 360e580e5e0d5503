//! A small set over real sockets and real TLS, on loopback.

#![expect(clippy::disallowed_methods, reason = "these tests are about the real world behind the doors")]

use std::{
    convert::Infallible,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use http::{Request, Response, StatusCode, Version};
use http_body_util::{Full, StreamBody, combinators::BoxBody};
use hyper::{body::Frame, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, pem::PemObject},
    },
};

use super::*;
use crate::{
    call::{Caller, Failure, Options},
    discovery::Discovery,
    guard::{Guard, ServerList, parse_network},
    json::Limits,
    ports::{Place, Ports},
    testing::Net,
};

struct Spawner;

impl Tasks for Spawner {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        drop(tokio::spawn(task));
    }
}

struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        since.as_millis().try_into().unwrap()
    }
}

/// A certificate authority, with its certificate in a file.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    file: tempfile::NamedTempFile,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(certificate.pem().as_bytes()).unwrap();
        Self { issuer: Issuer::new(params, key), file }
    }

    fn trust(&self) -> Trust {
        Trust::only(&[self.file.path()]).unwrap()
    }

    fn https(&self) -> Https {
        Https::new(&self.trust(), None, Arc::new(SystemClock), Arc::new(Spawner))
    }

    /// What a server with a certificate for this name needs.
    fn server(&self, name: &str, alpn: &[&[u8]]) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|it| it.to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    }
}

type Reply = Response<BoxBody<Bytes, Infallible>>;

fn reply(status: u16, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(BoxBody::new(Full::new(body.into())));
    *reply.status_mut() = StatusCode::from_u16(status).unwrap();
    reply
}

/// A body that goes on with this piece, after a pause each time.
fn endless(piece: Bytes, pause: Duration) -> Reply {
    let pieces = futures_util::stream::unfold(piece, move |piece| async move {
        tokio::time::sleep(pause).await;
        Some((Ok(Frame::data(piece.clone())), piece))
    });
    Response::new(BoxBody::new(StreamBody::new(pieces)))
}

/// A server on loopback; it counts the connections that it takes.
struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn start(
        tls: TlsAcceptor,
        handler: impl Fn(Request<Incoming>) -> Reply + Clone + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let server = Self { address: listener.local_addr().unwrap(), connections: Arc::default() };
        let connections = Arc::clone(&server.connections);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let (tls, handler) = (tls.clone(), handler.clone());
                tokio::spawn(async move {
                    let Ok(stream) = tls.accept(tcp).await else { return };
                    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let service = service_fn(move |request| {
                        let reply = handler(request);
                        async move { Ok::<_, Infallible>(reply) }
                    });
                    let io = TokioIo::new(stream);
                    if is_http2 {
                        let builder =
                            hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
                        let _ = builder.serve_connection(io, service).await;
                    } else {
                        let _ =
                            hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                    }
                });
            }
        });
        server
    }

    fn count(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

const BOTH: &[&[u8]] = &[b"h2", b"http/1.1"];
const ONE: &[&[u8]] = &[b"http/1.1"];

fn loopback() -> Guard {
    Guard::new(vec![parse_network("127.0.0.0/8").unwrap()])
}

fn target(addresses: &[SocketAddr], tls_name: &str, host_header: &str) -> Target {
    let admitted = loopback().admit(addresses.iter().copied()).unwrap();
    let (tls_name, host_header) = (Some(tls_name.to_owned()), host_header.to_owned());
    Target { place: Place::Addresses(admitted), tls_name, host_header }
}

fn get(path: &str) -> Request<Bytes> {
    Request::get(path).body(Bytes::new()).unwrap()
}

async fn read(response: Response<Body>) -> String {
    let pieces: Vec<_> = response.into_body().collect().await;
    let bytes: Vec<u8> = pieces.into_iter().flat_map(Result::unwrap).collect();
    String::from_utf8(bytes).unwrap()
}

/// Tells what arrived.
fn echo(request: Request<Incoming>) -> Reply {
    let host = request.headers().get("host").map(|it| it.to_str().unwrap().to_owned());
    let authority = request.uri().authority().map(ToString::to_string);
    let path = request.uri().path_and_query().unwrap();
    reply(200, format!("{:?} {path} host={host:?} authority={authority:?}", request.version()))
}

#[tokio::test]
async fn host_header_and_certificate_are_the_targets_and_connections_are_used_again() {
    let authority = Authority::new();
    for (alpn, expected) in [
        (ONE, r#"HTTP/1.1 /_matrix/x?y=%20 host=Some("a.example:8448") authority=None"#),
        (BOTH, r#"HTTP/2.0 /_matrix/x?y=%20 host=None authority=Some("a.example:8448")"#),
    ] {
        let server = Server::start(authority.server("a.example", alpn), echo).await;
        let https = authority.https();
        let target = target(&[server.address], "a.example", "a.example:8448");
        for _ in 0..3 {
            let response = https.send(target.clone(), get("/_matrix/x?y=%20")).await.unwrap();
            assert_eq!(read(response).await, expected);
        }
        assert_eq!(server.count(), 1);
    }
}

#[tokio::test]
async fn a_connection_serves_no_other_name_and_no_other_address() {
    let authority = Authority::new();
    let server = Server::start(authority.server("a.example", BOTH), echo).await;
    let https = authority.https();
    read(https.send(target(&[server.address], "a.example", "a.example"), get("/")).await.unwrap()).await;
    let other = https.send(target(&[server.address], "b.example", "b.example"), get("/")).await;
    assert!(matches!(other, Err(NotSent::Certificate(_))), "{other:?}");
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let moved = https.send(target(&[closed], "a.example", "a.example"), get("/")).await;
    assert!(matches!(moved, Err(NotSent::Unreachable(_))), "{moved:?}");
}

#[tokio::test]
async fn only_trusted_authorities_count() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = Server::start(authority.server("a.example", BOTH), echo).await;
    let sent = other.https().send(target(&[server.address], "a.example", "a.example"), get("/")).await;
    assert!(matches!(sent, Err(NotSent::Certificate(_))), "{sent:?}");
    let both = Trust::load(&[other.file.path(), authority.file.path()]).unwrap();
    let https = Https::new(&both, None, Arc::new(SystemClock), Arc::new(Spawner));
    assert!(https.send(target(&[server.address], "a.example", "a.example"), get("/")).await.is_ok());
    let missing = Trust::load(&["/nowhere/ca.pem"]).err().unwrap();
    assert!(missing.to_string().starts_with("federation.trusted_ca_file: /nowhere/ca.pem: "));
    let mut none = tempfile::NamedTempFile::new().unwrap();
    none.write_all(b"no certificate").unwrap();
    assert!(Trust::load(&[none.path()]).is_err());
}

#[tokio::test]
async fn a_server_may_be_an_address_with_a_certificate_for_it() {
    let authority = Authority::new();
    let server = Server::start(authority.server("127.0.0.1", ONE), echo).await;
    let sent = authority.https().send(target(&[server.address], "127.0.0.1", "127.0.0.1"), get("/x")).await;
    assert_eq!(read(sent.unwrap()).await, r#"HTTP/1.1 /x host=Some("127.0.0.1") authority=None"#);
}

#[tokio::test]
async fn an_address_that_does_not_work_costs_a_moment() {
    let authority = Authority::new();
    let server = Server::start(authority.server("a.example", BOTH), echo).await;
    let wrong_name = Server::start(authority.server("b.example", BOTH), echo).await;
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    // It takes connections and says nothing; the one that proves its name is used.
    let addresses = [closed, wrong_name.address, server.address, silent.local_addr().unwrap()];
    let sent = authority.https().send(target(&addresses, "a.example", "a.example"), get("/")).await;
    assert!(sent.is_ok(), "{sent:?}");
}

#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_replaced() {
    let authority = Authority::new();
    let tls = authority.server("a.example", ONE);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    // It answers one request for each connection, says that it keeps it open, and closes it at the next request.
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                let mut stream = tls.accept(tcp).await.unwrap();
                let mut buffer = [0; 1024];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    let https = authority.https();
    let target = target(&[address], "a.example", "a.example");
    for _ in 0..3 {
        assert_eq!(read(https.send(target.clone(), get("/")).await.unwrap()).await, "ok");
    }
    // What may be done once only is not sent again.
    let post = Request::post("/").body(Bytes::from("{}")).unwrap();
    assert!(matches!(https.send(target, post).await, Err(NotSent::Broken(_))));
}

#[tokio::test]
async fn headers_that_are_too_long_are_refused() {
    let authority = Authority::new();
    for alpn in [ONE, BOTH] {
        let server = Server::start(authority.server("a.example", alpn), |request| {
            let mut reply = reply(200, "ok");
            if request.uri().path() == "/long" {
                reply.headers_mut().insert("x-long", "x".repeat(10_000).parse().unwrap());
            }
            reply
        });
        let server = server.await;
        let https = authority.https();
        let target = target(&[server.address], "a.example", "a.example");
        assert!(https.send(target.clone(), get("/")).await.is_ok());
        let long = https.send(target, get("/long")).await;
        assert!(matches!(long, Err(NotSent::Broken(_))), "{long:?}");
    }
}

/// A caller over the real transport, in a simulated DNS in which `a.example` is at `address`, by an SRV record of `service`.
fn caller(authority: &Authority, address: SocketAddr, name: &str) -> Caller {
    let net = Net::new(1);
    net.host("host.example", &["127.0.0.1"]);
    net.services(&format!("_matrix-fed._tcp.{name}"), &[(1, 1, "host.example", address.port())]);
    let ports = Ports { transport: Arc::new(authority.https()), ..net.ports() };
    let discovery = Discovery::new(ports.clone(), loopback(), false);
    Caller::new(ports, discovery, ServerList::default())
}

#[tokio::test]
async fn the_target_of_an_srv_record_proves_the_name_that_was_asked_for() {
    let authority = Authority::new();
    let server = Server::start(authority.server("a.example", BOTH), echo).await;
    let call = async |name: &str| {
        caller(&authority, server.address, name)
            .call(
                name.try_into().unwrap(),
                get("/x"),
                Options { limits: Limits::bytes(1000), ..Options::default() },
            )
            .await
    };
    let reply = call("a.example").await.unwrap();
    assert_eq!(reply.answer.bytes(), r#"HTTP/2.0 /x host=None authority=Some("a.example")"#);
    // The same machine is no proof for another name.
    let failure = call("b.example").await.unwrap_err();
    assert!(matches!(failure, Failure::Unreachable(NotSent::Certificate(_))), "{failure}");
}

#[tokio::test]
async fn slow_and_endless_bodies_are_given_up() {
    let authority = Authority::new();
    for alpn in [ONE, BOTH] {
        let server =
            Server::start(authority.server("a.example", alpn), |request| match request.uri().path() {
                "/slow" => endless(Bytes::from_static(b"x"), Duration::from_millis(50)),
                _ => endless(Bytes::from_static(&[b'x'; 10_000]), Duration::ZERO),
            })
            .await;
        let caller = caller(&authority, server.address, "a.example");
        let options = Options {
            overall: Duration::from_millis(500),
            limits: Limits::bytes(5_000_000),
            ..Options::default()
        };
        let slow = caller.call("a.example".try_into().unwrap(), get("/slow"), options).await;
        assert!(matches!(slow, Err(Failure::TimedOut)), "{slow:?}");
        let options = Options { overall: Duration::from_secs(30), ..options };
        let endless = caller.call("a.example".try_into().unwrap(), get("/endless"), options).await;
        assert!(matches!(endless, Err(Failure::Nonsense(_))), "{endless:?}");
    }
}

/// A proxy that lets names through to `address`, if it is given these credentials.
async fn proxy(address: SocketAddr, credentials: &'static str) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(tcp.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                let is_good = head.starts_with("CONNECT a.example:8448 HTTP/1.1\r\nHost: a.example:8448\r\n")
                    && head.contains(&format!("\r\nProxy-Authorization: Basic {credentials}\r\n"));
                if !is_good {
                    let _ = tcp.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").await;
                    return;
                }
                tcp.write_all(b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n").await.unwrap();
                let mut server = TcpStream::connect(address).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut tcp, &mut server).await;
            });
        }
    });
    at
}

#[tokio::test]
async fn a_forward_proxy_is_told_name_and_port() {
    let authority = Authority::new();
    let server = Server::start(authority.server("a.example", BOTH), echo).await;
    // The user `u:s` would end early, so it is written with its escape; the password is `p@ß`.
    let address = proxy(server.address, "dTpwQMOf").await;
    let target = |host: &str| Target {
        place: Place::Names(vec![(host.to_owned(), 8448)]),
        tls_name: Some("a.example".to_owned()),
        host_header: "a.example".to_owned(),
    };
    let https = |url: String| {
        Https::new(
            &authority.trust(),
            Some(Proxy::parse(&url).unwrap()),
            Arc::new(SystemClock),
            Arc::new(Spawner),
        )
    };
    let good = https(format!("http://u:p%40%C3%9F@{address}"));
    for _ in 0..2 {
        let response = good.send(target("a.example"), get("/x")).await.unwrap();
        assert_eq!(read(response).await, r#"HTTP/2.0 /x host=None authority=Some("a.example")"#);
    }
    assert_eq!(server.count(), 1);
    let refused = good.send(target("b.example"), get("/x")).await;
    assert!(refused.unwrap_err().to_string().ends_with("the proxy does not connect to b.example:8448: 403"));
    assert!(https(format!("http://{address}")).send(target("a.example"), get("/x")).await.is_err());
    let none = authority.https().send(target("a.example"), get("/x")).await;
    assert!(matches!(none, Err(NotSent::Unreachable(_))));
}

#[test]
fn the_url_of_a_proxy_is_checked_and_its_password_told_to_nobody() {
    for wrong in
        ["", "proxy:3128", "https://proxy:3128", "socks5://proxy", "http://proxy/x", "http://u:%zz@proxy"]
    {
        let error = Proxy::parse(wrong).unwrap_err().to_string();
        assert!(wrong.is_empty() || !error.contains(wrong), "{error}");
    }
    let proxy = Proxy::parse("http://user:secret@proxy.example:3128/").unwrap();
    let told = format!("{proxy:?}");
    assert!(told.contains("proxy.example") && !told.contains("secret") && !told.contains("Basic"), "{told}");
    assert!(Proxy::parse("http://[::1]").is_ok());
}

#[tokio::test]
async fn both_versions_of_http_carry_large_bodies_both_ways() {
    let authority = Authority::new();
    for alpn in [ONE, BOTH] {
        let server = Server::start(authority.server("a.example", alpn), |request| {
            let length = request.headers()["content-length"].to_str().unwrap().to_owned();
            let body = if request.version() == Version::HTTP_2 { "2" } else { "1" };
            let mut reply = reply(200, body.repeat(3_000_000));
            reply.headers_mut().insert("x-length", length.parse().unwrap());
            // Reading the request to its end keeps the connection usable.
            drop(tokio::spawn(http_body_util::BodyExt::collect(request.into_body()).map(drop)));
            reply
        })
        .await;
        let put = Request::put("/x").body(Bytes::from(vec![b'x'; 2_000_000])).unwrap();
        let target = target(&[server.address], "a.example", "a.example");
        let response = authority.https().send(target, put).await.unwrap();
        assert_eq!(response.headers()["x-length"], "2000000");
        assert_eq!(read(response).await.len(), 3_000_000);
    }
}

#[tokio::test]
async fn a_target_without_tls_is_asked_in_the_clear_and_its_connection_serves_nobody_else() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            counting.fetch_add(1, Ordering::Relaxed);
            let service = service_fn(|request| async move { Ok::<_, Infallible>(echo(request)) });
            let serving =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service);
            tokio::spawn(serving.map(drop));
        }
    });
    let web = Https::for_web(&Authority::new().trust(), None, Arc::new(SystemClock), Arc::new(Spawner));
    let plain = Target { tls_name: None, ..target(&[address], "", "a.example") };
    for _ in 0..2 {
        let response = web.send(plain.clone(), get("/x")).await.unwrap();
        assert_eq!(read(response).await, r#"HTTP/1.1 /x host=Some("a.example") authority=None"#);
    }
    assert_eq!(connections.load(Ordering::Relaxed), 2);
    // Whoever needs TLS is never served without it.
    let proved = web.send(target(&[address], "a.example", "a.example"), get("/x")).await;
    assert!(matches!(proved, Err(NotSent::Unreachable(_))), "{proved:?}");
}

#[tokio::test]
async fn pages_of_the_web_may_have_larger_headers_than_servers_and_not_any() {
    let authority = Authority::new();
    for alpn in [ONE, BOTH] {
        let server = Server::start(authority.server("a.example", alpn), |request| {
            let bytes: usize = request.uri().path()[1..].parse().unwrap();
            let mut reply = reply(200, "");
            for _ in 0..bytes / 1000 {
                reply.headers_mut().append("x-policy", "x".repeat(980).parse().unwrap());
            }
            reply
        })
        .await;
        let web = Https::for_web(&authority.trust(), None, Arc::new(SystemClock), Arc::new(Spawner));
        let target = target(&[server.address], "a.example", "a.example");
        let ask = |https: Https, path: &'static str| {
            let target = target.clone();
            async move { https.send(target, get(path)).await.map(|it| it.status()) }
        };
        assert_eq!(ask(web.clone(), "/40000").await, Ok(StatusCode::OK));
        assert!(ask(authority.https(), "/40000").await.is_err());
        assert!(ask(web, "/90000").await.is_err());
    }
}
