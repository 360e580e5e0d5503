//! Our keys and others': what is published, what is believed, who is asked and how often.

mod crowded;
mod retired;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::ready;
use proptest::prelude::*;
use ruma::ServerName;

use super::*;
use crate::{
    call::Caller,
    discovery::Discovery,
    guard::{Guard, ServerList},
    json::Json,
    keys::{
        document::{Checked, KEYS_MAX, Wrong, check},
        notary::{Question, answer},
    },
    ports::Clock,
    testing::{BEGAN_MS, Net, Weather, json, key_pair, own_keys},
};

const DAY_MS: u64 = 24 * 3_600_000;

fn server(name: &str) -> &ServerName {
    name.try_into().unwrap()
}

fn wanted(name: &str, key: &str, purpose: Purpose) -> Wanted {
    Wanted { server: server(name).to_owned(), key_id: key.try_into().unwrap(), purpose }
}

fn event(sent_ms: u64) -> Purpose {
    Purpose::Event { sent_ms, is_strict: true }
}

fn ring(net: &Net, notaries: &[&str]) -> Ring {
    let ports = net.ports();
    let discovery = Discovery::new(ports.clone(), Guard::default(), false);
    let caller = Caller::new(ports, discovery, ServerList::default());
    let notaries = notaries.iter().map(|it| server(it).to_owned()).collect();
    Ring::new(caller, own_keys("us.example:1", 9, "us").unwrap(), notaries)
}

/// A document of `a.example:1` with these fields, signed with these keys (seed, version).
fn signed(fields: &str, keys: &[(u8, &str)]) -> Json {
    let mut json = Json::parse(fields.as_bytes()).unwrap();
    for (seed, version) in keys {
        json = own_keys("a.example:1", *seed, version).unwrap().sign_object(json);
    }
    json
}

fn public(seed: u8) -> String {
    Base64::<ruma::serde::base64::Standard, _>::new(key_pair(seed, "x").unwrap().public_key().to_vec())
        .encode()
}

/// The text of a document with key 1 in use, and more fields.
fn fields(valid_until: &str, more: &str) -> String {
    format!(
        r#"{{"server_name":"a.example:1","valid_until_ts":{valid_until},"verify_keys":{{"ed25519:1":{{"key":"{}"}}}}{more}}}"#,
        public(1)
    )
}

/// A network in which `a.example:1` publishes this document.
fn publishing(document: &Json) -> Net {
    let net = Net::new(1);
    net.host("a.example", &["5.0.0.1"]);
    net.serve_json("5.0.0.1:1", &["a.example"], document.canonical().as_str());
    net
}

fn plain(valid_until_ms: u64) -> Json {
    signed(&fields(&valid_until_ms.to_string(), ""), &[(1, "1")])
}

#[test]
fn our_document_is_believed_by_others_and_signed_once_an_hour() {
    let old = OldKey {
        key_id: "ed25519:old".try_into().unwrap(),
        public_key: key_pair(7, "old").unwrap().public_key(),
        expired_ms: 500,
    };
    let keys = OwnKeys::new(server("us.example").to_owned(), key_pair(3, "us").unwrap(), vec![old]).unwrap();
    let document = keys.document(BEGAN_MS);
    let json = Json::parse(document.as_bytes()).unwrap();
    let Checked { keys: found, .. } = check(server("us.example"), &json, BEGAN_MS).unwrap();
    let told: Vec<_> =
        found.iter().map(|(id, key)| (id.as_str(), key.expired_ms, key.valid_until_ms)).collect();
    let until_ms = BEGAN_MS + DAY_MS;
    assert_eq!(told, [("ed25519:old", Some(500), until_ms), ("ed25519:us", None, until_ms)]);
    assert!(Arc::ptr_eq(&document, &keys.document(BEGAN_MS + 3_599_999)));
    assert_ne!(document, keys.document(BEGAN_MS + 3_600_000));
    assert!(!Arc::ptr_eq(&document, &keys.document(BEGAN_MS - 1)), "the clock went back");
    assert!(!format!("{keys:?}").contains("current"));
    assert!(OwnKeys::new(server("us.example").to_owned(), key_pair(3, "a-b").unwrap(), vec![]).is_err());
}

