//! Images that users upload become smaller files, where the settings say so.

use std::time::Duration;

use aqueduct::{
    config::{Config, Size},
    flows::operator::{
        media::{Chosen, ItemEntry, MediaCommand, MediaOutcome},
        operate::{Command, Outcome, operate},
    },
};
use image::{ImageEncoder, RgbImage, codecs::jpeg::JpegEncoder};

use crate::{media::files, support::TestServer};

/// A JPEG that has much to save.
pub(crate) fn photograph() -> Vec<u8> {
    let picture = RgbImage::from_fn(300, 200, |x, y| {
        image::Rgb([u8::try_from(x * 7 % 256).unwrap(), u8::try_from(y * 5 % 256).unwrap(), 99])
    });
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 100);
    encoder.set_exif_metadata(b"MM\0\x2a\0\0\0\x08\0\0 52.5N 13.4E".to_vec()).unwrap();
    picture.write_with_encoder(encoder).unwrap();
    bytes
}

fn server(change: impl FnOnce(&mut Config)) -> TestServer {
    TestServer::with(|config| {
        config.media.compression.images = true;
        config.media.compression.jpeg_quality = 50;
        change(config);
    })
}

async fn operated(server: &TestServer, command: MediaCommand) -> MediaOutcome {
    match operate(server.server().app(), Command::Media(command), |_| ()).await.unwrap() {
        Outcome::Media(outcome) => outcome,
        other => panic!("{other:?}"),
    }
}

async fn shown(server: &TestServer, item: &str) -> ItemEntry {
    match operated(server, MediaCommand::Show { uri: format!("mxc://{item}") }).await {
        MediaOutcome::Item(entry) => *entry,
        other => panic!("{other:?}"),
    }
}

async fn wait(server: &TestServer, hours: u64) {
    server.server().app().env.sleep(Duration::from_secs(hours * 3_600)).await;
}

#[tokio::test(start_paused = true)]
async fn everybody_gets_the_smaller_file_and_operators_have_both() {
    let server = server(|_| {});
    let alice = server.register("alice").await;
    let bytes = photograph();
    let item = alice.upload("image/jpeg", bytes.clone()).await;
    let given = alice.download(&item, &[]).await;
    assert!(given.body.len() < bytes.len() / 2, "{} of {} bytes", given.body.len(), bytes.len());
    assert_eq!(given.field("content-type"), "image/jpeg");
    assert!(given.body.windows(5).all(|part| part != b"13.4E"));
    assert_eq!(image::load_from_memory(&given.body).unwrap().width(), 300);
    let entry = shown(&server, &item).await;
    assert_eq!(entry.original.unwrap().bytes, bytes.len() as u64);
    assert_eq!(entry.row.content.unwrap().bytes, given.body.len() as u64);
    assert_eq!(files(server.media()).len(), 2);
    server.assert_whole();
    // A file that is encrypted, or said to be anything else, stays as it is.
    for other in ["application/octet-stream", "image/webp"] {
        let item = alice.upload(other, bytes.clone()).await;
        assert_eq!(&alice.download(&item, &[]).await.body[..], &bytes[..], "{other}");
        assert!(shown(&server, &item).await.original.is_none());
    }
    operated(&server, MediaCommand::Delete { of: Chosen::OfUser("alice".to_owned(), 0) }).await;
    wait(&server, 2).await;
    assert_eq!(files(server.media()), []);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn the_uploaded_file_goes_where_it_is_not_to_be_kept() {
    let own_bytes = u32::try_from(photograph().len()).unwrap();
    let changes: [fn(&mut Config, u32); 2] = [
        |config, _| config.media.compression.keep_original = false,
        // There is no room for both.
        |config, bytes| config.media.user_bytes_max = Size::parse(&format!("{bytes} B")).unwrap(),
    ];
    for change in changes {
        let server = server(|config| change(config, own_bytes));
        let alice = server.register("alice").await;
        let item = alice.upload("image/jpeg", photograph()).await;
        assert!(shown(&server, &item).await.original.is_none());
        wait(&server, 2).await;
        assert_eq!(files(server.media()).len(), 1);
        assert_eq!(alice.download(&item, &[]).await.status, http::StatusCode::OK);
        server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_made_smaller_unless_the_operator_turns_it_on() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let item = alice.upload("image/jpeg", photograph()).await;
    assert_eq!(&alice.download(&item, &[]).await.body[..], &photograph()[..]);
}
