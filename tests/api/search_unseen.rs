//! Answers of searches say nothing of messages that the caller may not see, whatever bound they reach.

use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer},
};

const TERM: &str = "zebrafish";

/// The answer to a search of eve for a word that stands in as many messages that are hidden from her, `secrets` of which another user wrote.
async fn told(hidden: usize, secrets: usize, order_by: &str, group_by: Value) -> Value {
    let server = TestServer::with(|config| config.search.enabled = true);
    let (alice, bob, eve) =
        (server.register("alice").await, server.register("bob").await, server.register("eve").await);
    let visibility = json!({ "history_visibility": "joined" });
    let state = json!([{ "type": "m.room.history_visibility", "state_key": "", "content": visibility }]);
    let room =
        async |who: &TestClient| who.create(json!({ "preset": "public_chat", "initial_state": state })).await;
    let (secret, own) = (room(&alice).await, room(&bob).await);
    for number in 0..secrets {
        alice.say(&secret, &number.to_string(), TERM).await;
    }
    // Bob, who is eve's other account, fills the bound of what is looked at: half of it she does not see, and half of it she ignores.
    for number in 0..hidden / 2 {
        bob.say(&own, &number.to_string(), TERM).await;
    }
    for room in [&secret, &own] {
        eve.ok_post(&format!("/join/{room}"), json!({})).await;
    }
    for number in hidden / 2..hidden {
        bob.say(&own, &number.to_string(), TERM).await;
    }
    let seen = eve.say(&own, "seen", &format!("{TERM} seen")).await;
    let ignored = json!({ "ignored_users": { bob.user_id.as_str(): {} } });
    let path = format!("/user/{}/account_data/m.ignored_user_list", eve.user_id);
    eve.ok_put(&path, ignored).await;
    let app = server.server().app();
    app.searching.read_upto(aqueduct::store::Read::upto(&*app.store.snapshot())).await;
    let asked = json!({ "search_term": TERM, "order_by": order_by, "groupings": { "group_by": group_by } });
    let body = json!({ "search_categories": { "room_events": asked } });
    let mut found = eve.ok_post("/search", body).await["search_categories"]["room_events"].clone();
    assert_eq!(found["results"][0]["result"]["event_id"], json!(seen));
    // The rooms and events have other ids each time.
    for part in ["results", "groups"] {
        found[part] = json!(found[part].as_array().map(Vec::len));
    }
    found
}

#[tokio::test(start_paused = true)]
async fn a_hidden_message_changes_nothing_at_the_bound_of_what_is_looked_at() {
    for (order_by, group_by) in
        [("recent", json!([])), ("rank", json!([{ "key": "room_id" }, { "key": "sender" }]))]
    {
        for hidden in [0, 999, 1_000] {
            let without = told(hidden, 0, order_by, group_by.clone()).await;
            let with = told(hidden, 1, order_by, group_by.clone()).await;
            assert_eq!(with, without, "{hidden} {order_by}");
            assert_eq!(with.get("next_batch"), None);
            assert_eq!(with["count"], 1);
        }
    }
}
