//! The table of endpoints, each with its method, its paths, its [`Policy`] and its handler.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::response::Response;
use futures_util::future::BoxFuture;
use http::Method;

use crate::{
    api::{
        endpoints,
        extract::{Admin, Appservice, Arrival, Asked, Call, Client, Endpoint, MaybeClient, Public, Server},
        policy::Policy,
        reply::IntoReply,
    },
    error::Result,
    flows::App,
};

/// Calls the handler of a route.
pub(crate) type Handler = Arc<dyn Fn(App, Call) -> BoxFuture<'static, Result<Response>> + Send + Sync>;

/// One endpoint at one of its paths.
#[derive(Clone)]
pub(crate) struct Route {
    /// The path with the names of its parameters, by which logs and metrics call it.
    pub(crate) template: &'static str,
    /// The rules that hold before the handler is called.
    pub(crate) policy: Policy,
    /// Reads the rest of the request, and answers it.
    pub(crate) handler: Handler,
}

/// One endpoint with all of its paths, as it was registered.
struct Registered {
    method: Method,
    templates: Vec<&'static str>,
    policy: Policy,
    handler: Handler,
}

/// One endpoint at one path, as `docs/endpoints.md` lists it.
#[derive(Debug)]
pub struct Listed {
    /// The method, in capitals.
    pub method: &'static str,
    /// The path, with the names of the parameters in braces.
    pub path: &'static str,
    /// The rules that hold before its handler is called.
    pub policy: Policy,
}

/// The routes of each path, by method. Parameters in the path are numbered.
pub(crate) type Paths = BTreeMap<String, BTreeMap<&'static str, Route>>;

/// The endpoints of this server.
#[derive(Default)]
pub struct Routes {
    registered: Vec<Registered>,
}

