//! The program itself: its commands with and without a server, exit codes, start and stop.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "what is not as expected fails the test; a program of its own has no Env"
)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_aqueduct");

/// A port that was free a moment ago; nobody else asks for it by number.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Home {
    dir: TempDir,
    port: u16,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Self { dir, port: free_port() };
        home.write("");
        home
    }

    /// Writes these settings, and the listener and cheap passwords that all tests have.
    fn write(&self, more: &str) {
        let text = format!(
            "{more}\n[[listener]]\naddress = \"127.0.0.1:{}\"\n[passwords]\nargon2_memory_kib = 8\n",
            self.port
        );
        fs::write(self.path().join("conduit.toml"), text).unwrap();
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(self.path());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[&["--json"], args].concat());
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn serve(&self) -> Running {
        self.run_until_stopped(&[])
    }

    fn run_until_stopped(&self, args: &[&str]) -> Running {
        let mut child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                let mut why = String::new();
                child.stderr.take().unwrap().read_to_string(&mut why).unwrap();
                panic!("the server ended with {status}: {why}");
            }
            assert!(began.elapsed() < Duration::from_secs(20), "the server does not listen");
            std::thread::yield_now();
        }
        Running { child, port: self.port }
    }
}

struct Running {
    child: Child,
    port: u16,
}

