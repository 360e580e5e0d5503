//! The index of search: how it follows the log, and how it is built anew.

use std::path::Path;

use aqueduct::{
    config::Config,
    env::Env,
    store::{DataDir, Durability, Read},
};
use serde_json::json;

use crate::{
    rooms::Rooms,
    search::{edit, found, ids, indexed, join, on, redact, search, server},
    support::{BEGAN_MS, TestClient, TestServer},
};

#[tokio::test(start_paused = true)]
async fn the_delay_is_how_long_changes_are_gathered() {
    for delay_ms in [50, 60_000] {
        let server = TestServer::with(|config| {
            on(config);
            config.search.delay_ms = delay_ms;
        });
        let alice = server.register("alice").await;
        let room = alice.create(json!({})).await;
        alice.say(&room, "1", "needle").await;
        indexed(&server).await;
        alice.say(&room, "2", "needle").await;
        let app = server.server().app();
        let before = app.env.now_ms();
        indexed(&server).await;
        let took_ms = app.env.now_ms() - before;
        // Each of the two sleeps may be rounded up.
        assert!(took_ms <= delay_ms + 2 && took_ms + 50 >= delay_ms, "{took_ms} ms of {delay_ms}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_index_is_built_anew_on_demand_and_says_how_far_it_is() {
    let server = server();
    let alice = server.register("alice").await;
    let room = alice.create(json!({ "name": "needle" })).await;
    let mut sent = Vec::new();
    for number in 0..30 {
        sent.push(alice.say(&room, &number.to_string(), "needle").await);
    }
    redact(&alice, &room, &sent.pop().unwrap(), "r").await;
    let edited = sent.first().unwrap().clone();
    edit(&alice, &room, "e", &edited, "changed").await;
    assert_eq!(search(&alice, "needle", json!({})).await["count"], 29);
    let app = server.server().app();
    app.searching.begin_anew().await.unwrap();
    let status = app.searching.progress(&app.store).unwrap();
    assert_eq!((status.documents, status.is_filling), (0, true));
    // Events that come while the index is filled are in it, too, and once.
    sent.push(alice.say(&room, "late", "needle").await);
    redact(&alice, &room, &sent.remove(1), "r2").await;
    assert_eq!(search(&alice, "needle", json!({})).await["count"], 29);
    assert_eq!(found(&alice, "changed").await, [edited]);
    let status = app.searching.progress(&app.store).unwrap();
    // A message that was edited is there with both texts.
    assert_eq!((status.documents, status.lag, status.is_filling), (31, 0, false));
}

fn open(path: &Path, seed: u64, change: impl FnOnce(&mut Config)) -> (DataDir, TestServer) {
    let dir = DataDir::hold(path).unwrap();
    let store = dir.open_store(8 << 20, Durability::Fsync).unwrap();
    let server = TestServer::start(Env::simulated(seed, BEGAN_MS + seed * 1_000_000), store, |config| {
        on(config);
        config.server.data_dir = path.to_owned();
        change(config);
    });
    (dir, server)
}

/// The client of an account of this server that has this token.
fn client(server: &TestServer, token: &Option<String>) -> TestClient {
    TestClient { token: token.clone(), ..server.anonymous() }
}

#[tokio::test(start_paused = true)]
async fn an_index_on_disk_goes_on_after_a_restart_and_is_built_anew_where_it_is_lost_or_damaged() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("data");
    let index = path.join("search");
    let (token, first, second) = {
        let (_dir, server) = open(&path, 1, |_| {});
        let alice = server.register("alice").await;
        let room = alice.create(json!({})).await;
        let first = alice.say(&room, "1", "needle one").await;
        assert_eq!(found(&alice, "needle").await, std::slice::from_ref(&first));
        // The server ends before the index has read on.
        let second = alice.say(&room, "2", "needle two").await;
        server.server().stop().await.unwrap();
        (alice.token.clone(), first, second)
    };
    for (round, harm) in
        ["none", "deleted", "no meta", "garbage", "cut segment", "none"].into_iter().enumerate()
    {
        match harm {
            "deleted" => std::fs::remove_dir_all(&index).unwrap(),
            "no meta" => std::fs::remove_file(index.join("meta.json")).unwrap(),
            "garbage" => std::fs::write(index.join("meta.json"), b"{\"garbage").unwrap(),
            "cut segment" => {
                for entry in std::fs::read_dir(&index).unwrap() {
                    let path = entry.unwrap().path();
                    if path.extension().is_some_and(|extension| extension == "term" || extension == "idx") {
                        std::fs::write(&path, b"cut").unwrap();
                    }
                }
            }
            _ => {}
        }
        let (_dir, server) = open(&path, round as u64 + 2, |_| {});
        let found = search(&client(&server, &token), "needle", json!({ "order_by": "recent" })).await;
        assert_eq!(ids(&found), [second.clone(), first.clone()], "{harm}");
        server.server().stop().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn redacted_words_are_deleted_from_the_disk_when_their_time_is_over() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("data");
    let (_dir, server) = open(&path, 1, |config| config.rooms.redacted_events_kept_days = 2);
    let alice = server.register("alice").await;
    let room = alice.create(json!({})).await;
    alice.say(&room, "1", "ordinary words").await;
    let secret = alice.say(&room, "2", "unspeakable words").await;
    indexed(&server).await;
    // A segment that holds words of deleted documents has a file which says of which.
    let has_deleted = || {
        let mut files = std::fs::read_dir(path.join("search")).unwrap();
        files.any(|entry| entry.unwrap().path().extension().is_some_and(|extension| extension == "del"))
    };
    assert!(!has_deleted());
    redact(&alice, &room, &secret, "r").await;
    indexed(&server).await;
    assert_eq!(found(&alice, "unspeakable").await, Vec::<String>::new());
    assert!(has_deleted());
    let app = server.server().app();
    app.env.sleep(std::time::Duration::from_secs(2 * 24 * 60 * 60 - 60)).await;
    assert!(has_deleted());
    app.env.sleep(std::time::Duration::from_secs(120)).await;
    assert!(!has_deleted());
    assert_eq!(found(&alice, "words").await.len(), 1);
    server.server().stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_index_that_the_log_did_not_wait_for_is_built_anew() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("data");
    let (of_alice, token_of_alice, token_of_bob) = {
        let (_dir, server) = open(&path, 1, |_| {});
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let room = alice.create(json!({ "preset": "public_chat" })).await;
        join(&bob, &room).await;
        bob.say(&room, "1", "needle of bob").await;
        let of_alice = alice.say(&room, "2", "needle of alice").await;
        assert_eq!(found(&alice, "needle").await.len(), 2);
        // While search is on, the log waits for it.
        let cursors = aqueduct::store::cursor::list(&*server.server().app().store.snapshot()).unwrap();
        assert!(cursors.iter().any(|(name, _)| name == "search"), "{cursors:?}");
        server.server().stop().await.unwrap();
        (of_alice, alice.token.clone(), bob.token.clone())
    };
    {
        // While search is off bob is erased, and the log forgets it.
        let (_dir, server) = open(&path, 2, |config| config.search.enabled = false);
        let auth = json!({
            "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "bob" }, "password": "password of bob",
        });
        let erase = json!({ "auth": auth, "erase": true });
        client(&server, &token_of_bob).ok_post("/account/deactivate", erase).await;
        let app = server.server().app();
        let erased_at = app.store.snapshot().upto();
        for _ in 0..4 {
            app.env.sleep(std::time::Duration::from_secs(60 * 60)).await;
        }
        let trimmed = aqueduct::store::tail::trimmed(&*app.store.snapshot()).unwrap();
        assert!(trimmed >= erased_at, "the log was trimmed up to {trimmed}, and not to {erased_at}");
        server.server().stop().await.unwrap();
    }
    let (_dir, server) = open(&path, 3, |_| {});
    assert_eq!(found(&client(&server, &token_of_alice), "needle").await, [of_alice]);
    server.server().stop().await.unwrap();
}
