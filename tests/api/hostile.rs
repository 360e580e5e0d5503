//! Bad input is normal: whatever is thrown at any endpoint of the table, the answer is Matrix's, never a 500, never a
//! panic. Endpoints are read from the router itself, so a new one is attacked without a line here.

use aqueduct::{
    api::{
        Listed, Routes,
        policy::{self, Policy},
    },
    flows::operator::operate::{Command, operate},
};
use axum::body::Body;
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use proptest::{prelude::*, sample::select};
use serde_json::{Value, json};

use crate::support::{TestClient, TestServer, encoded};

/// A request as somebody hostile, or only confused, may send it.
#[derive(Debug, Clone)]
struct Attack {
    /// The endpoint that is attacked, as a place in the table of all.
    endpoint: prop::sample::Index,
    /// The values of the path's parameters, in their order.
    params: Vec<Param>,
    query: Vec<(&'static str, String)>,
    token: Token,
    body: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Param {
    /// The value that the parameter is meant to have, as far as its name says.
    Fitting,
    Text(String),
}

#[derive(Debug, Clone, Copy)]
enum Token {
    None,
    Wrong,
    Alice,
    Bob,
}

/// The server that is attacked, with two people in a room that one of them made.
struct Scene {
    server: TestServer,
    alice: TestClient,
    bob: TestClient,
    room: String,
    event: String,
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::new();
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        let create = json!({ "preset": "public_chat", "room_alias_name": "here" });
        let (status, json) = alice.post("/_matrix/client/v3/createRoom", create).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let room = json["room_id"].as_str().unwrap().to_owned();
        bob.ok_post(&format!("/join/{}", encoded(&room)), json!({})).await;
        let send = format!("/_matrix/client/v3/rooms/{}/send/m.room.message/1", encoded(&room));
        let (_, json) = alice.put(&send, json!({ "msgtype": "m.text", "body": "x" })).await;
        let event = json["event_id"].as_str().unwrap().to_owned();
        Self { server, alice, bob, room, event }
    }

    /// A value that fits into a parameter of this name.
    fn fitting(&self, name: &str) -> String {
        match name {
            "room_id" | "room_id_or_alias" => self.room.clone(),
            "event_id" => self.event.clone(),
            "user_id" => self.alice.user_id.clone(),
            "room_alias" => "#here:test.example".into(),
            "device_id" => self.alice.device_id.clone(),
            "event_type" => "m.room.name".into(),
            // The scope `global` has paths of its own.
            "scope" => "device".into(),
            "kind" => "override".into(),
            "rule_id" => ".m.rule.master".into(),
            "receipt_type" => "m.read".into(),
            "field" => "displayname".into(),
            _ => "x".into(),
        }
    }

    fn path(&self, template: &str, params: &[Param]) -> String {
        let mut params = params.iter().cycle();
        let segments = template.split('/').map(|segment| match segment.strip_prefix('{') {
            None => segment.to_owned(),
            Some(name) => match params.next() {
                Some(Param::Text(text)) => text.clone(),
                _ => encoded(&self.fitting(name.trim_end_matches('}'))),
            },
        });
        segments.collect::<Vec<_>>().join("/")
    }

    fn token(&self, token: Token) -> Option<&str> {
        match token {
            Token::None => None,
            Token::Wrong => Some("aqa_wrong"),
            Token::Alice => self.alice.token.as_deref(),
            Token::Bob => self.bob.token.as_deref(),
        }
    }

    /// Sends the request, and checks that the answer is one that the specification allows.
    async fn attack(&self, method: &str, path: &str, token: Token, body: Vec<u8>) -> StatusCode {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = self.token(token) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        // A text that is no URI never reaches a server, so nothing is to be checked.
        let Ok(request) = request.body(Body::from(body.clone())) else { return StatusCode::OK };
        let response = self.server.send(request).await;
        let status = response.status();
        let is_page =
            response.headers().get(header::CONTENT_TYPE).is_some_and(|it| it == "text/html; charset=utf-8");
        let answer = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&answer);
        let what =
            || format!("{method} {path} {token:?} {:?}: {status} {text}", String::from_utf8_lossy(&body));
        // A request that names another server has that asked, and here is none.
        let asks_others = status == StatusCode::BAD_GATEWAY && text.contains("could not be reached");
        assert!(asks_others || !status.is_server_error(), "{}", what());
        if is_page {
            assert!(!text.contains("<a\"b"), "{}", what());
            return status;
        }
        let json: Value = serde_json::from_slice(&answer).unwrap_or_else(|_| panic!("not JSON: {}", what()));
        if status.is_client_error() {
            let is_flows = status == StatusCode::UNAUTHORIZED && json.get("flows").is_some();
            assert!(
                is_flows || json["errcode"].as_str().is_some_and(|code| code.starts_with("M_")),
                "{}",
                what()
            );
        }
        status
    }
}

