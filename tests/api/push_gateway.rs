//! `src/server/gateway.rs`: the push gateway on the listeners of the homeserver, where an app is configured.

use aqueduct::{
    api::extract::Peer,
    config::Config,
    store::{Durability, Engine, Store, engine::Memory},
};
use axum::body::Body;
use federation::testing::{Net, bytes};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use push_gateway::settings::{App, Kind};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{TestServer, network::doors};

const NOTIFY: &str = "/_matrix/push/v1/notify";

fn server(net: &Net, change: impl FnOnce(&mut Config)) -> TestServer {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    TestServer::start(doors(net), store, change)
}

async fn ask(server: &TestServer, method: Method, body: &Value) -> (StatusCode, Value) {
    let request = Request::builder().method(method).uri(NOTIFY).extension(Peer([192, 0, 2, 1].into()));
    let request = request.body(Body::from(body.to_string())).unwrap();
    let response = server.server().router().oneshot(request).await.unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (head.status, serde_json::from_slice(&body).unwrap())
}

fn notification(endpoint: &str) -> Value {
    json!({ "notification": {
        "event_id": "$event", "room_id": "!room:test.example", "counts": { "unread": 1 },
        "devices": [{ "app_id": "org.example.app", "pushkey": endpoint }],
    } })
}

#[tokio::test(start_paused = true)]
async fn the_homeserver_is_a_push_gateway_where_an_app_is_configured() {
    let net = Net::new(1);
    net.host("push.example", &["5.5.5.5"]);
    net.serve("5.5.5.5:443", &["push.example"], |arrived| {
        let status = if arrived.request.uri().path() == "/gone" { 404 } else { 201 };
        std::future::ready(bytes(status, &[], bytes::Bytes::new()))
    });
    net.host("inner.example", &["10.0.0.5"]);
    let with =
        server(&net, |config| config.push_gateway.apps = vec![App::new("org.example.*", Kind::UnifiedPush)]);
    let answer = ask(&with, Method::POST, &notification("https://push.example/up")).await;
    assert_eq!(answer, (StatusCode::OK, json!({ "rejected": [] })));
    let answer = ask(&with, Method::POST, &notification("https://push.example/gone")).await;
    assert_eq!(answer, (StatusCode::OK, json!({ "rejected": ["https://push.example/gone"] })));
    assert_eq!(
        net.take_arrived(),
        [
            "push.example@5.5.5.5:443 push.example POST /up",
            "push.example@5.5.5.5:443 push.example POST /gone"
        ]
    );
    let (status, body) = ask(&with, Method::POST, &notification("https://inner.example/")).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")), "{body}");
    assert_eq!(ask(&with, Method::GET, &json!({})).await.1["unifiedpush"]["gateway"], "matrix");
    let (status, body) = ask(&with, Method::PUT, &json!({})).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::METHOD_NOT_ALLOWED, &json!("M_UNRECOGNIZED")));
    let figures = with.server().app().metrics.text();
    for line in [
        r#"aqueduct_push_gateway_devices_total{kind="unifiedpush",outcome="delivered"} 1"#,
        r#"aqueduct_push_gateway_devices_total{kind="unifiedpush",outcome="gone"} 1"#,
        r#"aqueduct_http_requests_total{method="POST",route="/_matrix/push/v1/notify",status="200"} 2"#,
    ] {
        assert!(figures.contains(line), "{line} is not in\n{figures}");
    }

    let without = server(&net, |_| {});
    let (status, body) = ask(&without, Method::POST, &notification("https://push.example/up")).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::NOT_FOUND, &json!("M_UNRECOGNIZED")));
    assert!(net.take_arrived().is_empty());
}

#[tokio::test(start_paused = true)]
async fn private_addresses_are_reached_only_where_the_operator_lets_it() {
    let net = Net::new(1);
    net.host("inner.example", &["10.0.0.5"]);
    net.serve_json("10.0.0.5:443", &["inner.example"], "{}");
    let apps = || vec![App::new("*", Kind::UnifiedPush)];
    let closed = server(&net, |config| config.push_gateway.apps = apps());
    let open = server(&net, |config| {
        config.push_gateway.apps = apps();
        config.outbound.allow_private_addresses = true;
    });
    let network = server(&net, |config| {
        config.push_gateway.apps = apps();
        config.push_gateway.networks_allowed = vec!["10.0.0.0/8".to_owned()];
    });
    let notification = notification("https://inner.example/");
    assert_eq!(ask(&closed, Method::POST, &notification).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(ask(&open, Method::POST, &notification).await.0, StatusCode::OK);
    assert_eq!(ask(&network, Method::POST, &notification).await.0, StatusCode::OK);
}