impl Routes {
    /// Registers an endpoint for everybody.
    pub fn public<R: Asked, T: IntoReply + 'static, A>(
        &mut self,
        handler: impl Fn(App, Public<R>) -> A + Copy + Send + Sync + 'static,
    ) -> &mut Policy
    where
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add(handler)
    }

    /// Registers an endpoint for everybody that does more for callers with an access token.
    pub fn maybe_client<R: Asked, T: IntoReply + 'static, A>(
        &mut self,
        handler: impl Fn(App, MaybeClient<R>) -> A + Copy + Send + Sync + 'static,
    ) -> &mut Policy
    where
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add(handler)
    }

    /// Registers an endpoint for callers with an access token.
    pub fn client<R: Asked, T: IntoReply + 'static, A>(
        &mut self,
        handler: impl Fn(App, Client<R>) -> A + Copy + Send + Sync + 'static,
    ) -> &mut Policy
    where
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add(handler)
    }

    /// Registers an endpoint for admins of this server.
    pub fn admin<R: Asked, T: IntoReply + 'static, A>(
        &mut self,
        handler: impl Fn(App, Admin<R>) -> A + Copy + Send + Sync + 'static,
    ) -> &mut Policy
    where
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add(handler)
    }

    /// Registers an endpoint for application services.
    pub fn appservice<R: Asked, T: IntoReply + 'static, A>(
        &mut self,
        handler: impl Fn(App, Appservice<R>) -> A + Copy + Send + Sync + 'static,
    ) -> &mut Policy
    where
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add(handler)
    }

    /// Registers an endpoint for other servers.
    pub fn server<R: Asked, T: IntoReply + 'static, A>(
        &mut self,
        handler: impl Fn(App, Server<R>) -> A + Copy + Send + Sync + 'static,
    ) -> &mut Policy
    where
        A: Future<Output = Result<T>> + Send + 'static,
    {
        self.add(handler)
    }

    fn add<V: Arrival, T: IntoReply + 'static, A>(
        &mut self,
        handler: impl Fn(App, V) -> A + Copy + Send + Sync + 'static,
    ) -> &mut Policy
    where
        A: Future<Output = Result<T>> + Send + 'static,
    {
        let method = <V::Asked as Asked>::Endpoint::method();
        let registered = Registered {
            policy: Policy::new(V::WHO, &method),
            method,
            templates: <V::Asked as Asked>::Endpoint::paths(),
            handler: Arc::new(move |app, call| {
                Box::pin(async move {
                    let arrived = call.arrive::<V>(&app).await?;
                    handler(app, arrived).await?.into_reply()
                })
            }),
        };
        &mut self.registered.push_mut(registered).policy
    }

    /// Lists every method and path, with the names of the parameters in braces.
    pub fn list(&self) -> Vec<(&'static str, &'static str)> {
        self.list_policies().into_iter().map(|listed| (listed.method, listed.path)).collect()
    }

    /// Lists every endpoint with its policy, by path. An endpoint stands there under each name that is registered, and not under
    /// the older ones that follow from these.
    pub fn list_policies(&self) -> Vec<Listed> {
        let paths = self.paths();
        let own = |path: &str, template: &str| path.starts_with(OLDER) == template.starts_with(OLDER);
        let methods = paths.iter().flat_map(|(path, methods)| methods.iter().map(move |it| (path, it)));
        methods
            .filter(|(path, (_, route))| own(path, route.template))
            .map(|(_, it)| it)
            .map(|(&method, route)| Listed { method, path: route.template, policy: route.policy })
            .collect()
    }

    /// Sorts the routes by path and method.
    fn paths(&self) -> Paths {
        let mut paths = Paths::new();
        for it in &self.registered {
            let mut at = |path: &str, template| {
                let route = Route { template, policy: it.policy, handler: it.handler.clone() };
                paths.entry(plain(path)).or_default().insert(name(&it.method), route);
            };
            for &template in &it.templates {
                // Without a state key, the path stands for the state of this type with an empty state key.
                if let Some(shorter) = template.strip_suffix("/{state_key}") {
                    at(shorter, template);
                }
                at(template, template);
            }
        }
        add_older_names(&mut paths);
        paths
    }

    /// Gives the routes by path, then the endpoints of the specification that this server does not serve: the methods
    /// of each path.
    pub(crate) fn served_and_not(&self) -> (Paths, BTreeMap<String, BTreeSet<&'static str>>) {
        let paths = self.paths();
        let mut missing = BTreeMap::<String, BTreeSet<_>>::new();
        for specified in endpoints::list() {
            let path = plain(specified.path);
            let served = paths.get(&path).is_some_and(|methods| methods.contains_key(specified.method));
            if !served {
                missing.entry(format!("{path}/")).or_default().insert(specified.method);
                missing.entry(path).or_default().insert(specified.method);
            }
        }
        (with_slashes(paths), missing)
    }
}

/// The paths of clients from before version 1.1 of the specification begin with this, and later ones with `NEWER`.
const OLDER: &str = "/_matrix/client/r0/";
const NEWER: &str = "/_matrix/client/v3/";

/// Adds each path of version 3 under its older name, where it is not there yet: such clients know all of these endpoints by it, and
/// others use it by habit.
fn add_older_names(paths: &mut Paths) {
    let older = paths.iter().filter_map(|(path, methods)| {
        path.strip_prefix(NEWER).map(|rest| (format!("{OLDER}{rest}"), methods.clone()))
    });
    for (path, methods) in older.collect::<Vec<_>>() {
        let here = paths.entry(path).or_default();
        for (method, route) in methods {
            here.entry(method).or_insert(route);
        }
    }
}

/// Adds each path with a slash more or less at its end. That makes no difference, unless it is an endpoint of its own.
fn with_slashes(mut paths: Paths) -> Paths {
    let others: Vec<_> = paths
        .iter()
        .filter(|(path, _)| *path != "/")
        .map(|(path, methods)| {
            let other = path.strip_suffix('/').map_or_else(|| format!("{path}/"), str::to_owned);
            (other, methods.clone())
        })
        .collect();
    for (path, methods) in others {
        let here = paths.entry(path).or_default();
        for (method, route) in methods {
            here.entry(method).or_insert(route);
        }
    }
    paths
}

/// The method as the table has it; every method that it does not name is a GET.
fn name(method: &Method) -> &'static str {
    match *method {
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        _ => "GET",
    }
}

/// Numbers the parameters of a path, because different endpoints name the same parameter differently.
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
