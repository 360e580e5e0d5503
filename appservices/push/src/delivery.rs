//! One notification on its way to one device: its places are asked for before anything is made of it, it is tried as often as it takes within
//! bounds, and a try that has begun is finished and remembered also where the caller hangs up.

use std::{sync::Arc, time::Duration};

use federation::turns::Turn;
use futures_util::FutureExt;
use http::{HeaderValue, header};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    gateway::{Served, Shared},
    lines::Ticket,
    message::{Job, Message},
    notification::{Device, Notification},
    outbound::{Answer, Found, NotAnswered},
    outcome::Outcome,
    payer::{Payer, network},
    remembered::{Mark, mark_of},
    shares::Of,
};

/// A message is sent at most this often for one request; the homeserver asks again later.
const TRIES_MAX: u32 = 3;
/// The first pause before another try; each further one is three times as long.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// A provider that asks for a longer pause is not waited for; the homeserver is told to come back.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// No try begins with less time than this before the homeserver is answered.
const TRY_LEAST: Duration = Duration::from_secs(1);

/// A request of a homeserver, with its places. Tries that have begun keep it when the caller has hung up.
pub(crate) struct Request {
    pub(crate) payer: Payer,
    pub(crate) notification: Notification,
    pub(crate) devices: Vec<Device>,
    /// The place among the requests that are worked on, and the memory.
    _ticket: Ticket,
}

impl Request {
    pub(crate) const fn new(
        payer: Payer,
        notification: Notification,
        devices: Vec<Device>,
        ticket: Ticket,
    ) -> Self {
        Self { payer, notification, devices, _ticket: ticket }
    }
}

/// The delivery to one device of a request.
#[derive(Clone)]
pub(crate) struct Delivery {
    shared: Arc<Shared>,
    request: Arc<Request>,
    /// The number of the device in the request.
    at: usize,
    /// The number of the app.
    app: usize,
    /// The homeserver is answered at this time.
    until: Instant,
}

/// A try that has its places.
struct Attempt {
    delivery: Delivery,
    job: Arc<Job>,
    mark: Option<Mark>,
    /// None where the host is the operator's and is looked up with the places.
    found: Option<Found>,
    authorization: Option<HeaderValue>,
    message: Option<Arc<Message>>,
    _places: Ticket,
    /// The homeserver may ask again while this goes on; it does not begin another delivery of the same.
    _turn: Option<Arc<Turn<Mark>>>,
}

/// The end of a try, and the message for the next one.
type Tried = (Outcome, Option<Arc<Message>>);

impl Delivery {
    pub(crate) const fn new(
        shared: Arc<Shared>,
        request: Arc<Request>,
        at: usize,
        app: usize,
        until: Instant,
    ) -> Self {
        Self { shared, request, at, app, until }
    }

    /// Delivers, and says what became of it when the homeserver has to be answered.
    pub(crate) async fn run(self) -> Outcome {
        let (Some(served), Some(device)) = (self.served(), self.device()) else {
            return Outcome::failed("there is no such device");
        };
        let late = Outcome::failed("delivering took too long");
        let outcome = tokio::time::timeout_at(self.until, self.deliver(served, device)).await.unwrap_or(late);
        self.shared.ports.figures.device(served.kind.word(), outcome.word());
        tracing::debug!(
            app_id = device.app_id,
            kind = served.kind.word(),
            outcome = outcome.word(),
            reason = outcome.why(),
            "a device"
        );
        outcome
    }

    async fn deliver(&self, served: &Served, device: &Device) -> Outcome {
        let mark = mark_of(&self.request.notification, device);
        let was_delivered =
            || mark.is_some_and(|it| self.shared.remembered.was_delivered(&it, self.shared.now_ms()));
        if was_delivered() {
            return Outcome::Skipped;
        }
        let turn = match mark {
            Some(mark) => Some(Arc::new(self.shared.turns.enter(mark).await)),
            None => None,
        };
        if was_delivered() {
            return Outcome::Skipped;
        }
        let job = match served.app.read(&self.request.notification, device) {
            Ok(job) => Arc::new(job),
            Err(outcome) => return outcome,
        };
        let (mut pause, mut message) = (PAUSE_FIRST, None);
        for tried in 1.. {
            let (outcome, made) = self.once(served, &job, (mark, turn.clone()), message).await;
            let Outcome::Failed { retry_after, .. } = outcome else { return outcome };
            message = made;
            let asked = retry_after.unwrap_or_default();
            // Messages that failed together are not tried again together.
            let jitter = Duration::from_millis(self.shared.ports.randomness.below(1_000));
            let wait = pause.max(asked) + jitter;
            let left = self.until.saturating_duration_since(now());
            if tried >= TRIES_MAX || asked > PAUSE_MAX || wait + TRY_LEAST > left {
                return outcome;
            }
            self.shared.wait(wait).await;
            pause *= 3;
        }
        Outcome::failed("the provider fails")
    }

