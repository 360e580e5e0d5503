//! The settings of the gateway: the section `[push_gateway]` of `conduit.toml`, and a block for each app.

use std::path::{Path, PathBuf};

use federation::guard::parse_network;
use serde::{Deserialize, Serialize};

/// At most this many apps, because each has places and keys of its own.
pub const APPS_MAX: usize = 256;
/// The specification bounds the ids of apps by this many characters.
const APP_ID_CHARACTERS_MAX: usize = 64;
/// Providers keep a notification for at most four weeks.
const TTL_S_MAX: u32 = 28 * 24 * 3600;
/// Fields of a message of FCM that the gateway writes itself.
const MESSAGE_FIELDS_OWN: [&str; 5] = ["token", "topic", "condition", "data", "name"];

/// `[push_gateway]`: the gateway is there when an app is.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Networks where the endpoints of Web Push and UnifiedPush may be although they are not public.
    pub networks_allowed: Vec<String>,
    /// The apps that the gateway delivers to.
    #[serde(rename = "app", skip_serializing_if = "Vec::is_empty")]
    pub apps: Vec<App>,
}

/// `[[push_gateway.app]]`: one app, and the provider that reaches it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct App {
    /// The `app_id` of the pushers that it is for; `*` stands for any characters and `?` for one.
    pub id: String,
    /// The provider that reaches the app.
    pub kind: Kind,
    /// How much of a notification the provider sees.
    #[serde(default)]
    pub payload: Payload,
    /// The provider keeps a notification for this many seconds while the device cannot be reached.
    #[serde(default = "ttl_s")]
    pub ttl_s: u32,
    /// The URL of the provider, in place of its own; for FCM and APNs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub url: String,
    /// The private key by which push services know this gateway (VAPID); needed for Web Push, and may be given for UnifiedPush.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub vapid_key_file: PathBuf,
    /// The URL where operators of push services reach the operator of this gateway: `mailto:` or `https:`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub vapid_contact: String,
    /// Patterns of hosts where endpoints may be; none for all. Endpoints there have the port 443, or the one that stands behind a colon. For
    /// Web Push and UnifiedPush.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts_allowed: Vec<String>,
    /// The key file of a service account of Google, in JSON; for FCM.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub service_account_file: PathBuf,
    /// Fields that each message of FCM has besides those that the gateway writes.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub message: serde_json::Map<String, serde_json::Value>,
    /// The private key of APNs, the file that Apple calls `AuthKey_*.p8`.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub key_file: PathBuf,
    /// The id of that key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key_id: String,
    /// The id of the team of developers that the key belongs to.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub team_id: String,
    /// The topic of APNs, which is the bundle id of the app.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub topic: String,
    /// Whether the app was built for Apple's development environment.
    #[serde(default, skip_serializing_if = "is_false")]
    pub sandbox: bool,
    /// How APNs presents notifications.
    #[serde(default)]
    pub push_type: PushType,
    /// How the app writes its device token into `pushkey`.
    #[serde(default)]
    pub token_encoding: TokenEncoding,
}

/// A provider, which brings notifications to devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Web Push, for browsers (RFC 8030, 8291, 8292).
    WebPush,
    /// UnifiedPush, whose endpoints are URLs.
    UnifiedPush,
    /// Firebase Cloud Messaging, by its HTTP API v1.
    Fcm,
    /// The push notification service of Apple.
    Apns,
}

impl Kind {
    /// The word for it in settings and figures.
    pub const fn word(self) -> &'static str {
        match self {
            Self::WebPush => "webpush",
            Self::UnifiedPush => "unifiedpush",
            Self::Fcm => "fcm",
            Self::Apns => "apns",
        }
    }
}

/// How much of a notification the provider sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Payload {
    /// All that the homeserver sends; it sends only ids where the pusher has the format `event_id_only`.
    #[default]
    Full,
    /// The ids of event and room, and the counts, whatever the homeserver sends.
    EventIdOnly,
}

/// How APNs presents notifications (`apns-push-type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PushType {
    /// They may be shown, and may wake an extension of the app.
    #[default]
    Alert,
    /// They wake the app, which shows what it likes; Apple delays them.
    Background,
}

