//! New rooms that the server has encrypted by itself: `rooms.encrypt_new` of the settings.

use aqueduct::config::EncryptNew;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer},
};

/// The algorithm of a new room, as its state has it; none where it has none.
async fn algorithm(client: &TestClient, request: Value) -> Option<String> {
    let room = client.create(request).await;
    let (status, content) = client.state(&room, "m.room.encryption", "").await;
    content["algorithm"].as_str().filter(|_| status == StatusCode::OK).map(str::to_owned)
}

#[tokio::test(start_paused = true)]
async fn new_rooms_are_encrypted_as_the_settings_say() {
    let megolm = Some("m.megolm.v1.aes-sha2".to_owned());
    for (setting, of_private, of_public) in [
        (EncryptNew::Off, None, None),
        (EncryptNew::Invite, megolm.clone(), None),
        (EncryptNew::All, megolm.clone(), megolm.clone()),
    ] {
        let server = TestServer::with(|config| config.rooms.encrypt_new = setting);
        let alice = server.register("alice").await;
        // The join rule counts that the room will have, whatever the preset would give it.
        let with_rule = |preset: &str, rules: &[&str]| {
            let events = rules.iter().map(|rule| {
                json!({ "type": "m.room.join_rules", "state_key": "", "content": { "join_rule": rule } })
            });
            json!({ "preset": preset, "initial_state": events.collect::<Vec<_>>() })
        };
        for request in [
            json!({}),
            json!({ "preset": "private_chat" }),
            json!({ "preset": "trusted_private_chat" }),
            with_rule("private_chat", &["knock"]),
            with_rule("public_chat", &["invite"]),
            with_rule("public_chat", &["public", "restricted"]),
        ] {
            assert_eq!(algorithm(&alice, request).await, of_private, "{setting:?}");
        }
        for request in [
            json!({ "visibility": "public" }),
            json!({ "preset": "public_chat" }),
            with_rule("private_chat", &["public"]),
            with_rule("trusted_private_chat", &["invite", "public"]),
        ] {
            assert_eq!(algorithm(&alice, request).await, of_public, "{setting:?}");
        }
        // A client that says how a room is encrypted is asked no more.
        let content = json!({ "algorithm": "m.other", "rotation_period_msgs": 5 });
        let own = json!({ "initial_state": [{ "type": "m.room.encryption", "state_key": "", "content": content }] });
        assert_eq!(algorithm(&alice, own).await.as_deref(), Some("m.other"));
        // One that says nothing by which a room could be encrypted does not keep the server from it.
        let none =
            [json!({}), json!({ "algorithm": null }), json!({ "algorithm": "" }), json!({ "algorithm": 1 })];
        for content in none {
            let state = |content: &Value| json!({ "type": "m.room.encryption", "content": content });
            let request = json!({ "initial_state": [state(&content)], "visibility": "public" });
            let expected = of_public.clone().or(content["algorithm"].as_str().map(str::to_owned));
            assert_eq!(algorithm(&alice, request).await, expected, "{setting:?} {content}");
            let both =
                json!({ "initial_state": [state(&json!({ "algorithm": "m.other" })), state(&content)] });
            if of_private.is_some() {
                assert_eq!(
                    algorithm(&alice, both).await.as_deref(),
                    Some("m.other"),
                    "{setting:?} {content}"
                );
            }
        }
        let space = json!({ "creation_content": { "type": "m.space" } });
        assert_eq!(algorithm(&alice, space).await, None, "a space has no messages");
        server.assert_whole();
    }
}

/// The algorithm of the room that takes the place of another one; none where it is not encrypted.
async fn upgraded(client: &TestClient, room: &str) -> Option<String> {
    let new = client.ok_post(&format!("/rooms/{room}/upgrade"), json!({ "new_version": "11" })).await;
    let (status, content) =
        client.state(new["replacement_room"].as_str().unwrap(), "m.room.encryption", "").await;
    content["algorithm"].as_str().filter(|_| status == StatusCode::OK).map(str::to_owned)
}

#[tokio::test(start_paused = true)]
async fn a_room_that_replaces_another_one_is_encrypted_as_that_one_was() {
    for setting in [EncryptNew::Invite, EncryptNew::All] {
        let server = TestServer::with(|config| config.rooms.encrypt_new = setting);
        let alice = server.register("alice").await;
        // An event without an algorithm encrypts nothing.
        for preset in ["public_chat", "private_chat"] {
            let room = alice.create(json!({ "preset": preset })).await;
            alice.ok_put(&format!("/rooms/{room}/state/m.room.encryption"), json!({})).await;
            assert_eq!(upgraded(&alice, &room).await, None, "{setting:?} {preset}");
        }
        let megolm = json!({ "type": "m.room.encryption", "state_key": "",
            "content": { "algorithm": "m.megolm.v1.aes-sha2" } });
        let room = alice.create(json!({ "preset": "public_chat", "initial_state": [megolm] })).await;
        assert_eq!(upgraded(&alice, &room).await.as_deref(), Some("m.megolm.v1.aes-sha2"), "{setting:?}");
        let room = alice.create(json!({ "preset": "private_chat" })).await;
        let of_setting = upgraded(&alice, &room).await;
        assert_eq!(of_setting.as_deref(), Some("m.megolm.v1.aes-sha2"), "{setting:?}");
        server.assert_whole();
    }
}
