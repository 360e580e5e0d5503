//! Several whole servers that ask one another (server-server API).

use std::time::Duration;

use federation::testing::Weather;
use ruma::api::federation::query::get_profile_information::v1::Request;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, encoded, federated::Federated},
};

/// Whether the server of one place learns the name of a user of the server of another.
async fn learns(federated: &Federated, asking: usize, asked: usize, user: &str) -> bool {
    let app = federated.server(asking).server().app();
    let server = federated.name(asked).try_into().unwrap();
    let request = Request::new(user.try_into().unwrap());
    let profile = app.remote.client.send(server, request, Default::default()).await;
    profile.is_ok_and(|profile| profile.get("displayname") == Some(&json!("Alice")))
}

#[tokio::test(start_paused = true)]
async fn servers_ask_one_another_also_after_a_crash() {
    let mut federated = Federated::new(&["a.example", "b.example"]);
    let alice = federated.server(0).register("alice").await;
    let path = format!("/profile/{}/displayname", alice.user_id);
    alice.ok_put(&path, json!({ "displayname": "Alice" })).await;
    assert!(learns(&federated, 1, 0, &alice.user_id).await);
    federated.weather(0, Weather::Refuses, Duration::ZERO);
    assert!(!learns(&federated, 1, 0, &alice.user_id).await);
    federated.kill(0, usize::MAX, |_| {});
    assert!(
        learns(&federated, 1, 0, &alice.user_id).await,
        "the server is back, and is known by its old key"
    );
}

