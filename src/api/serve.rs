//! The way of a request through the server. Around everything are the headers for browsers, the log and the figures;
//! inside, one after the other, the caller, the limits, the body and the handler.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, HttpBody},
    extract::Request,
    response::Response,
    routing::{MethodFilter, MethodRouter},
};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use parking_lot::Mutex;
use tracing::Instrument;

use crate::{
    api::{
        answer::{self, Answer},
        budget::{Budget, Held, Large},
        drain::Unread,
        extract::{self, Call},
        head,
        receive::Receiver,
        reply,
        routes::{Route, Routes},
        socket::{self, Inward},
    },
    env::{
        payer::{self, Gate, Payers},
        spent::{Place, Spent},
    },
    error::{Error, Refusal, Result},
    flows::{
        App,
        limits::{Limit, Source},
    },
    ids::UserNum,
};

/// A poll that exceeds its limit waits up to this long for its turn; beyond that, it is refused.
const POLL_PATIENCE: Duration = Duration::from_secs(5);

/// An answer counts as this many bytes while it is being made, because nobody knows how many it comes to have.
const EXPECTED_BYTES: usize = 64 << 10;
/// An answer that may tell of many rooms counts as this many bytes while it is being made.
const EXPECTED_NEWS_BYTES: usize = 1 << 20;

/// The count of an answer that is being made, so that requests that are worked on at the same time do not all find room for
/// answers that do not fit together.
struct Making {
    budget: Budget,
    payers: Payers,
    /// The bytes that the answer counts as before anything of it is read.
    expected: usize,
    made: Mutex<Option<Made>>,
}

/// The part of an answer that is in memory.
struct Made {
    held: Held,
    /// The bytes that were read for it.
    bytes: usize,
    /// The answer is made though there is no room for it.
    large: Option<Large>,
}

impl Gate for Making {
    fn pass(&self) -> Result<()> {
        let mut made = self.made.lock();
        match &*made {
            Some(Made { large: Some(_), .. }) => Ok(()),
            Some(_) => self.budget.require_within_share(self.payers),
            None => {
                let held = self.budget.begin_answer(self.payers, self.expected)?;
                *made = Some(Made { held, bytes: 0, large: None });
                Ok(())
            }
        }
    }

    fn grow(&self, bytes: usize) -> Result<()> {
        let mut made = self.made.lock();
        // Bytes that are read before the first step count with it.
        let Some(Made { held, bytes: all, large }) = &mut *made else { return Ok(()) };
        *all = all.saturating_add(bytes);
        match all.saturating_sub(held.bytes()) {
            0 => Ok(()),
            more => self.budget.grow_answer(held, large, more),
        }
    }

    fn rest(&self) {
        *self.made.lock() = None;
    }
}

/// The door that every request goes through.
#[derive(Clone)]
struct Door {
    app: App,
    budget: Budget,
}

/// Makes the router of the whole server.
pub fn router(app: &App) -> Router {
    let in_flight_max = app.config.limits.in_flight_bytes_max.in_memory();
    let budget = Budget::new(app.env.clone(), app.metrics.clone(), in_flight_max);
    all_behind(Door { app: app.clone(), budget })
}

