//! Firebase Cloud Messaging: the assertion is checked with the key of the service account, and each message has the token it was exchanged for.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use federation::{
    ports::Clock,
    testing::{Net, Weather, json as answer_json},
};
use http::StatusCode;
use push_gateway::{
    Settings,
    settings::{App, Kind},
};
use rand::SeedableRng;
use rsa::pkcs8::{EncodePrivateKey, EncodePublicKey, LineEnding};
use serde_json::{Value, json};

use crate::world::{Arrived, Authority, Door, Log, Provider, Real, file, message};

/// Making a key takes a second, so that all tests have one: the private key and the public key in PEM.
static KEY: LazyLock<(String, String)> = LazyLock::new(|| {
    let mut rng = rand::rngs::ChaCha20Rng::seed_from_u64(7);
    let key = rsa::PrivateKey::new(&mut rng, 2048).unwrap();
    let public = rsa::PublicKey::from(&key).to_public_key_pem(LineEnding::LF).unwrap();
    (key.to_pkcs8_pem(LineEnding::LF).unwrap().to_string(), public)
});

/// Google: the endpoint of tokens, and Firebase.
struct Google {
    tokens: Provider,
    firebase: Provider,
    account: tempfile::NamedTempFile,
}

impl Google {
    /// It grants a new token each time, for so many seconds, and Firebase answers so.
    async fn start(
        authority: &Authority,
        token_s: u64,
        answer: impl Fn(&Arrived) -> (u16, String) + Clone + Send + 'static,
    ) -> Self {
        let count = Arc::new(AtomicU32::new(1));
        let grant = move |_: &Arrived| {
            let token = format!("token-{}", count.fetch_add(1, Ordering::Relaxed));
            (200, json!({ "access_token": token, "expires_in": token_s, "token_type": "Bearer" }).to_string())
        };
        let tokens = Provider::start(authority, "oauth2.example", grant).await;
        let firebase = Provider::start(authority, "fcm.example", answer).await;
        let account = json!({
            "type": "service_account", "project_id": "my-project", "private_key_id": "key-1", "private_key": KEY.0,
            "client_email": "push@my-project.example", "token_uri": tokens.url("/token"),
        });
        Self { tokens, firebase, account: file(&account.to_string()) }
    }

    fn app(&self) -> App {
        let service_account_file = self.account.path().to_owned();
        App { service_account_file, url: self.firebase.origin(), ..App::new("android", Kind::Fcm) }
    }
}

/// An app of Google in a simulated network, whose token is answered so, and a message so. Firebase is at 5.5.5.2.
fn simulated(
    net: &Net,
    token: (u16, &'static str),
    answer: impl Fn(&Value) -> (u16, String) + Send + Sync + 'static,
) -> (App, tempfile::NamedTempFile) {
    net.host("oauth2.example", &["5.5.5.1"]);
    net.serve("5.5.5.1:443", &["oauth2.example"], move |_| std::future::ready(answer_json(token.0, token.1)));
    net.host("fcm.example", &["5.5.5.2"]);
    net.serve("5.5.5.2:443", &["fcm.example"], move |arrived| {
        let (status, body) = answer(&serde_json::from_slice(arrived.request.body()).unwrap());
        std::future::ready(answer_json(status, body))
    });
    let account = file(
        &json!({
            "project_id": "my-project", "private_key": KEY.0, "client_email": "a@b.example",
            "token_uri": "https://oauth2.example/token",
        })
        .to_string(),
    );
    let service_account_file = account.path().to_owned();
    let url = "https://fcm.example".to_owned();
    (App { service_account_file, url, ..App::new("android", Kind::Fcm) }, account)
}

fn taken(_: &Arrived) -> (u16, String) {
    (200, json!({ "name": "projects/my-project/messages/1" }).to_string())
}

fn device(pushkey: &str) -> Value {
    json!({ "app_id": "android", "pushkey": pushkey, "data": { "default_payload": { "cs": "secret", "n": 1 } } })
}

/// An answer of Firebase that is no success.
fn refused(status: u16, code: &str) -> (u16, String) {
    let kind = "type.googleapis.com/google.firebase.fcm.v1.FcmError";
    let details = json!([{ "@type": kind, "errorCode": code }]);
    (
        status,
        json!({ "error": { "code": status, "message": "no", "status": "X", "details": details } })
            .to_string(),
    )
}

#[tokio::test]
async fn an_assertion_is_exchanged_for_a_token_that_sends_messages() {
    let authority = Authority::new();
    let google = Google::start(&authority, 3599, taken).await;
    let door = Door::real(&authority, vec![google.app()]);
    assert_eq!(door.rejected(&message(json!([device("registration-1")]))).await, json!([]));

    let asked = google.tokens.one();
    assert_eq!((asked.method.as_str(), asked.path.as_str()), ("POST", "/token"));
    assert_eq!(asked.header("content-type"), "application/x-www-form-urlencoded");
    let form: std::collections::BTreeMap<_, _> = url::form_urlencoded::parse(&asked.body)
        .map(|(key, value)| (key.into_owned(), value.into_owned()))
        .collect();
    assert_eq!(form["grant_type"], "urn:ietf:params:oauth:grant-type:jwt-bearer");
    let key = jsonwebtoken::DecodingKey::from_rsa_pem(KEY.1.as_bytes()).unwrap();
    let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::RS256);
    validation.set_audience(&[google.tokens.url("/token")]);
    let assertion = jsonwebtoken::decode::<Value>(&form["assertion"], &key, &validation).unwrap();
    assert_eq!(assertion.header.kid.as_deref(), Some("key-1"));
    assert_eq!(assertion.claims["iss"], "push@my-project.example");
    assert_eq!(assertion.claims["scope"], "https://www.googleapis.com/auth/firebase.messaging");
    let (iat, exp) = (assertion.claims["iat"].as_u64().unwrap(), assertion.claims["exp"].as_u64().unwrap());
    assert_eq!(exp - iat, 3600);
    assert!(iat.abs_diff(Real.now_ms() / 1000) < 60);

    let sent = google.firebase.one();
    assert_eq!(sent.path, "/v1/projects/my-project/messages:send");
    assert_eq!(sent.header("authorization"), "Bearer token-1");
    assert_eq!(
        sent.json(),
        json!({ "message": {
            "token": "registration-1",
            "android": { "priority": "HIGH", "ttl": "86400s" },
            "data": {
                "cs": "secret", "n": "1", "event_id": "$event", "room_id": "!room:a.example", "type": "m.room.message",
                "sender": "@ann:a.example", "sender_display_name": "Ann", "room_name": "Kitchen", "prio": "high",
                "content_msgtype": "m.text", "content_body": "Dinner is ready",
                "content_formatted_body": "<b>Dinner</b>", "unread": "2", "missed_calls": "1",
            },
        } })
    );
}

