//! `src/api/client/profile.rs`, the rest of `src/api/client/account.rs`, `src/api/client/third_party.rs`

use std::time::Duration;

use aqueduct::{
    accounts::users,
    schema::jobs::Job,
    store::{Guard, timer},
};
use futures_util::future::join_all;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    receipts::room_of,
    support::{TestClient, TestServer, user_num},
    sync::{Chain, events},
};

fn path(client: &TestClient, field: &str) -> String {
    format!("/_matrix/client/v3/profile/{}{field}", client.user_id)
}

#[tokio::test(start_paused = true)]
async fn fields_are_set_shown_to_everybody_and_deleted() {
    let server = TestServer::new();
    let (alice, nobody) = (server.register("alice").await, server.anonymous());
    assert_eq!(nobody.get(&path(&alice, "")).await, (StatusCode::OK, json!({ "displayname": "alice" })));
    alice.ok_delete(&path(&alice, "/displayname"), json!({})).await;
    assert_eq!(nobody.get(&path(&alice, "")).await, (StatusCode::OK, json!({})));
    assert_eq!(nobody.get(&path(&alice, "/displayname")).await.1["errcode"], "M_NOT_FOUND");
    let fields = [
        ("displayname", json!("Alice ☎")),
        ("avatar_url", json!("mxc://test.example/abc")),
        ("m.tz", json!("Europe/Berlin")),
        ("org.example.pronouns", json!([{ "language": "en", "summary": "she" }])),
        ("org.example.nothing", Value::Null),
    ];
    let mut all = json!({});
    for (field, value) in fields {
        let body = json!({ field: value });
        assert_eq!(alice.put(&path(&alice, &format!("/{field}")), body).await, (StatusCode::OK, json!({})));
        let shown = nobody.get(&path(&alice, &format!("/{field}"))).await;
        assert_eq!(shown, (StatusCode::OK, json!({ field: value })));
        all[field] = value;
    }
    assert_eq!(nobody.get(&path(&alice, "")).await, (StatusCode::OK, all));
    for field in
        ["/m.tz", "/org.example.pronouns", "/org.example.nothing", "/org.example.none", "/displayname"]
    {
        assert_eq!(alice.delete(&path(&alice, field), json!({})).await, (StatusCode::OK, json!({})));
    }
    // An empty name deletes it, too, because clients did it so before there was an endpoint for it.
    assert_eq!(alice.put(&path(&alice, "/avatar_url"), json!({ "avatar_url": "" })).await.0, StatusCode::OK);
    assert_eq!(nobody.get(&path(&alice, "")).await, (StatusCode::OK, json!({})));
}

#[tokio::test(start_paused = true)]
async fn a_profile_is_its_owners_and_bounded() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (status, json) = bob.put(&path(&alice, "/displayname"), json!({ "displayname": "x" })).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")));
    assert!(json["error"].as_str().unwrap().contains("profile"), "{json}");
    assert_eq!(bob.delete(&path(&alice, "/displayname"), json!({})).await.0, StatusCode::FORBIDDEN);
    let wrong = [
        ("displayname", json!({}), "M_MISSING_PARAM"),
        ("displayname", json!({ "displayname": 1 }), "M_INVALID_PARAM"),
        ("displayname", json!({ "displayname": "a".repeat(257) }), "M_INVALID_PARAM"),
        ("avatar_url", json!({ "avatar_url": { "url": "mxc://a/b" } }), "M_INVALID_PARAM"),
        ("displayname", json!({ "displayname": null }), "M_INVALID_PARAM"),
        ("displayname", json!({ "displayname": "a", "avatar_url": "mxc://a.example/b" }), "M_INVALID_PARAM"),
        ("avatar_url", json!({ "avatar_url": null }), "M_INVALID_PARAM"),
        ("avatar_url", json!({ "avatar_url": "mxc://a" }), "M_INVALID_PARAM"),
        ("avatar_url", json!({ "avatar_url": "mxc://a.example/b/c" }), "M_INVALID_PARAM"),
        ("nodot", json!({ "nodot": 1 }), "M_INVALID_PARAM"),
        ("org..x", json!({ "org..x": 1 }), "M_INVALID_PARAM"),
        ("m.tz", json!({ "m.tz": 1 }), "M_INVALID_PARAM"),
        ("UPPER", json!({ "UPPER": 1 }), "M_INVALID_PARAM"),
        ("a%20b", json!({ "a b": 1 }), "M_INVALID_PARAM"),
        (&"a".repeat(256), json!({}), "M_KEY_TOO_LARGE"),
        ("org.example.big", json!({ "org.example.big": "b".repeat(65_536) }), "M_PROFILE_TOO_LARGE"),
    ];
    for (field, body, code) in wrong {
        let (status, json) = alice.put(&path(&alice, &format!("/{field}")), body).await;
        assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some(code)), "{field}");
    }
    let third = |name: &str| {
        let (path, body) = (path(&alice, &format!("/{name}")), json!({ name: "b".repeat(21_700) }));
        let alice = alice.clone();
        async move { alice.put(&path, body).await.0 }
    };
    let statuses =
        join_all(["org.example.a", "org.example.b", "org.example.c", "org.example.d"].map(third)).await;
    assert_eq!(statuses.iter().filter(|status| status.is_success()).count(), 3, "{statuses:?}");
    assert_eq!(
        server.anonymous().get("/_matrix/client/v3/profile/@none:test.example").await.0,
        StatusCode::NOT_FOUND
    );
    assert_eq!(server.anonymous().get("/_matrix/client/v3/profile/none").await.0, StatusCode::BAD_REQUEST);
}

