//! Pages that end because of what they read, and go on.

use axum::body::Body;
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{pages::read_page, relations::page, *};
use crate::{
    accounts::tokens,
    api::extract::Peer,
    config::{Config, RegistrationMode},
    env::Env,
    rooms::filter::{Filter, Steps},
    server::{Lead, Server},
    store::{Durability, Engine, Store, engine::Memory},
};

struct Here {
    server: Server,
    token: String,
    room: String,
    said: u32,
}

impl Here {
    /// A server on which Alice has a room.
    async fn new() -> Self {
        let mut config = Config::default();
        config.registration.mode = RegistrationMode::Open;
        (config.passwords.argon2_memory_kib, config.passwords.argon2_iterations) = (8, 1);
        config.limits.rate_limits = false;
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let server = Server::start(config, Env::simulated(1, 0), store, Some(Lead::of_only_node())).unwrap();
        let mut here = Self { server, token: String::new(), room: String::new(), said: 0 };
        let alice =
            json!({ "username": "alice", "password": "a password", "auth": { "type": "m.login.dummy" } });
        here.token = here.ask("POST", "register", alice, "access_token").await;
        here.room = here.ask("POST", "createRoom", json!({}), "room_id").await;
        here
    }

    /// Makes a request, and answers this field of its answer.
    async fn ask(&self, method: &str, path: &str, body: Value, field: &str) -> String {
        let request = Request::builder().method(method).uri(format!("/_matrix/client/v3/{path}"));
        let request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        let mut request = request.body(Body::from(body.to_string())).unwrap();
        request.extensions_mut().insert(Peer([192, 0, 2, 1].into()));
        let response = self.server.router().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let json: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(status, StatusCode::OK, "{method} {path}: {json}");
        json[field].as_str().unwrap().to_owned()
    }

    /// Sends a message, which may refer to another in this way.
    async fn say(&mut self, relation: Option<(&str, &str)>) -> String {
        self.said += 1;
        let mut content = json!({ "msgtype": "m.text", "body": "a message" });
        if let Some((rel_type, to)) = relation {
            content["m.relates_to"] = json!({ "rel_type": rel_type, "event_id": to });
        }
        let path = format!("rooms/{}/send/m.room.message/{}", self.room, self.said);
        self.ask("PUT", &path, content, "event_id").await
    }

    /// The room as Alice sees it.
    fn look(&self) -> Look {
        let app = self.server.app();
        let caller = tokens::find_caller(&*app.store.snapshot(), app.env.now_ms(), &self.token).unwrap();
        Look::at(app, &caller, &RoomId::parse(&self.room).unwrap()).unwrap()
    }

    /// All pages of what refers to an event, put together. Each page reads no more than this.
    fn pages(
        &self,
        to: &str,
        direction: Direction,
        rel_type: Option<&str>,
        scanned_max: usize,
    ) -> Vec<String> {
        let look = self.look();
        let mut wanted = RelationsWanted {
            rel_type: rel_type.map(str::to_owned),
            event_type: None,
            from: None,
            to: None,
            direction,
            limit: 4,
            recurse: true,
        };
        let (mut found, parent) = (Vec::new(), EventId::parse(to).unwrap());
        for _ in 0..100 {
            let answer = page(&look, &parent, &wanted, scanned_max).unwrap();
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            let chunk = answer["chunk"].as_array().unwrap();
            assert!(chunk.len() <= 4, "{answer}");
            found.extend(chunk.iter().map(|event| event["event_id"].as_str().unwrap().to_owned()));
            match answer["next_batch"].as_str() {
                Some(next) => wanted.from = Some(next.to_owned()),
                None => return found,
            }
        }
        panic!("the pages do not end");
    }
}

#[tokio::test(start_paused = true)]
async fn pages_of_relations_of_relations_go_on_beyond_what_one_page_reads() {
    let mut here = Here::new().await;
    let root = here.say(None).await;
    let mut expected = Vec::new();
    for number in 0..12 {
        let child = here.say(Some(("m.reference", &root))).await;
        here.say(None).await;
        let grandchild = here.say(Some(("org.test", &child))).await;
        expected.extend([child, grandchild.clone()]);
        if number % 3 == 0 {
            let third = here.say(Some(("m.reference", &grandchild))).await;
            // A fourth step away from the root is too far.
            here.say(Some(("m.reference", &third))).await;
            expected.push(third);
        }
    }
    let reversed: Vec<_> = expected.iter().rev().cloned().collect();
    // The first bound takes all of them in, and the others do not.
    for scanned_max in [1_000, 28, 27, 10, 3, 1] {
        assert_eq!(here.pages(&root, Direction::Up, None, scanned_max), expected, "{scanned_max}");
        assert_eq!(here.pages(&root, Direction::Down, None, scanned_max), reversed, "{scanned_max}");
        let only = here.pages(&root, Direction::Up, Some("org.test"), scanned_max);
        assert_eq!(only.len(), 12, "{scanned_max}");
    }
    here.server.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_page_ends_when_it_has_read_its_share_of_relations_and_goes_on() {
    let mut here = Here::new().await;
    for _ in 0..5 {
        let root = here.say(None).await;
        for _ in 0..3 {
            here.say(Some(("org.other", &root))).await;
        }
    }
    let root = here.say(None).await;
    here.say(Some(("org.wanted", &root))).await;
    let relations = serde_json::from_str(r#"{"related_by_rel_types":["org.wanted"]}"#).unwrap();
    let filter = Filter::new(&ruma::api::client::filter::RoomEventFilter::default(), relations).unwrap();
    let look = here.look();
    let pages = |steps_max: usize| {
        let (mut from, mut found, mut count) = (PageToken(Order::MIN), Vec::new(), 0);
        loop {
            let steps = Steps::of(steps_max);
            let page = read_page(&look, from, None, Direction::Up, 100, &filter, steps).unwrap();
            count += 1;
            found.extend(page.events.iter().map(|(stored, _)| stored.id(&look.room).to_string()));
            match page.next {
                Some(next) => from = next,
                None => return (count, found),
            }
        }
    };
    assert_eq!(pages(1_000), (1, vec![root.clone()]));
    let (count, found) = pages(10);
    assert!((4..=8).contains(&count), "{count}");
    assert_eq!(found, std::slice::from_ref(&root));
    assert_eq!(pages(1).1, [root]);
    here.server.stop().await.unwrap();
}
