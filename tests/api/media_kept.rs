//! For how long files are kept: what operators mark and delete, what ends by itself, and what becomes of bytes that come and go.

use std::time::Duration;

use aqueduct::flows::operator::{
    media::{Chosen, Dealt, MediaCommand, MediaOutcome, MediaStatus},
    operate::{Command, Outcome, operate},
};
use axum::body::Body;
use http::{Method, StatusCode};
use serde_json::json;

use crate::{
    media::files,
    support::{TestServer, encoded, federated::Federated},
};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

async fn command(server: &TestServer, command: MediaCommand) -> MediaOutcome {
    match operate(server.server().app(), Command::Media(command), |_| ()).await.unwrap() {
        Outcome::Media(outcome) => outcome,
        other => panic!("{other:?}"),
    }
}

async fn dealt(server: &TestServer, asked: MediaCommand) -> Dealt {
    match command(server, asked).await {
        MediaOutcome::Done(dealt) => dealt,
        other => panic!("{other:?}"),
    }
}

async fn delete(server: &TestServer, of: Chosen) -> Dealt {
    dealt(server, MediaCommand::Delete { of }).await
}

fn uri(item: &str) -> Chosen {
    Chosen::Item(format!("mxc://{item}"))
}

async fn sleep(server: &TestServer, time: Duration) {
    server.server().app().env.sleep(time).await;
}