/// Texts that something somewhere may take for something else.
const ODD: [&str; 22] = [
    "%00",
    "%FF%FE",
    "%2F",
    "%2e%2e",
    "..",
    "%20",
    "-1",
    "18446744073709551616",
    "1e400",
    "null",
    "%F0%9F%92%A9",
    "!a:b",
    "%23:",
    "@",
    "@:",
    "@a:b:c:d",
    "%24",
    "%21%3A",
    "m.room.member",
    "global",
    "__proto__",
    "%25",
];

/// Names of fields and of parameters that mean something somewhere.
const NAMES: [&str; 46] = [
    "type",
    "user",
    "password",
    "identifier",
    "auth",
    "session",
    "token",
    "username",
    "device_id",
    "event_id",
    "room_id",
    "state_key",
    "content",
    "name",
    "topic",
    "preset",
    "room_version",
    "initial_state",
    "invite",
    "user_id",
    "reason",
    "membership",
    "limit",
    "from",
    "to",
    "since",
    "filter",
    "dir",
    "timeout",
    "full_state",
    "set_presence",
    "presence",
    "typing",
    "actions",
    "conditions",
    "pattern",
    "enabled",
    "messages",
    "tags",
    "order",
    "m.relates_to",
    "at",
    "ts",
    "creation_content",
    "power_level_content_override",
    "visibility",
];

