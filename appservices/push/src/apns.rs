//! The push notification service of Apple, over HTTP/2 with a token that the gateway signs
//! ([APNs](https://developer.apple.com/documentation/usernotifications/sending-notification-requests-to-apns)).
//!
//! Where the homeserver sends ids alone, the message is what the pusher asks to have in each, and the ids. Otherwise the alert names a text of
//! the app (`loc-key`) and what stands in it, by the names that apps of Matrix know.

use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    gateway::{BadApp, Shared},
    keys::{self, Es256},
    message::{Job, Message},
    notification::{Device, Notification},
    outbound::{Answer, Endpoint},
    outcome::Outcome,
    remembered::mark,
    settings::{App, Payload, PushType, TokenEncoding},
    text,
};

/// Apple's address for apps of its store.
const URL: &str = "https://api.push.apple.com";
/// Apple's address for apps that are being developed.
const SANDBOX_URL: &str = "https://api.sandbox.push.apple.com";
/// A message has at most this many bytes.
const PAYLOAD_BYTES_MAX: usize = 4096;
/// A device token has so many bytes; Apple says that its length may change.
const TOKEN_BYTES: std::ops::RangeInclusive<usize> = 8..=100;
/// A signed token is used for this long: Apple refuses those that are older than an hour.
const USED_MS: u64 = 40 * 60_000;
/// Apple takes no new token within this time after the last.
const RENEWED_AFTER_MS: u64 = 20 * 60_000;
/// An argument of an alert has at most this many bytes, and less where the message would not fit.
const ARGUMENT_BYTES: [usize; 4] = [1024, 512, 256, 64];

/// An app that Apple reaches.
pub(crate) struct ApnsApp {
    number: usize,
    payload: Payload,
    ttl_s: u32,
    endpoint: Endpoint,
    key: Es256,
    key_id: String,
    team_id: String,
    topic: HeaderValue,
    push_type: PushType,
    token_encoding: TokenEncoding,
    /// The signed token, and when it was signed.
    signed: Mutex<Option<(u64, HeaderValue)>>,
}

impl ApnsApp {
    /// Reads the key of the app. Errors: [`BadApp`].
    pub(crate) fn open(number: usize, app: &App) -> Result<Self, BadApp> {
        let key = Es256::load(&app.key_file)?;
        let url = match (app.url.is_empty(), app.sandbox) {
            (false, _) => &app.url,
            (true, false) => URL,
            (true, true) => SANDBOX_URL,
        };
        Ok(Self {
            number,
            payload: app.payload,
            ttl_s: app.ttl_s,
            endpoint: Endpoint::parse(url).map_err(BadApp::Url)?,
            key,
            key_id: app.key_id.clone(),
            team_id: app.team_id.clone(),
            topic: HeaderValue::from_str(&app.topic).map_err(|_| BadApp::Topic)?,
            push_type: app.push_type,
            token_encoding: app.token_encoding,
            signed: Mutex::new(None),
        })
    }

    /// Finds the way to a device. Errors: what becomes of the device without one.
    pub(crate) fn read(&self, notification: &Notification, device: &Device) -> Result<Job, Outcome> {
        if device.wants("events_only") && notification.event_id.is_none() {
            return Err(Outcome::Skipped);
        }
        let token = self.token(&device.pushkey).map_err(Outcome::Refused)?;
        let path = format!("/3/device/{token}");
        let endpoint = self.endpoint.below(&path).map_err(Outcome::Refused)?;
        device.require_default_payload().map_err(Outcome::Refused)?;
        let receiver = mark(&[b"apns", device.app_id.as_bytes(), device.pushkey.as_bytes()]);
        Ok(Job { endpoint, subscriber: None, receiver })
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
        let payload = self.payload(&shown, device, default_payload)?;
        let is_background = self.push_type == PushType::Background;
        let now_s = shared.ports.clock.now_ms() / 1000;
        let mut headers = HeaderMap::new();
        headers.insert("apns-topic", self.topic.clone());
        let push_type = if is_background { "background" } else { "alert" };
        headers.insert("apns-push-type", HeaderValue::from_static(push_type));
        // Apple refuses the higher priority for what runs in the background.
        let priority = if is_background || notification.is_low() { "5" } else { "10" };
        headers.insert("apns-priority", HeaderValue::from_static(priority));
        let expires_s = if self.ttl_s == 0 { 0 } else { now_s.saturating_add(self.ttl_s.into()) };
        headers.insert("apns-expiration", HeaderValue::from(expires_s));
        headers.insert("apns-id", uuid(shared));
        if let Some(room_id) = notification.room_id.as_deref().filter(|_| device.wants("only_last_per_room"))
        {
            let id = hex(&shared.topic(&job.receiver, room_id));
            headers.extend(
                HeaderValue::from_str(&id)
                    .ok()
                    .map(|it| (http::HeaderName::from_static("apns-collapse-id"), it)),
            );
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(Message { headers, body: payload.into() })
    }

    /// The device token in hexadecimal digits. Errors: a sentence that says what was expected.
    fn token(&self, pushkey: &str) -> Result<String, &'static str> {
        let (bytes, expected) = match self.token_encoding {
            TokenEncoding::Base64 => {
                (keys::decode_any(pushkey), "`pushkey` must be the device token of the app in base64.")
            }
            TokenEncoding::Hex => {
                (from_hex(pushkey), "`pushkey` must be the device token of the app in hexadecimal digits.")
            }
        };
        let bytes = bytes.filter(|it| TOKEN_BYTES.contains(&it.len())).ok_or(expected)?;
        Ok(hex(&bytes))
    }

