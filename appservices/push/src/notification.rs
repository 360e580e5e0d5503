//! The request of a homeserver, read within bounds
//! ([`POST /_matrix/push/v1/notify`](https://spec.matrix.org/v1.19/push-gateway-api/#post_matrixpushv1notify)).

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::settings::Payload;

/// A notification is for at most this many devices; homeservers send one or a few.
pub(crate) const DEVICES_MAX: usize = 32;
/// Ids of the specification have at most this many bytes, and so has the type of an event.
const ID_BYTES_MAX: usize = 255;
/// A push key has at most this many bytes (client-server API, `POST /pushers/set`).
const PUSHKEY_BYTES_MAX: usize = 512;
/// The `data` of a device have at most this many bytes of JSON.
const DATA_BYTES_MAX: usize = 16 << 10;
/// Names for people are cut to this many bytes; providers take 4 KiB in all.
const NAME_BYTES_MAX: usize = 1024;
/// No count is larger than JSON has whole numbers.
const COUNT_MAX: u64 = (1 << 53) - 1;

/// The body of the request.
#[derive(Deserialize)]
struct Body {
    notification: Notification,
}

/// The news that some devices are to be told.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Notification {
    pub(crate) event_id: Option<String>,
    pub(crate) room_id: Option<String>,
    #[serde(rename = "type")]
    pub(crate) event_type: Option<String>,
    pub(crate) sender: Option<String>,
    pub(crate) sender_display_name: Option<String>,
    pub(crate) room_name: Option<String>,
    pub(crate) room_alias: Option<String>,
    pub(crate) membership: Option<String>,
    pub(crate) user_is_target: Option<bool>,
    pub(crate) prio: Option<String>,
    pub(crate) content: Option<Map<String, Value>>,
    pub(crate) counts: Counts,
    pub(crate) devices: Option<Vec<Device>>,
}

/// How much the user has not read.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Counts {
    pub(crate) unread: Option<u64>,
    pub(crate) missed_calls: Option<u64>,
}

/// One device of a notification. Its push key and data let anybody send to it, so that neither is ever logged.
#[derive(Clone, Deserialize)]
pub(crate) struct Device {
    pub(crate) app_id: String,
    pub(crate) pushkey: String,
    #[serde(default)]
    pub(crate) data: Option<Map<String, Value>>,
    #[serde(default)]
    pub(crate) tweaks: Option<Map<String, Value>>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("app_id", &self.app_id).finish_non_exhaustive()
    }
}

/// The reason why a request is refused: Matrix's code, and a sentence that names the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Misfit {
    pub(crate) errcode: &'static str,
    pub(crate) why: &'static str,
}

const fn invalid(why: &'static str) -> Misfit {
    Misfit { errcode: "M_INVALID_PARAM", why }
}

/// Reads the body of the request: the notification, and its devices. Errors: [`Misfit`].
pub(crate) fn read(body: &[u8]) -> Result<(Notification, Vec<Device>), Misfit> {
    // Bytes that are no JSON at all, and JSON of another shape, have codes of their own.
    let read: Result<Body, _> = serde_json::from_slice(body);
    let Body { mut notification } = read.map_err(|error| match error.classify() {
        serde_json::error::Category::Data => Misfit {
            errcode: "M_BAD_JSON",
            why: "`notification` must be an object with `devices`, each with `app_id` and `pushkey`, and all fields as the specification has them.",
        },
        serde_json::error::Category::Io
        | serde_json::error::Category::Syntax
        | serde_json::error::Category::Eof => Misfit { errcode: "M_NOT_JSON", why: "The body must be JSON." },
    })?;
    let Some(devices) = notification.devices.take() else {
        return Err(Misfit { errcode: "M_MISSING_PARAM", why: "`notification.devices` is missing." });
    };
    notification.check()?;
    if devices.is_empty() || devices.len() > DEVICES_MAX {
        return Err(invalid("`notification.devices` must have 1 to 32 devices."));
    }
    devices.iter().try_for_each(Device::check)?;
    Ok((notification, devices))
}

