//! New rooms that the server has encrypted by itself: `rooms.encrypt_new` of the settings.

use aqueduct::config::EncryptNew;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, TestServer},
};

/// The algorithm of a new room; none where it is not encrypted.
async fn algorithm(client: &TestClient, request: Value) -> Option<String> {
    let room = client.create(request).await;
    let (status, content) = client.state(&room, "m.room.encryption", "").await;
    (status == StatusCode::OK).then(|| content["algorithm"].as_str().unwrap().to_owned())
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
        for request in
            [json!({}), json!({ "preset": "private_chat" }), json!({ "preset": "trusted_private_chat" })]
        {
            assert_eq!(algorithm(&alice, request).await, of_private, "{setting:?}");
        }
        for request in [json!({ "visibility": "public" }), json!({ "preset": "public_chat" })] {
            assert_eq!(algorithm(&alice, request).await, of_public, "{setting:?}");
        }
        // A client that says how a room is encrypted is asked no more.
        let content = json!({ "algorithm": "m.other", "rotation_period_msgs": 5 });
        let own = json!({ "initial_state": [{ "type": "m.room.encryption", "state_key": "", "content": content }] });
        assert_eq!(algorithm(&alice, own).await.as_deref(), Some("m.other"));
        let space = json!({ "creation_content": { "type": "m.space" } });
        assert_eq!(algorithm(&alice, space).await, None, "a space has no messages");
        server.assert_whole();
    }
}
