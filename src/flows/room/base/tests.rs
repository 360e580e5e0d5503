//! Joins of rooms of other servers, as users of this one see them.

use axum::body::Body;
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::{
    api::extract::Peer,
    config::{Config, RegistrationMode},
    env::Env,
    rooms::{
        self,
        change::elsewhere::{Elsewhere, ROOM, bob},
    },
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Memory},
};

pub(crate) struct Here {
    server: Server,
    token: String,
}

impl Here {
    /// The server `here.example`, on which Bob is registered.
    pub(crate) async fn new() -> Self {
        let mut config = Config::default();
        config.server.name = "here.example".try_into().unwrap();
        config.registration.mode = RegistrationMode::Open;
        (config.passwords.argon2_memory_kib, config.passwords.argon2_iterations) = (8, 1);
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let env = Env::simulated(1, 1_767_225_600_000);
        let server = Server::start(config, env, store, Some(Lead::of_only_node())).unwrap();
        let mut here = Self { server, token: String::new() };
        let bob = json!({ "username": "bob", "password": "a password", "auth": { "type": "m.login.dummy" } });
        here.token = here.ask("POST", "register", bob).await["access_token"].as_str().unwrap().to_owned();
        here
    }

    pub(crate) fn app(&self) -> &App {
        self.server.app()
    }

    pub(crate) async fn ask(&self, method: &str, path: &str, body: Value) -> Value {
        let request = Request::builder().method(method).uri(format!("/_matrix/client/v3/{path}"));
        let request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        let mut request = request.body(Body::from(body.to_string())).unwrap();
        request.extensions_mut().insert(Peer([192, 0, 2, 1].into()));
        let response = self.server.router().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let json = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        assert_eq!(status, StatusCode::OK, "{method} {path}: {json}");
        json
    }

    pub(crate) fn base(&self, room: &Elsewhere) -> Base {
        let app = self.app();
        assert_eq!(app.rooms.next_num(&app.store.view()).unwrap(), ROOM);
        let claim = app.rooms.turns(ROOM).claim_join().unwrap();
        let named = (room.row.id.clone(), room.row.version);
        Base::new(&*app.store.snapshot(), claim, named, "a.example".to_owned()).unwrap()
    }
}

pub(crate) fn events(brought: Vec<Brought>) -> Events {
    Box::new(brought.into_iter().map(Ok))
}

#[tokio::test(start_paused = true)]
async fn a_user_finds_a_room_whole_that_they_joined_on_another_server() {
    let mut elsewhere = Elsewhere::with_members(30);
    let here = Here::new().await;
    let since = here.ask("GET", "sync", Value::Null).await["next_batch"].clone();
    let since = since.as_str().unwrap();
    let brought = elsewhere.brought();
    let join_event = elsewhere.join(&bob());
    join(here.app(), here.base(&elsewhere), events(brought), join_event.clone(), |_| Ok(())).await.unwrap();
    for path in ["sync".to_owned(), format!("sync?since={since}")] {
        let sync = here.ask("GET", &path, Value::Null).await;
        let room = &sync["rooms"]["join"][elsewhere.row.id.as_str()];
        let timeline = room["timeline"]["events"].as_array().unwrap();
        assert_eq!(timeline.len(), 1, "{room}");
        assert_eq!(timeline[0]["event_id"], join_event.id().as_str());
        let state = room["state"]["events"].as_array().unwrap();
        assert_eq!(state.len(), elsewhere.state.len() - 1, "all but the join itself");
        let joined = elsewhere.members("join").len();
        assert_eq!(room["summary"]["m.joined_member_count"], joined, "{room}");
    }
    let room = elsewhere.row.id.as_str();
    let members = here.ask("GET", &format!("rooms/{room}/members?membership=join"), Value::Null).await;
    assert_eq!(members["chunk"].as_array().unwrap().len(), elsewhere.members("join").len());
    let body = json!({ "msgtype": "m.text", "body": "hello" });
    here.ask("PUT", &format!("rooms/{room}/send/m.room.message/1"), body).await;
    let page = here.ask("GET", &format!("rooms/{room}/messages?dir=b"), Value::Null).await;
    assert_eq!(page["chunk"].as_array().unwrap().len(), 2, "{page}");
}

#[tokio::test(start_paused = true)]
async fn a_join_that_fails_leaves_no_room_and_one_that_nobody_waits_for_goes_on() {
    let mut elsewhere = Elsewhere::with_members(30);
    let here = Here::new().await;
    let app = here.app();
    let brought = elsewhere.brought();
    let join_event = elsewhere.join(&bob());
    // The disk fails in the middle.
    let torn = brought.clone().into_iter().map(Ok).take(20);
    let torn = Box::new(torn.chain([Err(Error::broken("a file that ends early"))]));
    let failed = join(app, here.base(&elsewhere), torn, join_event.clone(), |_| Ok(())).await;
    assert!(matches!(failed, Err(Error::Broken(_))), "{failed:?}");
    assert_eq!(rooms::find_room(&app.store.view(), &elsewhere.row.id).unwrap(), None);
    let claim = app.rooms.turns(ROOM).claim_join().unwrap();
    let named = (elsewhere.row.id.clone(), elsewhere.row.version);
    let base = Base::new(&*app.store.snapshot(), claim, named, "a.example".to_owned()).unwrap();
    tokio::select! {
        biased;
        _ = join(app, base, events(brought), join_event, |_| Ok(())) => panic!("it takes several turns"),
        () = std::future::ready(()) => {}
    }
    app.env.sleep(Duration::from_secs(5)).await;
    let joined = here.ask("GET", "joined_rooms", Value::Null).await;
    assert_eq!(joined["joined_rooms"], json!([elsewhere.row.id]));
}

#[tokio::test(start_paused = true)]
async fn a_join_waits_for_its_end_while_another_large_step_takes_long() {
    let mut elsewhere = Elsewhere::with_members(8);
    let here = Here::new().await;
    let app = here.app();
    let brought = elsewhere.brought();
    let join_event = elsewhere.join(&bob());
    let other = app.store.begin_step().unwrap();
    let env = app.env.clone();
    app.env.spawn(async move {
        env.sleep(END_AGAIN * 3 / 2).await;
        drop(other);
    });
    join(app, here.base(&elsewhere), events(brought.clone()), join_event.clone(), |_| Ok(())).await.unwrap();
    let joined = here.ask("GET", "joined_rooms", Value::Null).await;
    assert_eq!(joined["joined_rooms"], json!([elsewhere.row.id]));
    here.ask("PUT", &format!("rooms/{}/send/m.room.message/1", elsewhere.row.id), json!({ "body": "x" }))
        .await;
}