/// How the app writes its device token into `pushkey`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenEncoding {
    /// Base64 of the bytes.
    #[default]
    Base64,
    /// Hexadecimal digits of the bytes.
    Hex,
}

const fn ttl_s() -> u32 {
    24 * 3600
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

const fn is_false(flag: &bool) -> bool {
    !*flag
}

/// A setting that is wrong, and a sentence that says what was expected.
pub type Wrong = (String, String);

impl Settings {
    /// Whether there is anything to deliver to.
    pub const fn is_enabled(&self) -> bool {
        !self.apps.is_empty()
    }

    /// Finds the first setting that is wrong, by its key below `push_gateway`. It looks whether files are there, and does not
    /// read them.
    pub fn check(&self) -> Result<(), Wrong> {
        for network in &self.networks_allowed {
            parse_network(network).map_err(|expected| ("networks_allowed".to_owned(), expected))?;
        }
        require(self.apps.len() <= APPS_MAX, || {
            ("app".to_owned(), format!("expected at most {APPS_MAX} apps"))
        })?;
        for (number, app) in self.apps.iter().enumerate() {
            let is_doubled = self.apps.iter().take(number).any(|it| it.id == app.id);
            require(!is_doubled, || {
                ("id".to_owned(), "another app has this id already: expected one of its own".to_owned())
            })
            .and_then(|()| app.check())
            .map_err(|(key, why)| (format!("app.{number}.{key}"), why))?;
        }
        Ok(())
    }
}

fn require(holds: bool, wrong: impl FnOnce() -> Wrong) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err(wrong()) }
}

impl App {
    /// An app of this id and kind with the defaults of everything else.
    pub fn new(id: &str, kind: Kind) -> Self {
        Self {
            id: id.to_owned(),
            kind,
            payload: Payload::default(),
            ttl_s: ttl_s(),
            url: String::new(),
            vapid_key_file: PathBuf::new(),
            vapid_contact: String::new(),
            hosts_allowed: Vec::new(),
            service_account_file: PathBuf::new(),
            message: serde_json::Map::new(),
            key_file: PathBuf::new(),
            key_id: String::new(),
            team_id: String::new(),
            topic: String::new(),
            sandbox: false,
            push_type: PushType::default(),
            token_encoding: TokenEncoding::default(),
        }
    }

    fn check(&self) -> Result<(), Wrong> {
        let wrong = |key: &str, expected: &str| (key.to_owned(), expected.to_owned());
        let characters = self.id.chars().count();
        require((1..=APP_ID_CHARACTERS_MAX).contains(&characters), || {
            wrong("id", "expected the app_id of pushers, 1 to 64 characters")
        })?;
        require(self.ttl_s <= TTL_S_MAX, || {
            wrong("ttl_s", "expected 0 to 2419200 seconds, which are four weeks")
        })?;
        self.require_nothing_of_others()?;
        for pattern in &self.hosts_allowed {
            HostPattern::parse(pattern).map_err(|expected| ("hosts_allowed".to_owned(), expected))?;
        }
        match self.kind {
            Kind::WebPush => self.check_vapid(true),
            Kind::UnifiedPush => self.check_vapid(!is_empty(&self.vapid_key_file)),
            Kind::Fcm => {
                self.check_url()?;
                require_file("service_account_file", &self.service_account_file, "JSON")?;
                let own = MESSAGE_FIELDS_OWN.into_iter().find(|field| self.message.contains_key(*field));
                require(own.is_none(), || {
                    wrong(
                        "message",
                        "expected none of token, topic, condition, data, name: the gateway writes them",
                    )
                })
            }
            Kind::Apns => {
                self.check_url()?;
                require_file("key_file", &self.key_file, "PEM")?;
                for (key, id) in [("key_id", &self.key_id), ("team_id", &self.team_id)] {
                    let is_id =
                        !id.is_empty() && id.len() <= 32 && id.bytes().all(|it| it.is_ascii_alphanumeric());
                    require(is_id, || {
                        wrong(key, "expected the id that Apple shows, such as \"ABC123DEFG\"")
                    })?;
                }
                let is_topic = |it: u8| it.is_ascii_alphanumeric() || matches!(it, b'.' | b'-' | b'_');
                let is_topic = (1..=255).contains(&self.topic.len()) && self.topic.bytes().all(is_topic);
                require(is_topic, || {
                    wrong("topic", "expected the bundle id of the app, such as \"org.example.app\"")
                })
            }
        }
    }

