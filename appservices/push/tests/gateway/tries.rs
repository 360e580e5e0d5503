//! Failures that pass: tried again within bounds, as the provider asks, and told to the homeserver so that nothing is lost or doubled.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use federation::testing::{Net, Weather, bytes};
use http::StatusCode;
use push_gateway::settings::{App, Kind};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::world::{Door, message};

/// A host whose answers come from this list, and then are 201.
fn host(net: &Net, name: &'static str, address: &str, answers: &'static [(u16, Option<&'static str>)]) {
    net.host(name, &[address]);
    let count = Arc::new(AtomicUsize::new(0));
    net.serve(&format!("{address}:443"), &[name], move |_| {
        let (status, retry_after) =
            answers.get(count.fetch_add(1, Ordering::Relaxed)).copied().unwrap_or((201, None));
        let headers: Vec<_> = retry_after.map(|it| ("retry-after", it)).into_iter().collect();
        std::future::ready(bytes(status, &headers, Bytes::new()))
    });
}

fn device(endpoint: &str) -> Value {
    json!({ "app_id": "x", "pushkey": endpoint })
}

fn door(net: &Net) -> Door {
    Door::simulated(net, vec![App::new("x", Kind::UnifiedPush)])
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_passes_is_tried_again() {
    let net = Net::new(1);
    host(&net, "a.example", "5.5.5.1", &[(503, None), (500, None)]);
    let door = door(&net);
    assert_eq!(door.rejected(&message(json!([device("https://a.example/")]))).await, json!([]));
    assert_eq!(net.take_arrived().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn tries_are_bounded_and_the_homeserver_asks_again() {
    let net = Net::new(1);
    host(&net, "a.example", "5.5.5.1", &[(500, None); 3]);
    let door = door(&net);
    let notification = message(json!([device("https://a.example/")]));
    let (status, _, body) = door.notify(&notification).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::BAD_GATEWAY, &json!("M_UNKNOWN")));
    assert!(body.get("rejected").is_none());
    assert_eq!(net.take_arrived().len(), 3);
    assert_eq!(door.rejected(&notification).await, json!([]));
    assert_eq!(net.take_arrived().len(), 1);
    assert_eq!((door.figures.of("unifiedpush failed"), door.figures.of("unifiedpush delivered")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_short_retry_after_is_waited_for() {
    let net = Net::new(1);
    host(&net, "a.example", "5.5.5.1", &[(429, Some("7"))]);
    let began = Instant::now();
    assert_eq!(door(&net).rejected(&message(json!([device("https://a.example/")]))).await, json!([]));
    assert!(
        (Duration::from_secs(7)..Duration::from_secs(9)).contains(&began.elapsed()),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_long_retry_after_is_handed_on_and_heeded_for_this_device_alone() {
    let net = Net::new(1);
    host(&net, "a.example", "5.5.5.1", &[(429, Some("120"))]);
    let door = door(&net);
    let notification = message(json!([device("https://a.example/1")]));
    let (status, headers, _) = door.notify(&notification).await;
    assert_eq!((status, headers["retry-after"].to_str().unwrap()), (StatusCode::BAD_GATEWAY, "120"));
    assert_eq!(net.take_arrived().len(), 1);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let (status, headers, _) = door.notify(&notification).await;
    assert_eq!((status, headers["retry-after"].to_str().unwrap()), (StatusCode::BAD_GATEWAY, "60"));
    assert!(net.take_arrived().is_empty(), "it is left alone");
    assert_eq!(door.rejected(&message(json!([device("https://a.example/2")]))).await, json!([]));
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(door.rejected(&notification).await, json!([]));
}

#[tokio::test(start_paused = true)]
async fn when_the_homeserver_asks_again_nobody_is_told_twice_and_what_is_gone_is_told_still() {
    let net = Net::new(1);
    host(&net, "well.example", "5.5.5.1", &[]);
    host(&net, "fails.example", "5.5.5.2", &[(500, None); 3]);
    host(&net, "gone.example", "5.5.5.3", &[(410, None); 9]);
    let door = door(&net);
    let devices = ["https://well.example/", "https://fails.example/", "https://gone.example/"].map(device);
    let notification = message(json!(devices));
    assert_eq!(door.notify(&notification).await.0, StatusCode::BAD_GATEWAY);
    net.take_arrived();
    assert_eq!(door.rejected(&notification).await, json!(["https://gone.example/"]));
    let arrived = net.take_arrived();
    assert!(!arrived.iter().any(|it| it.contains("well")), "{arrived:?}");
    assert_eq!(door.figures.of("unifiedpush skipped"), 1);
    // Another account on the same device has other data, and another event is another notification.
    let mut other = device("https://well.example/");
    other["data"] = json!({ "default_payload": { "account": "bob" } });
    door.rejected(&message(json!([other]))).await;
    let mut next = message(json!([device("https://well.example/")]));
    next["event_id"] = json!("$next");
    door.rejected(&next).await;
    assert_eq!(net.take_arrived().len(), 2);
    // Counts may be sent again and again.
    let counts = json!({ "counts": { "unread": 1 }, "devices": [device("https://well.example/")] });
    door.rejected(&counts).await;
    door.rejected(&counts).await;
    assert_eq!(net.take_arrived().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_not_found_or_a_host_that_is_down_may_come_back() {
    let net = Net::new(1);
    host(&net, "down.example", "5.5.5.1", &[]);
    net.weather("5.5.5.1:443", Weather::Refuses, Duration::ZERO);
    for endpoint in ["https://none.example/", "https://down.example/"] {
        let (status, _, body) = door(&net).notify(&message(json!([device(endpoint)]))).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY, "{endpoint}: {body}");
    }
}

#[tokio::test(start_paused = true)]
async fn equal_notifications_at_the_same_time_are_delivered_once() {
    let net = Net::new(1);
    host(&net, "a.example", "5.5.5.1", &[]);
    net.weather("5.5.5.1:443", Weather::Fair, Duration::from_secs(2));
    let door = door(&net);
    let twice = message(json!([device("https://a.example/"), device("https://a.example/")]));
    let answers = futures_util::future::join_all((0..5).map(|_| door.notify(&twice))).await;
    assert!(answers.iter().all(|(status, ..)| *status == StatusCode::OK));
    assert_eq!(net.take_arrived().len(), 1);
    // Where the one that was under way fails, one of those that waited for it delivers.
    host(&net, "b.example", "5.5.5.2", &[(403, None)]);
    let notification = message(json!([device("https://b.example/")]));
    let answers = futures_util::future::join_all((0..5).map(|_| door.notify(&notification))).await;
    let refused = answers.iter().filter(|(status, ..)| *status == StatusCode::BAD_REQUEST).count();
    assert_eq!((refused, net.take_arrived().len()), (1, 2));
}
