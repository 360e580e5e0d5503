//! State that the server derives from a room's state for itself: nobody sees it, and nobody sets it.

use http::StatusCode;
use serde_json::json;

use crate::{
    rooms::Rooms,
    support::{TestServer, room_num},
};

#[tokio::test(start_paused = true)]
async fn nobody_meets_or_sets_derived_state() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let room = alice.create(json!({ "preset": "public_chat" })).await;
    let (_, begun) = alice.get("/_matrix/client/v3/sync").await;
    let since = begun["next_batch"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    bob.ok_post(&format!("/rooms/{room}/leave"), json!({})).await;
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    let lazy = "%7B%22room%22:%7B%22state%22:%7B%22lazy_load_members%22:true%7D%7D%7D";
    for path in [
        format!("/_matrix/client/v3/rooms/{room}/state"),
        format!("/_matrix/client/v3/rooms/{room}/members"),
        format!("/_matrix/client/v3/rooms/{room}/messages?dir=f"),
        "/_matrix/client/v3/sync".to_owned(),
        format!("/_matrix/client/v3/sync?filter={lazy}"),
        format!("/_matrix/client/v3/sync?since={since}&use_state_after=true"),
        format!("/_matrix/client/v3/sync?since={since}"),
        format!("/_matrix/client/v3/sync?since={since}&full_state=true&use_state_after=true"),
    ] {
        let (status, json) = alice.get(&path).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert!(!json.to_string().contains("\\u0001"), "{path}: {json}");
    }
    for (kind, key) in [("%01server", "test.example"), ("%01joined", ""), ("%01", "x")] {
        let path = format!("/_matrix/client/v3/rooms/{room}/state/{kind}/{key}");
        assert_eq!(alice.get(&path).await.0, StatusCode::NOT_FOUND, "{kind}");
        let (status, json) = alice.put(&path, json!({})).await;
        assert_eq!(
            (status, &json["errcode"]),
            (StatusCode::BAD_REQUEST, &json!("M_INVALID_PARAM")),
            "{kind}"
        );
    }
    let state = json!([{ "type": "\u{1}server", "state_key": "evil.example", "content": {} }]);
    let (status, _) = alice.post("/_matrix/client/v3/createRoom", json!({ "initial_state": state })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);

    let app = server.server().app();
    let snapshot = app.store.snapshot();
    let num = room_num(&app.store, &room);
    let now = aqueduct::rooms::state::StateRef::Main(aqueduct::ids::Order::MAX);
    let servers = aqueduct::rooms::members::list_servers_at(&*snapshot, num, now).unwrap();
    assert_eq!(servers, ["test.example"]);
    assert_eq!(aqueduct::rooms::members::count_joined_at(&*snapshot, num, now).unwrap(), 2);
}
