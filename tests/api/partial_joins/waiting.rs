//! A user who comes back to a room of unknown members while its policy server cannot be asked.

use super::*;
use crate::{
    remote_joins::{rooms_of, was_asked},
    support::{
        guard::{policy, signature},
        scripted::honest,
    },
};

/// Puts `b.example` into the network, which signs what the room wants signed as long as it is up.
fn serve_guard(net: &Net) -> Arc<AtomicBool> {
    let keys = own_keys("b.example", 8, "k").unwrap().document(BEGAN_MS);
    let is_up = Arc::new(AtomicBool::new(false));
    let up = Arc::clone(&is_up);
    net.host("b.example", &["5.9.0.2"]);
    net.serve("5.9.0.2:8448", &["b.example"], move |arrived| {
        let event: Value = serde_json::from_slice(arrived.request.body()).unwrap_or(Value::Null);
        std::future::ready(match arrived.request.uri().path() {
            "/_matrix/key/v2/server" => answer(200, keys.to_string()),
            "/_matrix/policy/v1/sign" if up.load(Ordering::Relaxed) => {
                let signed = json!({ "b.example": { "ed25519:policy_server": signature(&event, 1) } });
                answer(200, signed.to_string())
            }
            "/_matrix/policy/v1/sign" => answer(502, "{}"),
            _ => answer(200, r#"{"pdus":{}}"#),
        })
    });
    is_up
}

#[tokio::test(start_paused = true)]
async fn a_join_that_waits_for_the_policy_server_is_asked_for_once_and_comes_true() {
    let mut room = a_room(11);
    let mut content = policy(1);
    content["via"] = json!("b.example");
    room.add("m.room.policy", Some(""), content);
    let mut scene = Scene::with(room, |asked, mut answer| {
        if asked == "send_join" {
            answer["servers_in_room"] = json!(["a.example", "b.example"]);
        }
        answer
    })
    .await;
    let is_up = serve_guard(&scene.net);
    let asked_c = Elsewhere::serve_as(
        std::slice::from_ref(&scene.room),
        &scene.net,
        ("c.example", "5.9.0.3", 10),
        honest(),
    );
    scene.leave().await;
    let path = format!("/_matrix/client/v3/join/{}?via=a.example&via=c.example", scene.id());
    let (status, told) = scene.bob.post(&path, json!({})).await;
    assert_eq!(
        (status, &told["errcode"]),
        (StatusCode::TOO_MANY_REQUESTS, &json!("M_LIMIT_EXCEEDED")),
        "{told}"
    );
    assert!(rooms_of(&scene.bob).await.is_empty(), "it waits");
    let sends =
        |asked: &[(String, Value)], name: &str| asked.iter().filter(|(path, _)| path.contains(name)).count();
    assert_eq!(sends(&scene.asked.lock().unwrap(), "/send_join/"), 1);
    // It takes longer than the job waits that learns the members, if somebody of ours is in the room.
    scene.pause(200).await;
    assert!(!was_asked(&asked_c, "make_join") && !was_asked(&asked_c, "send_join"), "nobody else is asked");
    is_up.store(true, Ordering::Relaxed);
    // It speaks, so that it is asked again.
    Peer::unheard("b.example", 8).transact(&scene.server, "up", &[], &[]).await;
    scene.pause(300).await;
    assert_eq!(rooms_of(&scene.bob).await, [scene.room.room_id.as_str()]);
    for asked in [&scene.asked, &asked_c] {
        assert!(!was_asked(asked, "make_leave") && !was_asked(asked, "send_leave"), "nothing is taken back");
    }
    scene.note_join().await;
    scene.serve_again();
    scene.open().await;
    assert_eq!(scene.state().await, scene.expected());
    scene.server.assert_whole();
}
