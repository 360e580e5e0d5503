//! Web Push: the message is decrypted with the key of the device, and the token is checked with the key of the app.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use federation::ports::Clock;
use http::StatusCode;
use push_gateway::settings::{App, Payload};
use serde_json::{Value, json};

use crate::world::{
    Arrived, Authority, Door, KeyFile, Provider, Real, Subscriber, message, vapid, web_app, web_device,
};

#[tokio::test]
async fn a_browser_reads_what_the_push_service_cannot() {
    let (authority, key, ann) = (Authority::new(), KeyFile::new(5), Subscriber::new(9));
    let service = Provider::start(&authority, "push.example", |_| (201, String::new())).await;
    let door = Door::real(&authority, vec![web_app("web", &key)]);
    let device = web_device(&ann, &service.url("/sub/1?x=y"));
    assert_eq!(door.rejected(&message(json!([device]))).await, json!([]));

    let arrived = service.one();
    assert_eq!((arrived.method.as_str(), arrived.path.as_str()), ("POST", "/sub/1?x=y"));
    assert_eq!(arrived.header("content-encoding"), "aes128gcm");
    assert_eq!((arrived.header("ttl"), arrived.header("urgency")), ("86400", "high"));
    assert_eq!(arrived.header("topic"), "");
    assert!(arrived.body.len() <= 4096);
    assert_eq!(
        ann.decrypt(&arrived.body),
        json!({
            "account": "ann", "event_id": "$event", "room_id": "!room:a.example", "type": "m.room.message",
            "sender": "@ann:a.example", "sender_display_name": "Ann", "room_name": "Kitchen",
            "content": { "msgtype": "m.text", "body": "Dinner is ready" }, "unread": 2, "missed_calls": 1,
        })
    );
    let text = String::from_utf8_lossy(&arrived.body);
    assert!(!text.contains("Dinner") && !text.contains("$event"), "the service sees nothing");

    let (claims, public) = vapid(arrived.header("authorization"));
    assert_eq!(public, URL_SAFE_NO_PAD.encode(&key.point));
    assert_eq!(claims["aud"], service.origin());
    assert_eq!(claims["sub"], "mailto:admin@example.org");
    let left_s = claims["exp"].as_u64().unwrap() - Real.now_ms() / 1000;
    assert!((1..=24 * 3600).contains(&left_s), "{left_s}");
    assert_eq!(door.figures.of("webpush delivered"), 1);
}

#[tokio::test]
async fn each_message_has_a_key_and_a_salt_of_its_own_and_the_token_is_used_again() {
    let (authority, key, ann) = (Authority::new(), KeyFile::new(5), Subscriber::new(9));
    let service = Provider::start(&authority, "push.example", |_| (201, String::new())).await;
    let door = Door::real(&authority, vec![web_app("web", &key)]);
    let device = web_device(&ann, &service.url("/sub/1"));
    for number in 0..2 {
        let mut notification = message(json!([device]));
        notification["event_id"] = json!(format!("${number}"));
        door.rejected(&notification).await;
    }
    let arrived = service.take();
    let [first, second] = arrived.as_slice() else { panic!("{arrived:?}") };
    assert_ne!(first.body[..16], second.body[..16], "salts");
    assert_ne!(first.body[21..86], second.body[21..86], "keys");
    assert_eq!(first.header("authorization"), second.header("authorization"));
}