    /// The body of the message. Errors: nothing is to be shown, or it does not fit.
    fn payload(
        &self,
        shown: &Notification,
        device: &Device,
        default_payload: Map<String, Value>,
    ) -> Result<Vec<u8>, Outcome> {
        for argument_bytes in ARGUMENT_BYTES {
            let mut payload = if shown.event_id.is_some() && shown.event_type.is_none() {
                ids(shown, default_payload.clone())
            } else {
                // A notification of counts alone shows nothing but a number.
                let begin = if shown.event_type.is_some() { default_payload.clone() } else { Map::new() };
                alert(shown, device, begin, argument_bytes).ok_or(Outcome::Skipped)?
            };
            if self.push_type == PushType::Background {
                with_aps(&mut payload, |aps| drop(aps.insert("content-available".to_owned(), 1.into())));
            }
            let bytes =
                serde_json::to_vec(&payload).map_err(|_| Outcome::Unfit("the message cannot be written"))?;
            if bytes.len() <= PAYLOAD_BYTES_MAX {
                return Ok(bytes);
            }
        }
        Err(Outcome::Unfit("`data.default_payload` is larger than Apple takes"))
    }

    /// The `Authorization` header: a token that was signed less than 40 minutes ago.
    pub(crate) fn authorization(&self, now_ms: u64) -> Option<HeaderValue> {
        let mut signed = self.signed.lock();
        if let Some((at_ms, value)) = &*signed
            && (*at_ms..at_ms.saturating_add(USED_MS)).contains(&now_ms)
        {
            return Some(value.clone());
        }
        let claims = json!({ "iss": self.team_id, "iat": now_ms / 1000 });
        let token = self.key.sign(Some(&self.key_id), &claims)?;
        let mut value = HeaderValue::from_str(&format!("bearer {token}")).ok()?;
        value.set_sensitive(true);
        *signed = Some((now_ms, value.clone()));
        Some(value)
    }

    /// Forgets the token because Apple says that it is too old, unless Apple would take no new one yet.
    fn forget(&self, now_ms: u64) {
        let mut signed = self.signed.lock();
        if matches!(&*signed, Some((at_ms, _)) if now_ms.saturating_sub(*at_ms) >= RENEWED_AFTER_MS) {
            *signed = None;
        }
    }

    /// The meaning of an answer.
    pub(crate) fn judge(&self, shared: &Shared, answer: &Answer) -> Outcome {
        let (outcome, reason) = outcome(answer);
        if reason == Some("ExpiredProviderToken") {
            self.forget(shared.ports.clock.now_ms());
        }
        let status = answer.status.as_u16();
        if let Outcome::Failed { why: NOT_KNOWN, .. } = outcome {
            shared.warn(self.number, || {
                tracing::warn!(status, reason, "Apple does not accept the settings of an app")
            });
        }
        tracing::debug!(status, reason, "an answer of Apple");
        outcome
    }
}

