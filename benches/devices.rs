//! The things that devices leave with the server: keys, backups of room keys, and messages to each other; and whose devices changed
//! while a client was away.
//!
//! `cargo bench --bench devices` runs for some minutes over RocksDB, with fsync. Without a disk in the way: `TMPDIR=/dev/shm`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark that fails has nobody to tell but whoever runs it, and it reads the clock"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "support/fixture.rs"]
mod support;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aqueduct::{
    encryption::device_lists,
    store::{Durability, Guard},
};
use criterion::{Criterion, criterion_group, criterion_main};
use http::Method;
use serde_json::{Map, Value, json};
use support::Fixture;
use tokio::{runtime::Runtime, task::JoinSet};

/// An upload has the keys of this many sessions.
const SESSIONS: usize = 10_000;
/// The bytes of an encrypted key, as clients make it.
const CIPHERTEXT_BYTES: usize = 700;
/// A message goes to this many devices.
const DEVICES: usize = 5_000;
/// A device has received this many messages, which are deleted.
const DELETED: usize = 100_000;
/// This many users are asked for the keys of their device.
const USERS: usize = 1_000;
/// Each of these devices uploads this many one-time keys at once.
const ONE_TIME_KEYS: usize = 50;
/// A client shares a room with this many people.
const PEOPLE: usize = 10_000;
/// The device lists of this many users change while it is away.
const CHANGES: usize = 1_000_000;
/// Tasks that make the people of a benchmark at once.
const TASKS: usize = 64;

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

/// The one-time keys of a device in one of its uploads.
fn one_time_keys(upload: usize) -> Value {
    let key = |number: usize| {
        let name = format!("signed_curve25519:{}", upload * ONE_TIME_KEYS + number);
        (name, json!({ "key": "k".repeat(43), "signatures": {} }))
    };
    json!({ "one_time_keys": (0..ONE_TIME_KEYS).map(key).collect::<Map<_, _>>() })
}

