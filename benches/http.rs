//! Load over real HTTP: what a client feels and what it costs the server. `cargo bench --bench http`.
//!
//! Starts the release binary in an empty directory with fsync on, or drives another homeserver for comparison:
//! `cargo bench --bench http -- --url http://127.0.0.1:8448 --shared-secret SECRET --pid PID` (any server with the
//! `/_synapse/admin/v1/register` endpoint and its rate limits off). Name scenarios to run only those. The load shares
//! the machine's cores with the server; CPU time is the server's alone, from /proc. Figures: `docs/performance.md`.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a benchmark measures real time and stops at the first fault"
)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha1::Sha1;

/// How long each closed loop runs.
const LOOP: Duration = Duration::from_secs(5);
const SECRET: &str = "benchmark";
static UNIQUE: AtomicU64 = AtomicU64::new(0);

/// One keep-alive connection, as cheap as possible so that the load costs little of what it measures.
struct Http {
    address: String,
    stream: BufReader<TcpStream>,
}

impl Http {
    fn new(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("the server listens");
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { address: address.to_owned(), stream: BufReader::new(stream) }
    }

    fn raw(&mut self, method: &str, path: &str, token: &str, body: &str) -> (u16, Vec<u8>) {
        let bearer =
            if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{bearer}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes()).unwrap();
        let (mut status, mut length, mut chunked, mut line) = (0, 0, false, String::new());
        loop {
            line.clear();
            self.stream.read_line(&mut line).unwrap();
            let lower = line.trim_end().to_ascii_lowercase();
            if lower.is_empty() {
                break;
            } else if status == 0 {
                status = lower.split(' ').nth(1).unwrap().parse().unwrap();
            } else if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            } else if lower == "transfer-encoding: chunked" {
                chunked = true;
            }
        }
        let mut answer = vec![0; length];
        self.stream.read_exact(&mut answer).unwrap();
        while chunked {
            line.clear();
            self.stream.read_line(&mut line).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let at = answer.len();
            answer.resize(at + size + 2, 0);
            self.stream.read_exact(&mut answer[at..]).unwrap();
            answer.truncate(at + size);
            chunked = size > 0;
        }
        (status, answer)
    }

    fn ok(&mut self, method: &str, path: &str, token: &str, body: &Value) -> Value {
        let (status, answer) = self.raw(method, path, token, &body.to_string());
        assert_eq!(status, 200, "{method} {path}: {}", String::from_utf8_lossy(&answer));
        serde_json::from_slice(&answer).unwrap()
    }
}

struct Target {
    address: String,
    secret: String,
    pid: u32,
    own: Option<Own>,
}

/// A server that this benchmark started.
struct Own {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Own {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn start_server(dir: &std::path::Path, port: u16) -> Child {
    let config: PathBuf = dir.join("conduit.toml");
    if !config.exists() {
        let text = format!(
            "[server]\nname = \"localhost:{port}\"\ndata_dir = \"{}\"\n[[listener]]\naddress = \"127.0.0.1:{port}\"\n\
             [registration]\nmode = \"open\"\nshared_secret = \"{SECRET}\"\n[limits]\nrate_limits = false\n\
             [passwords]\nargon2_memory_kib = 8\nargon2_iterations = 1\n[log]\nlevel = \"warn\"\n",
            dir.join("data").display()
        );
        std::fs::write(&config, text).unwrap();
    }
    Command::new(env!("CARGO_BIN_EXE_aqueduct"))
        .arg("--config")
        .arg(&config)
        .stdout(Stdio::null())
        .spawn()
        .expect("the binary is built")
}

fn wait_until_up(address: &str) -> Duration {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(30) {
        if TcpStream::connect(address).is_ok() {
            let (status, _) = Http::new(address).raw("GET", "/_matrix/client/versions", "", "");
            assert_eq!(status, 200);
            return began.elapsed();
        }
        thread::sleep(Duration::from_millis(2));
    }
    panic!("the server does not answer at {address}");
}

impl Target {
    fn http(&self) -> Http {
        Http::new(&self.address)
    }

    /// CPU time the server has used, in milliseconds (user and system).
    fn cpu_ms(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // Clock ticks of 10 ms: fields 14 and 15 of proc(5), counted after the name.
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) * 10.0
    }

