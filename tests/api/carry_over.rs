//! `src/flows/account/carry_over.rs`: what a user set for a room that was replaced.

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, encoded, remote::Remote, room_num};

async fn create(client: &TestClient, body: Value) -> String {
    let (status, json) = client.post("/_matrix/client/v3/createRoom", body).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json["room_id"].as_str().unwrap().to_owned()
}

/// Silences a room in both ways that clients know, tags it, and calls it a direct chat.
async fn set_up(client: &TestClient, room: &str) {
    let rules = "/_matrix/client/v3/pushrules/global";
    for (path, body) in [
        (format!("{rules}/room/{room}"), json!({ "actions": [] })),
        (
            format!("{rules}/override/{room}"),
            json!({ "actions": [], "conditions": [{ "kind": "event_match", "key": "room_id", "pattern": room }] }),
        ),
        (format!("{rules}/override/{room}/enabled"), json!({ "enabled": false })),
        (
            format!("{rules}/underride/mine"),
            json!({ "actions": ["notify"], "conditions": [
                { "kind": "event_match", "key": "room_id", "pattern": room },
                { "kind": "room_member_count", "is": "2" },
            ] }),
        ),
        (format!("{rules}/content/cake"), json!({ "actions": [], "pattern": "cake" })),
    ] {
        assert_eq!(client.put(&path, body).await.0, StatusCode::OK, "{path}");
    }
    let user = format!("/_matrix/client/v3/user/{}", client.user_id);
    client.ok_put(&format!("{user}/rooms/{room}/tags/m.favourite"), json!({ "order": 0.5 })).await;
    client
        .ok_put(&format!("{user}/account_data/m.direct"), json!({ "@x:y": ["!other:y", room], "@z:y": [] }))
        .await;
}

/// The push rules, tags and direct chat that the user has set for a room, with the room's id taken out.
async fn settings(client: &TestClient, room: &str) -> Value {
    let (_, rules) = client.get("/_matrix/client/v3/pushrules/global/").await;
    let about = |kind: &str| {
        let rules = rules[kind].as_array().unwrap().iter();
        let mut about: Vec<_> = rules.filter(|rule| rule.to_string().contains(room)).cloned().collect();
        for rule in &mut about {
            *rule = serde_json::from_str(&rule.to_string().replace(room, "ROOM")).unwrap();
        }
        about
    };
    let user = format!("/_matrix/client/v3/user/{}", client.user_id);
    let (_, tags) = client.get(&format!("{user}/rooms/{room}/tags")).await;
    let (_, direct) = client.get(&format!("{user}/account_data/m.direct")).await;
    let is_direct = direct["@x:y"].as_array().is_some_and(|rooms| rooms.contains(&json!(room)));
    json!({ "override": about("override"), "room": about("room"), "tags": tags, "direct": is_direct,
        "underride": about("underride").iter().map(|rule| rule["conditions"].clone()).collect::<Vec<_>>() })
}

#[tokio::test(start_paused = true)]
async fn settings_come_along_for_who_makes_the_new_room_and_for_who_joins_it() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let old = create(&alice, json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{old}"), json!({})).await;
    set_up(&alice, &old).await;
    set_up(&bob, &old).await;
    let (_, before) = bob.get("/_matrix/client/v3/sync").await;
    let since = before["next_batch"].as_str().unwrap();
    let new = create(
        &alice,
        json!({ "preset": "public_chat", "creation_content": { "predecessor": { "room_id": old } } }),
    )
    .await;
    let tombstone = format!("/_matrix/client/v3/rooms/{old}/state/m.room.tombstone");
    assert_eq!(settings(&alice, &new).await["room"], json!([]), "not before the tombstone");
    let (status, json) = alice.put(&tombstone, json!({ "body": "gone", "replacement_room": new })).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    assert_eq!(settings(&bob, &new).await["room"], json!([]), "not before the join");
    bob.ok_post(&format!("/join/{new}"), json!({})).await;
    for client in [&alice, &bob] {
        let carried = settings(client, &new).await;
        assert_eq!(carried, settings(client, &old).await, "{}", client.user_id);
        assert_eq!(carried["room"].as_array().unwrap().len(), 1);
        assert_eq!(carried["override"][0]["enabled"], false);
        assert_eq!(carried["tags"]["tags"]["m.favourite"]["order"], 0.5);
        assert_eq!(carried["direct"], true);
    }
    let (_, after) = bob.get(&format!("/_matrix/client/v3/sync?since={since}")).await;
    assert!(after["account_data"].to_string().contains(&new), "{after}");
    assert!(after["rooms"]["join"][&new]["account_data"].to_string().contains("m.favourite"), "{after}");
    // Settings are carried over once: changes made afterwards stay, also when the timers of the joins would be due.
    bob.ok_delete(&format!("/pushrules/global/room/{new}"), json!({})).await;
    server.server().app().env.sleep(std::time::Duration::from_secs(180)).await;
    assert_eq!(settings(&bob, &new).await["room"], json!([]));
}

