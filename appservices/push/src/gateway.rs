//! The gateway: finds the app of each device, makes the message, sends it as often as it takes within bounds, and says what became of it.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use federation::{
    guard::{Guard, matches, parse_network},
    json::Memory,
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use http::HeaderMap;

use crate::{
    apns::{ApnsApp, ApnsMessage},
    fcm::{FcmApp, FcmMessage},
    keys::BadKey,
    lines::Lines,
    notification::{Device, Notification},
    outbound::{Answer, Endpoint, NotAnswered, Outbound},
    outcome::Outcome,
    ports::Ports,
    remembered::{Mark, Remembered, mark_of},
    settings::{Kind, Settings},
    web::{WebApp, WebMessage},
};

/// A message is sent at most this often for one request; the homeserver asks again later.
const TRIES_MAX: u32 = 3;
/// The first pause before another try; each further one is three times as long.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// A provider that asks for a longer pause is not waited for; the homeserver is told to come back.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// All tries for one device take at most this long, with waiting in line: homeservers wait for a minute.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(40);
/// Notifications that are worked on have at most this many bytes together.
const BODIES_BYTES_MAX: usize = 32 << 20;
/// A fault in the settings of an app is logged at most this often.
const WARNED_EVERY_MS: u64 = 60_000;

/// A push gateway. Cheap to clone.
#[derive(Clone)]
pub struct Gateway(Arc<Shared>);

/// The parts of a gateway that all deliveries share.
pub(crate) struct Shared {
    pub(crate) ports: Ports,
    pub(crate) outbound: Outbound,
    pub(crate) lines: Arc<Lines>,
    pub(crate) remembered: Remembered,
    /// The memory of requests of homeservers.
    pub(crate) bodies: Memory,
    apps: Vec<Served>,
}

struct Served {
    pattern: String,
    kind: Kind,
    app: App,
    warned_ms: AtomicU64,
}

enum App {
    Web(WebApp),
    Fcm(FcmApp),
    Apns(ApnsApp),
}