/// Apple refuses everything of the app, so that its settings are wrong.
const NOT_KNOWN: &str = "Apple does not accept the key, the topic or the environment of the app";

/// The reasons that Apple documents, so that nothing else of its answers is ever logged.
const REASONS: [&str; 32] = [
    "BadCollapseId",
    "BadDeviceToken",
    "BadExpirationDate",
    "BadMessageId",
    "BadPriority",
    "BadTopic",
    "DeviceTokenNotForTopic",
    "DuplicateHeaders",
    "IdleTimeout",
    "InvalidPushType",
    "MissingDeviceToken",
    "MissingTopic",
    "PayloadEmpty",
    "TopicDisallowed",
    "BadCertificate",
    "BadCertificateEnvironment",
    "ExpiredProviderToken",
    "Forbidden",
    "InvalidProviderToken",
    "MissingProviderToken",
    "UnrelatedKeyIdInToken",
    "BadEnvironmentKeyIdInToken",
    "BadPath",
    "MethodNotAllowed",
    "ExpiredToken",
    "Unregistered",
    "PayloadTooLarge",
    "TooManyProviderTokenUpdates",
    "TooManyRequests",
    "InternalServerError",
    "ServiceUnavailable",
    "Shutdown",
];

#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    reason: String,
}

/// The meaning of an answer
/// (<https://developer.apple.com/documentation/usernotifications/handling-notification-responses-from-apns>), and its reason.
fn outcome(answer: &Answer) -> (Outcome, Option<&'static str>) {
    let status = answer.status.as_u16();
    if status == 200 {
        return (Outcome::Delivered, None);
    }
    let Refusal { reason } = serde_json::from_slice(&answer.body).unwrap_or_default();
    let reason = REASONS.into_iter().find(|it| *it == reason);
    let retry_after = answer.retry_after;
    let outcome = match (status, reason) {
        (400, Some("BadDeviceToken")) | (410, _) => Outcome::Gone,
        // The topic may be wrong here, and that says nothing of the device.
        (400, Some("DeviceTokenNotForTopic")) => {
            Outcome::Refused("The device token is not of the app of this `app_id`.")
        }
        (413, _) | (400, Some("PayloadTooLarge" | "PayloadEmpty" | "BadCollapseId")) => {
            Outcome::Unfit("Apple finds the message wrong")
        }
        (429, _) => Outcome::Failed { why: "Apple has too many requests", retry_after },
        (500..=599, _) => Outcome::Failed { why: "Apple fails", retry_after },
        (403, Some("ExpiredProviderToken")) => Outcome::failed("Apple finds the token of the app too old"),
        (400 | 403 | 404 | 405, _) => Outcome::failed(NOT_KNOWN),
        _ => Outcome::failed("Apple answers with an odd status"),
    };
    (outcome, reason)
}

/// The message of a notification of ids alone.
fn ids(shown: &Notification, default_payload: Map<String, Value>) -> Map<String, Value> {
    let mut payload = default_payload;
    let texts = [("room_id", &shown.room_id), ("event_id", &shown.event_id)];
    payload.extend(texts.into_iter().filter_map(|(key, text)| Some((key.to_owned(), text.clone()?.into()))));
    let counts = [("unread_count", shown.counts.unread), ("missed_calls", shown.counts.missed_calls)];
    payload.extend(counts.into_iter().filter_map(|(key, count)| Some((key.to_owned(), count?.into()))));
    payload
}

/// The message of a notification that says more, or of counts alone. None if there is nothing to show.
fn alert(
    shown: &Notification,
    device: &Device,
    default_payload: Map<String, Value>,
    argument_bytes: usize,
) -> Option<Map<String, Value>> {
    let badge = match (shown.counts.unread, shown.counts.missed_calls) {
        (None, None) => None,
        (unread, missed) => Some(unread.unwrap_or(0).saturating_add(missed.unwrap_or(0))),
    };
    let said = said(shown);
    if said.is_none() && badge.is_none() {
        return None;
    }
    let mut payload = default_payload;
    if let Some(badge) = badge {
        with_aps(&mut payload, |aps| drop(aps.insert("badge".to_owned(), badge.into())));
    }
    let Some((key, arguments)) = said else { return Some(payload) };
    let sound = device.tweaks.as_ref().and_then(|it| it.get("sound")?.as_str());
    let arguments: Vec<_> = arguments.into_iter().map(|it| text::shorten(it, argument_bytes)).collect();
    with_aps(&mut payload, |aps| {
        if let Some(sound) = sound {
            aps.entry("sound").or_insert_with(|| text::shorten(sound, 128).into());
        }
        let mut alert = match aps.remove("alert") {
            Some(Value::Object(alert)) => alert,
            _ => Map::new(),
        };
        alert.insert("loc-key".to_owned(), key.into());
        alert.insert("loc-args".to_owned(), arguments.into());
        aps.insert("alert".to_owned(), Value::Object(alert));
    });
    let texts = [("room_id", &shown.room_id), ("event_id", &shown.event_id)];
    payload.extend(texts.into_iter().filter_map(|(key, text)| Some((key.to_owned(), text.clone()?.into()))));
    Some(payload)
}

