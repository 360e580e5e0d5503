//! Files that lie in a bucket, or move there and back.

use std::time::Duration;

use aqueduct::{
    config::Config,
    flows::operator::{
        media::{Chosen, MediaCommand, MediaOutcome, MovedFiles},
        operate::{Command, Outcome, operate},
    },
    schema::media::Home,
    store::{Durability, Engine, Store},
};
use axum::body::Body;
use federation::testing::{Net, Weather};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use image::{DynamicImage, ImageFormat, RgbImage};

use crate::{
    media::files,
    media_compression::photograph,
    support::{
        TestServer,
        bucket::Bucket,
        network::{Peer, doors},
    },
};

const HOUR: Duration = Duration::from_secs(3600);

/// A server whose files go to a bucket, and the network in which both are.
fn with_bucket(change: impl FnOnce(&mut Config)) -> (TestServer, Bucket, Net) {
    let net = Net::new(1);
    let bucket = Bucket::new(&net);
    let store =
        Store::open(Engine::Memory(aqueduct::store::engine::Memory::default()), Durability::Fsync).unwrap();
    let server = TestServer::start(doors(&net), store, |config| {
        Bucket::set(config);
        change(config);
    });
    (server, bucket, net)
}

async fn command(server: &TestServer, command: MediaCommand) -> MediaOutcome {
    match operate(server.server().app(), Command::Media(command), |_| ()).await.unwrap() {
        Outcome::Media(outcome) => outcome,
        other => panic!("{other:?}"),
    }
}

async fn move_to(server: &TestServer, to: Home) -> MovedFiles {
    match command(server, MediaCommand::Move { to }).await {
        MediaOutcome::Moved(moved) => moved,
        other => panic!("{other:?}"),
    }
}

async fn sleep(server: &TestServer, time: Duration) {
    server.server().app().env.sleep(time).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_lies_in_the_bucket_once_and_is_read_from_there() {
    let (server, bucket, _) = with_bucket(|_| {});
    let alice = server.register("alice").await;
    let item = alice.upload("text/plain", "0123456789").await;
    let objects = bucket.objects();
    assert_eq!((objects.len(), objects[0].1), (1, 10));
    assert!(objects[0].0.starts_with("below/84/d8/84d89877f0d4041efb6bf91a16f0248f"), "{objects:?}");
    assert_eq!(bucket.take_written(), ["PUT "]);
    let answer = alice.download(&item, &[]).await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"0123456789"[..]));
    assert!(answer.field("content-security-policy").starts_with("sandbox"));
    let part = alice.download(&item, &[("range", "bytes=3-5")]).await;
    assert_eq!((part.status, &part.body[..]), (StatusCode::PARTIAL_CONTENT, &b"345"[..]));
    assert_eq!(part.field("content-range"), "bytes 3-5/10");
    // The same bytes are not sent again, and nothing stays on the disk.
    alice.upload("image/png", "0123456789").await;
    let empty = alice.upload("text/plain", "").await;
    assert_eq!(alice.download(&empty, &[]).await.body.len(), 0);
    sleep(&server, Duration::from_secs(1)).await;
    assert_eq!((bucket.take_written().len(), files(server.media()).len()), (1, 0));
    server.assert_whole();
    for item in [item, empty] {
        command(&server, MediaCommand::Delete { of: Chosen::Item(format!("mxc://{item}")) }).await;
    }
    sleep(&server, 2 * HOUR).await;
    assert_eq!(bucket.objects().len(), 1, "another item has the bytes");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_large_file_goes_in_parts_and_comes_as_it_was() {
    let (server, bucket, _) = with_bucket(|_| {});
    let alice = server.register("alice").await;
    let bytes: Vec<u8> = (0..20_000_000_u32).map(|at| (at % 251) as u8).collect();
    let item = alice.upload("application/octet-stream", bytes.clone()).await;
    assert_eq!(bucket.objects()[0].1, bytes.len());
    assert_eq!(bucket.uploads(), 0, "the upload was ended");
    let written = bucket.take_written();
    assert_eq!(written.iter().filter(|it| it.starts_with("PUT")).count(), 3, "{written:?}");
    assert!(alice.download(&item, &[]).await.body == bytes, "other bytes came back");
    let end = alice.download(&item, &[("range", "bytes=-7")]).await;
    assert_eq!(&end.body[..], &bytes[bytes.len() - 7..]);
}

