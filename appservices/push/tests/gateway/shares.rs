//! Callers who take what they can get of what all share: requests, bodies, lines, look-ups, hosts and ports. Others are delivered to all the same.

use std::{net::IpAddr, time::Duration};

use axum::body::Body;
use bytes::Bytes;
use federation::testing::{Net, Weather};
use futures_util::{StreamExt, future::join_all};
use http::{Request, StatusCode};
use push_gateway::{
    Caller, NOTIFY_PATH,
    settings::{App, Kind},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::world::{Door, KeyFile, Subscriber, message, web_app, web_device};

const ATTACKER: [u8; 4] = [203, 0, 113, 9];
const HONEST: [u8; 4] = [192, 0, 2, 77];

fn door(net: &Net) -> Door {
    Door::simulated(net, vec![App::new("*", Kind::UnifiedPush)])
}

fn serve(net: &Net, host: &str, address: &str, weather: Weather, delay: Duration) {
    net.host(host, &[address]);
    let place = format!("{address}:443");
    net.serve_json(&place, &[host], "{}");
    net.weather(&place, weather, delay);
}

fn to(endpoints: impl IntoIterator<Item = String>) -> Value {
    let devices: Vec<_> =
        endpoints.into_iter().map(|endpoint| json!({ "app_id": "x", "pushkey": endpoint })).collect();
    message(json!(devices))
}

/// A notification for 32 devices at this host, whose paths nobody else has.
fn flood(host: &str, number: usize) -> Value {
    to((0..32).map(|device| format!("https://{host}/{number}/{device}")))
}

/// Sends all of these from somewhere, and meanwhile one notification of an honest caller. Gives its status, and how long it took.
async fn meanwhile(door: &Door, attack: &[(IpAddr, Value)], honest: &Value) -> (StatusCode, Duration) {
    let attack = join_all(attack.iter().map(|(from, it)| door.notify_from(*from, it)));
    let honest = async {
        // The attack stands in its lines by then.
        sleep(Duration::from_secs(1)).await;
        let began = Instant::now();
        let (status, ..) = door.notify_from(HONEST.into(), honest).await;
        (status, began.elapsed())
    };
    futures_util::future::join(attack, honest).await.1
}

#[tokio::test(start_paused = true)]
async fn a_port_that_fails_says_nothing_of_another_one_of_its_host() {
    let net = Net::new(1);
    serve(&net, "push.example", "5.5.5.1", Weather::Fair, Duration::ZERO);
    let door = door(&net);
    let closed = to((0..32).map(|number| format!("https://push.example:444/{number}")));
    for from in [ATTACKER, [203, 0, 113, 10], [203, 0, 113, 11], [203, 0, 113, 12]] {
        assert_eq!(door.notify_from(from.into(), &closed).await.0, StatusCode::BAD_GATEWAY);
    }
    for from in [ATTACKER, HONEST] {
        let well = to([format!("https://push.example/{from:?}")]);
        assert_eq!(door.notify_from(from.into(), &well).await.0, StatusCode::OK);
    }
}

#[tokio::test(start_paused = true)]
async fn hosts_that_are_allowed_are_reached_at_the_port_of_their_pattern_alone() {
    let net = Net::new(1);
    serve(&net, "push.example", "5.5.5.1", Weather::Fair, Duration::ZERO);
    net.serve_json("5.5.5.1:8443", &["push.example"], "{}");
    let hosts_allowed = vec!["push.example".to_owned(), "*.example:8443".to_owned()];
    let app = App { hosts_allowed, ..App::new("*", Kind::UnifiedPush) };
    let door = Door::simulated(&net, vec![app]);
    for (port, status) in [(443, StatusCode::OK), (8443, StatusCode::OK), (444, StatusCode::BAD_REQUEST)] {
        let notification = to([format!("https://push.example:{port}/")]);
        assert_eq!(door.notify(&notification).await.0, status, "{port}");
    }
    assert_eq!(net.take_looked_up().len(), 2, "nothing is asked about what is not allowed");
}

#[tokio::test(start_paused = true)]
async fn whoever_had_failures_is_stopped_before_all_are() {
    let net = Net::new(1);
    serve(&net, "push.example", "5.5.5.1", Weather::Refuses, Duration::ZERO);
    let door = door(&net);
    assert_eq!(door.notify_from(ATTACKER.into(), &flood("push.example", 1)).await.0, StatusCode::BAD_GATEWAY);
    net.weather("5.5.5.1:443", Weather::Fair, Duration::ZERO);
    let (status, headers, _) = door.notify_from(ATTACKER.into(), &flood("push.example", 2)).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(headers.contains_key("retry-after") && net.take_arrived().is_empty());
    let well = to(["https://push.example/".to_owned()]);
    assert_eq!(door.notify_from(HONEST.into(), &well).await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn one_caller_does_not_fill_the_line_of_a_host() {
    let net = Net::new(1);
    serve(&net, "push.example", "5.5.5.1", Weather::Fair, Duration::from_secs(2));
    let attack: Vec<_> = (0..100).map(|number| (ATTACKER.into(), flood("push.example", number))).collect();
    let honest = to(["https://push.example/".to_owned()]);
    let (status, took) = meanwhile(&door(&net), &attack, &honest).await;
    assert_eq!(status, StatusCode::OK);
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn one_caller_does_not_fill_the_line_of_an_address_by_names_of_their_own() {
    let net = Net::new(1);
    let names: Vec<String> = (0..800).map(|number| format!("h{number}.attacker.example")).collect();
    names.iter().for_each(|name| net.host(name, &["5.5.5.1"]));
    net.host("well.example", &["5.5.5.1"]);
    let all: Vec<&str> = names.iter().map(String::as_str).chain(["well.example"]).collect();
    net.serve_json("5.5.5.1:443", &all, "{}");
    net.weather("5.5.5.1:443", Weather::Fair, Duration::from_secs(8));
    let attack: Vec<_> = names
        .chunks(20)
        .map(|names| (ATTACKER.into(), to(names.iter().map(|name| format!("https://{name}/")))))
        .collect();
    let honest = to(["https://well.example/".to_owned()]);
    let (status, took) = meanwhile(&door(&net), &attack, &honest).await;
    assert_eq!(status, StatusCode::OK);
    assert!(took < Duration::from_secs(9), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn one_caller_does_not_hold_up_look_ups() {
    let net = Net::new(1);
    serve(&net, "well.example", "5.5.5.1", Weather::Fair, Duration::ZERO);
    net.delay_dns(Duration::from_secs(4));
    let slow = |number: usize| to((0..32).map(|device| format!("https://n{number}x{device}.slow.example/")));
    let attack: Vec<_> = (0..128).map(|number| (ATTACKER.into(), slow(number))).collect();
    let honest = to(["https://well.example/".to_owned()]);
    let (status, took) = meanwhile(&door(&net), &attack, &honest).await;
    assert_eq!(status, StatusCode::OK);
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_few_callers_do_not_take_all_requests() {
    let net = Net::new(1);
    serve(&net, "silent.example", "5.5.5.1", Weather::Silent, Duration::ZERO);
    serve(&net, "well.example", "5.5.5.2", Weather::Fair, Duration::ZERO);
    let honest = to(["https://well.example/".to_owned()]);
    let silent = to(["https://silent.example/".to_owned()]);
    let addresses = |number: u16| IpAddr::from([203, 0, 113, number.to_be_bytes()[1] % 4]);
    // Networks of one site are one caller together.
    let networks = |number: u16| IpAddr::from([0x2001, 0xdb8, 7, number % 64, 0, 0, 0, 1]);
    for from in [addresses, networks] {
        let attack: Vec<_> = (0..1_024).map(|number| (from(number), silent.clone())).collect();
        let (status, took) = meanwhile(&door(&net), &attack, &honest).await;
        assert_eq!(status, StatusCode::OK);
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn bodies_that_trickle_keep_nobody_out() {
    let net = Net::new(1);
    serve(&net, "well.example", "5.5.5.2", Weather::Fair, Duration::ZERO);
    let door = door(&net);
    let trickle = |number: usize| {
        let drips = futures_util::stream::repeat(()).then(|()| async {
            sleep(Duration::from_secs(1)).await;
            Ok::<_, std::io::Error>(Bytes::from_static(b" "))
        });
        let from = Caller([203, 0, 113, u8::try_from(number % 8).unwrap()].into());
        let request = Request::post(NOTIFY_PATH).extension(from).body(Body::from_stream(drips));
        door.ask(request.unwrap())
    };
    let attack = join_all((0..2_000).map(trickle));
    let honest = async {
        let mut answers = Vec::new();
        for number in 0..5 {
            sleep(Duration::from_millis(500)).await;
            let notification = to([format!("https://well.example/{number}")]);
            answers.push(door.notify_from(HONEST.into(), &notification).await.0);
        }
        answers
    };
    let (_, answers) = futures_util::future::join(attack, honest).await;
    assert_eq!(answers, [StatusCode::OK; 5]);
}

#[tokio::test(start_paused = true)]
async fn large_bodies_of_one_caller_leave_memory_for_others() {
    let net = Net::new(1);
    serve(&net, "silent.example", "5.5.5.1", Weather::Silent, Duration::ZERO);
    serve(&net, "well.example", "5.5.5.2", Weather::Fair, Duration::ZERO);
    let large = |host: &str| {
        let mut notification = to([format!("https://{host}/")]);
        notification["content"]["body"] = json!("x".repeat(200_000));
        notification
    };
    // One household has many addresses.
    let from = |number: u16| IpAddr::from([0x2001, 0xdb8, 7, 7, number, 0, 0, 1]);
    let attack: Vec<_> = (0..200).map(|number| (from(number), large("silent.example"))).collect();
    let (status, _) = meanwhile(&door(&net), &attack, &large("well.example")).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_made_for_a_host_that_is_left_alone() {
    let (net, key, ann) = (Net::new(1), KeyFile::new(5), Subscriber::new(9));
    serve(&net, "push.example", "5.5.5.1", Weather::Refuses, Duration::ZERO);
    let door = Door::simulated(&net, vec![web_app("web", &key)]);
    let devices = |count: usize| {
        let endpoint = |number| format!("https://push.example/{number}");
        message(json!((0..count).map(|number| web_device(&ann, &endpoint(number))).collect::<Vec<_>>()))
    };
    assert_eq!(door.notify(&devices(1)).await.0, StatusCode::BAD_GATEWAY);
    let (made, drawn) = (door.worked(), door.secrets_drawn());
    assert!(made > 0 && drawn > 0, "one message was made, and tried several times");
    assert_eq!(door.notify(&devices(32)).await.0, StatusCode::BAD_GATEWAY);
    assert_eq!((door.worked(), door.secrets_drawn()), (made, drawn));
}

#[tokio::test(start_paused = true)]
async fn a_message_is_made_once_for_all_tries() {
    let (net, key, ann) = (Net::new(1), KeyFile::new(5), Subscriber::new(9));
    net.host("push.example", &["5.5.5.1"]);
    net.serve("5.5.5.1:443", &["push.example"], |_| {
        std::future::ready(federation::testing::bytes(503, &[], Bytes::new()))
    });
    let door = Door::simulated(&net, vec![web_app("web", &key)]);
    let notification = message(json!([web_device(&ann, "https://push.example/")]));
    assert_eq!(door.notify(&notification).await.0, StatusCode::BAD_GATEWAY);
    assert_eq!((net.take_arrived().len(), door.worked()), (3, 1));
}

#[tokio::test(start_paused = true)]
async fn a_try_is_finished_and_remembered_when_the_caller_hangs_up() {
    let net = Net::new(1);
    serve(&net, "slow.example", "5.5.5.1", Weather::Fair, Duration::from_secs(8));
    let door = door(&net);
    let notification = to(["https://slow.example/".to_owned()]);
    assert!(timeout(Duration::from_secs(3), door.notify(&notification)).await.is_err());
    // The homeserver asks again while the first try goes on, and waits for that one.
    let began = Instant::now();
    assert_eq!(door.rejected(&notification).await, json!([]));
    assert!((4..=6).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert_eq!(door.rejected(&notification).await, json!([]));
    assert_eq!(net.take_arrived().len(), 1, "the device hears of it once");
}

#[tokio::test(start_paused = true)]
async fn who_hangs_up_takes_no_more_than_who_waits() {
    let net = Net::new(1);
    serve(&net, "slow.example", "5.5.5.1", Weather::Silent, Duration::ZERO);
    let door = door(&net);
    for number in 0..20 {
        let notification = flood("slow.example", number);
        let asking = door.notify_from(ATTACKER.into(), &notification);
        assert!(timeout(Duration::from_millis(100), asking).await.is_err());
    }
    assert_eq!(net.take_arrived().len(), 16, "the share of the host is held until the tries end");
}

#[tokio::test(start_paused = true)]
async fn the_answer_comes_while_the_homeserver_listens() {
    let net = Net::new(1);
    serve(&net, "silent.example", "5.5.5.1", Weather::Silent, Duration::ZERO);
    let door = door(&net);
    let began = Instant::now();
    let (status, ..) = door.notify(&to(["https://silent.example/".to_owned()])).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(began.elapsed() <= Duration::from_secs(15), "{:?}", began.elapsed());
    // A body that comes late leaves less time for its devices.
    let body = json!({ "notification": to(["https://silent.example/b".to_owned()]) }).to_string();
    let late = futures_util::stream::once(async move {
        sleep(Duration::from_secs(9)).await;
        Ok::<_, std::io::Error>(Bytes::from(body))
    });
    let began = Instant::now();
    let request = Request::post(NOTIFY_PATH).body(Body::from_stream(late)).unwrap();
    assert_eq!(door.ask(request).await.0, StatusCode::BAD_GATEWAY);
    assert!(began.elapsed() <= Duration::from_secs(15), "{:?}", began.elapsed());
}