/// Makes the router of all endpoints behind a door.
fn all_behind(door: Door) -> Router {
    let app = &door.app;
    let mut router = Router::new();
    let (mut paths, not_served) = Routes::all().served_and_not();
    for path in not_served.keys() {
        paths.entry(path.clone()).or_default();
    }
    for (path, methods) in paths {
        let mut at_path = MethodRouter::new();
        let not_served = not_served.get(&path).into_iter().flatten();
        for &method in not_served.filter(|method| !methods.contains_key(**method)) {
            let app = app.clone();
            at_path = at_path.on(filter(method), move || refuse(app, reply::no_such_endpoint()));
        }
        for (method, route) in methods {
            let (door, route) = (door.clone(), Arc::new(route));
            let serve = move |request: Request| door.clone().serve(route.clone(), request);
            at_path = at_path.on(filter(method), serve);
        }
        router = router.route(&path, at_path);
    }
    if let Some(gateway) = &app.push_gateway {
        let (door, gateway) = (door.clone(), gateway.router());
        let serve = move |request: Request| door.clone().push(gateway.clone(), request);
        router = router.route(push_gateway::NOTIFY_PATH, axum::routing::any(serve));
    }
    let (not_found, not_allowed) = (app.clone(), app.clone());
    let router = router
        .fallback(move || refuse(not_found.clone(), reply::no_such_endpoint()))
        .method_not_allowed_fallback(move || refuse(not_allowed.clone(), reply::no_such_method()));
    let (inner, within) = (door.clone(), router.clone());
    let inward = Inward::new(app, door.budget.clone(), move |request| {
        inner.clone().outermost(within.clone(), request).boxed()
    });
    Router::new().fallback(move |mut request: Request| {
        socket::prepare(&mut request, &inward);
        door.clone().outermost(router.clone(), request)
    })
}

fn filter(method: &str) -> MethodFilter {
    match method {
        "POST" => MethodFilter::POST,
        "PUT" => MethodFilter::PUT,
        "DELETE" => MethodFilter::DELETE,
        _ => MethodFilter::GET,
    }
}

async fn refuse(app: App, refusal: Refusal) -> Response {
    reply::refuse(&app, refusal.into())
}

/// The facts about a routed request that the log and the figures tell.
#[derive(Clone, Copy)]
struct Routed {
    template: &'static str,
    user: Option<UserNum>,
    is_long_poll: bool,
}

impl Door {
    /// Surrounds every request: answers preflight requests, adds headers for browsers, writes the log and counts the
    /// figures.
    async fn outermost(self, router: Router, request: Request) -> Response {
        let app = &self.app;
        let began = app.env.instant();
        let (method, peer) = (request.method().clone(), extract::peer(request.extensions()));
        let spent = Arc::new(Spent::default());
        let (request, unread) = Unread::lend(request);
        let mut response = if method == Method::OPTIONS {
            Response::new(Body::empty())
        } else if let Err(refusal) = head::check(&request) {
            reply::refuse(app, refusal.into())
        } else {
            let answer = spent.during(tower::ServiceExt::oneshot(router, request)).await;
            answer.unwrap_or_else(|never| match never {})
        };
        // A body that did not arrive in time is not waited for again.
        if let Some(unread) = unread.filter(|_| response.status() != StatusCode::REQUEST_TIMEOUT) {
            unread.drain().await;
        }
        allow_browsers(response.headers_mut());
        let routed = response.extensions_mut().remove::<Routed>();
        let routed = routed.unwrap_or(Routed { template: "none", user: None, is_long_poll: false });
        let took = app.env.instant().saturating_duration_since(began);
        let status = response.status().as_u16();
        app.metrics.request(&method, routed.template, status, took);
        self.log(&method, status, routed, &spent, took);
        let payers = Payers::of_request(routed.user, peer);
        response.map(|body| Answer::wrap(body, &self.budget, payers))
    }

    /// Writes one line for each request, and a second one for a slow request that says where its time went.
    fn log(&self, method: &Method, status: u16, routed: Routed, spent: &Spent, took: Duration) {
        let Routed { template: route, user, is_long_poll } = routed;
        let user = user.map(|user| user.0);
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        tracing::info!(%method, route, status, took_us, user, "request");
        let places = [Place::Queued, Place::Working, Place::Receiving, Place::Flushing];
        let [queued_us, working_us, receiving_us, flushing_us] = places.map(|place| spent.us(place));
        let busy_us = queued_us + working_us + receiving_us + flushing_us;
        // A poll waits on purpose, so that only the time it spent otherwise counts as slow.
        let slow_us = if is_long_poll { busy_us } else { took_us };
        if u128::from(slow_us) > u128::from(self.app.config.log.slow_request_ms) * 1000 {
            let waiting_us = took_us.saturating_sub(busy_us);
            tracing::warn!(
                %method, route, status, took_us, user, receiving_us, queued_us, working_us, flushing_us, waiting_us,
                "slow request"
            );
        }
    }

