//! UnifiedPush: the push key is the endpoint, and the message is the notification of the homeserver.

use axum::body::Body;
use http::{Request, StatusCode};
use push_gateway::{
    NOTIFY_PATH,
    settings::{App, Kind, Payload},
};
use serde_json::json;

use crate::world::{Authority, Door, KeyFile, Provider, Subscriber, message, vapid, web_app};

#[tokio::test]
async fn a_distributor_gets_the_notification_without_its_devices() {
    let authority = Authority::new();
    let service = Provider::start(&authority, "ntfy.example", |_| (200, "{}".to_owned())).await;
    let door = Door::real(&authority, vec![App::new("*", Kind::UnifiedPush)]);
    let endpoint = service.url("/upXYZ?up=1");
    let device =
        json!({ "app_id": "io.example.android", "pushkey": endpoint, "data": { "format": "event_id_only" } });
    let ids = json!({
        "event_id": "$event", "room_id": "!room:a.example", "prio": "high", "counts": { "unread": 3 },
        "devices": [device],
    });
    assert_eq!(door.rejected(&ids).await, json!([]));
    let arrived = service.one();
    assert_eq!(arrived.path, "/upXYZ?up=1");
    assert_eq!((arrived.header("content-encoding"), arrived.header("authorization")), ("", ""));
    assert_eq!((arrived.header("ttl"), arrived.header("urgency")), ("86400", "high"));
    assert_eq!(
        arrived.json(),
        json!({ "notification": {
            "event_id": "$event", "room_id": "!room:a.example", "prio": "high", "counts": { "unread": 3 },
        } })
    );
    door.rejected(&{
        let mut whole = message(json!([device]));
        whole["event_id"] = json!("$other");
        whole["content"]["body"] = json!("x".repeat(9_000));
        whole
    })
    .await;
    let arrived = service.one();
    assert!(arrived.body.len() <= 4096);
    assert_eq!(arrived.json()["notification"]["sender"], "@ann:a.example");
}

#[tokio::test]
async fn where_keys_are_given_the_message_is_encrypted() {
    let (authority, key, ann) = (Authority::new(), KeyFile::new(5), Subscriber::new(9));
    let service = Provider::start(&authority, "autopush.example", |_| (201, String::new())).await;
    let app = App { kind: Kind::UnifiedPush, payload: Payload::EventIdOnly, ..web_app("*", &key) };
    let door = Door::real(&authority, vec![app]);
    let device = json!({
        "app_id": "x", "pushkey": service.url("/wpush/v2/x"), "data": { "p256dh": ann.p256dh(), "auth": ann.auth() },
    });
    door.rejected(&message(json!([device]))).await;
    let arrived = service.one();
    assert_eq!(arrived.header("content-encoding"), "aes128gcm");
    assert_eq!(
        ann.decrypt(&arrived.body),
        json!({ "notification": {
            "event_id": "$event", "room_id": "!room:a.example", "prio": "high", "counts": { "unread": 2, "missed_calls": 1 },
        } })
    );
    let (claims, _) = vapid(arrived.header("authorization"));
    assert_eq!(claims["aud"], service.origin());
    for half in [json!({ "p256dh": ann.p256dh() }), json!({ "auth": ann.auth() })] {
        let device = json!({ "app_id": "x", "pushkey": service.url("/x"), "data": half });
        let (status, _, body) = door.notify(&message(json!([device]))).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
    }
    assert!(service.take().is_empty(), "nothing goes out in the clear where keys were meant");
}

#[tokio::test]
async fn clients_find_out_that_there_is_a_gateway() {
    let (authority, key) = (Authority::new(), KeyFile::new(5));
    let ask = async |door: &Door, method: &str, path: &str| {
        door.ask(Request::builder().method(method).uri(path).body(Body::empty()).unwrap()).await
    };
    let unified = Door::real(&authority, vec![App::new("*", Kind::UnifiedPush)]);
    let (status, _, body) = ask(&unified, "GET", NOTIFY_PATH).await;
    assert_eq!((status, &body["unifiedpush"]["gateway"]), (StatusCode::OK, &json!("matrix")));
    let web = Door::real(&authority, vec![web_app("web", &key)]);
    for (door, method, path, status) in [
        (&web, "GET", NOTIFY_PATH, StatusCode::METHOD_NOT_ALLOWED),
        (&unified, "PUT", NOTIFY_PATH, StatusCode::METHOD_NOT_ALLOWED),
        (&unified, "POST", "/_matrix/push/v1/other", StatusCode::NOT_FOUND),
    ] {
        let (answered, _, body) = ask(door, method, path).await;
        assert_eq!((answered, &body["errcode"]), (status, &json!("M_UNRECOGNIZED")), "{method} {path}");
    }
}

#[tokio::test]
async fn an_endpoint_that_is_gone_is_rejected() {
    let authority = Authority::new();
    let service = Provider::start(&authority, "ntfy.example", |_| (404, String::new())).await;
    let door = Door::real(&authority, vec![App::new("*", Kind::UnifiedPush)]);
    let endpoint = service.url("/up1");
    let devices = json!([{ "app_id": "x", "pushkey": endpoint }]);
    assert_eq!(door.rejected(&message(devices)).await, json!([endpoint]));
}