impl Notification {
    /// The fields that are texts, by the names that they have for clients.
    pub(crate) fn texts(&self) -> [(&'static str, &Option<String>); 8] {
        [
            ("event_id", &self.event_id),
            ("room_id", &self.room_id),
            ("type", &self.event_type),
            ("sender", &self.sender),
            ("sender_display_name", &self.sender_display_name),
            ("room_name", &self.room_name),
            ("room_alias", &self.room_alias),
            ("membership", &self.membership),
        ]
    }

    fn check(&mut self) -> Result<(), Misfit> {
        let ids = [
            &self.event_id,
            &self.room_id,
            &self.event_type,
            &self.sender,
            &self.room_alias,
            &self.membership,
        ];
        if ids.into_iter().flatten().any(|id| id.len() > ID_BYTES_MAX) {
            return Err(invalid(
                "`event_id`, `room_id`, `type`, `sender`, `room_alias` and `membership` have at most 255 bytes.",
            ));
        }
        for name in [&mut self.sender_display_name, &mut self.room_name].into_iter().flatten() {
            *name = crate::text::shorten(name, NAME_BYTES_MAX);
        }
        let counts = [self.counts.unread, self.counts.missed_calls];
        if counts.into_iter().flatten().any(|count| count > COUNT_MAX) {
            return Err(invalid("The `counts` are at most 9007199254740991."));
        }
        Ok(())
    }

    /// As much of it as the provider of an app sees.
    pub(crate) fn shown(&self, payload: Payload) -> Cow<'_, Self> {
        match payload {
            Payload::Full => Cow::Borrowed(self),
            Payload::EventIdOnly => Cow::Owned(self.ids_only()),
        }
    }

    /// Only the ids and the counts.
    fn ids_only(&self) -> Self {
        Self {
            event_id: self.event_id.clone(),
            room_id: self.room_id.clone(),
            prio: self.prio.clone(),
            counts: self.counts,
            ..Self::default()
        }
    }

    /// Whether the homeserver says that it may wait; otherwise it is urgent.
    pub(crate) fn is_low(&self) -> bool {
        self.prio.as_deref() == Some("low")
    }
}

impl Device {
    fn check(&self) -> Result<(), Misfit> {
        if self.app_id.is_empty() || self.app_id.len() > ID_BYTES_MAX {
            return Err(invalid("`app_id` has 1 to 255 bytes."));
        }
        if self.pushkey.is_empty() || self.pushkey.len() > PUSHKEY_BYTES_MAX {
            return Err(invalid("`pushkey` has 1 to 512 bytes."));
        }
        if self.data.as_ref().is_some_and(|data| crate::text::size(data) > DATA_BYTES_MAX) {
            return Err(invalid("The `data` of a device have at most 16 KiB of JSON."));
        }
        Ok(())
    }

    /// A field of its data.
    pub(crate) fn data(&self, field: &str) -> Option<&Value> {
        self.data.as_ref()?.get(field)
    }

    /// A text in its data.
    pub(crate) fn data_text(&self, field: &str) -> Option<&str> {
        self.data(field)?.as_str()
    }

    /// Whether this flag is set in its data.
    pub(crate) fn wants(&self, flag: &str) -> bool {
        self.data(flag) == Some(&Value::Bool(true))
    }