    /// Serves one request that was routed, and turns errors and panics into answers.
    async fn serve(self, route: Arc<Route>, request: Request) -> Response {
        let app = &self.app;
        let Route { template, policy, .. } = *route;
        let mut routed = Routed { template, user: None, is_long_poll: policy.is_long_poll };
        let span = tracing::info_span!(
            "request",
            route = template,
            user = tracing::field::Empty,
            room = tracing::field::Empty
        );
        let answer = self.answer(&route, request, &mut routed).instrument(span.clone());
        // A panic ends this request and no other; the hook in `server/logging.rs` logs it.
        let answer = AssertUnwindSafe(answer).catch_unwind().await.unwrap_or_else(|_| {
            app.metrics.panic();
            Err(Error::broken("a handler panicked"))
        });
        let mut response = answer.unwrap_or_else(|error| span.in_scope(|| reply::refuse(app, error)));
        response.extensions_mut().insert(routed);
        response
    }

    /// Hands a notification to the push gateway, which bounds bodies, callers and time itself.
    async fn push(self, gateway: Router, mut request: Request) -> Response {
        let peer = extract::peer(request.extensions());
        request.extensions_mut().insert(push_gateway::Caller(peer));
        let answer = AssertUnwindSafe(tower::ServiceExt::oneshot(gateway, request)).catch_unwind().await;
        let mut response = match answer {
            Ok(answer) => answer.unwrap_or_else(|never| match never {}),
            Err(_) => {
                self.app.metrics.panic();
                reply::refuse(&self.app, Error::broken("the push gateway panicked"))
            }
        };
        // It waits for providers, so that only what it does itself would count as slow.
        let routed = Routed { template: push_gateway::NOTIFY_PATH, user: None, is_long_poll: true };
        response.extensions_mut().insert(routed);
        response
    }

    async fn answer(&self, route: &Route, request: Request, routed: &mut Routed) -> Result<Response> {
        let (app, policy) = (&self.app, &route.policy);
        let peer = extract::peer(request.extensions());
        // A poll that is refused half-way has told nothing, whatever its method is.
        let only_reads = request.method() == Method::GET || policy.is_long_poll;
        let mut call = Call::begin(app, policy, request)?;
        routed.user = call.user();
        tell_span(route, &call);
        if let Some(limit) = policy.limit {
            self.limit(route.template, limit, call.source(limit)).await?;
        }
        let payers = Payers::of_request(call.user(), peer);
        let served = async {
            self.budget.admit(payers).await?;
            call.note_caller(app).await?;
            let mut held = None;
            let is_known = call.is_known();
            let receiver = Receiver { budget: &self.budget, payers, is_known, held: &mut held };
            call.read_body(app, receiver).await?;
            // Others of the same payers may have been answered while this one waited.
            self.budget.require_within_share(payers)?;
            call.prove_origin(app).await?;
            if let Some(held) = held.as_mut().filter(|_| call.is_known()) {
                held.become_known();
            }
            let handled = (route.handler)(app.clone(), call);
            let response = if only_reads {
                payer::behind_gate(self.gate(payers, policy.is_long_poll), handled).await?
            } else {
                // A request that writes is not refused half-way.
                handled.await?
            };
            // An answer in pieces goes on with what the request has asked for.
            let is_whole = response.body().size_hint().exact().is_some();
            Ok(if is_whole { response } else { response.map(|body| answer::holding(body, held)) })
        };
        payers.during(served).await
    }

    /// The gate that a request passes before each step of its answer.
    fn gate(&self, payers: Payers, is_long_poll: bool) -> Arc<dyn Gate> {
        let bytes = if is_long_poll { EXPECTED_NEWS_BYTES } else { EXPECTED_BYTES };
        Arc::new(Making { budget: self.budget.clone(), payers, expected: bytes, made: Mutex::new(None) })
    }