#[tokio::test(start_paused = true)]
async fn bytes_that_come_again_are_kept_and_bytes_that_nobody_has_go() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let first = alice.upload("text/plain", "the bytes").await;
    assert_eq!(delete(&server, uri(&first)).await.items, 1);
    assert_eq!(alice.download(&first, &[]).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    assert_eq!(files(server.media()).len(), 1, "the file stays for an hour");
    // The same bytes come while the others are about to go.
    sleep(&server, HOUR / 2).await;
    let second = alice.upload("text/plain", "the bytes").await;
    sleep(&server, 3 * HOUR).await;
    assert_eq!(&alice.download(&second, &[]).await.body[..], b"the bytes");
    server.assert_whole();
    delete(&server, uri(&second)).await;
    sleep(&server, 2 * HOUR).await;
    assert_eq!(files(server.media()), []);
    server.assert_whole();
    let third = alice.upload("text/plain", "the bytes").await;
    assert_eq!(&alice.download(&third, &[]).await.body[..], b"the bytes");
    server.assert_whole();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_uploads_of_the_same_bytes_and_a_deletion_between_lose_nothing() {
    let server = TestServer::real(|_| {});
    let alice = server.register("alice").await;
    for round in 0..20 {
        let text = format!("bytes {}", round % 3);
        let doomed = alice.upload("text/plain", text.clone()).await;
        let uploads: Vec<_> = (0..2)
            .map(|_| {
                let (alice, text) = (alice.clone(), text.clone());
                server.begin(async move { alice.upload("text/plain", text).await })
            })
            .collect();
        let gone = delete(&server, uri(&doomed)).await;
        assert_eq!(gone.items, 1);
        for upload in uploads {
            let item = upload.await.unwrap();
            assert_eq!(alice.download(&item, &[]).await.body, text.as_bytes());
        }
    }
    assert_eq!(files(server.media()).len(), 3);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_crash_between_the_steps_leaves_what_ends_by_itself() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let kept = alice.upload("text/plain", "kept").await;
    // An upload that breaks off with its server leaves a part.
    let parts = server.media().join("media/parts");
    std::fs::write(parts.join("of_an_upload"), "half of").unwrap();
    let server = server.killed(usize::MAX);
    // Its age is that of the real world, which is not the simulated one's.
    sleep(&server, Duration::from_secs(1)).await;
    let alice = crate::support::TestClient { server: server.clone(), ..alice };
    assert_eq!(&alice.download(&kept, &[]).await.body[..], b"kept");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn operators_quarantine_protect_and_delete() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (one, two) = (alice.upload("text/plain", "one").await, alice.upload("text/plain", "two").await);
    let of_bob = bob.upload("text/plain", "three").await;
    let quarantine = |of, is| dealt(&server, MediaCommand::Quarantine { of, is });
    assert_eq!(quarantine(uri(&one), true).await.items, 1);
    assert_eq!(bob.download(&one, &[]).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    let thumbnail = format!("/_matrix/client/v1/media/thumbnail/{one}?width=1&height=1");
    assert_eq!(bob.ask(Method::GET, &thumbnail, &[], Body::empty()).await.refusal().0, 404);
    assert_eq!(quarantine(uri(&one), false).await.items, 1);
    assert_eq!(bob.download(&one, &[]).await.status, StatusCode::OK);
    dealt(&server, MediaCommand::Protect { of: uri(&two), is: true }).await;
    let both = quarantine(Chosen::OfUser("alice".to_owned(), 0), true).await;
    assert_eq!((both.items, both.protected), (1, 1));
    let gone = delete(&server, Chosen::OfUser("alice".to_owned(), 0)).await;
    assert_eq!((gone.items, gone.bytes, gone.protected), (1, 3, 1));
    assert_eq!(bob.download(&two, &[]).await.status, StatusCode::OK);
    let MediaOutcome::Status(status) = command(&server, MediaCommand::Status).await else { panic!() };
    let MediaStatus { own, others, previews, pending, quarantined, files, in_bucket } = status;
    assert_eq!(previews, (0, 0));
    assert_eq!((own, others, pending, quarantined, files), ((2, 8), (0, 0), 0, 0, (3, 11)));
    assert_eq!(in_bucket, (0, 0));
    let MediaOutcome::Item(entry) =
        command(&server, MediaCommand::Show { uri: format!("mxc://{of_bob}") }).await
    else {
        panic!()
    };
    assert_eq!(entry.user.as_deref(), Some("@bob:test.example"));
    for wrong in ["mxc://test.example/nobody", "mxc://a/../b", "https://a.example/b"] {
        let asked = MediaCommand::Show { uri: wrong.to_owned() };
        assert!(operate(server.server().app(), Command::Media(asked), |_| ()).await.is_err(), "{wrong}");
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_a_room_refers_to_is_found() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (said, avatar, other) = (
        alice.upload("image/png", "said").await,
        alice.upload("image/png", "avatar").await,
        alice.upload("image/png", "other").await,
    );
    let room = alice.ok_post("/createRoom", json!({})).await["room_id"].as_str().unwrap().to_owned();
    let path = format!("/rooms/{}", encoded(&room));
    let message = json!({ "msgtype": "m.image", "body": "x", "url": format!("mxc://{said}") });
    alice.ok_put(&format!("{path}/send/m.room.message/1"), message).await;
    let content = json!({ "url": format!("mxc://{avatar}") });
    alice.ok_put(&format!("{path}/state/m.room.avatar"), content).await;
    assert_eq!(delete(&server, Chosen::OfRoom(room)).await.items, 2);
    assert_eq!(alice.download(&other, &[]).await.status, StatusCode::OK);
    for gone in [said, avatar] {
        assert_eq!(alice.download(&gone, &[]).await.refusal().0, 404);
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn files_that_nobody_asks_for_are_deleted_where_the_settings_say_so() {
    let servers = Federated::with(&["a.example", "b.example"], |config| {
        (config.media.local_kept_days, config.media.remote_kept_days) = (30, 10);
    });
    let (here, there) = (servers.server(0), servers.server(1));
    let (alice, bob) = (here.register("alice").await, there.register("bob").await);
    let (old, read, avatar, protected) = (
        alice.upload("text/plain", "old").await,
        alice.upload("text/plain", "read").await,
        alice.upload("text/plain", "avatar").await,
        alice.upload("text/plain", "protected").await,
    );
    let profile = format!("/profile/{}/avatar_url", encoded(&alice.user_id));
    alice.ok_put(&profile, json!({ "avatar_url": format!("mxc://{avatar}") })).await;
    dealt(here, MediaCommand::Protect { of: uri(&protected), is: true }).await;
    assert_eq!(bob.download(&read, &[]).await.status, StatusCode::OK);
    for _ in 0..4 {
        sleep(here, 9 * DAY).await;
        assert_eq!(alice.download(&read, &[]).await.status, StatusCode::OK);
    }
    assert_eq!(alice.download(&old, &[]).await.refusal().0, 404);
    for kept in [&read, &avatar, &protected] {
        assert_eq!(alice.download(kept, &[]).await.status, StatusCode::OK, "{kept}");
    }
    // The other server has deleted its copy long since, and fetches it anew.
    sleep(here, 2 * HOUR).await;
    assert_eq!(files(there.media()), []);
    assert_eq!(bob.download(&read, &[]).await.status, StatusCode::OK);
    here.assert_whole();
    there.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_user_who_is_erased_takes_their_files_along() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut items = Vec::new();
    for number in 0..120 {
        items.push(alice.upload("text/plain", format!("file {}", number / 2)).await);
    }
    let of_bob = bob.upload("text/plain", "file 1").await;
    let erase = Command::DeactivateUser { name: "alice".to_owned(), erase: true };
    operate(server.server().app(), erase, |_| ()).await.unwrap();
    sleep(&server, 3 * HOUR).await;
    for item in items {
        assert_eq!(bob.download(&item, &[]).await.refusal().0, 404);
    }
    assert_eq!(bob.download(&of_bob, &[]).await.status, StatusCode::OK);
    assert_eq!(files(server.media()).len(), 1);
    server.assert_whole();
}
