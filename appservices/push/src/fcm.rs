//! Firebase Cloud Messaging by its HTTP API v1
//! ([`projects.messages.send`](https://firebase.google.com/docs/reference/fcm/rest/v1/projects.messages/send)).
//!
//! The message has data alone, and the app shows what it likes. Its values are texts; the fields of `content` that are texts stand
//! beside the others as `content_body` and the like, as apps of Matrix read them.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderValue, header};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    gateway::{BadApp, Shared},
    message::{Job, Message},
    notification::{Device, Notification},
    oauth::ServiceAccount,
    outbound::{Answer, Endpoint},
    outcome::Outcome,
    remembered::mark,
    settings::{App, Payload},
    text,
};

/// The address of Firebase itself.
const URL: &str = "https://fcm.googleapis.com";
/// The data of a message have at most this many bytes, keys and values together; Google takes 4096.
const DATA_BYTES_MAX: usize = 4000;
/// Google asks to wait this long after too many requests, where its answer does not say how long.
const TOO_MANY_PAUSE: Duration = Duration::from_secs(60);
/// A value has at most this many bytes, so that a few long ones fit.
const VALUE_BYTES_MAX: usize = 1024;
/// These are never shortened, because they name something.
const KEPT: [&str; 5] = ["event_id", "room_id", "prio", "unread", "missed_calls"];

/// An app that Firebase reaches.
pub(crate) struct FcmApp {
    number: usize,
    payload: Payload,
    ttl_s: u32,
    message: Map<String, Value>,
    account: ServiceAccount,
    endpoint: Endpoint,
}

impl FcmApp {
    /// Reads the key of the service account. Errors: [`BadApp`].
    pub(crate) fn open(number: usize, app: &App) -> Result<Self, BadApp> {
        let account = ServiceAccount::load(&app.service_account_file)?;
        let url = if app.url.is_empty() { URL } else { &app.url };
        let path = format!("/v1/projects/{}/messages:send", account.project);
        let endpoint = Endpoint::parse(url).and_then(|it| it.below(&path)).map_err(BadApp::Url)?;
        let message = app.message.clone();
        Ok(Self { number, payload: app.payload, ttl_s: app.ttl_s, message, account, endpoint })
    }

    /// Finds the way to a device. Errors: what becomes of the device without one.
    pub(crate) fn read(&self, notification: &Notification, device: &Device) -> Result<Job, Outcome> {
        if device.wants("events_only") && notification.event_id.is_none() {
            return Err(Outcome::Skipped);
        }
        device.require_default_payload().map_err(Outcome::Refused)?;
        let receiver = mark(&[b"fcm", device.app_id.as_bytes(), device.pushkey.as_bytes()]);
        Ok(Job { endpoint: self.endpoint.clone(), subscriber: None, receiver })
    }

    /// Makes the message, which takes a while. Errors: what becomes of the device without one.
    pub(crate) fn make(
        &self,
        shared: &Shared,
        notification: &Notification,
        device: &Device,
        job: &Job,
    ) -> Result<Message, Outcome> {
        let default_payload = device.default_payload().map_err(Outcome::Refused)?;
        let shown = notification.shown(self.payload);
        let data = data(&shown, default_payload);
        let data = data.ok_or(Outcome::Unfit("`data.default_payload` is larger than Firebase takes"))?;
        let mut message = self.message.clone();
        message.insert("token".to_owned(), device.pushkey.as_str().into());
        message.insert("data".to_owned(), json!(data));
        let android = message.entry("android").or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(android) = android {
            let priority = if notification.is_low() { "NORMAL" } else { "HIGH" };
            android.insert("priority".to_owned(), priority.into());
            android.insert("ttl".to_owned(), format!("{}s", self.ttl_s).into());
            if let Some(room_id) =
                notification.room_id.as_deref().filter(|_| device.wants("only_last_per_room"))
            {
                let key = URL_SAFE_NO_PAD.encode(shared.topic(&job.receiver, room_id));
                android.insert("collapse_key".to_owned(), key.into());
            }
        }
        let body = serde_json::to_vec(&json!({ "message": message }));
        let body = body.map_err(|_| Outcome::Unfit("the message cannot be written"))?;
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(Message { headers, body: body.into() })
    }