#[tokio::test]
async fn a_token_is_used_again_until_it_ends_and_asked_for_once() {
    let authority = Authority::new();
    let google = Google::start(&authority, 3599, taken).await;
    let door = Door::real(&authority, vec![google.app()]);
    let devices: Vec<_> = (0..8).map(|number| device(&format!("registration-{number}"))).collect();
    door.rejected(&message(json!(devices))).await;
    assert_eq!(google.tokens.take().len(), 1, "all wait for one");
    assert!(google.firebase.take().iter().all(|it| it.header("authorization") == "Bearer token-1"));

    // A token that holds for a second is used for none, so that each message has a new one.
    let google = Google::start(&authority, 1, taken).await;
    let door = Door::real(&authority, vec![google.app()]);
    for number in 1..=2 {
        door.rejected(&message(json!([device(&format!("registration-{number}"))]))).await;
        assert_eq!(google.firebase.one().header("authorization"), format!("Bearer token-{number}"));
    }
}

#[tokio::test]
async fn a_token_that_is_refused_is_renewed() {
    let authority = Authority::new();
    let google = Google::start(&authority, 3599, |it| {
        if it.header("authorization") == "Bearer token-1" {
            refused(401, "UNSPECIFIED_ERROR")
        } else {
            taken(it)
        }
    })
    .await;
    let door = Door::real(&authority, vec![google.app()]);
    assert_eq!(door.rejected(&message(json!([device("registration-1")]))).await, json!([]));
    let tokens: Vec<_> =
        google.firebase.take().iter().map(|it| it.header("authorization").to_owned()).collect();
    assert_eq!(tokens, ["Bearer token-1", "Bearer token-2"]);
}

#[tokio::test(start_paused = true)]
async fn one_caller_takes_neither_all_places_of_an_app_nor_its_quota() {
    let net = Net::new(1);
    let (app, _account) = simulated(&net, (200, r#"{"access_token":"t","expires_in":3600}"#), |sent| {
        if sent["message"]["token"] == "well" { (200, "{}".to_owned()) } else { refused(404, "UNREGISTERED") }
    });
    net.weather("5.5.5.2:443", Weather::Fair, Duration::from_secs(1));
    let door = Door::simulated(&net, vec![app]);
    let made_up: Vec<_> = (0..200)
        .map(|number| {
            let devices: Vec<_> = (0..32).map(|at| device(&format!("made-up-{number}-{at}"))).collect();
            message(json!(devices))
        })
        .collect();
    let attack = futures_util::future::join_all(
        made_up.iter().map(|it| door.notify_from([203, 0, 113, 9].into(), it)),
    );
    let honest = async {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        let began = tokio::time::Instant::now();
        let (status, ..) = door.notify_from([192, 0, 2, 77].into(), &message(json!([device("well")]))).await;
        (status, began.elapsed())
    };
    let (_, (status, took)) = futures_util::future::join(attack, honest).await;
    assert_eq!(status, StatusCode::OK);
    assert!(took < Duration::from_secs(2), "{took:?}");
    let asked = net.take_arrived().iter().filter(|it| it.contains("fcm.example")).count();
    assert!((1_000..=1_500).contains(&asked), "{asked} of 6,400 made-up tokens cost a request");
}

