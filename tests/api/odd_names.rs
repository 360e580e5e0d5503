//! Names that JSON has to escape: whatever people call their rooms, devices, keys and transactions, every answer that
//! anybody gets is JSON. `TestServer::raw` fails on one that is not.

use aqueduct::api::Routes;
use http::{Method, StatusCode};
use proptest::{prelude::*, sample::select};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, remote::Remote},
};

/// Texts that end a string early, or that only look as if they could.
const ODD: [&str; 14] = [
    "\"",
    "x\"y",
    "\",\"x\":\"",
    "\"}",
    "\\",
    "a\\\"b",
    "\u{0}",
    "a\nb",
    "\u{1f}\u{7f}",
    "\u{2028}",
    "\u{2029}x",
    "{",
    "]",
    "\u{feff}",
];

fn odd_name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => select(ODD.to_vec()).prop_map(str::to_owned),
        1 => any::<String>().prop_map(|text| text.chars().take(12).collect()),
        1 => "[\"\\\\\u{0}-\u{1f}{}\u{2028}a]{1,6}",
    ]
}

/// A server with two people in one room.
struct Scene {
    server: TestServer,
    alice: TestClient,
    bob: TestClient,
    room: String,
    event: String,
}

impl Scene {
    async fn new(version: &str) -> Self {
        let server = TestServer::new();
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let create = json!({ "preset": "public_chat", "room_version": version, "room_alias_name": "here" });
        let room = alice.create(create).await;
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        let event = alice.say(&room, "1", "hello").await;
        Self { server, alice, bob, room, event }
    }

    /// The path of an endpoint with parameters that fit, or, where they may be anything, with these.
    fn path(&self, template: &str, names: &[String; 3]) -> String {
        let mut names = names.iter().cycle();
        let segments = template.split('/').map(|segment| match segment.strip_prefix('{') {
            None => segment.to_owned(),
            Some(name) => encoded(match name.trim_end_matches('}') {
                "room_id" | "room_id_or_alias" => &self.room,
                "event_id" => &self.event,
                "user_id" => &self.alice.user_id,
                "device_id" => &self.alice.device_id,
                "room_alias" => "#here:test.example",
                "scope" => "global",
                "receipt_type" => "m.read",
                "field" => "displayname",
                _ => names.next().unwrap(),
            }),
        });
        segments.collect::<Vec<_>>().join("/")
    }

