//! `src/api/client/people.rs`: the user directory and shared rooms; and who wants no invitations.

use aqueduct::{accounts::users, ids::UserNum};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    resident_joins::Scene,
    support::{TestClient, TestServer, encoded, federated::Federated},
};

const SEARCH: &str = "/_matrix/client/v3/user_directory/search";

async fn search(client: &TestClient, term: &str) -> Vec<String> {
    let (status, json) = client.post(SEARCH, json!({ "search_term": term })).await;
    assert_eq!((status, &json["limited"]), (StatusCode::OK, &json!(false)), "{json}");
    let found = json["results"].as_array().unwrap().iter();
    found.map(|person| person["user_id"].as_str().unwrap().to_owned()).collect()
}

async fn room(client: &TestClient, body: Value) -> String {
    let (status, json) = client.post("/_matrix/client/v3/createRoom", body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json["room_id"].as_str().unwrap().to_owned()
}

async fn join(client: &TestClient, room: &str) {
    let (status, json) = client.post(&format!("/_matrix/client/v3/join/{room}"), json!({})).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

async fn call(client: &TestClient, name: &str) {
    let path = format!("/_matrix/client/v3/profile/{}/displayname", client.user_id);
    client.ok_put(&path, json!({ "displayname": name })).await;
}

#[tokio::test(start_paused = true)]
async fn users_of_other_servers_are_found_in_rooms_that_are_shared_with_them() {
    const BOB: &str = "@bob:b.example";
    const ODD: &str = "@odd:b.example";
    let scene = Scene::new().await;
    let eve = scene.server.register("eve").await;
    let (room, second) = (scene.room("11").await, scene.room("12").await);
    for (room, user, name) in [
        (&room, BOB, json!("Robert Dobalina")),
        (&second, BOB, json!("Robert Dobalina")),
        (&room, ODD, json!({ "Robert": 7 })),
    ] {
        let (_, mut event) = scene.peer.made(&scene.server, "join", room, user).await;
        let avatar = json!("mxc://b.example/bob");
        event["content"] = json!({ "membership": "join", "displayname": name, "avatar_url": avatar });
        let version = if *room == second { "12" } else { "11" };
        let (id, event) = scene.peer.sign_event(&event, version);
        let (status, told) = scene.peer.send(&scene.server, "v2/send_join", room, &id, &event).await;
        assert_eq!(status, StatusCode::OK, "{told}");
    }
    for term in ["robert", "DOBALINA", "bob", "@bob:b.example"] {
        assert_eq!(search(&scene.alice, term).await, [BOB], "{term}");
        assert!(search(&eve, term).await.is_empty(), "{term}: eve shares no room with him");
    }
    assert_eq!(search(&scene.alice, "b.example").await, [BOB, ODD]);
    let found = scene.alice.ok_post("/user_directory/search", json!({ "search_term": "bob" })).await;
    let shown =
        json!({ "user_id": BOB, "display_name": "Robert Dobalina", "avatar_url": "mxc://b.example/bob" });
    assert_eq!(found["results"], json!([shown]));
    for room in [&room, &second] {
        assert_eq!(search(&scene.alice, "dobalina").await, [BOB]);
        scene.alice.ok_post(&format!("/rooms/{room}/kick"), json!({ "user_id": BOB })).await;
    }
    assert!(search(&scene.alice, "dobalina").await.is_empty(), "he is in no room of hers any more");
}

#[tokio::test(start_paused = true)]
async fn people_are_found_by_name_and_id_where_they_may_be_known() {
    let server = TestServer::new();
    let (alice, bob, eve) =
        (server.register("alice").await, server.register("bob").await, server.register("eve").await);
    call(&alice, "Ada Cooper").await;
    let private = room(&bob, json!({ "invite": [alice.user_id] })).await;
    // An invitation is not a room that they share.
    assert!(search(&bob, "ada").await.is_empty());
    join(&alice, &private).await;
    let member = format!("/_matrix/client/v3/rooms/{private}/state/m.room.member/{}", alice.user_id);
    alice.ok_put(&member, json!({ "membership": "join", "displayname": "Freddy" })).await;
    for term in ["ada", "COOPER", "cooper ada", "@alice", "alice", "lic", "@alice:test.example"] {
        assert_eq!(search(&bob, term).await, [alice.user_id.as_str()], "{term}");
        assert!(search(&eve, term).await.is_empty(), "{term}: eve knows no room of hers");
    }
    for term in ["freddy", "", "  ", "nobody", "bob"] {
        assert!(search(&bob, term).await.is_empty(), "{term}");
    }
    // In a room that everybody may join, or read, everybody finds her.
    for state in [
        json!({ "type": "m.room.join_rules", "content": { "join_rule": "public" } }),
        json!({ "type": "m.room.history_visibility", "content": { "history_visibility": "world_readable" } }),
    ] {
        assert!(search(&alice, "cooper").await.is_empty());
        let open = room(&alice, json!({ "initial_state": [state] })).await;
        // She finds herself as everybody does.
        for client in [&eve, &alice] {
            assert_eq!(search(client, "cooper").await, [alice.user_id.as_str()]);
        }
        alice.ok_post(&format!("/rooms/{open}/leave"), json!({})).await;
        for client in [&eve, &alice] {
            assert!(search(client, "cooper").await.is_empty());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_fits_best_comes_first_and_no_more_than_is_asked_for() {
    let server = TestServer::new();
    let eve = server.register("eve").await;
    let square = room(&eve, json!({ "preset": "public_chat" })).await;
    for (name, shown) in
        [("u1", "The Ann"), ("u2", "Annabel"), ("u3", "Ann"), ("u4", "Johann"), ("u5", "Zoe")]
    {
        let user = server.register(name).await;
        call(&user, shown).await;
        join(&user, &square).await;
    }
    assert_eq!(
        search(&eve, "ann").await,
        ["@u3", "@u2", "@u1", "@u4"].map(|id| format!("{id}:test.example"))
    );
    let (_, json) = eve.post(SEARCH, json!({ "search_term": "ann", "limit": 2 })).await;
    assert_eq!((json["results"].as_array().unwrap().len(), &json["limited"]), (2, &json!(true)));
    assert_eq!(json["results"][0], json!({ "user_id": "@u3:test.example", "display_name": "Ann" }));
    let (_, json) = eve.post(SEARCH, json!({ "search_term": "ann", "limit": 0 })).await;
    assert_eq!((json["results"].as_array().unwrap().len(), &json["limited"]), (0, &json!(true)));
    for (body, code) in [
        (json!({}), "M_MISSING_PARAM"),
        (json!({ "search_term": 7 }), "M_BAD_JSON"),
        (json!({ "search_term": "a", "limit": -1 }), "M_BAD_JSON"),
    ] {
        let (status, json) = eve.post(SEARCH, body).await;
        assert_eq!((status.as_u16(), json["errcode"].as_str()), (400, Some(code)));
    }
}

#[tokio::test(start_paused = true)]
async fn shared_rooms_are_those_that_both_are_in() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mutual = |user_id: &str| format!("/_matrix/client/v1/mutual_rooms?user_id={user_id}");
    let both = room(&alice, json!({ "preset": "public_chat" })).await;
    join(&bob, &both).await;
    room(&alice, json!({ "invite": [bob.user_id] })).await;
    room(&bob, json!({})).await;
    for (asks, other) in [(&alice, &bob), (&bob, &alice)] {
        let (status, json) = asks.get(&mutual(&other.user_id)).await;
        assert_eq!((status, json), (StatusCode::OK, json!({ "joined": [both], "count": 1 })));
    }
    for nobody in ["@nobody:test.example", "@bob:elsewhere.example"] {
        assert_eq!(alice.get(&mutual(nobody)).await, (StatusCode::OK, json!({ "joined": [], "count": 0 })));
    }
    for wrong in
        [alice.user_id.clone(), "nonsense".to_owned(), format!("{}&from=x", bob.user_id), String::new()]
    {
        let (status, json) = alice.get(&mutual(&wrong)).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_INVALID_PARAM")), "{wrong}");
    }
    assert_eq!(alice.get("/_matrix/client/v1/mutual_rooms").await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn rooms_are_shared_with_users_of_other_servers_too() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) =
        (federated.server(0).register("alice").await, federated.server(1).register("bob").await);
    let both = room(&alice, json!({ "preset": "public_chat" })).await;
    let left = room(&alice, json!({ "preset": "public_chat" })).await;
    room(&alice, json!({ "preset": "public_chat" })).await;
    for room in [&both, &left] {
        bob.ok_post(&format!("/join/{}?server_name=a.example", encoded(room)), json!({})).await;
    }
    bob.ok_post(&format!("/rooms/{}/leave", encoded(&left)), json!({})).await;
    for (asks, other) in [(&alice, &bob), (&bob, &alice)] {
        let path = format!("/_matrix/client/v1/mutual_rooms?user_id={}", other.user_id);
        assert_eq!(asks.get(&path).await, (StatusCode::OK, json!({ "joined": [both], "count": 1 })));
    }
}

#[tokio::test(start_paused = true)]
async fn who_wants_no_invitations_gets_none() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let config = format!("/_matrix/client/v3/user/{}/account_data/m.invite_permission_config", bob.user_id);
    let before = room(&alice, json!({ "invite": [bob.user_id] })).await;
    let later = room(&alice, json!({})).await;
    assert_eq!(bob.put(&config, json!({ "default_action": "block" })).await.0, StatusCode::OK);
    let invited = async || bob.get("/_matrix/client/v3/sync").await.1["rooms"]["invite"].clone();
    assert!(invited().await.get(&before).is_none(), "one that was there is not shown");
    let invite = format!("/_matrix/client/v3/rooms/{later}/invite");
    let member = format!("/_matrix/client/v3/rooms/{later}/state/m.room.member/{}", bob.user_id);
    for (status, json) in [
        alice.post(&invite, json!({ "user_id": bob.user_id })).await,
        alice.put(&member, json!({ "membership": "invite" })).await,
        alice.post("/_matrix/client/v3/createRoom", json!({ "invite": [bob.user_id] })).await,
    ] {
        assert_eq!((status.as_u16(), &json["errcode"]), (403, &json!("M_INVITE_BLOCKED")), "{json}");
    }
    // He himself is not kept from anything, nor are others by him.
    assert_eq!(
        bob.post("/_matrix/client/v3/createRoom", json!({ "invite": [alice.user_id] })).await.0,
        StatusCode::OK
    );
    bob.ok_put(&config, json!({})).await;
    assert_eq!(alice.post(&invite, json!({ "user_id": bob.user_id })).await.0, StatusCode::OK);
    assert!(invited().await.get(&later).is_some() && invited().await.get(&before).is_some());
}

#[tokio::test(start_paused = true)]
async fn users_choose_whose_invitations_they_take() {
    let server = TestServer::new();
    let (alice, bob, eve) =
        (server.register("alice").await, server.register("bob").await, server.register("eve").await);
    let config = format!("/user/{}/account_data/org.matrix.msc4155.invite_permission_config", bob.user_id);
    let ignored = format!("/user/{}/account_data/m.ignored_user_list", bob.user_id);
    let invited = async |room: &str| bob.ok_get("/sync").await["rooms"]["invite"].get(room).is_some();
    let token = async || bob.ok_get("/sync").await["next_batch"].as_str().unwrap().to_owned();
    for (content, refused, shown) in [
        (json!({ "blocked_users": [eve.user_id] }), true, false),
        (json!({ "blocked_servers": ["test.*"] }), true, false),
        (json!({ "ignored_users": ["@e?e:*"], "blocked_users": [eve.user_id] }), false, false),
        (json!({ "allowed_users": [eve.user_id], "blocked_servers": ["test.example"] }), false, true),
    ] {
        bob.ok_put(&config, content.clone()).await;
        let since = token().await;
        let room = room(&eve, json!({})).await;
        let member = format!("/_matrix/client/v3/rooms/{room}/state/m.room.member/{}", bob.user_id);
        let invite = format!("/_matrix/client/v3/rooms/{room}/invite");
        for (status, json) in [
            eve.put(&member, json!({ "membership": "invite" })).await,
            eve.post(&invite, json!({ "user_id": bob.user_id })).await,
            eve.post("/_matrix/client/v3/createRoom", json!({ "invite": [bob.user_id] })).await,
        ] {
            let expected = if refused { (403, json!("M_INVITE_BLOCKED")) } else { (200, Value::Null) };
            assert_eq!((status.as_u16(), json["errcode"].clone()), expected, "{content}");
        }
        assert_eq!(invited(&room).await, shown, "{content}");
        let news = bob.ok_get(&format!("/sync?since={since}")).await;
        assert_eq!(news["rooms"]["invite"].get(&room).is_some(), shown, "{content}");
        // Others see the invitation where it was made, which tells nobody that it is ignored.
        let (_, members) =
            eve.get(&format!("/_matrix/client/v3/rooms/{room}/members?membership=invite")).await;
        assert_eq!(members["chunk"].as_array().unwrap().len(), usize::from(!refused), "{content}");
    }
    // An inviter who is ignored as a user is not told so by what the lists block.
    bob.ok_put(&ignored, json!({ "ignored_users": { eve.user_id.clone(): {} } })).await;
    bob.ok_put(&config, json!({ "blocked_users": ["*"] })).await;
    let quiet = room(&eve, json!({ "invite": [bob.user_id] })).await;
    assert!(!invited(&quiet).await);
    let blocked = json!({ "invite": [bob.user_id] });
    assert_eq!(alice.post("/_matrix/client/v3/createRoom", blocked).await.0, StatusCode::FORBIDDEN);
    // Another look at the lists is taken at each sync, so that what was withheld is shown again.
    bob.ok_put(&ignored, json!({ "ignored_users": {} })).await;
    bob.ok_put(&config, json!({})).await;
    assert!(invited(&quiet).await);
    let long = json!({ "blocked_users": ["*".repeat(64 << 10)] });
    for event_type in ["org.matrix.msc4155.invite_permission_config", "m.invite_permission_config"] {
        let path = format!("/_matrix/client/v3/user/{}/account_data/{event_type}", bob.user_id);
        let (status, json) = bob.put(&path, long.clone()).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (413, &json!("M_TOO_LARGE")), "{json}");
    }
}

#[tokio::test(start_paused = true)]
async fn rooms_of_other_networks_are_none() {
    let alice = TestServer::new().register("alice").await;
    room(&alice, json!({ "visibility": "public" })).await;
    for (body, count) in [
        (json!({}), 1),
        (json!({ "include_all_networks": true }), 1),
        (json!({ "include_all_networks": false }), 1),
        (json!({ "third_party_instance_id": "irc-freenode" }), 0),
    ] {
        let (status, json) = alice.post("/_matrix/client/v3/publicRooms", body.clone()).await;
        assert_eq!((status, json["chunk"].as_array().unwrap().len()), (StatusCode::OK, count), "{body}");
    }
}

#[tokio::test(start_paused = true)]
async fn push_rules_as_account_data_and_tags_are_whole() {
    let alice = TestServer::new().register("alice").await;
    let (_, data) =
        alice.get(&format!("/_matrix/client/v3/user/{}/account_data/m.push_rules", alice.user_id)).await;
    let (_, rules) = alice.get("/_matrix/client/v3/pushrules/").await;
    assert_eq!(data, rules);
    assert!(data["global"]["sender"].is_array());
    let room = crate::sync::create_room(&alice, json!({})).await;
    let tags = format!("/_matrix/client/v3/user/{}/rooms/{room}/tags", alice.user_id);
    let tag = json!({ "order": 0.25, "org.example.colour": "red" });
    assert_eq!(alice.put(&format!("{tags}/u.work"), tag.clone()).await.0, StatusCode::OK);
    assert_eq!(alice.get(&tags).await.1, json!({ "tags": { "u.work": tag } }));
}

#[tokio::test(start_paused = true)]
async fn pages_of_the_directory_tell_each_room_that_does_not_change_once() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let mut rooms = Vec::new();
    for number in 0..30 {
        let name = format!("room {number}");
        rooms.push(
            room(&alice, json!({ "visibility": "public", "preset": "public_chat", "name": name })).await,
        );
    }
    let join = |room: &str| format!("/_matrix/client/v3/join/{room}");
    for at in (0..30).step_by(3) {
        assert_eq!(bob.post(&join(&rooms[at]), json!({})).await.0, StatusCode::OK);
    }
    let page = async |token: Option<&str>| {
        let since = token.map_or_else(String::new, |token| format!("&since={token}"));
        let (status, json) = alice.get(&format!("/_matrix/client/v3/publicRooms?limit=7{since}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        json
    };
    let ids = |page: &serde_json::Value| -> Vec<String> {
        let rooms = page["chunk"].as_array().unwrap().iter();
        rooms.map(|room| room["room_id"].as_str().unwrap().to_owned()).collect()
    };
    let first = page(None).await;
    assert_eq!(first["total_room_count_estimate"], 30);
    assert!(first.get("prev_batch").is_none());
    let mut told = ids(&first);
    let mut token = first["next_batch"].as_str().map(str::to_owned);
    let mut changed = std::collections::BTreeSet::new();
    let mut number = 0;
    while let Some(since) = token {
        // Rooms move forwards and backwards, go and come, while somebody turns the pages.
        let (to_join, to_leave, to_hide) =
            (rooms[number + 1].clone(), rooms[number * 3].clone(), rooms[29 - number].clone());
        bob.ok_post(&join(&to_join), json!({})).await;
        bob.ok_post(&format!("/rooms/{to_leave}/leave"), json!({})).await;
        let listed = format!("/_matrix/client/v3/directory/list/room/{to_hide}");
        assert_eq!(alice.put(&listed, json!({ "visibility": "private" })).await.0, StatusCode::OK);
        changed.extend([to_join, to_leave, to_hide]);
        changed.insert(room(&alice, json!({ "visibility": "public", "name": "new" })).await);
        number += 1;
        let next = page(Some(&since)).await;
        told.extend(ids(&next));
        token = next["next_batch"].as_str().map(str::to_owned);
    }
    let unchanged: Vec<_> = rooms.iter().filter(|room| !changed.contains(*room)).collect();
    assert!(unchanged.len() > 10 && number > 2, "{} {number}", unchanged.len());
    for room in unchanged {
        assert_eq!(told.iter().filter(|told| *told == room).count(), 1, "{room}");
    }
    // Changes are seen at once by those who begin anew, and pages can be turned back.
    let first = page(None).await;
    assert_eq!(first["total_room_count_estimate"], 30);
    let second = page(first["next_batch"].as_str()).await;
    let back = page(second["prev_batch"].as_str()).await;
    assert_eq!(ids(&back), ids(&first));
    assert!(back.get("prev_batch").is_none());
    assert_eq!(ids(&page(back["next_batch"].as_str()).await), ids(&second));
    let both = [first, second];
    let counts = both.iter().flat_map(|page| page["chunk"].as_array().unwrap());
    let counts: Vec<_> = counts.map(|room| room["num_joined_members"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted_by(|one, other| one >= other), "{counts:?}");
    let body = json!({ "filter": { "generic_search_term": "room 12" } });
    let (_, found) = alice.post("/_matrix/client/v3/publicRooms", body).await;
    assert_eq!((ids(&found), &found["total_room_count_estimate"]), (vec![rooms[12].clone()], &json!(1)));
}

/// However many other names fit, those who share a room with the searcher are found.
#[tokio::test(start_paused = true)]
async fn those_who_share_a_room_are_found_among_any_number_of_strangers() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let app = server.server().app();
    for many in (0..2_100).collect::<Vec<_>>().chunks(300) {
        let guard = aqueduct::store::Guard::alone();
        let mut batch = app.store.batch(&guard);
        for number in many {
            let user_id = ruma::OwnedUserId::try_from(format!("@zed{number:05}:test.example")).unwrap();
            let new = users::NewUser { user_id, is_admin: false, is_guest: false, now_ms: 0 };
            users::create(&mut batch, UserNum(1_000 + number), &new);
        }
        app.store.enqueue(batch).unwrap().flushed.await.unwrap();
    }
    // The one who shares a room is the newest of all who fit, and fits no better than they do.
    let zed = server.register("zedz").await;
    call(&zed, "").await;
    let shared = room(&alice, json!({})).await;
    assert!(search(&alice, "zed").await.is_empty());
    alice.ok_post(&format!("/rooms/{shared}/invite"), json!({ "user_id": zed.user_id })).await;
    join(&zed, &shared).await;
    assert_eq!(search(&alice, "zed").await, [zed.user_id.as_str()]);
}

#[tokio::test(start_paused = true)]
async fn a_page_of_the_directory_is_bounded_whichever_texts_its_rooms_have() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    for _ in 0..6 {
        let avatar = json!({ "type": "m.room.avatar", "content": { "url": format!("mxc://s/{}", "a".repeat(50_000)) } });
        let creation = json!({ "type": "t".repeat(50_000) });
        let body = json!({ "visibility": "public", "preset": "public_chat", "creation_content": creation,
            "initial_state": [avatar] });
        room(&alice, body).await;
    }
    let (mut told, mut since) = (std::collections::BTreeSet::new(), String::new());
    loop {
        let (status, json) = alice.get(&format!("/_matrix/client/v3/publicRooms?limit=100{since}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let rooms = json["chunk"].as_array().unwrap();
        assert!((1..=3).contains(&rooms.len()), "a page has {} rooms of 100 kB each", rooms.len());
        told.extend(rooms.iter().map(|room| room["room_id"].as_str().unwrap().to_owned()));
        let Some(next) = json["next_batch"].as_str() else { break };
        since = format!("&since={next}");
    }
    assert_eq!(told.len(), 6);
}
