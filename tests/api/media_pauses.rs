//! Files of other servers that could not be fetched are not asked for again at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use federation::testing::{Weather, bytes, json};
use http::StatusCode;

use crate::{media_remote::Scene, support::federated::Federated};

const FILE: &str = "--x\r\n\r\n{}\r\n--x\r\nContent-Type: text/plain\r\n\r\nfrom afar\r\n--x--\r\n";
const MIXED: &[(&str, &str)] = &[("content-type", "multipart/mixed; boundary=x")];

async fn sleep(scene: &Scene, seconds: u64) {
    scene.server.server().app().env.sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_not_given_is_asked_for_again_after_pauses_that_grow() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    // The fourth request is answered.
    let scene = Scene::new(move |_| match counted.fetch_add(1, Ordering::SeqCst) {
        0..3 => json(404, r#"{"errcode":"M_NOT_FOUND","error":"no such file"}"#),
        _ => bytes(200, MIXED, FILE),
    })
    .await;
    for (waits, asked) in [(0, 1), (13, 1), (3, 2), (28, 2), (3, 3), (58, 3)] {
        sleep(&scene, waits).await;
        for _ in 0..5 {
            assert_eq!(scene.asked().await, (404, "M_NOT_FOUND".to_owned()));
        }
        assert_eq!(count.load(Ordering::SeqCst), asked, "after another {waits} s");
    }
    sleep(&scene, 3).await;
    assert_eq!(scene.asked().await, (200, "from afar".to_owned()));
    // Another file of the same server waits for nothing meanwhile.
    assert_eq!(scene.alice.download("b.example/y", &[]).await.status, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_answer_is_asked_for_no_other_file_for_a_while() {
    let servers = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) = (servers.server(0).register("alice").await, servers.server(1).register("bob").await);
    let items = [alice.upload("text/plain", "one").await, alice.upload("text/plain", "two").await];
    let arrived = || servers.net.take_arrived().iter().filter(|it| it.contains("media/download")).count();
    servers.weather(0, Weather::Silent, Duration::ZERO);
    arrived();
    assert_eq!(bob.download(&items[0], &[]).await.refusal(), (502, "M_UNKNOWN".to_owned()));
    assert!(arrived() > 0);
    // It is up again, and nobody has noticed yet.
    servers.weather(0, Weather::Fair, Duration::ZERO);
    for item in &items {
        assert_eq!(bob.download(item, &[]).await.refusal(), (502, "M_UNKNOWN".to_owned()));
    }
    assert_eq!(arrived(), 0);
    servers.server(1).server().app().env.sleep(Duration::from_secs(15)).await;
    for item in &items {
        assert_eq!(bob.download(item, &[]).await.status, StatusCode::OK);
    }
    assert_eq!(arrived(), 2);
}
