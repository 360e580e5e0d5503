//! Guessing passwords: many at once, from many addresses, and what that does to the owner of the account.

use aqueduct::{
    api::extract::Peer,
    config::{Bucket, Config},
};
use axum::body::Body;
use futures_util::future::join_all;
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::TestServer;

/// A server that limits only tries of passwords: ten at once.
fn only_passwords(config: &mut Config) {
    let many = Bucket { per_second: 1e6, burst: 1_000_000 };
    config.limits.rate_limits = true;
    config.limits.password = Bucket { per_second: 0.2, burst: 10 };
    for bucket in [&mut config.limits.login, &mut config.limits.register, &mut config.limits.other] {
        *bucket = many;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_hundred_wrong_confirmations_at_once_ten_are_judged() {
    let server = TestServer::real(only_passwords);
    let alice = server.register("alice").await;
    let body = json!({ "devices": ["X"], "auth": { "type": "m.login.password", "password": "wrong",
        "identifier": { "type": "m.id.user", "user": "alice" } } });
    let guesses = (0..200).map(|_| alice.post("/_matrix/client/v3/delete_devices", body.clone()));
    let answers = join_all(guesses).await;
    let judged = answers.iter().filter(|(status, _)| *status == StatusCode::UNAUTHORIZED).count();
    // One more may have been earned meanwhile.
    assert!((10..=11).contains(&judged), "{judged}");
    assert!(answers.iter().all(|(status, _)| [401, 429].contains(&status.as_u16())));
}

async fn log_in(server: &TestServer, from: u32, user: &str, secret: &str) -> (StatusCode, Value) {
    let body = json!({ "type": "m.login.password", "password": secret,
        "identifier": { "type": "m.id.user", "user": user } });
    let request = Request::builder().method(Method::POST).uri("/_matrix/client/v3/login");
    let mut request = request.body(Body::from(body.to_string())).unwrap();
    request.extensions_mut().insert(Peer(std::net::Ipv4Addr::from_bits(from).into()));
    let response = server.server().router().oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap())
}

#[tokio::test(start_paused = true)]
async fn many_addresses_have_no_more_guesses_at_one_account_and_lock_no_owner_out() {
    let server = TestServer::with(only_passwords);
    // Alice registered from 192.0.2.1, so the server has seen her at that address.
    server.register("alice").await;
    let home = u32::from(std::net::Ipv4Addr::new(192, 0, 2, 1));
    for user in ["alice", "nobody"] {
        let mut judged = 0;
        for address in 0..400 {
            let (status, json) = log_in(&server, 0x0a00_0000 + address, user, "wrong").await;
            assert!([403, 429].contains(&status.as_u16()), "{json}");
            judged += usize::from(status == StatusCode::FORBIDDEN);
        }
        assert_eq!(judged, 10, "{user}");
    }
    let (status, json) = log_in(&server, home, "alice", "password of alice").await;
    assert_eq!(status, StatusCode::OK, "{json}");
    // A right password is no guess, so the limit does not count it.
    for _ in 0..30 {
        let (status, _) = log_in(&server, home, "alice", "password of alice").await;
        assert_eq!(status, StatusCode::OK);
    }
    // Nobody waits longer than a minute.
    for _ in 0..20 {
        let (status, json) = log_in(&server, home, "alice", "mistyped").await;
        assert!([403, 429].contains(&status.as_u16()), "{status}: {json}");
    }
    server.server().app().env.sleep(std::time::Duration::from_secs(60)).await;
    let (status, json) = log_in(&server, home, "alice", "password of alice").await;
    assert_eq!(status, StatusCode::OK, "{json}");
}

/// Passwords take about ten milliseconds to verify, so that the queue of those that wait fills up.
fn slow_passwords(config: &mut Config) {
    config.passwords.argon2_iterations = 500;
    only_passwords(config);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn right_passwords_of_one_account_keep_nobody_else_from_logging_in() {
    let server = TestServer::real(slow_passwords);
    server.register("alice").await;
    server.register("bob").await;
    // Alice logs in from thirteen addresses at a time. Her right passwords are no guesses, so no limit counts them.
    let (is_refused, mut refused) = tokio::sync::watch::channel(false);
    let is_refused = std::sync::Arc::new(is_refused);
    let flood: Vec<_> = (0..200)
        .map(|number| {
            let (server, is_refused) = (server.clone(), is_refused.clone());
            #[expect(clippy::disallowed_methods, reason = "clients of the server that is tested")]
            tokio::spawn(async move {
                let (status, json) =
                    log_in(&server, 0x0a00_0000 + number % 13, "alice", "password of alice").await;
                if status == StatusCode::TOO_MANY_REQUESTS {
                    is_refused.send_replace(true);
                }
                (status, json)
            })
        })
        .collect();
    // Once the flood alone holds the sender, waiting ends also if all of it was let in.
    drop(is_refused);
    assert!(
        refused.wait_for(|is_refused| *is_refused).await.is_ok(),
        "none of two hundred logins was refused"
    );
    // As many of hers wait as may. Bob comes from an address of his own.
    let (status, json) = log_in(&server, 0x0b00_0000, "bob", "password of bob").await;
    assert_eq!(status, StatusCode::OK, "{json}");
    let mut logged_in = 0;
    for one in flood {
        let (status, json) = one.await.unwrap();
        logged_in += usize::from(status == StatusCode::OK);
        assert!(status == StatusCode::OK || json["errcode"] == "M_LIMIT_EXCEEDED", "{status}: {json}");
    }
    assert!((1..200).contains(&logged_in), "{logged_in} of Alice's were let in");
}

/// The statuses of these tries, each from an address that the server does not know.
async fn statuses(server: &TestServer, names: &[String]) -> Vec<u16> {
    let mut statuses = Vec::new();
    for (number, name) in names.iter().enumerate() {
        let from = 0x0c00_0000 + u32::try_from(number).unwrap();
        statuses.push(log_in(server, from, name, "wrong").await.0.as_u16());
    }
    statuses
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_guesses_does_not_tell_which_names_exist() {
    let server = TestServer::with(only_passwords);
    for name in ["alice", "carol", "erin", "gone", "gona", "gonb", "gonc", "gond"] {
        server.register(name).await;
    }
    for name in ["gone", "gona", "gonb", "gonc", "gond"] {
        let (status, json) = log_in(&server, 0x0d00_0000, name, &format!("password of {name}")).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        let token = json["access_token"].as_str().unwrap();
        let auth = json!({ "type": "m.login.password", "password": format!("password of {name}"),
            "identifier": { "type": "m.id.user", "user": name } });
        let path = "/_matrix/client/v3/account/deactivate";
        let body = json!({ "auth": auth }).to_string();
        let (status, json) = server.raw(Method::POST, path, Some(token), body).await;
        assert_eq!(status, StatusCode::OK, "{json}");
    }
    let upper = |name: &str| name.to_uppercase();
    let full = |name: &str| format!("@{name}:test.example");
    type Write<'a> = &'a dyn Fn(&str, usize) -> String;
    let ways: [Write<'_>; 4] = [
        &|name, _| name.to_owned(),
        &|name, number| if number % 2 == 0 { name.to_owned() } else { upper(name) },
        &|name, number| if number % 2 == 0 { name.to_owned() } else { full(name) },
        &|name, number| match number % 3 {
            0 => upper(name),
            1 => full(&upper(name)),
            _ => full(name),
        },
    ];
    // Each way is tried on an account, on nobody, and on an account that has ended.
    let names = [
        ["alice", "nobody", "gone"],
        ["carol", "nobodz", "gona"],
        ["erin", "nobodx", "gonb"],
        ["x1", "x2", "gonc"],
    ];
    server.register("x1").await;
    let expected: Vec<u16> = (0..14).map(|number| if number < 10 { 403 } else { 429 }).collect();
    for (way, names) in ways.iter().zip(names) {
        for name in names {
            let tries: Vec<_> = (0..14).map(|number| way(name, number)).collect();
            assert_eq!(statuses(&server, &tries).await, expected, "{tries:?}");
        }
    }
    // A name of another server is nobody's here, and is answered like any other.
    let tries: Vec<_> = (0..14).map(|_| "@alice:other.example".to_owned()).collect();
    assert_eq!(statuses(&server, &tries).await, expected);
}