#[tokio::test(start_paused = true)]
async fn a_bucket_that_fails_or_hangs_loses_nothing_and_holds_up_nobody_else() {
    let (server, bucket, _) = with_bucket(|_| {});
    let alice = server.register("alice").await;
    let item = alice.upload("text/plain", "kept").await;
    for weather in [Weather::Refuses, Weather::Silent] {
        bucket.weather(weather);
        let path = "/_matrix/media/v3/upload";
        let upload = alice.ask(Method::POST, path, &[], "not acknowledged").await;
        assert_eq!(upload.refusal(), (502, "M_UNKNOWN".to_owned()), "{weather:?}");
        assert_eq!(alice.download(&item, &[]).await.refusal(), (502, "M_UNKNOWN".to_owned()), "{weather:?}");
    }
    // Others do not wait with those who do.
    let (asking, slow) = (alice.clone(), item.clone());
    let hanging = server.begin(async move { asking.download(&slow, &[]).await.status });
    sleep(&server, Duration::from_secs(1)).await;
    let before = server.server().app().env.instant();
    alice.ok_get("/_matrix/client/v3/account/whoami").await;
    assert!(before.elapsed() < Duration::from_secs(1));
    assert_eq!(hanging.await.unwrap(), StatusCode::BAD_GATEWAY);
    bucket.weather(Weather::Fair);
    assert_eq!(&alice.download(&item, &[]).await.body[..], b"kept");
    alice.upload("text/plain", "not acknowledged").await;
    server.assert_whole();
    bucket.lose_all();
    assert_eq!(alice.download(&item, &[]).await.refusal(), (404, "M_NOT_FOUND".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_thumbnail_is_made_of_an_image_in_the_bucket_and_kept_there() {
    let (server, bucket, _) = with_bucket(|_| {});
    let alice = server.register("alice").await;
    let mut png = std::io::Cursor::new(Vec::new());
    let image = DynamicImage::from(RgbImage::from_pixel(400, 300, image::Rgb([9, 99, 199])));
    image.write_to(&mut png, ImageFormat::Png).unwrap();
    let item = alice.upload("image/png", png.into_inner()).await;
    let path = format!("/_matrix/client/v1/media/thumbnail/{item}?width=32&height=32&method=crop");
    for _ in 0..2 {
        let answer = alice.ask(Method::GET, &path, &[], Body::empty()).await;
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
        let size = image::GenericImageView::dimensions(&image::load_from_memory(&answer.body).unwrap());
        assert_eq!(size, (32, 32));
    }
    sleep(&server, Duration::from_secs(1)).await;
    assert_eq!((bucket.objects().len(), files(server.media()).len()), (2, 0));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_image_that_became_smaller_leaves_nothing_else_in_the_bucket() {
    let (server, bucket, _) = with_bucket(|config| {
        config.media.compression.images = true;
        config.media.compression.jpeg_quality = 50;
        config.media.compression.keep_original = false;
    });
    let alice = server.register("alice").await;
    let item = alice.upload("image/jpeg", photograph()).await;
    sleep(&server, Duration::from_secs(10)).await;
    let objects = bucket.objects();
    assert_eq!((objects.len(), files(server.media()).len()), (1, 0));
    assert!(objects[0].1 < photograph().len());
    assert_eq!(alice.download(&item, &[]).await.body.len(), objects[0].1);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn who_allows_it_is_sent_to_the_bucket_and_others_are_not() {
    let (server, _, net) = with_bucket(|config| {
        config.media.s3.redirect = true;
        config.media.s3.redirect_endpoint = "https://files.example".to_owned();
    });
    let alice = server.register("alice").await;
    let item = alice.upload("text/html", "<b>x</b>").await;
    assert_eq!(alice.download(&item, &[]).await.status, StatusCode::OK, "it did not say that it follows");
    let ask = async |query: &str| alice.download(&format!("{item}{query}"), &[]).await;
    let sent = ask("?allow_redirect=true").await;
    assert_eq!((sent.status, sent.body.len()), (StatusCode::TEMPORARY_REDIRECT, 0));
    let location = sent.field("location").to_owned();
    assert!(location.starts_with("https://files.example/files/below/"), "{location}");
    for said in ["X-Amz-Expires=300&", "&X-Amz-Signature=", "response-content-type=text%2Fhtml&"] {
        assert!(location.contains(said), "{location}");
    }
    assert!(location.contains("response-content-disposition=attachment%3B%20filename"), "{location}");
    assert_eq!(sent.field("cache-control"), "no-store");
    assert_eq!(ask("?allow_redirect=false").await.status, StatusCode::OK);
    assert_eq!(ask("?allow_redirect=maybe").await.refusal(), (400, "M_INVALID_PARAM".to_owned()));
    // Other servers follow always.
    let peer = Peer::new(&net, "peer.example", "5.0.0.2", 7);
    let id = item.split_once('/').unwrap().1;
    let path = format!("/_matrix/federation/v1/media/download/{id}");
    let response = server.send(peer.signed("test.example", Method::GET, &path, None)).await;
    assert_eq!(response.status(), StatusCode::OK);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(body.to_vec()).unwrap();
    assert!(text.contains("\r\nLocation: https://files.example/files/below/"), "{text}");
    assert!(!text.contains("<b>"), "{text}");
    let of = Chosen::Item(format!("mxc://{item}"));
    command(&server, MediaCommand::Quarantine { of, is: true }).await;
    assert_eq!(ask("?allow_redirect=true").await.refusal(), (404, "M_NOT_FOUND".to_owned()));
    let again = alice.upload("text/html", "<b>x</b>").await;
    let again = alice.download(&format!("{again}?allow_redirect=true"), &[]).await;
    assert_eq!(again.refusal(), (404, "M_NOT_FOUND".to_owned()), "its bytes are quarantined");
}

#[tokio::test(start_paused = true)]
async fn files_move_to_the_bucket_and_back_while_they_are_read() {
    let (server, bucket, _) = with_bucket(|config| config.media.s3.stores_new = false);
    let alice = server.register("alice").await;
    let mut items = Vec::new();
    for number in 0..5 {
        let text = format!("file {number}");
        items.push((alice.upload("text/plain", text.clone()).await, text));
    }
    assert_eq!((bucket.objects().len(), files(server.media()).len()), (0, 5));
    let all_read = async |place: &str| {
        for (item, text) in &items {
            assert_eq!(&alice.download(item, &[]).await.body[..], text.as_bytes(), "{place}");
        }
        server.assert_whole();
    };
    // The copies come about, and the move breaks off before any file is said to lie there.
    bucket.weather(Weather::LosesAnswers);
    let broken_off =
        operate(server.server().app(), Command::Media(MediaCommand::Move { to: Home::S3 }), |_| ()).await;
    assert!(broken_off.is_err());
    let copies = bucket.objects().len();
    assert!(copies > 0);
    all_read("after a move that broke off").await;
    bucket.weather(Weather::Fair);
    let moved = move_to(&server, Home::S3).await;
    assert_eq!((moved.files, moved.bytes, moved.there, moved.passing), (5, 30, 0, 0));
    all_read("in the bucket").await;
    assert_eq!(files(server.media()).len(), 5, "they stay for those who have just looked");
    sleep(&server, HOUR).await;
    assert_eq!((bucket.objects().len(), files(server.media()).len()), (5 + copies, 0));
    assert_eq!(move_to(&server, Home::S3).await.there, 5);
    // A copy of the move that broke off is removed a day later.
    sleep(&server, 25 * HOUR).await;
    assert_eq!(bucket.objects().len(), 5);
    all_read("a day later").await;
    assert_eq!(move_to(&server, Home::Disk).await.files, 5);
    all_read("on the disk").await;
    sleep(&server, HOUR).await;
    assert_eq!((bucket.objects().len(), files(server.media()).len()), (0, 5));
    all_read("on the disk alone").await;
}

#[tokio::test(start_paused = true)]
async fn nothing_moves_where_there_is_no_bucket() {
    let server = TestServer::new();
    let moved = operate(server.server().app(), Command::Media(MediaCommand::Move { to: Home::S3 }), |_| ());
    assert!(moved.await.unwrap_err().refusal().unwrap().message.contains("media.s3.bucket"));
}
