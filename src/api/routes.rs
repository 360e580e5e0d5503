//! The table of endpoints, and the way of a request through it.

use std::{collections::BTreeMap, panic::AssertUnwindSafe, sync::Arc};

use axum::{Router, body::Body, extract::Request, response::Response, routing::MethodRouter};
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use ruma::api::{IncomingRequest, path_builder::PathBuilder};

use crate::{
    api::{
        client,
        extract::{Auth, Call, Client, MaybeClient, Public},
        reply::{self, IntoReply},
    },
    error::{Error, Refusal, Result},
    flows::App,
};

type Handler = Box<dyn Fn(App, Call) -> BoxFuture<'static, Result<Response>> + Send + Sync>;

/// One endpoint at one path.
pub(crate) struct Route {
    /// The path with the names of its parameters: what logs and metrics call it.
    pub(crate) template: &'static str,
    /// Who may call it.
    pub(crate) auth: Auth,
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
            let route = Arc::new(Route { template, auth, handler: handler() });
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
    pub fn list(&self) -> Vec<(&'static str, String)> {
        self.paths
            .iter()
            .flat_map(|(path, methods)| methods.keys().map(|method| (*method, path.clone())))
            .collect()
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
    let mut router = Router::new();
    for (path, methods) in Routes::all().with_slashes().paths {
        let mut at_path = MethodRouter::new();
        for (method, route) in methods {
            let app = app.clone();
            let serve = move |request: Request| serve(app.clone(), route.clone(), request);
            at_path = match method {
                "POST" => at_path.post(serve),
                "PUT" => at_path.put(serve),
                "DELETE" => at_path.delete(serve),
                _ => at_path.get(serve),
            };
        }
        router = router.route(&path, at_path);
    }
    let (not_found, not_allowed) = (app.clone(), app.clone());
    let router = router
        .fallback(move || {
            unrecognized(not_found.clone(), StatusCode::NOT_FOUND, "There is no such endpoint.")
        })
        .method_not_allowed_fallback(move || {
            unrecognized(
                not_allowed.clone(),
                StatusCode::METHOD_NOT_ALLOWED,
                "The endpoint has no such method.",
            )
        });
    let app = app.clone();
    Router::new().fallback(move |request: Request| outermost(app.clone(), router.clone(), request))
}

async fn unrecognized(app: App, status: StatusCode, message: &str) -> Response {
    reply::refuse(&app, Refusal::unrecognized(message).status(status).into())
}

/// Around everything: preflight requests, panics, headers for browsers.
async fn outermost(app: App, router: Router, request: Request) -> Response {
    if request.method() == Method::OPTIONS {
        let mut response = Response::new(Body::empty());
        allow_browsers(response.headers_mut());
        return response;
    }
    let answer = AssertUnwindSafe(tower::ServiceExt::oneshot(router, request)).catch_unwind().await;
    let mut response = match answer {
        Ok(Ok(response)) => response,
        Err(panic) => {
            let what = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("for an unknown reason");
            reply::refuse(&app, Error::broken(format!("a handler panicked: {what}")))
        }
    };
    allow_browsers(response.headers_mut());
    response
}

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

async fn serve(app: App, route: Arc<Route>, request: Request) -> Response {
    let began = app.env.instant();
    let method = request.method().clone();
    let answer = async {
        let call = Call::read(&app, route.auth, request).await?;
        (route.handler)(app.clone(), call).await
    };
    let response = answer.await.unwrap_or_else(|error| reply::refuse(&app, error));
    let took_us = app.env.instant().saturating_duration_since(began).as_micros();
    tracing::info!(%method, route = route.template, status = response.status().as_u16(), took_us, "request");
    response
}
