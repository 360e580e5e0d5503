//! Clients that hang up while another server has their knock or invitation already, and has not answered.

use super::*;

/// The time after which the other server answers.
const LATE: Duration = Duration::from_secs(4);

#[tokio::test(start_paused = true)]
async fn a_knock_whose_client_hangs_up_is_known_to_both_servers() {
    let (federated, alice, bob, room) = two(json!({ "preset": "private_chat" })).await;
    let at = |act: &str| format!("/rooms/{}/{act}", encoded(&room));
    alice.ok_put(&at("state/m.room.join_rules"), json!({ "join_rule": "knock" })).await;
    let member = at(&format!("state/m.room.member/{}", encoded(&bob.user_id)));
    federated.answers_after(0, LATE);
    let knock = api(&format!("/knock/{}?via=a.example", encoded(&room)));
    // The first answer is the template, and the next one that to the knock.
    let asked = tokio::time::timeout(LATE + LATE / 2, bob.post(&knock, json!({}))).await;
    assert!(asked.is_err(), "the client hangs up before the other server has answered");
    assert_eq!(alice.ok_get(&member).await["membership"], "knock");
    let knocks = async || bob.ok_get("/sync").await["rooms"]["knock"][&room].clone();
    assert!(knocks().await.is_null(), "it is not known here yet");
    federated.server(1).server().app().env.sleep(LATE * 10).await;
    assert!(knocks().await.is_object());
    federated.answers_after(0, Duration::ZERO);
    // Both agree, so that it can be withdrawn.
    bob.ok_post(&at("leave"), json!({})).await;
    assert_eq!(alice.ok_get(&member).await["membership"], "leave");
    assert!(knocks().await.is_null());
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_invitation_whose_client_hangs_up_is_known_to_both_servers() {
    let (federated, alice, bob, room) = two(json!({ "preset": "private_chat" })).await;
    let at = |act: &str| format!("/rooms/{}/{act}", encoded(&room));
    let member = at(&format!("state/m.room.member/{}", encoded(&bob.user_id)));
    federated.answers_after(1, LATE);
    let target = json!({ "user_id": bob.user_id });
    let asked = tokio::time::timeout(LATE / 2, alice.post(&api(&at("invite")), target)).await;
    assert!(asked.is_err(), "the client hangs up before the other server has answered");
    assert!(invited(&bob, &room).await.is_object(), "that server has the invitation");
    assert_eq!(alice.get(&api(&member)).await.0, StatusCode::NOT_FOUND, "and the room has not");
    federated.server(0).server().app().env.sleep(LATE * 10).await;
    assert_eq!(alice.ok_get(&member).await["membership"], "invite");
    federated.answers_after(1, Duration::ZERO);
    bob.ok_post(&format!("/join/{}?via=a.example", encoded(&room)), json!({})).await;
    assert_eq!(alice.ok_get(&member).await["membership"], "join");
    federated.server(0).assert_whole();
    federated.server(1).assert_whole();
}