#[tokio::test]
async fn only_registrations_that_are_gone_are_rejected() {
    let authority = Authority::new();
    let google =
        Google::start(&authority, 3599, |it| match it.json()["message"]["token"].as_str().unwrap() {
            "gone" => refused(404, "UNREGISTERED"),
            "other-sender" => refused(403, "SENDER_ID_MISMATCH"),
            "too-big" => refused(400, "INVALID_ARGUMENT"),
            _ => taken(it),
        })
        .await;
    let door = Door::real(&authority, vec![google.app()]);
    let devices = ["gone", "other-sender", "too-big", "well"].map(device);
    assert_eq!(door.rejected(&message(json!(devices))).await, json!(["gone"]));
    assert_eq!(door.figures.of("fcm gone"), 1);
}

#[tokio::test]
async fn what_the_operator_adds_to_messages_is_there() {
    let authority = Authority::new();
    let google = Google::start(&authority, 3599, taken).await;
    let message_of_app = json!({
        "apns": { "payload": { "aps": { "mutable-content": 1 } } }, "android": { "direct_boot_ok": true },
    });
    let app = App { message: message_of_app.as_object().unwrap().clone(), ttl_s: 0, ..google.app() };
    let door = Door::real(&authority, vec![app]);
    let mut device = device("registration-1");
    device["data"]["only_last_per_room"] = json!(true);
    let mut notification = message(json!([device]));
    notification["prio"] = json!("low");
    door.rejected(&notification).await;
    let sent = google.firebase.one().json();
    assert_eq!(sent["message"]["apns"]["payload"]["aps"]["mutable-content"], 1);
    let android = &sent["message"]["android"];
    assert_eq!((&android["direct_boot_ok"], &android["ttl"]), (&json!(true), &json!("0s")));
    assert_eq!(android["priority"], "NORMAL");
    assert!(android["collapse_key"].as_str().unwrap().len() > 40);
    assert!(!android["collapse_key"].as_str().unwrap().contains("room"));
}

#[tokio::test]
async fn without_a_token_the_homeserver_is_told_to_come_back_and_google_is_not_pressed() {
    let authority = Authority::new();
    let mut google = Google::start(&authority, 3599, taken).await;
    google.tokens = Provider::start(&authority, "oauth2.example", |_| {
        (400, json!({ "error": "invalid_grant" }).to_string())
    })
    .await;
    let account = json!({
        "project_id": "my-project", "private_key": KEY.0, "client_email": "a@b.example", "token_uri": google.tokens.url("/"),
    });
    google.account = file(&account.to_string());
    let door = Door::real(&authority, vec![google.app()]);
    let devices: Vec<_> = (0..4).map(|number| device(&format!("registration-{number}"))).collect();
    let (status, _, body) = door.notify(&message(json!(devices))).await;
    assert_eq!((status, &body["errcode"]), (StatusCode::BAD_GATEWAY, &json!("M_UNKNOWN")));
    assert!(body.get("rejected").is_none());
    assert_eq!(google.tokens.take().len(), 1, "a failure is remembered for some seconds");
    assert!(google.firebase.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_fault_of_the_operators_settings_is_in_the_log_once_a_minute() {
    let granted = (200, r#"{"access_token":"t","expires_in":3600}"#);
    for (token, said) in [(granted, "Firebase does not accept"), ((400, "{}"), "Google gives no token")] {
        let net = Net::new(1);
        let (app, _account) = simulated(&net, token, |_| (403, "{}".to_owned()));
        let door = Door::simulated(&net, vec![app]);
        let log = Log::begin();
        for number in 0..4 {
            let alone = message(json!([device(&format!("registration-{number}"))]));
            assert_eq!(door.notify(&alone).await.0, StatusCode::BAD_GATEWAY);
        }
        assert!(net.take_arrived().len() >= 3, "they were asked several times");
        let log = log.end();
        let warnings: Vec<_> = log.lines().filter(|line| line.contains(" WARN ")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains(said), "{warnings:?}");
    }
}

#[test]
fn a_file_that_is_no_service_account_is_told_without_what_it_holds() {
    let well = json!({
        "project_id": "p", "private_key": KEY.0, "client_email": "a@b.example", "token_uri": "https://a.example/token",
    });
    let mut wrong = Vec::new();
    for (field, value) in [
        ("private_key", json!("SECRET")),
        ("project_id", json!("../SECRET")),
        ("token_uri", json!("http://SECRET.example")),
        ("client_email", Value::Null),
    ] {
        let mut account = well.clone();
        account[field] = value;
        wrong.push(file(&account.to_string()));
    }
    wrong.push(file("SECRET"));
    for it in &wrong {
        let app = App { service_account_file: it.path().to_owned(), ..App::new("a", Kind::Fcm) };
        let settings = Settings { apps: vec![app], ..Settings::default() };
        let net = federation::testing::Net::new(1);
        let error = crate::world::open_in(&net, &settings).err().unwrap().to_string();
        assert!(
            error.contains("push_gateway.app.0") && error.contains(&it.path().display().to_string()),
            "{error}"
        );
        assert!(!error.contains("SECRET"), "{error}");
    }
}
