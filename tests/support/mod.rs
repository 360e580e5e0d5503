//! A whole server in memory: the real router over the memory engine, with a clock that begins at a fixed moment and
//! randomness from a seed.

pub(crate) mod remote;

use aqueduct::{
    api::extract::Peer,
    config::Config,
    env::Env,
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Memory},
};
use axum::body::Body;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

/// The time at which every test begins: 2026-01-01, in milliseconds since the epoch.
pub(crate) const BEGAN_MS: u64 = 1_767_225_600_000;

/// A server in memory. Use it inside `#[tokio::test(start_paused = true)]`.
#[derive(Clone)]
pub(crate) struct TestServer {
    server: Server,
}

impl TestServer {
    /// A server with the default settings, open registration and no rate limits.
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// Like [`TestServer::new`], with the settings as this function has changed them.
    pub(crate) fn with(change: impl FnOnce(&mut Config)) -> Self {
        Self::over(Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap(), change)
    }

    /// Like [`TestServer::with`], over this store.
    pub(crate) fn over(store: Store, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.server.name = "test.example".try_into().unwrap();
        config.registration.mode = aqueduct::config::RegistrationMode::Open;
        // The smallest costs that argon2 takes, because tests hash many passwords.
        config.passwords.argon2_memory_kib = 8;
        config.passwords.argon2_iterations = 1;
        config.limits.rate_limits = false;
        change(&mut config);
        let server =
            Server::start(config, Env::simulated(1, BEGAN_MS), store, Some(Lead::of_only_node())).unwrap();
        Self { server }
    }

    /// A test server around this server, which a test has started itself.
    pub(crate) fn of(server: Server) -> Self {
        Self { server }
    }

    /// The server that the tests run against.
    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Sends a request as it is.
    pub(crate) async fn send(&self, mut request: Request<Body>) -> Response<Body> {
        request.extensions_mut().insert(Peer([192, 0, 2, 1].into()));
        self.server.router().oneshot(request).await.unwrap()
    }

    /// Sends a request with these bytes and reads the answer, which must be JSON (or empty: `null`).
    pub(crate) async fn raw(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: impl Into<Body>,
    ) -> (StatusCode, Value) {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = self.send(request.body(body.into()).unwrap()).await;
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let json = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes)
                .unwrap_or_else(|error| panic!("{status}, not JSON ({error}): {bytes:?}"))
        };
        (status, json)
    }

    /// A client without an account or a token.
    pub(crate) fn anonymous(&self) -> TestClient {
        TestClient { server: self.clone(), token: None, user_id: String::new(), device_id: String::new() }
    }

    /// A client with a fresh account of this name.
    pub(crate) async fn register(&self, name: &str) -> TestClient {
        let body = serde_json::json!({
            "username": name, "password": format!("password of {name}"), "auth": { "type": "m.login.dummy" },
        });
        let (status, json) = self.anonymous().post("/_matrix/client/v3/register", body).await;
        assert_eq!(status, StatusCode::OK, "register {name}: {json}");
        let text = |key: &str| json[key].as_str().unwrap_or_else(|| panic!("no {key} in {json}")).to_owned();
        TestClient {
            server: self.clone(),
            token: Some(text("access_token")),
            user_id: text("user_id"),
            device_id: text("device_id"),
        }
    }
}

/// A user's client, which talks to a [`TestServer`].
#[derive(Clone)]
pub(crate) struct TestClient {
    /// The server that it talks to.
    pub(crate) server: TestServer,
    /// The access token; none for a client that is not logged in.
    pub(crate) token: Option<String>,
    /// The full user id; empty for a client without an account.
    pub(crate) user_id: String,
    /// The id of the device; empty for a client without an account.
    pub(crate) device_id: String,
}

impl TestClient {
    /// `GET`
    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.server.raw(Method::GET, path, self.token.as_deref(), Body::empty()).await
    }

    /// `PUT` with JSON.
    pub(crate) async fn put(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.server.raw(Method::PUT, path, self.token.as_deref(), body.to_string()).await
    }

    /// `POST` with JSON.
    pub(crate) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.server.raw(Method::POST, path, self.token.as_deref(), body.to_string()).await
    }

    /// `DELETE` with JSON.
    pub(crate) async fn delete(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.server.raw(Method::DELETE, path, self.token.as_deref(), body.to_string()).await
    }
}
