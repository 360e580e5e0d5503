//! The gateway: its apps by the providers that reach them, all that deliveries share, and the devices of a notification, which are told at the
//! same time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use federation::{
    guard::{Guard, matches, parse_network},
    json::Memory,
    turns::Turns,
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use http::HeaderValue;
use tokio::{sync::oneshot, time::Instant};

use crate::{
    apns::ApnsApp,
    delivery::{Delivery, Request},
    fcm::FcmApp,
    keys::BadKey,
    lines::Lines,
    message::{Job, Message},
    notification::{Device, Notification},
    outbound::{Answer, Outbound},
    outcome::Outcome,
    payer::Payer,
    ports::Ports,
    remembered::{Mark, Remembered, mark},
    settings::{Kind, Settings},
    shares::Of,
    web::{self, WebApp},
};

/// Bodies of requests have at most this many bytes in memory while they come. The places of [`Of::Memory`] bound them before this does,
/// because a byte counts there for what is parsed of it, too.
const BODIES_BYTES_MAX: usize = 256 << 20;
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
    /// The turns of notifications for a device: nobody delivers one while it is being delivered already.
    pub(crate) turns: Turns<Mark>,
    /// The memory in which bodies of homeservers are read.
    pub(crate) bodies: Memory,
    /// Nobody else knows it, so that nobody finds out which rooms topics stand for.
    secret: [u8; 32],
    pub(crate) apps: Vec<Served>,
}

/// An app, as it is served.
pub(crate) struct Served {
    pattern: String,
    pub(crate) kind: Kind,
    pub(crate) app: App,
    warned_ms: AtomicU64,
}

/// An app by the provider that reaches it.
pub(crate) enum App {
    Web(WebApp),
    Fcm(FcmApp),
    Apns(ApnsApp),
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
    #[error("hosts_allowed: {0}")]
    Host(String),
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
                Kind::WebPush | Kind::UnifiedPush => WebApp::open(app).map(App::Web),
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
        let mut secret = [0; 32];
        ports.secrets.fill(&mut secret);
        Ok(Self(Arc::new(Shared {
            outbound: Outbound::new(ports.clone(), Guard::new(networks)),
            ports,
            lines: Arc::default(),
            remembered: Remembered::default(),
            turns: Turns::default(),
            secret,
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

    /// Tells all devices at the same time, and says by this time what became of each, in their order.
    pub(crate) async fn notify(&self, request: &Arc<Request>, until: Instant) -> Vec<Outcome> {
        let telling: FuturesUnordered<_> = request
            .devices
            .iter()
            .enumerate()
            .map(|(at, device)| async move { (at, self.tell(request, at, device, until).await) })
            .collect();
        let mut outcomes = vec![Outcome::Skipped; request.devices.len()];
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

    async fn tell(&self, request: &Arc<Request>, at: usize, device: &Device, until: Instant) -> Outcome {
        let Some(app) = self.0.find(&device.app_id) else {
            self.0.ports.figures.device("none", "unknown_app");
            tracing::debug!(app_id = device.app_id, reason = NO_SUCH_APP, "a device is not told");
            return Outcome::Refused(NO_SUCH_APP);
        };
        Delivery::new(Arc::clone(&self.0), Arc::clone(request), at, app, until).run().await
    }
}

impl App {
    /// Whether users choose where its messages go.
    pub(crate) const fn is_chosen(&self) -> bool {
        match self {
            Self::Web(_) => true,
            Self::Fcm(_) | Self::Apns(_) => false,
        }
    }

    /// Finds the way to a device. Errors: what becomes of the device without one.
    pub(crate) fn read(&self, notification: &Notification, device: &Device) -> Result<Job, Outcome> {
        match self {
            Self::Web(app) => app.read(notification, device),
            Self::Fcm(app) => app.read(notification, device),
            Self::Apns(app) => app.read(notification, device),
        }
    }

    /// Makes the message for a device, which takes a while. Errors: what becomes of the device without one.
    pub(crate) fn make(
        &self,
        shared: &Shared,
        notification: &Notification,
        device: &Device,
        job: &Job,
    ) -> Result<Message, Outcome> {
        match self {
            Self::Web(app) => app.make(shared, notification, device, job),
            Self::Fcm(app) => app.make(shared, notification, device, job),
            Self::Apns(app) => app.make(shared, notification, device, job),
        }
    }

    /// The `Authorization` header for all messages of the app, where it has one. Errors: there is none now.
    pub(crate) async fn authorization(&self, shared: &Shared) -> Result<Option<HeaderValue>, Outcome> {
        match self {
            Self::Web(_) => Ok(None),
            Self::Fcm(app) => app.authorization(shared).await.map(Some),
            Self::Apns(app) => {
                let signed = app.authorization(shared.now_ms());
                signed.map(Some).ok_or(Outcome::failed("the key of the app does not sign"))
            }
        }
    }

    /// The meaning of an answer to a message that was sent with this header of authorization.
    pub(crate) async fn judge(
        &self,
        shared: &Shared,
        answer: &Answer,
        sent: Option<&HeaderValue>,
    ) -> Outcome {
        match self {
            Self::Web(_) => web::outcome(answer),
            Self::Fcm(app) => app.judge(shared, answer, sent).await,
            Self::Apns(app) => app.judge(shared, answer),
        }
    }
}

impl Shared {
    /// The number of the app of this id: the one that names it exactly, or the first whose pattern it follows.
    fn find(&self, app_id: &str) -> Option<usize> {
        let exact = self.apps.iter().position(|it| it.pattern == app_id);
        exact.or_else(|| self.apps.iter().position(|it| matches(&it.pattern, app_id)))
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

    /// Runs what keeps a processor busy off the threads that serve requests. None where too much of this waits, or the process stops.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        payer: Payer,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let place = self.lines.take(payer, [Of::Making]).await?;
        let (sender, done) = oneshot::channel();
        // The place is held until the work has ended, also where nobody waits for it any more.
        let work = Box::new(move || {
            drop(sender.send(work()));
            drop(place);
        });
        self.ports.work.run(work).await;
        done.await.ok()
    }

    /// Stands for a room at a device where a provider keeps only the last message of each. The provider learns neither which room it is nor that
    /// another device has the same. It is another one after a restart, and then a device may have one message more.
    pub(crate) fn topic(&self, receiver: &Mark, room_id: &str) -> Mark {
        mark(&[b"topic", &self.secret, receiver, room_id.as_bytes()])
    }

    /// Now, in milliseconds since the epoch.
    pub(crate) fn now_ms(&self) -> u64 {
        self.ports.clock.now_ms()
    }

    /// Waits for a while.
    #[expect(clippy::disallowed_methods, reason = "the crate waits on tokio's clock, which can be paused")]
    pub(crate) async fn wait(&self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }
}
