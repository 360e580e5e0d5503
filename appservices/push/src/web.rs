//! Web Push and UnifiedPush: the endpoint is a URL that a user chose, and the message is encrypted for the device
//! ([RFC 8030](https://www.rfc-editor.org/rfc/rfc8030.html); [UnifiedPush](https://unifiedpush.org/)).
//!
//! A pusher of Web Push has the public key of the subscription as `pushkey`, and `endpoint` and `auth` in its `data`. A pusher of
//! UnifiedPush has the endpoint as `pushkey`; where its `data` have `p256dh` and `auth`, the message is encrypted, too.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderValue, header};
use serde_json::{Map, Value};

use crate::{
    encryption::{PLAIN_BYTES_MAX, Subscriber},
    gateway::{BadApp, Shared},
    message::{Job, Message},
    notification::{Device, Notification},
    outbound::{Answer, Endpoint},
    outcome::Outcome,
    remembered::mark,
    settings::{App, HostPattern, Kind, Payload},
    text,
    vapid::Vapid,
};

/// Push services take at most this many bytes (RFC 8030, section 7.2).
const BODY_BYTES_MAX: usize = 4096;
/// The bytes of the object around a notification of UnifiedPush.
const WRAPPED_BYTES: usize = r#"{"notification":}"#.len();
/// These fields are never shortened, because they name something.
const KEPT: [&str; 7] = ["event_id", "room_id", "type", "sender", "room_alias", "membership", "prio"];
/// A topic of Web Push has at most 32 characters (RFC 8030, section 5.4): these are the bytes behind them.
const TOPIC_BYTES: usize = 24;

/// An app whose endpoints users choose.
pub(crate) struct WebApp {
    is_unified: bool,
    payload: Payload,
    ttl_s: u32,
    vapid: Option<Vapid>,
    hosts_allowed: Vec<HostPattern>,
}

impl WebApp {
    /// Reads the key of the app, if it has one. Errors: [`BadApp`].
    pub(crate) fn open(app: &App) -> Result<Self, BadApp> {
        let vapid = (!app.vapid_key_file.as_os_str().is_empty())
            .then(|| Vapid::load(&app.vapid_key_file, &app.vapid_contact))
            .transpose()?;
        let hosts_allowed = app.hosts_allowed.iter().map(|it| HostPattern::parse(it));
        Ok(Self {
            is_unified: app.kind == Kind::UnifiedPush,
            payload: app.payload,
            ttl_s: app.ttl_s,
            vapid,
            hosts_allowed: hosts_allowed.collect::<Result<_, _>>().map_err(BadApp::Host)?,
        })
    }

    /// The public key that clients subscribe with.
    pub(crate) fn public_key(&self) -> Option<&str> {
        self.vapid.as_ref().map(Vapid::public_text)
    }

    /// Finds the way to a device. Errors: what becomes of the device without one.
    pub(crate) fn read(&self, notification: &Notification, device: &Device) -> Result<Job, Outcome> {
        // Browsers show something for each message, so that clients ask for those alone that are about an event.
        if device.wants("events_only") && notification.event_id.is_none() {
            return Err(Outcome::Skipped);
        }
        let (endpoint, subscriber) = self.keys(device).map_err(Outcome::Refused)?;
        let is_allowed = |it: &HostPattern| it.allows(endpoint.host(), endpoint.port());
        if !self.hosts_allowed.is_empty() && !self.hosts_allowed.iter().any(is_allowed) {
            return Err(Outcome::Refused(
                "The gateway does not deliver to the host and port of this endpoint.",
            ));
        }
        device.require_default_payload().map_err(Outcome::Refused)?;
        // A push key is a public key here, and whoever knows it may name it with an endpoint of their own.
        let (origin, path) = (endpoint.origin().as_bytes(), endpoint.path().as_bytes());
        let parts = [device.app_id.as_bytes(), device.pushkey.as_bytes(), origin, path];
        let receiver = mark(&[&[b"subscription".as_slice()], parts.as_slice()].concat());
        Ok(Job { endpoint, subscriber, receiver })
    }

