//! Endpoints that users choose to harm the operator: inside the operator's network, redirecting, endless, silent.

use std::{net::Ipv4Addr, time::Duration};

use bytes::Bytes;
use federation::{
    ports::{self, NotSent},
    testing::{Net, Weather, addresses, bytes, json as answer_json},
};
use http::StatusCode;
use push_gateway::settings::{App, Kind};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::TcpListener};

use crate::world::{Authority, Door, Log, message};

fn door(net: &Net) -> Door {
    Door::simulated(net, vec![App::new("*", Kind::UnifiedPush)])
}

fn to(endpoint: &str) -> Value {
    message(json!([{ "app_id": "x", "pushkey": endpoint }]))
}

#[tokio::test(start_paused = true)]
async fn no_private_address_is_connected_to_however_it_is_written() {
    let net = Net::new(1);
    net.host("metadata.example", &["169.254.169.254"]);
    net.host("both.example", &["10.0.0.1", "192.168.0.1"]);
    net.host("mapped.example", &["::ffff:10.0.0.1"]);
    let door = door(&net);
    for endpoint in [
        "https://metadata.example/latest",
        "https://both.example/",
        "https://mapped.example/",
        "https://169.254.169.254/",
        "https://2852039166/",
        "https://0xa9fea9fe/",
        "https://[::1]/",
        "https://[fd00::1]/",
        "https://[::ffff:192.168.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
    ] {
        let (status, _, body) = door.notify(&to(endpoint)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{endpoint}: {body}");
        assert!(body["error"].as_str().unwrap().contains("not public"), "{endpoint}: {body}");
    }
    assert!(net.take_arrived().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_name_that_moves_inside_is_refused_at_the_next_message() {
    let net = Net::new(1);
    net.resolve("moves.example", addresses(&["5.5.5.5"], 0));
    net.serve_json("5.5.5.5:443", &["moves.example"], "{}");
    net.serve_json("10.0.0.5:443", &["moves.example"], "{}");
    let door = door(&net);
    assert_eq!(door.notify(&to("https://moves.example/a")).await.0, StatusCode::OK);
    assert_eq!(net.take_looked_up().len(), 1, "what was looked up is what is connected to");
    net.resolve("moves.example", addresses(&["10.0.0.5"], 0));
    assert_eq!(door.notify(&to("https://moves.example/b")).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(net.take_arrived(), ["moves.example@5.5.5.5:443 moves.example POST /a"]);
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_not_followed() {
    let net = Net::new(1);
    net.host("redirects.example", &["5.5.5.5"]);
    net.host("target.example", &["5.5.5.6"]);
    net.serve("5.5.5.5:443", &["redirects.example"], |_| {
        std::future::ready(bytes(307, &[("location", "https://target.example/")], Bytes::new()))
    });
    net.serve_json("5.5.5.6:443", &["target.example"], "{}");
    let (status, _, body) = door(&net).notify(&to("https://redirects.example/")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
    assert_eq!(net.take_arrived().len(), 1);
    assert_eq!(net.take_looked_up(), ["redirects.example"]);
}

#[tokio::test(start_paused = true)]
async fn an_endless_answer_is_not_read() {
    let net = Net::new(1);
    net.host("endless.example", &["5.5.5.5"]);
    net.serve("5.5.5.5:443", &["endless.example"], |_| {
        let piece = || Ok::<_, NotSent>(Bytes::from(vec![b'x'; 1 << 16]));
        let mut answer = http::Response::new(ports::Body::new(futures_util::stream::repeat_with(piece)));
        *answer.status_mut() = StatusCode::CREATED;
        std::future::ready(answer)
    });
    assert_eq!(door(&net).notify(&to("https://endless.example/")).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_silent_host_takes_bounded_time_and_is_left_alone_then() {
    let net = Net::new(1);
    net.host("silent.example", &["5.5.5.5"]);
    net.serve_json("5.5.5.5:443", &["silent.example"], "{}");
    net.weather("5.5.5.5:443", Weather::Silent, Duration::ZERO);
    let door = door(&net);
    let began = tokio::time::Instant::now();
    let (status, _, body) = door.notify(&to("https://silent.example/a")).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY, "{body}");
    assert!(began.elapsed() <= Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(net.take_arrived().len(), 2);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(door.notify(&to("https://silent.example/a")).await.0, StatusCode::BAD_GATEWAY);
    assert_eq!(net.take_arrived().len(), 1, "the third failure in a row");
    // Another user's endpoint there is not tried for half a minute.
    let began = tokio::time::Instant::now();
    let (status, headers, _) = door.notify(&to("https://silent.example/b")).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(headers.contains_key("retry-after"));
    assert!(net.take_arrived().is_empty(), "{:?}", began.elapsed());
    net.weather("5.5.5.5:443", Weather::Fair, Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert_eq!(door.notify(&to("https://silent.example/b")).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn slow_hosts_of_one_caller_hold_up_nobody_else() {
    let net = Net::new(1);
    for number in 0..200 {
        net.host(&format!("h{number}.slow.example"), &["5.5.5.5"]);
    }
    let names: Vec<String> = (0..200).map(|number| format!("h{number}.slow.example")).collect();
    net.serve_json("5.5.5.5:443", &names.iter().map(String::as_str).collect::<Vec<_>>(), "{}");
    net.weather("5.5.5.5:443", Weather::Silent, Duration::ZERO);
    net.host("well.example", &["5.5.5.6"]);
    net.serve_json("5.5.5.6:443", &["well.example"], "{}");
    let door = door(&net);
    let slow: Vec<_> = names
        .chunks(2)
        .map(|names| {
            let devices: Vec<_> = names
                .iter()
                .map(|name| json!({ "app_id": "x", "pushkey": format!("https://{name}/") }))
                .collect();
            message(json!(devices))
        })
        .collect();
    let attack = futures_util::future::join_all(slow.iter().map(|it| door.notify(it)));
    let honest = async {
        // The attack stands in its lines.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let began = tokio::time::Instant::now();
        let (status, ..) = door.notify(&to("https://well.example/")).await;
        let took = began.elapsed();
        // Until all tries end together, each place is held for ten seconds by one request after the other.
        tokio::time::sleep(Duration::from_secs(38)).await;
        let arrived = net.take_arrived().iter().filter(|it| it.contains("slow")).count();
        (status, took, arrived)
    };
    let (_, (status, took, arrived)) = futures_util::future::join(attack, honest).await;
    assert_eq!(status, StatusCode::OK);
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!((24..=24 * 4).contains(&arrived), "{arrived} requests to one address");
}

#[tokio::test(start_paused = true)]
async fn nothing_that_a_provider_says_reaches_the_homeserver_or_the_log() {
    let net = Net::new(1);
    net.host("talks.example", &["5.5.5.5"]);
    net.serve("5.5.5.5:443", &["talks.example"], |_| {
        std::future::ready(answer_json(403, "TOLD-BY-ATTACKER"))
    });
    let log = Log::begin();
    let (_, _, body) = door(&net).notify(&to("https://talks.example/SECRET-PATH?SECRET")).await;
    let log = log.end();
    assert!(log.contains("talks.example"), "{log}");
    for text in [log, body.to_string()] {
        assert!(!text.contains("SECRET") && !text.contains("TOLD-BY") && !text.contains("Dinner"), "{text}");
    }
}

#[tokio::test]
async fn plain_http_is_not_spoken_even_to_allowed_addresses() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let authority = Authority::new();
    let door = Door::real(&authority, vec![App::new("*", Kind::UnifiedPush)]);
    let (status, ..) = door.notify(&to(&format!("http://127.0.0.1:{port}/"))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    // Over https the first bytes are those of TLS, so that a server inside which speaks something else gets no request.
    let notification = to(&format!("https://127.0.0.1:{port}/SECRET"));
    let asking = door.notify(&notification);
    let listening = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut first = [0; 3];
        tcp.read_exact(&mut first).await.unwrap();
        drop((tcp, listener));
        first
    };
    let ((status, ..), first) = futures_util::future::join(asking, listening).await;
    assert_eq!(first, [22, 3, 1], "a TLS handshake");
    assert_eq!(status, StatusCode::BAD_GATEWAY);
}
