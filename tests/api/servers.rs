//! Other servers see this one by its keys, and it knows who asks by theirs (server-server API).

use aqueduct::{
    api::{
        Listed, Routes,
        policy::{Body, Policy, Who},
    },
    store::{Durability, Engine, Store, engine::Memory},
};
use federation::{json::Json, keys::document, testing::Net};
use http::{Method, StatusCode, header};
use serde_json::{Value, json};

use crate::support::{
    BEGAN_MS, TestServer,
    network::{Peer, answer, doors},
};

const PROFILE: &str = "/_matrix/federation/v1/query/profile?user_id=%40alice%3Atest.example";

fn memory() -> Store {
    Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
}

fn server(net: &Net) -> TestServer {
    TestServer::start(doors(net), memory(), |_| {})
}

fn names(json: &Value) -> Vec<String> {
    json.as_object().unwrap().keys().cloned().collect()
}

#[tokio::test(start_paused = true)]
async fn the_keys_of_this_server_are_published_and_fit() {
    let server = server(&Net::new(1));
    let (status, keys) = server.anonymous().get("/_matrix/key/v2/server").await;
    assert_eq!(status, StatusCode::OK);
    let name = "test.example".try_into().unwrap();
    let checked =
        document::check(name, &Json::parse(keys.to_string().as_bytes()).unwrap(), BEGAN_MS).unwrap();
    assert_eq!(checked.keys.len(), 1);
    // Servers older than version 1.6 of the specification name a key, and want all of them.
    let (status, named) = server.anonymous().get("/_matrix/key/v2/server/ed25519%3Aother").await;
    assert_eq!((status, named), (StatusCode::OK, keys));
    let (_, version) = server.anonymous().get("/_matrix/federation/v1/version").await;
    assert_eq!(version["server"]["name"], "Aqueduct");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_signs_its_request_is_answered() {
    let net = Net::new(1);
    let (server, peer) = (server(&net), Peer::new(&net, "b.example", "5.0.0.2", 2));
    let alice = server.register("alice").await;
    let (status, _) = alice
        .put(
            &format!("/_matrix/client/v3/profile/{}/displayname", alice.user_id),
            json!({ "displayname": "Alice" }),
        )
        .await;
    assert_eq!(status, StatusCode::OK);
    let asked = peer.ask(&server, Method::GET, PROFILE, None).await;
    assert_eq!(asked, (StatusCode::OK, json!({ "displayname": "Alice" })));
    let field = format!("{PROFILE}&field=displayname");
    assert_eq!(peer.ask(&server, Method::GET, &field, None).await.1, json!({ "displayname": "Alice" }));
    let other = format!("{PROFILE}&field=avatar_url");
    assert_eq!(peer.ask(&server, Method::GET, &other, None).await, (StatusCode::OK, json!({})));
    let stranger = PROFILE.replace("test.example", "b.example");
    assert_eq!(peer.ask(&server, Method::GET, &stranger, None).await.0, StatusCode::FORBIDDEN);
    let nobody = PROFILE.replace("alice", "nobody");
    assert_eq!(peer.ask(&server, Method::GET, &nobody, None).await.0, StatusCode::NOT_FOUND);
    let fetched: Vec<_> = net.take_arrived();
    assert_eq!(fetched.len(), 1, "the keys are fetched once: {fetched:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_its_origin_did_not_sign_is_refused() {
    let net = Net::new(1);
    let (server, peer) = (server(&net), Peer::new(&net, "b.example", "5.0.0.2", 2));
    let _alice = server.register("alice").await;
    let get = || peer.signed("test.example", Method::GET, PROFILE, None);
    assert_eq!(answer(&server, get()).await.0, StatusCode::OK);

    let unsigned = server.anonymous().get(PROFILE).await;
    assert_eq!((unsigned.0, &unsigned.1["errcode"]), (StatusCode::UNAUTHORIZED, &json!("M_UNAUTHORIZED")));
    let elsewhere = peer.signed("c.example", Method::GET, PROFILE, None);
    assert_eq!(answer(&server, elsewhere).await.0, StatusCode::UNAUTHORIZED);
    let mut other_path = get();
    *other_path.uri_mut() = format!("{PROFILE}&field=displayname").parse().unwrap();
    assert_eq!(answer(&server, other_path).await.0, StatusCode::UNAUTHORIZED);
    let mut with_body = get();
    *with_body.body_mut() = "{}".into();
    assert_eq!(answer(&server, with_body).await.0, StatusCode::OK, "a body that nobody reads is thrown away");
    // Somebody else says that they are this server.
    let forged = Peer::unheard("b.example", 3);
    let forged = forged.ask(&server, Method::GET, PROFILE, None).await;
    assert_eq!((forged.0, &forged.1["errcode"]), (StatusCode::UNAUTHORIZED, &json!("M_UNAUTHORIZED")));
    // Nobody knows the keys of a server that cannot be found.
    let lost = Peer::unheard("lost.example", 2);
    let (status, json) = lost.ask(&server, Method::GET, PROFILE, None).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "it may be found later: {json}");
    assert!(!json.to_string().contains("lost.example"), "what was found on the way is not told: {json}");
    for odd in [
        "X-Matrix",
        "X-Matrix origin=b.example",
        "X-Matrix origin=\"b.example\",key=\"x\",sig=\"\"",
        "Bearer x",
    ] {
        let mut request = get();
        request.headers_mut().insert(header::AUTHORIZATION, odd.parse().unwrap());
        assert_eq!(answer(&server, request).await.0, StatusCode::UNAUTHORIZED, "{odd}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_settings_say_which_servers_may_ask() {
    let net = Net::new(1);
    let peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
    let ask = async |allow: &[&str], deny: &[&str], enabled: bool| {
        let owned = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        let server = TestServer::start(doors(&net), memory(), |config| {
            (config.federation.allow, config.federation.deny) = (owned(allow), owned(deny));
            config.federation.enabled = enabled;
        });
        let _alice = server.register("alice").await;
        peer.ask(&server, Method::GET, PROFILE, None).await.0
    };
    assert_eq!(ask(&[], &[], true).await, StatusCode::OK);
    assert_eq!(ask(&["*.example"], &["c.example"], true).await, StatusCode::OK);
    assert_eq!(ask(&["c.example"], &[], true).await, StatusCode::FORBIDDEN);
    assert_eq!(ask(&["b.example"], &["b.*"], true).await, StatusCode::FORBIDDEN);
    assert_eq!(ask(&[], &[], false).await, StatusCode::FORBIDDEN);
}

#[tokio::test(start_paused = true)]
async fn an_alias_leads_other_servers_to_its_room() {
    let net = Net::new(1);
    let (server, peer) = (server(&net), Peer::new(&net, "b.example", "5.0.0.2", 2));
    let alice = server.register("alice").await;
    let (_, room) = alice.post("/_matrix/client/v3/createRoom", json!({ "room_alias_name": "here" })).await;
    let find = "/_matrix/federation/v1/query/directory?room_alias=%23here%3Atest.example";
    let found = peer.ask(&server, Method::GET, find, None).await;
    assert_eq!(found, (StatusCode::OK, json!({ "room_id": room["room_id"], "servers": ["test.example"] })));
    for (alias, status) in [("nowhere%3Atest.example", 404), ("here%3Ab.example", 404), ("x", 400)] {
        let find = format!("/_matrix/federation/v1/query/directory?room_alias=%23{alias}");
        assert_eq!(peer.ask(&server, Method::GET, &find, None).await.0.as_u16(), status, "{alias}");
    }
}

#[tokio::test(start_paused = true)]
async fn this_server_vouches_for_the_keys_of_others() {
    let net = Net::new(1);
    let store = memory();
    let server = TestServer::start(doors(&net), store.clone(), |_| {});
    let _peer = Peer::new(&net, "b.example", "5.0.0.2", 2);
    let anyone = server.anonymous();
    let (status, answered) = anyone.get("/_matrix/key/v2/query/b.example").await;
    assert_eq!(status, StatusCode::OK);
    let document = &answered["server_keys"][0];
    assert_eq!(
        (&document["server_name"], names(&document["verify_keys"])),
        (&json!("b.example"), vec!["ed25519:k".into()])
    );
    assert_eq!(names(&document["signatures"]), ["b.example", "test.example"]);
    let (status, named) = anyone.get("/_matrix/key/v2/query/b.example/ed25519:other").await;
    assert_eq!((status, &named["server_keys"][0]), (StatusCode::OK, document));
    let many = json!({ "server_keys": { "b.example": {}, "lost.example": {}, "test.example": { "ed25519:x": {} }, "no name": 1 } });
    let (status, answered) = anyone.post("/_matrix/key/v2/query", many).await;
    assert_eq!((status, answered["server_keys"].as_array().unwrap().len()), (StatusCode::OK, 2));
    for odd in [json!({}), json!({ "server_keys": [] })] {
        assert_eq!(anyone.post("/_matrix/key/v2/query", odd).await.0, StatusCode::BAD_REQUEST);
    }
    assert_eq!(
        anyone.get("/_matrix/key/v2/query/b.example?minimum_valid_until_ts=x").await.0,
        StatusCode::BAD_REQUEST
    );
    // The fetched document survives a restart.
    server.server().stop().await.unwrap();
    let _before = net.take_arrived();
    let again = TestServer::start(doors(&Net::new(2)), store, |_| {});
    let (_, answered) = again.anonymous().get("/_matrix/key/v2/query/b.example").await;
    assert_eq!(answered["server_keys"][0]["server_name"], "b.example");
}

/// Each route says how large a body it takes, and the body of a signed request is JSON and nothing else.
#[tokio::test(start_paused = true)]
async fn no_route_of_servers_takes_more_than_it_says_nor_what_is_not_json() {
    let net = Net::new(1);
    let (server, peer) = (server(&net), Peer::new(&net, "b.example", "5.0.0.2", 2));
    let mut tried = 0;
    for Listed { method, path, policy } in Routes::all().list_policies() {
        let Policy { body: Body::Json(bytes_max), who: Who::Server, .. } = policy else { continue };
        tried += 1;
        let path = path.replace("{room_id}", "!room:b.example");
        let ask = async |body: Vec<u8>| {
            let mut request = peer.signed("test.example", method.parse().unwrap(), &path, Some(&json!({})));
            *request.body_mut() = body.into();
            let (status, json) = answer(&server, request).await;
            (status.as_u16(), json["errcode"].as_str().unwrap().to_owned())
        };
        let long = [b"{\"x\":\"".to_vec(), vec![b'x'; bytes_max], b"\"}".to_vec()].concat();
        assert_eq!(ask(long).await, (413, "M_TOO_LARGE".to_owned()), "{path}");
        for body in ["{\"a\":1}}", "{}x", "{} {}", "{", "x", "{\"a\":1e400}"] {
            assert_eq!(ask(body.into()).await, (400, "M_NOT_JSON".to_owned()), "{path} {body}");
        }
        assert_eq!(ask("{\"a\":1}".into()).await, (401, "M_UNAUTHORIZED".to_owned()), "{path}");
    }
    assert!(tried > 0);
}
