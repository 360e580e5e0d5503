//! Push rules in rooms of 10 to 10,000 local members: the processor's time and the bytes of a message, the sync of somebody who has hostile rules,
//! and how fast a gateway is told for a thousand pushers.
//!
//! `cargo bench --bench push`, in process over RocksDB, without fsync; `-- members` or `-- pushers` runs one of both. What the process does in
//! the background counts, too. Figures: `docs/performance.md`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark measures real time and stops at the first fault"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "each benchmark uses a part of the support")]

#[path = "support/fixture.rs"]
mod support;
#[path = "support/processor.rs"]
mod processor;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aqueduct::{
    ids::UserNum,
    push::rules,
    rooms, schema,
    schema::rooms::Membership,
    store::{Direction, Durability, Family, Guard, Read as _},
};
use http::Method;
use processor::cpu_ms;
use ruma::push::{Action, NewPatternedPushRule, NewPushRule};
use serde_json::{Value, json};
use support::Fixture;
use tokio::runtime::Runtime;

/// The rooms have this many members.
const ROOMS: [u64; 4] = [10, 100, 1_000, 10_000];
/// One of so many members has rules of their own.
const WITH_RULES: u64 = 10;
/// Far above the numbers of accounts that the benchmark registers.
const FIRST_MEMBER: u64 = 1_000_000;
/// This many messages are measured.
const MESSAGES: u64 = 500;
/// A message in the largest room may cost this much of the processor, in milliseconds.
const MESSAGE_MS_MAX: f64 = 10.0;
/// A message in the largest room writes at most this many bytes more than in the smallest.
const BYTES_MORE_MAX: usize = 64;
/// This many members have a pusher each.
const PUSHERS: usize = 1_000;

/// Fifteen rules of the most hostile kind.
fn hostile_rules() -> Vec<NewPatternedPushRule> {
    let rule = |id: usize| {
        let pattern = format!("*{}{id}", "a".repeat(900));
        NewPatternedPushRule::new(format!("rule{id}"), pattern, vec![Action::Notify])
    };
    (0..15).map(rule).collect()
}

/// Fills a room with members of whom the room's tables know, and gives some of them rules of their own.
async fn fill(fixture: &Fixture, room: &str, members: u64) {
    let store = &fixture.app().store;
    let room_id = ruma::RoomId::parse(room).unwrap();
    let num = rooms::find_room(&*store.snapshot(), &room_id).unwrap().unwrap();
    let users: Vec<UserNum> = (0..members).map(|number| UserNum(FIRST_MEMBER + number)).collect();
    for users in users.chunks(1_000) {
        let mut batch = store.batch(&Guard::alone());
        for user in users {
            schema::ROOM_USER.put(&mut batch, (num, *user), &Membership::Join.into());
        }
        drop(store.enqueue(batch).unwrap());
        store.barrier().await;
    }
    for user in users.into_iter().filter(|user| user.0 % WITH_RULES == 0) {
        let mut batch = store.batch(&Guard::alone());
        let user_id = ruma::UserId::parse(format!("@member{}:bench.example", user.0)).unwrap();
        rules::change(&mut batch, user, &user_id, |rules| {
            for rule in hostile_rules() {
                rules::insert(rules, NewPushRule::Content(rule), None, None)?;
            }
            Ok(())
        })
        .unwrap();
        drop(store.enqueue(batch).unwrap());
    }
    store.barrier().await;
}

/// The bytes of every row of the store, to compare before and after.
fn all_rows(fixture: &Fixture) -> BTreeMap<(u8, Vec<u8>), Vec<u8>> {
    let snapshot = fixture.app().store.snapshot();
    let mut all = BTreeMap::new();
    for family in Family::ALL {
        for row in snapshot.range_raw(family, vec![0], vec![0xff; 64], Direction::Up).unwrap() {
            let (key, value) = row.unwrap();
            all.insert((family as u8, key.to_vec()), value.to_vec());
        }
    }
    all
}

/// The bytes of the rows that a message writes.
async fn written_by(fixture: &Fixture, token: &str, room: &str, txn: u64) -> usize {
    let before = all_rows(fixture);
    fixture.send(token, room, txn).await;
    fixture.app().store.barrier().await;
    let after = all_rows(fixture);
    let changed = after.iter().filter(|(key, value)| before.get(*key) != Some(*value));
    changed.map(|((_, key), value)| key.len() + value.len()).sum()
}

async fn sync(fixture: &Fixture, token: &str, since: &str) -> Value {
    let path = format!("/_matrix/client/v3/sync?timeout=0{since}");
    fixture.json(Method::GET, &path, Some(token), Value::Null).await
}

