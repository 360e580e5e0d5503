//! Several whole servers that ask one another (server-server API).

use std::time::Duration;

use federation::testing::Weather;
use ruma::api::federation::query::get_profile_information::v1::Request;
use serde_json::json;

use crate::support::federated::Federated;

/// Whether the server of one place learns the name of a user of the server of another.
async fn learns(federated: &Federated, asking: usize, asked: usize, user: &str) -> bool {
    let app = federated.server(asking).server().app();
    let server = federated.name(asked).try_into().unwrap();
    let request = Request::new(user.try_into().unwrap());
    let profile = app.remote.client.send(server, request, Default::default()).await;
    profile.is_ok_and(|profile| profile.get("displayname") == Some(&json!("Alice")))
}

#[tokio::test(start_paused = true)]
async fn servers_ask_one_another_also_after_a_crash() {
    let mut federated = Federated::new(&["a.example", "b.example"]);
    let alice = federated.server(0).register("alice").await;
    let path = format!("/profile/{}/displayname", alice.user_id);
    alice.ok_put(&path, json!({ "displayname": "Alice" })).await;
    assert!(learns(&federated, 1, 0, &alice.user_id).await);
    federated.weather(0, Weather::Refuses, Duration::ZERO);
    assert!(!learns(&federated, 1, 0, &alice.user_id).await);
    federated.kill(0, usize::MAX, |_| {});
    assert!(
        learns(&federated, 1, 0, &alice.user_id).await,
        "the server is back, and is known by its old key"
    );
}
