//! `src/api/client/discovery.rs`

use http::StatusCode;

use crate::support::TestServer;

#[tokio::test(start_paused = true)]
async fn versions_are_listed_with_or_without_a_slash() {
    let client = TestServer::new().anonymous();
    for path in ["/_matrix/client/versions", "/_matrix/client/versions/"] {
        let (status, json) = client.get(path).await;
        assert_eq!(status, StatusCode::OK);
        assert!(json["versions"].as_array().unwrap().contains(&"v1.11".into()), "{json}");
    }
}

#[tokio::test(start_paused = true)]
async fn well_known_names_the_public_address() {
    let server = TestServer::with(|config| config.server.public_base_url = "https://here.example".into());
    let (status, json) = server.anonymous().get("/.well-known/matrix/client").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(json["m.homeserver"]["base_url"], "https://here.example");
}

#[tokio::test(start_paused = true)]
async fn capabilities_need_a_token() {
    let (status, json) = TestServer::new().anonymous().get("/_matrix/client/v3/capabilities").await;
    assert_eq!((status, json["errcode"].as_str()), (StatusCode::UNAUTHORIZED, Some("M_MISSING_TOKEN")));
}

#[tokio::test(start_paused = true)]
async fn features_of_proposals_are_named_where_clients_look_for_them() {
    let server = TestServer::new();
    let (_, versions) = server.anonymous().get("/_matrix/client/versions").await;
    for feature in ["org.matrix.msc4155", "org.matrix.msc4380", "org.matrix.msc4380.stable"] {
        assert_eq!(versions["unstable_features"][feature], true, "{versions}");
    }
    let capabilities = server.register("alice").await.ok_get("/capabilities").await;
    let enforced = &capabilities["capabilities"]["org.matrix.msc4155.invite_permission_config_enforced"];
    assert_eq!(enforced["enabled"], true, "{capabilities}");
}