/// Another server let the user in and told it like any other event, so that nothing here waits for the join but the batch that stores it.
#[tokio::test(start_paused = true)]
async fn settings_come_along_with_a_join_that_another_server_tells() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let old = create(&alice, json!({ "preset": "public_chat" })).await;
    bob.ok_post(&format!("/join/{old}"), json!({})).await;
    set_up(&bob, &old).await;
    let predecessor = json!({ "predecessor": { "room_id": old } });
    let new = create(&alice, json!({ "preset": "public_chat", "creation_content": predecessor })).await;
    let tombstone = json!({ "body": "gone", "replacement_room": new });
    alice.ok_put(&format!("/rooms/{old}/state/m.room.tombstone"), tombstone).await;
    let app = server.server().app();
    let mut remote = Remote::new(app, &new);
    remote.user = bob.user_id.as_str().try_into().unwrap();
    remote.join().await;
    app.env.sleep(std::time::Duration::from_secs(1)).await;
    let carried = settings(&bob, &new).await;
    assert_eq!(carried, settings(&bob, &old).await);
    assert_eq!(carried["tags"]["tags"]["m.favourite"]["order"], 0.5);
    server.assert_whole();
}

/// The tombstone is told by another server, and comes after the join of a user who was quick to follow.
#[tokio::test(start_paused = true)]
async fn settings_and_names_follow_who_was_in_the_new_room_before_the_tombstone_came() {
    let server = TestServer::new();
    let (alice, bob, carol) =
        (server.register("alice").await, server.register("bob").await, server.register("carol").await);
    let levels = json!({ "users": { &*alice.user_id: 100, "@bob:b.example": 100 } });
    let body = json!({ "preset": "public_chat", "room_version": "11", "room_alias_name": "here",
        "visibility": "public", "power_level_content_override": levels, "invite": [carol.user_id] });
    let old = create(&alice, body).await;
    bob.ok_post(&format!("/join/{old}"), json!({})).await;
    // Carol refuses the invitation, so that she has left a room in which she never was.
    carol.ok_post(&format!("/rooms/{old}/leave"), json!({})).await;
    for client in [&bob, &carol] {
        set_up(client, &old).await;
    }
    let predecessor = json!({ "predecessor": { "room_id": old } });
    let new = create(&alice, json!({ "preset": "public_chat", "creation_content": predecessor })).await;
    for client in [&bob, &carol] {
        client.ok_post(&format!("/join/{new}"), json!({})).await;
    }
    let app = server.server().app();
    let remote = Remote::new(app, &old);
    remote.join().await;
    let content = json!({ "body": "gone", "replacement_room": new });
    let tombstone = remote.event("m.room.tombstone", Some(""), content, &remote.heads());
    assert_eq!(settings(&bob, &new).await["room"], json!([]));
    remote.send(tombstone).await;
    app.env.sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(settings(&bob, &new).await, settings(&bob, &old).await);
    assert_eq!(settings(&carol, &new).await["room"], json!([]));
    let named = alice.ok_get(&format!("/directory/room/{}", encoded("#here:test.example"))).await;
    assert_eq!(named["room_id"], new);
    for (room, visibility) in [(&old, "private"), (&new, "public")] {
        let listed = alice.ok_get(&format!("/directory/list/room/{}", encoded(room))).await;
        assert_eq!(listed["visibility"], visibility, "{room}");
    }
    server.assert_whole();
}

