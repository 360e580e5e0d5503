//! Who was not in a room does not read there what somebody wrote who asked to be erased.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer, encoded, user_num},
};

/// A room with everything that Alice left behind.
struct Fixture {
    server: TestServer,
    room: String,
    root: String,
    secret: String,
    reply_of_bob: String,
    reply: String,
    image: String,
    bob: TestClient,
}

async fn end(who: &TestClient, name: &str, erase: bool) {
    let identifier = json!({ "type": "m.id.user", "user": name });
    let auth = json!({
        "type": "m.login.password", "identifier": identifier, "password": format!("password of {name}"),
    });
    let body = json!({ "auth": auth, "erase": erase });
    let (status, json) = who.post("/_matrix/client/v3/account/deactivate", body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

async fn send(who: &TestClient, room: &str, txn: &str, content: Value) -> String {
    let json = who.ok_put(&format!("/rooms/{room}/send/m.room.message/{txn}"), content).await;
    json["event_id"].as_str().unwrap().to_owned()
}

impl Fixture {
    async fn new(erase: bool) -> Self {
        let server = TestServer::new();
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let name = format!("/profile/{}/displayname", alice.user_id);
        alice.ok_put(&name, json!({ "displayname": "Alice Secret" })).await;
        let room = bob.create(json!({ "preset": "public_chat" })).await;
        alice.ok_post(&format!("/join/{room}"), json!({})).await;
        let power = json!({ "users": { &alice.user_id: 100 } });
        bob.ok_put(&format!("/rooms/{room}/state/m.room.power_levels/"), power).await;
        let root = bob.say(&room, "root", "root").await;
        let secret = send(&alice, &room, "1", json!({ "body": "secret", "msgtype": "m.text" })).await;
        let relates = |kind: &str, to: &str| json!({ "rel_type": kind, "event_id": to });
        let edit = json!({ "body": "secret edit", "m.new_content": { "body": "secret new" }, "m.relates_to": relates("m.replace", &secret) });
        send(&alice, &room, "2", edit).await;
        let reply = json!({ "body": "reply", "m.relates_to": relates("m.thread", &root) });
        let reply_of_bob = send(&bob, &room, "3", reply).await;
        let reply = json!({ "body": "secret reply", "m.relates_to": relates("m.thread", &root) });
        let reply = send(&alice, &room, "3", reply).await;
        let reference = json!({ "body": "secret reference", "m.relates_to": relates("m.reference", &root) });
        send(&alice, &room, "4", reference).await;
        let image = json!({ "body": "secret image", "url": "mxc://test.example/secret" });
        let image = send(&alice, &room, "5", image).await;
        end(&alice, "alice", erase).await;
        Self { server, room, root, secret, reply_of_bob, reply, image, bob }
    }

    /// Everything of the room that a client can be shown.
    async fn everything(&self, who: &TestClient) -> Vec<(String, Value)> {
        let (room, root, secret) = (&self.room, encoded(&self.root), encoded(&self.secret));
        let v3 = |rest: String| format!("/_matrix/client/v3{rest}");
        let v1 = |rest: String| format!("/_matrix/client/v1{rest}");
        let federation = "%7B%22event_format%22:%22federation%22%7D";
        let lazy = "%7B%22lazy_load_members%22:true%7D";
        let mut found = Vec::new();
        for path in [
            v3(format!("/rooms/{room}/messages?dir=b&limit=100")),
            v3(format!("/rooms/{room}/messages?dir=f&limit=100&filter={lazy}")),
            v3(format!("/rooms/{room}/context/{secret}?limit=20")),
            v3(format!("/rooms/{room}/context/{root}?limit=20")),
            v3(format!("/rooms/{room}/event/{secret}")),
            v3(format!("/rooms/{room}/event/{root}")),
            v1(format!("/rooms/{room}/relations/{root}")),
            v1(format!("/rooms/{room}/relations/{secret}")),
            v1(format!("/rooms/{room}/threads")),
            v3(format!("/rooms/{room}/state")),
            v3(format!("/rooms/{room}/members")),
            v3(format!("/rooms/{room}/state/m.room.member/@alice:test.example")),
            v3("/sync?timeout=0".to_owned()),
            v3(format!("/sync?timeout=0&filter={federation}")),
        ] {
            let (status, json) = who.get(&path).await;
            assert_eq!(status, StatusCode::OK, "{path}: {json}");
            found.push((path, json));
        }
        found
    }
}

#[tokio::test(start_paused = true)]
async fn who_was_not_there_reads_nothing_of_an_erased_user() {
    let fixture = Fixture::new(true).await;
    let carol = fixture.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", fixture.room), json!({})).await;
    for (path, json) in fixture.everything(&carol).await {
        let text = json.to_string();
        assert!(!text.contains("secret") && !text.contains("Secret"), "{path}: {json}");
    }
    // The events themselves are still there, without their content.
    let event = carol.ok_get(&format!("/rooms/{}/event/{}", fixture.room, encoded(&fixture.secret))).await;
    assert_eq!((&event["content"], &event["sender"]), (&json!({}), &json!("@alice:test.example")));
    let thread = carol.ok_get(&format!("/rooms/{}/event/{}", fixture.room, encoded(&fixture.root))).await;
    // An event that is shown without its content is shown to refer to no other.
    let relations = &thread["unsigned"]["m.relations"];
    let (thread, latest) = (&relations["m.thread"], &relations["m.thread"]["latest_event"]["event_id"]);
    assert_eq!((&thread["count"], latest), (&json!(1), &json!(fixture.reply_of_bob)));
    assert_eq!(relations.get("m.reference"), None);
}

/// A filter that looked at what is kept from its reader would sort it for them.
#[tokio::test(start_paused = true)]
async fn what_an_erased_user_wrote_is_sorted_by_no_filter_for_who_was_not_there() {
    let fixture = Fixture::new(true).await;
    let (room, bob) = (&fixture.room, &fixture.bob);
    let carol = fixture.server.register("carol").await;
    carol.ok_post(&format!("/join/{room}"), json!({})).await;
    let ids = |list: &Value| {
        let ids = list.as_array().unwrap().iter().map(|event| event["event_id"].as_str().unwrap().to_owned());
        ids.collect::<Vec<_>>()
    };
    let filtered = async |who: &TestClient, filter: Value| {
        let mut filter = filter;
        filter["types"] = json!(["m.room.message"]);
        filter["senders"] = json!(["@alice:test.example"]);
        let query = encoded(&filter.to_string());
        let page = who.ok_get(&format!("/rooms/{room}/messages?dir=f&limit=100&filter={query}")).await;
        filter["limit"] = json!(100);
        let query = encoded(&json!({ "room": { "timeline": filter } }).to_string());
        let sync = who.ok_get(&format!("/sync?timeout=0&filter={query}")).await;
        let found = ids(&page["chunk"]);
        assert_eq!(ids(&sync["rooms"]["join"][room]["timeline"]["events"]), found, "{filter}");
        found
    };
    let all = filtered(&carol, json!({})).await;
    assert_eq!(all.len(), 5, "{all:?}");
    for (filter, for_carol, for_bob) in [
        (json!({ "contains_url": true }), vec![], vec![&fixture.image]),
        (json!({ "rel_types": ["m.thread"] }), vec![], vec![&fixture.reply]),
        (
            json!({ "not_rel_types": ["m.thread", "m.replace", "m.reference"] }),
            all.iter().collect(),
            vec![&fixture.secret, &fixture.image],
        ),
        (json!({ "related_by_senders": ["@alice:test.example"] }), vec![], vec![&fixture.secret]),
    ] {
        assert_eq!(filtered(&carol, filter.clone()).await.iter().collect::<Vec<_>>(), for_carol, "{filter}");
        assert_eq!(filtered(bob, filter.clone()).await.iter().collect::<Vec<_>>(), for_bob, "{filter}");
    }
    let listed = async |who: &TestClient, rest: &str| {
        let path = format!("/_matrix/client/v1/rooms/{room}/relations/{}{rest}", encoded(&fixture.root));
        ids(&who.get(&path).await.1["chunk"])
    };
    for rest in ["", "/m.thread", "/m.thread/m.room.message", "?recurse=true"] {
        assert_eq!(listed(&carol, rest).await, [&*fixture.reply_of_bob], "{rest}");
    }
    assert_eq!(listed(bob, "/m.thread").await, [&*fixture.reply, &*fixture.reply_of_bob]);
    let roots = ids(&carol.get(&format!("/_matrix/client/v1/rooms/{room}/threads")).await.1["chunk"]);
    assert_eq!(roots, [&*fixture.root]);
}

#[tokio::test(start_paused = true)]
async fn who_was_there_reads_on() {
    let fixture = Fixture::new(true).await;
    let read: Vec<_> = fixture.everything(&fixture.bob).await;
    for (path, json) in &read {
        let shows_messages =
            !path.ends_with("/state") && !path.contains("/members") && !path.contains("m.room.member");
        assert_eq!(json.to_string().contains("secret"), shows_messages, "{path}: {json}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_only_ends_the_account_is_read_by_all() {
    let fixture = Fixture::new(false).await;
    let carol = fixture.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", fixture.room), json!({})).await;
    let event = carol.ok_get(&format!("/rooms/{}/event/{}", fixture.room, encoded(&fixture.secret))).await;
    assert_eq!(event["content"]["body"], "secret");
    assert_eq!(event["unsigned"]["m.relations"]["m.replace"]["content"]["body"], "secret edit");
}

#[tokio::test(start_paused = true)]
async fn what_an_erased_user_kept_here_is_gone() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let said = bob.say(&room, "1", "hello").await;
    alice.ok_post(&format!("/rooms/{room}/receipt/m.read/{}", encoded(&said)), json!({})).await;
    let rule = json!({ "actions": ["notify"], "pattern": "cake" });
    alice.ok_put("/pushrules/global/content/cake", rule).await;
    alice.ok_put(&format!("/user/{}/account_data/x", alice.user_id), json!({ "a": 1 })).await;
    let receipts = async || {
        let (_, json) = bob.get("/_matrix/client/v3/sync?timeout=0").await;
        json["rooms"]["join"][&room]["ephemeral"].to_string()
    };
    tokio::time::advance(std::time::Duration::from_secs(1)).await;
    assert!(receipts().await.contains("@alice:test.example"));
    end(&alice, "alice", true).await;
    assert!(!receipts().await.contains("@alice:test.example"));
    let app = server.server().app();
    let snapshot = app.store.snapshot();
    let user = user_num(&app.store, &alice.user_id);
    assert!(aqueduct::schema::PUSH_RULES.get(&*snapshot, user).unwrap().is_none());
    let listed = aqueduct::accounts::account_data::list(&*snapshot, user, None).unwrap();
    assert_eq!(listed.len(), 0);
}

/// Clients take state from the timeline as well as from lists of state, so that both must say the same.
#[tokio::test(start_paused = true)]
async fn the_state_that_an_erased_user_set_is_the_same_in_the_timeline_and_beside_it() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let open = json!({ "users_default": 100, "events": {} });
    let body = json!({
        "room_version": "11", "preset": "public_chat", "power_level_content_override": open,
    });
    let room = alice.create(body).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    for (event_type, state_key, content) in [
        ("m.room.encryption", "", json!({ "algorithm": "m.megolm.v1.aes-sha2" })),
        ("m.space.child", "!child:test.example", json!({ "via": ["test.example"] })),
        ("m.room.tombstone", "", json!({ "body": "moved", "replacement_room": "!next:test.example" })),
    ] {
        bob.ok_put(&format!("/rooms/{room}/state/{event_type}/{state_key}"), content).await;
    }
    end(&bob, "bob", true).await;
    carol.ok_post(&format!("/join/{room}"), json!({})).await;
    let held = carol.ok_get(&format!("/rooms/{room}/state")).await;
    let short = "%7B%22room%22:%7B%22timeline%22:%7B%22limit%22:1%7D%7D%7D";
    let mut shown = Vec::new();
    for query in ["timeout=0".to_owned(), format!("timeout=0&filter={short}")] {
        let json = carol.ok_get(&format!("/sync?{query}")).await;
        let joined = &json["rooms"]["join"][&room];
        for list in ["state", "timeline"] {
            shown.extend(joined[list]["events"].as_array().unwrap().iter().cloned());
        }
    }
    let page = carol.ok_get(&format!("/rooms/{room}/messages?dir=b&limit=100")).await;
    shown.extend(page["chunk"].as_array().unwrap().iter().cloned());
    for event_type in ["m.room.encryption", "m.space.child", "m.room.tombstone"] {
        let of_type = |events: &[Value]| {
            events.iter().filter(|it| it["type"] == event_type).cloned().collect::<Vec<_>>()
        };
        let held = of_type(held.as_array().unwrap());
        assert_eq!(held.len(), 1, "{event_type}");
        assert_ne!(held[0]["content"], json!({}));
        let shown = of_type(&shown);
        assert!(shown.len() >= 3, "{event_type}: {shown:?}");
        for event in shown {
            assert_eq!(event["content"], held[0]["content"], "{event_type}");
        }
    }
}