/// Changes the object that Apple reads, which is made where it is not there.
fn with_aps(payload: &mut Map<String, Value>, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut aps = match payload.remove("aps") {
        Some(Value::Object(aps)) => aps,
        _ => Map::new(),
    };
    change(&mut aps);
    payload.insert("aps".to_owned(), Value::Object(aps));
}

/// The name of the app's text for an event, and what stands in it.
fn said(shown: &Notification) -> Option<(&'static str, Vec<&str>)> {
    let event_type = shown.event_type.as_deref()?;
    let from = shown.sender_display_name.as_deref().or(shown.sender.as_deref()).unwrap_or(" ");
    let room = shown.room_name.as_deref().or(shown.room_alias.as_deref());
    let content = |field: &str| shown.content.as_ref()?.get(field)?.as_str();
    Some(match event_type {
        "m.room.message" | "m.room.encrypted" => match (content("msgtype"), content("body"), room) {
            (Some("m.image"), Some(body), Some(room)) => ("IMAGE_FROM_USER_IN_ROOM", vec![from, body, room]),
            (Some("m.image"), Some(body), None) => ("IMAGE_FROM_USER", vec![from, body]),
            (Some("m.emote"), Some(body), Some(room)) => ("ACTION_FROM_USER_IN_ROOM", vec![room, from, body]),
            (Some("m.emote"), Some(body), None) => ("ACTION_FROM_USER", vec![from, body]),
            (Some(_), Some(body), Some(room)) => {
                ("MSG_FROM_USER_IN_ROOM_WITH_CONTENT", vec![from, room, body])
            }
            (Some(_), Some(body), None) => ("MSG_FROM_USER_WITH_CONTENT", vec![from, body]),
            (_, _, Some(room)) => ("MSG_FROM_USER_IN_ROOM", vec![from, room]),
            (_, _, None) => ("MSG_FROM_USER", vec![from]),
        },
        "m.call.invite" => {
            let offer = shown.content.as_ref().and_then(|it| it.get("offer")?.get("sdp")?.as_str());
            let has_video = offer.is_some_and(|sdp| sdp.contains("m=video"));
            (if has_video { "VIDEO_CALL_FROM_USER" } else { "VOICE_CALL_FROM_USER" }, vec![from])
        }
        "m.room.member" => {
            let membership = shown.membership.as_deref().or_else(|| content("membership"));
            if membership != Some("invite") || shown.user_is_target != Some(true) {
                return None;
            }
            match room {
                Some(room) => ("USER_INVITE_TO_NAMED_ROOM", vec![from, room]),
                None => ("USER_INVITE_TO_CHAT", vec![from]),
            }
        }
        _ => ("MSG_FROM_USER", vec![from]),
    })
}