async fn member(client: &TestClient, room: &str, user: &TestClient) -> Value {
    let path = format!("/_matrix/client/v3/rooms/{room}/state/m.room.member/{}", user.user_id);
    client.get(&path).await.1
}

#[tokio::test(start_paused = true)]
async fn rooms_learn_of_a_new_name_and_of_nothing_else() {
    let server = TestServer::new();
    let alice = server.register("alice").await;
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({})).await;
    let room = made["room_id"].as_str().unwrap();
    alice.ok_put(&path(&alice, "/displayname"), json!({ "displayname": "Alice" })).await;
    assert_eq!(member(&alice, room, &alice).await, json!({ "membership": "join", "displayname": "Alice" }));
    alice.ok_put(&path(&alice, "/m.tz"), json!({ "m.tz": "Europe/Berlin" })).await;
    alice.ok_put(&path(&alice, "/displayname"), json!({ "displayname": "" })).await;
    assert_eq!(member(&alice, room, &alice).await, json!({ "membership": "join" }));
}

#[tokio::test(start_paused = true)]
async fn clients_are_told_that_a_name_is_gone_however_it_was_removed() {
    let server = TestServer::new();
    let (people, room) = room_of(&server, &["alice", "bob"]).await;
    let (alice, bob) = (&people[0], &people[1]);
    let mut chain = Chain::of(bob);
    chain.next().await;
    for body in [Some(json!({ "displayname": "" })), None] {
        alice.ok_put(&path(alice, "/displayname"), json!({ "displayname": "Alice" })).await;
        let told = |sync: &Value| {
            let last =
                events(sync, "join", &room, "timeline").into_iter().next_back().cloned().unwrap_or_default();
            (last["type"].clone(), last["state_key"].clone(), last["content"].clone())
        };
        let named = json!({ "membership": "join", "displayname": "Alice" });
        let of_alice = |content| (json!("m.room.member"), json!(alice.user_id), content);
        assert_eq!(told(&chain.next().await), of_alice(named));
        let (status, _) = match &body {
            Some(body) => alice.put(&path(alice, "/displayname"), body.clone()).await,
            None => alice.delete(&path(alice, "/displayname"), json!({})).await,
        };
        assert_eq!(status, StatusCode::OK, "{body:?}");
        assert_eq!(told(&chain.next().await), of_alice(json!({ "membership": "join" })), "{body:?}");
        assert_eq!(bob.get(&path(alice, "")).await.1, json!({}), "{body:?}");
    }
}

fn auth(name: &str) -> Value {
    json!({ "type": "m.login.password", "identifier": { "type": "m.id.user", "user": name },
        "password": format!("password of {name}") })
}