    /// Gives this name to everything that a client may name. A name that is refused is refused in JSON, too.
    async fn name_everything(&self, names: &[String; 3]) {
        let [one, two, three] = names;
        let (alice, room, event, user) =
            (&self.alice, encoded(&self.room), encoded(&self.event), encoded(&self.alice.user_id));
        let (first, second, dollar) = (encoded(one), encoded(two), format!("${two}"));
        let at = |rest: String| format!("/_matrix/client/v3{rest}");
        let relation = |rel_type: &str, event_id: &str| json!({ "body": three, "m.relates_to": { "rel_type": rel_type, "event_id": event_id, "key": one } });
        for (path, body) in [
            (format!("/rooms/{room}/state/{first}/{second}"), json!({ three: one })),
            (format!("/rooms/{room}/state/m.room.redaction/{first}"), json!({ "redacts": dollar })),
            (format!("/rooms/{room}/state/m.room.topic"), json!({ "topic": one })),
            (format!("/rooms/{room}/state/m.room.history_visibility/{first}"), json!({ "x": two })),
            (format!("/rooms/{room}/send/m.room.redaction/{first}"), json!({ "redacts": dollar })),
            (format!("/rooms/{room}/send/{first}/{second}"), relation(three, &dollar)),
            (format!("/rooms/{room}/send/{first}/a{second}"), relation("m.thread", &self.event)),
            (format!("/rooms/{room}/send/{first}/b{second}"), relation("m.reference", &self.event)),
            (format!("/rooms/{room}/send/{first}/c{second}"), relation("m.annotation", &self.event)),
            (format!("/rooms/{room}/send/m.room.message/d{second}"), relation("m.replace", &self.event)),
            (format!("/user/{user}/account_data/{first}"), json!({ two: three })),
            (format!("/user/{user}/rooms/{room}/account_data/{first}"), json!({ two: three })),
            (format!("/user/{user}/rooms/{room}/tags/{first}"), json!({ "order": 0.5, two: three })),
            (format!("/profile/{user}/displayname"), json!({ "displayname": one })),
            (format!("/profile/{user}/{first}"), json!({ one: two })),
            (format!("/devices/{}", encoded(&alice.device_id)), json!({ "display_name": one })),
            (format!("/presence/{user}/status"), json!({ "presence": "online", "status_msg": one })),
            (
                format!("/sendToDevice/{first}/{second}"),
                json!({ "messages": { &self.alice.user_id: { "*": { two: three } } } }),
            ),
            (
                format!("/pushrules/global/override/{first}"),
                json!({ "actions": [one], "conditions": [{ "kind": two, "key": three }] }),
            ),
            (
                format!("/directory/room/{}", encoded(&format!("#{one}:test.example"))),
                json!({ "room_id": self.room }),
            ),
        ] {
            self.allow(alice.put(&at(path), body).await);
        }
        let state = json!([{ "type": one, "state_key": two, "content": { three: one, "redacts": dollar } }]);
        for (path, body) in [
            (
                "/createRoom".to_owned(),
                json!({ "name": one, "topic": two, "initial_state": state, "invite": [self.bob.user_id] }),
            ),
            (format!("/rooms/{room}/kick"), json!({ "user_id": self.bob.user_id, "reason": one })),
            (format!("/rooms/{room}/invite"), json!({ "user_id": self.bob.user_id, "reason": two })),
            (format!("/rooms/{room}/receipt/m.read/{event}"), json!({ "thread_id": one })),
            (format!("/rooms/{room}/read_markers"), json!({ "m.fully_read": dollar, "m.read": self.event })),
            (
                format!("/user/{user}/filter"),
                json!({ "room": { "timeline": { "types": [one], "not_types": [two] } } }),
            ),
            (
                "/keys/upload".to_owned(),
                json!({ "one_time_keys": { format!("signed_curve25519:{one}"): { "key": two } } }),
            ),
            ("/keys/query".to_owned(), json!({ "device_keys": { &self.alice.user_id: [one] } })),
            (
                "/pushers/set".to_owned(),
                json!({ "app_id": one, "pushkey": two, "kind": "http", "app_display_name": three,
                "device_display_name": one, "lang": two, "data": { "url": "https://example.org/_matrix/push/v1/notify" } }),
            ),
            ("/user_directory/search".to_owned(), json!({ "search_term": one })),
            ("/publicRooms".to_owned(), json!({ "filter": { "generic_search_term": one } })),
            (
                "/login".to_owned(),
                json!({ "type": "m.login.password", "password": "password of alice", "device_id": one,
                "initial_device_display_name": two, "identifier": { "type": "m.id.user", "user": "alice" } }),
            ),
        ] {
            self.allow(alice.post(&at(path), body).await);
        }
        self.allow(
            alice.put(&at(format!("/rooms/{room}/redact/{event}/{first}")), json!({ "reason": two })).await,
        );
        self.allow(self.bob.post(&at(format!("/join/{room}")), json!({ "reason": one })).await);
    }

    /// Every endpoint is called with these in its path and in its body.
    async fn call_every_endpoint(&self, names: &[String; 3]) {
        let [one, two, three] = names;
        let body = json!({ "name": one, "reason": two, "user_id": three, "topic": one, two: three, "filter": {}, "device_id": one });
        for (method, template) in Routes::all().list() {
            let is_an_end = ["logout", "deactivate", "/account/password", "/delete", "/leave", "/forget"];
            if is_an_end.iter().any(|word| template.contains(word)) || method == "DELETE" || is_page(template)
            {
                continue;
            }
            self.call(&self.alice, method, &self.path(template, names), &body).await;
        }
    }

