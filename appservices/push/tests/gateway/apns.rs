//! APNs: HTTP/2, a token that the key of the team signed, and the headers and reasons that Apple documents.

use base64::{Engine, engine::general_purpose::STANDARD};
use federation::ports::Clock;
use http::{StatusCode, Version};
use push_gateway::settings::{App, Kind, PushType, TokenEncoding};
use serde_json::{Value, json};

use crate::world::{Arrived, Authority, Door, KeyFile, Provider, Real, message};

const TOKEN: [u8; 32] = [0xab; 32];

fn app(key: &KeyFile, apple: &Provider) -> App {
    App {
        key_file: key.file.path().to_owned(),
        key_id: "KEY1234567".to_owned(),
        team_id: "TEAM123456".to_owned(),
        topic: "org.example.app".to_owned(),
        url: apple.origin(),
        ..App::new("ios", Kind::Apns)
    }
}

fn device(token: &[u8], data: Value) -> Value {
    json!({ "app_id": "ios", "pushkey": STANDARD.encode(token), "data": data, "tweaks": { "sound": "ping" } })
}

fn taken(_: &Arrived) -> (u16, String) {
    (200, String::new())
}

fn reason(status: u16, reason: &str) -> (u16, String) {
    (status, json!({ "reason": reason }).to_string())
}

#[tokio::test]
async fn an_alert_goes_over_http2_with_a_token_of_the_team() {
    let (authority, key) = (Authority::new(), KeyFile::new(7));
    let apple = Provider::start(&authority, "apple.example", taken).await;
    let door = Door::real(&authority, vec![app(&key, &apple)]);
    let own = json!({ "default_payload": { "aps": { "mutable-content": 1 }, "own": "x" } });
    assert_eq!(door.rejected(&message(json!([device(&TOKEN, own)]))).await, json!([]));

    let arrived = apple.one();
    assert_eq!(arrived.version, Version::HTTP_2);
    assert_eq!(arrived.path, format!("/3/device/{}", "ab".repeat(32)));
    assert_eq!(
        (arrived.header("apns-topic"), arrived.header("apns-push-type")),
        ("org.example.app", "alert")
    );
    assert_eq!(arrived.header("apns-priority"), "10");
    let expires_s: u64 = arrived.header("apns-expiration").parse().unwrap();
    assert!(expires_s.abs_diff(Real.now_ms() / 1000 + 24 * 3600) < 60, "{expires_s}");
    let id: Vec<_> = arrived.header("apns-id").split('-').map(str::len).collect();
    assert_eq!(id, [8, 4, 4, 4, 12]);
    let token = arrived.header("authorization").strip_prefix("bearer ").unwrap();
    let (head, claims) = key.verify(token);
    assert_eq!(head.kid.as_deref(), Some("KEY1234567"));
    assert_eq!(claims["iss"], "TEAM123456");
    assert!(claims["iat"].as_u64().unwrap().abs_diff(Real.now_ms() / 1000) < 60);
    assert_eq!(
        arrived.json(),
        json!({
            "own": "x", "event_id": "$event", "room_id": "!room:a.example",
            "aps": {
                "mutable-content": 1, "badge": 3, "sound": "ping",
                "alert": {
                    "loc-key": "MSG_FROM_USER_IN_ROOM_WITH_CONTENT",
                    "loc-args": ["Ann", "Kitchen", "Dinner is ready"],
                },
            },
        })
    );
}

#[tokio::test]
async fn ids_alone_come_with_what_the_pusher_asks_for() {
    let (authority, key) = (Authority::new(), KeyFile::new(7));
    let apple = Provider::start(&authority, "apple.example", taken).await;
    let door = Door::real(&authority, vec![app(&key, &apple)]);
    let own = json!({ "default_payload": {
        "aps": { "mutable-content": 1, "alert": { "loc-key": "Notification", "loc-args": [] } }, "client": "c",
    }, "only_last_per_room": true });
    let ids = json!({
        "event_id": "$event", "room_id": "!room:a.example", "counts": { "unread": 5 }, "prio": "low",
        "devices": [device(&TOKEN, own)],
    });
    door.rejected(&ids).await;
    let arrived = apple.one();
    assert_eq!(arrived.header("apns-priority"), "5");
    assert_eq!(arrived.header("apns-collapse-id").len(), 64);
    assert_eq!(
        arrived.json(),
        json!({
            "aps": { "mutable-content": 1, "alert": { "loc-key": "Notification", "loc-args": [] } }, "client": "c",
            "event_id": "$event", "room_id": "!room:a.example", "unread_count": 5,
        })
    );
    // Counts alone change the number at the app's icon, and show nothing.
    door.rejected(&json!({ "counts": { "unread": 0 }, "devices": [device(&TOKEN, json!({}))] })).await;
    assert_eq!(apple.one().json(), json!({ "aps": { "badge": 0 } }));
    door.rejected(&json!({ "devices": [device(&TOKEN, json!({}))] })).await;
    assert!(apple.take().is_empty(), "there is nothing to say");
}

