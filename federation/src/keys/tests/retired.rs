//! Keys that a server has given up, and documents of before.

use super::*;

/// A document with key 2 in use and these old keys.
fn second(valid_until_ms: u64, old: &str) -> Json {
    let text = fields(&valid_until_ms.to_string(), "")
        .replace("ed25519:1", "ed25519:2")
        .replace(&public(1), &public(2));
    let text = text.trim_end_matches('}').to_owned() + "}}" + old + "}";
    signed(&text, &[(2, "2")])
}

fn old_first(expired_ms: u64) -> String {
    format!(r#","old_verify_keys":{{"ed25519:1":{{"key":"{}","expired_ts":{expired_ms}}}}}"#, public(1))
}

fn publish(net: &Net, document: &Json) {
    net.serve_json("5.0.0.1:1", &["a.example"], document.canonical().as_str());
}

#[tokio::test(start_paused = true)]
async fn a_key_that_the_server_gives_up_is_refused_at_once_however_short_the_new_document_is_valid() {
    let given_up_ms = BEGAN_MS + 30_000;
    for old in [old_first(given_up_ms), String::new()] {
        let net = publishing(&plain(BEGAN_MS + 7 * DAY_MS));
        let ring = ring(&net, &[]);
        let first = wanted("a.example:1", "ed25519:1", Purpose::Request);
        ring.require(&first).await.unwrap();
        tokio::time::advance(Duration::from_secs(61)).await;
        publish(&net, &second(BEGAN_MS + DAY_MS, &old));
        assert!(ring.require(&wanted("a.example:1", "ed25519:2", Purpose::Request)).await.is_ok());
        let failure = ring.require(&first).await.unwrap_err();
        assert!(matches!(failure, KeyFailure::NotValid { .. }), "{failure}");
        assert!(ring.require(&wanted("a.example:1", "ed25519:1", event(BEGAN_MS + 20_000))).await.is_ok());
        let later = wanted("a.example:1", "ed25519:1", event(net.now_ms() + 1));
        assert!(ring.require(&later).await.is_err(), "it was given up before");
        let question = Question::of_path(server("a.example:1").to_owned(), None).unwrap();
        let documents = ask(&ring, &question, net.now_ms()).await;
        let until_ms = documents[0].field("valid_until_ts").unwrap().as_ms().unwrap();
        assert_eq!(until_ms, BEGAN_MS + DAY_MS, "others get the new document");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_installed_anew_may_use_the_same_id_and_a_shorter_validity() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    let ring = ring(&net, &[]);
    let request = wanted("a.example:1", "ed25519:1", Purpose::Request);
    ring.require(&request).await.unwrap();
    tokio::time::advance(Duration::from_millis(DAY_MS + 1)).await;
    let text = fields(&(net.now_ms() + 3_600_000).to_string(), "").replace(&public(1), &public(2));
    publish(&net, &signed(&text, &[(2, "1")]));
    assert_eq!(ring.require(&request).await, Ok(key_pair(2, "1").unwrap().public_key()));
    // Another id makes us ask, too, while the first is still valid.
    let text = fields(&(net.now_ms() + 1_800_000).to_string(), "").replace(&public(1), &public(3));
    publish(&net, &signed(&text, &[(3, "1")]));
    tokio::time::advance(Duration::from_secs(61)).await;
    assert!(ring.require(&wanted("a.example:1", "ed25519:other", Purpose::Request)).await.is_err());
    assert_eq!(ring.require(&request).await, Ok(key_pair(3, "1").unwrap().public_key()));
}

#[tokio::test(start_paused = true)]
async fn no_notary_brings_a_key_back() {
    // The notary still has the document of before, which is valid for longer or for less time than the new one.
    for (kept_days, is_named) in [(7, true), (7, false), (1, true), (1, false)] {
        let net = with_notary(plain(BEGAN_MS + kept_days * DAY_MS));
        publish(&net, &plain(BEGAN_MS + kept_days * DAY_MS));
        let ring = ring(&net, &["n.example:1"]);
        let first = wanted("a.example:1", "ed25519:1", Purpose::Request);
        ring.require(&first).await.unwrap();
        tokio::time::advance(Duration::from_secs(61)).await;
        let old = if is_named { old_first(BEGAN_MS + 1) } else { String::new() };
        publish(&net, &second(BEGAN_MS + 2 * DAY_MS, &old));
        assert!(ring.require(&wanted("a.example:1", "ed25519:2", Purpose::Request)).await.is_ok());
        net.take_arrived();
        assert!(ring.require(&first).await.is_err(), "{kept_days} {is_named}");
        let arrived = net.take_arrived();
        assert!(arrived.iter().any(|it| it.contains("POST /_matrix/key/v2/query")), "{arrived:?}");
        assert!(ring.require(&first).await.is_err(), "{kept_days} {is_named}");
        assert!(ring.require(&wanted("a.example:1", "ed25519:2", Purpose::Request)).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn an_older_document_from_a_notary_is_good_for_events_of_its_time_alone() {
    let net = with_notary(plain(BEGAN_MS + DAY_MS / 2));
    publish(&net, &second(BEGAN_MS + DAY_MS, ""));
    let ring = ring(&net, &["n.example:1"]);
    assert!(ring.require(&wanted("a.example:1", "ed25519:2", Purpose::Request)).await.is_ok());
    assert!(ring.require(&wanted("a.example:1", "ed25519:1", Purpose::Request)).await.is_err());
    assert!(ring.require(&wanted("a.example:1", "ed25519:1", event(BEGAN_MS))).await.is_ok());
}
