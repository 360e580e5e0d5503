//! Answers of other servers in which some entries make no sense: those are left out, and the others are told.

use federation::testing::json as answer;
use futures_util::FutureExt;
use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, federated::Federated};

/// A user of a server that asks `odd.example`, which answers every question whose path has this in it so.
async fn asker(replies: Vec<(&'static str, Value)>) -> (Federated, TestClient) {
    let federated = Federated::new(&["a.example"]);
    federated.net.host("odd.example", &["6.6.6.6"]);
    federated.net.serve("6.6.6.6:8448", &["odd.example"], move |arrived| {
        let path = arrived.request.uri().path();
        let reply = replies.iter().find(|(part, _)| path.contains(part)).map(|(_, reply)| reply);
        let body = reply.map_or_else(|| "{}".to_owned(), Value::to_string);
        async move { answer(200, body) }.boxed()
    });
    let alice = federated.server(0).register("alice").await;
    (federated, alice)
}

#[tokio::test(start_paused = true)]
async fn an_odd_entry_spoils_no_list() {
    let listed = |id: &str| json!({ "room_id": id, "num_joined_members": 1, "world_readable": false, "guest_can_join": false });
    let rooms = json!({
        "chunk": [listed("!one:odd.example"), listed("not an id"), 7, null, listed("!two:odd.example")],
        "next_batch": "more",
    });
    let alias = json!({
        "room_id": "!one:odd.example", "servers": ["b.example", 7, "not a name", { "x": 1 }, "c.example"],
    });
    let (_federated, alice) = asker(vec![("/publicRooms", rooms), ("/query/directory", alias)]).await;
    let page = alice.ok_get("/publicRooms?server=odd.example").await;
    let ids: Vec<_> = page["chunk"].as_array().unwrap().iter().map(|room| &room["room_id"]).collect();
    assert_eq!(ids, ["!one:odd.example", "!two:odd.example"]);
    assert_eq!(page["next_batch"], "more");
    let found = alice.ok_get("/directory/room/%23x%3Aodd.example").await;
    assert_eq!(found["servers"], json!(["odd.example", "b.example", "c.example"]));
}

#[tokio::test(start_paused = true)]
async fn a_profile_tells_what_a_profile_can_have() {
    let profile = json!({
        "displayname": { "not": "a text" }, "avatar_url": "mxc://odd.example/1", "m.tz": "Europe/Paris",
        "Not a name": 1, "org.example.pets": ["cat"],
    });
    let (_federated, alice) = asker(vec![("/query/profile", profile)]).await;
    let told = alice.ok_get("/profile/%40x%3Aodd.example").await;
    let expected =
        json!({ "avatar_url": "mxc://odd.example/1", "m.tz": "Europe/Paris", "org.example.pets": ["cat"] });
    assert_eq!(told, expected);
    let (status, _) = alice.get("/_matrix/client/v3/profile/%40x%3Aodd.example/displayname").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_makes_no_sense_is_the_fault_of_its_server() {
    let long = "x".repeat(100_000);
    let rooms = json!({ "chunk": long });
    let alias = json!({ "room_id": format!("{long}\u{7}") });
    let (_federated, alice) = asker(vec![("/publicRooms", rooms), ("/query/directory", alias)]).await;
    for path in ["publicRooms?server=odd.example", "directory/room/%23x%3Aodd.example"] {
        let (status, told) = alice.get(&format!("/_matrix/client/v3/{path}")).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY, "{path}");
        assert!(told.to_string().len() < 1_000, "the reason is short: {path}");
    }
}
