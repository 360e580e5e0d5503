//! Files that are not taken from those who use them: avatars, those that are looked at as thumbnails or protected, and those that somebody
//! else names or copies. Nothing stays of a file that was refused after it came.

use std::{convert::Infallible, time::Duration};

use aqueduct::flows::operator::{
    media::{Chosen, Dealt, MediaCommand, MediaOutcome},
    operate::{Command, Outcome, operate},
};
use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{Method, StatusCode};
use image::{DynamicImage, ImageFormat, RgbImage};
use serde_json::json;

use crate::{
    media::files,
    support::{TestClient, TestServer, encoded},
};

const DAY: Duration = Duration::from_secs(24 * 3600);

async fn dealt(server: &TestServer, command: MediaCommand) -> Dealt {
    match operate(server.server().app(), Command::Media(command), |_| ()).await.unwrap() {
        Outcome::Media(MediaOutcome::Done(dealt)) => dealt,
        other => panic!("{other:?}"),
    }
}

async fn sleep(server: &TestServer, time: Duration) {
    server.server().app().env.sleep(time).await;
}

/// A picture of one colour, larger than its thumbnails.
fn picture(colour: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = DynamicImage::from(RgbImage::from_pixel(300, 300, image::Rgb([colour, 9, 99])));
    image.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

async fn look_at(client: &TestClient, item: &str) -> StatusCode {
    let path = format!("/_matrix/client/v1/media/thumbnail/{item}?width=96&height=96&method=crop");
    client.ask(Method::GET, &path, &[], Body::empty()).await.status
}

#[tokio::test(start_paused = true)]
async fn avatars_and_what_is_looked_at_as_a_thumbnail_count_as_used() {
    let server = TestServer::with(|config| config.media.local_kept_days = 30);
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut items = Vec::new();
    for colour in 1..=4 {
        items.push(alice.upload("image/png", picture(colour)).await);
    }
    let [of_bob, of_room, looked_at, unused] = &items[..] else { panic!() };
    let profile = format!("/profile/{}/avatar_url", encoded(&bob.user_id));
    bob.ok_put(&profile, json!({ "avatar_url": format!("mxc://{of_bob}") })).await;
    let room = alice.ok_post("/createRoom", json!({})).await["room_id"].as_str().unwrap().to_owned();
    let path = format!("/rooms/{}/state/m.room.avatar", encoded(&room));
    alice.ok_put(&path, json!({ "url": format!("mxc://{of_room}") })).await;
    for _ in 0..4 {
        sleep(&server, 9 * DAY).await;
        assert_eq!(look_at(&bob, looked_at).await, StatusCode::OK);
    }
    assert_eq!(look_at(&bob, unused).await, StatusCode::NOT_FOUND);
    sleep(&server, Duration::from_secs(60)).await;
    // An operator who asks for what nobody uses means no avatar either.
    let of = Chosen::OwnUnused(24 * 3600);
    assert_eq!(dealt(&server, MediaCommand::Delete { of }).await.items, 0);
    for kept in [of_bob, of_room, looked_at] {
        assert_eq!(alice.download(kept, &[]).await.status, StatusCode::OK, "{kept}");
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn whoever_names_or_copies_a_file_takes_it_from_nobody() {
    let server = TestServer::new();
    let (alice, mallory) = (server.register("alice").await, server.register("mallory").await);
    let item = alice.upload("image/png", picture(1)).await;
    let room = mallory.ok_post("/createRoom", json!({})).await["room_id"].as_str().unwrap().to_owned();
    let copy = mallory.upload("image/png", picture(1)).await;
    let path = format!("/rooms/{}/send/m.room.message", encoded(&room));
    for (number, text) in [format!("see mxc://{item}"), format!("mxc:\\/\\/{copy}#auto")].iter().enumerate() {
        let text = text.replace("\\/", "/");
        mallory.ok_put(&format!("{path}/{number}"), json!({ "msgtype": "m.text", "body": text })).await;
    }
    let quarantined = dealt(&server, MediaCommand::Quarantine { of: Chosen::OfRoom(room.clone()), is: true });
    assert_eq!(quarantined.await.items, 1, "only what its sender has uploaded");
    assert_eq!(alice.download(&item, &[]).await.status, StatusCode::OK, "others have the same bytes");
    assert_eq!(alice.download(&copy, &[]).await.status, StatusCode::NOT_FOUND);
    // An operator who names a file means its bytes from now on.
    sleep(&server, Duration::from_secs(1)).await;
    let of = Chosen::Item(format!("mxc://{copy}"));
    dealt(&server, MediaCommand::Quarantine { of: of.clone(), is: true }).await;
    let again = mallory.upload("image/png", picture(1)).await;
    assert_eq!(mallory.download(&again, &[]).await.status, StatusCode::NOT_FOUND);
    assert_eq!(alice.download(&item, &[]).await.status, StatusCode::OK, "it came before");
    dealt(&server, MediaCommand::Quarantine { of, is: false }).await;
    assert_eq!(mallory.download(&again, &[]).await.status, StatusCode::NOT_FOUND, "it has a mark of its own");
    let after = mallory.upload("image/png", picture(1)).await;
    assert_eq!(mallory.download(&after, &[]).await.status, StatusCode::OK);
    assert_eq!(dealt(&server, MediaCommand::Delete { of: Chosen::OfRoom(room) }).await.items, 1);
    assert_eq!(alice.download(&item, &[]).await.status, StatusCode::OK);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_is_protected_outlives_its_user_who_can_be_erased_later() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (kept, gone) = (alice.upload("text/plain", "kept").await, alice.upload("text/plain", "gone").await);
    let of = Chosen::Item(format!("mxc://{kept}"));
    dealt(&server, MediaCommand::Protect { of, is: true }).await;
    let end = |erase| {
        let end = Command::DeactivateUser { name: "alice".to_owned(), erase };
        let app = server.server().app().clone();
        async move { operate(&app, end, |_| ()).await.is_ok() }
    };
    assert!(end(false).await && !end(false).await);
    assert_eq!(bob.download(&gone, &[]).await.status, StatusCode::OK);
    assert!(end(true).await, "an account that has ended can still be erased");
    sleep(&server, DAY).await;
    assert_eq!(bob.download(&gone, &[]).await.status, StatusCode::NOT_FOUND);
    assert_eq!(bob.download(&kept, &[]).await.status, StatusCode::OK);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_refused_after_it_came_leaves_nothing() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (tell, told) = tokio::sync::oneshot::channel::<()>();
    let last = async move {
        drop(told.await);
        Ok::<_, Infallible>(Bytes::from_static(b"the end"))
    };
    let body = Body::from_stream(futures_util::StreamExt::chain(
        stream::iter([Ok(Bytes::from_static(b"the beginning, and "))]),
        stream::once(Box::pin(last)),
    ));
    let path = "/_matrix/media/v3/upload";
    let uploader = alice.clone();
    let upload = server.begin(async move { uploader.ask(Method::POST, path, &[], body).await.status });
    sleep(&server, Duration::from_secs(1)).await;
    alice.ok_post("/logout", json!({})).await;
    tell.send(()).unwrap();
    assert_eq!(upload.await.unwrap(), StatusCode::UNAUTHORIZED);
    sleep(&server, Duration::from_secs(60)).await;
    assert_eq!(files(server.media()), []);
    // Somebody else who brings the same bytes has them.
    let item = bob.upload("text/plain", "the beginning, and the end").await;
    sleep(&server, DAY).await;
    assert_eq!(bob.download(&item, &[]).await.status, StatusCode::OK);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn guests_see_pictures() {
    let server = TestServer::with(|config| config.registration.guests = true);
    let alice = server.register("alice").await;
    let item = alice.upload("image/png", picture(7)).await;
    let mut guest = server.anonymous();
    let (_, json) = guest.post("/_matrix/client/v3/register?kind=guest", json!({})).await;
    guest.token = json["access_token"].as_str().map(str::to_owned);
    assert_eq!(guest.download(&item, &[]).await.status, StatusCode::OK);
    assert_eq!(guest.download(&format!("{item}/a.png"), &[]).await.status, StatusCode::OK);
    assert_eq!(look_at(&guest, &item).await, StatusCode::OK);
    let upload = guest.ask(Method::POST, "/_matrix/media/v3/upload", &[], "x").await;
    assert_eq!(upload.refusal(), (403, "M_GUEST_ACCESS_FORBIDDEN".to_owned()));
}