    /// A setting of another kind of app does nothing, so that it is a mistake.
    fn require_nothing_of_others(&self) -> Result<(), Wrong> {
        let is_web = matches!(self.kind, Kind::WebPush | Kind::UnifiedPush);
        let (is_fcm, is_apns) = (self.kind == Kind::Fcm, self.kind == Kind::Apns);
        let set: [(&str, bool, bool); 12] = [
            ("url", !self.url.is_empty(), !is_web),
            ("vapid_key_file", !is_empty(&self.vapid_key_file), is_web),
            ("vapid_contact", !self.vapid_contact.is_empty(), is_web),
            ("hosts_allowed", !self.hosts_allowed.is_empty(), is_web),
            ("service_account_file", !is_empty(&self.service_account_file), is_fcm),
            ("message", !self.message.is_empty(), is_fcm),
            ("key_file", !is_empty(&self.key_file), is_apns),
            ("key_id", !self.key_id.is_empty(), is_apns),
            ("team_id", !self.team_id.is_empty(), is_apns),
            ("topic", !self.topic.is_empty(), is_apns),
            ("sandbox", self.sandbox, is_apns),
            ("push_type", self.push_type != PushType::default(), is_apns),
        ];
        let misplaced = set.into_iter().find(|(_, is_set, may_be)| *is_set && !may_be);
        misplaced.map_or(Ok(()), |(key, ..)| {
            Err((key.to_owned(), format!("an app of the kind {:?} has no such setting", self.kind.word())))
        })
    }

    fn check_vapid(&self, is_needed: bool) -> Result<(), Wrong> {
        if !is_needed {
            return Ok(());
        }
        require_file("vapid_key_file", &self.vapid_key_file, "PEM")?;
        let contact = &self.vapid_contact;
        let is_contact = contact.len() <= 255
            && (contact.strip_prefix("mailto:").is_some_and(|it| it.contains('@'))
                || contact.strip_prefix("https://").is_some_and(|it| !it.is_empty()));
        require(is_contact, || {
            let expected = "expected where push services reach you, such as \"mailto:admin@example.org\"";
            ("vapid_contact".to_owned(), expected.to_owned())
        })
    }

    fn check_url(&self) -> Result<(), Wrong> {
        let is_url = self.url.is_empty() || crate::outbound::Endpoint::parse(&self.url).is_ok();
        require(is_url, || {
            ("url".to_owned(), "expected a URL such as \"https://push.example.org\", or nothing".to_owned())
        })
    }
}

/// A pattern of hosts, and the port of the endpoints there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPattern {
    host: String,
    port: u16,
}

impl HostPattern {
    /// Reads `host`, `host:port`, an address of IPv6, or one in brackets with a port. Errors: a sentence that says what was expected.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let expected = || {
            format!(
                "expected a host such as \"*.push.example.org\", or with a port \"push.example.org:8443\", not {text:?}"
            )
        };
        let (host, port) = match text.strip_prefix('[').map(|it| it.split_once(']')) {
            Some(None) => return Err(expected()),
            Some(Some((host, ""))) => (host, None),
            Some(Some((host, rest))) => (host, Some(rest.strip_prefix(':').ok_or_else(expected)?)),
            None => match text.split_once(':') {
                Some((host, port)) if !port.contains(':') => (host, Some(port)),
                // More colons than one are those of an address.
                Some(_) | None => (text, None),
            },
        };
        let port = port.map_or(Ok(443), |port| port.parse().map_err(|_| expected()))?;
        if host.is_empty() || port == 0 || host.contains(['/', '@']) {
            return Err(expected());
        }
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }

    /// Whether an endpoint may be at this host and port.
    pub(crate) fn allows(&self, host: &str, port: u16) -> bool {
        self.port == port && federation::guard::matches(&self.host, host)
    }
}

