//! The real process, killed with SIGKILL at random moments: while people send and make rooms over HTTP, while a room is made that
//! is larger than a batch, and while a bulk write of 100,000 rows is staged through the store's own interface. After each start
//! everything acknowledged is there exactly once, nothing is half there, and what is tried again with its transaction id does
//! not act twice.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "what is not as expected fails the test; the processes and clocks are real"
)]

#[path = "crash/media.rs"]
mod media;

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
    schema,
    server::flusher,
    store::{
        BATCH_ROWS_MAX, DataDir, Direction, Domain, Durability, Family, Guard, LogEntry, NotAccepted,
        Read as _, Store, Table, tables,
    },
};
use rand::RngExt;
use serde_json::{Value, json};

/// The issue asks for at least this many kills.
const SERVER_KILLS: usize = 50;
const STAGE_KILLS: usize = 25;
/// At least this many kills find a large room half written.
const ROOM_KILLS: usize = 10;

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
        let spawn = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_aqueduct"));
            command.args(["--config".as_ref(), config.as_os_str()]).stdout(Stdio::null()).spawn().unwrap()
        };
        let mut server = Self { child: spawn() };
        let socket = config.with_file_name("http.sock");
        let began = Instant::now();
        while ask(&socket, "GET", "/_matrix/client/versions", None, &Value::Null).is_none() {
            if let Some(status) = server.child.try_wait().unwrap() {
                // A command that began while no server ran has the directory until it is done.
                assert!(
                    began.elapsed() < Duration::from_secs(20),
                    "the server did not start again: {status}"
                );
                thread::sleep(Duration::from_millis(50));
                server.child = spawn();
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
    let end_of_head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let (head, body) = (std::str::from_utf8(&answer[..end_of_head]).unwrap(), &answer[end_of_head + 4..]);
    let status: u16 = head.split(' ').nth(1)?.parse().ok()?;
    let field = |name: &str| {
        head.lines().find_map(|line| Some(line.to_ascii_lowercase().strip_prefix(name)?.to_owned()))
    };
    let body = match field("content-length: ") {
        Some(length) => (length.parse() == Ok(body.len())).then(|| body.to_vec())?,
        None => whole_chunks(body)?,
    };
    Some((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
}

/// Joins the chunks of a body; none when the server was killed in the middle of it.
fn whole_chunks(mut chunks: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end_of_line = chunks.windows(2).position(|bytes| bytes == b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&chunks[..end_of_line]).unwrap(), 16).unwrap();
        let begin = end_of_line + 2;
        if length == 0 {
            return Some(body);
        }
        body.extend(chunks.get(begin..begin + length)?);
        chunks = chunks.get(begin + length + 2..)?;
    }
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

/// Registers an account; answers its user id and its token.
fn register(socket: &Path, name: &str) -> (String, String) {
    let account = json!({ "username": name, "password": "a password", "auth": { "type": "m.login.dummy" } });
    let (status, json) = ask(socket, "POST", "/_matrix/client/v3/register", None, &account).unwrap();
    assert_eq!(status, 200, "{json}");
    let text = |key: &str| json[key].as_str().unwrap().to_owned();
    (text("user_id"), text("access_token"))
}

impl World {
    /// The world of the user with this token, who knows nothing yet.
    fn of(socket: &Path, token: String) -> Arc<Self> {
        let (stop, known) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Self { socket: socket.to_owned(), token, stop, known })
    }

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

/// Checks that a kill leaves a whole store on the disk: everything that a row refers to is there. Answers what else is to be
/// read from it.
fn check_rows<T>(config: &Path, read: impl FnOnce(&Store) -> T) -> T {
    let data = DataDir::hold(&config.with_file_name("data")).unwrap();
    let store = data.open_store(8 << 20, Durability::Fsync).unwrap();
    assert_eq!(check(&store, &mut |_| ()).unwrap().findings, [""; 0]);
    read(&store)
}

#[test]
fn a_server_that_is_killed_again_and_again_loses_nothing_and_doubles_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = configure(dir.path());
    let socket = dir.path().join("http.sock");
    let mut server = Server::start(&config);
    let (_, token) = register(&socket, "somebody");
    let world = World::of(&socket, token);
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
            check_rows(&config, |_| ());
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
    check_rows(&config, |_| ());
    println!("{acknowledged} messages acknowledged, {SERVER_KILLS} kills");
}

// --- a room that is larger than a batch, over HTTP ---

/// A large room begins with this many invitations.
const GUESTS: usize = 300;
/// A large room begins with this many pieces of state of the client's.
const THINGS: usize = 200;

impl World {
    /// Makes a large room with an alias of its own; no answer when the server went down before it answered.
    fn make_large(&self, number: usize, guests: &[String]) -> Option<(u16, Value)> {
        let things = (0..THINGS).map(|thing| {
            json!({ "type": "org.example.thing", "state_key": thing.to_string(), "content": { "of": number } })
        });
        let body = json!({
            "room_alias_name": format!("large{number}"), "name": format!("large {number}"),
            "invite": guests, "initial_state": things.collect::<Vec<_>>(),
        });
        ask(&self.socket, "POST", "/_matrix/client/v3/createRoom", Some(&self.token), &body)
    }

    /// Finds a large room by its alias, which is written with the last part.
    fn find_large(&self, number: usize) -> Option<String> {
        let path = format!("/_matrix/client/v3/directory/room/%23large{number}:crash.example");
        let (status, json) = ask(&self.socket, "GET", &path, Some(&self.token), &Value::Null).unwrap();
        assert!(status == 200 || json["errcode"] == "M_NOT_FOUND", "{status} {json}");
        json["room_id"].as_str().map(str::to_owned)
    }

    /// Checks that a large room has everything that it was made with.
    fn check_large(&self, room: &str) {
        let state = self.insist("GET", &format!("/_matrix/client/v3/rooms/{room}/state"), &Value::Null);
        let count = |is_one: &dyn Fn(&Value) -> bool| {
            state.as_array().unwrap().iter().filter(|event| is_one(event)).count()
        };
        assert_eq!(count(&|event| event["type"] == "org.example.thing"), THINGS, "{room}");
        assert_eq!(count(&|event| event["content"]["membership"] == "invite"), GUESTS, "{room}");
        for kind in ["create", "power_levels", "join_rules", "name", "canonical_alias"] {
            assert_eq!(count(&|event| event["type"] == format!("m.room.{kind}")), 1, "{room}: {kind}");
        }
    }

    /// Syncs on and on; answers the rooms to which the user was invited, of which each is told once.
    fn follow_invitations(&self) -> BTreeSet<String> {
        let (mut told, mut since) = (BTreeSet::new(), String::new());
        let mut is_last = false;
        loop {
            let json = self.insist("GET", &format!("/_matrix/client/v3/sync?timeout=0{since}"), &Value::Null);
            since = format!("&since={}", json["next_batch"].as_str().unwrap());
            for room in json["rooms"]["invite"].as_object().into_iter().flatten() {
                assert!(told.insert(room.0.clone()), "the invitation to {} is told twice", room.0);
            }
            // The last answer may have been on its way when everything was done.
            if std::mem::replace(&mut is_last, !self.is_going()) {
                return told;
            }
            thread::sleep(Duration::from_millis(3));
        }
    }
}

/// Everything in the log so far.
#[derive(Default)]
struct Log(BTreeMap<Position, LogEntry>);

impl Log {
    /// Reads the log on the disk as far as it counts, which is below the parts of a room that is half written. No position may be
    /// given for a second time. Answers whether a room is half written.
    fn follow(&mut self, config: &Path) -> bool {
        check_rows(config, |store| {
            let read = &*store.snapshot();
            let newest = self.0.keys().next_back().copied();
            assert!(newest.is_none_or(|newest| newest <= read.upto()), "{newest:?} is lost");
            for row in tables::LOG.prefix::<()>(read, (), Direction::Up).unwrap() {
                let (position, entry) = row.unwrap();
                if position > read.upto() {
                    break;
                }
                let before = self.0.insert(position, entry);
                let is_new = before.is_none() && newest.is_none_or(|newest| position > newest);
                assert!(is_new || before == Some(entry), "{position:?} is given twice");
            }
            schema::STAGE.prefix::<()>(read, (), Direction::Up).unwrap().count() > 0
        })
    }
}

#[test]
fn a_large_room_that_a_kill_cuts_short_is_there_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let config = configure(dir.path());
    let socket = dir.path().join("http.sock");
    let mut server = Server::start(&config);
    let maker = World::of(&socket, register(&socket, "maker").1);
    let (guests, tokens): (Vec<_>, Vec<_>) =
        (0..GUESTS).map(|number| register(&socket, &format!("guest{number}"))).unzip();
    let guest = World::of(&socket, tokens[GUESTS / 2].clone());
    let small = maker.make_room("small".to_owned()).unwrap();
    let (talking, talked) = (maker.clone(), small.clone());
    let talker = thread::spawn(move || talking.talk(0, &talked));
    let following = guest.clone();
    let follower = thread::spawn(move || following.follow_invitations());

    let began = Instant::now();
    let (_, first) = maker.make_large(0, &guests).unwrap();
    let takes_ms = u64::try_from(began.elapsed().as_millis()).unwrap();
    let mut rooms = BTreeSet::from([first["room_id"].as_str().unwrap().to_owned()]);
    let (mut log, mut cut_short, mut number) = (Log::default(), 0, 0);
    while cut_short < ROOM_KILLS {
        number += 1;
        assert!(number < 20 * ROOM_KILLS, "of {number} kills {cut_short} came in the middle of a room");
        let (making, invited) = (maker.clone(), guests.clone());
        let request = thread::spawn(move || making.make_large(number, &invited));
        thread::sleep(up_to_ms(takes_ms));
        server.kill();
        let answer = request.join().unwrap();
        cut_short += usize::from(log.follow(&config));
        server = Server::start(&config);
        let found = maker.find_large(number);
        assert!(answer.is_none() || found.is_some(), "large {number} was acknowledged: {answer:?}");
        let (status, again) = maker.make_large(number, &guests).unwrap();
        let room = match &found {
            Some(_) => again["errcode"].as_str().filter(|code| *code == "M_ROOM_IN_USE").and(found.clone()),
            None => again["room_id"].as_str().map(str::to_owned),
        };
        let room = room.unwrap_or_else(|| panic!("it is tried again: {status} {again}"));
        maker.check_large(&room);
        rooms.insert(room);
    }
    for world in [&maker, &guest] {
        world.stop.store(true, Ordering::SeqCst);
    }
    talker.join().unwrap();
    assert_eq!(follower.join().unwrap(), rooms, "the guest is told of whole rooms and of no others");
    maker.check_said();
    let joined = maker.insist("GET", "/_matrix/client/v3/joined_rooms", &Value::Null);
    let joined: BTreeSet<_> =
        joined["joined_rooms"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect();
    rooms.insert(small);
    assert_eq!(joined, rooms);
    server.kill();
    assert!(!log.follow(&config), "the parts of rooms that were cut short are left");
    println!("{number} kills, {cut_short} of them in the middle of a room");
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
