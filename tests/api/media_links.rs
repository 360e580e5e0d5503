//! Temporary links to files (`docs/media-links.md`).

use std::time::Duration;

use aqueduct::flows::operator::{
    media::{Chosen, MediaCommand},
    operate::{Command, operate},
};
use axum::body::Body;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    media::Answer,
    support::{TestClient, TestServer},
};

async fn make(client: &TestClient, item: &str, body: Value) -> Answer {
    let path = format!("/_aqueduct/client/v1/media/{item}/link");
    client.ask(Method::POST, &path, &[], body.to_string()).await
}

/// Makes a link, and answers its path and its id.
async fn made(client: &TestClient, item: &str, body: Value) -> (String, String) {
    let answer = make(client, item, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let answer = answer.json();
    let url = answer["url"].as_str().unwrap();
    let at = url.find("/_aqueduct/").unwrap();
    (url[at..].to_owned(), answer["link_id"].as_str().unwrap().to_owned())
}

async fn open(server: &TestServer, path: &str, fields: &[(&str, &str)]) -> Answer {
    server.anonymous().ask(Method::GET, path, fields, Body::empty()).await
}

async fn list(client: &TestClient) -> Vec<Value> {
    client.ok_get("/_aqueduct/client/v1/media/links").await["links"].as_array().unwrap().clone()
}

fn is_gone(answer: &Answer) {
    assert_eq!(answer.refusal(), (404, "M_NOT_FOUND".to_owned()));
    assert_eq!(answer.json()["error"], "There is no such link.");
}

#[tokio::test(start_paused = true)]
async fn a_link_gives_a_file_to_anybody_until_it_ends() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let item = alice.upload("text/html", "0123456789").await;
    let (path, id) = made(&alice, &item, json!({ "expires_in_ms": 60_000 })).await;
    let answer = open(&server, &path, &[]).await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"0123456789"[..]));
    assert!(answer.field("content-security-policy").starts_with("sandbox"));
    assert!(answer.field("content-disposition").starts_with("attachment"));
    assert_eq!(answer.field("cache-control"), "private, no-store");
    assert_eq!(answer.field("referrer-policy"), "no-referrer");
    let part = open(&server, &path, &[("range", "bytes=2-4")]).await;
    assert_eq!((part.status, &part.body[..]), (StatusCode::PARTIAL_CONTENT, &b"234"[..]));
    let links = list(&alice).await;
    assert_eq!(links.len(), 1);
    assert_eq!((&links[0]["link_id"], &links[0]["once"]), (&json!(id), &json!(false)));
    assert_eq!(links[0]["content_uri"], format!("mxc://{item}"));
    assert!(links[0].get("url").is_none(), "the token is told once");
    server.assert_whole();
    server.server().app().env.sleep(Duration::from_secs(61)).await;
    is_gone(&open(&server, &path, &[]).await);
    assert_eq!(list(&alice).await, Vec::<Value>::new());
    server.server().app().env.sleep(Duration::from_secs(60)).await;
    let rows = server.assert_whole();
    let left = rows.iter().find(|(name, _)| *name == "MEDIA_LINK").map_or(0, |(_, count)| *count);
    assert_eq!(left, 0, "its row is gone");
}