#[tokio::test(start_paused = true)]
async fn users_who_come_to_share_a_room_see_each_other_at_once() {
    for room_version in ["10", "12"] {
        let federated = Federated::new(&["a.example", "b.example"]);
        let (alice, bob) =
            (federated.server(0).register("alice").await, federated.server(1).register("bob").await);
        let carol = federated.server(1).register("carol").await;
        let mut since = Vec::new();
        for client in [&alice, &bob, &carol] {
            let body = json!({ "presence": "online", "status_msg": "here" });
            client.ok_put(&format!("/presence/{}/status", client.user_id), body).await;
            since.push(
                client.ok_get("/sync?set_presence=offline").await["next_batch"].as_str().unwrap().to_owned(),
            );
        }
        let room = alice.create(json!({ "preset": "public_chat", "room_version": room_version })).await;
        let env = federated.server(0).server().app().env.clone();
        env.sleep(Duration::from_secs(3)).await;
        let sees = async |client: &TestClient, since: &str, other: &TestClient| {
            let sync = client.ok_get(&format!("/sync?set_presence=offline&since={since}")).await;
            let told = sync["presence"]["events"].as_array().cloned().unwrap_or_default();
            let told = told.iter().find(|told| told["sender"] == other.user_id.as_str()).cloned();
            told.is_some_and(|told| told["content"]["status_msg"] == "here")
        };
        bob.ok_post(&format!("/join/{}?via=a.example", encoded(&room)), json!({})).await;
        env.sleep(Duration::from_secs(1)).await;
        assert!(sees(&alice, since[0].as_str(), &bob).await, "{room_version}");
        assert!(sees(&bob, since[1].as_str(), &alice).await, "{room_version}");
        // The servers share the room by now.
        carol.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
        env.sleep(Duration::from_secs(1)).await;
        assert!(sees(&alice, since[0].as_str(), &carol).await, "{room_version}");
        assert!(sees(&carol, since[2].as_str(), &alice).await, "{room_version}");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_while_another_server_lets_them_in_is_out_in_the_end() {
    for after_ms in [1, 1_000, 2_500, 4_000, 5_500, 7_000, 9_000] {
        let federated = Federated::new(&["a.example", "b.example"]);
        let alice = federated.server(0).register("alice").await;
        let [bob, carol] = [federated.server(1).register("bob"), federated.server(1).register("carol")];
        let (bob, carol) = tokio::join!(bob, carol);
        let space = alice.create(json!({ "preset": "public_chat" })).await;
        let allow = json!([{ "type": "m.room_membership", "room_id": space }]);
        let rules =
            json!({ "type": "m.room.join_rules", "content": { "join_rule": "restricted", "allow": allow } });
        let levels = json!({ "invite": 50 });
        let room =
            alice.create(json!({ "initial_state": [rules], "power_level_content_override": levels })).await;
        let id = encoded(&room);
        alice.ok_post(&format!("/rooms/{id}/invite"), json!({ "user_id": bob.user_id })).await;
        bob.ok_post(&format!("/join/{id}?via=a.example"), json!({})).await;
        carol.ok_post(&format!("/join/{}?via=a.example", encoded(&space)), json!({})).await;
        let env = federated.server(0).server().app().env.clone();
        env.sleep(Duration::from_secs(10)).await;
        federated.weather(0, Weather::Fair, Duration::from_secs(2));
        let joins = format!("/_matrix/client/v3/join/{id}?via=a.example");
        let leave = async {
            env.sleep(Duration::from_millis(after_ms)).await;
            carol.ok_post(&format!("/rooms/{id}/leave"), json!({})).await;
            let rooms = carol.ok_get("/joined_rooms").await["joined_rooms"].clone();
            assert!(!rooms.as_array().unwrap().contains(&json!(room)), "{after_ms}");
        };
        let (joined, ()) = tokio::join!(carol.post(&joins, json!({})), leave);
        assert!(joined.0 == 403 || after_ms > 4_000, "{after_ms}: {joined:?}");
        federated.weather(0, Weather::Fair, Duration::ZERO);
        env.sleep(Duration::from_secs(120)).await;
        for client in [&alice, &bob] {
            let members = client.ok_get(&format!("/rooms/{id}/joined_members")).await;
            assert_eq!(members["joined"].as_object().unwrap().len(), 2, "{after_ms}: {members}");
        }
        federated.server(0).assert_whole();
        federated.server(1).assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_room_is_called_by_aliases_of_other_servers_that_say_so() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let (alice, bob) =
        (federated.server(0).register("alice").await, federated.server(1).register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{}?server_name=a.example", encoded(&room)), json!({})).await;
    let other = bob.create(json!({})).await;
    for (name, named) in [("one", &room), ("two", &room), ("three", &room), ("other", &other)] {
        let alias = encoded(&format!("#{name}:b.example"));
        bob.ok_put(&format!("/directory/room/{alias}"), json!({ "room_id": named })).await;
    }
    let canonical = format!("/_matrix/client/v3/rooms/{}/state/m.room.canonical_alias", encoded(&room));
    let set = async |content: Value| alice.put(&canonical, content).await;
    let is_refused = async |content: Value| {
        let (status, json) = set(content).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_BAD_ALIAS")), "{json}");
    };
    let known = json!({ "alias": "#one:b.example", "alt_aliases": ["#two:b.example"] });
    assert_eq!(set(known.clone()).await.0, 200);
    is_refused(json!({ "alias": "#other:b.example" })).await;
    is_refused(json!({ "alias": "#none:b.example" })).await;
    is_refused(json!({ "alias": "#one:nowhere.example" })).await;
    is_refused(json!({ "alias": "#one:b.example", "alt_aliases": ["#three:b.example", "#other:b.example"] }))
        .await;
    let many: Vec<String> = (0..21).map(|number| format!("#n{number}:b.example")).collect();
    is_refused(json!({ "alt_aliases": many })).await;
    // Nobody is asked for somebody who is not in the room.
    let carol = federated.server(0).register("carol").await;
    assert_eq!(carol.put(&canonical, json!({ "alias": "#three:b.example" })).await.0, 403);
    // Nor is anybody asked for a member who may not set it, so that the answer tells nothing of other servers' aliases.
    carol.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
    for alias in ["#three:b.example", "#none:b.example", "#one:nowhere.example"] {
        let (status, json) = carol.put(&canonical, json!({ "alias": alias })).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (403, &json!("M_FORBIDDEN")), "{alias}: {json}");
    }
    // Those that the room has already are not asked for again.
    federated.weather(1, Weather::Refuses, Duration::ZERO);
    is_refused(json!({ "alias": "#three:b.example" })).await;
    assert_eq!(set(json!({ "alias": "#two:b.example" })).await.0, 200);
    assert_eq!(
        alice.state(&room, "m.room.canonical_alias", "").await.1,
        json!({ "alias": "#two:b.example" })
    );
}
