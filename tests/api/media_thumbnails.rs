//! Thumbnails of files that users upload. How they are drawn is tested beside the code.

use axum::body::Body;
use http::{Method, StatusCode};
use image::{DynamicImage, GenericImageView, ImageFormat, RgbImage};

use crate::{
    media::{Answer, files},
    support::{TestClient, TestServer},
};

/// An image of this size in some colour, as a file.
fn picture(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = DynamicImage::from(RgbImage::from_pixel(width, height, image::Rgb([9, 99, 199])));
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

async fn thumbnail(client: &TestClient, item: &str, query: &str) -> Answer {
    let path = format!("/_matrix/client/v1/media/thumbnail/{item}?{query}");
    client.ask(Method::GET, &path, &[], Body::empty()).await
}

#[tokio::test(start_paused = true)]
async fn a_thumbnail_is_made_once_and_given_as_it_should_be() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    // Its content type is not believed.
    let item = alice.upload("text/html", picture(800, 600, ImageFormat::Jpeg)).await;
    let before = files(server.media()).len();
    let first = thumbnail(&alice, &item, "width=96&height=96&method=crop").await;
    assert_eq!(first.status, StatusCode::OK, "{:?}", first.body);
    assert_eq!(image::load_from_memory(&first.body).unwrap().dimensions(), (96, 96));
    assert_eq!(first.field("content-type"), "image/jpeg");
    assert_eq!(first.field("content-disposition"), "inline; filename=thumbnail.jpeg");
    assert!(first.field("content-security-policy").starts_with("sandbox"));
    let again = thumbnail(&alice, &item, "width=96&height=96&method=crop").await;
    assert_eq!((again.field("etag"), &again.body), (first.field("etag"), &first.body));
    assert_eq!(files(server.media()).len(), before + 1);
    let scaled = thumbnail(&alice, &item, "width=320&height=320").await;
    assert_eq!(image::load_from_memory(&scaled.body).unwrap().dimensions(), (320, 240));
    // An image that is small enough is given as it is, and as what it is.
    let small = picture(20, 10, ImageFormat::Png);
    let item = alice.upload("application/octet-stream", small.clone()).await;
    let answer = thumbnail(&alice, &item, "width=32&height=32&method=crop").await;
    assert_eq!((&answer.body[..], answer.field("content-type")), (&small[..], "image/png"));
    assert_eq!(answer.field("content-disposition"), "inline; filename=thumbnail.png");
    server.assert_whole();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_who_ask_at_once_share_one_thumbnail() {
    let server = TestServer::real(|_| {});
    let alice = server.register("alice").await;
    let item = alice.upload("image/png", picture(900, 900, ImageFormat::Png)).await;
    let asking: Vec<_> = (0..8)
        .map(|_| {
            let (alice, item) = (alice.clone(), item.clone());
            server.begin(async move { thumbnail(&alice, &item, "width=64&height=64").await.status })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap(), StatusCode::OK);
    }
    assert_eq!(files(server.media()).len(), 2);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_can_have_no_thumbnail_is_refused() {
    let server = TestServer::with(|config| config.media.thumbnail_pixels_max = 10_000);
    let alice = server.register("alice").await;
    let text = alice.upload("image/png", "<svg onload='alert(1)'/>").await;
    let refused = thumbnail(&alice, &text, "width=32&height=32").await.refusal();
    assert_eq!(refused, (400, "M_UNKNOWN".to_owned()));
    let large = alice.upload("image/png", picture(200, 200, ImageFormat::Png)).await;
    let refused = thumbnail(&alice, &large, "width=32&height=32").await.refusal();
    assert_eq!(refused, (413, "M_TOO_LARGE".to_owned()));
    let fits = alice.upload("image/png", picture(50, 50, ImageFormat::Png)).await;
    for (query, code) in [
        ("", "M_MISSING_PARAM"),
        ("width=32", "M_MISSING_PARAM"),
        ("width=-1&height=32", "M_INVALID_PARAM"),
        ("width=0&height=32", "M_INVALID_PARAM"),
        ("width=a&height=32", "M_INVALID_PARAM"),
        ("width=32&height=32&method=stretch", "M_INVALID_PARAM"),
        ("width=32&height=32&animated=maybe", "M_INVALID_PARAM"),
    ] {
        assert_eq!(thumbnail(&alice, &fits, query).await.refusal(), (400, code.to_owned()), "{query}");
    }
    for query in ["width=999999999999&height=1", "width=32&height=32&animated=true"] {
        assert_eq!(thumbnail(&alice, &fits, query).await.status, StatusCode::OK, "{query}");
    }
    let old = format!("/_matrix/media/v3/thumbnail/{fits}?width=32&height=32");
    let refused = server.anonymous().ask(Method::GET, &old, &[], Body::empty()).await.refusal();
    assert_eq!(refused, (404, "M_NOT_FOUND".to_owned()));
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn thumbnails_of_odd_sizes_are_few_and_keep_no_usual_one_out() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let picture = picture(700, 700, ImageFormat::Png);
    let item = alice.upload("image/png", picture).await;
    let kept = || {
        let rows = server.assert_whole();
        rows.iter().find(|(table, _)| *table == "MEDIA_THUMBNAIL").unwrap().1
    };
    for width in (1..700).step_by(90) {
        for height in (1..700).step_by(110) {
            let asked = format!("width={width}&height={height}&method=crop");
            let answer = thumbnail(&alice, &item, &asked).await;
            assert_eq!(answer.status, StatusCode::OK);
        }
    }
    let odd = kept();
    assert!((10..40).contains(&odd), "{odd}");
    for _ in 0..2 {
        let answer = thumbnail(&alice, &item, "width=320&height=240&method=scale").await;
        assert_eq!(answer.status, StatusCode::OK);
    }
    assert_eq!(kept(), odd + 1);
}

#[tokio::test(start_paused = true)]
async fn an_upload_is_answered_with_its_blurhash_where_that_is_asked_for() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let upload = async |query: &str, bytes: Vec<u8>| {
        let path = format!("/_matrix/media/v3/upload{query}");
        let answer = alice.ask(Method::POST, &path, &[("content-type", "image/png")], bytes).await;
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
        let json = answer.json();
        assert!(json["content_uri"].as_str().unwrap().starts_with("mxc://test.example/"));
        json["xyz.amorgan.blurhash"].as_str().map(str::to_owned)
    };
    let (asked, image) = ("?xyz.amorgan.generate_blurhash=true", picture(40, 30, ImageFormat::Png));
    let hash = upload(asked, image.clone()).await.unwrap();
    assert!(hash.starts_with('L') && hash.len() == 28, "{hash}");
    for (query, bytes) in
        [("", &image[..]), ("?xyz.amorgan.generate_blurhash=false", &image[..]), (asked, b"no image")]
    {
        assert_eq!(upload(query, bytes.to_vec()).await, None, "{query}");
    }
    // One that is too large to be looked at is uploaded like any other.
    let server = TestServer::with(|config| config.media.thumbnail_pixels_max = 10_000);
    let bob = server.register("bob").await;
    let large = picture(200, 100, ImageFormat::Png);
    let path = format!("/_matrix/media/v3/upload{asked}");
    let answer = bob.ask(Method::POST, &path, &[], large.clone()).await;
    assert_eq!((answer.status, answer.json()["xyz.amorgan.blurhash"].is_null()), (StatusCode::OK, true));
    // A URI that was made before is uploaded to in the same way.
    let made = alice.ok_post("/_matrix/media/v1/create", serde_json::json!({})).await;
    let item = made["content_uri"].as_str().unwrap().strip_prefix("mxc://").unwrap().to_owned();
    let path = format!("/_matrix/media/v3/upload/{item}{asked}");
    let answer = alice.ask(Method::PUT, &path, &[], image).await;
    assert_eq!(answer.json(), serde_json::json!({ "xyz.amorgan.blurhash": hash }));
}
