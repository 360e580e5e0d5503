//! Uploads and deletions, while the server is killed again and again: what was acknowledged is there whole, and each file on the disk has
//! a row that says what becomes of it. And a file that is larger than the memory it may take.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aqueduct::schema::{self, media::Digest};

use super::{Server, check_rows, configure, register, up_to_ms};

/// The issue asks for a kill at each step; so many meet all of them.
const KILLS: usize = 40;

/// Makes one request; no answer when the server went down before it had answered.
fn ask(socket: &Path, head: &str, token: &str, body: &[u8]) -> Option<(u16, Vec<u8>)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let request = format!(
        "{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {token}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    stream.write_all(body).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).unwrap().to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length: usize = head.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse().unwrap();
    let body = answer[end + 4..].to_vec();
    (body.len() == length).then_some((status, body))
}

/// The bytes of a file: some are the same for many uploads.
fn bytes_of(number: usize) -> Vec<u8> {
    let seed = if number.is_multiple_of(3) { number / 30 } else { number };
    seed.to_string().into_bytes().repeat(1 + number * 37 % 9000)[..].to_vec()
}

struct World {
    config: PathBuf,
    socket: PathBuf,
    token: String,
    stop: AtomicBool,
    /// The URIs of the uploads that were acknowledged, with the bytes.
    kept: Mutex<BTreeMap<String, Vec<u8>>>,
    /// The URIs that somebody has begun to delete.
    doomed: Mutex<BTreeSet<String>>,
}

impl World {
    fn is_going(&self) -> bool {
        !self.stop.load(Ordering::SeqCst)
    }

    fn upload(&self, worker: usize) {
        let mut number = worker;
        while self.is_going() {
            number += 4;
            // Some uploads bring the same bytes at the same time.
            let bytes = bytes_of(if number.is_multiple_of(5) { number / 20 * 5 } else { number });
            match ask(&self.socket, "POST /_matrix/media/v3/upload", &self.token, &bytes) {
                Some((200, answer)) => {
                    let json: serde_json::Value = serde_json::from_slice(&answer).unwrap();
                    let uri = json["content_uri"].as_str().unwrap().to_owned();
                    self.kept.lock().unwrap().insert(uri, bytes);
                }
                Some((status, answer)) => {
                    assert!(status >= 429, "{status} {}", String::from_utf8_lossy(&answer));
                }
                None => thread::sleep(Duration::from_millis(3)),
            }
        }
    }