fn odd_text() -> impl Strategy<Value = String> {
    prop_oneof![
        select(ODD.to_vec()).prop_map(str::to_owned),
        "[a-z0-9]{0,12}",
        "\\PC{0,40}".prop_map(|text: String| encoded(&text)),
        (1_usize..3000).prop_map(|length| "a".repeat(length)),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,30}".prop_map(Value::from),
        select(vec![
            "@alice:test.example",
            "@bob:test.example",
            "@nobody:elsewhere.example",
            "m.login.password",
            "m.login.dummy",
            "m.id.user",
            "alice",
            "public_chat",
            "12",
            "1",
            "m.room.member",
            "m.room.power_levels",
            "join",
            "invite",
            "b",
            "f",
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        let name = prop_oneof![3 => select(NAMES.to_vec()).prop_map(str::to_owned), 1 => "\\PC{0,10}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::hash_map(name, inner, 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Fields whose names are known, with values of any kind.
fn object() -> impl Strategy<Value = Value> {
    prop::collection::hash_map(select(NAMES.to_vec()), value(), 0..8)
        .prop_map(|fields| fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => object().prop_map(|json| json.to_string().into_bytes()),
        2 => value().prop_map(|json| json.to_string().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..200),
        1 => Just(Vec::new()),
        1 => select(bad_bodies()),
    ]
}

fn attack() -> impl Strategy<Value = Attack> {
    let param = prop_oneof![3 => Just(Param::Fitting), 1 => odd_text().prop_map(Param::Text)];
    let query = (select(NAMES.to_vec()), odd_text());
    let token = prop_oneof![
        1 => Just(Token::None),
        1 => Just(Token::Wrong),
        6 => Just(Token::Alice),
        4 => Just(Token::Bob),
    ];
    (
        any::<prop::sample::Index>(),
        prop::collection::vec(param, 4),
        prop::collection::vec(query, 0..4),
        token,
        body(),
    )
        .prop_map(|(endpoint, params, query, token, body)| Attack {
            endpoint,
            params,
            query,
            token,
            body,
        })
}

fn in_paused_time(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(test);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_is_thrown_at_an_endpoint_breaks_it(attacks in prop::collection::vec(attack(), 60)) {
        let endpoints = Routes::all().list();
        in_paused_time(async {
            let scene = Scene::new().await;
            for attack in attacks {
                let (method, template) = endpoints[attack.endpoint.index(endpoints.len())];
                let mut path = scene.path(template, &attack.params);
                for (number, (name, value)) in attack.query.iter().enumerate() {
                    path.push(if number == 0 { '?' } else { '&' });
                    path.push_str(&format!("{name}={value}"));
                }
                scene.attack(method, &path, attack.token, attack.body).await;
            }
        });
    }
}

/// Bodies that have broken servers before.
fn bad_bodies() -> Vec<Vec<u8>> {
    let nested = |levels: usize| [b"{\"a\":".repeat(levels), b"{}".to_vec(), b"}".repeat(levels)].concat();
    let arrays = |levels: usize| {
        [b"{\"content\":".to_vec(), b"[".repeat(levels), b"]".repeat(levels), b"}".to_vec()].concat()
    };
    vec![
        b"".to_vec(),
        b"{}".to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"\"text\"".to_vec(),
        b"{".to_vec(),
        b"{\"a\":1}}".to_vec(),
        b"{\"a\":1,\"a\":2}".to_vec(),
        b"{\"body\":\"\\ud800\"}".to_vec(),
        b"{\"body\":\"\xff\xfe\"}".to_vec(),
        b"{\"body\":1.5}".to_vec(),
        b"{\"body\":9007199254740993}".to_vec(),
        b"{\"body\":-1e999}".to_vec(),
        b"{\"type\":{},\"user_id\":[],\"limit\":-1,\"messages\":7,\"auth\":true}".to_vec(),
        nested(90),
        nested(200),
        nested(20_000),
        arrays(100_000),
        [b"{\"body\":\"".to_vec(), b"x".repeat(70_000), b"\"}".to_vec()].concat(),
    ]
}

#[tokio::test(start_paused = true)]
async fn every_endpoint_survives_every_bad_body_and_odd_parameter() {
    let endpoints = Routes::all().list();
    assert!(endpoints.len() > 50, "the endpoints were not found");
    for (number, (method, template)) in endpoints.into_iter().enumerate() {
        // Some endpoints end sessions, so each endpoint is attacked in a new scene.
        let scene = Scene::new().await;
        let fits = scene.path(template, &[Param::Fitting]);
        for body in bad_bodies() {
            scene.attack(method, &fits, Token::Bob, body).await;
        }
        for odd in ODD.into_iter().chain([&*"a".repeat(2000)]) {
            let path = scene.path(template, &[Param::Text(odd.to_owned()), Param::Fitting]);
            scene.attack(method, &path, Token::Bob, b"{}".to_vec()).await;
            let name = NAMES[number % NAMES.len()];
            for name in [name, "limit", "since", "filter", "dir", "from", "at"] {
                scene.attack(method, &format!("{fits}?{name}={odd}"), Token::Bob, b"{}".to_vec()).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_valid_token_the_body_is_not_looked_at() {
    let scene = Scene::new().await;
    let mut closed = 0;
    for Listed { method, path: template, policy } in Routes::all().list_policies() {
        if policy.who == policy::Who::Public {
            continue;
        }
        let path = scene.path(template, &[Param::Fitting]);
        let (_, json) = scene.server.raw(method.parse::<Method>().unwrap(), &path, None, "{}").await;
        if json["errcode"] != "M_MISSING_TOKEN" {
            continue;
        }
        closed += 1;
        for body in [b"{".to_vec(), vec![b' '; 17 << 20]] {
            let wrong = scene.attack(method, &path, Token::Wrong, body).await;
            assert_eq!(wrong, StatusCode::UNAUTHORIZED, "{method} {path}");
        }
    }
    assert!(closed > 50, "only {closed} endpoints ask for a token");
}

/// Each route says how large a body it takes, and what follows the end of one is never passed over.
#[tokio::test(start_paused = true)]
async fn no_route_takes_more_than_it_says_nor_what_follows_the_end() {
    let scene = Scene::new().await;
    let mut tried = 0;
    for Listed { method, path: template, policy } in Routes::all().list_policies() {
        let Policy { body: policy::Body::Json(bytes_max), who, .. } = policy else { continue };
        // The test of requests that other servers sign does the same.
        if who == policy::Who::Server {
            continue;
        }
        tried += 1;
        let path = scene.path(template, &[Param::Fitting]);
        // Some of these endpoints end the session, so each begins with a new one.
        let (alice, token) = if who == policy::Who::Public {
            (None, None)
        } else {
            let alice = scene.server.register(&format!("user{tried}")).await;
            if who == policy::Who::Admin {
                let promote = Command::SetAdmin { name: format!("user{tried}"), admin: true };
                operate(scene.server.server().app(), promote, |_| ()).await.unwrap();
            }
            let token = alice.token.clone();
            (Some(alice), token)
        };
        let ask = |body: Vec<u8>| scene.server.raw(method.parse().unwrap(), &path, token.as_deref(), body);
        let long = [b"{\"x\":\"".to_vec(), vec![b'x'; bytes_max], b"\"}".to_vec()].concat();
        let (status, json) = ask(long).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (413, &json!("M_TOO_LARGE")), "{method} {path}");
        assert!(json["error"].as_str().unwrap().contains(&bytes_max.to_string()), "{json}");
        for body in ["{\"a\":1}}", "{}x", "{} {}", "{", "x"] {
            let (status, json) = ask(body.into()).await;
            let found = (status.as_u16(), &json["errcode"]);
            assert_eq!(found, (400, &json!("M_NOT_JSON")), "{method} {path} {body}: {json}");
        }
        drop(alice);
    }
    assert!(tried > 50, "{tried}");
}

/// A body that does not come takes nothing from other requests, and after a while the server gives it up.
#[tokio::test(start_paused = true)]
async fn bodies_that_do_not_come_are_given_up() {
    let server = TestServer::new();
    let in_flight = || server.server().app().metrics.text().contains("http_in_flight_bytes 0");
    let ask = || async {
        let never = futures_util::stream::pending::<Result<bytes::Bytes, std::io::Error>>();
        let request = Request::builder().method("POST").uri("/_matrix/client/v3/refresh");
        server.send(request.body(Body::from_stream(never)).unwrap()).await.status()
    };
    assert!(in_flight());
    let answers = futures_util::future::join_all((0..80).map(|_| ask())).await;
    assert!(answers.iter().all(|status| *status == StatusCode::REQUEST_TIMEOUT), "{answers:?}");
    assert!(in_flight());
}