#[tokio::test]
async fn messages_in_the_background_and_tokens_in_digits() {
    let (authority, key) = (Authority::new(), KeyFile::new(7));
    let apple = Provider::start(&authority, "apple.example", taken).await;
    let background = App {
        push_type: PushType::Background,
        token_encoding: TokenEncoding::Hex,
        ttl_s: 0,
        ..app(&key, &apple)
    };
    let door = Door::real(&authority, vec![background]);
    let mut device = device(&TOKEN, json!({}));
    device["pushkey"] = json!("AB".repeat(32));
    door.rejected(&json!({ "event_id": "$event", "devices": [device] })).await;
    let arrived = apple.one();
    assert_eq!(arrived.path, format!("/3/device/{}", "ab".repeat(32)));
    assert_eq!((arrived.header("apns-push-type"), arrived.header("apns-priority")), ("background", "5"));
    assert_eq!(arrived.header("apns-expiration"), "0");
    assert_eq!(arrived.json()["aps"]["content-available"], 1);
}

#[tokio::test]
async fn only_tokens_that_apple_says_are_gone_are_rejected() {
    let (authority, key) = (Authority::new(), KeyFile::new(7));
    let apple = Provider::start(&authority, "apple.example", |it| match &it.path[it.path.len() - 2..] {
        "01" => reason(400, "BadDeviceToken"),
        "02" => reason(410, "Unregistered"),
        "03" => reason(400, "DeviceTokenNotForTopic"),
        "04" => reason(413, "PayloadTooLarge"),
        _ => (200, String::new()),
    })
    .await;
    let door = Door::real(&authority, vec![app(&key, &apple)]);
    let devices: Vec<_> = (1..=5).map(|last| device(&[last; 32], json!({}))).collect();
    let rejected: Vec<String> =
        serde_json::from_value(door.rejected(&message(json!(devices))).await).unwrap();
    assert_eq!(rejected, [STANDARD.encode([1; 32]), STANDARD.encode([2; 32])]);
}

#[tokio::test]
async fn a_fault_of_the_operators_settings_costs_nobody_a_pusher() {
    let (authority, key) = (Authority::new(), KeyFile::new(7));
    let apple = Provider::start(&authority, "apple.example", |_| reason(403, "InvalidProviderToken")).await;
    let door = Door::real(&authority, vec![app(&key, &apple)]);
    let (status, _, body) = door.notify(&message(json!([device(&TOKEN, json!({}))]))).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY, "{body}");
    let sent = apple.take();
    assert_eq!(sent.len(), 3, "it is tried a bounded number of times");
    assert!(sent.iter().all(|it| it.header("apns-id") == sent[0].header("apns-id")));
    assert!(sent.iter().all(|it| it.header("authorization") == sent[0].header("authorization")));
}

#[tokio::test]
async fn a_push_key_that_is_no_device_token_is_refused() {
    let (authority, key) = (Authority::new(), KeyFile::new(7));
    let apple = Provider::start(&authority, "apple.example", taken).await;
    let door = Door::real(&authority, vec![app(&key, &apple)]);
    for pushkey in ["../../x", "AAAA", &"A".repeat(400), "ü"] {
        let mut device = device(&TOKEN, json!({}));
        device["pushkey"] = json!(pushkey);
        let (status, _, body) = door.notify(&message(json!([device]))).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{pushkey}: {body}");
    }
    assert!(apple.take().is_empty());
    let mut large = message(json!([device(&TOKEN, json!({}))]));
    large["content"]["body"] = json!("\u{1}".repeat(20_000));
    large["room_name"] = json!("\u{1}".repeat(20_000));
    door.rejected(&large).await;
    assert!(apple.one().body.len() <= 4096);
}