    fn delete(&self) {
        while self.is_going() {
            thread::sleep(up_to_ms(60));
            let chosen = self.kept.lock().unwrap().keys().nth(3).cloned();
            let Some(uri) = chosen else { continue };
            self.doomed.lock().unwrap().insert(uri.clone());
            self.kept.lock().unwrap().remove(&uri);
            let _ = Command::new(env!("CARGO_BIN_EXE_aqueduct"))
                .args(["--config".as_ref(), self.config.as_os_str()])
                .args(["media", "delete", &uri])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }

    /// Checks that everything acknowledged so far is given as it was.
    fn check_kept(&self) {
        let kept = self.kept.lock().unwrap().clone();
        for (uri, bytes) in kept {
            let item = uri.strip_prefix("mxc://").unwrap();
            let head = format!("GET /_matrix/client/v1/media/download/{item}");
            let answer = ask(&self.socket, &head, &self.token, b"");
            let Some((status, found)) = answer else { panic!("{uri} is not answered") };
            let is_doomed = self.doomed.lock().unwrap().contains(&uri);
            assert!(is_doomed || (status == 200 && found == bytes), "{uri} was acknowledged: {status}");
        }
    }
}

/// Checks that each file has a row, and that nothing is left of uploads that broke off.
fn check_files(config: &Path, is_started: bool) {
    let media = config.with_file_name("data").join("media");
    let mut open = vec![media.clone()];
    let mut found = Vec::new();
    while let Some(path) = open.pop() {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    check_rows(config, |store| {
        for path in found {
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.starts_with(media.join("parts")) {
                assert!(!is_started, "{name} is left of an upload");
                continue;
            }
            let digest = Digest::parse(name.split('.').next().unwrap()).unwrap();
            let row = schema::MEDIA_BLOB.get(&*store.snapshot(), &digest.0).unwrap();
            assert!(row.is_some(), "nothing knows of {name}");
        }
    });
}

#[test]
fn a_server_that_is_killed_again_and_again_loses_no_file_and_knows_of_each() {
    let dir = tempfile::tempdir().unwrap();
    let config = configure(dir.path());
    let socket = dir.path().join("http.sock");
    let mut server = Server::start(&config);
    let (_, token) = register(&socket, "somebody");
    let world = Arc::new(World {
        config: config.clone(),
        socket,
        token,
        stop: AtomicBool::new(false),
        kept: Mutex::default(),
        doomed: Mutex::default(),
    });
    let mut workers = Vec::new();
    for worker in 0..4 {
        let world = Arc::clone(&world);
        workers.push(thread::spawn(move || world.upload(worker)));
    }
    let deleting = Arc::clone(&world);
    workers.push(thread::spawn(move || deleting.delete()));
    for kill in 0..KILLS {
        thread::sleep(up_to_ms(300));
        server.kill();
        assert!(workers.iter().all(|worker| !worker.is_finished()), "a worker has failed");
        server = Server::start(&config);
        if kill % 10 == 9 {
            world.check_kept();
        }
    }
    world.stop.store(true, Ordering::SeqCst);
    for worker in workers {
        worker.join().unwrap();
    }
    assert!(world.kept.lock().unwrap().len() > KILLS, "too little was acknowledged");
    world.check_kept();
    server.kill();
    check_files(&config, false);
    // The next start throws away what broke off.
    let server = Server::start(&config);
    thread::sleep(Duration::from_secs(1));
    server.kill();
    check_files(&config, true);
}

/// The memory that a process holds now, and has held at most, in KiB.
fn memory_kib(pid: u32) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// The size of the large file in MiB: set `AQUEDUCT_LARGE_MIB` to 2048 for one of 2 GiB.
fn large_mib() -> usize {
    std::env::var("AQUEDUCT_LARGE_MIB").ok().and_then(|it| it.parse().ok()).unwrap_or(256)
}

#[test]
fn a_large_file_goes_to_the_disk_and_back_without_being_in_memory() {
    const GROWTH_KIB_MAX: u64 = 64 << 10;
    let dir = tempfile::tempdir().unwrap();
    let config = configure(dir.path());
    let mut text = std::fs::read_to_string(&config).unwrap();
    text.push_str("[media]\nupload_bytes_max = \"4 GiB\"\n");
    std::fs::write(&config, text).unwrap();
    let socket = dir.path().join("http.sock");
    let server = Server::start(&config);
    let (_, token) = register(&socket, "somebody");
    assert_eq!(ask(&socket, "POST /_matrix/media/v3/upload", &token, b"small").unwrap().0, 200);
    let (before_kib, _) = memory_kib(server.child.id());
    let (mib, piece) = (large_mib(), vec![0x5a_u8; 1 << 20]);
    let mut stream = UnixStream::connect(&socket).unwrap();
    let head = format!(
        "POST /_matrix/media/v3/upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\
         Content-Length: {}\r\n\r\n",
        mib << 20
    );
    let began = Instant::now();
    stream.write_all(head.as_bytes()).unwrap();
    for number in 0..mib {
        stream.write_all(&number.to_be_bytes()).unwrap();
        stream.write_all(&piece[8..]).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let uploaded = began.elapsed();
    let json = answer.split("\r\n\r\n").nth(1).unwrap();
    let json: serde_json::Value = serde_json::from_str(json).unwrap_or_else(|_| panic!("{answer}"));
    let item = json["content_uri"].as_str().unwrap().strip_prefix("mxc://").unwrap().to_owned();
    let began = Instant::now();
    let mut stream = UnixStream::connect(&socket).unwrap();
    let head = format!(
        "GET /_matrix/client/v1/media/download/{item} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer \
         {token}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let (mut buffer, mut count, mut last) = (vec![0; 1 << 20], 0_usize, [0; 2]);
    loop {
        let read = stream.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        count += read;
        if read >= 2 {
            last.copy_from_slice(&buffer[read - 2..read]);
        }
    }
    assert!(count > mib << 20 && last == [0x5a; 2], "{count} bytes came back");
    let (_, highest_kib) = memory_kib(server.child.id());
    let growth_kib = highest_kib.saturating_sub(before_kib);
    eprintln!(
        "{mib} MiB: uploaded in {uploaded:?}, downloaded in {:?}, memory grew by {growth_kib} KiB",
        began.elapsed()
    );
    assert!(growth_kib < GROWTH_KIB_MAX, "{growth_kib} KiB");
    server.kill();
}