/// Has each of these clients do something, many at once.
async fn each<F: Future<Output = ()> + Send + 'static>(count: usize, act: impl Fn(usize) -> F) {
    let mut tasks = JoinSet::new();
    for number in 0..count {
        tasks.spawn(act(number));
        if tasks.len() >= TASKS {
            tasks.join_next().await.unwrap().unwrap();
        }
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

/// The keys of a thousand devices of as many users: asked for, and claimed.
fn keys(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let fixture = {
        let _context = runtime.enter();
        Fixture::open(dir.path(), Durability::Fsync)
    };
    let devices = Arc::new(Mutex::new(Vec::new()));
    runtime.block_on(each(USERS, |number| {
        let (fixture, devices) = (fixture.clone(), Arc::clone(&devices));
        async move {
            let token = fixture.register(&format!("user{number}")).await;
            let path = "/_matrix/client/v3/account/whoami";
            let json = fixture.json(Method::GET, path, Some(&token), Value::Null).await;
            let (user, device) = (json["user_id"].as_str().unwrap(), json["device_id"].as_str().unwrap());
            let keys = json!({
                "user_id": user, "device_id": device,
                "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
                "keys": { format!("curve25519:{device}"): "c".repeat(43) }, "signatures": {},
            });
            let path = "/_matrix/client/v3/keys/upload";
            fixture.ask(Method::POST, path, Some(&token), json!({ "device_keys": keys })).await;
            devices.lock().unwrap().push((user.to_owned(), device.to_owned(), token));
        }
    }));
    let devices = devices.lock().unwrap().clone();
    let token = devices[0].2.clone();
    let mut group = c.benchmark_group("keys of 1,000 users' devices");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    let wanted: Map<_, _> = devices.iter().map(|(user, ..)| (user.clone(), json!([]))).collect();
    let body = json!({ "device_keys": wanted });
    group.bench_function("query", |b| {
        b.iter(|| {
            let path = "/_matrix/client/v3/keys/query";
            runtime.block_on(fixture.ask(Method::POST, path, Some(&token), body.clone()))
        });
    });
    let wanted: Map<_, _> = devices
        .iter()
        .map(|(user, device, _)| (user.clone(), json!({ device: "signed_curve25519" })))
        .collect();
    let body = json!({ "one_time_keys": wanted });
    let (mut left, mut uploads) = (0, 0);
    group.bench_function("claim", |b| {
        b.iter_custom(|count| {
            let mut took = Duration::ZERO;
            for _ in 0..count {
                if left == 0 {
                    runtime.block_on(each(USERS, |number| {
                        let (fixture, token) = (fixture.clone(), devices[number].2.clone());
                        async move {
                            let path = "/_matrix/client/v3/keys/upload";
                            fixture.ask(Method::POST, path, Some(&token), one_time_keys(uploads)).await;
                        }
                    }));
                    (left, uploads) = (ONE_TIME_KEYS, uploads + 1);
                }
                let began = Instant::now();
                let path = "/_matrix/client/v3/keys/claim";
                let answer = runtime.block_on(fixture.ask(Method::POST, path, Some(&token), body.clone()));
                took += began.elapsed();
                left -= 1;
                let json: Value = serde_json::from_slice(&answer).unwrap();
                assert_eq!(json["one_time_keys"].as_object().unwrap().len(), USERS);
            }
            took
        });
    });
    group.finish();
    runtime.block_on(fixture.close());
}

/// Notes that the device lists of these users changed.
async fn change(fixture: &Fixture, user_ids: &[ruma::OwnedUserId]) {
    let store = &fixture.app().store;
    for some in user_ids.chunks(1_000) {
        let mut batch = store.batch(&Guard::alone());
        for user_id in some {
            device_lists::changed_elsewhere(&mut batch, user_id).unwrap();
        }
        drop(store.enqueue(batch).unwrap());
        store.barrier().await;
    }
}

/// A client comes back after a week on a large server, and is told whose devices changed of those with whom it shares a room.
fn changed(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let fixture = {
        let _context = runtime.enter();
        Fixture::open(dir.path(), Durability::Os)
    };
    let (reader, room) = runtime.block_on(async {
        let reader = fixture.register("reader").await;
        let room = fixture.make_room(&reader, "room").await;
        each(PEOPLE, |number| {
            let (fixture, room) = (fixture.clone(), room.clone());
            async move {
                let token = fixture.register(&format!("person{number}")).await;
                fixture.join(&token, &room).await;
            }
        })
        .await;
        (reader, room)
    });
    let sync = |since: &str| {
        let path = format!("/_matrix/client/v3/sync?timeout=0{since}");
        runtime.block_on(fixture.json(Method::GET, &path, Some(&reader), Value::Null))
    };
    let token_of = |sync: &Value| sync["next_batch"].as_str().unwrap().to_owned();
    let since = token_of(&sync(""));
    let id = |name: String| ruma::UserId::parse(name).unwrap();
    let people: Vec<_> = (0..PEOPLE).map(|number| id(format!("@person{number}:bench.example"))).collect();
    let strangers = (0..CHANGES).map(|number| id(format!("@s{number}:{}.example", number % 1_000)));
    let strangers: Vec<_> = strangers.collect();
    runtime.block_on(change(&fixture, &strangers));
    let mut group = c.benchmark_group("1,000,000 device lists changed, 10,000 people in a room");
    group.sample_size(20).measurement_time(Duration::from_secs(5));
    for (name, count) in [("none of them", 0), ("every tenth", PEOPLE / 10), ("all of them", PEOPLE)] {
        runtime.block_on(change(&fixture, &people[..count]));
        let json = sync(&format!("&since={since}"));
        let told = json["device_lists"]["changed"].as_array().map_or(0, Vec::len);
        // Those who joined have changed, too, when they registered, but that was before.
        assert_eq!(told, count, "{room}");
        let to = token_of(&json);
        for (door, path) in [
            ("sync", format!("/_matrix/client/v3/sync?timeout=0&since={since}")),
            ("/keys/changes", format!("/_matrix/client/v3/keys/changes?from={since}&to={to}")),
        ] {
            group.bench_function(format!("{name} changed, {door}"), |b| {
                b.iter(|| runtime.block_on(fixture.ask(Method::GET, &path, Some(&reader), Value::Null)));
            });
        }
    }
    group.finish();
    runtime.block_on(fixture.close());
}

criterion_group!(benches, keys, changed, backups, messages);
criterion_main!(benches);