fn require_file(key: &str, file: &Path, form: &str) -> Result<(), Wrong> {
    require(file.is_file(), || {
        (
            key.to_owned(),
            format!("expected a file in {form} format; there is no file {:?}", file.display().to_string()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_of_hosts_lets_one_port_through() {
        for (pattern, host, port) in [
            ("*.Push.example", "a.push.example", 443),
            ("push.example:8443", "push.example", 8443),
            ("2001:db8::1", "2001:db8::1", 443),
            ("[2001:db8::1]", "2001:db8::1", 443),
            ("[2001:db8::1]:444", "2001:db8::1", 444),
        ] {
            let read = HostPattern::parse(pattern).unwrap();
            assert!(read.allows(host, port) && !read.allows(host, port + 1), "{pattern}");
        }
        assert!(!HostPattern::parse("*.push.example").unwrap().allows("push.example", 443));
        for wrong in ["", ":443", "a:", "a:b", "a:70000", "[::1", "[::1]443", "https://a", "a/b"] {
            assert!(HostPattern::parse(wrong).is_err(), "{wrong}");
        }
    }

    fn wrong(settings: &Settings) -> Wrong {
        settings.check().unwrap_err()
    }

    #[test]
    fn what_is_wrong_is_named_by_key() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        let apps = |apps: Vec<App>| Settings { apps, ..Settings::default() };
        let web = App {
            vapid_key_file: path.clone(),
            vapid_contact: "mailto:a@example.org".to_owned(),
            ..App::new("a", Kind::WebPush)
        };
        let fcm = App { service_account_file: path.clone(), ..App::new("a", Kind::Fcm) };
        let apns = App {
            key_file: path,
            key_id: "K".to_owned(),
            team_id: "T".to_owned(),
            topic: "org.example".to_owned(),
            ..App::new("a", Kind::Apns)
        };
        for right in [web.clone(), fcm.clone(), apns.clone(), App::new("*", Kind::UnifiedPush)] {
            assert_eq!(apps(vec![right]).check(), Ok(()));
        }
        let message = serde_json::json!({ "token": "x" }).as_object().unwrap().clone();
        for (app, key) in [
            (App { id: String::new(), ..web.clone() }, "id"),
            (App { id: "x".repeat(65), ..web.clone() }, "id"),
            (App { ttl_s: TTL_S_MAX + 1, ..web.clone() }, "ttl_s"),
            (App { vapid_key_file: "/none".into(), ..web.clone() }, "vapid_key_file"),
            (App { vapid_contact: "me".to_owned(), ..web.clone() }, "vapid_contact"),
            (App { topic: "t".to_owned(), ..web.clone() }, "topic"),
            (
                App {
                    hosts_allowed: vec!["a.example".to_owned(), "https://b.example/".to_owned()],
                    ..web.clone()
                },
                "hosts_allowed",
            ),
            (App { hosts_allowed: vec!["a.example:0".to_owned()], ..web.clone() }, "hosts_allowed"),
            (App { sandbox: true, ..fcm.clone() }, "sandbox"),
            (App { url: "http://plain.example".to_owned(), ..fcm.clone() }, "url"),
            (App { service_account_file: PathBuf::new(), ..fcm.clone() }, "service_account_file"),
            (App { message, ..fcm }, "message"),
            (App { key_id: "a b".to_owned(), ..apns.clone() }, "key_id"),
            (App { team_id: String::new(), ..apns.clone() }, "team_id"),
            (App { topic: "a\nb".to_owned(), ..apns.clone() }, "topic"),
            (App { hosts_allowed: vec!["*".to_owned()], ..apns }, "hosts_allowed"),
        ] {
            assert_eq!(wrong(&apps(vec![app])).0, format!("app.0.{key}"));
        }
        assert_eq!(wrong(&apps(vec![web.clone(), web])).0, "app.1.id");
        let networks = Settings { networks_allowed: vec!["10/8".to_owned()], ..Settings::default() };
        assert_eq!(wrong(&networks).0, "networks_allowed");
    }
}