#[test]
fn a_key_is_believed_only_if_it_signed_the_document() {
    let two =
        format!(r#","more":1,"old_verify_keys":{{"ed25519:0":{{"key":"{}","expired_ts":5}}}}"#, public(5));
    let text = fields("99", &two)
        .replace(r#""ed25519:1""#, &format!(r#""ed25519:2":{{"key":"{}"}},"ed25519:1""#, public(2)));
    let ids = |keys: &[(u8, &str)]| {
        check(server("a.example:1"), &signed(&text, keys), BEGAN_MS)
            .map(|it| it.keys.into_iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>())
    };
    assert_eq!(ids(&[(1, "1"), (2, "2")]).unwrap(), ["ed25519:0", "ed25519:1", "ed25519:2"]);
    assert_eq!(ids(&[(2, "2")]).unwrap(), ["ed25519:0", "ed25519:2"]);
    assert_eq!(ids(&[]), Err(Wrong::Unsigned));
    // Signed by a stranger under the name of a key, and by the old key alone.
    assert_eq!(ids(&[(7, "1")]), Err(Wrong::Unsigned));
    assert_eq!(ids(&[(5, "0")]), Err(Wrong::Unsigned));
    assert_eq!(check(server("b.example"), &signed(&text, &[(1, "1")]), BEGAN_MS), Err(Wrong::Server));
}

#[test]
fn a_document_is_valid_for_a_week_at_most() {
    for (told, valid_until_ms) in [
        ("5", 5),
        ("1e3", 1000),
        ("1.5", 1),
        ("99999999999999999", BEGAN_MS + 7 * DAY_MS),
        ("18446744073709551615", BEGAN_MS + 7 * DAY_MS),
    ] {
        let checked =
            check(server("a.example:1"), &signed(&fields(told, ""), &[(1, "1")]), BEGAN_MS).unwrap();
        assert_eq!(checked.document.valid_until_ms, valid_until_ms, "{told}");
        assert_eq!(checked.keys[0].1.valid_until_ms, valid_until_ms, "{told}");
    }
}

#[test]
fn documents_without_sense_are_refused() {
    let key = public(1);
    for (text, wrong) in [
        ("[]".to_owned(), Wrong::Server),
        (r#"{"server_name":5}"#.to_owned(), Wrong::Server),
        (fields("\"soon\"", ""), Wrong::Field("valid_until_ts")),
        (fields("-5", ""), Wrong::Field("valid_until_ts")),
        (fields("1e300", ""), Wrong::Field("valid_until_ts")),
        (fields("null", ""), Wrong::Field("valid_until_ts")),
        (fields("[1]", ""), Wrong::Field("valid_until_ts")),
        (fields("5", r#","old_verify_keys":[]"#), Wrong::Field("old_verify_keys")),
        (fields("5", r#","verify_keys":5"#), Wrong::Field("verify_keys")),
        (fields("5", r#","verify_keys":{}"#), Wrong::Unsigned),
        (fields("5", r#","verify_keys":{"ed25519:1":"x"}"#), Wrong::Unsigned),
        (fields("5", r#","verify_keys":{"ed25519:1":{"key":5}}"#), Wrong::Unsigned),
        (fields("5", r#","verify_keys":{"ed25519:1":{"key":""}}"#), Wrong::Unsigned),
        (fields("5", r#","verify_keys":{"ed25519:1":{"key":"!!!!"}}"#), Wrong::Unsigned),
        (fields("5", &format!(r#","verify_keys":{{"rsa:1":{{"key":"{key}"}}}}"#)), Wrong::Unsigned),
        (fields("5", &format!(r#","verify_keys":{{"ed25519:":{{"key":"{key}"}}}}"#)), Wrong::Unsigned),
        (fields("5", &format!(r#","verify_keys":{{"1":{{"key":"{key}"}}}}"#)), Wrong::Unsigned),
    ] {
        assert_eq!(check(server("a.example:1"), &signed(&text, &[(1, "1")]), BEGAN_MS), Err(wrong), "{text}");
    }
    for signatures in [
        "5",
        "[]",
        r#"{"a.example:1":5}"#,
        r#"{"a.example:1":{"ed25519:1":5}}"#,
        r#"{"a.example:1":{"ed25519:1":"AAAA"}}"#,
    ] {
        let text = fields("5", &format!(r#","signatures":{signatures}"#));
        let json = Json::parse(text.as_bytes()).unwrap();
        assert_eq!(check(server("a.example:1"), &json, BEGAN_MS), Err(Wrong::Unsigned), "{signatures}");
    }
    let many: Vec<_> =
        (0..=KEYS_MAX).map(|it| format!(r#""ed25519:k{it}":{{"key":"{key}","expired_ts":1}}"#)).collect();
    for name in ["verify_keys", "old_verify_keys"] {
        let text = fields("5", &format!(r#","{name}":{{{}}}"#, many.join(",")));
        assert_eq!(check(server("a.example:1"), &signed(&text, &[(1, "1")]), BEGAN_MS), Err(Wrong::TooMany));
    }
}

#[test]
fn old_keys_that_make_no_sense_are_left_out_and_none_expires_in_the_future() {
    let key = public(5);
    let old = format!(
        r#","old_verify_keys":{{"ed25519:a":{{"key":"{key}"}},"ed25519:b":{{"key":"{key}","expired_ts":"x"}},"ed25519:c":5,
        "ed25519:d":{{"key":"{key}","expired_ts":99999999999999}},"ed25519:1":{{"key":"{key}","expired_ts":5}}}}"#
    );
    let checked = check(server("a.example:1"), &signed(&fields("5", &old), &[(1, "1")]), BEGAN_MS).unwrap();
    let told: Vec<_> = checked.keys.iter().map(|(id, key)| (id.as_str(), key.expired_ms)).collect();
    assert_eq!(told, [("ed25519:1", None), ("ed25519:d", Some(BEGAN_MS))]);
}

proptest! {
    #[test]
    fn no_document_makes_it_panic(text in r#"\{"server_name":"a.example:1","valid_until_ts":[0-9e]{1,5},"verify_keys":\{"ed25519:[a-z]{0,2}":\{"key":"[A-Za-z0-9+/=]{0,50}"\}\}(,"old_verify_keys":\{"[a-z:]{0,9}":[0-9"\[\]]{0,4}\})?\}"#) {
        if let Ok(json) = Json::parse(text.as_bytes()) {
            prop_assert!(check(server("a.example:1"), &json, BEGAN_MS).is_err());
        }
    }

    #[test]
    fn a_changed_byte_breaks_the_signature(at in 0_usize..400, flip in 1_u8..128) {
        let mut bytes = String::from(plain(5).canonical()).into_bytes();
        let at = at % bytes.len();
        bytes[at] ^= flip;
        let same = |json: &Json| json.signed_part() == plain(5).signed_part();
        if let Ok(json) = Json::parse(&bytes)
            && let Ok(checked) = check(server("a.example:1"), &json, BEGAN_MS)
        {
            // Only what is not signed may differ, or how a signature is written.
            prop_assert!(same(&json), "{checked:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_is_fetched_once_and_then_known() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    let ring = ring(&net, &[]);
    let request = wanted("a.example:1", "ed25519:1", Purpose::Request);
    let all = futures_util::future::join_all((0..20).map(|_| ring.require(&request))).await;
    assert!(all.into_iter().all(|it| it == Ok(key_pair(1, "1").unwrap().public_key())));
    assert_eq!(net.take_arrived(), ["a.example@5.0.0.1:1 a.example:1 GET /_matrix/key/v2/server"]);
    assert!(ring.require(&wanted("a.example:1", "ed25519:1", event(BEGAN_MS))).await.is_ok());
    assert!(net.take_arrived().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_key_that_a_server_does_not_publish_costs_a_few_requests_a_minute() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    let ring = ring(&net, &[]);
    let other = wanted("a.example:1", "ed25519:2", Purpose::Request);
    for _ in 0..20 {
        assert!(matches!(ring.require(&other).await, Err(KeyFailure::Unknown { .. })));
    }
    assert_eq!(net.take_arrived().len(), 4);
    // The server comes back with the same name and another key.
    let text = fields(&(BEGAN_MS + DAY_MS).to_string(), "")
        .replace("ed25519:1", "ed25519:2")
        .replace(&public(1), &public(2));
    net.serve_json("5.0.0.1:1", &["a.example"], signed(&text, &[(2, "2")]).canonical().as_str());
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(ring.require(&other).await, Ok(key_pair(2, "2").unwrap().public_key()));
    // Events that the old key signed are still believed.
    let before = wanted("a.example:1", "ed25519:1", event(BEGAN_MS));
    assert!(ring.require(&before).await.is_ok());
    assert_eq!(net.take_arrived().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_a_server_publishes_just_after_it_was_asked_is_found() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    let ring = ring(&net, &[]);
    for number in 2..5_u8 {
        let id = format!("ed25519:{number}");
        let new = wanted("a.example:1", &id, Purpose::Request);
        let text = fields(&(BEGAN_MS + DAY_MS).to_string(), "")
            .replace("ed25519:1", &id)
            .replace(&public(1), &public(number));
        let document = signed(&text, &[(number, &number.to_string())]);
        net.serve_json("5.0.0.1:1", &["a.example"], document.canonical().as_str());
        let found = ring.require(&new).await;
        assert_eq!(found, Ok(key_pair(number, &number.to_string()).unwrap().public_key()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_is_valid_for_its_purpose_alone() {
    let old = format!(r#","old_verify_keys":{{"ed25519:0":{{"key":"{}","expired_ts":5000}}}}"#, public(5));
    let document = signed(&fields(&(BEGAN_MS + DAY_MS).to_string(), &old), &[(1, "1")]);
    let net = publishing(&document);
    let ring = ring(&net, &[]);
    let lax = |sent_ms| Purpose::Event { sent_ms, is_strict: false };
    for (key, purpose, is_valid) in [
        ("ed25519:1", Purpose::Request, true),
        ("ed25519:0", Purpose::Request, false),
        ("ed25519:0", event(5000), true),
        ("ed25519:0", event(5001), false),
        ("ed25519:0", lax(5001), true),
        ("ed25519:1", event(5), true),
        ("ed25519:1", event(BEGAN_MS + DAY_MS), true),
        ("ed25519:1", event(BEGAN_MS + DAY_MS + 1), false),
        ("ed25519:1", event(u64::MAX), false),
        ("ed25519:1", lax(u64::MAX), true),
    ] {
        let found = ring.require(&wanted("a.example:1", key, purpose)).await;
        assert_eq!(found.is_ok(), is_valid, "{key} {purpose:?} {found:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_whose_document_ends_is_fetched_again() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    let ring = ring(&net, &[]);
    let request = wanted("a.example:1", "ed25519:1", Purpose::Request);
    ring.require(&request).await.unwrap();
    tokio::time::advance(Duration::from_millis(DAY_MS + 1)).await;
    let failure = ring.require(&request).await.unwrap_err();
    assert!(matches!(failure, KeyFailure::NotValid { .. }), "the server's document has ended, too");
    net.serve_json("5.0.0.1:1", &["a.example"], plain(BEGAN_MS + 2 * DAY_MS).canonical().as_str());
    tokio::time::advance(Duration::from_secs(61)).await;
    assert!(ring.require(&request).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_down_is_asked_ever_more_seldom() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    net.weather("5.0.0.1:1", Weather::Silent, Duration::ZERO);
    let ring = ring(&net, &[]);
    let request = wanted("a.example:1", "ed25519:1", Purpose::Request);
    let of_event = wanted("a.example:1", "ed25519:1", event(BEGAN_MS));
    let mut asked = 0;
    for _ in 0..24 * 60 {
        let failure = ring.require(&of_event).await.unwrap_err();
        assert!(matches!(failure, KeyFailure::Unavailable { .. }), "{failure}");
        asked += net.take_arrived().len();
        tokio::time::advance(Duration::from_secs(60)).await;
    }
    assert!((20..45).contains(&asked), "{asked} requests in a day");
    // Whoever asks something of us in its name shows that it may be back.
    net.take_arrived();
    for _ in 0..10 {
        assert!(ring.require(&request).await.is_err());
        tokio::time::advance(Duration::from_secs(25)).await;
    }
    assert!((2..=5).contains(&net.take_arrived().len()));
    net.weather("5.0.0.1:1", Weather::Fair, Duration::ZERO);
    tokio::time::advance(Duration::from_secs(60)).await;
    net.serve_json("5.0.0.1:1", &["a.example"], plain(net.now_ms() + DAY_MS).canonical().as_str());
    assert!(ring.require(&request).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn answers_without_sense_are_no_keys() {
    let hostile = [
        "",
        "{",
        "[]",
        "{}",
        "null",
        r#"{"valid_until_ts":1e400}"#,
        "\u{0}",
        r#"{"server_name":"a.example:1"}"#,
    ];
    for body in hostile {
        let net = publishing(&plain(0));
        net.serve_json("5.0.0.1:1", &["a.example"], body);
        let failure = ring(&net, &[]).require(&wanted("a.example:1", "ed25519:1", Purpose::Request)).await;
        assert!(matches!(failure, Err(KeyFailure::Unavailable { .. })), "{body}: {failure:?}");
    }
    let large = format!("{{\"x\":\"{}\"}}", "x".repeat(70_000));
    let net = publishing(&plain(0));
    net.serve_json("5.0.0.1:1", &["a.example"], &large);
    assert!(ring(&net, &[]).require(&wanted("a.example:1", "ed25519:1", Purpose::Request)).await.is_err());
}

/// A network in which `a.example:1` is silent, and the server `n.example:1` is a notary that knows this document of it.
fn with_notary(document: Json) -> Net {
    let net = publishing(&document);
    net.weather("5.0.0.1:1", Weather::Refuses, Duration::ZERO);
    net.host("n.example", &["5.0.0.8"]);
    let notary = own_keys("n.example:1", 8, "n").unwrap();
    net.serve("5.0.0.8:1", &["n.example"], move |arrived| {
        let answer = match arrived.request.uri().path() {
            "/_matrix/key/v2/server" => notary.document(BEGAN_MS).to_string(),
            _ => {
                let list = Json::List(vec![notary.sign_object(document.clone())]);
                Json::object([("server_keys", list)]).canonical().into()
            }
        };
        ready(json(200, answer))
    });
    net
}

#[tokio::test(start_paused = true)]
async fn a_notary_is_asked_for_those_that_do_not_answer() {
    let net = with_notary(plain(BEGAN_MS + DAY_MS));
    let ring = ring(&net, &["down.example:1", "n.example:1"]);
    let wanted_keys = [
        wanted("a.example:1", "ed25519:1", event(BEGAN_MS)),
        wanted("none.example:1", "ed25519:1", Purpose::Request),
        wanted("us.example:1", "ed25519:us", Purpose::Request),
        wanted("us.example:1", "ed25519:none", Purpose::Request),
    ];
    let found = ring.list(&wanted_keys).await;
    assert_eq!(found[0], Ok(key_pair(1, "1").unwrap().public_key()));
    assert!(matches!(found[1], Err(KeyFailure::Unavailable { .. })), "{found:?}");
    assert_eq!(found[2], Ok(key_pair(9, "us").unwrap().public_key()));
    assert!(found[3].is_err());
    let arrived = net.take_arrived();
    assert_eq!(
        arrived.iter().filter(|it| it.contains("POST /_matrix/key/v2/query")).count(),
        1,
        "{arrived:?}"
    );
    ring.list(&wanted_keys).await;
    assert!(net.take_arrived().is_empty(), "nobody is asked again within a minute");
}

#[tokio::test(start_paused = true)]
async fn what_a_notary_does_not_sign_or_the_server_did_not_is_not_believed() {
    let request = wanted("a.example:1", "ed25519:1", Purpose::Request);
    // The notary vouches for what the server never signed.
    let unsigned = Json::parse(fields(&(BEGAN_MS + DAY_MS).to_string(), "").as_bytes()).unwrap();
    assert!(ring(&with_notary(unsigned), &["n.example:1"]).require(&request).await.is_err());
    // The server signed it, and the notary did not.
    let document = plain(BEGAN_MS + DAY_MS);
    let net = with_notary(document.clone());
    let notary = own_keys("n.example:1", 8, "n").unwrap();
    let stranger = own_keys("n.example:1", 7, "n").unwrap();
    net.serve("5.0.0.8:1", &["n.example"], move |arrived| {
        let is_own = arrived.request.uri().path() == "/_matrix/key/v2/server";
        let list = Json::List(vec![document.clone(), stranger.sign_object(document.clone())]);
        let list = Json::object([("server_keys", list)]).canonical();
        ready(json(200, if is_own { notary.document(BEGAN_MS).to_string() } else { list.into() }))
    });
    assert!(ring(&net, &["n.example:1"]).require(&request).await.is_err());
    for nonsense in ["{}", r#"{"server_keys":5}"#, r#"{"server_keys":[5,{},null]}"#, "x"] {
        net.serve_json("5.0.0.8:1", &["n.example"], nonsense);
        assert!(ring(&net, &["n.example:1"]).require(&request).await.is_err());
    }
}

async fn ask(ring: &Ring, question: &Question, now_ms: u64) -> Vec<Json> {
    let answer = Json::parse(answer(ring, question, now_ms).await.unwrap().as_bytes()).unwrap();
    answer.field("server_keys").unwrap().as_list().unwrap().to_vec()
}

#[tokio::test(start_paused = true)]
async fn as_a_notary_we_vouch_for_what_we_have() {
    let net = publishing(&plain(BEGAN_MS + 2 * DAY_MS));
    let ring = ring(&net, &[]);
    let a = server("a.example:1");
    let question = Question::of_path(a.to_owned(), None).unwrap();
    let documents = ask(&ring, &question, BEGAN_MS).await;
    let [document] = &documents[..] else { panic!("{documents:?}") };
    assert!(check(a, document, BEGAN_MS).is_ok(), "the server's own signature is still there");
    let us = key_pair(9, "us").unwrap().public_key();
    let signature =
        document.field("signatures").unwrap().field("us.example:1").unwrap().field("ed25519:us").unwrap();
    assert!(is_signed(&document.signed_part(), &us, signature.as_text().unwrap()));
    // Within the first half of its life it is not fetched again, after that it is; a server that is down has its last one.
    ask(&ring, &question, BEGAN_MS).await;
    assert_eq!(net.take_arrived().len(), 1);
    tokio::time::advance(Duration::from_millis(DAY_MS + 1)).await;
    net.weather("5.0.0.1:1", Weather::Refuses, Duration::ZERO);
    assert_eq!(ask(&ring, &question, net.now_ms()).await, documents);
    let body = br#"{"server_keys":{"none.example:1":{},"us.example:1":{"ed25519:us":{}},"x y":{},"a.example:1":{}}}"#;
    let documents = ask(&ring, &Question::of_body(body).unwrap(), net.now_ms()).await;
    let names: Vec<_> =
        documents.iter().map(|it| it.field("server_name").unwrap().as_text().unwrap()).collect();
    assert_eq!(names, ["a.example:1", "us.example:1"]);
}

#[tokio::test(start_paused = true)]
async fn a_notary_fetches_anew_what_ends_before_it_is_needed() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    net.serve("5.0.0.1:1", &["a.example"], move |_| {
        let until_ms = BEGAN_MS + DAY_MS + count.fetch_add(DAY_MS, Ordering::Relaxed);
        ready(json(200, String::from(plain(until_ms).canonical())))
    });
    let ring = ring(&net, &[]);
    let question = |until_ms: u64| {
        Question::of_path(server("a.example:1").to_owned(), Some(&until_ms.to_string())).unwrap()
    };
    let until = async |until_ms| {
        let documents = ask(&ring, &question(until_ms), net.now_ms()).await;
        documents[0].field("valid_until_ts").unwrap().as_ms().unwrap() - BEGAN_MS
    };
    assert_eq!(until(BEGAN_MS).await, DAY_MS);
    assert_eq!(until(BEGAN_MS + DAY_MS).await, DAY_MS);
    for days in 2..5 {
        assert_eq!(until(BEGAN_MS + days * DAY_MS).await, days * DAY_MS);
    }
    assert_eq!(until(BEGAN_MS + 5 * DAY_MS).await, 4 * DAY_MS, "it was asked often enough");
    tokio::time::advance(Duration::from_secs(61)).await;
    assert_eq!(until(BEGAN_MS + 5 * DAY_MS).await, 5 * DAY_MS);
}

#[tokio::test(start_paused = true)]
async fn questions_without_sense_are_refused_and_large_ones_cut() {
    let net = Net::new(1);
    let ring = ring(&net, &[]);
    for body in ["", "[]", "{}", r#"{"server_keys":[]}"#, r#"{"server_keys":1e400}"#] {
        assert!(Question::of_body(body.as_bytes()).is_err(), "{body}");
    }
    assert!(Question::of_path(server("a.example").to_owned(), Some("soon")).is_err());
    assert!(ask(&ring, &Question::of_body(br#"{"server_keys":{}}"#).unwrap(), 0).await.is_empty());
    let odd = br#"{"server_keys":{"us.example:1":5,"b.example":{"x":{"minimum_valid_until_ts":"y"}}}}"#;
    assert_eq!(ask(&ring, &Question::of_body(odd).unwrap(), BEGAN_MS).await.len(), 1);
    net.take_looked_up();
    let many: Vec<_> = (0..5000).map(|it| format!(r#""h{it}.example":{{}}"#)).collect();
    let body = format!(r#"{{"server_keys":{{{}}}}}"#, many.join(","));
    assert!(ask(&ring, &Question::of_body(body.as_bytes()).unwrap(), BEGAN_MS).await.is_empty());
    assert!(net.take_looked_up().len() <= 500 * 4);
}
