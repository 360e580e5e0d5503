//! Other servers find rooms: the public directory, spaces, the event nearest to a time; and services find out who a user is.

use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    resident_joins::{Scene, refused},
    rooms::Rooms,
    support::{
        TestServer, encoded,
        network::{Peer, doors},
    },
};

const BOB: &str = "@bob:b.example";

impl Scene {
    async fn ask(&self, path: &str) -> (StatusCode, Value) {
        self.peer.ask(&self.server, Method::GET, &format!("/_matrix/federation/v1/{path}"), None).await
    }

    async fn space(&self, body: Value) -> String {
        let mut body = body;
        body["creation_content"]["type"] = json!("m.space");
        body["room_version"] = json!("10");
        self.alice.create(body).await
    }

    async fn link(&self, space: &str, child: &str, content: Value) {
        let path = format!("/rooms/{}/state/m.space.child/{}", encoded(space), encoded(child));
        self.alice.ok_put(&path, content).await;
    }
}

fn names(rooms: &Value) -> Vec<&str> {
    rooms.as_array().unwrap().iter().map(|room| room["name"].as_str().unwrap_or("-")).collect()
}

async fn with_directory(shows: bool) -> Scene {
    let net = federation::testing::Net::new(1);
    let store = aqueduct::store::Store::open(
        aqueduct::store::Engine::Memory(Default::default()),
        aqueduct::store::Durability::Fsync,
    );
    let change = |config: &mut aqueduct::config::Config| config.federation.public_rooms = shows;
    let server = TestServer::start(doors(&net), store.unwrap(), change);
    let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
    let alice = server.register("alice").await;
    Scene { server, peer, net, alice }
}