#[tokio::test(start_paused = true)]
async fn a_deactivated_account_is_gone_and_its_name_stays_taken() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = made["room_id"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    alice.ok_put(&path(&alice, "/displayname"), json!({ "displayname": "Alice" })).await;
    let account_data = "/_matrix/client/v3/user/@alice:test.example/account_data/a";
    alice.ok_put(account_data, json!({})).await;

    let deactivate = "/_matrix/client/v3/account/deactivate";
    let (status, json) = alice.post(deactivate, json!({})).await;
    assert_eq!(
        (status, &json["flows"]),
        (StatusCode::UNAUTHORIZED, &json!([{ "stages": ["m.login.password"] }]))
    );
    let (status, _) = alice.post(deactivate, json!({ "auth": auth("bob") })).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let (status, json) = alice.post(deactivate, json!({ "auth": auth("alice"), "erase": true })).await;
    assert_eq!((status, json), (StatusCode::OK, json!({ "id_server_unbind_result": "success" })));

    assert_eq!(alice.get("/_matrix/client/v3/account/whoami").await.0, StatusCode::UNAUTHORIZED);
    let mut login = auth("alice");
    login["device_id"] = "X".into();
    assert_eq!(server.anonymous().post("/_matrix/client/v3/login", login).await.0, StatusCode::FORBIDDEN);
    let again = json!({ "username": "alice", "password": "x", "auth": { "type": "m.login.dummy" } });
    let (status, json) = server.anonymous().post("/_matrix/client/v3/register", again).await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::BAD_REQUEST, Some("M_USER_IN_USE")));
    assert_eq!(bob.get(&path(&alice, "")).await.0, StatusCode::NOT_FOUND);
    assert_eq!(member(&bob, room, &alice).await["membership"], "leave");
}

#[tokio::test(start_paused = true)]
async fn rooms_are_told_after_a_restart_in_between() {
    let server = TestServer::new();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    let (_, made) = alice.post("/_matrix/client/v3/createRoom", json!({ "preset": "public_chat" })).await;
    let room = made["room_id"].as_str().unwrap();
    bob.ok_post(&format!("/join/{room}"), json!({})).await;
    // This is what a deactivation leaves that got no further than its own batch.
    let app = server.server().app();
    let user = user_num(&app.store, &bob.user_id);
    let mut batch = app.store.batch(&Guard::alone());
    users::deactivate(&mut batch, user, false).unwrap();
    let job = Job::TellRooms { user };
    timer::set(&mut batch, &job.timer(app.env.now_ms() + 5_000));
    app.store.enqueue(batch).unwrap().flushed.await.unwrap();
    assert_eq!(member(&alice, room, &bob).await["membership"], "join");
    app.env.sleep(Duration::from_secs(10)).await;
    assert_eq!(member(&alice, room, &bob).await["membership"], "leave");
    let left = timer::list_due(&*app.store.snapshot(), u64::MAX, 10, |kind| kind == job.kind());
    assert_eq!(left.unwrap(), []);
}

#[tokio::test(start_paused = true)]
async fn addresses_are_none_and_are_not_taken() {
    let alice = TestServer::new().register("alice").await;
    let base = "/_matrix/client/v3/account";
    assert_eq!(alice.get(&format!("{base}/3pid")).await, (StatusCode::OK, json!({ "threepids": [] })));
    for path in [
        "3pid/add",
        "3pid/bind",
        "3pid/delete",
        "3pid/unbind",
        "3pid/email/requestToken",
        "password/email/requestToken",
        "password/msisdn/requestToken",
    ] {
        let (status, json) = alice.post(&format!("{base}/{path}"), json!({})).await;
        assert_eq!(
            (status, json["errcode"].as_str()),
            (StatusCode::FORBIDDEN, Some("M_THREEPID_DENIED")),
            "{path}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn capabilities_say_what_a_user_may_change() {
    let alice = TestServer::new().register("alice").await;
    let (_, json) = alice.get("/_matrix/client/v3/capabilities").await;
    let capabilities = &json["capabilities"];
    assert_eq!(capabilities["m.profile_fields"]["enabled"], true);
    assert_eq!(capabilities["m.change_password"]["enabled"], true);
    assert_eq!(capabilities["m.3pid_changes"]["enabled"], false);
    assert_eq!(capabilities["m.room_versions"]["default"], "12");
}
