//! A whole server in memory: the real router over the memory engine, with a clock that begins at a fixed moment and
//! randomness from a seed.

pub(crate) mod bucket;
pub(crate) mod elsewhere;
pub(crate) mod scripted;
pub(crate) mod federated;
pub(crate) mod guard;
pub(crate) mod network;
pub(crate) mod olm;
pub(crate) mod remote;
pub(crate) mod signed;

pub(crate) use remote::some_hashes;

use std::{path::Path, sync::Arc};

use aqueduct::{
    accounts::users,
    api::extract::Peer,
    config::Config,
    env::Env,
    flows::operator::check::check,
    ids::{RoomNum, UserNum},
    rooms,
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Memory},
};
use axum::body::Body;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use ruma::{RoomId, UserId};
use serde_json::Value;
use tempfile::TempDir;
use tower::ServiceExt;

/// The time at which every test begins: 2026-01-01, in milliseconds since the epoch.
pub(crate) const BEGAN_MS: u64 = 1_767_225_600_000;

/// The name of no event, written as those of room versions 4 and above.
pub(crate) const NOWHERE: &str = "$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// A text, encoded so that it can stand in a path or a query.
pub(crate) fn encoded(text: &str) -> String {
    let is_safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| if is_safe(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// Our number of the room with this id.
pub(crate) fn room_num(store: &Store, room_id: &str) -> RoomNum {
    let room_id = <&RoomId>::try_from(room_id).unwrap();
    rooms::find_room(&*store.snapshot(), room_id).unwrap().unwrap()
}

/// Our number of the user with this id.
pub(crate) fn user_num(store: &Store, user_id: &str) -> UserNum {
    let user_id = <&UserId>::try_from(user_id).unwrap();
    users::require_num(&*store.snapshot(), user_id).unwrap()
}

/// A server in memory. Use it inside `#[tokio::test(start_paused = true)]`.
#[derive(Clone)]
pub(crate) struct TestServer {
    server: Server,
    /// The directory of media, which vanishes with the last of its servers.
    media: Arc<TempDir>,
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
        Self::start(Env::simulated(1, BEGAN_MS), store, change)
    }

    /// Like [`TestServer::with`], but with threads and a clock of its own, so that things happen at the same time. Use it
    /// inside `#[tokio::test(flavor = "multi_thread")]`.
    pub(crate) fn real(change: impl FnOnce(&mut Config)) -> Self {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        Self::start(Env::real().unwrap(), store, change)
    }

    /// Like [`TestServer::over`], with these doors.
    pub(crate) fn start(env: Env, store: Store, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_with(env, store, Arc::new(tempfile::tempdir().unwrap()), change)
    }

    /// Like [`TestServer::start`], with the media of this directory.
    pub(crate) fn start_with(
        env: Env,
        store: Store,
        media: Arc<TempDir>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let mut config = Config::default();
        config.server.name = "test.example".try_into().unwrap();
        config.registration.mode = aqueduct::config::RegistrationMode::Open;
        // The smallest costs that argon2 takes, because tests hash many passwords.
        config.passwords.argon2_memory_kib = 8;
        config.passwords.argon2_iterations = 1;
        config.limits.rate_limits = false;
        // An index writes in threads of its own, which only the tests of search need.
        config.search.enabled = false;
        config.media.directory = media.path().join("media");
        change(&mut config);
        Self { server: Server::start(config, env, store, Some(Lead::of_only_node())).unwrap(), media }
    }

    /// A server over what this one leaves on its disk if it is killed now, with this many of the writes that were not synced.
    pub(crate) fn killed(&self, kept: usize) -> Self {
        let Engine::Memory(memory) = self.server.app().store.engine() else { panic!("not in memory") };
        let memory = Engine::Memory(memory.after_crash(kept));
        let store = Store::open(memory, Durability::Fsync).unwrap();
        Self::start_with(Env::simulated(1, BEGAN_MS), store, Arc::clone(&self.media), |_| {})
    }

    /// The directory of media.
    pub(crate) fn media(&self) -> &Path {
        self.media.path()
    }

    /// Requires that a check of the store finds nothing, and answers the number of rows of each table.
    pub(crate) fn assert_whole(&self) -> Vec<(&'static str, u64)> {
        let report = check(&self.server.app().store, &mut |_| ()).unwrap();
        assert_eq!(report.findings, Vec::<String>::new());
        report.rows
    }

    /// The server that the tests run against.
    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Begins some work beside the test, and gives what answers when it is done.
    pub(crate) fn begin<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::sync::oneshot::Receiver<T> {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.server.app().env.spawn(async move { drop(tell.send(work.await)) });
        told
    }

    /// Sends a request as it is.
    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.send_from([192, 0, 2, 1], request).await
    }

    /// Sends a request as it is from this address.
    pub(crate) async fn send_from(&self, address: [u8; 4], mut request: Request<Body>) -> Response<Body> {
        request.extensions_mut().insert(Peer(address.into()));
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
    /// The account on a device with this id, on which it logs in with the password of [`TestServer::register`].
    pub(crate) async fn on_device(&self, device_id: &str) -> Self {
        let name = self.user_id.trim_start_matches('@').split(':').next().unwrap();
        let body = serde_json::json!({
            "type": "m.login.password", "identifier": { "type": "m.id.user", "user": self.user_id },
            "password": format!("password of {name}"), "device_id": device_id,
            "initial_device_display_name": format!("name of {device_id}"),
        });
        let json = self.server.anonymous().ok_post("/login", body).await;
        let token = json["access_token"].as_str().unwrap().to_owned();
        Self { token: Some(token), device_id: device_id.to_owned(), ..self.clone() }
    }

    /// `GET`
    #[must_use = "what was answered is asserted; ok_get requires 200"]
    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.server.raw(Method::GET, path, self.token.as_deref(), Body::empty()).await
    }

    /// `PUT` with JSON.
    #[must_use = "what was answered is asserted; ok_put requires 200"]
    pub(crate) async fn put(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.server.raw(Method::PUT, path, self.token.as_deref(), body.to_string()).await
    }

    /// `POST` with JSON.
    #[must_use = "what was answered is asserted; ok_post requires 200"]
    pub(crate) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.server.raw(Method::POST, path, self.token.as_deref(), body.to_string()).await
    }

    /// `DELETE` with JSON.
    #[must_use = "what was answered is asserted; ok_delete requires 200"]
    pub(crate) async fn delete(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.server.raw(Method::DELETE, path, self.token.as_deref(), body.to_string()).await
    }

    /// `GET` of a path, whole or below `/_matrix/client/v3`, which is answered with 200.
    pub(crate) async fn ok_get(&self, path: &str) -> Value {
        ok("GET", path, self.get(&whole(path)).await)
    }

    /// `PUT` with JSON to such a path, which is answered with 200.
    pub(crate) async fn ok_put(&self, path: &str, body: Value) -> Value {
        ok("PUT", path, self.put(&whole(path), body).await)
    }

    /// `POST` with JSON to such a path, which is answered with 200.
    pub(crate) async fn ok_post(&self, path: &str, body: Value) -> Value {
        ok("POST", path, self.post(&whole(path), body).await)
    }

    /// `DELETE` with JSON of such a path, which is answered with 200.
    pub(crate) async fn ok_delete(&self, path: &str, body: Value) -> Value {
        ok("DELETE", path, self.delete(&whole(path), body).await)
    }
}

/// The whole path for one that may begin below the client-server API.
fn whole(path: &str) -> String {
    if path.starts_with("/_") { path.to_owned() } else { format!("/_matrix/client/v3{path}") }
}

fn ok(method: &str, path: &str, (status, json): (StatusCode, Value)) -> Value {
    assert_eq!(status, StatusCode::OK, "{method} {path}: {json}");
    json
}
