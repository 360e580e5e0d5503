//! Other servers read a room's history (server-server API, "Retrieving events").

use aqueduct::rooms::change::Outcome;
use federation::testing::Net;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{
        TestClient, TestServer,
        network::{Peer, doors},
        remote::Remote,
    },
};

/// A room of alice's with three messages in it, and a server that may have somebody there.
struct Scene {
    server: TestServer,
    peer: Peer,
    alice: TestClient,
    room: String,
    messages: Vec<String>,
}

impl Scene {
    async fn new(initial_state: Value) -> Self {
        let net = Net::new(1);
        let store = aqueduct::store::Store::open(
            aqueduct::store::Engine::Memory(Default::default()),
            aqueduct::store::Durability::Fsync,
        );
        let server = TestServer::start(doors(&net), store.unwrap(), |_| {});
        let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
        let alice = server.register("alice").await;
        let room = alice.create(json!({ "preset": "public_chat", "initial_state": initial_state })).await;
        let mut scene = Self { server, peer, alice, room: room.to_string(), messages: Vec::new() };
        for text in ["one", "two", "three"] {
            scene.say(text).await;
        }
        scene
    }

    async fn say(&mut self, text: &str) {
        let path = format!("/_matrix/client/v3/rooms/{}/send/m.room.message/{text}", self.room);
        let (status, sent) = self.alice.put(&path, json!({ "msgtype": "m.text", "body": text })).await;
        assert_eq!(status, StatusCode::OK, "{sent}");
        self.messages.push(sent["event_id"].as_str().unwrap().to_owned());
    }

    fn remote(&self) -> Remote {
        Remote::new(self.server.server().app(), &self.room)
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.peer.ask(&self.server, Method::GET, &format!("/_matrix/federation/v1/{path}"), None).await
    }

    async fn missing(&self, body: Value) -> (StatusCode, Value) {
        let path = format!("/_matrix/federation/v1/get_missing_events/{}", self.room);
        self.peer.ask(&self.server, Method::POST, &path, Some(&body)).await
    }

    /// Every way in which a server reads of this room, about its last message.
    async fn ask_all(&self) -> Vec<(&'static str, StatusCode, Value)> {
        let (room, last) = (&self.room, self.messages.last().unwrap());
        let mut asked = Vec::new();
        for (way, path) in [
            ("event", format!("event/{last}")),
            ("backfill", format!("backfill/{room}?v={last}&limit=2")),
            ("state_ids", format!("state_ids/{room}?event_id={last}")),
            ("event_auth", format!("event_auth/{room}/{last}")),
        ] {
            let (status, json) = self.get(&path).await;
            asked.push((way, status, json));
        }
        let missing = json!({ "earliest_events": [], "latest_events": [last], "limit": 5 });
        let (status, json) = self.missing(missing).await;
        asked.push(("missing", status, json));
        asked
    }
}

fn bodies(pdus: &Value) -> Vec<&str> {
    pdus.as_array().unwrap().iter().map(|pdu| pdu["content"]["body"].as_str().unwrap_or("-")).collect()
}

#[tokio::test(start_paused = true)]
async fn a_server_reads_a_room_only_while_it_is_there_and_admitted() {
    let mut scene = Scene::new(json!([])).await;
    let are_refused = async |scene: &Scene| {
        for (way, status, json) in scene.ask_all().await {
            let expected = if way == "event" { StatusCode::NOT_FOUND } else { StatusCode::FORBIDDEN };
            assert_eq!(status, expected, "{way}: {json}");
        }
    };
    are_refused(&scene).await;
    scene.remote().join().await;
    for (way, status, json) in scene.ask_all().await {
        assert_eq!(status, StatusCode::OK, "{way}: {json}");
    }
    let acl = format!("/_matrix/client/v3/rooms/{}/state/m.room.server_acl", scene.room);
    let set = async |scene: &Scene, content| {
        assert_eq!(scene.alice.put(&acl, content).await.0, StatusCode::OK);
    };
    set(&scene, json!({ "allow": ["*"], "deny": ["b.*"] })).await;
    are_refused(&scene).await;
    set(&scene, json!({ "allow": ["*"] })).await;
    assert!(scene.ask_all().await.iter().all(|(_, status, _)| *status == StatusCode::OK));
    let kick = format!("/_matrix/client/v3/rooms/{}/kick", scene.room);
    assert_eq!(scene.alice.post(&kick, json!({ "user_id": "@bob:b.example" })).await.0, StatusCode::OK);
    // Later events are told to those alone who are there.
    scene.say("four").await;
    are_refused(&scene).await;
}