    /// The fields that each message to it begins with. Errors: they are no object.
    pub(crate) fn default_payload(&self) -> Result<Map<String, Value>, &'static str> {
        Ok(self.find_default_payload()?.cloned().unwrap_or_default())
    }

    /// Looks at the same fields without copying them.
    pub(crate) fn require_default_payload(&self) -> Result<(), &'static str> {
        self.find_default_payload().map(drop)
    }

    fn find_default_payload(&self) -> Result<Option<&Map<String, Value>>, &'static str> {
        match self.data("default_payload") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(payload)) => Ok(Some(payload)),
            Some(_) => Err("`data.default_payload` must be an object."),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_json(body: &Value) -> Result<(Notification, Vec<Device>), Misfit> {
        read(body.to_string().as_bytes())
    }

    #[test]
    fn the_example_of_the_specification_is_read() {
        let (notification, devices) = read_json(&json!({ "notification": {
            "event_id": "$3957tyerfgewrf384", "room_id": "!slw48wfj34rtnrf:example.com", "type": "m.room.message",
            "sender": "@exampleuser:matrix.org", "sender_display_name": "Major Tom", "room_name": "Mission Control",
            "room_alias": "#exampleroom:matrix.org", "prio": "high",
            "content": { "msgtype": "m.text", "body": "I'm floating in a most peculiar way." },
            "counts": { "unread": 2, "missed_calls": 1 },
            "devices": [{ "app_id": "org.matrix.matrixConsole.ios", "pushkey": "V2h5IG9uIGVhcnRo", "pushkey_ts": 12345678,
                "data": {}, "tweaks": { "sound": "bing" } }],
        } }))
        .unwrap();
        assert_eq!(notification.counts.unread, Some(2));
        assert_eq!(notification.event_type.as_deref(), Some("m.room.message"));
        assert!(!notification.is_low());
        assert_eq!(devices[0].app_id, "org.matrix.matrixConsole.ios");
        let ids = notification.ids_only();
        assert!(ids.content.is_none() && ids.sender.is_none() && ids.event_id.is_some());
    }

    #[test]
    fn what_is_too_large_or_of_another_shape_is_refused_with_its_field() {
        let device = json!({ "app_id": "a", "pushkey": "k" });
        let with = |field: &str, value: Value| {
            let mut body = json!({ "notification": { "devices": [device] } });
            body["notification"][field] = value;
            read_json(&body).map(drop)
        };
        assert_eq!(with("event_id", Value::Null), Ok(()), "null is absent");
        for (field, value, errcode, word) in [
            ("event_id", json!("$".repeat(256)), "M_INVALID_PARAM", "event_id"),
            ("event_id", json!(5), "M_BAD_JSON", "notification"),
            ("content", json!([]), "M_BAD_JSON", "notification"),
            ("counts", json!({ "unread": -1 }), "M_BAD_JSON", "notification"),
            ("counts", json!({ "unread": 9_007_199_254_740_992_u64 }), "M_INVALID_PARAM", "counts"),
            ("devices", json!([]), "M_INVALID_PARAM", "devices"),
            ("devices", json!(vec![device.clone(); 33]), "M_INVALID_PARAM", "devices"),
            ("devices", Value::Null, "M_MISSING_PARAM", "devices"),
            ("devices", json!([{ "app_id": "a" }]), "M_BAD_JSON", "pushkey"),
            ("devices", json!([{ "app_id": "", "pushkey": "k" }]), "M_INVALID_PARAM", "app_id"),
            ("devices", json!([{ "app_id": "a", "pushkey": "k".repeat(513) }]), "M_INVALID_PARAM", "pushkey"),
            (
                "devices",
                json!([{ "app_id": "a", "pushkey": "k", "data": { "x": "x".repeat(16 << 10) } }]),
                "M_INVALID_PARAM",
                "data",
            ),
        ] {
            let misfit = with(field, value).unwrap_err();
            assert_eq!(misfit.errcode, errcode, "{field}: {}", misfit.why);
            assert!(misfit.why.contains(word), "{}", misfit.why);
        }
        assert_eq!(read(b"{").unwrap_err().errcode, "M_NOT_JSON");
        assert_eq!(read(b"{}").unwrap_err().errcode, "M_BAD_JSON");
        let deep = format!("{{\"notification\":{{\"content\":{}", "[".repeat(100_000));
        assert!(read(deep.as_bytes()).is_err(), "it ends before the stack does");
    }

    #[test]
    fn the_keys_of_a_device_are_not_printed() {
        let (_, devices) =
            read_json(&json!({ "notification": { "devices": [{ "app_id": "a", "pushkey": "SECRET", "data": { "auth": "SECRET" } }] } }))
                .unwrap();
        assert!(!format!("{devices:?}").contains("SECRET"));
    }
}
