//! The table of endpoints, and the way of a request through it.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::AssertUnwindSafe,
    sync::Arc,
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    response::Response,
    routing::{MethodFilter, MethodRouter},
};
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use ruma::api::{IncomingRequest, path_builder::PathBuilder};

use crate::{
    api::{
        client, endpoints,
        extract::{Auth, Call, Client, MaybeClient, Public},
        limits::{Kind, RateLimits},
        reply::{self, IntoReply},
        unread::Unread,
    },
    env::spent::{Place, Spent},
    error::{Error, Refusal, Result},
    flows::App,
    ids::UserNum,
};

type Handler = Box<dyn Fn(App, Call) -> BoxFuture<'static, Result<Response>> + Send + Sync>;

/// One endpoint at one path.
pub(crate) struct Route {
    /// The path with the names of its parameters: what logs and metrics call it.
    pub(crate) template: &'static str,
    /// Who may call it.
    pub(crate) auth: Auth,
    /// Whether the specification asks for a rate limit.
    pub(crate) rate_limited: bool,
    /// Which limit that is.
    pub(crate) kind: Kind,
    handler: Handler,
}

/// The endpoints of this server.
#[derive(Default)]
pub struct Routes {
    paths: BTreeMap<String, BTreeMap<&'static str, Arc<Route>>>,
}

impl Routes {
    /// Every endpoint.
    pub fn all() -> Self {
        let mut routes = Self::default();
        client::routes(&mut routes);
        routes
    }

    /// An endpoint for everybody.
    pub(crate) fn public<R, T, F, A>(&mut self, handler: F)
    where
        R: IncomingRequest + Send + 'static,
        T: IntoReply + 'static,
        F: Fn(App, Public<R>) -> A + Copy + Send + Sync + 'static,
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add::<R>(Auth::None, move || {
            Box::new(move |app, call| {
                Box::pin(async move { handler(app, Public::try_from(call)?).await?.into_reply() })
            })
        });
    }

    /// An endpoint for those who bring an access token.
    pub(crate) fn client<R, T, F, A>(&mut self, handler: F)
    where
        R: IncomingRequest + Send + 'static,
        T: IntoReply + 'static,
        F: Fn(App, Client<R>) -> A + Copy + Send + Sync + 'static,
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add::<R>(Auth::Token, move || {
            Box::new(move |app, call| {
                Box::pin(async move { handler(app, Client::try_from(call)?).await?.into_reply() })
            })
        });
    }

    /// An endpoint for everybody that does more for those who bring an access token.
    pub(crate) fn maybe_client<R, T, F, A>(&mut self, handler: F)
    where
        R: IncomingRequest + Send + 'static,
        T: IntoReply + 'static,
        F: Fn(App, MaybeClient<R>) -> A + Copy + Send + Sync + 'static,
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add::<R>(Auth::MaybeToken, move || {
            Box::new(move |app, call| {
                Box::pin(async move { handler(app, MaybeClient::try_from(call)?).await?.into_reply() })
            })
        });
    }

    fn add<R: IncomingRequest>(&mut self, auth: Auth, handler: impl Fn() -> Handler) {
        for template in R::PATH_BUILDER.all_paths() {
            let route = Arc::new(Route {
                template,
                auth,
                rate_limited: R::RATE_LIMITED,
                kind: Kind::of(&R::METHOD, template),
                handler: handler(),
            });
            // An event type stands for the state with an empty state key, too.
            if let Some(shorter) = template.strip_suffix("/{state_key}") {
                self.at(shorter, &R::METHOD, &route);
            }
            self.at(template, &R::METHOD, &route);
        }
    }

    fn at(&mut self, template: &str, method: &Method, route: &Arc<Route>) {
        let method = match *method {
            Method::POST => "POST",
            Method::PUT => "PUT",
            Method::DELETE => "DELETE",
            _ => "GET",
        };
        self.paths.entry(plain(template)).or_default().insert(method, route.clone());
    }

    /// Every method and path, with the names of the parameters in braces.
    pub fn list(&self) -> Vec<(&'static str, &'static str)> {
        self.paths
            .values()
            .flat_map(|methods| methods.iter().map(|(method, route)| (*method, route.template)))
            .collect()
    }

    /// What the specification has and this server does not: paths, with and without a slash at their end, and methods.
    fn list_not_served(&self) -> BTreeMap<String, BTreeSet<&'static str>> {
        let mut missing = BTreeMap::<String, BTreeSet<_>>::new();
        for (path, method) in endpoints::list() {
            let path = plain(&path);
            let served = self.paths.get(&path).is_some_and(|methods| methods.contains_key(method));
            if !served {
                missing.entry(format!("{path}/")).or_default().insert(method);
                missing.entry(path).or_default().insert(method);
            }
        }
        missing
    }

    /// A slash more or less at the end makes no difference, unless it is an endpoint of its own.
    fn with_slashes(mut self) -> Self {
        let others: Vec<_> = self
            .paths
            .iter()
            .map(|(path, methods)| {
                let other = path.strip_suffix('/').map_or_else(|| format!("{path}/"), str::to_owned);
                (other, methods.clone())
            })
            .collect();
        for (path, methods) in others {
            let here = self.paths.entry(path).or_default();
            for (method, route) in methods {
                here.entry(method).or_insert(route);
            }
        }
        self
    }
}

/// The path with its parameters numbered: different endpoints name one place differently.
fn plain(template: &str) -> String {
    let mut count = 0;
    let segments = template.split('/').map(|segment| {
        if segment.starts_with('{') {
            count += 1;
            format!("{{p{count}}}")
        } else {
            segment.to_owned()
        }
    });
    segments.collect::<Vec<_>>().join("/")
}