/// A new id of a message, in the form of RFC 9562, version 4.
fn uuid(shared: &Shared) -> HeaderValue {
    let mut bytes = [0; 16];
    shared.ports.secrets.fill(&mut bytes);
    let number = u128::from_be_bytes(bytes);
    let with_version = (number & !(0xf << 76)) | (4 << 76);
    let number = (with_version & !(0b11 << 62)) | (0b10 << 62);
    let digits = format!("{number:032x}");
    let mut text = String::with_capacity(36);
    for (at, digit) in digits.chars().enumerate() {
        if matches!(at, 8 | 12 | 16 | 20) {
            text.push('-');
        }
        text.push(digit);
    }
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("00000000-0000-4000-8000-000000000000"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|it| format!("{it:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text.chars().map(|it| it.to_digit(16)).collect();
    let digits = digits.filter(|it| it.len() % 2 == 0)?;
    digits.chunks(2).map(|pair| u8::try_from(pair.iter().fold(0, |sum, it| sum * 16 + it)).ok()).collect()
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    fn means(status: u16, reason: &str) -> Outcome {
        let status = StatusCode::from_u16(status).unwrap();
        let body = json!({ "reason": reason }).to_string().into();
        outcome(&Answer { status, retry_after: None, body }).0
    }

    #[test]
    fn only_a_token_that_apple_says_is_gone_is() {
        assert_eq!(means(200, ""), Outcome::Delivered);
        for (status, reason) in [(400, "BadDeviceToken"), (410, "Unregistered"), (410, "ExpiredToken")] {
            assert_eq!(means(status, reason), Outcome::Gone, "{reason}");
        }
        assert!(matches!(means(400, "DeviceTokenNotForTopic"), Outcome::Refused(_)));
        assert!(matches!(means(413, "PayloadTooLarge"), Outcome::Unfit(_)));
        for (status, reason) in [
            (400, "BadTopic"),
            (400, "TopicDisallowed"),
            (403, "InvalidProviderToken"),
            (403, "ExpiredProviderToken"),
            (429, "TooManyRequests"),
            (429, "TooManyProviderTokenUpdates"),
            (500, "InternalServerError"),
            (503, "Shutdown"),
            (301, ""),
        ] {
            assert!(matches!(means(status, reason), Outcome::Failed { .. }), "{status} {reason}");
        }
    }

    #[test]
    fn alerts_name_the_texts_of_apps() {
        let shown = |event_type: &str, content: Value, room: Option<&str>| Notification {
            event_type: Some(event_type.to_owned()),
            sender: Some("@a:b".to_owned()),
            sender_display_name: Some("Ann".to_owned()),
            room_name: room.map(str::to_owned),
            user_is_target: Some(true),
            content: content.as_object().cloned(),
            ..Notification::default()
        };
        let text = |msgtype: &str| json!({ "msgtype": msgtype, "body": "hi" });
        for (event_type, content, room, key, arguments) in [
            (
                "m.room.message",
                text("m.text"),
                Some("R"),
                "MSG_FROM_USER_IN_ROOM_WITH_CONTENT",
                vec!["Ann", "R", "hi"],
            ),
            ("m.room.message", text("m.notice"), None, "MSG_FROM_USER_WITH_CONTENT", vec!["Ann", "hi"]),
            (
                "m.room.message",
                text("m.emote"),
                Some("R"),
                "ACTION_FROM_USER_IN_ROOM",
                vec!["R", "Ann", "hi"],
            ),
            ("m.room.message", text("m.image"), Some("R"), "IMAGE_FROM_USER_IN_ROOM", vec!["Ann", "hi", "R"]),
            ("m.room.encrypted", json!({}), Some("R"), "MSG_FROM_USER_IN_ROOM", vec!["Ann", "R"]),
            ("m.room.message", json!({ "body": 5 }), None, "MSG_FROM_USER", vec!["Ann"]),
            (
                "m.room.member",
                json!({ "membership": "invite" }),
                Some("R"),
                "USER_INVITE_TO_NAMED_ROOM",
                vec!["Ann", "R"],
            ),
            (
                "m.call.invite",
                json!({ "offer": { "sdp": "m=video 9" } }),
                None,
                "VIDEO_CALL_FROM_USER",
                vec!["Ann"],
            ),
            ("org.example.odd", json!({}), None, "MSG_FROM_USER", vec!["Ann"]),
        ] {
            assert_eq!(said(&shown(event_type, content, room)), Some((key, arguments)));
        }
        assert_eq!(said(&shown("m.room.member", json!({ "membership": "join" }), None)), None);
        assert_eq!(said(&Notification::default()), None);
    }

    #[test]
    fn device_tokens_become_digits_and_never_another_path() {
        assert_eq!(from_hex("00fFa1"), Some(vec![0, 0xff, 0xa1]));
        for wrong in ["0", "0x", "é1", "../", "00 1"] {
            assert_eq!(from_hex(wrong), None, "{wrong}");
        }
        assert_eq!(hex(&[0, 0xff]), "00ff");
    }
}