#[tokio::test(start_paused = true)]
async fn the_directory_is_shown_to_other_servers_only_where_the_operator_wants_it() {
    for shows in [false, true] {
        let scene = with_directory(shows).await;
        for (name, federate) in [("One", true), ("Two", true), ("Own", false)] {
            let body = json!({
                "preset": "public_chat", "visibility": "public", "name": name,
                "creation_content": { "m.federate": federate },
            });
            scene.alice.create(body).await;
        }
        let (status, page) = scene.ask("publicRooms").await;
        let (path, body) =
            ("/_matrix/federation/v1/publicRooms", json!({ "filter": { "generic_search_term": "two" } }));
        let found = scene.peer.ask(&scene.server, Method::POST, path, Some(&body)).await;
        if !shows {
            assert_eq!(status, StatusCode::FORBIDDEN, "{page}");
            assert_eq!(refused(found), (403, "M_FORBIDDEN".into()));
            continue;
        }
        let mut all = names(&page["chunk"]);
        all.sort_unstable();
        assert_eq!(all, ["One", "Two"], "what is not shared is not shown");
        assert_eq!(names(&found.1["chunk"]), ["Two"]);
        assert_eq!(scene.ask("publicRooms?limit=0").await.1["chunk"].as_array().unwrap().len(), 2);
        let (_, first) = scene.ask("publicRooms?limit=1").await;
        let next = first["next_batch"].as_str().unwrap();
        let (_, second) = scene.ask(&format!("publicRooms?limit=2&since={}", encoded(next))).await;
        let mut both = names(&first["chunk"]);
        both.extend(names(&second["chunk"]));
        both.sort_unstable();
        assert_eq!(both, ["One", "Two"]);
        assert_eq!(refused(scene.ask("publicRooms?since=odd").await), (400, "M_INVALID_PARAM".into()));
        let room_of = |name: &str| {
            let listed = page["chunk"].as_array().unwrap().iter().find(|room| room["name"] == name);
            listed.unwrap()["room_id"].as_str().unwrap().to_owned()
        };
        let path = format!("/rooms/{}/state/m.room.server_acl", encoded(&room_of("One")));
        scene.alice.ok_put(&path, json!({ "allow": ["*"], "deny": ["b.example"] })).await;
        let listed = scene.ask("publicRooms").await.1;
        assert_eq!(names(&listed["chunk"]), ["Two"], "a room is not shown to servers that it does not admit");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_sees_the_rooms_of_a_space_that_its_users_may_enter() {
    let scene = Scene::new().await;
    let named = |name: &str, rest: Value| {
        let mut body = json!({ "name": name, "room_version": "10", "preset": "private_chat" });
        body.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        body
    };
    let rule =
        |content: Value| json!({ "initial_state": [{ "type": "m.room.join_rules", "content": content }] });
    let space = scene.space(json!({ "name": "Space", "preset": "public_chat" })).await;
    let home = scene.room("10").await;
    let allow = json!([{ "type": "m.room_membership", "room_id": home }]);
    let public = scene.alice.create(named("Public", json!({ "preset": "public_chat" }))).await;
    let knock = scene.alice.create(named("Knock", rule(json!({ "join_rule": "knock" })))).await;
    let restricted = rule(json!({ "join_rule": "restricted", "allow": allow }));
    let restricted = scene.alice.create(named("Restricted", restricted)).await;
    let seen =
        json!({ "type": "m.room.history_visibility", "content": { "history_visibility": "world_readable" } });
    let readable = scene.alice.create(named("Readable", json!({ "initial_state": [seen] }))).await;
    let secret = scene.alice.create(named("Secret", json!({}))).await;
    let own = json!({ "preset": "public_chat", "creation_content": { "m.federate": false } });
    let own = scene.alice.create(named("Own", own)).await;
    let via = json!(["test.example"]);
    for (child, content) in [
        (&*public, json!({ "via": via, "order": "b", "suggested": true })),
        (&*knock, json!({ "via": via, "order": "a" })),
        (&*restricted, json!({ "via": via })),
        (&*readable, json!({ "via": via, "order": "c".repeat(51) })),
        (&*secret, json!({ "via": via, "order": "z" })),
        (&*own, json!({ "via": via, "order": "zz" })),
        ("!elsewhere:c.example", json!({ "via": ["c.example"], "order": "zzz" })),
        ("!removed:test.example", json!({ "order": "0" })),
        ("no room", json!({ "via": via })),
    ] {
        scene.link(&space, child, content).await;
        // Children without an order stand by the time at which they were added.
        scene.server.server().app().env.sleep(std::time::Duration::from_millis(2)).await;
    }
    let ask = async || scene.ask(&format!("hierarchy/{}", encoded(&space))).await.1;
    let answer = ask().await;
    assert_eq!(names(&answer["children"]), ["Knock", "Public", "Readable"], "{answer}");
    let inaccessible = |answer: &Value| -> Vec<String> {
        answer["inaccessible_children"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(inaccessible(&answer), [secret.clone(), own.clone(), restricted.clone()]);
    let room = &answer["room"];
    assert_eq!(
        (&room["name"], &room["room_type"], &room["room_version"]),
        (&json!("Space"), &json!("m.space"), &json!("10"))
    );
    let children: Vec<_> = room["children_state"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["state_key"].as_str().unwrap())
        .collect();
    assert_eq!(children, [&*knock, &public, &secret, &own, "!elsewhere:c.example", &restricted, &readable]);
    let first = &room["children_state"][0];
    assert_eq!((&first["type"], &first["sender"]), (&json!("m.space.child"), &json!("@alice:test.example")));
    assert!(first["origin_server_ts"].is_u64() && first["content"]["via"].is_array(), "{first}");
    assert!(answer["children"][0].get("children_state").is_none());

    let (_, suggested) = scene.ask(&format!("hierarchy/{}?suggested_only=true", encoded(&space))).await;
    assert_eq!(names(&suggested["children"]), ["Public"]);
    assert_eq!(suggested["inaccessible_children"], json!([]));

    scene.peer.join(&scene.server, &home, BOB).await;
    let answer = ask().await;
    assert_eq!(names(&answer["children"]), ["Knock", "Public", "Restricted", "Readable"]);
    assert_eq!(answer["children"][2]["allowed_room_ids"], json!([home]));
    assert_eq!(inaccessible(&answer), [secret.clone(), own]);

    scene.set(&public, "m.room.server_acl", json!({ "allow": ["*"], "deny": ["b.example"] })).await;
    assert_eq!(names(&ask().await["children"]), ["Knock", "Restricted", "Readable"]);
    for hidden in [&*secret, "!nowhere:test.example"] {
        let (status, code) = refused(scene.ask(&format!("hierarchy/{}", encoded(hidden))).await);
        assert_eq!((status, &*code), (404, "M_NOT_FOUND"));
    }
    let (_, plain) = scene.ask(&format!("hierarchy/{}", encoded(&home))).await;
    assert_eq!(plain["room"]["children_state"], json!([]));
}

#[tokio::test(start_paused = true)]
async fn a_client_walks_through_a_space_depth_first() {
    let scene = Scene::new().await;
    let via = json!({ "via": ["test.example"] });
    let top = scene.space(json!({ "name": "Top", "preset": "public_chat" })).await;
    let inner = scene.space(json!({ "name": "Inner", "preset": "public_chat" })).await;
    let (mut leaves, mut all) = (Vec::new(), vec!["Top".to_owned(), "Inner".to_owned()]);
    for name in ["A", "B", "C"] {
        leaves.push(scene.alice.create(json!({ "name": name, "preset": "public_chat" })).await);
    }
    let secret = scene.alice.create(json!({ "name": "Secret", "preset": "private_chat" })).await;
    let order = |order: &str| json!({ "via": ["test.example"], "order": order, "suggested": order != "4" });
    scene.link(&top, &inner, order("1")).await;
    scene.link(&top, &leaves[2], order("4")).await;
    scene.link(&inner, &leaves[0], order("2")).await;
    scene.link(&inner, &leaves[1], order("3")).await;
    scene.link(&inner, &secret, via.clone()).await;
    // A loop is walked once.
    scene.link(&inner, &top, via).await;
    all.extend(["A", "B", "C"].map(str::to_owned));
    let bob = scene.server.register("bob").await;
    let path = format!("/_matrix/client/v1/rooms/{}/hierarchy", encoded(&top));
    let page = bob.ok_get(&path).await;
    assert_eq!(names(&page["rooms"]), all);
    assert!(page.get("next_batch").is_none());
    assert_eq!(page["rooms"][1]["children_state"].as_array().unwrap().len(), 4);
    assert_eq!(
        scene.alice.ok_get(&path).await["rooms"].as_array().unwrap().len(),
        6,
        "alice is in the secret room"
    );

    let (mut found, mut from) = (Vec::new(), String::new());
    loop {
        let page = bob.ok_get(&format!("{path}?limit=2{from}")).await;
        found.extend(names(&page["rooms"]).into_iter().map(str::to_owned));
        let Some(next) = page["next_batch"].as_str() else { break };
        from = format!("&from={}", encoded(next));
    }
    assert_eq!(found, all);
    let page = bob.ok_get(&format!("{path}?max_depth=1")).await;
    assert_eq!(names(&page["rooms"]), ["Top", "Inner", "C"]);
    let page = bob.ok_get(&format!("{path}?suggested_only=true")).await;
    assert_eq!(names(&page["rooms"]), ["Top", "Inner", "A", "B"]);
    let next = bob.ok_get(&format!("{path}?limit=1")).await["next_batch"].as_str().unwrap().to_owned();
    for (query, expected) in [
        (format!("?from={}&max_depth=1", encoded(&next)), (400, "M_INVALID_PARAM")),
        (format!("?from={}&suggested_only=true", encoded(&next)), (400, "M_INVALID_PARAM")),
        ("?from=odd".to_owned(), (400, "M_INVALID_PARAM")),
        ("?limit=0".to_owned(), (400, "M_INVALID_PARAM")),
    ] {
        let (status, code) = refused(bob.get(&format!("{path}{query}")).await);
        assert_eq!((status, &*code), expected, "{query}");
    }
    for hidden in [&*secret, "!nowhere:test.example"] {
        let path = format!("/_matrix/client/v1/rooms/{}/hierarchy", encoded(hidden));
        assert_eq!(refused(bob.get(&path).await), (403, "M_FORBIDDEN".into()));
    }
    scene.alice.ok_post(&format!("/rooms/{}/ban", leaves[0]), json!({ "user_id": bob.user_id })).await;
    assert_eq!(names(&bob.ok_get(&path).await["rooms"]), ["Top", "Inner", "B", "C"]);
}

#[tokio::test(start_paused = true)]
async fn a_server_finds_the_event_nearest_to_a_time() {
    let scene = Scene::new().await;
    let room = scene.room("11").await;
    scene.peer.join(&scene.server, &room, BOB).await;
    let mut said = Vec::new();
    for text in ["one", "two", "three"] {
        scene.server.server().app().env.sleep(Duration::from_secs(10)).await;
        let id = scene.alice.say(&room, text, text).await;
        said.push((id, scene.server.server().app().env.now_ms()));
    }
    let at = async |ts: u64, dir: &str| {
        scene.ask(&format!("timestamp_to_event/{}?ts={ts}&dir={dir}", encoded(&room))).await
    };
    let (middle, ms) = said[1].clone();
    for (ts, dir) in [(ms - 1_000, "f"), (ms + 1_000, "b")] {
        let (status, json) = at(ts, dir).await;
        assert_eq!((status, &json["event_id"]), (StatusCode::OK, &json!(middle)), "{dir}: {json}");
        assert!(json["origin_server_ts"].as_u64().unwrap().abs_diff(ms) < 1_000);
    }
    assert_eq!(refused(at(ms + 100_000, "f").await), (404, "M_NOT_FOUND".into()));
    assert_eq!(at(ms, "sideways").await.0, StatusCode::BAD_REQUEST);
    let stranger = Peer::new(&scene.net, "c.example", "5.0.0.3", 3);
    let path = format!("/_matrix/federation/v1/timestamp_to_event/{}?ts=1&dir=f", encoded(&room));
    let asked = stranger.ask(&scene.server, Method::GET, &path, None).await;
    assert_eq!(refused(asked), (403, "M_FORBIDDEN".into()));
}

#[tokio::test(start_paused = true)]
async fn a_service_finds_out_who_a_user_is_by_their_token() {
    let scene = Scene::new().await;
    let path = format!("/user/{}/openid/request_token", scene.alice.user_id);
    let made = scene.alice.ok_post(&path, json!({})).await;
    assert_eq!((&made["token_type"], &made["expires_in"]), (&json!("Bearer"), &json!(3600)));
    assert_eq!(made["matrix_server_name"], "test.example");
    let token = made["access_token"].as_str().unwrap().to_owned();
    let anybody = scene.server.anonymous();
    let info = async |token: &str| {
        anybody.get(&format!("/_matrix/federation/v1/openid/userinfo?access_token={}", encoded(token))).await
    };
    assert_eq!(info(&token).await, (StatusCode::OK, json!({ "sub": "@alice:test.example" })));
    let unknown = (401, "M_UNKNOWN_TOKEN".to_owned());
    let (head, _) = token.split_once('.').unwrap();
    for wrong in
        [&token[1..], &format!("{token}x"), head, "aqo_.", "aqo_%%%.x", "aqo_Ym9i.x", &"x".repeat(2_000)]
    {
        assert_eq!(refused(info(wrong).await), unknown, "{wrong}");
    }
    assert_eq!(refused(info(scene.alice.token.as_ref().unwrap()).await), unknown, "it is for nothing else");
    let none = anybody.get("/_matrix/federation/v1/openid/userinfo").await;
    assert_eq!(refused(none), (401, "M_MISSING_TOKEN".into()));
    let mut as_alice = scene.alice.clone();
    as_alice.token = Some(token.clone());
    assert_eq!(refused(as_alice.get("/_matrix/client/v3/account/whoami").await), unknown);
    let bob = scene.server.register("bob").await;
    let others = bob.post(&format!("/_matrix/client/v3{path}"), json!({})).await;
    assert_eq!(refused(others), (403, "M_FORBIDDEN".into()));

    scene.server.server().app().env.sleep(Duration::from_secs(1_800)).await;
    let second = scene.alice.ok_post(&path, json!({})).await["access_token"].as_str().unwrap().to_owned();
    scene.server.server().app().env.sleep(Duration::from_secs(1_900)).await;
    assert_eq!(refused(info(&token).await), unknown, "it has ended");
    assert_eq!(info(&second).await.0, StatusCode::OK);
    let mut last = String::new();
    for _ in 0..20 {
        last = scene.alice.ok_post(&path, json!({})).await["access_token"].as_str().unwrap().to_owned();
    }
    assert_eq!(refused(info(&second).await), unknown, "newer ones took its place");
    assert_eq!(info(&last).await.0, StatusCode::OK);
    scene.server.assert_whole();
    let auth = json!({
        "type": "m.login.password", "identifier": { "type": "m.id.user", "user": "alice" },
        "password": "password of alice",
    });
    scene.alice.ok_post("/account/deactivate", json!({ "auth": auth })).await;
    assert_eq!(refused(info(&last).await), unknown, "its user is gone");
    scene.server.assert_whole();
}