    /// Tries once. Until the places are there, nothing is made and nothing is sent, so that it ends with its caller.
    async fn once(
        &self,
        served: &Served,
        job: &Arc<Job>,
        (mark, turn): (Option<Mark>, Option<Arc<Turn<Mark>>>),
        message: Option<Arc<Message>>,
    ) -> Tried {
        let shared = &self.shared;
        if let Some(stopped) = self.stopped(served, job) {
            return (stopped, message);
        }
        let (found, places) = if served.app.is_chosen() {
            let found = match self.look_up(job).await {
                Ok(found) => found,
                Err(outcome) => return (outcome, message),
            };
            let host = Of::Host(job.endpoint.host().to_owned(), job.endpoint.port());
            let address = found.address().map(|it| Of::Address(network(it)));
            (Some(found), [host, Of::Chosen].into_iter().chain(address).collect())
        } else {
            (None, vec![Of::App(self.app), Of::Fixed])
        };
        let authorization = match served.app.authorization(shared).await {
            Ok(authorization) => authorization,
            Err(outcome) => return (outcome, message),
        };
        let Some(places) = shared.lines.take(self.request.payer, places).await else {
            return (Outcome::failed("too much waits for this provider already"), message);
        };
        // Others of the same site may have failed meanwhile.
        if let Some(stopped) = self.stopped(served, job) {
            return (stopped, message);
        }
        let (delivery, job) = (self.clone(), Arc::clone(job));
        let attempt =
            Attempt { delivery, job, mark, found, authorization, message, _places: places, _turn: turn };
        let (ended, end) = oneshot::channel();
        // The one who asked may have hung up when it ends.
        let attempt = async move { drop(ended.send(attempt.run().await)) };
        shared.ports.tasks.spawn(attempt.boxed());
        end.await.unwrap_or((Outcome::failed("the gateway stops"), None))
    }

    /// The reason why nothing is sent to the device now, and for how long.
    fn stopped(&self, served: &Served, job: &Job) -> Option<Outcome> {
        let (site, now_ms, remembered) =
            (self.request.payer.site(), self.shared.now_ms(), &self.shared.remembered);
        let (host, port) = (job.endpoint.host(), job.endpoint.port());
        let of_host =
            || served.app.is_chosen().then(|| remembered.host_paused_ms(site, host, port, now_ms))?;
        let (left_ms, why) = None
            .or_else(|| {
                Some((remembered.paused_ms(&job.receiver, now_ms)?, "the provider has asked for a pause"))
            })
            .or_else(|| Some((of_host()?, "the push service does not answer")))
            .or_else(|| {
                let left_ms = remembered.refused_ms(site, self.app, &job.receiver, now_ms)?;
                Some((left_ms, "the provider did not know too many devices of this caller"))
            })?;
        Some(Outcome::Failed { why, retry_after: Some(Duration::from_millis(left_ms)) })
    }

    async fn look_up(&self, job: &Job) -> Result<Found, Outcome> {
        let outbound = &self.shared.outbound;
        let _place = if job.endpoint.has_name() {
            let place = self.shared.lines.take(self.request.payer, [Of::LookUps]).await;
            Some(place.ok_or(Outcome::failed("too many names are looked up already"))?)
        } else {
            None
        };
        outbound.find(&job.endpoint).await.map_err(|error| self.not_answered(job, error))
    }

    /// The outcome of a message to an endpoint of a user that got no answer, which is noted.
    fn not_answered(&self, job: &Job, error: NotAnswered) -> Outcome {
        match error {
            NotAnswered::Forbidden => Outcome::Refused("The endpoint is at an address that is not public."),
            NotAnswered::Failed(why) => {
                self.note_answer(job, false);
                Outcome::failed(why)
            }
        }
    }

