//! The things that devices leave with the server: backups of room keys, and messages to each other.
//!
//! `cargo bench --bench devices` runs for about two minutes over RocksDB, with fsync. Without a disk in the way: `TMPDIR=/dev/shm`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark that fails has nobody to tell but whoever runs it, and it reads the clock"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "support/fixture.rs"]
mod support;

use std::time::{Duration, Instant};

use aqueduct::store::Durability;
use criterion::{Criterion, criterion_group, criterion_main};
use http::Method;
use serde_json::{Map, Value, json};
use support::Fixture;
use tokio::runtime::Runtime;

/// An upload has the keys of this many sessions.
const SESSIONS: usize = 10_000;
/// The bytes of an encrypted key, as clients make it.
const CIPHERTEXT_BYTES: usize = 700;
/// A message goes to this many devices.
const DEVICES: usize = 5_000;
/// A device has received this many messages, which are deleted.
const DELETED: usize = 100_000;

/// The body of an upload: a hundred sessions in each room.
fn sessions() -> Value {
    let mut rooms = Map::new();
    for room in 0..SESSIONS / 100 {
        let session = |number: usize| {
            let key = json!({
                "first_message_index": 1, "forwarded_count": 0, "is_verified": true,
                "session_data": {
                    "ephemeral": "e".repeat(43), "mac": "m".repeat(11),
                    "ciphertext": format!("{:0>CIPHERTEXT_BYTES$}", room * 100 + number),
                },
            });
            (format!("{:0>43}", room * 100 + number), key)
        };
        let sessions: Map<_, _> = (0..100).map(session).collect();
        rooms.insert(format!("!room{room}:bench.example"), json!({ "sessions": sessions }));
    }
    json!({ "rooms": rooms })
}

async fn version(fixture: &Fixture, token: &str) -> String {
    let body = json!({ "algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": {} });
    let made = fixture.json(Method::POST, "/_matrix/client/v3/room_keys/version", Some(token), body).await;
    made["version"].as_str().unwrap().to_owned()
}

fn keys_of(version: &str) -> String {
    format!("/_matrix/client/v3/room_keys/keys?version={version}")
}

/// Backups of ten thousand keys: stored, stored again, read and deleted.
fn backups(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let fixture = {
        let _context = runtime.enter();
        Fixture::open(dir.path(), Durability::Fsync)
    };
    let token = runtime.block_on(fixture.register("alice"));
    let (body, token) = (sessions(), Some(token.as_str()));
    let mut group = c.benchmark_group("key backup, 10,000 sessions");
    group.sample_size(20).measurement_time(Duration::from_secs(10));
    let ask = |method: Method, path: &str, body: Value| {
        let began = Instant::now();
        runtime.block_on(fixture.ask(method, path, token, body));
        began.elapsed()
    };
    group.bench_function("first upload", |b| {
        b.iter_custom(|count| {
            let mut took = Duration::ZERO;
            for _ in 0..count {
                let version = runtime.block_on(version(&fixture, token.unwrap()));
                took += ask(Method::PUT, &keys_of(&version), body.clone());
                ask(Method::DELETE, &format!("/_matrix/client/v3/room_keys/version/{version}"), json!({}));
            }
            took
        });
    });
    group.bench_function("delete the version", |b| {
        b.iter_custom(|count| {
            let mut took = Duration::ZERO;
            for _ in 0..count {
                let version = runtime.block_on(version(&fixture, token.unwrap()));
                ask(Method::PUT, &keys_of(&version), body.clone());
                took += ask(
                    Method::DELETE,
                    &format!("/_matrix/client/v3/room_keys/version/{version}"),
                    json!({}),
                );
            }
            took
        });
    });
    let path = keys_of(&runtime.block_on(version(&fixture, token.unwrap())));
    ask(Method::PUT, &path, body.clone());
    for (name, method) in [("the same upload again", Method::PUT), ("read all", Method::GET)] {
        group.bench_function(name, |b| {
            b.iter_custom(|count| {
                let body = || if method == Method::PUT { body.clone() } else { Value::Null };
                (0..count).map(|_| ask(method.clone(), &path, body())).sum()
            });
        });
    }
    group.finish();
    runtime.block_on(fixture.close());
}

/// Messages between devices: to very many at once, and the next sync of a device that has received very many.
fn messages(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let fixture = {
        let _context = runtime.enter();
        Fixture::open(dir.path(), Durability::Fsync)
    };
    let (sender, receiver) = runtime.block_on(async {
        let sender = fixture.register("sender").await;
        let receiver = fixture.register("receiver").await;
        for _ in 1..DEVICES {
            fixture.log_in("receiver").await;
        }
        (sender, receiver)
    });
    let (mut txn, sender) = (0, Some(sender.as_str()));
    let mut send = |device: &str, count: usize| {
        for _ in 0..count {
            txn += 1;
            let path = format!("/_matrix/client/v3/sendToDevice/m.room.encrypted/{txn}");
            let content = json!({ "ciphertext": "c".repeat(1_000) });
            let body = json!({ "messages": { "@receiver:bench.example": { device: content } } });
            runtime.block_on(fixture.ask(Method::PUT, &path, sender, body));
        }
    };
    let mut group = c.benchmark_group("messages between devices");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    group.bench_function("one message to 5,000 devices", |b| {
        b.iter_custom(|count| {
            let began = Instant::now();
            send("*", usize::try_from(count).unwrap());
            began.elapsed()
        });
    });
    let sync = |since: &str| {
        let began = Instant::now();
        let path = format!("/_matrix/client/v3/sync?timeout=0{since}");
        let answer = runtime.block_on(fixture.ask(Method::GET, &path, Some(&receiver), Value::Null));
        let took = began.elapsed();
        let json: Value = serde_json::from_slice(&answer).unwrap();
        let told = json["to_device"]["events"].as_array().map_or(0, Vec::len);
        (format!("&since={}", json["next_batch"].as_str().unwrap()), told, took)
    };
    let whoami = runtime.block_on(fixture.json(
        Method::GET,
        "/_matrix/client/v3/account/whoami",
        Some(&receiver),
        Value::Null,
    ));
    let device = whoami["device_id"].as_str().unwrap();
    // As a device that is online receives them: few at a time.
    let (mut since, mut received) = (String::new(), 0);
    while received < DELETED {
        send(device, 50);
        let (next, told, _) = sync(&since);
        (since, received) = (next, received + told);
    }
    group.bench_function("sync after 100,000 deleted messages", |b| {
        b.iter_custom(|count| {
            let mut all = Duration::ZERO;
            for _ in 0..count {
                send(device, 1);
                // The first sync tells the message, and the second confirms it.
                for _ in 0..2 {
                    let (next, _, took) = sync(&since);
                    since = next;
                    all += took;
                }
            }
            all / 2
        });
    });
    group.finish();
    runtime.block_on(fixture.close());
}

criterion_group!(benches, backups, messages);
criterion_main!(benches);