    /// Counts the request for its limit. A poll waits for its turn instead of being refused, so that it gathers more
    /// news for its answer.
    async fn limit(&self, template: &'static str, limit: Limit, source: Source) -> Result<()> {
        let app = &self.app;
        let taken = match limit {
            Limit::Sync => app.limits.take_soon(limit, source, POLL_PATIENCE),
            _ => app.limits.take(limit, source).map(|()| Duration::ZERO),
        };
        match taken {
            Ok(Duration::ZERO) => Ok(()),
            Ok(wait) => {
                tokio::select! {
                    biased;
                    () = app.stopping.cancelled() => {}
                    () = app.env.sleep(wait) => {}
                }
                Ok(())
            }
            Err(refused) => {
                app.metrics.rate_limited(template);
                Err(refused)
            }
        }
    }
}

/// Records the caller and the room in the span of the request, so that log lines name them.
fn tell_span(route: &Route, call: &Call) {
    let span = tracing::Span::current();
    if span.is_disabled() {
        return;
    }
    if let Some(user) = call.user() {
        span.record("user", user.0);
    }
    let mut names = route.template.split('/').filter(|segment| segment.starts_with('{'));
    if let Some(room) = names.position(|name| name == "{room_id}").and_then(|index| call.path().get(index)) {
        span.record("room", room.as_str());
    }
}