async fn members() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::open(dir.path(), Durability::Os);
    let mut txn = 0;
    let mut bytes = Vec::new();
    for members in ROOMS {
        let owner = fixture.register(&format!("owner{members}")).await;
        let judge = fixture.register(&format!("judge{members}")).await;
        let room = fixture.make_room(&owner, "room").await;
        fixture.join(&judge, &room).await;
        for rule in hostile_rules() {
            let path = format!("/_matrix/client/v3/pushrules/global/content/{}", rule.rule_id);
            let body = json!({ "pattern": rule.pattern, "actions": ["notify"] });
            fixture.json(Method::PUT, &path, Some(&judge), body).await;
        }
        fill(&fixture, &room, members).await;
        // The first messages find out whose rules differ; it is the later ones that count.
        for _ in 0..20 {
            txn += 1;
            fixture.send(&owner, &room, txn).await;
        }
        let (cpu, began) = (cpu_ms(), Instant::now());
        for _ in 0..MESSAGES {
            txn += 1;
            fixture.send(&owner, &room, txn).await;
        }
        let count = MESSAGES as f64;
        let (cpu, took) = ((cpu_ms() - cpu) / count, began.elapsed().as_secs_f64() * 1e3 / count);
        // Rows that are written in the background at the same time are not in all of them.
        let mut written = usize::MAX;
        for _ in 0..3 {
            txn += 1;
            written = written.min(written_by(&fixture, &owner, &room, txn).await);
        }
        bytes.push(written);
        println!(
            "{members:>6} members: {cpu:>7.3} ms CPU, {took:>7.3} ms a message, which writes {written} bytes"
        );
        if members == ROOMS[ROOMS.len() - 1] && !cfg!(debug_assertions) {
            assert!(cpu < MESSAGE_MS_MAX, "a message costs {cpu} ms");
        }
        let since = sync(&fixture, &judge, "").await["next_batch"].as_str().unwrap().to_owned();
        let (mut since, cpu) = (format!("&since={since}"), cpu_ms());
        for _ in 0..MESSAGES {
            txn += 1;
            fixture.send(&owner, &room, txn).await;
            let answer = sync(&fixture, &judge, &since).await;
            since = format!("&since={}", answer["next_batch"].as_str().unwrap());
        }
        println!(
            "{members:>6} members: {:>7.3} ms CPU a message that somebody with hostile rules syncs",
            (cpu_ms() - cpu) / count
        );
    }
    let (least, most) = (bytes[0], bytes[bytes.len() - 1]);
    assert!(most <= least + BYTES_MORE_MAX, "a message to more members writes more: {bytes:?}");
    fixture.close().await;
}

/// A gateway that takes everything, and counts it.
struct Gateway {
    url: String,
    taken: Arc<AtomicU64>,
}

impl Gateway {
    fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/_matrix/push/v1/notify", listener.local_addr().unwrap());
        let taken = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&taken);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, counted) = (stream.unwrap(), Arc::clone(&counted));
                thread::spawn(move || serve(stream, &counted));
            }
        });
        Self { url, taken }
    }

    async fn takes(&self, count: u64) {
        let began = Instant::now();
        while self.taken.load(Ordering::Relaxed) < count {
            assert!(began.elapsed() < Duration::from_secs(120), "the gateway is not told of everything");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Answers requests on a connection until it ends.
fn serve(stream: TcpStream, counted: &AtomicU64) {
    stream.set_nodelay(true).unwrap();
    let mut stream = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        counted.fetch_add(1, Ordering::Relaxed);
        let answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
        if stream.get_mut().write_all(answer).is_err() {
            return;
        }
    }
}

async fn pushers() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::open();
    let fixture = Fixture::open_with(dir.path(), Durability::Os, |config| {
        config.outbound.allow_private_addresses = true;
    });
    let owner = fixture.register("owner").await;
    let room = fixture.make_room(&owner, "room").await;
    for number in 0..PUSHERS {
        let token = fixture.register(&format!("member{number}")).await;
        fixture.join(&token, &room).await;
        let pusher = json!({
            "kind": "http", "app_id": "org.example.app", "pushkey": format!("key{number}"), "lang": "en",
            "app_display_name": "app", "device_display_name": "device", "data": { "url": gateway.url },
        });
        fixture.json(Method::POST, "/_matrix/client/v3/pushers/set", Some(&token), pusher).await;
    }
    let each = u64::try_from(PUSHERS).unwrap();
    for round in 1..=5 {
        let (cpu, began) = (cpu_ms(), Instant::now());
        fixture.send(&owner, &room, round).await;
        let sent = began.elapsed().as_secs_f64() * 1e3;
        gateway.takes(round * each).await;
        let took = began.elapsed().as_secs_f64() * 1e3;
        println!(
            "{PUSHERS} pushers: sent after {sent:.1} ms, all told after {took:.0} ms, {:.3} ms CPU each with the gateway's",
            (cpu_ms() - cpu) / each as f64
        );
    }
    fixture.close().await;
}

fn main() {
    let named: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| named.is_empty() || named.iter().any(|wanted| wanted == name);
    let runtime = Runtime::new().unwrap();
    if is_wanted("members") {
        runtime.block_on(members());
    }
    if is_wanted("pushers") {
        runtime.block_on(pushers());
    }
}