    fn note_answer(&self, job: &Job, has_answered: bool) {
        let (host, port) = (job.endpoint.host(), job.endpoint.port());
        let (site, now_ms) = (self.request.payer.site(), self.shared.now_ms());
        self.shared.remembered.note_answer(site, host, port, has_answered, now_ms);
    }

    fn served(&self) -> Option<&Served> {
        self.shared.apps.get(self.app)
    }

    fn device(&self) -> Option<&Device> {
        self.request.devices.get(self.at)
    }
}

impl Attempt {
    async fn run(mut self) -> Tried {
        let made = match self.message.take() {
            Some(message) => Ok(message),
            None => self.make().await.map(Arc::new),
        };
        let message = match made {
            Ok(message) => message,
            Err(outcome) => return (outcome, None),
        };
        let outcome = self.send(&message).await;
        tracing::debug!(
            host = self.job.endpoint.host(),
            outcome = outcome.word(),
            why = outcome.why(),
            "a message to a provider"
        );
        (outcome, Some(message))
    }

    /// Makes the message off the threads that serve requests.
    async fn make(&self) -> Result<Message, Outcome> {
        let (delivery, job) = (self.delivery.clone(), Arc::clone(&self.job));
        let make = move || {
            let (Some(served), Some(device)) = (delivery.served(), delivery.device()) else {
                return Err(Outcome::failed("there is no such device"));
            };
            served.app.make(&delivery.shared, &delivery.request.notification, device, &job)
        };
        let made = self.delivery.shared.work(self.delivery.request.payer, make).await;
        made.unwrap_or(Err(Outcome::failed("too many messages are being made already")))
    }

    async fn send(&mut self, message: &Message) -> Outcome {
        let delivery = &self.delivery;
        let Some(served) = delivery.served() else { return Outcome::failed("there is no such app") };
        let (shared, endpoint) = (&delivery.shared, &self.job.endpoint);
        let mut headers = message.headers.clone();
        if let Some(authorization) = &self.authorization {
            headers.insert(header::AUTHORIZATION, authorization.clone());
        }
        let found = match self.found.take() {
            Some(found) => Ok(found),
            None => shared.outbound.find_fixed(endpoint).await,
        };
        let answer = match found {
            Ok(found) => {
                let wants_body = !served.app.is_chosen();
                shared.outbound.post(endpoint, found, headers, message.body.clone(), wants_body).await
            }
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => self.judge(served, &answer).await,
            Err(error) if served.app.is_chosen() => delivery.not_answered(&self.job, error),
            Err(NotAnswered::Failed(why)) => Outcome::failed(why),
            Err(NotAnswered::Forbidden) => {
                Outcome::failed("the address of the provider may not be connected to")
            }
        }
    }

    /// The meaning of an answer, which is remembered.
    async fn judge(&self, served: &Served, answer: &Answer) -> Outcome {
        let Delivery { shared, request, app, .. } = &self.delivery;
        let outcome = served.app.judge(shared, answer, self.authorization.as_ref()).await;
        let (site, now_ms, remembered) = (request.payer.site(), shared.now_ms(), &shared.remembered);
        if served.app.is_chosen() {
            self.delivery.note_answer(&self.job, true);
        }
        match outcome {
            Outcome::Delivered => {
                if !served.app.is_chosen() {
                    remembered.note_device(site, *app, self.job.receiver, true, now_ms);
                }
                if let Some(mark) = self.mark {
                    remembered.note_delivered(site, mark, now_ms);
                }
            }
            // Where users choose the provider, its answers are theirs, too, and cost nobody else anything.
            Outcome::Gone | Outcome::Refused(_) if !served.app.is_chosen() => {
                remembered.note_device(site, *app, self.job.receiver, false, now_ms);
            }
            Outcome::Failed { retry_after: Some(asked), .. } if asked > PAUSE_MAX => {
                let asked_ms = u64::try_from(asked.as_millis()).unwrap_or(u64::MAX);
                remembered.pause(site, self.job.receiver, now_ms, asked_ms);
            }
            Outcome::Skipped
            | Outcome::Gone
            | Outcome::Unfit(_)
            | Outcome::Refused(_)
            | Outcome::Failed { .. } => {}
        }
        outcome
    }
}

/// The time of tokio's clock, which tests can pause.
#[expect(clippy::disallowed_methods, reason = "the crate waits on tokio's clock, which can be paused")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
