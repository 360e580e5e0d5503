//! Files over real HTTP: how fast they come and go beside what the disk does alone, and how many thumbnails a core makes.
//!
//! `cargo bench --bench media`; `-- throughput` or `-- thumbnails` runs one of both. The program is started in an empty directory (below
//! `TMPDIR`) with fsync on. The load shares the cores with it; its own time of the processor is from /proc. Figures: `docs/performance.md`.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a benchmark measures real time and stops at the first fault"
)]

#[path = "support/server.rs"]
mod server;

use std::{
    fs::File,
    io::{BufRead, BufReader, Cursor, Read, Write, copy, sink},
    net::TcpStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};
use server::Server;

const MIB: usize = 1 << 20;
/// This many upload or download at once.
const CONNECTIONS: usize = 16;
/// The sizes of files, in MiB, and how many of each a connection uploads.
const ROUNDS: [(usize, u64); 2] = [(1, 32), (100, 1)];
/// This many thumbnails of each picture are made, two at a time.
const THUMBNAILS: usize = 40;

/// A connection that is kept open, as cheap as possible so that the load costs little of what it measures.
struct Http {
    address: String,
    stream: BufReader<TcpStream>,
}

impl Http {
    fn new(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("the server listens");
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        Self { address: address.to_owned(), stream: BufReader::with_capacity(MIB, stream) }
    }

    /// Sends a request whose body is made of parts.
    fn ask(&mut self, method: &str, path: &str, token: &str, content_type: &str, parts: &[&[u8]]) {
        let bearer =
            if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{bearer}Content-Type: {content_type}\r\nContent-Length: {bytes}\r\n\r\n",
            self.address
        );
        let stream = self.stream.get_mut();
        stream.write_all(head.as_bytes()).unwrap();
        for part in parts {
            stream.write_all(part).unwrap();
        }
    }

    /// Reads the head of an answer, which must be 200, and gives the number of bytes that follow.
    fn length(&mut self) -> usize {
        let (mut status, mut length) = (String::new(), None::<usize>);
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).unwrap();
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if status.is_empty() {
                status = line;
            } else if let Some(value) = line.strip_prefix("content-length:") {
                length = Some(value.trim().parse().unwrap());
            }
        }
        let length = length.expect("the server says how long its answer is");
        if status.split(' ').nth(1) != Some("200") {
            let mut why = vec![0; length];
            self.stream.read_exact(&mut why).unwrap();
            assert_eq!(status, "200", "{}", String::from_utf8_lossy(&why));
        }
        length
    }

    fn json(&mut self) -> Value {
        let mut answer = vec![0; self.length()];
        self.stream.read_exact(&mut answer).unwrap();
        serde_json::from_slice(&answer).unwrap()
    }

    /// Uploads a file that nobody else has uploaded, and gives its path below those of downloads and thumbnails.
    fn upload(&mut self, token: &str, content_type: &str, parts: &[&[u8]]) -> String {
        self.ask("POST", "/_matrix/media/v3/upload", token, content_type, parts);
        let answer = self.json();
        answer["content_uri"].as_str().unwrap().trim_start_matches("mxc://").to_owned()
    }

    /// Gets a file, and gives the number of its bytes.
    fn get(&mut self, token: &str, path: &str) -> usize {
        self.ask("GET", path, token, "application/json", &[]);
        let length = self.length();
        let took = copy(&mut self.stream.by_ref().take(length as u64), &mut sink()).unwrap();
        assert_eq!(took, length as u64, "{path} broke off");
        length
    }
}

/// The server that the benchmark has started, and a user of it.
struct Target {
    server: Server,
    dir: tempfile::TempDir,
    token: String,
}

impl Target {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(
            dir.path(),
            "[registration]\nmode = \"open\"\n[limits]\nrate_limits = false\n[media]\nupload_bytes_max = \"128 MiB\"\n",
        );
        let mut target = Self { server, dir, token: String::new() };
        let body = json!({ "username": "u", "password": "password", "auth": { "type": "m.login.dummy" } })
            .to_string();
        let mut http = target.http();
        http.ask("POST", "/_matrix/client/v3/register", "", "application/json", &[body.as_bytes()]);
        target.token = http.json()["access_token"].as_str().unwrap().to_owned();
        target
    }

    fn http(&self) -> Http {
        Http::new(&self.server.address)
    }

    /// The processor's time that the server has used, in seconds.
    fn cpu_s(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("{}/stat", self.server.proc())).unwrap();
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // Clock ticks of 10 ms: fields 14 and 15 of proc(5), counted after the name.
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
    }

    /// The most memory that the server has had resident so far, in MB.
    fn peak_mb(&self) -> f64 {
        self.server.memory_mb("VmHWM")
    }
}