    /// Everybody reads all there is to read.
    async fn read_everything(&self, since: &str, names: &[String; 3]) {
        for who in [&self.alice, &self.bob] {
            for (method, template) in Routes::all().list() {
                if method == "GET" && !template.ends_with("/sync") && !is_page(template) {
                    self.call(who, method, &self.path(template, names), &Value::Null).await;
                }
            }
            let room = encoded(&self.room);
            let filter = encoded(
                &json!({ "room": { "state": { "lazy_load_members": true }, "include_leave": true } })
                    .to_string(),
            );
            for query in [
                "sync".to_owned(),
                "sync?full_state=true".to_owned(),
                format!("sync?since={since}"),
                format!("sync?since={since}&use_state_after=true"),
                format!("sync?filter={filter}"),
                format!("rooms/{room}/messages?dir=b&limit=1000"),
                format!("rooms/{room}/messages?dir=f&filter={filter}"),
                format!("rooms/{room}/threads"),
            ] {
                let version = if query.ends_with("threads") { "v1" } else { "v3" };
                let (status, json) = who.get(&format!("/_matrix/client/{version}/{query}")).await;
                assert_eq!(status, StatusCode::OK, "{query}: {json}");
            }
        }
    }

    async fn call(&self, who: &TestClient, method: &str, path: &str, body: &Value) {
        let method: Method = method.parse().unwrap();
        let (status, json) = self.server.raw(method, path, who.token.as_deref(), body.to_string()).await;
        // Another server that is asked for a file is not there.
        let is_of_others = path.contains("/media/") && matches!(status.as_u16(), 502 | 504);
        if !is_of_others {
            self.allow((status, json));
        }
    }

    /// Asserts that the request is answered or refused, and that no fault of ours shows.
    fn allow(&self, (status, json): (StatusCode, Value)) {
        assert!(!status.is_server_error() || json["errcode"] == "M_UNRECOGNIZED", "{status} {json}");
    }
}

/// Whether an endpoint answers a page for people, which is HTML.
fn is_page(template: &str) -> bool {
    template == "/" || template.ends_with("/fallback/web") || template.ends_with("/unsubscribe")
}

fn in_paused_time(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.unwrap().block_on(test);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 50, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_things_are_called_every_answer_is_json(
        version in select(vec!["5", "10", "11", "12"]),
        names in prop::collection::vec([odd_name(), odd_name(), odd_name()], 1..4),
    ) {
        in_paused_time(async {
            let scene = Scene::new(version).await;
            let since = scene.bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
            for names in &names {
                scene.name_everything(names).await;
                scene.call_every_endpoint(names).await;
            }
            scene.read_everything(&since, &names[0]).await;
        });
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_can_make_the_answers_of_others_unreadable_by_an_id() {
    let server = TestServer::new();
    let (mallory, victim) = (server.register("mallory").await, server.register("victim").await);
    let odd = json!({ "redacts": "$x\"y" });
    let room = mallory.create(json!({ "preset": "public_chat" })).await;
    victim.ok_post(&format!("/join/{room}"), json!({})).await;
    let path = format!("/_matrix/client/v3/rooms/{room}/state/m.room.redaction/");
    let (status, json) = mallory.put(&path, odd.clone()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{json}");
    let state = json!([{ "type": "m.room.redaction", "state_key": "", "content": odd }]);
    let create = json!({ "initial_state": state, "invite": [victim.user_id] });
    let (status, json) = mallory.post("/_matrix/client/v3/createRoom", create).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{json}");
    // Another server may send what this one refuses.
    let bob = Remote::new(server.server().app(), &room);
    bob.join().await;
    for (state_key, content) in [(Some(bob.user.as_str()), odd.clone()), (None, odd.clone())] {
        bob.send(bob.event("m.room.redaction", state_key, content, &bob.heads())).await;
    }
    victim.ok_get("/sync").await;
    victim.ok_get(&format!("/rooms/{room}/messages?dir=b")).await;
    victim.ok_get(&format!("/rooms/{room}/state")).await;
}
