//! Invitations by an address, for which another server says who the invited person is (server-server API, "Third-party invites").

use federation::testing::key_pair;
use http::StatusCode;
use ruma::{
    CanonicalJsonObject,
    api::federation::thirdparty::exchange_invite::v1::Request,
    serde::{Raw, base64::Standard},
    signatures::sign_json,
};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{encoded, federated::Federated},
};

const ALICE: &str = "@alice:a.example";
const BOB: &str = "@bob:b.example";

/// The word of an identity server that this user has the address to which a token was sent.
fn signed(user: &str, token: &str, seed: u8) -> Value {
    let mut signed: CanonicalJsonObject =
        serde_json::from_value(json!({ "mxid": user, "token": token })).unwrap();
    sign_json("identity.example", &key_pair(seed, "0").unwrap(), &mut signed).unwrap();
    serde_json::to_value(signed).unwrap()
}

fn public_key(seed: u8) -> String {
    let key = key_pair(seed, "0").unwrap().public_key();
    ruma::serde::Base64::<Standard, _>::new(key.to_vec()).encode()
}

async fn exchange(
    federated: &Federated,
    room: &str,
    sender: &str,
    user: &str,
    content: &Value,
) -> Result<(), String> {
    let content = Raw::from_json(serde_json::value::to_raw_value(content).unwrap());
    let (sender, user) = (sender.try_into().unwrap(), user.try_into().unwrap());
    let request = Request::new(room.try_into().unwrap(), sender, user, content);
    let app = federated.server(1).server().app();
    let asked = federated.name(0).try_into().unwrap();
    let answer = app.remote.client.send(asked, request, Default::default()).await;
    answer.map(drop).map_err(|failure| format!("{failure:?}"))
}

fn content(signed: &Value) -> Value {
    json!({ "membership": "invite", "third_party_invite": { "display_name": "somebody", "signed": signed } })
}

#[tokio::test(start_paused = true)]
async fn whoever_was_invited_by_an_address_is_invited_once_their_server_says_who_they_are() {
    let federated = Federated::new(&["a.example", "b.example"]);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    for version in ["10", "12"] {
        let room = alice.create(json!({ "preset": "private_chat", "room_version": version })).await;
        let by_address = json!({
            "display_name": "b...@e...", "key_validity_url": "https://identity.example/valid",
            "public_key": public_key(7),
            "public_keys": [{ "public_key": public_key(7), "key_validity_url": "https://identity.example/valid" }],
        });
        let path = format!("/rooms/{}/state/m.room.third_party_invite/token", encoded(&room));
        alice.ok_put(&path, by_address).await;
        let member = format!("/_matrix/client/v3/rooms/{}/state/m.room.member/{BOB}", encoded(&room));

        let word = signed(BOB, "token", 7);
        let other = "!other:a.example";
        for (what, room, sender, user, content) in [
            ("forged", &*room, ALICE, BOB, content(&signed(BOB, "token", 8))),
            ("another token", &room, ALICE, BOB, content(&signed(BOB, "other", 7))),
            ("another user", &room, ALICE, "@carol:b.example", content(&word)),
            (
                "of another server",
                &room,
                ALICE,
                "@carol:c.example",
                content(&signed("@carol:c.example", "token", 7)),
            ),
            ("nobody", &room, "@nobody:a.example", BOB, content(&word)),
            ("not ours", &room, "@eve:b.example", BOB, content(&word)),
            (
                "join",
                &room,
                ALICE,
                BOB,
                json!({ "membership": "join", "third_party_invite": { "signed": word } }),
            ),
            ("no word", &room, ALICE, BOB, json!({ "membership": "invite" })),
            ("another room", other, ALICE, BOB, content(&word)),
        ] {
            assert!(exchange(&federated, room, sender, user, &content).await.is_err(), "{what}");
        }
        assert_eq!(alice.get(&member).await.0, StatusCode::NOT_FOUND, "nobody is invited by any of these");

        for _ in 0..2 {
            exchange(&federated, &room, ALICE, BOB, &content(&word)).await.unwrap();
        }
        let told = alice.ok_get(&member).await;
        assert_eq!(told["membership"], "invite");
        assert_eq!(
            told["third_party_invite"]["display_name"], "b...@e...",
            "the room says what the address is"
        );
        let invited = bob.ok_get("/sync").await["rooms"]["invite"][&room].clone();
        assert!(invited["invite_state"]["events"].is_array(), "{invited}");
    }
    federated.server(0).assert_whole();
}
