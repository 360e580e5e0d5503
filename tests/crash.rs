//! The real process, killed with SIGKILL at random moments: while people send and make rooms over HTTP, and while a bulk
//! write of 100,000 rows is staged through the store's own interface. After each start everything acknowledged is there
//! exactly once, nothing is half there, and what is tried again with its transaction id does not act twice.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "what is not as expected fails the test; the processes and clocks are real"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aqueduct::{
    env::Env,
    flows::operator::check::check,
    ids::{Position, RoomNum},
    server::flusher,
    store::{
        BATCH_ROWS_MAX, DataDir, Direction, Domain, Durability, Family, Guard, LogEntry, NotAccepted, Store,
        Table,
    },
};
use rand::RngExt;
use serde_json::{Value, json};

/// The issue asks for at least this many kills.
const SERVER_KILLS: usize = 50;
const STAGE_KILLS: usize = 25;

fn up_to_ms(ms: u64) -> Duration {
    Duration::from_millis(rand::rng().random_range(0..ms))
}

// --- the server, over HTTP ---

/// The server's process, and where it listens.
struct Server {
    child: Child,
}

fn configure(dir: &Path) -> PathBuf {
    let file = dir.join("conduit.toml");
    let (data, socket) = (dir.join("data"), dir.join("http.sock"));
    let config = format!(
        "[server]\nname = \"crash.example\"\ndata_dir = {data:?}\n[[listener]]\nunix = {socket:?}\n\
         [registration]\nmode = \"open\"\n[passwords]\nargon2_memory_kib = 8\nargon2_iterations = 1\n\
         [limits]\nrate_limits = false\n[log]\nlevel = \"error\"\n",
    );
    std::fs::write(&file, config).unwrap();
    file
}

