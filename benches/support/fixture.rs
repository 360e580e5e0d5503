//! A whole server in the benchmark's process: the real router over RocksDB, with fsync.

use std::{path::Path, sync::Arc};

use aqueduct::{
    api::extract::Peer,
    config::{Config, RegistrationMode},
    env::Env,
    flows::App,
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Rocks},
};
use axum::body::Body;
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

/// A server without sockets.
#[derive(Clone)]
pub(crate) struct Fixture {
    server: Arc<Server>,
}

impl Fixture {
    /// Over the store in this directory.
    pub(crate) fn open(path: &Path, durability: Durability) -> Self {
        Self::open_with(path, durability, |_| {})
    }

    /// The same, with further settings.
    pub(crate) fn open_with(path: &Path, durability: Durability, set: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.server.name = "bench.example".try_into().unwrap();
        config.registration.mode = RegistrationMode::Open;
        config.passwords.argon2_memory_kib = 8;
        config.passwords.argon2_iterations = 1;
        config.limits.rate_limits = false;
        config.search.enabled = false;
        set(&mut config);
        let store = Store::open(Engine::Rocks(Rocks::open(path, 256 << 20).unwrap()), durability).unwrap();
        Self {
            server: Arc::new(
                Server::start(config, Env::real().unwrap(), store, Some(Lead::of_only_node())).unwrap(),
            ),
        }
    }

    /// Its parts.
    pub(crate) fn app(&self) -> &App {
        self.server.app()
    }

    /// Closes the store.
    pub(crate) async fn close(self) {
        self.server.stop().await.unwrap();
    }

    /// Asks, and reads the whole answer: its bytes.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Value,
    ) -> bytes::Bytes {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let mut request = request.body(body).unwrap();
        request.extensions_mut().insert(Peer([192, 0, 2, 1].into()));
        let response = self.server.router().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(status, StatusCode::OK, "{path}: {bytes:?}");
        bytes
    }

    /// The same, with the answer as JSON.
    pub(crate) async fn json(&self, method: Method, path: &str, token: Option<&str>, body: Value) -> Value {
        serde_json::from_slice(&self.ask(method, path, token, body).await).unwrap()
    }

    /// Makes an account; answers its token.
    pub(crate) async fn register(&self, name: &str) -> String {
        let body = json!({ "username": name, "password": name, "auth": { "type": "m.login.dummy" } });
        let json = self.json(Method::POST, "/_matrix/client/v3/register", None, body).await;
        json["access_token"].as_str().unwrap().to_owned()
    }

    /// Logs in; answers the token.
    pub(crate) async fn log_in(&self, name: &str) -> String {
        let body = json!({
            "type": "m.login.password", "password": name, "identifier": { "type": "m.id.user", "user": name },
        });
        let json = self.json(Method::POST, "/_matrix/client/v3/login", None, body).await;
        json["access_token"].as_str().unwrap().to_owned()
    }

    /// Makes a public room; answers its id.
    pub(crate) async fn make_room(&self, token: &str, name: &str) -> String {
        let body = json!({ "name": name, "preset": "public_chat" });
        let json = self.json(Method::POST, "/_matrix/client/v3/createRoom", Some(token), body).await;
        json["room_id"].as_str().unwrap().to_owned()
    }

    /// Joins it.
    pub(crate) async fn join(&self, token: &str, room: &str) {
        let path = format!("/_matrix/client/v3/rooms/{room}/join");
        self.ask(Method::POST, &path, Some(token), json!({})).await;
    }

    /// Sends a message.
    pub(crate) async fn send(&self, token: &str, room: &str, txn: u64) {
        let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{txn}");
        let content =
            json!({ "msgtype": "m.text", "body": "a message of ordinary length, as people write them" });
        self.ask(Method::PUT, &path, Some(token), content).await;
    }
}