/// Allows scripts of any origin (client-server API, "Web Browser Clients").
fn allow_browsers(headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, POST, PUT, DELETE, OPTIONS"),
    );
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static(
            "X-Requested-With, Content-Type, Authorization, If-Match, If-None-Match, If-Range, Range",
        ),
    );
    // Scripts may read these headers of an answer, besides those that every script may read.
    headers.insert(
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static(
            "Retry-After, Content-Disposition, ETag, Accept-Ranges, Content-Range, Content-Length",
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::policy::{Guests, Policy, Who},
        env::Env,
        flows::account::register::{Wish, register_by_operator},
        server::Server,
    };

    /// The door of a server, with a budget of its own.
    fn door(app: &App, budget_bytes: usize) -> Door {
        Door { app: app.clone(), budget: Budget::new(app.env.clone(), app.metrics.clone(), budget_bytes) }
    }

    /// A router in which this handler answers everybody at the path.
    fn router<F>(
        door: &Door,
        template: &'static str,
        handler: impl Fn(App) -> F + Send + Sync + 'static,
    ) -> Router
    where
        F: Future<Output = Result<Response>> + Send + 'static,
    {
        let mut policy = Policy::new(Who::Public, &Method::GET);
        policy.unlimited().guests(Guests::Yes);
        let handler = Arc::new(move |app: App, _| futures_util::FutureExt::boxed(handler(app)));
        let route = Arc::new(Route { template, policy, handler });
        let door = door.clone();
        let serve = move |request: Request| door.clone().serve(route.clone(), request);
        Router::new().route(template, axum::routing::get(serve))
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_ends_its_request_and_no_other() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let router = router(&door(app, 1 << 20), "/panics", |_| async { panic!("on purpose") });
        let request = Request::builder().uri("/panics").body(Body::empty()).unwrap();
        let response = tower::ServiceExt::oneshot(router, request).await.unwrap();
        assert_eq!(response.status().as_u16(), 500);
        assert!(app.metrics.text().contains("http_panics_total 1"));
        let request = Request::builder().uri("/_matrix/client/versions").body(Body::empty()).unwrap();
        let after = tower::ServiceExt::oneshot(server.router(), request).await.unwrap();
        assert_eq!(after.status().as_u16(), 200);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_waited_together_hold_no_more_than_a_share_in_answers() {
        const ANSWER_BYTES: usize = 300 << 10;
        const BUDGET_BYTES: usize = 4 << 20;
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let door = door(app, BUDGET_BYTES);
        let router = router(&door, "/large", |app| async move {
            // All of them were admitted before the first one is made.
            app.env.sleep(Duration::from_secs(1)).await;
            let answer = app.env.blocking(|| Ok(vec![0; ANSWER_BYTES])).await?;
            Ok(Response::new(Body::from(answer)))
        });
        let ask = |last| {
            let mut request = Request::builder().uri("/large").body(Body::empty()).unwrap();
            request.extensions_mut().insert(extract::Peer([192, 0, 2, last].into()));
            door.clone().outermost(router.clone(), request)
        };
        let unread = futures_util::future::join_all((0..100).map(|_| ask(1))).await;
        let held = door.budget.held_by(Payers::of_request(None, [192, 0, 2, 1].into()));
        let share = BUDGET_BYTES / 4;
        assert!((share..=share + ANSWER_BYTES).contains(&held), "{held} bytes are held");
        let made = unread.iter().filter(|response| response.status() == StatusCode::OK).count();
        assert_eq!(made, held / ANSWER_BYTES);
        let others = unread.iter().filter(|response| response.status() == StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(made + others.count(), unread.len());
        assert_eq!(ask(2).await.status(), StatusCode::OK, "a neighbour has a share of its own");
        drop(unread);
        assert_eq!(ask(1).await.status(), StatusCode::OK);
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_are_made_together_count_before_they_are_made() {
        const BUDGET_BYTES: usize = 8 << 20;
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let door = door(app, BUDGET_BYTES);
        let router = router(&door, "/large", |app| async move {
            app.env.blocking(|| Ok(())).await?;
            // The answer grows while others begin.
            app.env.sleep(Duration::from_secs(1)).await;
            Ok(Response::new(Body::from(vec![0; 4 * EXPECTED_BYTES])))
        });
        let ask = |last| {
            let mut request = Request::builder().uri("/large").body(Body::empty()).unwrap();
            request.extensions_mut().insert(extract::Peer([192, 0, 2, last].into()));
            door.clone().outermost(router.clone(), request)
        };
        let (answers, other) = tokio::join!(futures_util::future::join_all((0..100).map(|_| ask(1))), ask(2));
        let made = answers.iter().filter(|response| response.status() == StatusCode::OK).count();
        assert_eq!(made, BUDGET_BYTES / 4 / EXPECTED_BYTES);
        assert_eq!(other.status(), StatusCode::OK, "a neighbour has a share of its own");
        drop((answers, other));
        assert_eq!(door.budget.held_by(Payers::of_request(None, [192, 0, 2, 1].into())), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_grows_beyond_its_share_is_one_of_few() {
        const BUDGET_BYTES: usize = 4 << 20;
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let door = door(app, BUDGET_BYTES);
        let router = router(&door, "/large", |app| async move {
            for _ in 0..4 {
                app.env.blocking(|| payer::grow(BUDGET_BYTES / 8)).await?;
                app.env.sleep(Duration::from_secs(1)).await;
            }
            Ok(Response::new(Body::empty()))
        });
        let ask = |last| {
            let mut request = Request::builder().uri("/large").body(Body::empty()).unwrap();
            request.extensions_mut().insert(extract::Peer([192, 0, 2, last].into()));
            door.clone().outermost(router.clone(), request)
        };
        let made = async |addresses: &[u8]| {
            let answers = futures_util::future::join_all(addresses.iter().map(|last| ask(*last))).await;
            answers.iter().filter(|answer| answer.status() == StatusCode::OK).count()
        };
        assert_eq!(made(&[1, 1]).await, 1, "one payer has one at a time");
        assert_eq!(made(&[1, 2, 3]).await, 2, "there are two at a time");
        assert_eq!(made(&[3]).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_with_the_state_of_a_room_counts_it_before_it_is_made() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let door = door(app, 8 << 20);
        let router = all_behind(door.clone());
        let log_in = Some(crate::accounts::devices::LogIn::default());
        let wish = Wish { username: Some("alice".to_owned()), password: None, log_in, refreshable: false };
        let made = register_by_operator(app, wish, None).await.unwrap();
        let bearer = format!("Bearer {}", made.session.unwrap().tokens.access_token);
        let ask = async |method: &str, path: &str, body: serde_json::Value| {
            let request = Request::builder().method(method).uri(format!("/_matrix/client{path}"));
            let request = request.header(header::AUTHORIZATION, &bearer).body(Body::from(body.to_string()));
            let response = tower::ServiceExt::oneshot(router.clone(), request.unwrap()).await.unwrap();
            let status = response.status().as_u16();
            let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
            (status, serde_json::from_slice::<serde_json::Value>(&body).unwrap())
        };
        let initial_state: Vec<_> = (0..12)
            .map(|n| serde_json::json!({ "type": "x.large", "state_key": n.to_string(), "content": { "x": "x".repeat(60_000) } }))
            .collect();
        let room = serde_json::json!({ "initial_state": initial_state });
        let (_, made) = ask("POST", "/v3/createRoom", room).await;
        let room = made["room_id"].as_str().unwrap().replace('!', "%21").replace(':', "%3A");
        let (_, said) = ask("PUT", &format!("/v3/rooms/{room}/send/x.said/1"), serde_json::json!({})).await;
        let event = said["event_id"].as_str().unwrap().replace('$', "%24");
        let sliding = serde_json::json!({ "lists": { "all": { "ranges": [[0, 9]], "timeline_limit": 1, "required_state": [["*", "*"]] } } });
        let none = serde_json::Value::Null;
        let asked = [
            (
                "GET",
                "/v3/sync?filter={\"room\":{\"timeline\":{\"limit\":1}}}"
                    .replace('"', "%22")
                    .replace('{', "%7B")
                    .replace('}', "%7D"),
                &none,
            ),
            ("POST", "/unstable/org.matrix.simplified_msc3575/sync".to_owned(), &sliding),
            ("GET", format!("/v3/rooms/{room}/context/{event}?limit=0"), &none),
            ("GET", "/v3/initialSync?limit=1".to_owned(), &none),
        ];
        let others = [1, 2].map(|last| Payers::of_request(None, [192, 0, 2, last].into()));
        let large = others.map(|payers| {
            let (mut held, mut large) = (door.budget.charge(payers, 0), None);
            door.budget.grow_answer(&mut held, &mut large, 9 << 20).unwrap();
            large
        });
        for (method, path, body) in &asked {
            let (status, answer) = ask(method, path, (*body).clone()).await;
            assert_eq!((status, &answer["errcode"]), (429, &"M_LIMIT_EXCEEDED".into()), "{path}");
        }
        drop(large);
        for (method, path, body) in &asked {
            let (status, answer) = ask(method, path, (*body).clone()).await;
            assert_eq!(status, 200, "{path} {answer:.200}");
            assert!(answer.to_string().len() > 720_000, "{path}");
        }
    }

    /// The log lines that these facts about a request make.
    fn lines_of(app: &App, is_long_poll: bool, spent: &Spent, took: Duration) -> String {
        let written = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let sink = written.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || Sink(sink.clone())).finish();
        let door = door(app, 1 << 20);
        let routed = Routed { template: "/sync", user: None, is_long_poll };
        tracing::subscriber::with_default(subscriber, || door.log(&Method::GET, 200, routed, spent, took));
        String::from_utf8(written.lock().clone()).unwrap()
    }

    struct Sink(Arc<parking_lot::Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_poll_is_slow_by_the_time_it_worked_and_queued_and_not_by_its_waiting() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let minute = Duration::from_secs(60);
        let waited = lines_of(app, true, &Spent::default(), minute);
        assert!(waited.contains("request") && !waited.contains("slow request"), "{waited}");
        let spent = Spent::default();
        spent.add(Place::Queued, Duration::from_secs(2));
        spent.add(Place::Working, Duration::from_secs(3));
        let worked = lines_of(app, true, &spent, minute);
        for part in ["slow request", "queued_us=2000000", "working_us=3000000", "waiting_us=55000000"] {
            assert!(worked.contains(part), "{part} is not in {worked}");
        }
        // A request that does not wait for news is slow by all of its time.
        assert!(lines_of(app, false, &Spent::default(), minute).contains("slow request"));
    }
}