    /// The `Authorization` header. Errors: there is none now.
    pub(crate) async fn authorization(&self, shared: &Shared) -> Result<HeaderValue, Outcome> {
        self.account.authorization(shared, self.number).await
    }

    /// The meaning of an answer to a message that was sent with this token.
    pub(crate) async fn judge(
        &self,
        shared: &Shared,
        answer: &Answer,
        token: Option<&HeaderValue>,
    ) -> Outcome {
        if let (401, Some(token)) = (answer.status.as_u16(), token) {
            self.account.forget(token).await;
        }
        let outcome = outcome(answer);
        if let Outcome::Failed { why: NOT_KNOWN, .. } = outcome {
            let (status, project) = (answer.status.as_u16(), &self.account.project);
            shared.warn(self.number, || {
                tracing::warn!(status, project, "Firebase does not accept the service account of an app");
            });
        }
        outcome
    }
}

/// Firebase refuses everything of the app, so that its settings are wrong.
const NOT_KNOWN: &str = "Firebase does not know the service account or its project";

/// The body of an answer that is no success.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    error: Error,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Error {
    message: String,
    details: Vec<Detail>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Detail {
    #[serde(rename = "@type")]
    kind: String,
    error_code: String,
}

/// The meaning of an answer (<https://firebase.google.com/docs/reference/fcm/rest/v1/ErrorCode>).
fn outcome(answer: &Answer) -> Outcome {
    let retry_after = answer.retry_after;
    if answer.status.is_success() {
        return Outcome::Delivered;
    }
    let Refusal { error } = serde_json::from_slice(&answer.body).unwrap_or_default();
    let code = error.details.iter().find(|it| it.kind.ends_with("FcmError")).map(|it| it.error_code.as_str());
    match (answer.status.as_u16(), code) {
        // A wrong project is not found either, and says nothing of the device.
        (404, Some("UNREGISTERED")) => Outcome::Gone,
        // The same code stands for other faults of a message; the words are those of Google's documentation.
        (400, Some("INVALID_ARGUMENT")) if error.message.contains("not a valid FCM registration token") => {
            Outcome::Gone
        }
        (400, _) => Outcome::Unfit("Firebase finds the message wrong"),
        (403, Some("SENDER_ID_MISMATCH")) => {
            Outcome::Refused("The device is registered with another project of Firebase.")
        }
        (401 | 403 | 404, _) => Outcome::failed(NOT_KNOWN),
        (429, _) => {
            let retry_after = Some(retry_after.unwrap_or(TOO_MANY_PAUSE));
            Outcome::Failed { why: "Firebase has too many requests", retry_after }
        }
        (500..=599, _) => Outcome::Failed { why: "Firebase fails", retry_after },
        _ => Outcome::failed("Firebase answers with an odd status"),
    }
}

/// The data of a message. None if what the pusher asks to have in each is too large.
fn data(shown: &Notification, default_payload: Map<String, Value>) -> Option<BTreeMap<String, String>> {
    let as_text = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    // Firebase refuses these keys.
    let is_reserved = |key: &str| {
        matches!(key, "from" | "message_type") || key.starts_with("google") || key.starts_with("gcm")
    };
    let own: BTreeMap<_, _> = default_payload
        .into_iter()
        .filter(|(key, _)| !is_reserved(key))
        .map(|(key, value)| (key, as_text(value)))
        .collect();
    let mut kept: Vec<String> = own.keys().cloned().collect();
    kept.extend(KEPT.map(str::to_owned));
    let mut data = own;
    data.extend(shown.texts().into_iter().filter_map(|(key, text)| Some((key.to_owned(), text.clone()?))));
    for (key, value) in shown.content.iter().flatten() {
        if let Value::String(text) = value {
            data.insert(format!("content_{key}"), text::shorten(text, VALUE_BYTES_MAX));
        }
    }
    let prio = if shown.is_low() { "normal" } else { "high" };
    data.insert("prio".to_owned(), prio.to_owned());
    let counts = [("unread", shown.counts.unread), ("missed_calls", shown.counts.missed_calls)];
    data.extend(counts.into_iter().filter_map(|(key, count)| Some((key.to_owned(), count?.to_string()))));
    fit(&mut data, &kept).then_some(data)
}

