//! Files of other servers reach those who wait for them while they are received.

use std::{sync::Mutex, time::Duration};

use aqueduct::config::Size;
use axum::{body::Body, response::Response};
use bytes::Bytes;
use federation::{
    ports,
    testing::{Answered, json},
};
use futures_util::stream;
use http::{Request, StatusCode, Version, header};
use http_body_util::BodyExt;
use tokio::sync::{mpsc, oneshot};

use crate::{media::files, media_remote::Scene};

const HEAD: &str = "--boundary\r\n\r\n{}\r\n--boundary\r\nContent-Type: text/plain\r\n\r\n";
const END: &str = "\r\n--boundary--\r\n";

/// A scene whose other server is asked once, and sends what the test sends.
struct Slow {
    scene: Scene,
    to_server: mpsc::UnboundedSender<Bytes>,
}

impl Slow {
    /// The other server answers with these header fields. It may be one from before there was an endpoint for servers.
    async fn new(fields: &'static [(&'static str, &'static str)], is_old: bool) -> Self {
        let (to_server, sent) = mpsc::unbounded_channel::<Bytes>();
        let sent = Mutex::new(Some(sent));
        let scene = Scene::with(Size::mib(4), move |arrived| {
            if is_old && arrived.request.uri().path().starts_with("/_matrix/federation/") {
                return json(404, r#"{"errcode":"M_UNRECOGNIZED","error":"no such endpoint"}"#);
            }
            let Some(sent) = sent.lock().unwrap().take() else { panic!("the file is asked for twice") };
            let pieces = stream::unfold(sent, |mut sent| async move {
                let piece = sent.recv().await?;
                Some((Ok(piece), sent))
            });
            let mut answer: Answered = http::Response::new(ports::Body::new(pieces));
            for (name, value) in fields {
                answer.headers_mut().insert(*name, value.parse().unwrap());
            }
            answer
        })
        .await;
        Self { scene, to_server }
    }

    async fn in_parts() -> Self {
        let slow = Self::new(&[("content-type", "multipart/mixed; boundary=boundary")], false).await;
        slow.send(HEAD);
        slow
    }

    fn send(&self, bytes: impl Into<Bytes>) {
        self.to_server.send(bytes.into()).unwrap();
    }

    /// Begins to ask for the file, in this version of HTTP and perhaps for a range.
    fn ask(&self, version: Version, range: Option<&str>) -> oneshot::Receiver<Response> {
        let token = self.scene.alice.token.clone().unwrap();
        let mut request = Request::get("/_matrix/client/v1/media/download/b.example/x")
            .version(version)
            .header(header::AUTHORIZATION, format!("Bearer {token}"));
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        let (server, request) = (self.scene.alice.server.clone(), request.body(Body::empty()).unwrap());
        self.scene.server.begin(async move { server.send(request).await })
    }

    async fn wait(&self, seconds: u64) {
        self.scene.server.server().app().env.sleep(Duration::from_secs(seconds)).await;
    }
}

async fn frame(body: &mut Body) -> Bytes {
    body.frame().await.unwrap().unwrap().into_data().unwrap()
}

#[tokio::test(start_paused = true)]
async fn all_who_wait_get_a_file_as_it_comes_and_later_ones_get_it_as_it_is_kept() {
    let slow = Slow::in_parts().await;
    slow.send("the first half of the file, ");
    let asked = [slow.ask(Version::HTTP_11, None), slow.ask(Version::HTTP_2, Some("bytes=0-"))];
    let mut bodies = Vec::new();
    for asked in asked {
        let (head, mut body) = asked.await.unwrap().into_parts();
        assert_eq!(head.status, StatusCode::OK);
        assert_eq!(head.headers["content-type"], "text/plain");
        assert_eq!(head.headers["x-content-type-options"], "nosniff");
        assert!(head.headers["content-disposition"].to_str().unwrap().starts_with("inline"));
        for not_known in ["etag", "content-length", "accept-ranges"] {
            assert!(!head.headers.contains_key(not_known), "{not_known}");
        }
        let first = frame(&mut body).await;
        assert!(b"the first half of the file, ".starts_with(&first) && first.len() > 10, "{first:?}");
        bodies.push((first, body));
    }
    // Somebody else who comes now joins them.
    let (_, mut body) = slow.ask(Version::HTTP_11, None).await.unwrap().into_parts();
    bodies.push((frame(&mut body).await, body));
    // These wait for the whole, since they could not tell a part from it, or want a part of it.
    let whole = [slow.ask(Version::HTTP_10, None), slow.ask(Version::HTTP_11, Some("bytes=4-8"))];
    slow.wait(5).await;
    slow.send("and the second half");
    slow.send(END);
    let expected = "the first half of the file, and the second half";
    for (first, body) in bodies {
        let rest = body.collect().await.unwrap().to_bytes();
        assert_eq!([first, rest].concat(), expected.as_bytes());
    }
    for (asked, expected) in whole.into_iter().zip([expected, "first"]) {
        let (head, body) = asked.await.unwrap().into_parts();
        assert!(head.headers.contains_key("etag"));
        assert_eq!(body.collect().await.unwrap().to_bytes(), expected);
    }
    let later = slow.scene.alice.download("b.example/x", &[]).await;
    assert_eq!((later.field("content-length"), later.field("accept-ranges")), ("47", "bytes"));
    slow.scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_file_that_breaks_off_is_whole_for_nobody() {
    let slow = Slow::in_parts().await;
    slow.send("the first half of the file, ");
    let (head, mut body) = slow.ask(Version::HTTP_11, None).await.unwrap().into_parts();
    assert_eq!(head.status, StatusCode::OK);
    frame(&mut body).await;
    let waits = slow.ask(Version::HTTP_10, None);
    let Slow { scene, to_server } = slow;
    drop(to_server);
    assert!(body.collect().await.is_err());
    assert_eq!(waits.await.unwrap().status(), StatusCode::BAD_GATEWAY);
    scene.server.server().app().env.sleep(Duration::from_secs(1)).await;
    assert_eq!(files(scene.server.media()), []);
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_file_of_another_length_than_was_said_is_whole_for_nobody() {
    for (rest, is_right) in [("67890", true), ("6789", false), ("67890 and more", false)] {
        let fields = &[("content-type", "text/plain"), ("content-length", "10")];
        let slow = Slow::new(fields, true).await;
        slow.send("12345");
        let (head, mut body) = slow.ask(Version::HTTP_11, None).await.unwrap().into_parts();
        assert_eq!(head.headers["content-length"], "10");
        let mut read = frame(&mut body).await.to_vec();
        assert_eq!(read, b"12345");
        slow.send(rest);
        let Slow { scene, to_server } = slow;
        drop(to_server);
        let is_whole = loop {
            match body.frame().await {
                Some(Ok(frame)) => read.extend(frame.into_data().unwrap()),
                Some(Err(_)) => break false,
                None => break true,
            }
        };
        assert_eq!(is_whole, is_right, "{rest}");
        assert_eq!(read.len() == 10, is_right, "its client counts the bytes: {read:?}");
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_who_falls_behind_goes_on_once_the_file_is_kept() {
    let slow = Slow::in_parts().await;
    let piece = |number: u8| Bytes::from(vec![number; 100_000]);
    slow.send(piece(0));
    slow.send(piece(1));
    let (_, mut body) = slow.ask(Version::HTTP_11, None).await.unwrap().into_parts();
    let mut read = frame(&mut body).await.to_vec();
    for number in 2..20 {
        slow.send(piece(number));
    }
    slow.wait(1).await;
    slow.send(END);
    read.extend(body.collect().await.unwrap().to_bytes());
    let expected: Vec<u8> = (0..20).flat_map(|number| vec![number; 100_000]).collect();
    assert!(read == expected, "{} bytes are not {}", read.len(), expected.len());
    slow.scene.server.assert_whole();
}