#[tokio::test(start_paused = true)]
async fn a_link_for_one_opening_is_used_up_by_the_first_that_gets_the_file() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let item = alice.upload("video/mp4", "0123456789").await;
    let (path, _) = made(&alice, &item, json!({ "once": true })).await;
    let head = server.anonymous().ask(Method::HEAD, &path, &[], Body::empty()).await;
    assert_eq!((head.status, head.field("content-length")), (StatusCode::OK, "10"));
    // A part alone would leave its opener with nothing.
    let answer = open(&server, &path, &[("range", "bytes=2-4"), ("if-none-match", "*")]).await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"0123456789"[..]));
    is_gone(&open(&server, &path, &[]).await);
    is_gone(&server.anonymous().ask(Method::GET, &path, &[], Body::empty()).await);
    server.assert_whole();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_who_open_it_at_once_one_gets_the_file() {
    let server = TestServer::real(|_| {});
    let alice = server.register("alice").await;
    let item = alice.upload("text/plain", "once").await;
    let (path, _) = made(&alice, &item, json!({ "once": true })).await;
    let openings: Vec<_> = (0..8)
        .map(|_| {
            let (asked, path) = (server.clone(), path.clone());
            server.begin(async move { open(&asked, &path, &[]).await.status })
        })
        .collect();
    let mut given = 0;
    for opening in openings {
        given += usize::from(opening.await.unwrap() == StatusCode::OK);
    }
    assert_eq!(given, 1);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_link_is_revoked_by_its_maker_and_ends_with_its_file_and_its_account() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let item = alice.upload("text/plain", "x").await;
    let (path, id) = made(&alice, &item, json!({})).await;
    let of_id = format!("/_aqueduct/client/v1/media/links/{id}");
    let revoke = async |client: &TestClient| client.ask(Method::DELETE, &of_id, &[], Body::empty()).await;
    is_gone(&revoke(&bob).await);
    assert_eq!(open(&server, &path, &[]).await.status, StatusCode::OK);
    assert_eq!(revoke(&alice).await.status, StatusCode::OK);
    is_gone(&open(&server, &path, &[]).await);
    is_gone(&revoke(&alice).await);
    let (path, _) = made(&alice, &item, json!({})).await;
    let app = server.server().app();
    let of = || Chosen::Item(format!("mxc://{item}"));
    for is in [true, false] {
        operate(app, Command::Media(MediaCommand::Quarantine { of: of(), is }), |_| ()).await.unwrap();
        if is {
            is_gone(&open(&server, &path, &[]).await);
        }
    }
    assert_eq!(open(&server, &path, &[]).await.status, StatusCode::OK);
    operate(app, Command::Media(MediaCommand::Delete { of: of() }), |_| ()).await.unwrap();
    is_gone(&open(&server, &path, &[]).await);
    let item = bob.upload("text/plain", "y").await;
    let (path, _) = made(&bob, &item, json!({})).await;
    let command = Command::DeactivateUser { name: "bob".to_owned(), erase: false };
    operate(app, command, |_| ()).await.unwrap();
    is_gone(&open(&server, &path, &[]).await);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn links_are_made_by_owners_and_admins_within_bounds() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let item = alice.upload("text/plain", "x").await;
    let forbidden = (403, "M_FORBIDDEN".to_owned());
    assert_eq!(make(&bob, &item, json!({})).await.refusal(), forbidden);
    assert_eq!(make(&bob, "test.example/none", json!({})).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    assert_eq!(make(&bob, "test.example/a.b", json!({})).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    let nobody = server.anonymous();
    assert_eq!(make(&nobody, &item, json!({})).await.refusal(), (401, "M_MISSING_TOKEN".to_owned()));
    for expires_in_ms in [0, 999, 2_592_000_001_u64] {
        let refused = make(&alice, &item, json!({ "expires_in_ms": expires_in_ms })).await;
        assert_eq!(refused.refusal(), (400, "M_INVALID_PARAM".to_owned()), "{expires_in_ms}");
    }
    let admin = Command::SetAdmin { name: "bob".to_owned(), admin: true };
    operate(server.server().app(), admin, |_| ()).await.unwrap();
    let (path, _) = made(&bob, &item, json!({})).await;
    assert_eq!(open(&server, &path, &[]).await.status, StatusCode::OK);
    for _ in 0..100 {
        made(&alice, &item, json!({})).await;
    }
    assert_eq!(make(&alice, &item, json!({})).await.refusal(), forbidden);
    for forged in ["", "x", "aql_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", &"a".repeat(5_000)] {
        let answer = open(&server, &format!("/_aqueduct/media/v1/link/{forged}"), &[]).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{forged}");
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_link_gives_only_what_its_maker_may_still_give() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let app = server.server().app();
    let (item, earlier) = (alice.upload("text/plain", "same").await, bob.upload("text/plain", "same").await);
    server.server().app().env.sleep(Duration::from_secs(1)).await;
    let of = || Chosen::Item(format!("mxc://{item}"));
    operate(app, Command::Media(MediaCommand::Quarantine { of: of(), is: true }), |_| ()).await.unwrap();
    let (path, _) = made(&bob, &earlier, json!({})).await;
    assert_eq!(open(&server, &path, &[]).await.status, StatusCode::OK, "it came before");
    let later = bob.upload("text/plain", "same").await;
    assert_eq!(make(&bob, &later, json!({})).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    operate(app, Command::Media(MediaCommand::Quarantine { of: of(), is: false }), |_| ()).await.unwrap();
    assert_eq!(open(&server, &path, &[]).await.status, StatusCode::OK);
    // An admin who is none any more has nothing to do with the files of others.
    let admin = |admin| operate(app, Command::SetAdmin { name: "bob".to_owned(), admin }, |_| ());
    admin(true).await.unwrap();
    let (of_alice, _) = made(&bob, &item, json!({})).await;
    assert_eq!(open(&server, &of_alice, &[]).await.status, StatusCode::OK);
    admin(false).await.unwrap();
    is_gone(&open(&server, &of_alice, &[]).await);
    assert_eq!(open(&server, &path, &[]).await.status, StatusCode::OK, "it is their own");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn giving_a_file_by_a_link_counts_as_asking_for_it() {
    let server = TestServer::with(|config| config.media.local_kept_days = 2);
    let alice = server.register("alice").await;
    let (asked, left) = (alice.upload("text/plain", "x").await, alice.upload("text/plain", "y").await);
    let (path, _) = made(&alice, &asked, json!({ "expires_in_ms": 2_592_000_000_u64 })).await;
    for _ in 0..4 {
        server.server().app().env.sleep(Duration::from_secs(24 * 3600)).await;
        assert_eq!(open(&server, &path, &[]).await.status, StatusCode::OK);
    }
    assert_eq!(alice.download(&left, &[]).await.refusal().0, 404);
    server.assert_whole();
}