/// Makes data small enough: as many values stay as there is room for, those that people read and the short ones first, and one that does not fit is shortened. False
/// where those that are `kept` alone are too large.
fn fit(data: &mut BTreeMap<String, String>, kept: &[String]) -> bool {
    /// Less of a value than this says nothing to anybody.
    const LEAST_BYTES: usize = 32;
    let (mut chosen, mut others) = (BTreeMap::new(), Vec::new());
    for (key, value) in std::mem::take(data) {
        if kept.contains(&key) {
            chosen.insert(key, value);
        } else {
            others.push((key, value));
        }
    }
    let of_kept = chosen.iter().map(|(key, value)| key.len() + value.len()).sum();
    let Some(mut room) = DATA_BYTES_MAX.checked_sub(of_kept) else { return false };
    // The fields of the content come last, but for those that people read.
    let is_last =
        |key: &str| key.starts_with("content_") && !matches!(key, "content_body" | "content_msgtype");
    others.sort_by_key(|(key, value)| (is_last(key), key.len() + value.len()));
    for (key, value) in others {
        let Some(left) = room.checked_sub(key.len()) else { continue };
        let short = match value.len() <= left {
            true => value,
            false if left >= LEAST_BYTES => text::shorten(&value, left),
            false => continue,
        };
        room = left - short.len();
        chosen.insert(key, short);
    }
    *data = chosen;
    true
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    fn means(status: u16, body: &Value) -> Outcome {
        let status = StatusCode::from_u16(status).unwrap();
        outcome(&Answer { status, retry_after: None, body: body.to_string().into() })
    }

    fn refusal(status: u16, message: &str, code: &str) -> Outcome {
        let kind = "type.googleapis.com/google.firebase.fcm.v1.FcmError";
        let body = json!({ "error": { "code": status, "message": message, "status": "X",
            "details": [{ "@type": "type.googleapis.com/google.rpc.Help" }, { "@type": kind, "errorCode": code }] } });
        means(status, &body)
    }

    #[test]
    fn only_a_device_that_google_says_is_gone_is() {
        assert_eq!(refusal(404, "Requested entity was not found.", "UNREGISTERED"), Outcome::Gone);
        let message = "The registration token is not a valid FCM registration token";
        assert_eq!(refusal(400, message, "INVALID_ARGUMENT"), Outcome::Gone);
        assert!(matches!(refusal(400, "Message too big", "INVALID_ARGUMENT"), Outcome::Unfit(_)));
        assert!(matches!(refusal(403, "x", "SENDER_ID_MISMATCH"), Outcome::Refused(_)));
        for status in [401, 403, 404, 429, 500, 503, 302] {
            let outcome = means(status, &json!({ "error": { "status": "NOT_FOUND" } }));
            assert!(matches!(outcome, Outcome::Failed { .. }), "{status}: {outcome:?}");
        }
        assert!(matches!(means(404, &json!("no object")), Outcome::Failed { .. }));
        assert_eq!(means(200, &json!({})), Outcome::Delivered);
    }

    #[test]
    fn data_fit_and_keep_what_names_something() {
        let content = json!({ "body": "b".repeat(60_000), "msgtype": "m.text", "url": "u".repeat(2000), "n": 5,
            "a": "x".repeat(1000), "c": "x".repeat(1000), "d": "x".repeat(1000), "e": "x".repeat(1000) });
        let shown = Notification {
            event_id: Some("$".repeat(255)),
            room_id: Some("!r".to_owned()),
            content: content.as_object().cloned(),
            ..Notification::default()
        };
        let own = json!({ "cs": "secret", "n": 1, "from": "x", "google.x": "x", "gcm": "x" })
            .as_object()
            .unwrap()
            .clone();
        let made = data(&shown, own).unwrap();
        let size: usize = made.iter().map(|(key, value)| key.len() + value.len()).sum();
        assert!(size <= DATA_BYTES_MAX);
        assert_eq!((made["event_id"].len(), made["cs"].as_str(), made["n"].as_str()), (255, "secret", "1"));
        assert_eq!((made["content_msgtype"].as_str(), made["prio"].as_str()), ("m.text", "high"));
        assert!(made["content_body"].ends_with('…'));
        for absent in ["from", "google.x", "gcm", "content_n", "unread"] {
            assert!(!made.contains_key(absent), "{absent}");
        }
        let large = json!({ "x": "x".repeat(4000) }).as_object().unwrap().clone();
        assert!(data(&shown, large).is_none());
    }
}