    /// Makes the message, which takes a while. Errors: what becomes of the device without one.
    pub(crate) fn make(
        &self,
        shared: &Shared,
        notification: &Notification,
        device: &Device,
        job: &Job,
    ) -> Result<Message, Outcome> {
        let shown = notification.shown(self.payload);
        let plain_max = if job.subscriber.is_some() { PLAIN_BYTES_MAX } else { BODY_BYTES_MAX };
        let plain = if self.is_unified {
            unified(&shown, plain_max)
        } else {
            web(&shown, device.default_payload().map_err(Outcome::Refused)?, plain_max)
        };
        let plain = plain.ok_or(Outcome::Unfit("the message is larger than a push service takes"))?;
        let mut headers = HeaderMap::new();
        let body = match &job.subscriber {
            Some(subscriber) => {
                headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("aes128gcm"));
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
                let sealed = subscriber.encrypt(&plain, &*shared.ports.secrets);
                sealed.ok_or(Outcome::Unfit("the message cannot be encrypted"))?
            }
            None => {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                plain
            }
        };
        headers.insert("ttl", HeaderValue::from(self.ttl_s));
        let urgency = if notification.is_low() { "low" } else { "high" };
        headers.insert("urgency", HeaderValue::from_static(urgency));
        if let Some(room_id) = notification.room_id.as_deref().filter(|_| device.wants("only_last_per_room"))
        {
            let topic = shared.topic(&job.receiver, room_id);
            let topic = URL_SAFE_NO_PAD.encode(topic.get(..TOPIC_BYTES).unwrap_or_default());
            headers.extend(
                HeaderValue::from_str(&topic).ok().map(|it| (http::HeaderName::from_static("topic"), it)),
            );
        }
        if let Some(vapid) = &self.vapid {
            let value = vapid.authorization(job.endpoint.origin(), shared.ports.clock.now_ms());
            let value = value.ok_or(Outcome::failed("the key of the app does not sign"))?;
            headers.insert(header::AUTHORIZATION, value);
        }
        Ok(Message { headers, body: body.into() })
    }

    /// The endpoint of a device, and its keys. Errors: a sentence that names the field.
    fn keys(&self, device: &Device) -> Result<(Endpoint, Option<Subscriber>), &'static str> {
        if !self.is_unified {
            let endpoint = device.data_text("endpoint").ok_or("`data.endpoint` is missing.")?;
            let auth = device.data_text("auth").ok_or("`data.auth` is missing.")?;
            let subscriber = Subscriber::read(&device.pushkey, auth)?;
            return Ok((Endpoint::parse(endpoint)?, Some(subscriber)));
        }
        let subscriber = match (device.data_text("p256dh"), device.data_text("auth")) {
            (Some(p256dh), Some(auth)) => Some(Subscriber::read(p256dh, auth)?),
            (None, None) => None,
            (Some(_), None) => return Err("`data.auth` is missing beside `data.p256dh`."),
            (None, Some(_)) => return Err("`data.p256dh` is missing beside `data.auth`."),
        };
        Ok((Endpoint::parse(&device.pushkey)?, subscriber))
    }
}

/// The meaning of a status (RFC 8030, sections 5 and 7).
pub(crate) fn outcome(answer: &Answer) -> Outcome {
    let retry_after = answer.retry_after;
    match answer.status.as_u16() {
        200..=299 => Outcome::Delivered,
        404 | 410 => Outcome::Gone,
        413 => Outcome::Unfit("the push service finds the message too large"),
        408 => Outcome::Failed { why: "the push service timed out", retry_after },
        429 => Outcome::Failed { why: "the push service has too many requests", retry_after },
        500..=599 => Outcome::Failed { why: "the push service fails", retry_after },
        300..=399 => Outcome::Refused("The endpoint redirects, which is not followed."),
        401 | 403 => {
            Outcome::Refused("The push service does not accept the key of this gateway for the subscription.")
        }
        _ => Outcome::Refused("The push service refuses the message."),
    }
}

/// The message as web clients read it: one flat object over what the pusher asks to have in each.
fn web(shown: &Notification, default_payload: Map<String, Value>, bytes_max: usize) -> Option<Vec<u8>> {
    let mut object = default_payload;
    let kept: Vec<String> = object.keys().cloned().chain(KEPT.map(str::to_owned)).collect();
    object.extend(fields(shown));
    // Nobody shows HTML in a notification.
    let content = shown.content.clone().map(|mut content| {
        content.remove("formatted_body");
        content
    });
    object.extend(content.map(|content| ("content".to_owned(), Value::Object(content))));
    let counts = [("unread", shown.counts.unread), ("missed_calls", shown.counts.missed_calls)];
    object.extend(counts.into_iter().filter_map(|(key, count)| Some((key.to_owned(), count?.into()))));
    let kept: Vec<&str> = kept.iter().map(String::as_str).collect();
    text::fit(&mut object, bytes_max, &kept).then(|| serde_json::to_vec(&object).ok())?
}

/// The message as clients of UnifiedPush read it: the notification of the homeserver without its devices.
fn unified(shown: &Notification, bytes_max: usize) -> Option<Vec<u8>> {
    let mut object: Map<_, _> = fields(shown).collect();
    object.extend(shown.prio.clone().map(|prio| ("prio".to_owned(), Value::from(prio))));
    object.extend(shown.content.clone().map(|content| ("content".to_owned(), Value::Object(content))));
    let counts = [("unread", shown.counts.unread), ("missed_calls", shown.counts.missed_calls)];
    let counts: Map<_, _> =
        counts.into_iter().filter_map(|(key, count)| Some((key.to_owned(), Value::from(count?)))).collect();
    object.insert("counts".to_owned(), Value::Object(counts));
    if !text::fit(&mut object, bytes_max.checked_sub(WRAPPED_BYTES)?, &KEPT) {
        return None;
    }
    serde_json::to_vec(&serde_json::json!({ "notification": object })).ok()
}

/// The fields that are texts or flags, where they are there.
fn fields(shown: &Notification) -> impl Iterator<Item = (String, Value)> {
    let texts = shown.texts().map(|(key, text)| (key, text.clone().map(Value::from)));
    let flag = ("user_is_target", shown.user_is_target.map(Value::from));
    texts.into_iter().chain([flag]).filter_map(|(key, value)| Some((key.to_owned(), value?)))
}