#[tokio::test]
async fn the_wishes_of_a_pusher_are_heeded() {
    let (authority, key, ann) = (Authority::new(), KeyFile::new(5), Subscriber::new(9));
    let service = Provider::start(&authority, "push.example", |_| (201, String::new())).await;
    let ids = App { payload: Payload::EventIdOnly, ttl_s: 60, ..web_app("ids", &key) };
    let door = Door::real(&authority, vec![web_app("web", &key), ids]);
    let device = web_device(&ann, &service.url("/sub/1"));
    let badge = |flag: &str| {
        let mut device = device.clone();
        device["data"][flag] = json!(true);
        json!({ "counts": { "unread": 0 }, "devices": [device] })
    };
    door.rejected(&badge("events_only")).await;
    assert!(service.take().is_empty());
    door.rejected(&badge("x")).await;
    assert_eq!(ann.decrypt(&service.one().body), json!({ "account": "ann", "unread": 0 }));

    let mut last = device.clone();
    last["data"]["only_last_per_room"] = json!(true);
    let mut notification = message(json!([last]));
    notification["prio"] = json!("low");
    door.rejected(&notification).await;
    let arrived = service.one();
    let topic = arrived.header("topic");
    assert_eq!(topic.len(), 32);
    assert!(topic.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_".contains(&it)), "{topic}");
    assert_eq!(arrived.header("urgency"), "low");

    let mut of_ids = device.clone();
    of_ids["app_id"] = json!("ids");
    door.rejected(&message(json!([of_ids]))).await;
    let arrived = service.one();
    assert_eq!(arrived.header("ttl"), "60");
    assert_eq!(
        ann.decrypt(&arrived.body),
        json!({ "account": "ann", "event_id": "$event", "room_id": "!room:a.example", "unread": 2, "missed_calls": 1 })
    );
}

#[tokio::test]
async fn a_large_event_is_shortened_until_it_fits() {
    let (authority, key, ann) = (Authority::new(), KeyFile::new(5), Subscriber::new(9));
    let service = Provider::start(&authority, "push.example", |_| (201, String::new())).await;
    let door = Door::real(&authority, vec![web_app("web", &key)]);
    let mut notification = message(json!([web_device(&ann, &service.url("/sub/1"))]));
    notification["content"]["body"] = json!("ü".repeat(30_000));
    notification["content"]["ciphertext"] = json!({ "a": vec!["x"; 5_000] });
    door.rejected(&notification).await;
    let arrived = service.one();
    assert!(arrived.body.len() <= 4096, "{}", arrived.body.len());
    let read = ann.decrypt(&arrived.body);
    assert_eq!((&read["event_id"], &read["account"]), (&json!("$event"), &json!("ann")));
    let body = read["content"]["body"].as_str().unwrap();
    assert!(body.starts_with("üü") && body.ends_with('…'), "{body}");

    // The fields that the pusher itself asks for are not cut, so that nothing is sent; that is no failure which would hold up what follows.
    let mut device = web_device(&ann, &service.url("/sub/1"));
    device["data"]["default_payload"] = json!({ "x": "x".repeat(5_000) });
    assert_eq!(door.rejected(&message(json!([device]))).await, json!([]));
    assert!(service.take().is_empty());
    assert_eq!(door.figures.of("webpush unfit"), 1);
}

#[tokio::test]
async fn only_push_keys_that_are_gone_are_rejected() {
    let (authority, key) = (Authority::new(), KeyFile::new(5));
    let service = Provider::start(&authority, "push.example", |arrived| {
        let status = arrived.path.trim_start_matches('/').parse().unwrap();
        (status, "why not".to_owned())
    })
    .await;
    let door = Door::real(&authority, vec![web_app("web", &key)]);
    let device =
        |status: u16, seed: u8| web_device(&Subscriber::new(seed), &service.url(&format!("/{status}")));
    let gone = [Subscriber::new(1).p256dh(), Subscriber::new(2).p256dh()];
    let devices = json!([
        device(404, 1),
        device(410, 2),
        device(201, 3),
        device(413, 4),
        device(403, 5),
        device(400, 6)
    ]);
    let rejected = door.rejected(&message(devices)).await;
    let mut rejected: Vec<String> = serde_json::from_value(rejected).unwrap();
    let mut expected = gone.to_vec();
    rejected.sort();
    expected.sort();
    assert_eq!(rejected, expected);

    // Alone, what the service refuses is told to the homeserver, which keeps the pusher.
    let (status, _, body) = door.notify(&message(json!([device(403, 5)]))).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")), "{body}");
    let (status, _, body) = door.notify(&message(json!([device(302, 7)]))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(body["error"].as_str().unwrap().contains("redirects"), "{body}");
}

#[tokio::test]
async fn a_device_that_cannot_be_reached_is_refused_with_its_field() {
    let (authority, key, ann) = (Authority::new(), KeyFile::new(5), Subscriber::new(9));
    let door = Door::real(
        &authority,
        vec![App { hosts_allowed: vec!["*.push.example".to_owned()], ..web_app("web", &key) }],
    );
    let with = |change: &dyn Fn(&mut Value)| {
        let mut device = web_device(&ann, "https://a.push.example/x");
        change(&mut device);
        message(json!([device]))
    };
    for (notification, word) in [
        (with(&|it| it["pushkey"] = json!("AAAA")), "public key"),
        (with(&|it| it["data"]["auth"] = json!("AAAA")), "data.auth"),
        (with(&|it| it["data"]["auth"] = Value::Null), "data.auth"),
        (with(&|it| it["data"]["endpoint"] = Value::Null), "data.endpoint"),
        (with(&|it| it["data"]["endpoint"] = json!("http://a.push.example/")), "https"),
        (with(&|it| it["data"]["endpoint"] = json!("https://push.example.org/")), "host"),
        (with(&|it| it["data"]["default_payload"] = json!([])), "default_payload"),
    ] {
        let (status, _, body) = door.notify(&notification).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert!(body["error"].as_str().unwrap().contains(word), "{word}: {body}");
    }
}

#[tokio::test]
async fn a_topic_tells_the_push_service_neither_the_room_nor_who_shares_it() {
    let (authority, key) = (Authority::new(), KeyFile::new(5));
    let service = Provider::start(&authority, "push.example", |_| (201, String::new())).await;
    let door = Door::real(&authority, vec![web_app("web", &key)]);
    let mut topics = Vec::new();
    for (seed, event_id) in [(1, "$a"), (1, "$b"), (2, "$a")] {
        let endpoint = service.url(&format!("/sub/{seed}"));
        let mut device = web_device(&Subscriber::new(seed), &endpoint);
        device["data"]["only_last_per_room"] = json!(true);
        let mut notification = message(json!([device]));
        notification["event_id"] = json!(event_id);
        door.rejected(&notification).await;
        topics.push(service.one().header("topic").to_owned());
    }
    assert_eq!(topics[0], topics[1]);
    assert_ne!(topics[0], topics[2]);
}

#[tokio::test]
async fn nobody_has_the_subscription_of_another_left_alone() {
    let (authority, key, ann) = (Authority::new(), KeyFile::new(5), Subscriber::new(9));
    let busy = |arrived: &Arrived| match arrived.path.as_str() {
        "/attacker" => (503, String::new()),
        _ => (201, String::new()),
    };
    let service = Provider::start_with(&authority, "push.example", busy, &[("retry-after", "3600")]).await;
    let door = Door::real(&authority, vec![web_app("web", &key)]);
    // The push key is public, and here it is named with an endpoint that asks to be left alone.
    let (status, headers, _) =
        door.notify(&message(json!([web_device(&ann, &service.url("/attacker"))]))).await;
    assert_eq!((status, headers["retry-after"].to_str().unwrap()), (StatusCode::BAD_GATEWAY, "3600"));
    assert_eq!(door.rejected(&message(json!([web_device(&ann, &service.url("/real"))]))).await, json!([]));
}