/// The process ended between the join and the settings, so the timer that the join set carries them over.
#[tokio::test(start_paused = true)]
async fn what_was_promised_is_kept_by_a_timer() {
    use aqueduct::{
        schema::jobs::{Job, Move},
        store::{Guard, timer},
    };
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (old, new) = (create(&alice, json!({})).await, create(&alice, json!({})).await);
    set_up(&alice, &old).await;
    let app = server.server().app();
    let user_id = ruma::UserId::parse(alice.user_id.as_str()).unwrap();
    let user = aqueduct::accounts::users::find_num(&*app.store.snapshot(), &user_id).unwrap().unwrap();
    let moved = Move { from: (*old).try_into().unwrap(), to: (*new).try_into().unwrap() };
    let room = room_num(&app.store, moved.to.as_str());
    let promised = Job::CarryOver { user, room, moved }.timer(app.env.now_ms() + 10_000);
    let mut batch = app.store.batch(&Guard::own_tables());
    timer::set(&mut batch, &promised);
    app.store.enqueue(batch).unwrap().flushed.await.unwrap();
    assert_eq!(settings(&alice, &new).await["room"], json!([]));
    app.env.sleep(std::time::Duration::from_secs(20)).await;
    assert_eq!(settings(&alice, &new).await, settings(&alice, &old).await);
    assert!(!timer::is_waiting(&*app.store.snapshot(), &promised).unwrap());
}

#[tokio::test(start_paused = true)]
async fn who_was_not_in_the_old_room_carries_nothing_over() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let old = create(&alice, json!({ "preset": "public_chat", "invite": [bob.user_id] })).await;
    // Bob refuses the invitation, so that he has left a room in which he never was.
    bob.ok_post(&format!("/rooms/{old}/leave"), json!({})).await;
    set_up(&bob, &old).await;
    let new = create(
        &alice,
        json!({ "preset": "public_chat", "creation_content": { "predecessor": { "room_id": old } } }),
    )
    .await;
    replace(&alice, &old, json!(new)).await;
    bob.ok_post(&format!("/join/{new}"), json!({})).await;
    assert_eq!(settings(&bob, &new).await["room"], json!([]));
    for predecessor in
        [json!(7), json!({}), json!({ "room_id": "nonsense" }), json!({ "room_id": "!not:here" })]
    {
        create(&alice, json!({ "creation_content": { "predecessor": predecessor } })).await;
    }
}

/// Sets the tombstone of a room; `by` is the room that is to replace it.
async fn replace(client: &TestClient, old: &str, by: Value) {
    let tombstone = format!("/_matrix/client/v3/rooms/{old}/state/m.room.tombstone");
    let (status, json) = client.put(&tombstone, json!({ "body": "gone", "replacement_room": by })).await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

/// Anybody can make a room that calls another its predecessor: only the rooms of both sides together say that it is.
#[tokio::test(start_paused = true)]
async fn a_room_that_only_claims_to_replace_another_changes_nobodys_settings() {
    let server = TestServer::new();
    let (alice, bob, mallory) =
        (server.register("alice").await, server.register("bob").await, server.register("mallory").await);
    let old = create(&alice, json!({ "preset": "public_chat" })).await;
    for client in [&bob, &mallory] {
        client.ok_post(&format!("/join/{old}"), json!({})).await;
        set_up(client, &old).await;
    }
    let claim = json!({ "preset": "public_chat", "creation_content": { "predecessor": { "room_id": old } } });
    let fake = create(&mallory, claim.clone()).await;
    let other = create(&alice, json!({ "preset": "public_chat" })).await;
    let join = async |room: &str| {
        bob.ok_post(&format!("/join/{room}"), json!({})).await;
        settings(&bob, room).await
    };
    let nothing = json!({ "override": [], "room": [], "underride": [], "direct": false });
    let without_tags = |mut settings: Value| {
        assert_ne!(settings["tags"]["tags"]["m.favourite"]["order"], 0.5, "{settings}");
        settings.as_object_mut().unwrap().remove("tags");
        settings
    };
    assert_eq!(without_tags(join(&fake).await), nothing);
    assert_eq!(without_tags(settings(&mallory, &fake).await), nothing);
    // A tombstone that names another room, or none, does not change that.
    for named in [json!(other), json!(7), json!("nonsense"), json!("!not:here")] {
        replace(&alice, &old, named).await;
        let fake = create(&mallory, claim.clone()).await;
        assert_eq!(without_tags(join(&fake).await), nothing);
    }
    // The room that the tombstone names does not call the old room its predecessor.
    replace(&alice, &old, json!(other)).await;
    assert_eq!(without_tags(join(&other).await), nothing);
}