/// The router of the whole server.
pub fn router(app: &App) -> Router {
    let limits = app.config.limits.rate_limits.then(|| Arc::new(RateLimits::new(&app.config.limits)));
    let mut router = Router::new();
    let routes = Routes::all();
    let specified = routes.list_not_served();
    let mut paths = routes.with_slashes().paths;
    for path in specified.keys() {
        paths.entry(path.clone()).or_default();
    }
    for (path, methods) in paths {
        let mut at_path = MethodRouter::new();
        let not_served = specified.get(&path).into_iter().flatten();
        for &method in not_served.filter(|method| !methods.contains_key(**method)) {
            let app = app.clone();
            at_path = at_path.on(filter(method), move || refuse(app, reply::no_such_endpoint()));
        }
        for (method, route) in methods {
            let (app, limits) = (app.clone(), limits.clone());
            let serve = move |request: Request| serve(app.clone(), limits.clone(), route.clone(), request);
            at_path = at_path.on(filter(method), serve);
        }
        router = router.route(&path, at_path);
    }
    let (not_found, not_allowed) = (app.clone(), app.clone());
    let router = router
        .fallback(move || refuse(not_found.clone(), reply::no_such_endpoint()))
        .method_not_allowed_fallback(move || refuse(not_allowed.clone(), reply::no_such_method()));
    let app = app.clone();
    Router::new().fallback(move |request: Request| outermost(app.clone(), router.clone(), request))
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

/// What the log says of a request that was routed.
#[derive(Clone)]
struct Routed {
    template: &'static str,
    user: Option<UserNum>,
}

/// Around everything: preflight requests, headers for browsers, the log, the figures.
async fn outermost(app: App, router: Router, request: Request) -> Response {
    let began = app.env.instant();
    let method = request.method().clone();
    let spent = Arc::new(Spent::default());
    let (request, unread) = Unread::lend(request);
    let mut response = if method == Method::OPTIONS {
        Response::new(Body::empty())
    } else {
        let answer = spent.during(tower::ServiceExt::oneshot(router, request)).await;
        answer.unwrap_or_else(|never| match never {})
    };
    // Whoever was waited for in vain is not waited for again.
    if let Some(unread) = unread.filter(|_| response.status() != StatusCode::REQUEST_TIMEOUT) {
        unread.drain().await;
    }
    allow_browsers(response.headers_mut());
    let routed = response.extensions_mut().remove::<Routed>();
    let (route, user) = routed.map_or(("none", None), |routed| (routed.template, routed.user));
    let took = app.env.instant().saturating_duration_since(began);
    let status = response.status().as_u16();
    app.metrics.request(&method, route, status, took);
    let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    let user = user.map(|user| user.0);
    tracing::info!(%method, route, status, took_us, user, "request");
    if took.as_millis() > u128::from(app.config.log.slow_request_ms) && !route.ends_with(LONG_POLL) {
        let [queued_us, working_us, receiving_us] =
            [Place::Queued, Place::Working, Place::Receiving].map(|place| spent.us(place));
        let waiting_us = took_us.saturating_sub(queued_us + working_us + receiving_us);
        tracing::warn!(
            %method, route, status, took_us, user, receiving_us, queued_us, working_us, waiting_us,
            "slow request"
        );
    }
    response
}

/// Long polls wait on purpose.
const LONG_POLL: &str = "/sync";

/// Client-server API, "Web Browser Clients".
fn allow_browsers(headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, POST, PUT, DELETE, OPTIONS"),
    );
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("X-Requested-With, Content-Type, Authorization"),
    );
}

async fn serve(app: App, limits: Option<Arc<RateLimits>>, route: Arc<Route>, request: Request) -> Response {
    let mut routed = Routed { template: route.template, user: None };
    let answer = async {
        let mut call = Call::begin(&app, route.auth, request)?;
        routed.user = call.user();
        call.check_guest(route.template)?;
        if route.rate_limited
            && let Some(limits) = limits
            && let Err(wait) = limits.take(route.kind, call.source(), app.env.uptime())
        {
            app.metrics.rate_limited(route.template);
            return Err(reply::too_fast(wait).into());
        }
        call.note_caller(&app).await?;
        call.read_body(&app).await?;
        (route.handler)(app.clone(), call).await
    };
    // A panic ends this request and no other; the hook that logs it is set in `server/logging.rs`.
    let answer = AssertUnwindSafe(answer).catch_unwind().await.unwrap_or_else(|_| {
        app.metrics.panic();
        Err(Error::broken("a handler panicked"))
    });
    let mut response = answer.unwrap_or_else(|error| reply::refuse(&app, error));
    response.extensions_mut().insert(routed);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Config,
        env::Env,
        server::{Lead, Server},
        store::{Durability, Engine, Store, engine::Memory},
    };

    #[tokio::test(start_paused = true)]
    async fn a_panic_ends_its_request_and_no_other() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let server =
            Server::start(Config::default(), Env::simulated(1, 0), store, Some(Lead::of_only_node()))
                .unwrap();
        let app = server.app();
        let route = Route {
            template: "/panics",
            auth: Auth::None,
            rate_limited: false,
            kind: Kind::Other,
            handler: Box::new(|_, _| Box::pin(async { panic!("on purpose") })),
        };
        let response = serve(app.clone(), None, Arc::new(route), Request::new(Body::empty())).await;
        assert_eq!(response.status().as_u16(), 500);
        assert!(app.metrics.text().contains("http_panics_total 1"));
        let request = Request::builder().uri("/_matrix/client/versions").body(Body::empty()).unwrap();
        let after = tower::ServiceExt::oneshot(server.router(), request).await.unwrap();
        assert_eq!(after.status().as_u16(), 200);
    }
}
