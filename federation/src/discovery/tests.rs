//! Each step of server discovery, its errors, and what is remembered.

use std::time::Duration;

use futures_util::{FutureExt, future::ready, stream};

use super::*;
use crate::{
    guard::parse_network,
    ports::{Addresses, Body, NotResolved, NotSent, Place},
    testing::{self, Net, Weather, addresses, bytes, json},
};

const WELL_KNOWN: &str = "/.well-known/matrix/server";

fn discovery(net: &Net) -> Discovery {
    Discovery::new(net.ports(), Guard::default(), false)
}

fn server(name: &str) -> &ServerName {
    name.try_into().unwrap()
}

/// A network in which `a.example` has an address and a web server that delegates to `to`.
fn delegating(to: &str) -> Net {
    let net = Net::new(1);
    net.host("a.example", &["5.0.0.1"]);
    net.serve_json("5.0.0.1:443", &["a.example"], &format!(r#"{{"m.server":"{to}"}}"#));
    net
}

/// A network in which `a.example` has an address, and a web server that does not know of Matrix.
fn plain() -> Net {
    let net = Net::new(1);
    net.host("a.example", &["5.0.0.1"]);
    net.serve("5.0.0.1:443", &["a.example"], |_| ready(json(404, "{}")));
    net
}

/// Where `a.example` is found, as `step TLS-name Host addresses`.
async fn found(net: &Net, name: &str) -> String {
    let found = discovery(net).find(server(name)).await.unwrap();
    told(&found)
}

fn told(found: &Found) -> String {
    let Found { target, step, .. } = found;
    let place = match &target.place {
        Place::Addresses(admitted) => {
            admitted.as_slice().iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        }
        Place::Names(names) => format!("{names:?}"),
    };
    format!(
        "{} {} {} {place}",
        step.number(),
        target.tls_name.as_deref().unwrap_or_default(),
        target.host_header
    )
}

#[tokio::test(start_paused = true)]
async fn step_1_an_address_is_used_as_it_is() {
    let net = Net::new(1);
    assert_eq!(found(&net, "5.0.0.1").await, "1 5.0.0.1 5.0.0.1 5.0.0.1:8448");
    assert_eq!(found(&net, "5.0.0.1:443").await, "1 5.0.0.1 5.0.0.1:443 5.0.0.1:443");
    assert_eq!(found(&net, "[2a00::1]").await, "1 2a00::1 [2a00::1] [2a00::1]:8448");
    assert_eq!(found(&net, "[2a00::1]:99").await, "1 2a00::1 [2a00::1]:99 [2a00::1]:99");
    assert!(net.take_looked_up().is_empty() && net.take_arrived().is_empty());
}

#[tokio::test(start_paused = true)]
async fn step_2_a_port_leaves_well_known_and_srv_out() {
    let net = delegating("b.example");
    net.services("_matrix-fed._tcp.a.example", &[(1, 1, "b.example", 1)]);
    assert_eq!(found(&net, "a.example:80").await, "2 a.example a.example:80 5.0.0.1:80");
    assert_eq!(net.take_looked_up(), ["a.example"]);
    assert!(net.take_arrived().is_empty());
}

#[tokio::test(start_paused = true)]
async fn step_3_1_a_host_may_delegate_to_an_address() {
    assert_eq!(found(&delegating("5.0.0.9"), "a.example").await, "3.1 5.0.0.9 5.0.0.9 5.0.0.9:8448");
    let six = delegating("[2a00::9]:443");
    assert_eq!(found(&six, "a.example").await, "3.1 2a00::9 [2a00::9]:443 [2a00::9]:443");
    assert_eq!(six.take_arrived(), [format!("a.example@5.0.0.1:443 a.example GET {WELL_KNOWN}")]);
}

#[tokio::test(start_paused = true)]
async fn step_3_2_a_host_may_delegate_to_a_name_with_a_port() {
    let net = delegating("b.example:443");
    net.host("b.example", &["5.0.0.2", "2a00::2", "5.0.0.3"]);
    let expected = "3.2 b.example b.example:443 [2a00::2]:443,5.0.0.2:443,5.0.0.3:443";
    assert_eq!(found(&net, "a.example").await, expected);
}

#[tokio::test(start_paused = true)]
async fn steps_3_3_and_3_4_a_delegated_name_may_have_srv_records() {
    let net = delegating("b.example");
    net.host("c.example", &["5.0.0.3"]);
    net.services("_matrix._tcp.b.example", &[(1, 1, "c.example", 4)]);
    assert_eq!(found(&net, "a.example").await, "3.4 b.example b.example 5.0.0.3:4");
    net.services("_matrix-fed._tcp.b.example", &[(1, 1, "c.example", 3)]);
    assert_eq!(found(&net, "a.example").await, "3.3 b.example b.example 5.0.0.3:3");
}

#[tokio::test(start_paused = true)]
async fn step_3_5_a_delegated_name_has_the_default_port() {
    let net = delegating("B.example");
    net.host("b.example", &["5.0.0.2"]);
    assert_eq!(found(&net, "a.example").await, "3.5 b.example B.example 5.0.0.2:8448");
    // The delegated name is not asked for a delegation of its own.
    assert_eq!(net.take_arrived().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn steps_4_to_6_a_host_that_does_not_delegate_has_srv_records_or_the_default_port() {
    let net = plain();
    assert_eq!(found(&net, "a.example").await, "6 a.example a.example 5.0.0.1:8448");
    net.host("c.example", &["5.0.0.3"]);
    net.services("_matrix._tcp.a.example", &[(1, 1, "c.example", 4)]);
    assert_eq!(found(&net, "a.example").await, "5 a.example a.example 5.0.0.3:4");
    net.services("_matrix-fed._tcp.a.example", &[(1, 1, "c.example", 3)]);
    assert_eq!(found(&net, "a.example").await, "4 a.example a.example 5.0.0.3:3");
}

#[tokio::test(start_paused = true)]
async fn srv_records_are_tried_by_priority_and_those_that_lead_nowhere_are_left_out() {
    let net = plain();
    net.host("c.example", &["5.0.0.3"]);
    net.host("d.example", &["5.0.0.4", "10.0.0.4"]);
    let records = [
        (20, 0, "c.example", 1),
        (10, 5, "d.example", 2),
        (5, 0, "none.example", 3),
        (30, 0, "c.example", 1),
    ];
    net.services("_matrix-fed._tcp.a.example", &records);
    assert_eq!(found(&net, "a.example").await, "4 a.example a.example 5.0.0.4:2,5.0.0.3:1");
    net.services("_matrix-fed._tcp.a.example", &[(5, 0, "none.example", 3)]);
    let missing = discovery(&net).find(server("a.example")).await.unwrap_err();
    assert_eq!(missing, NotFound::NoAddress { host: "none.example".to_owned() });
}

#[tokio::test(start_paused = true)]
async fn a_root_as_target_declines_the_service() {
    let net = plain();
    net.services("_matrix-fed._tcp.a.example", &[(0, 0, "", 0)]);
    let declined = discovery(&net).find(server("a.example")).await.unwrap_err();
    assert!(matches!(declined, NotFound::Declined { .. }), "{declined}");
}

#[tokio::test(start_paused = true)]
async fn an_srv_look_up_that_fails_does_not_stop_discovery_but_holds_shortly() {
    let net = plain();
    let failed = || Err(NotResolved::Failed("SERVFAIL".to_owned()));
    net.resolve_services("_matrix-fed._tcp.a.example", failed());
    let discovery = discovery(&net);
    let found = discovery.find(server("a.example")).await.unwrap();
    assert_eq!(found.step, Step::DefaultPort);
    assert_eq!(found.until_ms, testing::BEGAN_MS + 60_000);
}

#[tokio::test(start_paused = true)]
async fn well_known_answers_that_are_none_lead_to_the_next_step() {
    let long = format!(r#"{{"m.server":"b.example:1","x":"{}"}}"#, "x".repeat(50 * 1024));
    let wrong = [
        "",
        "{",
        "[]",
        "null",
        "{}",
        r#"{"m.server":5}"#,
        r#"{"m.server":null}"#,
        r#"{"m.server":""}"#,
        r#"{"m.server":"https://b.example"}"#,
        r#"{"m.server":"b.example:0"}"#,
        r#"{"m.server":"b.example:99999"}"#,
        r#"{"m.server":"b_b.example"}"#,
        r#"{"m.server":"[::1"}"#,
        "<html>",
        "\u{0}",
        &long,
    ];
    for body in wrong {
        let net = plain();
        net.host("b.example", &["5.0.0.2"]);
        net.serve_json("5.0.0.1:443", &["a.example"], body);
        assert_eq!(found(&net, "a.example").await, "6 a.example a.example 5.0.0.1:8448", "{body:.60}");
    }
    for status in [201, 204, 301, 304, 400, 404, 429, 500, 503] {
        let net = plain();
        let body = r#"{"m.server":"b.example:1"}"#;
        net.serve("5.0.0.1:443", &["a.example"], move |_| ready(json(status, body)));
        assert_eq!(found(&net, "a.example").await, "6 a.example a.example 5.0.0.1:8448", "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_well_known_answer_needs_no_content_type_and_may_hold_more() {
    let net = plain();
    net.host("b.example", &["5.0.0.2"]);
    let body = " {\"x\": 1e99, \"m.server\": \"b.example:1\"} ";
    net.serve("5.0.0.1:443", &["a.example"], move |_| ready(bytes(200, &[], body)));
    assert_eq!(found(&net, "a.example").await, "3.2 b.example b.example:1 5.0.0.2:1");
}

#[tokio::test(start_paused = true)]
async fn web_servers_that_are_down_silent_slow_or_others_lead_to_the_next_step() {
    let expected = "6 a.example a.example 5.0.0.1:8448";
    for weather in [Weather::Refuses, Weather::Silent, Weather::LosesAnswers] {
        let net = delegating("b.example:1");
        net.weather("5.0.0.1:443", weather, Duration::ZERO);
        assert_eq!(found(&net, "a.example").await, expected, "{weather:?}");
    }
    let slow = delegating("b.example:1");
    slow.weather("5.0.0.1:443", Weather::Fair, Duration::from_secs(60));
    assert_eq!(found(&slow, "a.example").await, expected);
    let other = plain();
    other.serve_json("5.0.0.1:443", &["other.example"], r#"{"m.server":"b.example:1"}"#);
    assert_eq!(found(&other, "a.example").await, expected);
    let endless = plain();
    endless.serve("5.0.0.1:443", &["a.example"], |_| {
        let pieces = stream::repeat_with(|| Ok::<_, NotSent>(vec![b'x'; 1000].into()));
        ready(http::Response::new(Body::new(pieces)))
    });
    assert_eq!(found(&endless, "a.example").await, expected);
    let stalls = plain();
    stalls.serve("5.0.0.1:443", &["a.example"], |_| ready(http::Response::new(Body::new(stream::pending()))));
    assert_eq!(found(&stalls, "a.example").await, expected);
}

/// A web server at `a.example` that redirects to this place; one at `w.example` delegates to `b.example:1`.
fn redirecting(to: &str) -> Net {
    let net = plain();
    net.host("b.example", &["5.0.0.2"]);
    net.host("w.example", &["5.0.0.7"]);
    let to = to.to_owned();
    net.serve("5.0.0.1:443", &["a.example"], move |_| ready(bytes(301, &[("location", &to)], "")));
    for address in ["5.0.0.7:443", "5.0.0.7:99"] {
        net.serve_json(address, &["w.example", "5.0.0.7"], r#"{"m.server":"b.example:1"}"#);
    }
    net
}

#[tokio::test(start_paused = true)]
async fn redirects_are_followed() {
    let expected = "3.2 b.example b.example:1 5.0.0.2:1";
    for (to, host, path) in [
        ("https://w.example/there?x=1#y", "w.example@5.0.0.7:443 w.example", "/there?x=1"),
        ("https://w.example:99/", "w.example@5.0.0.7:99 w.example:99", "/"),
        ("//w.example/x", "w.example@5.0.0.7:443 w.example", "/x"),
        ("https://5.0.0.7/x", "5.0.0.7@5.0.0.7:443 5.0.0.7", "/x"),
    ] {
        let net = redirecting(to);
        assert_eq!(found(&net, "a.example").await, expected, "{to}");
        assert_eq!(net.take_arrived().last().unwrap(), &format!("{host} GET {path}"));
    }
}

#[tokio::test(start_paused = true)]
async fn redirects_that_loop_never_end_or_leave_https_are_given_up() {
    for (to, requests) in [
        ("https://a.example/.well-known/matrix/server", 1),
        ("http://w.example/", 1),
        ("ftp://w.example/", 1),
        ("https://", 1),
        ("mailto:a@example.org", 1),
        ("", 1),
        ("more", 2),
    ] {
        let net = redirecting(to);
        assert_eq!(found(&net, "a.example").await, "6 a.example a.example 5.0.0.1:8448", "{to}");
        assert_eq!(net.take_arrived().len(), requests, "{to}");
    }
    let endless = plain();
    endless.serve("5.0.0.1:443", &["a.example"], |arrived| {
        let next = format!("{}x", arrived.request.uri());
        ready(bytes(308, &[("location", &next)], ""))
    });
    assert_eq!(found(&endless, "a.example").await, "6 a.example a.example 5.0.0.1:8448");
    assert_eq!(endless.take_arrived().len(), 6);
}

#[tokio::test(start_paused = true)]
async fn no_step_leads_into_a_network_that_is_not_everyones() {
    let forbidden = async |net: &Net, name: &str| {
        let result = discovery(net).find(server(name)).await;
        let arrived = net.take_arrived();
        assert!(arrived.iter().all(|it| it.contains("@5.0.0.")), "{arrived:?}");
        assert!(matches!(result, Err(NotFound::Forbidden { .. })), "{name}: {result:?}");
    };
    let net = plain();
    for name in ["127.0.0.1", "10.0.0.1:443", "[::1]", "[::ffff:127.0.0.1]:80", "169.254.169.254"] {
        forbidden(&net, name).await;
    }
    net.host("private.example", &["10.0.0.1", "fd00::1"]);
    forbidden(&net, "private.example:80").await;
    forbidden(&net, "private.example").await;
    for to in ["127.0.0.1", "[::1]:443", "private.example:443", "private.example"] {
        let net = delegating(to);
        net.host("private.example", &["10.0.0.1"]);
        forbidden(&net, "a.example").await;
    }
    let net = plain();
    net.host("private.example", &["10.0.0.1"]);
    net.services("_matrix-fed._tcp.a.example", &[(1, 1, "private.example", 80)]);
    forbidden(&net, "a.example").await;
}

#[tokio::test(start_paused = true)]
async fn no_redirect_leads_into_a_network_that_is_not_everyones() {
    for to in ["https://127.0.0.1/", "https://[::1]:8008/", "https://private.example/", "https://0x7f.1/"] {
        let net = redirecting(to);
        net.host("private.example", &["192.168.0.1"]);
        for address in ["127.0.0.1:443", "[::1]:8008", "192.168.0.1:443"] {
            let certificate = ["127.0.0.1", "::1", "private.example"];
            net.serve_json(address, &certificate, r#"{"m.server":"b.example:1"}"#);
        }
        assert_eq!(found(&net, "a.example").await, "6 a.example a.example 5.0.0.1:8448", "{to}");
        assert_eq!(net.take_arrived().len(), 1, "{to}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_guarded_is_what_is_connected_to() {
    let net = plain();
    net.resolve("rebinding.example", addresses(&["10.0.0.1", "5.0.0.8"], 0));
    let discovery = discovery(&net);
    let first = discovery.find(server("rebinding.example:80")).await.unwrap();
    // The name moves into the inner network; the target that was made before does not.
    net.resolve("rebinding.example", addresses(&["10.0.0.1"], 0));
    assert_eq!(told(&first), "2 rebinding.example rebinding.example:80 5.0.0.8:80");
    tokio::time::advance(Duration::from_secs(61)).await;
    let later = discovery.find(server("rebinding.example:80")).await.unwrap_err();
    assert!(matches!(later, NotFound::Forbidden { .. }));
    assert_eq!(net.take_looked_up().len(), 2, "the name is looked up once for each resolution");
}

#[tokio::test(start_paused = true)]
async fn a_closed_federation_allows_its_own_networks() {
    let net = Net::new(1);
    net.host("a.example", &["10.0.0.1", "192.168.0.1"]);
    let guard = Guard::new(vec![parse_network("10.0.0.0/8").unwrap()]);
    let discovery = Discovery::new(net.ports(), guard, false);
    let found = discovery.find(server("a.example:443")).await.unwrap();
    assert_eq!(told(&found), "2 a.example a.example:443 10.0.0.1:443");
}

#[tokio::test(start_paused = true)]
async fn a_proxy_gets_names_and_we_look_none_up() {
    let net = delegating("b.example:443");
    let discovery = Discovery::new(net.ports(), Guard::default(), true);
    let found = discovery.find(server("a.example")).await.unwrap();
    assert_eq!(told(&found), r#"3.2 b.example b.example:443 [("b.example", 443)]"#);
    assert!(net.take_looked_up().is_empty());
    assert!(discovery.find(server("127.0.0.1")).await.is_err(), "an address is guarded all the same");
    for odd in ["127.1:443", "2130706433:443", "0x7f.1:443"] {
        assert!(discovery.find(server(odd)).await.is_err(), "{odd}");
    }
    let net = plain();
    let discovery = Discovery::new(net.ports(), Guard::default(), true);
    net.services(
        "_matrix-fed._tcp.a.example",
        &[(1, 1, "10.0.0.1", 1), (2, 1, "0x7f.1", 1), (3, 1, "b.example", 1)],
    );
    let found = discovery.find(server("a.example")).await.unwrap();
    assert_eq!(told(&found), r#"4 a.example a.example [("b.example", 1)]"#);
}

#[tokio::test(start_paused = true)]
async fn names_that_are_none_are_refused_before_anything_is_asked() {
    let net = plain();
    let long = "a".repeat(64);
    for name in ["a.example:+80", "a..example", "a.example.", &long] {
        let result = discovery(&net).find(server(name)).await;
        assert!(matches!(result, Err(NotFound::BadName { .. })), "{name}: {result:?}");
    }
    assert!(net.take_looked_up().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_name_without_address_is_looked_up_again_after_a_minute() {
    let net = Net::new(1);
    net.resolve("down.example", Err(NotResolved::Failed("SERVFAIL".to_owned())));
    let discovery = discovery(&net);
    for name in ["none.example:1", "down.example:1"] {
        let first = discovery.find(server(name)).await.unwrap_err();
        assert_eq!(discovery.find(server(name)).await.unwrap_err(), first);
        assert_eq!(net.take_looked_up().len(), 1);
        net.host(name.strip_suffix(":1").unwrap(), &["5.0.0.1"]);
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(discovery.find(server(name)).await.is_ok());
        net.take_looked_up();
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_speaks_is_looked_up_again_at_once_if_it_was_not_found() {
    let net = Net::new(1);
    let discovery = discovery(&net);
    assert!(discovery.find(server("a.example")).await.is_err());
    net.host("a.example", &["5.0.0.1"]);
    assert!(discovery.find(server("a.example")).await.is_err(), "that is remembered");
    discovery.heard_from(server("a.example"));
    let found = discovery.find(server("a.example")).await.unwrap();
    net.take_looked_up();
    discovery.heard_from(server("a.example"));
    assert_eq!(discovery.find(server("a.example")).await.unwrap(), found);
    assert_eq!(net.take_looked_up(), [""; 0], "where it was found holds");
}

#[tokio::test(start_paused = true)]
async fn what_was_found_is_remembered_as_long_as_all_of_it_holds() {
    let net = plain();
    net.host("b.example", &["5.0.0.2"]);
    net.serve("5.0.0.1:443", &["a.example"], |_| {
        let headers = [("cache-control", "max-age=600")];
        ready(bytes(200, &headers, r#"{"m.server":"b.example:1"}"#))
    });
    net.resolve("b.example", addresses(&["5.0.0.2"], 100));
    let discovery = discovery(&net);
    let mut asked = Vec::new();
    for _ in 0..14 {
        discovery.find(server("a.example")).await.unwrap();
        asked.push((net.take_arrived().len(), net.take_looked_up().len()));
        tokio::time::advance(Duration::from_secs(50)).await;
    }
    // Addresses hold for 100 seconds, the delegation for 600.
    let (well_known, addresses, nothing) = ((1, 2), (0, 1), (0, 0));
    let mut expected = vec![well_known, nothing];
    for _ in 0..5 {
        expected.extend([addresses, nothing]);
    }
    expected.extend([well_known, nothing]);
    assert_eq!(asked, expected);
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_one_name_share_its_resolution() {
    let net = delegating("b.example:1");
    net.host("b.example", &["5.0.0.2"]);
    net.delay_dns(Duration::from_secs(1));
    let discovery = discovery(&net);
    let hangs_up = tokio::time::timeout(Duration::from_millis(10), discovery.find(server("a.example")));
    let all = futures_util::future::join_all((0..50).map(|_| discovery.find(server("a.example"))));
    let (hung_up, all) = tokio::join!(hangs_up, all);
    assert!(hung_up.is_err());
    assert!(all.iter().all(Result::is_ok));
    assert_eq!((net.take_arrived().len(), net.take_looked_up().len()), (1, 2));
    // Nobody waits: nothing goes on.
    assert!(discovery.find(server("c.example")).now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_moved_is_found_again_soon_once_somebody_doubts() {
    let net = delegating("b.example:1");
    net.host("b.example", &["5.0.0.2"]);
    let discovery = discovery(&net);
    let old = discovery.find(server("a.example")).await.unwrap();
    tokio::time::advance(Duration::from_secs(4000)).await;
    let old = discovery.find(server("a.example")).await.unwrap_or(old);
    net.host("c.example", &["5.0.0.3"]);
    net.serve_json("5.0.0.1:443", &["a.example"], r#"{"m.server":"c.example:1"}"#);
    assert_eq!(
        discovery.find(server("a.example")).await.unwrap().target.tls_name.as_deref(),
        Some("b.example")
    );
    discovery.doubt(server("a.example"), &old);
    tokio::time::advance(Duration::from_secs(61)).await;
    assert_eq!(
        discovery.find(server("a.example")).await.unwrap().target.tls_name.as_deref(),
        Some("c.example")
    );
}

#[tokio::test(start_paused = true)]
async fn an_operator_is_told_every_step() {
    let net = plain();
    net.host("c.example", &["5.0.0.3", "127.0.0.1"]);
    let alias = Addresses { addresses: vec![[5, 0, 0, 4].into()], ttl_s: 60, is_alias: true };
    net.resolve("alias.example", Ok(alias));
    let records = [(1, 0, "c.example", 3), (2, 0, "alias.example", 4), (3, 0, "none.example", 5)];
    net.services("_matrix._tcp.a.example", &records);
    let discovery = discovery(&net);
    let explanation = discovery.explain(server("a.example")).await;
    let lines: Vec<_> =
        explanation.lines.iter().map(|it| format!("{} {}", it.step.number(), it.told)).collect();
    assert_eq!(
        lines,
        [
            "3 https://a.example does not delegate: it answered 404",
            "4 _matrix-fed._tcp.a.example has no SRV record",
            "5 _matrix._tcp.a.example names c.example:3, alias.example:4, none.example:5",
            "5 connect to 5.0.0.3:3; left out: 127.0.0.1 is this machine (127.0.0.0/8); to allow it, add its network to \
             federation.networks_allowed",
            "5 connect to 5.0.0.4:4",
            "5 alias.example is an alias (CNAME), which the target of an SRV record must not be",
            "5 none.example has no address",
        ]
    );
    assert_eq!(told(&explanation.result.unwrap()), "5 a.example a.example 5.0.0.3:3,5.0.0.4:4");
    // It looks anew each time, and what it finds is used.
    net.serve_json("5.0.0.1:443", &["a.example"], r#"{"m.server":"c.example:1"}"#);
    assert!(discovery.explain(server("a.example")).await.lines[0].told.ends_with("delegates to c.example:1"));
    assert_eq!(discovery.find(server("a.example")).await.unwrap().step, Step::DelegatedPort);
}