#[tokio::test(start_paused = true)]
async fn history_comes_as_it_was_signed_in_the_order_of_the_graph() {
    let mut scene = Scene::new(json!([])).await;
    scene.remote().join().await;
    scene.say("four").await;
    let [one, two, three, four] = &scene.messages[..] else { panic!("four messages were sent") };
    let (_, event) = scene.get(&format!("event/{two}")).await;
    assert_eq!((bodies(&event["pdus"]), &event["origin"]), (vec!["two"], &json!("test.example")));
    assert!(event["pdus"][0]["signatures"]["test.example"].is_object());
    assert!(event["pdus"][0].get("unsigned").is_none());

    let room = scene.room.clone();
    let (_, history) = scene.get(&format!("backfill/{room}?v={three}&limit=2")).await;
    assert_eq!(bodies(&history["pdus"]), ["three", "two"]);
    let (_, history) = scene.get(&format!("backfill/{room}?v={four}&limit=1000")).await;
    let pdus = history["pdus"].as_array().unwrap();
    assert_eq!(pdus.last().unwrap()["type"], "m.room.create", "it goes back to the beginning");
    let (_, history) = scene.get(&format!("backfill/{room}?v={one}&v={three}&v=%24nowhere&limit=3")).await;
    assert_eq!(bodies(&history["pdus"]), ["three", "two", "one"]);
    for odd in ["limit=3", "v=%24x", "v=%24x&limit=many", "v=x&limit=1"] {
        let (status, _) = scene.get(&format!("backfill/{room}?{odd}")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{odd}");
    }

    let between = json!({ "earliest_events": [one], "latest_events": [four] });
    let (_, missing) = scene.missing(between).await;
    assert_eq!(bodies(&missing["events"]), ["two", "three", "-"], "bob's join stands among them");
    let nearest = json!({ "earliest_events": [], "latest_events": [three], "limit": 2 });
    assert_eq!(bodies(&scene.missing(nearest).await.1["events"]), ["one", "two"]);
    let deep = json!({ "earliest_events": [], "latest_events": [three], "min_depth": 1_000 });
    assert_eq!(scene.missing(deep).await.1["events"], json!([]));
    let unknown = json!({ "earliest_events": ["$x"], "latest_events": ["$y"] });
    assert_eq!(scene.missing(unknown).await, (StatusCode::OK, json!({ "events": [] })));
}

#[tokio::test(start_paused = true)]
async fn the_state_before_an_event_is_told_with_what_allowed_it() {
    let mut scene = Scene::new(json!([])).await;
    let joined = scene.remote().join().await;
    scene.say("four").await;
    let room = scene.room.clone();
    let ids = async |event: &str| {
        let (status, json) = scene.get(&format!("state_ids/{room}?event_id={event}")).await;
        assert_eq!(status, StatusCode::OK);
        let list = |name: &str| -> Vec<String> { serde_json::from_value(json[name].clone()).unwrap() };
        (list("pdu_ids"), list("auth_chain_ids"))
    };
    let (state, _) = scene.alice.get(&format!("/_matrix/client/v3/rooms/{room}/state")).await;
    assert_eq!(state, StatusCode::OK);
    let (before_join, _) = ids(joined.as_str()).await;
    let (after_join, chain) = ids(&scene.messages[3]).await;
    assert!(!before_join.iter().any(|id| *id == joined) && after_join.iter().any(|id| *id == joined));
    assert_eq!(after_join.len(), before_join.len() + 1);
    let unique: std::collections::BTreeSet<_> = chain.iter().collect();
    assert_eq!(unique.len(), chain.len());
    let (_, auth) = scene.get(&format!("event_auth/{room}/{}", scene.messages[3])).await;
    let types: Vec<_> =
        auth["auth_chain"].as_array().unwrap().iter().map(|pdu| pdu["type"].as_str().unwrap()).collect();
    assert!(types.contains(&"m.room.member") && types.contains(&"m.room.power_levels"), "{types:?}");
    let (status, _) = scene.get(&format!("state_ids/{room}?event_id=%24nowhere")).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn what_a_server_may_not_see_comes_redacted() {
    let visibility = json!([{ "type": "m.room.history_visibility", "state_key": "", "content": { "history_visibility": "joined" } }]);
    let mut scene = Scene::new(visibility).await;
    scene.remote().join().await;
    scene.say("four").await;
    let room = scene.room.clone();
    let four = scene.messages[3].clone();
    let (_, history) = scene.get(&format!("backfill/{room}?v={four}&limit=5")).await;
    assert_eq!(bodies(&history["pdus"]), ["four", "-", "-", "-", "-"]);
    let ours = &history["pdus"][2];
    assert_eq!(
        (&ours["content"], ours["hashes"].is_object()),
        (&json!({}), true),
        "it is redacted, and verifies"
    );
    let (_, event) = scene.get(&format!("event/{}", scene.messages[0])).await;
    assert_eq!(event["pdus"][0]["content"], json!({}));
    let missing = json!({ "earliest_events": [], "latest_events": [four] });
    assert!(!scene.missing(missing).await.1.to_string().contains("three"));
}

#[tokio::test(start_paused = true)]
async fn what_is_in_the_state_of_now_comes_whole_whatever_its_server_saw_of_the_past() {
    let visibility = json!([{ "type": "m.room.history_visibility", "state_key": "", "content": { "history_visibility": "joined" } }]);
    let mut scene = Scene::new(visibility).await;
    let mut set = Vec::new();
    for deny in [json!(["evil.example"]), json!([])] {
        let path = format!("/rooms/{}/state/m.room.server_acl/", scene.room);
        let content = json!({ "allow": ["*"], "deny": deny });
        let answer = scene.alice.ok_put(&path, content).await;
        set.push(answer["event_id"].as_str().unwrap().to_owned());
    }
    scene.remote().join().await;
    scene.say("four").await;
    let newest = scene.messages[3].clone();
    let (_, history) = scene.get(&format!("backfill/{}?v={newest}&limit=4", scene.room)).await;
    let lists: Vec<_> =
        history["pdus"].as_array().unwrap().iter().filter(|pdu| pdu["type"] == "m.room.server_acl").collect();
    assert_eq!(lists.len(), 2, "{history}");
    let whole = json!({ "allow": ["*"], "deny": [] });
    for (id, content) in [(&set[0], json!({})), (&set[1], whole)] {
        let (status, json) = scene.get(&format!("event/{id}")).await;
        assert_eq!((status, &json["pdus"][0]["content"]), (StatusCode::OK, &content));
        assert_eq!(lists.iter().filter(|pdu| pdu["content"] == content).count(), 1, "{history}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_erased_user_wrote_comes_redacted_to_servers_that_were_not_there() {
    let mut scene = Scene::new(json!([])).await;
    let carol = scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", scene.room), json!({})).await;
    let before = carol.say(&scene.room, "1", "secret").await;
    scene.remote().join().await;
    let after = carol.say(&scene.room, "2", "told").await;
    let body = async |event: &str| {
        let (status, json) = scene.get(&format!("event/{event}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        json["pdus"][0]["content"]["body"].clone()
    };
    assert_eq!((body(&before).await, body(&after).await), (json!("secret"), json!("told")));
    let auth = json!({
        "type": "m.login.password", "password": "password of carol",
        "identifier": { "type": "m.id.user", "user": "carol" },
    });
    carol.ok_post("/account/deactivate", json!({ "auth": auth, "erase": true })).await;
    assert_eq!((body(&before).await, body(&after).await), (json!(null), json!("told")));
    let room = scene.room.clone();
    scene.say("four").await;
    let (_, history) = scene.get(&format!("backfill/{room}?v={}&limit=100", scene.messages[3])).await;
    assert!(!history.to_string().contains("secret") && history.to_string().contains("told"));
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_kept_aside_is_shown_as_the_visibility_of_history_says() {
    let visibility = json!([{ "type": "m.room.history_visibility", "state_key": "", "content": { "history_visibility": "joined" } }]);
    let scene = Scene::new(visibility).await;
    let carl = Remote { user: "@carl:c.example".try_into().unwrap(), ..scene.remote() };
    carl.join().await;
    let levels = |carl: u64| json!({ "users": { "@carl:c.example": carl } });
    let path = format!("/rooms/{}/state/m.room.power_levels/", scene.room);
    scene.alice.ok_put(&path, levels(50)).await;
    let topic = carl.event("m.room.topic", Some(""), json!({ "topic": "late" }), &carl.heads());
    let id = topic.id().to_string();
    scene.alice.ok_put(&path, levels(0)).await;
    assert!(matches!(carl.send(topic).await, Outcome::Aside(..)));
    scene.remote().join().await;
    let (status, json) = scene.get(&format!("event/{id}")).await;
    assert_eq!((status, &json["pdus"][0]["content"]), (StatusCode::OK, &json!({})));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_was_removed_reads_what_stands_below_that_and_nothing_later() {
    let mut scene = Scene::new(json!([])).await;
    scene.remote().join().await;
    scene.say("four").await;
    let room = scene.room.clone();
    let kick = format!("/_matrix/client/v3/rooms/{room}/kick");
    assert_eq!(scene.alice.post(&kick, json!({ "user_id": "@bob:b.example" })).await.0, StatusCode::OK);
    let member =
        format!("/_matrix/client/v3/rooms/{room}/state/m.room.member/%40bob%3Ab.example?format=event");
    let removed = scene.alice.get(&member).await.1["event_id"].as_str().unwrap().to_owned();
    // It was told of the removal, and may lack what that stands on.
    let ways = |id: &str| {
        [
            format!("backfill/{room}?v={id}&limit=2"),
            format!("state_ids/{room}?event_id={id}"),
            format!("state/{room}?event_id={id}"),
            format!("event_auth/{room}/{id}"),
        ]
    };
    for path in ways(&removed) {
        let (status, json) = scene.get(&path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {json}");
    }
    // It has each event of the states whose ids it is told, and each that allowed one of them.
    let (_, ids) = scene.get(&format!("state_ids/{room}?event_id={removed}")).await;
    for id in ["pdu_ids", "auth_chain_ids"].iter().flat_map(|list| ids[list].as_array().unwrap()) {
        let (status, json) = scene.get(&format!("event/{}", id.as_str().unwrap())).await;
        assert_eq!(status, StatusCode::OK, "{id}: {json}");
    }
    let missing = |id: &str| json!({ "earliest_events": [], "latest_events": [id], "limit": 1 });
    let (_, events) = scene.missing(missing(&removed)).await;
    assert_eq!(bodies(&events["events"]), ["four"]);
    scene.say("five").await;
    let five = scene.messages.last().unwrap().clone();
    for path in ways(&five) {
        let (status, json) = scene.get(&path).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{path}: {json}");
    }
    assert_eq!(scene.missing(missing(&five)).await.0, StatusCode::FORBIDDEN);
    assert_eq!(scene.get(&format!("event/{five}")).await.0, StatusCode::NOT_FOUND);
    let four = scene.messages[scene.messages.len() - 2].clone();
    assert_eq!(scene.get(&format!("event/{four}")).await.0, StatusCode::OK);
    // The access list keeps it out of everything.
    let acl = format!("/_matrix/client/v3/rooms/{room}/state/m.room.server_acl");
    let denied = json!({ "allow": ["*"], "deny": ["b.*"] });
    assert_eq!(scene.alice.put(&acl, denied).await.0, StatusCode::OK);
    assert_eq!(scene.missing(missing(&removed)).await.0, StatusCode::FORBIDDEN);
    assert_eq!(scene.get(&format!("event/{four}")).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn a_message_whose_lifetime_is_over_is_given_to_no_server_in_any_form() {
    let mut scene = Scene::new(json!([])).await;
    scene.remote().join().await;
    let retention = format!("/_matrix/client/v3/rooms/{}/state/m.room.retention/", scene.room);
    let minute_ms = 60 * 1000;
    assert_eq!(scene.alice.put(&retention, json!({ "max_lifetime": minute_ms })).await.0, StatusCode::OK);
    scene.server.server().app().env.sleep(std::time::Duration::from_millis(minute_ms + 3_000)).await;
    let over = scene.messages.clone();
    scene.say("four").await;
    for id in &over {
        assert_eq!(scene.get(&format!("event/{id}")).await.0, StatusCode::NOT_FOUND);
    }
    let four = scene.messages.last().unwrap();
    let (_, filled) = scene.get(&format!("backfill/{}?v={four}&limit=100", scene.room)).await;
    let missing = json!({ "earliest_events": [], "latest_events": [four], "limit": 20 });
    let (_, missed) = scene.missing(missing).await;
    for (way, pdus) in [("backfill", &filled["pdus"]), ("missing", &missed["events"])] {
        let pdus = pdus.as_array().unwrap();
        assert!(
            !pdus.iter().any(|pdu| pdu["type"] == "m.room.message" && pdu["content"] == json!({})),
            "{way}"
        );
        // The events below them are given all the same.
        assert!(pdus.iter().any(|pdu| pdu["type"] == "m.room.create"), "{way}: {pdus:?}");
    }
}
