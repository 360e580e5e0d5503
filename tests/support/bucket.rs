//! A bucket of an S3-compatible store in a network in memory: as much of its API as the server uses.

use std::{collections::BTreeMap, future::ready, sync::Arc};

use aqueduct::config::Config;
use bytes::Bytes;
use federation::testing::{Answered, Arrived, Net, Weather, bytes};
use http::Method;
use parking_lot::Mutex;

const ADDRESS: &str = "5.0.0.9:80";
const HOST: &str = "bucket.example";

/// The bucket `files` of a store. A clone is the same bucket.
#[derive(Clone)]
pub(crate) struct Bucket {
    net: Net,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    uploads: BTreeMap<String, BTreeMap<u32, Bytes>>,
    /// The requests that changed something, as method and query.
    written: Vec<String>,
}

impl Bucket {
    /// An empty bucket in this network.
    pub(crate) fn new(net: &Net) -> Self {
        let state = Arc::<Mutex<State>>::default();
        net.host(HOST, &["5.0.0.9"]);
        let serving = Arc::clone(&state);
        net.serve(ADDRESS, &[], move |arrived| ready(answer(&mut serving.lock(), &arrived)));
        Self { net: net.clone(), state }
    }

    /// Has a server keep its files in the bucket.
    pub(crate) fn set(config: &mut Config) {
        let settings = &mut config.media.s3;
        settings.bucket = "files".to_owned();
        settings.endpoint = format!("http://{HOST}");
        settings.access_key_id = "key".to_owned();
        settings.secret_access_key = "secret".to_owned();
        settings.prefix = "below".to_owned();
    }

    /// How the store behaves from now on.
    pub(crate) fn weather(&self, weather: Weather) {
        self.net.weather(ADDRESS, weather, std::time::Duration::ZERO);
    }

    /// The objects by their names, each with its length.
    pub(crate) fn objects(&self) -> Vec<(String, usize)> {
        self.state.lock().objects.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect()
    }

    /// The uploads that were begun and not ended.
    pub(crate) fn uploads(&self) -> usize {
        self.state.lock().uploads.len()
    }

    /// The requests that changed something since the last call, as method and query.
    pub(crate) fn take_written(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().written)
    }

    /// Loses all that it has.
    pub(crate) fn lose_all(&self) {
        self.state.lock().objects.clear();
    }
}

fn plain(status: u16) -> Answered {
    bytes(status, &[("etag", "\"tag\""), ("content-length", "0")], "")
}

fn xml(text: String) -> Answered {
    let length = text.len().to_string();
    bytes(200, &[("content-type", "application/xml"), ("content-length", &length)], text)
}

fn answer(state: &mut State, arrived: &Arrived) -> Answered {
    let request = &arrived.request;
    let signed = request.headers().get("authorization").and_then(|it| it.to_str().ok()).unwrap_or_default();
    if !signed.starts_with("AWS4-HMAC-SHA256 Credential=key/") {
        return plain(403);
    }
    let Some(name) = request.uri().path().strip_prefix("/files/").map(str::to_owned) else {
        return plain(404);
    };
    let query = request.uri().query().unwrap_or_default().to_owned();
    let parameter = |wanted: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == wanted).map(|(_, value)| value.to_owned())
    };
    let (method, body) = (request.method().clone(), request.body().clone());
    if !matches!(method, Method::GET | Method::HEAD) {
        state.written.push(format!("{method} {}", query.split('=').next().unwrap_or_default()));
    }
    match (method, parameter("uploadId")) {
        (Method::POST, None) => {
            let id = format!("upload{}", state.uploads.len());
            state.uploads.insert(id.clone(), BTreeMap::new());
            xml(format!(
                "<InitiateMultipartUploadResult><Bucket>files</Bucket><Key>{name}</Key><UploadId>{id}</UploadId>\
                 </InitiateMultipartUploadResult>"
            ))
        }
        (Method::PUT, Some(id)) => {
            let number = parameter("partNumber").and_then(|number| number.parse().ok());
            match (state.uploads.get_mut(&id), number) {
                (Some(parts), Some(number)) => {
                    parts.insert(number, body);
                    plain(200)
                }
                _ => plain(404),
            }
        }
        (Method::POST, Some(id)) => match state.uploads.remove(&id) {
            Some(parts) => {
                let whole: Vec<u8> = parts.into_values().flatten().collect();
                state.objects.insert(name, whole.into());
                xml("<CompleteMultipartUploadResult><ETag>\"tag\"</ETag></CompleteMultipartUploadResult>"
                    .to_owned())
            }
            None => plain(404),
        },
        (Method::DELETE, Some(id)) => {
            state.uploads.remove(&id);
            plain(204)
        }
        (Method::PUT, None) => {
            state.objects.insert(name, body);
            plain(200)
        }
        (Method::DELETE, None) => {
            state.objects.remove(&name);
            plain(204)
        }
        _ => read(state, &name, arrived),
    }
}

fn read(state: &State, name: &str, arrived: &Arrived) -> Answered {
    let Some(object) = state.objects.get(name) else { return plain(404) };
    let whole = object.len();
    let range = arrived.request.headers().get("range").and_then(|it| it.to_str().ok());
    let range = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let range = range.and_then(|(first, last)| Some(first.parse().ok()?..last.parse::<usize>().ok()? + 1));
    let (status, part) = match range {
        Some(range) => (206, range.start..range.end.min(whole)),
        None => (200, 0..whole),
    };
    let length = part.len().to_string();
    let said = format!("bytes {}-{}/{whole}", part.start, part.end.saturating_sub(1));
    let body = if arrived.request.method() == Method::HEAD { Bytes::new() } else { object.slice(part) };
    let mut fields = vec![
        ("etag", "\"tag\""),
        ("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT"),
        ("content-length", length.as_str()),
    ];
    if status == 206 {
        fields.push(("content-range", &said));
    }
    bytes(status, &fields, body)
}
