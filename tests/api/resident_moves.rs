//! Users of other servers leave rooms of ours, refuse invitations and knock (server-server API, "Leaving Rooms", "Knocking upon a
//! room").

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    resident_joins::{Scene, refused},
    rooms::Rooms,
    support::remote::Remote,
};

const BOB: &str = "@bob:b.example";

#[tokio::test(start_paused = true)]
async fn a_user_of_another_server_leaves_by_way_of_this_one() {
    let scene = Scene::new().await;
    for (version, way) in [
        ("1", "v1/send_leave"),
        ("2", "v2/send_leave"),
        ("3", "v1/send_leave"),
        ("6", "v2/send_leave"),
        ("11", "v2/send_leave"),
        ("12", "v1/send_leave"),
    ] {
        let room = scene.room(version).await;
        let stranger = scene.peer.make(&scene.server, "leave", &room, BOB, "").await;
        assert_eq!(refused(stranger), (403, "M_FORBIDDEN".into()), "who is not there cannot leave");
        scene.peer.join(&scene.server, &room, BOB).await;
        let (id, event) = scene.peer.made(&scene.server, "leave", &room, BOB).await;
        assert_eq!(event["content"], json!({ "membership": "leave" }));
        let joined = scene.peer.send(&scene.server, "v2/send_join", &room, &id, &event).await;
        assert_eq!(refused(joined), (400, "M_INVALID_PARAM".into()), "it is no join");
        let expected = if way.starts_with("v1") { json!([200, {}]) } else { json!({}) };
        for _ in 0..2 {
            let sent = scene.peer.send(&scene.server, way, &room, &id, &event).await;
            assert_eq!(sent, (StatusCode::OK, expected.clone()), "{version}");
        }
        assert_eq!(scene.member(&room, BOB).await["membership"], "leave");
    }
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_another_server_refuses_is_taken_back() {
    let scene = Scene::new().await;
    let room = scene.alice.create(json!({ "preset": "private_chat", "room_version": "11" })).await;
    let app = scene.server.server().app();
    let us = Remote { user: "@alice:test.example".try_into().unwrap(), ..Remote::new(app, &room) };
    let invite = us.event("m.room.member", Some(BOB), json!({ "membership": "invite" }), &us.heads());
    us.send(invite).await;
    assert_eq!(scene.member(&room, BOB).await["membership"], "invite");
    let (id, event) = scene.peer.made(&scene.server, "leave", &room, BOB).await;
    let sent = scene.peer.send(&scene.server, "v2/send_leave", &room, &id, &event).await;
    assert_eq!(sent, (StatusCode::OK, json!({})));
    assert_eq!(scene.member(&room, BOB).await["membership"], "leave");
}

#[tokio::test(start_paused = true)]
async fn a_user_of_another_server_knocks_and_thinks_better_of_it() {
    let scene = Scene::new().await;
    for version in ["7", "9", "12"] {
        let room = scene.room(version).await;
        let public = scene.peer.make(&scene.server, "knock", &room, BOB, &format!("?ver={version}")).await;
        assert_eq!(refused(public), (403, "M_FORBIDDEN".into()), "nobody knocks at an open door");
        scene.set(&room, "m.room.join_rules", json!({ "join_rule": "knock" })).await;
        scene.set(&room, "m.room.name", json!({ "name": "Behind a door" })).await;
        let none = scene.peer.make(&scene.server, "knock", &room, BOB, "").await;
        assert_eq!(refused(none), (400, "M_INCOMPATIBLE_ROOM_VERSION".into()));
        let (id, event) = scene.peer.made(&scene.server, "knock", &room, BOB).await;
        for _ in 0..2 {
            let (status, answer) = scene.peer.send(&scene.server, "v1/send_knock", &room, &id, &event).await;
            assert_eq!(status, StatusCode::OK, "{version}: {answer}");
            let shown = answer["knock_room_state"].as_array().unwrap();
            let find = |kind: &str| shown.iter().find(|event| event["type"] == kind).unwrap();
            assert_eq!(find("m.room.name")["content"]["name"], "Behind a door");
            for event in [find("m.room.create"), find("m.room.join_rules")] {
                assert!(
                    event["signatures"]["test.example"].is_object(),
                    "whole events can be checked: {event}"
                );
                assert!(event["hashes"].is_object() && event["auth_events"].is_array());
            }
            assert!(!shown.iter().any(|event| event["type"] == "m.room.member"));
        }
        assert_eq!(scene.member(&room, BOB).await["membership"], "knock");
        let (id, event) = scene.peer.made(&scene.server, "leave", &room, BOB).await;
        let sent = scene.peer.send(&scene.server, "v2/send_leave", &room, &id, &event).await;
        assert_eq!(sent, (StatusCode::OK, json!({})));
        assert_eq!(scene.member(&room, BOB).await["membership"], "leave");
    }
    let old = scene.room("6").await;
    let (status, json) = scene.peer.make(&scene.server, "knock", &old, BOB, "?ver=6").await;
    assert_eq!((status, &json["errcode"]), (StatusCode::FORBIDDEN, &Value::from("M_FORBIDDEN")));
    scene.server.assert_whole();
}
