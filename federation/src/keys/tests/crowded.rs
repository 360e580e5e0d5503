//! Many who ask at once, and those who hang up.

use super::*;

#[tokio::test(start_paused = true)]
async fn questions_of_others_hold_up_no_fetch_for_a_request() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    let silent: Vec<_> = (0..700).map(|it| format!("s{it}.example")).collect();
    let silent: Vec<_> = silent.iter().map(String::as_str).collect();
    net.serve_json("5.0.0.2:1", &silent, "{}");
    for it in silent {
        net.host(it, &["5.0.0.2"]);
    }
    net.weather("5.0.0.2:1", Weather::Silent, Duration::ZERO);
    let ring = ring(&net, &[]);
    let questions = (0..70).map(|question| {
        let names: Vec<_> =
            (0..10).map(|it| format!(r#""s{}.example:1":{{}}"#, 10 * question + it)).collect();
        let body = format!(r#"{{"server_keys":{{{}}}}}"#, names.join(","));
        let ring = ring.clone();
        async move { ask(&ring, &Question::of_body(body.as_bytes()).unwrap(), BEGAN_MS).await }
    });
    let questions = futures_util::future::join_all(questions);
    let request = async {
        tokio::time::advance(Duration::from_secs(1)).await;
        let asked = net.take_arrived().len();
        assert!((1..=32).contains(&asked), "{asked} servers were asked at once");
        let request = wanted("a.example:1", "ed25519:1", Purpose::Request);
        let found = tokio::time::timeout(Duration::from_secs(1), ring.require(&request)).await;
        assert!(found.is_ok_and(|it| it.is_ok()), "it waits for nobody");
    };
    tokio::join!(questions, request);
}

#[tokio::test(start_paused = true)]
async fn a_server_is_not_asked_again_at_once_though_those_who_asked_hung_up() {
    let net = publishing(&plain(BEGAN_MS + DAY_MS));
    net.weather("5.0.0.1:1", Weather::Silent, Duration::ZERO);
    let ring = ring(&net, &[]);
    let request = wanted("a.example:1", "ed25519:1", Purpose::Request);
    for _ in 0..5 {
        let asking = tokio::time::timeout(Duration::from_secs(1), ring.require(&request));
        if let Ok(outcome) = asking.await {
            assert!(matches!(outcome, Err(KeyFailure::Unavailable { .. })), "{outcome:?}");
        }
    }
    assert_eq!(net.take_arrived().len(), 1);
    net.weather("5.0.0.1:1", Weather::Fair, Duration::ZERO);
    tokio::time::advance(Duration::from_secs(61)).await;
    assert!(ring.require(&request).await.is_ok());
}