    /// CPU time that the server's threads have used, in milliseconds, to the nanosecond: for what hardly works.
    fn exact_cpu_ms(&self) -> f64 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap();
        let spent = threads.map(|thread| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap_or_default();
            stat.split_whitespace().next().map_or(0.0, |spent| spent.parse::<f64>().unwrap())
        });
        spent.sum::<f64>() / 1e6
    }

    fn resident_mb(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }

    /// Registers a user with the shared secret; answers the access token and the user id.
    fn user(&self) -> (String, String) {
        let mut http = self.http();
        let name = format!("u{}x{}", std::process::id(), UNIQUE.fetch_add(1, Ordering::Relaxed));
        let nonce = http.ok("GET", "/_synapse/admin/v1/register", "", &json!({}))["nonce"].clone();
        let nonce = nonce.as_str().unwrap();
        let mut mac = Hmac::<Sha1>::new_from_slice(self.secret.as_bytes()).unwrap();
        mac.update(format!("{nonce}\0{name}\0password\0notadmin").as_bytes());
        let mac: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let body =
            json!({ "nonce": nonce, "username": name, "password": "password", "admin": false, "mac": mac });
        let answer = http.ok("POST", "/_synapse/admin/v1/register", "", &body);
        (answer["access_token"].as_str().unwrap().into(), answer["user_id"].as_str().unwrap().into())
    }

    fn room(&self, token: &str) -> String {
        let body = json!({ "preset": "public_chat" });
        let answer = self.http().ok("POST", "/_matrix/client/v3/createRoom", token, &body);
        answer["room_id"].as_str().unwrap().into()
    }

    fn join(&self, token: &str, room: &str) {
        self.http().ok("POST", &format!("/_matrix/client/v3/join/{room}"), token, &json!({}));
    }

    fn send(&self, http: &mut Http, token: &str, room: &str) {
        let txn = UNIQUE.fetch_add(1, Ordering::Relaxed);
        let path =
            format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/{}b{txn}", std::process::id());
        http.ok(
            "PUT",
            &path,
            token,
            &json!({ "msgtype": "m.text", "body": "How many roads must a man walk down?" }),
        );
    }

    fn sync(&self, http: &mut Http, token: &str, query: &str) -> String {
        let answer = http.ok("GET", &format!("/_matrix/client/v3/sync?{query}"), token, &json!({}));
        answer["next_batch"].as_str().unwrap().into()
    }
}

/// Runs `step` in a closed loop on as many connections as there are contexts; prints rate and CPU.
fn closed_loop<C: Send + 'static>(
    name: &str,
    target: &Arc<Target>,
    contexts: Vec<C>,
    step: impl Fn(&Target, &mut Http, &mut C) + Send + Sync + Clone + 'static,
) {
    let cpu = target.cpu_ms();
    let began = Instant::now();
    let threads: Vec<_> = contexts
        .into_iter()
        .map(|mut context| {
            let (target, step) = (target.clone(), step.clone());
            thread::spawn(move || {
                let (mut http, mut took) = (target.http(), Vec::new());
                while began.elapsed() < LOOP {
                    let at = Instant::now();
                    step(&target, &mut http, &mut context);
                    took.push(at.elapsed());
                }
                took
            })
        })
        .collect();
    let mut took: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    let (seconds, cpu) = (began.elapsed().as_secs_f64(), target.cpu_ms() - cpu);
    took.sort_unstable();
    let count = took.len().max(1) as f64;
    println!(
        "{name:<28} {:>9.1} /s   {:>8.3} ms CPU each   p50 {:>8.2} ms   p99 {:>8.2} ms",
        count / seconds,
        cpu / count,
        took[took.len() / 2].as_secs_f64() * 1e3,
        took[took.len() * 99 / 100].as_secs_f64() * 1e3,
    );
}

fn sends(target: &Arc<Target>, writers: usize, one_room: bool) {
    let (owner, _) = target.user();
    let shared = target.room(&owner);
    let contexts: Vec<_> = (0..writers)
        .map(|_| {
            let (token, _) = target.user();
            let room = if one_room { shared.clone() } else { target.room(&token) };
            if one_room {
                target.join(&token, &room);
            }
            (token, room)
        })
        .collect();
    let name = format!("send x{writers}, {}", if one_room { "one room" } else { "many rooms" });
    closed_loop(&name, target, contexts, |target, http, (token, room)| target.send(http, token, room));
}

fn long_poll(target: &Arc<Target>) {
    let ((alice, _), (bob, _)) = (target.user(), target.user());
    let room = target.room(&alice);
    target.join(&bob, &room);
    let (mut poll, mut http, mut took) = (target.http(), target.http(), Vec::new());
    let mut since = target.sync(&mut poll, &bob, "timeout=0");
    for _ in 0..200 {
        let thread = {
            let (target, bob, since) = (target.clone(), bob.clone(), since.clone());
            thread::spawn(move || {
                let mut poll = poll;
                let next = target.sync(&mut poll, &bob, &format!("timeout=10000&since={since}"));
                (poll, next, Instant::now())
            })
        };
        thread::sleep(Duration::from_millis(5));
        let sent = Instant::now();
        target.send(&mut http, &alice, &room);
        let (back, next, seen) = thread.join().unwrap();
        (poll, since) = (back, next);
        took.push(seen.saturating_duration_since(sent));
    }
    took.sort_unstable();
    println!(
        "{:<28} p50 {:.2} ms   p99 {:.2} ms",
        "send to the other's poll",
        took[took.len() / 2].as_secs_f64() * 1e3,
        took[took.len() * 99 / 100].as_secs_f64() * 1e3
    );
}

/// A user in 60 rooms of 20 messages each.
fn reader(target: &Target) -> (String, Vec<String>) {
    let (token, _) = target.user();
    let rooms: Vec<_> = (0..60).map(|_| target.room(&token)).collect();
    let mut http = target.http();
    for room in &rooms {
        (0..20).for_each(|_| target.send(&mut http, &token, room));
    }
    (token, rooms)
}