impl Server {
    fn start(config: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_aqueduct"))
            .args(["--config".as_ref(), config.as_os_str()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self { child };
        let socket = config.with_file_name("http.sock");
        let began = Instant::now();
        while ask(&socket, "GET", "/_matrix/client/versions", None, &Value::Null).is_none() {
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!("the server did not start again: {status}");
            }
            assert!(began.elapsed() < Duration::from_secs(60), "the server does not answer");
            thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// Kills the process with SIGKILL, so that no handler runs and nothing more is written.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Makes one request on a connection of its own; no answer when the server went down before it answered.
fn ask(socket: &Path, method: &str, path: &str, token: Option<&str>, body: &Value) -> Option<(u16, Value)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let authorization = token.map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{authorization}\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status: u16 = head.split(' ').nth(1)?.parse().ok()?;
    let length = head
        .lines()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    // The server was killed in the middle of the answer.
    if length != Some(body.len()) {
        return None;
    }
    Some((status, serde_json::from_str(body).unwrap_or(Value::Null)))
}

/// Everything that the server acknowledged.
#[derive(Default)]
struct Known {
    /// Body of a message -> (room, event id).
    said: BTreeMap<String, (String, String)>,
    /// Names of rooms that somebody tried to make -> the room's id, if it was answered.
    rooms: BTreeMap<String, Option<String>>,
}

struct World {
    socket: PathBuf,
    token: String,
    stop: AtomicBool,
    known: Mutex<Known>,
}

impl World {
    fn insist(&self, method: &str, path: &str, body: &Value) -> Value {
        loop {
            match ask(&self.socket, method, path, Some(&self.token), body) {
                Some((200, json)) => return json,
                // The server that is about to be killed may say that it cannot.
                Some((status, json)) => assert!(status >= 500 && self.is_going(), "{path}: {status} {json}"),
                None => thread::sleep(Duration::from_millis(3)),
            }
        }
    }

    fn is_going(&self) -> bool {
        !self.stop.load(Ordering::SeqCst)
    }

    fn make_room(&self, name: String) -> Option<String> {
        self.known.lock().unwrap().rooms.insert(name.clone(), None);
        let body = json!({ "name": name, "topic": "made", "preset": "public_chat" });
        let (status, json) =
            ask(&self.socket, "POST", "/_matrix/client/v3/createRoom", Some(&self.token), &body)?;
        assert_eq!(status, 200, "{json}");
        let room = json["room_id"].as_str().unwrap().to_owned();
        self.known.lock().unwrap().rooms.insert(name, Some(room.clone()));
        Some(room)
    }

    /// Sends one message after the other, and repeats each until it is answered.
    fn talk(&self, writer: usize, room: &str) {
        let mut count = 0;
        while self.is_going() {
            count += 1;
            let body = format!("{count} of {writer}");
            let path = format!("/_matrix/client/v3/rooms/{room}/send/m.room.message/w{writer}t{count}");
            let content = json!({ "msgtype": "m.text", "body": body });
            let json = self.insist("PUT", &path, &content);
            if count % 16 == 0 {
                assert_eq!(self.insist("PUT", &path, &content), json, "the same transaction, once more");
            }
            let event_id = json["event_id"].as_str().unwrap().to_owned();
            self.known.lock().unwrap().said.insert(body, (room.to_owned(), event_id));
        }
    }

    fn make_rooms(&self) {
        let mut count = 0;
        while self.is_going() {
            count += 1;
            if self.make_room(format!("room {count}")).is_none() {
                thread::sleep(Duration::from_millis(3));
            }
        }
    }

    fn list_events(&self, room: &str) -> Vec<Value> {
        let (mut events, mut from) = (Vec::new(), String::new());
        loop {
            let path = format!("/_matrix/client/v3/rooms/{room}/messages?dir=f&limit=100{from}");
            let json = self.insist("GET", &path, &Value::Null);
            events.extend(json["chunk"].as_array().unwrap().iter().cloned());
            match json["end"].as_str() {
                Some(end) => from = format!("&from={end}"),
                None => return events,
            }
        }
    }

    /// Checks that everything acknowledged so far is there exactly once.
    fn check_said(&self) {
        let said = self.known.lock().unwrap().said.clone();
        let rooms: BTreeSet<&String> = said.values().map(|(room, _)| room).collect();
        for room in rooms {
            let mut ids_of = BTreeMap::<String, Vec<String>>::new();
            for event in self.list_events(room) {
                if let Some(body) = event["content"]["body"].as_str() {
                    ids_of
                        .entry(body.to_owned())
                        .or_default()
                        .push(event["event_id"].as_str().unwrap().to_owned());
                }
            }
            assert!(ids_of.values().all(|ids| ids.len() == 1), "a message is there twice");
            for (body, (_, event_id)) in said.iter().filter(|(_, (of, _))| of == room) {
                assert_eq!(ids_of.get(body), Some(&vec![event_id.clone()]), "{body} was acknowledged");
            }
        }
    }

    /// Checks that every room has all it was made with, and that every room whose creation was answered is there.
    fn check_rooms(&self) {
        let joined = self.insist("GET", "/_matrix/client/v3/joined_rooms", &Value::Null);
        let joined: BTreeSet<_> =
            joined["joined_rooms"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
        let mut names = BTreeSet::new();
        for room in &joined {
            let state = self.insist("GET", &format!("/_matrix/client/v3/rooms/{room}/state"), &Value::Null);
            let of = |kind: &str| {
                let kind = format!("m.room.{kind}");
                state.as_array().unwrap().iter().find(|event| event["type"] == kind.as_str()).cloned()
            };
            for kind in ["create", "member", "power_levels", "join_rules", "history_visibility", "topic"] {
                assert!(of(kind).is_some(), "{room} is half there: it has no {kind}");
            }
            assert!(names.insert(of("name").unwrap()["content"]["name"].as_str().unwrap().to_owned()));
        }
        for (name, room) in &self.known.lock().unwrap().rooms {
            assert!(room.as_ref().is_none_or(|room| joined.contains(room.as_str())), "{name} is lost");
        }
    }
}

/// Checks that a kill leaves a whole store on the disk: everything that a row refers to is there.
fn check_rows(config: &Path) {
    let data = DataDir::hold(&config.with_file_name("data")).unwrap();
    let store = data.open_store(8 << 20, Durability::Fsync).unwrap();
    assert_eq!(check(&store, &mut |_| ()).unwrap().findings, [""; 0]);
}

#[test]
fn a_server_that_is_killed_again_and_again_loses_nothing_and_doubles_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = configure(dir.path());
    let socket = dir.path().join("http.sock");
    let mut server = Server::start(&config);
    let account =
        json!({ "username": "somebody", "password": "a password", "auth": { "type": "m.login.dummy" } });
    let (_, json) = ask(&socket, "POST", "/_matrix/client/v3/register", None, &account).unwrap();
    let token = json["access_token"].as_str().unwrap().to_owned();
    let world = Arc::new(World { socket, token, stop: AtomicBool::new(false), known: Mutex::default() });
    let rooms: Vec<String> =
        (0..2).map(|number| world.make_room(format!("first {number}")).unwrap()).collect();
    let mut workers: Vec<_> = (0..6)
        .map(|writer| {
            let (world, room) = (world.clone(), rooms[writer % 2].clone());
            thread::spawn(move || world.talk(writer, &room))
        })
        .collect();
    let maker = world.clone();
    workers.push(thread::spawn(move || maker.make_rooms()));
    for kill in 0..SERVER_KILLS {
        thread::sleep(up_to_ms(400));
        server.kill();
        assert!(workers.iter().all(|worker| !worker.is_finished()), "a worker has failed");
        if kill % 10 == 9 {
            check_rows(&config);
        }
        server = Server::start(&config);
        if kill % 10 == 9 {
            world.check_said();
        }
    }
    world.stop.store(true, Ordering::SeqCst);
    for worker in workers {
        worker.join().unwrap();
    }
    let acknowledged = world.known.lock().unwrap().said.len();
    assert!(acknowledged > SERVER_KILLS, "only {acknowledged} messages were acknowledged");
    world.check_said();
    world.check_rooms();
    server.kill();
    check_rows(&config);
    println!("{acknowledged} messages acknowledged, {SERVER_KILLS} kills");
}

// --- the store, in a process of its own ---

/// Rows of bulk writes: (bulk write, row) -> as much text as a state event has. Rows of one that is not in DONE do not count.
static STAGED: Table<(u64, u64), String> = Table::new(240, Family::State, "STAGED", Domain::Room, "crash");
/// The bulk writes that are finished and so visible.
static DONE: Table<u64, u64> = Table::new(241, Family::State, "DONE", Domain::Room, "crash");
/// Small commits beside the bulk write: (writer, number) -> its position.
static SMALL: Table<(u64, u64), Position> = Table::new(242, Family::Index, "SMALL", Domain::Room, "crash");

const STAGED_ROWS: u64 = 100_000;
const STAGE_IN: &str = "AQUEDUCT_TEST_STAGE_IN";

/// The part of the child: it writes, and says on standard output what was acknowledged.
fn write_until_killed(dir: &Path) -> ! {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let data = DataDir::hold(dir).unwrap();
    let store = data.open_store(8 << 20, Durability::Fsync).unwrap();
    runtime.block_on(async {
        let env = Env::real().unwrap();
        flusher::start(&store, &env, |_| (), |_, _| ()).unwrap();
        for writer in 0..4 {
            let small = store.clone();
            env.spawn(async move { commit_small(&small, writer).await });
        }
        loop {
            stage(&store).await;
        }
    })
}

fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{what}").unwrap();
    out.flush().unwrap();
}

async fn commit_small(store: &Store, writer: u64) {
    let rows = SMALL.prefix::<(u64,)>(&*store.snapshot(), (writer,), Direction::Down).unwrap().next();
    let mut number = rows.map_or(0, |row| row.unwrap().0.1);
    loop {
        number += 1;
        let mut batch = store.batch(&Guard::alone());
        let position = batch.position(&LogEntry::RoomState { room: RoomNum(writer) });
        SMALL.expect_absent(&mut batch, (writer, number));
        SMALL.put(&mut batch, (writer, number), &position);
        match store.enqueue(batch) {
            Ok(enqueued) => enqueued.flushed.await.unwrap(),
            Err(NotAccepted::Busy) => continue,
            Err(other) => panic!("{other:?}"),
        }
        say(&format!("small {writer} {number}"));
    }
}

/// Stages a bulk write in parts, from where a kill stopped it, then makes it visible with one small commit.
async fn stage(store: &Store) {
    let done = DONE.prefix::<()>(&*store.snapshot(), (), Direction::Down).unwrap().next();
    let bulk = done.map_or(0, |row| row.unwrap().0) + 1;
    let there = STAGED.prefix::<(u64,)>(&*store.snapshot(), (bulk,), Direction::Down).unwrap().next();
    let mut next = there.map_or(0, |row| row.unwrap().0.1 + 1);
    while next < STAGED_ROWS {
        let mut note = store.note(&Guard::alone());
        while next < STAGED_ROWS && note.row_count() < BATCH_ROWS_MAX {
            let row =
                format!("@somebody{next}:a.server.example.org is a member of the room, since a while ago");
            STAGED.put(&mut note, (bulk, next), &row);
            next += 1;
        }
        store.enqueue_note(note).unwrap().await.unwrap();
        say(&format!("staged {bulk} {next}"));
    }
    let mut batch = store.batch(&Guard::alone());
    batch.position(&LogEntry::RoomState { room: RoomNum(99) });
    DONE.put(&mut batch, bulk, &STAGED_ROWS);
    store.enqueue(batch).unwrap().flushed.await.unwrap();
    say(&format!("done {bulk}"));
}

/// The acknowledgements that the child told of, the newest of each kind.
#[derive(Default, Debug)]
struct Said {
    small: BTreeMap<u64, u64>,
    staged: (u64, u64),
    done: u64,
}

impl Said {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        match words[0] {
            "small" => drop(self.small.insert(number(1), number(2))),
            "staged" => self.staged = (number(1), number(2)),
            "done" => self.done = number(1),
            // The test harness prints lines too, which are passed over.
            _ => {}
        }
    }

    fn check(&self, dir: &Path) {
        let data = DataDir::hold(dir).unwrap();
        let store = data.open_store(8 << 20, Durability::Fsync).unwrap();
        let read = &*store.snapshot();
        for (writer, upto) in &self.small {
            let rows = SMALL.prefix::<(u64,)>(read, (*writer,), Direction::Up).unwrap();
            let rows: Vec<_> =
                rows.map(|row| row.unwrap()).map(|((_, number), position)| (number, position)).collect();
            assert!(rows.iter().map(|(number, _)| *number).eq(1..=rows.len() as u64), "a hole");
            assert!(rows.is_sorted_by_key(|(_, position)| *position), "out of order");
            // Some may have been written and not acknowledged.
            assert!(rows.len() as u64 >= *upto, "writer {writer}: {} there, {upto} acknowledged", rows.len());
        }
        let done: Vec<_> =
            DONE.prefix::<()>(read, (), Direction::Up).unwrap().map(|row| row.unwrap().0).collect();
        assert!(done.iter().copied().eq(1..=done.len() as u64) && done.len() as u64 >= self.done);
        for bulk in done {
            let rows = STAGED.prefix::<(u64,)>(read, (bulk,), Direction::Up).unwrap();
            assert_eq!(rows.count() as u64, STAGED_ROWS, "bulk write {bulk} is half there");
        }
        let (bulk, upto) = self.staged;
        let rows = STAGED.prefix::<(u64,)>(read, (bulk,), Direction::Up).unwrap();
        let rows: Vec<_> = rows.map(|row| row.unwrap().0.1).collect();
        assert!(rows.len() as u64 >= upto, "a part that was acknowledged is lost");
        assert!(
            rows.iter().copied().eq(0..rows.len() as u64) && rows.len().is_multiple_of(BATCH_ROWS_MAX),
            "half a part"
        );
    }
}

#[test]
fn a_staged_bulk_write_that_is_killed_goes_on_and_is_never_half_visible() {
    if let Some(dir) = std::env::var_os(STAGE_IN) {
        write_until_killed(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut said = Said::default();
    for _ in 0..STAGE_KILLS {
        let name = "a_staged_bulk_write_that_is_killed_goes_on_and_is_never_half_visible";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(STAGE_IN, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // It is at work once it says something.
        while let Some(Ok(line)) = lines.next() {
            said.hear(&line);
            if line.starts_with("small") {
                break;
            }
        }
        let listener = thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>());
        thread::sleep(up_to_ms(600));
        child.kill().unwrap();
        child.wait().unwrap();
        listener.join().unwrap().iter().for_each(|line| said.hear(line));
        said.check(dir.path());
    }
    assert!(said.done > 0, "no bulk write came to its end: {said:?}");
    println!("{said:?}");
}
