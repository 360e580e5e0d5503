//! The program as a process of its own, for benchmarks over real HTTP.

use std::{
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A server that the benchmark has started, which ends with this value.
pub(crate) struct Server {
    child: Child,
    /// Where it listens: an IP address and a port.
    pub(crate) address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Server {
    /// Starts a server with its data in an empty directory, and waits until it listens. `settings` are sections of its
    /// `conduit.toml` besides those for its name, its listener, passwords and the log.
    pub(crate) fn start(dir: &Path, settings: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let text = format!(
            "[server]\nname = \"localhost:{port}\"\ndata_dir = \"{}\"\n[[listener]]\naddress = \"{address}\"\n{settings}\
             [passwords]\nargon2_memory_kib = 8\nargon2_iterations = 1\n[log]\nlevel = \"warn\"\n",
            dir.join("data").display()
        );
        let config = dir.join("conduit.toml");
        std::fs::write(&config, text).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_aqueduct"))
            .arg("--config")
            .arg(&config)
            .stdout(Stdio::null())
            .spawn()
            .expect("the binary is built");
        let server = Self { child, address };
        let began = Instant::now();
        while TcpStream::connect(&server.address).is_err() {
            assert!(began.elapsed() < Duration::from_secs(30), "the server does not answer");
            thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// The directory of the server's process in proc(5).
    pub(crate) fn proc(&self) -> String {
        format!("/proc/{}", self.child.id())
    }

    /// The memory that a key of proc(5)'s `status` tells, in MB: `VmRSS` what is resident now, `VmHWM` the most so far.
    pub(crate) fn memory_mb(&self, key: &str) -> f64 {
        let status = std::fs::read_to_string(format!("{}/status", self.proc())).unwrap();
        let line = status.lines().find(|line| line.split(':').next() == Some(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }
}