/// Bytes that nothing makes smaller.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Does something with each context at once, and gives the outcomes and the seconds that all of it took.
fn at_once<C: Send, R: Send>(contexts: Vec<C>, step: impl Fn(C) -> R + Sync) -> (Vec<R>, f64) {
    let began = Instant::now();
    let step = &step;
    let outcomes = thread::scope(|scope| {
        let threads: Vec<_> =
            contexts.into_iter().map(|context| scope.spawn(move || step(context))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    (outcomes, began.elapsed().as_secs_f64())
}

/// Measures the disk alone, with the same files and as many threads: writes with a sync each, and reads, which come from memory where there
/// is enough of it. Both are in MB a second.
fn disk(dir: &Path, noise: &[u8], count: u64) -> (f64, f64) {
    std::fs::create_dir_all(dir).unwrap();
    let path = |connection: usize, number: u64| dir.join(format!("{connection}-{number}"));
    let megabytes = megabytes(noise, count);
    let (_, wrote_s) = at_once((0..CONNECTIONS).collect(), |connection| {
        for number in 0..count {
            let mut file = File::create(path(connection, number)).unwrap();
            file.write_all(noise).unwrap();
            file.sync_all().unwrap();
        }
    });
    let (_, read_s) = at_once((0..CONNECTIONS).collect(), |connection| {
        for number in 0..count {
            let mut file = BufReader::with_capacity(MIB, File::open(path(connection, number)).unwrap());
            assert_eq!(copy(&mut file, &mut sink()).unwrap(), noise.len() as u64);
        }
    });
    std::fs::remove_dir_all(dir).unwrap();
    (megabytes / wrote_s, megabytes / read_s)
}

/// The bytes of all files of a round, in MB.
fn megabytes(noise: &[u8], count: u64) -> f64 {
    noise.len() as f64 * count as f64 * CONNECTIONS as f64 / 1e6
}

fn throughput() {
    for (mib, count) in ROUNDS {
        let target = Target::start();
        let noise = noise(mib * MIB);
        let (disk_writes, disk_reads) = disk(&target.dir.path().join("alone"), &noise, count);
        let megabytes = megabytes(&noise, count);
        let peak_mb = target.peak_mb();
        let cpu_s = target.cpu_s();
        let (paths, took_s) = at_once((0..CONNECTIONS as u64).collect(), |connection| {
            let mut http = target.http();
            let mut paths = Vec::new();
            for number in 0..count {
                let own = ((connection << 32) + number).to_le_bytes();
                let parts = [own.as_slice(), &noise[own.len()..]];
                paths.push(http.upload(&target.token, "application/octet-stream", &parts));
            }
            paths
        });
        tell(
            &format!("upload x{CONNECTIONS}, {mib} MiB"),
            megabytes / took_s,
            disk_writes,
            (target.cpu_s() - cpu_s) / megabytes,
        );
        let cpu_s = target.cpu_s();
        let (_, took_s) = at_once(paths, |paths| {
            let mut http = target.http();
            for path in paths {
                let path = format!("/_matrix/client/v1/media/download/{path}");
                assert_eq!(http.get(&target.token, &path), mib * MIB);
            }
        });
        tell(
            &format!("download x{CONNECTIONS}, {mib} MiB"),
            megabytes / took_s,
            disk_reads,
            (target.cpu_s() - cpu_s) / megabytes,
        );
        println!(
            "{:<28} {:>9.1} MB more at most, after {peak_mb:.1} MB",
            "memory",
            target.peak_mb() - peak_mb
        );
    }
}

fn tell(name: &str, rate: f64, alone: f64, cpu_s_each: f64) {
    println!(
        "{name:<28} {rate:>9.1} MB/s   the disk alone {alone:>9.1} MB/s   {:>7.3} ms CPU a MB",
        cpu_s_each * 1e3
    );
}

/// A picture with slopes and some noise, as photographs have, in this format.
fn picture(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
    let noise = noise(4_096);
    let picture = RgbImage::from_fn(width, height, |x, y| {
        let shade = |of: u32, by: u32| u8::try_from(of * 200 / by).unwrap_or(200);
        let grain = noise[((x * 31 + y * 17) % 4_096) as usize] / 16;
        Rgb([shade(x, width) + grain, shade(y, height) + grain, 100 + grain])
    });
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::from(picture).write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn thumbnails() {
    let target = Target::start();
    let pictures = [
        ("JPEG of 12 megapixels", "image/jpeg", picture(4_000, 3_000, ImageFormat::Jpeg)),
        ("JPEG of 2 megapixels", "image/jpeg", picture(1_600, 1_200, ImageFormat::Jpeg)),
        ("PNG of 2 megapixels", "image/png", picture(1_600, 1_200, ImageFormat::Png)),
        ("WebP of 2 megapixels", "image/webp", picture(1_600, 1_200, ImageFormat::WebP)),
    ];
    for (name, content_type, bytes) in pictures {
        let path = target.http().upload(&target.token, content_type, &[bytes.as_slice()]);
        let cpu_s = target.cpu_s();
        let (_, took_s) = at_once(vec![0, 1], |half| {
            let mut http = target.http();
            // Each has a size of its own, because one that was made once is kept.
            for number in (half..THUMBNAILS).step_by(2) {
                let (width, height) = (320 - number, 240 - number);
                let query = format!("width={width}&height={height}&method=scale");
                http.get(&target.token, &format!("/_matrix/client/v1/media/thumbnail/{path}?{query}"));
            }
        });
        let (count, cpu_s) = (THUMBNAILS as f64, target.cpu_s() - cpu_s);
        println!(
            "{name:<28} {:>9.1} thumbnails a second and core   {:>7.1} ms CPU each   {:>7.1} a second",
            count / cpu_s,
            cpu_s * 1e3 / count,
            count / took_s
        );
    }
    println!("{:<28} {:>9.1} MB at most", "memory", target.peak_mb());
}

fn main() {
    let named: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    for (name, run) in [("throughput", throughput as fn()), ("thumbnails", thumbnails as fn())] {
        if named.is_empty() || named.iter().any(|wanted| wanted == name) {
            run();
        }
    }
}