enum Message<'a> {
    Web(&'a WebApp, WebMessage),
    Fcm(&'a FcmApp, FcmMessage),
    Apns(&'a ApnsApp, ApnsMessage),
}

/// An app that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadApp {
    #[error(transparent)]
    Key(#[from] BadKey),
    #[error("url: {0}")]
    Url(&'static str),
    #[error("topic: expected the bundle id of the app")]
    Topic,
}

/// The settings cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub struct NotOpened {
    /// The setting, by its key.
    pub key: String,
    /// The reason, without anything that a file of a key holds.
    pub why: String,
}

/// The reason of a device whose app is not one of the gateway's.
pub(crate) const NO_SUCH_APP: &str = "No app of this gateway has this `app_id`.";

impl Gateway {
    /// Opens a gateway with these settings. It reads the files of keys, so that it is called once at the start. Errors: [`NotOpened`].
    pub fn open(settings: &Settings, ports: Ports) -> Result<Self, NotOpened> {
        settings.check().map_err(|(key, why)| NotOpened { key: format!("push_gateway.{key}"), why })?;
        let networks = settings.networks_allowed.iter().map(|network| parse_network(network));
        let networks = networks
            .collect::<Result<_, _>>()
            .map_err(|why| NotOpened { key: "push_gateway.networks_allowed".to_owned(), why })?;
        let mut apps = Vec::with_capacity(settings.apps.len());
        for (number, app) in settings.apps.iter().enumerate() {
            let opened = match app.kind {
                Kind::WebPush | Kind::UnifiedPush => {
                    WebApp::open(number, app).map(App::Web).map_err(BadApp::from)
                }
                Kind::Fcm => FcmApp::open(number, app).map(App::Fcm),
                Kind::Apns => ApnsApp::open(number, app).map(App::Apns),
            };
            let opened = opened.map_err(|error| NotOpened {
                key: format!("push_gateway.app.{number}"),
                why: error.to_string(),
            })?;
            let (pattern, kind) = (app.id.clone(), app.kind);
            apps.push(Served { pattern, kind, app: opened, warned_ms: AtomicU64::new(0) });
        }
        Ok(Self(Arc::new(Shared {
            outbound: Outbound::new(ports.clone(), Guard::new(networks)),
            ports,
            lines: Arc::default(),
            remembered: Remembered::default(),
            bodies: Memory::new(BODIES_BYTES_MAX, 1 << 20, 1),
            apps,
        })))
    }

    /// The apps that have a key by which push services know them: their ids, and the public keys that clients subscribe with
    /// (`applicationServerKey`).
    pub fn public_keys(&self) -> Vec<(&str, &str)> {
        self.0
            .apps
            .iter()
            .filter_map(|it| match &it.app {
                App::Web(app) => Some((it.pattern.as_str(), app.public_key()?)),
                App::Fcm(_) | App::Apns(_) => None,
            })
            .collect()
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.0
    }

    /// Whether clients may find out that this is a gateway for UnifiedPush.
    pub(crate) fn serves_unified_push(&self) -> bool {
        self.0.apps.iter().any(|it| it.kind == Kind::UnifiedPush)
    }

    /// Tells all devices at the same time, and says what became of each, in their order.
    pub(crate) async fn notify(
        &self,
        caller: IpAddr,
        notification: &Notification,
        devices: &[Device],
    ) -> Vec<Outcome> {
        let telling: FuturesUnordered<_> = devices
            .iter()
            .enumerate()
            .map(|(at, device)| async move { (at, self.tell(caller, notification, device).await) })
            .collect();
        let mut outcomes = vec![Outcome::Skipped; devices.len()];
        telling
            .for_each(|(at, outcome)| {
                if let Some(place) = outcomes.get_mut(at) {
                    *place = outcome;
                }
                std::future::ready(())
            })
            .await;
        outcomes
    }

    async fn tell(&self, caller: IpAddr, notification: &Notification, device: &Device) -> Outcome {
        let Some(served) = self.0.find(&device.app_id) else {
            self.0.ports.figures.device("none", "unknown_app");
            tracing::debug!(app_id = device.app_id, reason = NO_SUCH_APP, "a device is not told");
            return Outcome::Refused(NO_SUCH_APP);
        };
        let telling = self.0.tell(served, caller, notification, device);
        let outcome = tokio::time::timeout(DEVICE_TIMEOUT, telling).await;
        let outcome = outcome.unwrap_or(Outcome::failed("delivering took too long"));
        self.0.ports.figures.device(served.kind.word(), outcome.word());
        tracing::debug!(
            app_id = device.app_id,
            kind = served.kind.word(),
            outcome = outcome.word(),
            reason = outcome.why(),
            "a device"
        );
        outcome
    }
}

impl Shared {
    /// The app of this id: the one that names it exactly, or the first whose pattern it follows.
    fn find(&self, app_id: &str) -> Option<&Served> {
        let exact = self.apps.iter().find(|it| it.pattern == app_id);
        exact.or_else(|| self.apps.iter().find(|it| matches(&it.pattern, app_id)))
    }

    /// Logs a fault in the settings of an app, unless that was done a moment ago.
    pub(crate) fn warn(&self, app: usize, log: impl FnOnce()) {
        let Some(served) = self.apps.get(app) else { return };
        let now_ms = self.ports.clock.now_ms();
        let last_ms = served.warned_ms.load(Ordering::Relaxed);
        if now_ms.abs_diff(last_ms) >= WARNED_EVERY_MS {
            served.warned_ms.store(now_ms, Ordering::Relaxed);
            log();
        }
    }

    async fn tell(
        &self,
        served: &Served,
        caller: IpAddr,
        notification: &Notification,
        device: &Device,
    ) -> Outcome {
        let mark = mark_of(notification, device);
        let was_delivered = |mark: &Mark| self.remembered.was_delivered(mark, self.ports.clock.now_ms());
        if mark.as_ref().is_some_and(was_delivered) {
            return Outcome::Skipped;
        }
        let prepared = match &served.app {
            App::Web(app) => app.prepare(self, notification, device).map(|it| Message::Web(app, it)),
            App::Fcm(app) => app.prepare(notification, device).map(|it| Message::Fcm(app, it)),
            App::Apns(app) => app.prepare(self, notification, device).map(|it| Message::Apns(app, it)),
        };
        let message = match prepared {
            Ok(message) => message,
            Err(outcome) => return outcome,
        };
        let outcome = self.send(caller, &message).await;
        if let (Outcome::Delivered, Some(mark)) = (outcome, mark) {
            self.remembered.note_delivered(mark, self.ports.clock.now_ms());
        }
        outcome
    }

    /// Sends a message, and again after a pause where that may help.
    async fn send(&self, caller: IpAddr, message: &Message<'_>) -> Outcome {
        let receiver = match message {
            Message::Web(_, message) => &message.subscription,
            Message::Fcm(_, message) => &message.device,
            Message::Apns(_, message) => &message.device,
        };
        let mut pause = PAUSE_FIRST;
        for tried in 1.. {
            if let Some(left_ms) = self.remembered.paused_ms(receiver, self.ports.clock.now_ms()) {
                let retry_after = Some(Duration::from_millis(left_ms));
                return Outcome::Failed { why: "the provider has asked for a pause", retry_after };
            }
            let outcome = match message {
                Message::Web(app, message) => app.send(self, caller, message).await,
                Message::Fcm(app, message) => app.send(self, message).await,
                Message::Apns(app, message) => app.send(self, message).await,
            };
            let Outcome::Failed { retry_after, .. } = outcome else { return outcome };
            let asked = retry_after.unwrap_or_default();
            let is_long = asked > PAUSE_MAX;
            if is_long {
                let asked_ms = u64::try_from(asked.as_millis()).unwrap_or(u64::MAX);
                self.remembered.pause(*receiver, self.ports.clock.now_ms(), asked_ms);
            }
            if is_long || tried >= TRIES_MAX {
                return outcome;
            }
            // Messages that failed together are not tried again together.
            let jitter = Duration::from_millis(self.ports.randomness.below(1_000));
            self.wait(pause.max(asked) + jitter).await;
            pause *= 3;
        }
        Outcome::failed("the provider fails")
    }

    /// Sends one request to a provider, whose address no user names. `forbidden` says that the settings do not let this server connect to
    /// it. Errors: the outcome of a message that got no answer.
    pub(crate) async fn post_fixed(
        &self,
        endpoint: &Endpoint,
        headers: HeaderMap,
        body: &Bytes,
        forbidden: &'static str,
    ) -> Result<Answer, Outcome> {
        let exchange = async {
            let found = self.outbound.find_fixed(endpoint).await?;
            self.outbound.post(endpoint, found, headers, body.clone(), true).await
        };
        exchange.await.map_err(|error| match error {
            NotAnswered::Failed(why) => Outcome::failed(why),
            NotAnswered::Forbidden => Outcome::failed(forbidden),
        })
    }

    #[expect(clippy::disallowed_methods, reason = "the crate waits on tokio's clock, which can be paused")]
    async fn wait(&self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }
}
