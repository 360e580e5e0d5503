//! Requests of homeservers that are too large, too many, too slow or for somebody else.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use federation::testing::{Net, Weather};
use futures_util::StreamExt;
use http::{Request, StatusCode};
use push_gateway::{
    NOTIFY_PATH,
    settings::{App, Kind},
};
use serde_json::{Value, json};

use crate::world::{Door, message};

fn door(net: &Net) -> Door {
    Door::simulated(
        net,
        vec![App::new("org.example.*", Kind::UnifiedPush), App::new("exact", Kind::UnifiedPush)],
    )
}

async fn post(door: &Door, body: impl Into<Body>) -> (StatusCode, Value) {
    let (status, _, body) = door.ask(Request::post(NOTIFY_PATH).body(body.into()).unwrap()).await;
    (status, body["errcode"].clone())
}

#[tokio::test(start_paused = true)]
async fn what_is_no_notification_is_refused() {
    let net = Net::new(1);
    let door = door(&net);
    let deep = format!("{{\"notification\":{{\"content\":{}{}}}}}", "[".repeat(3_000), "]".repeat(3_000));
    let many = format!("{{\"notification\":{{\"content\":{{\"a\":[{}0]}}}}}}", "0,".repeat(20_000));
    for (body, status, errcode) in [
        (String::new(), StatusCode::BAD_REQUEST, "M_NOT_JSON"),
        ("[]".to_owned(), StatusCode::BAD_REQUEST, "M_BAD_JSON"),
        ("{\"notification\":{}}".to_owned(), StatusCode::BAD_REQUEST, "M_MISSING_PARAM"),
        ("{\"notification\":{\"devices\":[]}}x".to_owned(), StatusCode::BAD_REQUEST, "M_NOT_JSON"),
        ("\u{0}".to_owned(), StatusCode::BAD_REQUEST, "M_NOT_JSON"),
        ("x".repeat((256 << 10) + 1), StatusCode::PAYLOAD_TOO_LARGE, "M_TOO_LARGE"),
        (deep, StatusCode::PAYLOAD_TOO_LARGE, "M_TOO_LARGE"),
        (many, StatusCode::PAYLOAD_TOO_LARGE, "M_TOO_LARGE"),
    ] {
        assert_eq!(post(&door, body.clone()).await, (status, json!(errcode)), "{body:.60}");
    }
    let broken = vec![0xff, 0xfe, b'{'];
    assert_eq!(post(&door, broken).await, (StatusCode::BAD_REQUEST, json!("M_NOT_JSON")));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let net = Net::new(1);
    let began = tokio::time::Instant::now();
    let drips = futures_util::stream::repeat(()).then(|()| async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok::<_, std::io::Error>(Bytes::from_static(b" "))
    });
    let (status, _) = post(&door(&net), Body::from_stream(drips)).await;
    assert_eq!(status, StatusCode::REQUEST_TIMEOUT);
    assert!(began.elapsed() <= Duration::from_secs(16), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_app_that_is_not_here_is_told_and_keeps_its_push_key() {
    let net = Net::new(1);
    net.host("a.example", &["5.5.5.1"]);
    net.serve_json("5.5.5.1:443", &["a.example"], "{}");
    let door = door(&net);
    let device = |app_id: &str| json!({ "app_id": app_id, "pushkey": "https://a.example/" });
    let (status, _, body) = door.notify(&message(json!([device("com.example.other")]))).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")), "{body}");
    assert_eq!(door.figures.of("none unknown_app"), 1);
    // Beside one that is here it is left out.
    let devices = json!([device("com.example.other"), device("org.example.android"), device("exact")]);
    assert_eq!(door.rejected(&message(devices)).await, json!([]));
    assert_eq!(net.take_arrived().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn one_caller_has_a_share_and_another_has_theirs() {
    let net = Net::new(1);
    net.host("silent.example", &["5.5.5.1"]);
    net.serve_json("5.5.5.1:443", &["silent.example"], "{}");
    net.weather("5.5.5.1:443", Weather::Silent, Duration::ZERO);
    net.host("well.example", &["5.5.5.2"]);
    net.serve_json("5.5.5.2:443", &["well.example"], "{}");
    let door = door(&net);
    let to = |host: &str| message(json!([{ "app_id": "exact", "pushkey": format!("https://{host}/") }]));
    let (slow, well) = (to("silent.example"), to("well.example"));
    let flood = futures_util::future::join_all((0..300).map(|_| door.notify(&slow)));
    let other = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let same = door.notify(&well).await.0;
        (same, door.notify_from([192, 0, 2, 2].into(), &well).await.0)
    };
    let (answers, (same, other)) = futures_util::future::join(flood, other).await;
    let refused = answers.iter().filter(|(status, ..)| *status == StatusCode::TOO_MANY_REQUESTS).count();
    assert_eq!(refused, 300 - 256);
    let (_, headers, body) =
        answers.iter().find(|(status, ..)| *status == StatusCode::TOO_MANY_REQUESTS).unwrap();
    assert_eq!(
        (&body["errcode"], headers["retry-after"].to_str().unwrap()),
        (&json!("M_LIMIT_EXCEEDED"), "1")
    );
    assert_eq!((same, other), (StatusCode::TOO_MANY_REQUESTS, StatusCode::OK));
}