impl Running {
    fn request(&self, head: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Sends the signal and waits for a clean end. Answers what it printed and logged.
    fn stop(mut self, signal: &str) -> (String, String) {
        let began = Instant::now();
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
        let (mut out, mut log) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {log}");
        assert!(began.elapsed() < Duration::from_secs(5), "stopping took {:?}", began.elapsed());
        (out, log)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn usage_and_refusals_have_their_exit_codes() {
    let home = Home::new();
    assert_eq!(home.run(&["nonsense"]).status.code(), Some(2));
    assert_eq!(home.run(&["user"]).status.code(), Some(2));
    assert_eq!(home.run(&["config", "check"]).status.code(), Some(0));
    let version = String::from_utf8(home.run(&["--version"]).stdout).unwrap();
    assert!(version.starts_with("aqueduct "), "{version}");
    home.write("[server]\nnane = \"x\"\n");
    for args in [&["config", "check"][..], &["serve"], &["user", "list"]] {
        let output = home.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let why = String::from_utf8(output.stderr).unwrap();
        assert!(why.contains("conduit.toml, line 2, server.nane: unknown field"), "{why}");
    }
    let output = home.run(&["--config", "absent.toml", "config", "check"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn the_push_gateway_runs_alone_and_opens_no_store() {
    let home = Home::new();
    let output = home.run(&["push-gateway"]);
    assert_eq!(output.status.code(), Some(1));
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(why.contains("expected at least one [[push_gateway.app]]"), "{why}");
    home.write("[[push_gateway.app]]\nid = \"*\"\nkind = \"apns\"\nkey_file = \"none.p8\"\n");
    let output = home.run(&["push-gateway"]);
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(why.contains("conduit.toml, line 4, push_gateway.app.0.key_file: "), "{why}");

    home.write("[[push_gateway.app]]\nid = \"*\"\nkind = \"unifiedpush\"\n");
    let running = home.run_until_stopped(&["push-gateway"]);
    let answer = running.request("GET /_matrix/push/v1/notify", "");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("unifiedpush"), "{answer}");
    let inside = r#"{"notification":{"devices":[{"app_id":"x","pushkey":"https://127.0.0.1/SECRET"}]}}"#;
    let answer = running.request("POST /_matrix/push/v1/notify", inside);
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("not public"), "{answer}");
    let answer = running.request("GET /_matrix/client/versions", "");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let (_, log) = running.stop("-TERM");
    assert!(log.contains("the push gateway runs") && log.contains("/_matrix/push/v1/notify"), "{log}");
    assert!(!log.contains("SECRET"), "{log}");
    assert!(!home.path().join("data").exists());
}

#[test]
fn commands_do_the_same_without_a_server_and_beside_one() {
    let home = Home::new();
    let alice = home.json(&["user", "create", "alice"]);
    assert_eq!(alice["admin"], true, "the first account is the admin: {alice}");
    let running = home.serve();
    let bob = home.json(&["user", "create", "bob", "--password", "a password of bob"]);
    assert_eq!(bob["admin"], false);
    let socket = fs::metadata(home.path().join("data/operator.sock")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    let token = home.json(&["token", "create", "--uses", "2", "--expires-in", "1h"]);
    let lists = || {
        let mut tokens = home.json(&["token", "list"]);
        // It is shorter each second.
        assert!(tokens["tokens"][0]["ends_in_s"].take().as_u64().is_some_and(|left| left <= 3600));
        (home.json(&["user", "list"]), tokens)
    };
    let beside = lists();
    // The server has what the command made.
    let log_in = r#"{"type":"m.login.password","identifier":{"type":"m.id.user","user":"bob"},"password":"a password of bob"}"#;
    let answer = running.request("POST /_matrix/client/v3/login", log_in);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let taken = home.run(&["user", "create", "bob"]);
    assert_eq!(taken.status.code(), Some(1));
    assert!(String::from_utf8(taken.stderr).unwrap().contains("taken"));
    let (out, _) = running.stop("-TERM");
    assert_eq!(out, "", "there was an account, so nothing is printed");
    assert_eq!(lists(), beside);
    assert_eq!(beside.1["tokens"][0]["token"], token["token"]);
    home.json(&["user", "deactivate", "bob"]);
    assert_eq!(home.json(&["user", "list"])["users"][1]["deactivated"], true);
}

#[test]
fn accounts_are_named_as_people_write_them_and_their_sessions_end() {
    let home = Home::new();
    // A full user id; and what is said against being an admin holds for the first account too.
    let alice = home.json(&[
        "user",
        "create",
        "@Alice:localhost:8008",
        "--no-admin",
        "--password",
        "a long password",
    ]);
    assert_eq!((&alice["user_id"], &alice["admin"]), (&json!("@alice:localhost:8008"), &json!(false)));
    let elsewhere = home.run(&["user", "create", "@bob:other.example"]);
    assert_eq!(elsewhere.status.code(), Some(1));
    assert!(String::from_utf8(elsewhere.stderr).unwrap().contains("localhost:8008"));
    assert_eq!(home.json(&["user", "promote", "ALICE"])["admin"], true);
    assert_eq!(home.json(&["user", "demote", "@alice:localhost:8008"])["admin"], false);
    for (what, key, is) in [
        ("lock", "locked", true),
        ("unlock", "locked", false),
        ("suspend", "suspended", true),
        ("unsuspend", "suspended", false),
    ] {
        assert_eq!(home.json(&["user", what, "ALICE"])[key], is, "{what}");
        assert_eq!(home.json(&["user", "list"])["users"][0][key], is, "{what}");
    }
    assert_eq!(home.run(&["user", "lock", "nobody"]).status.code(), Some(1));
    let email =
        |what: &str| home.json(&["user", "email", what, "ALICE", "Alice@Example.org"])["addresses"].clone();
    assert_eq!(email("add")[0]["address"], "alice@example.org");
    assert_eq!(home.json(&["user", "email", "list", "alice"])["addresses"].as_array().unwrap().len(), 1);
    assert_eq!(email("remove"), json!([]));
    assert_eq!(home.run(&["user", "email", "remove", "alice", "alice@example.org"]).status.code(), Some(1));
    assert_eq!(home.json(&["report", "list"])["reports"], json!([]));
    assert_eq!(home.run(&["report", "dismiss", "alice", "!x:y"]).status.code(), Some(1));

    let running = home.serve();
    let log_in = |device: &str| {
        let body = json!({ "type": "m.login.password", "password": "a long password", "device_id": device,
            "identifier": { "type": "m.id.user", "user": "alice" } });
        let answer = running.request("POST /_matrix/client/v3/login", &body.to_string());
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    };
    log_in("PHONE");
    log_in("LAPTOP");
    let ids = || {
        let devices = home.json(&["user", "devices", "alice"])["devices"].clone();
        devices.as_array().unwrap().iter().map(|device| device["device_id"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(ids(), ["LAPTOP", "PHONE"]);
    assert_eq!(home.json(&["user", "log-out", "alice", "--device", "PHONE"])["devices"], 1);
    assert_eq!(ids(), ["LAPTOP"]);
    assert_eq!(home.run(&["user", "log-out", "alice", "--device", "PHONE"]).status.code(), Some(1));
    log_in("PHONE");
    assert_eq!(home.json(&["user", "log-out", "Alice"])["devices"], 2);
    assert_eq!(ids(), [] as [Value; 0]);
    log_in("PHONE");
    home.json(&["user", "reset-password", "ALICE"]);
    assert_eq!(ids(), [] as [Value; 0]);
    running.stop("-TERM");
}

#[test]
fn a_registration_token_is_of_use_until_it_is_revoked() {
    let home = Home::new();
    for (args, why) in [
        (["--uses", "0"], "for at least one use"),
        (["--expires-in", "0s"], "would end before its first use"),
    ] {
        let output = home.run(&[&["token", "create"][..], &args].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(String::from_utf8(output.stderr).unwrap().contains(why), "{args:?}");
    }
    let token = home.json(&["token", "create", "--token", "welcome"]);
    assert_eq!(token["token"], "welcome");
    assert_eq!(home.json(&["token", "revoke", "welcome"])["token"], "welcome");
    assert_eq!(home.json(&["token", "list"])["tokens"], json!([]));
    let again = home.run(&["token", "revoke", "welcome"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8(again.stderr).unwrap().contains("no such registration token"));
}

#[test]
fn each_start_without_an_account_prints_a_fresh_token_that_makes_the_admin() {
    let home = Home::new();
    let token = |out: &str| {
        let line = out.lines().find(|line| line.contains("token")).unwrap();
        assert!(line.contains("first") && line.contains("admin"), "{line}");
        line.split_whitespace().nth(2).unwrap().to_owned()
    };
    let (first, _) = home.serve().stop("-INT");
    let mut running = home.serve();
    let mut line = String::new();
    BufReader::new(running.child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let (old, new) = (token(&first), token(&line));
    assert_ne!(old, new);
    let register = |token: &str| {
        let auth = format!(r#"{{"type":"m.login.registration_token","token":"{token}"}}"#);
        let body = format!(r#"{{"username":"root","password":"a long password","auth":{auth}}}"#);
        running.request("POST /_matrix/client/v3/register", &body)
    };
    assert!(register(&old).starts_with("HTTP/1.1 401"), "the earlier token is dead");
    let answer = register(&new);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    running.stop("-TERM");
    let users = home.json(&["user", "list"]);
    assert_eq!(users["users"][0]["admin"], true, "{users}");
    assert_eq!(home.serve().stop("-TERM").0, "");
}

#[test]
fn a_server_does_not_change_its_name_and_two_do_not_share_their_data() {
    let home = Home::new();
    home.json(&["user", "create", "alice"]);
    let running = home.serve();
    let second = home.run(&["serve"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8(second.stderr).unwrap().contains("in use"));
    running.stop("-TERM");
    home.write("[server]\nname = \"other.example\"\n");
    let renamed = home.run(&["serve"]);
    assert_eq!(renamed.status.code(), Some(1));
    let why = String::from_utf8(renamed.stderr).unwrap();
    assert!(why.contains("server.name") && why.contains("localhost:8008"), "{why}");
}

#[test]
fn a_backup_is_taken_beside_the_server_and_restored_without_it() {
    let home = Home::new();
    home.json(&["user", "create", "alice"]);
    let running = home.serve();
    home.json(&["db", "backup", "backup"]);
    home.json(&["user", "create", "late"]);
    let beside = home.run(&["db", "restore", "backup"]);
    assert_eq!(beside.status.code(), Some(1));
    running.stop("-TERM");
    home.json(&["db", "restore", "backup"]);
    let users = home.json(&["user", "list"]);
    assert_eq!(users["users"].as_array().unwrap().len(), 1, "{users}");
    assert_eq!(home.json(&["db", "check"])["faults"], 0);
}

#[test]
fn neither_tokens_nor_bodies_are_logged() {
    let home = Home::new();
    home.write("[log]\nlevel = \"trace\"\nformat = \"json\"\n");
    let running = home.serve();
    let body =
        r#"{"type":"m.login.password","identifier":{"type":"m.id.user","user":"u"},"password":"hunter2"}"#;
    running.request("POST /_matrix/client/v3/login?access_token=sesame", body);
    running.request("GET /_matrix/client/v3/account/whoami?access_token=sesame", "");
    let (_, log) = running.stop("-TERM");
    assert!(!log.contains("hunter2") && !log.contains("sesame"), "{log}");
    let line = log.lines().find(|line| line.contains("whoami") && line.contains("took_us")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["route"], "/_matrix/client/v3/account/whoami");
    assert_eq!(line["status"], 401);
    assert!(line["took_us"].is_u64());
}

#[test]
fn a_token_that_opens_a_socket_is_neither_logged_nor_echoed_and_a_stop_says_so() {
    let home = Home::new();
    home.write("[log]\nlevel = \"trace\"\nformat = \"json\"\n");
    home.json(&["user", "create", "alice", "--password", "a long password"]);
    let running = home.serve();
    let log_in = r#"{"type":"m.login.password","identifier":{"type":"m.id.user","user":"alice"},"password":"a long password"}"#;
    let answer = running.request("POST /_matrix/client/v3/login", log_in);
    let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let token = body["access_token"].as_str().unwrap().to_owned();
    let open = |token: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", running.port)).unwrap();
        write!(
            stream,
            "GET /_aqueduct/client/v1/socket HTTP/1.1\r\nHost: x\r\nOrigin: https://elsewhere.example\r\n\
             Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: aqueduct.v1, bearer.{token}\r\n\r\n"
        )
        .unwrap();
        let (mut head, mut stream) = (String::new(), BufReader::new(stream));
        while !head.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
        }
        (head.to_lowercase(), stream)
    };
    let (refused, _) = open("aqa_sesame");
    assert!(refused.starts_with("http/1.1 401 ") && !refused.contains("sesame"), "{refused}");
    let (head, mut socket) = open(&token);
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    assert!(head.contains("sec-websocket-protocol: aqueduct.v1\r\n"), "{head}");
    assert!(!head.contains(&token.to_lowercase()), "{head}");
    // A text of two bytes in a frame whose mask is zero.
    socket.get_mut().write_all(&[0x81, 0x82, 0, 0, 0, 0, b'{', b'}']).unwrap();
    let mut answer = [0; 2];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer[0], 0x81);
    let (_, log) = running.stop("-TERM");
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    let close = rest.windows(4).find(|bytes| bytes[0] == 0x88).unwrap();
    assert_eq!(close[2..], 1012_u16.to_be_bytes());
    assert!(log.contains("a socket ends") && log.contains("/_aqueduct/client/v1/socket"), "{log}");
    assert!(!log.contains(&token) && !log.contains("sesame"), "{log}");
}

#[tokio::test]
async fn tls_unix_sockets_and_metrics_are_served() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    };

    async fn versions(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // A TLS stream may end without its last word.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    let home = Home::new();
    let (tls_port, metrics_port) = (free_port(), free_port());
    let tls = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls");
    home.write(&format!(
        "[[listener]]\nunix = \"http.sock\"\n[[listener]]\naddress = \"127.0.0.1:{tls_port}\"\n\
         tls = {{ certificate = {:?}, key = {:?} }}\n[metrics]\naddress = \"127.0.0.1:{metrics_port}\"",
        tls.join("certificate.pem"),
        tls.join("key.pem"),
    ));
    let running = home.serve();
    let path = "/_matrix/client/versions";

    let unix = tokio::net::UnixStream::connect(home.path().join("http.sock")).await.unwrap();
    assert!(versions(unix, path).await.starts_with("HTTP/1.1 200"));

    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(tls.join("certificate.pem")).unwrap()).unwrap();
    let client = ClientConfig::builder_with_provider(std::sync::Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(("127.0.0.1", tls_port)).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(client));
    let stream = connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap();
    assert!(versions(stream, path).await.starts_with("HTTP/1.1 200"));

    let tcp = tokio::net::TcpStream::connect(("127.0.0.1", metrics_port)).await.unwrap();
    let figures = versions(tcp, "/metrics").await;
    let line =
        r#"aqueduct_http_requests_total{method="GET",route="/_matrix/client/versions",status="200"} 2"#;
    assert!(figures.contains(line), "{figures}");
    running.stop("-TERM");
}

#[test]
fn a_long_poll_does_not_keep_the_server_from_stopping() {
    let home = Home::new();
    home.json(&["user", "create", "alice", "--password", "a password of alice"]);
    let running = home.serve();
    let log_in = r#"{"type":"m.login.password","identifier":{"type":"m.id.user","user":"alice"},"password":"a password of alice"}"#;
    let json =
        |answer: &str| -> Value { serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap() };
    let token = json(&running.request("POST /_matrix/client/v3/login", log_in));
    let token = token["access_token"].as_str().unwrap();
    let first = json(&running.request(&format!("GET /_matrix/client/v3/sync?access_token={token}"), ""));
    let since = first["next_batch"].as_str().unwrap();
    let poll = format!(
        "GET /_matrix/client/v3/sync?timeout=60000&since={since}&access_token={token} HTTP/1.1\r\nHost: x\r\n\r\n"
    );
    let mut stream = TcpStream::connect(("127.0.0.1", running.port)).unwrap();
    stream.write_all(poll.as_bytes()).unwrap();
    // The request waits now, while another that came later is answered.
    running.request("GET /_matrix/client/versions", "");
    running.stop("-TERM");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "the poll was answered before its time: {answer}");
}

#[test]
fn a_server_whose_calls_take_long_stops_in_time() {
    let home = Home::new();
    home.json(&["user", "create", "alice", "--password", "a password of alice"]);
    let settings = fs::read_to_string(home.path().join("conduit.toml")).unwrap();
    // A hash takes minutes with these settings.
    let slow =
        settings.replace("argon2_memory_kib = 8", "argon2_memory_kib = 262144\nargon2_iterations = 100");
    fs::write(home.path().join("conduit.toml"), slow).unwrap();
    let running = home.serve();
    let body = r#"{"username":"bob","password":"a password of bob","admin":false}"#;
    let token = "registration";
    home.json(&["token", "create", "--token", token]);
    let auth = format!(
        r#"{{"auth":{{"type":"m.login.registration_token","token":"{token}","session":"SESSION"}},{}"#,
        body.trim_start_matches('{')
    );
    let answer = running.request("POST /_matrix/client/v3/register", "{}");
    let answer: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let auth = auth.replace("SESSION", answer["session"].as_str().unwrap());
    let length = auth.len();
    let mut stream = TcpStream::connect(("127.0.0.1", running.port)).unwrap();
    write!(
        stream,
        "POST /_matrix/client/v3/register HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{auth}"
    )
    .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let (_, log) = running.stop("-TERM");
    assert!(log.contains("passwords"), "the log says what was left: {log}");
    // The store that it left is whole, and another server takes it up.
    fs::write(home.path().join("conduit.toml"), settings).unwrap();
    assert_eq!(home.json(&["db", "check"])["faults"], 0);
    home.serve().stop("-TERM");
}

/// Writes all of a request with a body of this many bytes, and only then reads.
fn write_first(port: u16, head: &str, length: usize) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n")
        .unwrap();
    let piece = [b'x'; 1 << 16];
    let mut left = length;
    while left > 0 {
        let bytes = left.min(piece.len());
        stream.write_all(piece.get(..bytes).unwrap()).unwrap();
        left -= bytes;
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn who_sends_all_before_listening_gets_the_answer_whole() {
    let home = Home::new();
    let running = home.serve();
    for (head, megabytes, status, code) in [
        ("POST /_matrix/client/v3/nowhere", 1, "404", "M_UNRECOGNIZED"),
        ("POST /_matrix/media/v3/upload", 10, "401", "M_MISSING_TOKEN"),
        ("PUT /_matrix/client/v3/login", 1, "405", "M_UNRECOGNIZED"),
        ("POST /_matrix/client/v3/createRoom", 10, "401", "M_MISSING_TOKEN"),
        ("POST /_matrix/client/v3/login", 17, "413", "M_TOO_LARGE"),
        ("POST /_matrix/client/v3/login", 40, "413", "M_TOO_LARGE"),
    ] {
        let answer = write_first(running.port, head, megabytes << 20);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{head}: {answer}");
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let json: Value = serde_json::from_str(body).unwrap();
        assert_eq!(json["errcode"], code, "{head}");
    }
    running.stop("-TERM");
}

/// The connection is not kept, so requests that come later on it are not read.
#[test]
fn who_sends_slowly_for_ever_is_answered_and_cut_off() {
    let home = Home::new();
    let running = home.serve();
    let mut stream = TcpStream::connect(("127.0.0.1", running.port)).unwrap();
    write!(stream, "POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    let began = Instant::now();
    let mut answers = stream.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut answer = String::new();
        // The end may come as a reset, because the client still sends.
        let _ = answers.read_to_string(&mut answer);
        (answer, began.elapsed())
    });
    while began.elapsed() < Duration::from_secs(30) && stream.write_all(b"1\r\nx\r\n").is_ok() {
        std::thread::park_timeout(Duration::from_millis(100));
    }
    let (answer, took) = reader.join().unwrap();
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("M_UNRECOGNIZED"), "{answer}");
    running.stop("-TERM");
}

/// A client that waits to be asked for its body is told at once that it is not wanted.
#[test]
fn who_waits_to_be_asked_is_not_asked_for_what_is_refused() {
    let home = Home::new();
    let running = home.serve();
    let mut stream = TcpStream::connect(("127.0.0.1", running.port)).unwrap();
    write!(stream, "POST /nowhere HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
        .unwrap();
    let began = Instant::now();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 404");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    running.stop("-TERM");
}

fn published(running: &Running) -> Value {
    let answer = running.request("GET /_matrix/key/v2/server", "");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap_or_else(|_| panic!("no keys: {answer}"))
}

fn names(keys: &Value) -> Vec<&String> {
    keys.as_object().unwrap().keys().collect()
}

#[test]
fn the_state_of_other_servers_is_told_and_a_key_is_replaced() {
    let home = Home::new();
    assert_eq!(home.json(&["federation", "status"])["servers"], json!([]));
    // Without a server nobody tells others anything, and a word that is no name is refused.
    for (args, why) in [
        (&["retry", "elsewhere.example"][..], "no server runs"),
        (&["retry", "not a name"], "not a name"),
        (&["check", "not a name"], "not a name"),
        (&["status", "not a name"], "not a name"),
    ] {
        let output = home.run(&[&["federation"], args].concat());
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {told}");
        assert!(told.contains(why), "{args:?}: {told}");
    }
    let running = home.serve();
    assert_eq!(home.json(&["federation", "status"])["servers"], json!([]));
    let retried = home.json(&["federation", "retry", "127.0.0.1:9"]);
    assert_eq!((&retried["server"], &retried["waited"]), (&json!("127.0.0.1:9"), &json!(false)));
    // Addresses of its own machine are none that a server goes to unless it is told so.
    for command in ["check", "status"] {
        let output = home.run(&["--json", "federation", command, "127.0.0.1:9"]);
        let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "a server that is not reached is a finding");
        assert_eq!((&checked["keys"], &checked["version"]), (&json!([]), &Value::Null));
        assert!(!checked["faults"].as_array().unwrap().is_empty(), "{checked}");
    }
    let before = published(&running);
    let made = home.json(&["federation", "rotate-key"]);
    assert_eq!(published(&running)["verify_keys"], before["verify_keys"], "it signs from the next start on");
    running.stop("-TERM");
    let running = home.serve();
    let after = published(&running);
    let (old, new) = (names(&before["verify_keys"]), names(&after["verify_keys"]));
    assert_eq!((old.len(), new.len()), (1, 1));
    assert_ne!(old, new);
    assert!(made.to_string().contains(new[0].as_str()), "{made}");
    assert_eq!(names(&after["old_verify_keys"]), old, "{after}");
    assert!(after["old_verify_keys"][old[0]]["expired_ts"].as_u64().unwrap() > 0);
}

/// Asks for the state of the index of search until it is as wanted.
fn search_status(home: &Home, is_wanted: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let status = home.json(&["search", "status"]);
        if is_wanted(&status) {
            return status;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "it stays at {status}");
    }
}

#[test]
fn the_index_of_search_is_looked_at_and_built_anew_with_and_without_a_server() {
    let home = Home::new();
    home.json(&["user", "create", "alice", "--password", "a password of alice"]);
    let running = home.serve();
    let log_in = r#"{"type":"m.login.password","identifier":{"type":"m.id.user","user":"alice"},"password":"a password of alice"}"#;
    let body_of = |answer: &str| -> Value {
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    };
    let session = body_of(&running.request("POST /_matrix/client/v3/login", log_in));
    let token = session["access_token"].as_str().unwrap().to_owned();
    let path = |path: &str| format!("/_matrix/client/v3/{path}?access_token={token}");
    let room = body_of(&running.request(&format!("POST {}", path("createRoom")), r#"{"name":"needles"}"#));
    let room = room["room_id"].as_str().unwrap().replace('!', "%21").replace(':', "%3A");
    for number in 0..3 {
        let send = path(&format!("rooms/{room}/send/m.room.message/{number}"));
        body_of(&running.request(&format!("PUT {send}"), r#"{"msgtype":"m.text","body":"needle"}"#));
    }
    let find = |running: &Running| {
        let ask = r#"{"search_categories":{"room_events":{"search_term":"needle","keys":["content.body"]}}}"#;
        let found = body_of(&running.request(&format!("POST {}", path("search")), ask));
        found["search_categories"]["room_events"]["count"].clone()
    };
    // Messages from before are found, however short ago that was.
    assert_eq!(find(&running), 3);
    let is_whole =
        |status: &Value| status["documents"] == 4 && status["lag"] == 0 && status["is_filling"] == false;
    search_status(&home, is_whole);
    let begun = home.json(&["search", "rebuild"]);
    assert!(begun["documents"].is_u64() && begun["is_filling"].is_boolean(), "{begun}");
    search_status(&home, is_whole);
    assert_eq!(find(&running), 3);
    let text = String::from_utf8(home.run(&["search", "status"]).stdout).unwrap();
    assert!(text.starts_with("4 texts are indexed, and 0 positions of the log are to be read."), "{text}");
    running.stop("-TERM");
    // Without a server the command begins, and the next start goes on.
    home.json(&["search", "rebuild"]);
    let running = home.serve();
    search_status(&home, is_whole);
    assert_eq!(find(&running), 3);
    running.stop("-TERM");
    home.write("[search]\nenabled = false\n");
    let running = home.serve();
    for command in ["status", "rebuild"] {
        let output = home.run(&["search", command]);
        let why = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{command}: {why}");
        assert!(why.contains("does not search"), "{command}: {why}");
    }
    running.stop("-TERM");
    assert_eq!(home.run(&["search", "status"]).status.code(), Some(1), "nor does it without a server");
}