fn syncs(target: &Arc<Target>, name: &str) {
    let (token, rooms) = reader(target);
    let since = target.sync(&mut target.http(), &token, "timeout=0");
    let filter = |lazy: bool| {
        format!(
            "filter=%7B%22room%22%3A%7B%22state%22%3A%7B%22lazy_load_members%22%3A{lazy}%7D%7D%7D&timeout=0"
        )
    };
    match name {
        "empty_sync" => {
            let query = format!("timeout=0&since={since}");
            closed_loop("empty sync, 60 rooms", target, vec![(); 4], move |target, http, ()| {
                target.sync(http, &token, &query);
            });
        }
        "initial_sync" => {
            for lazy in [true, false] {
                let (token, query) = (token.clone(), filter(lazy));
                let name = format!("initial sync, lazy {lazy}");
                closed_loop(&name, target, vec![(); 4], move |target, http, ()| {
                    target.sync(http, &token, &query);
                });
            }
        }
        _ => {
            let room = rooms[0].clone();
            let mut http = target.http();
            (0..150).for_each(|_| target.send(&mut http, &token, &room));
            let path = format!("/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=100");
            closed_loop("page of 100 messages", target, vec![(); 4], move |_, http, ()| {
                http.ok("GET", &path, &token, &json!({}));
            });
        }
    }
}

fn memory(target: &Target) {
    let users: Vec<_> = (0..20).map(|_| target.user().0).collect();
    let mut http = target.http();
    for number in 0..1000 {
        let (alice, bob) = (&users[number % 20], &users[(number + 7) % 20]);
        let room = target.room(alice);
        target.join(bob, &room);
        (0..3).for_each(|_| target.send(&mut http, alice, &room));
    }
    thread::sleep(Duration::from_secs(5));
    let (mb, cpu) = (target.resident_mb(), target.exact_cpu_ms());
    thread::sleep(Duration::from_secs(30));
    let idle = (target.exact_cpu_ms() - cpu) / 30.0;
    println!("{:<28} {mb:.1} MB resident, {idle:.2} ms of CPU a second when idle", "1,000 rooms, 5 s later");
}

/// Start with 100,000 events, after a clean stop and after SIGKILL. Only for a server of our own.
fn restart(target: &mut Target) {
    let Some(own) = &mut target.own else { return println!("start: needs a server of its own") };
    let (address, dir) = (target.address.clone(), own.dir.path().to_owned());
    let port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let pid = own.child.id().to_string();
    Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    let began = Instant::now();
    own.child.wait().unwrap();
    println!("{:<28} {:.0} ms", "stop on SIGTERM", began.elapsed().as_secs_f64() * 1e3);
    own.child = start_server(&dir, port);
    println!("{:<28} {:.0} ms", "start after a clean stop", wait_until_up(&address).as_secs_f64() * 1e3);
    own.child.kill().unwrap();
    own.child.wait().unwrap();
    own.child = start_server(&dir, port);
    println!("{:<28} {:.0} ms", "start after SIGKILL", wait_until_up(&address).as_secs_f64() * 1e3);
    target.pid = own.child.id();
}

fn fill(target: &Arc<Target>, events: usize) {
    let writers: Vec<_> =
        (0..16).map(|_| target.user().0).map(|token| (target.room(&token), token)).collect();
    let threads: Vec<_> = writers
        .into_iter()
        .map(|(room, token)| {
            let target = target.clone();
            thread::spawn(move || {
                let mut http = target.http();
                (0..events / 16).for_each(|_| target.send(&mut http, &token, &room));
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.next().and(arguments.next())
}

fn own_target() -> Target {
    let dir = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let child = start_server(dir.path(), port);
    let address = format!("127.0.0.1:{port}");
    let pid = child.id();
    let target = Target { address, secret: SECRET.into(), pid, own: Some(Own { child, dir }) };
    wait_until_up(&target.address);
    target
}

fn target() -> Target {
    let Some(url) = option("--url") else { return own_target() };
    let address = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let pid =
        option("--pid").and_then(|pid| pid.parse().ok()).expect("--pid of the server, for its CPU time");
    Target { address, secret: option("--shared-secret").expect("--shared-secret"), pid, own: None }
}

fn main() {
    const SCENARIOS: [&str; 7] =
        ["send", "long_poll", "empty_sync", "initial_sync", "messages", "memory", "restart"];
    let named: Vec<_> = std::env::args().filter(|argument| SCENARIOS.contains(&argument.as_str())).collect();
    for scenario in SCENARIOS {
        if !named.is_empty() && !named.iter().any(|name| name == scenario) {
            continue;
        }
        // Each scenario has a server of its own, so that none pays for another's data.
        let mut target = Arc::new(target());
        match scenario {
            "send" => {
                for (writers, one_room) in [(16, false), (16, true), (64, false), (64, true)] {
                    sends(&target, writers, one_room);
                }
            }
            "long_poll" => long_poll(&target),
            "memory" => memory(&target),
            "restart" => {
                fill(&target, 100_000);
                restart(Arc::get_mut(&mut target).expect("the load has ended"));
            }
            other => syncs(&target, other),
        }
    }
}
